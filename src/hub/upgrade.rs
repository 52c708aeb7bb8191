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
    /// The first sub-protocol that the client offered, as it wrote it.
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
    /// Reads the headers of a request.
    pub(in crate::hub) fn read(headers: &HeaderMap) -> Result<Self, OfferError> {
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
        Ok(Self { accept: derive_accept_key(key.as_bytes()), protocol: first_protocol(headers)? })
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
            Self::NotUpgrade => answer::refusal(StatusCode::UPGRADE_REQUIRED, "This address speaks WebSocket.\n"),
            Self::Version => {
                let mut answer = answer::refusal(StatusCode::UPGRADE_REQUIRED, "Only WebSocket version 13.\n");
                answer::set(&mut answer, "sec-websocket-version", "13");
                answer
            }
            Self::Malformed => answer::refusal(StatusCode::BAD_REQUEST, "A malformed WebSocket request.\n"),
        }
    }
}

/// True if the comma-separated header names `wanted`, in any case.
fn lists(headers: &HeaderMap, name: header::HeaderName, wanted: &str) -> bool {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|word| word.trim().eq_ignore_ascii_case(wanted))
}

fn first_protocol(headers: &HeaderMap) -> Result<Option<String>, OfferError> {
    let Some(offered) = headers.get(header::SEC_WEBSOCKET_PROTOCOL) else { return Ok(None) };
    let offered = offered.to_str().map_err(|_| OfferError::Malformed)?;
    let first = offered.split(',').next().unwrap_or_default().trim();
    let good = !first.is_empty() && first.len() <= MAX_PROTOCOL && first.bytes().all(|byte| byte.is_ascii_graphic());
    if good { Ok(Some(first.to_owned())) } else { Err(OfferError::Malformed) }
}
