//! The switch from HTTP to WebSocket (RFC 6455, section 4.2).
//!
//! Owns the check of the request and the 101 answer. Does not know what is spoken afterwards. Invariant: one
//! sub-protocol is named if the client offered any, and never an extension: the C SDK can do neither otherwise.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderMap, StatusCode, header};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::answer::{self, Answer};

/// Longest sub-protocol name: `AMQPWSB10` has nine characters.
const MAX_PROTOCOL: usize = 64;

/// A good request to switch.
#[derive(Debug)]
pub(in crate::hub) struct Offer {
    accept: String,
    /// The sub-protocol that is spoken, as the client wrote it, if it offered any.
    pub(in crate::hub) protocol: Option<String>,
}

/// Why a request to switch is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::hub) enum OfferError {
    /// It does not ask for WebSocket.
    NotUpgrade,
    /// It asks for another version.
    Version,
    /// Its key or sub-protocol is malformed.
    Malformed,
}

impl Offer {
    /// Reads the headers of a request. Of several sub-protocols `ours` is chosen, in any case, else the first.
    pub(in crate::hub) fn read(headers: &HeaderMap, ours: &str) -> Result<Self, OfferError> {
        if !lists(headers, header::CONNECTION, "upgrade") || !lists(headers, header::UPGRADE, "websocket") {
            return Err(OfferError::NotUpgrade);
        }
        if headers.get(header::SEC_WEBSOCKET_VERSION).is_none_or(|version| version != "13") {
            return Err(OfferError::Version);
        }
        let key = headers.get(header::SEC_WEBSOCKET_KEY).ok_or(OfferError::Malformed)?;
        if STANDARD.decode(key.as_bytes()).map(|key| key.len()) != Ok(16) {
            return Err(OfferError::Malformed);
        }
        Ok(Self { accept: derive_accept_key(key.as_bytes()), protocol: choose_protocol(headers, ours)? })
    }

    /// The 101 answer.
    pub(in crate::hub) fn answer(&self) -> Answer {
        let mut answer = answer::empty(StatusCode::SWITCHING_PROTOCOLS);
        answer::set(&mut answer, "connection", "Upgrade");
        answer::set(&mut answer, "upgrade", "websocket");
        answer::set(&mut answer, "sec-websocket-accept", &self.accept);
        if let Some(protocol) = &self.protocol {
            answer::set(&mut answer, "sec-websocket-protocol", protocol);
        }
        answer
    }
}

impl OfferError {
    pub(in crate::hub) fn answer(self) -> Answer {
        match self {
            Self::NotUpgrade => upgrade_required("This address speaks WebSocket.\n"),
            Self::Version => upgrade_required("Only WebSocket version 13.\n"),
            Self::Malformed => answer::refusal(StatusCode::BAD_REQUEST, "A malformed WebSocket request.\n"),
        }
    }
}

/// Says what would be spoken after an upgrade (RFC 9110, section 15.5.22; RFC 6455, section 4.4).
fn upgrade_required(text: &'static str) -> Answer {
    let mut answer = answer::refusal(StatusCode::UPGRADE_REQUIRED, text);
    answer::set(&mut answer, "connection", "upgrade, close");
    answer::set(&mut answer, "upgrade", "websocket");
    answer::set(&mut answer, "sec-websocket-version", "13");
    answer
}

/// True if the comma-separated header names `wanted`, in any case.
fn lists(headers: &HeaderMap, name: header::HeaderName, wanted: &str) -> bool {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|word| word.trim().eq_ignore_ascii_case(wanted))
}

fn choose_protocol(headers: &HeaderMap, ours: &str) -> Result<Option<String>, OfferError> {
    let mut chosen: Option<&str> = None;
    for offered in headers.get_all(header::SEC_WEBSOCKET_PROTOCOL) {
        for word in offered.to_str().map_err(|_| OfferError::Malformed)?.split(',').map(str::trim) {
            if word.is_empty() || word.len() > MAX_PROTOCOL || !word.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(OfferError::Malformed);
            }
            if chosen.is_none_or(|chosen| word.eq_ignore_ascii_case(ours) && !chosen.eq_ignore_ascii_case(ours)) {
                chosen = Some(word);
            }
        }
    }
    Ok(chosen.map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(offers: &[&str]) -> Result<Option<String>, OfferError> {
        let mut headers = HeaderMap::new();
        for offer in offers {
            headers.append(header::SEC_WEBSOCKET_PROTOCOL, offer.parse().unwrap());
        }
        choose_protocol(&headers, "mqtt")
    }

    #[test]
    fn one_sub_protocol_is_chosen_as_the_client_wrote_it() {
        let some = |name: &str| Ok(Some(name.to_owned()));
        assert_eq!(chosen(&[]), Ok(None));
        assert_eq!(chosen(&["MQTT"]), some("MQTT"));
        assert_eq!(chosen(&["mqttv3.1, mqtt"]), some("mqtt"));
        assert_eq!(chosen(&["mqttv3.1", "Mqtt,mqtt"]), some("Mqtt"));
        assert_eq!(chosen(&["AMQP , HTTP"]), some("AMQP"));
        for bad in [&[""][..], &["a,"], &["mqtt", ""], &["a b"], &[&"x".repeat(65)]] {
            assert_eq!(chosen(bad), Err(OfferError::Malformed), "{bad:?}");
        }
    }
}
