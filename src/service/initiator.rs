//! Asks the hub for a device stream.
//!
//! Owns the POST, and the words for each way in which it fails. Does not know what the device stream is for, nor when
//! to ask again. Invariant: the answer is a grant or an error that says what to do; the hub always answers, and if it
//! does not, we stop waiting a little after both timeouts.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, StatusCode};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use crate::{
    agent::{CarrierFailure, Failure, HubCarrier, HubClient, skew_hint},
    base::{Identity, Secret, StreamName, printable},
    proto::streams::{
        ACCEPTED_HEADER, CONNECT_TIMEOUT_HEADER, REASON_HEADER, RESPONSE_TIMEOUT_HEADER, TOKEN_HEADER, URL_HEADER,
    },
    transport::{
        carrier::CarrierOptions,
        http::{HttpError, HttpResponse, fuzz_answer as fuzz_http_answer},
    },
};

/// How long the hub may take beyond the timeouts that we asked for.
const MARGIN: Duration = Duration::from_secs(15);
const API_VERSION: &str = "2020-09-30";
const COMPONENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// A device stream that the device has accepted: our leg's address and ticket.
#[derive(Debug)]
pub(super) struct Grant {
    /// Where to connect.
    pub(super) url: String,
    /// What admits us, once.
    pub(super) ticket: Secret,
}

/// How long to wait for the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience {
    /// For an offline device to appear.
    pub(super) connect: Duration,
    /// For a connected device to answer.
    pub(super) response: Duration,
}

/// Why there is no device stream. Display is for the log and for `/readyz`.
#[derive(Debug, thiserror::Error)]
pub enum InitiateError {
    /// No answer from the hub.
    #[error("{}", chain(.0))]
    Hub(#[from] HttpError),
    /// Our leg could not be opened.
    #[error("the device accepted, but our leg could not be opened: {0}")]
    Leg(#[from] CarrierFailure),
    /// The device said no.
    #[error("device {device} rejected the device stream{}", detail(reason))]
    Rejected {
        /// The device.
        device: Identity,
        /// Its reason; empty if it gave none.
        reason: String,
    },
    /// The device is not connected to the hub.
    #[error("device {device} is not online; waited {} s", waited.as_secs())]
    Offline {
        /// The device.
        device: Identity,
        /// How long the hub waited for it.
        waited: Duration,
    },
    /// The device is connected and did not answer.
    #[error("device {device} is online, but did not answer within {} s", waited.as_secs())]
    Silent {
        /// The device.
        device: Identity,
        /// How long the hub waited.
        waited: Duration,
    },
    /// The hub has no such device.
    #[error("the hub knows no device {device}; add it with `culvert registry add`, or correct the forward")]
    Unknown {
        /// The device.
        device: Identity,
    },
    /// The hub does not accept our credential.
    #[error("the hub does not accept our credential for policy {policy}: {message}{hint}")]
    Unauthorized {
        /// The policy of our connection string.
        policy: String,
        /// What the hub said.
        message: String,
        /// A guess at the cause.
        hint: String,
    },
    /// The hub wants us to stay away for a while.
    #[error("the hub is busy ({status}){}", detail(message))]
    Busy {
        /// 429 or 503.
        status: u16,
        /// What it said.
        message: String,
        /// How long to stay away.
        retry_after: Option<Duration>,
    },
    /// Anything else.
    #[error("the hub answered {status}{}", detail(message))]
    Other {
        /// The status.
        status: u16,
        /// What it said.
        message: String,
    },
}

impl InitiateError {
    /// True if the hub or the device said no: waiting will not help the connection that asks now.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self, Self::Rejected { .. } | Self::Unknown { .. } | Self::Unauthorized { .. })
    }

    /// What it means for the next attempt.
    pub fn failure(&self) -> Failure {
        match self {
            Self::Hub(error) if error.is_path_failure() => Failure::Path,
            Self::Hub(error) if error.is_refused() => Failure::Refused,
            Self::Leg(error) => error.failure(),
            Self::Busy { retry_after, .. } => Failure::Answered(*retry_after),
            // The hub has waited for the device already: ask again at once, and it goes on waiting. A device that is
            // silent may be at the far end of a path that is gone; it is asked again when it comes back.
            Self::Offline { .. } | Self::Silent { .. } => Failure::Answered(Some(Duration::ZERO)),
            _ => Failure::Answered(None),
        }
    }
}

/// Opens a device stream: asks, and connects our leg. Calls `reached` once the hub has been reached.
pub(super) async fn open(
    hub: &HubClient,
    device: &Identity,
    stream: &StreamName,
    patience: Patience,
    options: CarrierOptions,
    reached: impl FnOnce() + Send,
) -> Result<HubCarrier, InitiateError> {
    let grant = initiate(hub, device, stream, patience, reached).await?;
    Ok(hub.carrier(&grant.url, &grant.ticket, options).await?)
}

/// Asks the hub for a device stream. Calls `reached` once the hub has been reached.
pub(super) async fn initiate(
    hub: &HubClient,
    device: &Identity,
    stream: &StreamName,
    patience: Patience,
    reached: impl FnOnce() + Send,
) -> Result<Grant, InitiateError> {
    let headers = vec![
        (HeaderName::from_static(CONNECT_TIMEOUT_HEADER), seconds(patience.connect)),
        (HeaderName::from_static(RESPONSE_TIMEOUT_HEADER), seconds(patience.response)),
    ];
    let limit = patience.connect + patience.response + MARGIN;
    let path = path(device, stream);
    let response = hub.request_noting(Method::POST, &path, headers, Bytes::new(), limit, reached).await?;
    if response.status != StatusCode::OK {
        return Err(refusal(hub, device, patience, &response));
    }
    if response.header(ACCEPTED_HEADER) != Some("True") {
        let reason = response.header(REASON_HEADER).map(decoded).unwrap_or_default();
        return Err(InitiateError::Rejected { device: device.clone(), reason });
    }
    let (url, ticket) = (response.header(URL_HEADER), response.header(TOKEN_HEADER));
    let (Some(url), Some(ticket)) = (url, ticket) else {
        let message = format!("accepted, but without {URL_HEADER} and {TOKEN_HEADER}");
        return Err(InitiateError::Other { status: 200, message });
    };
    Ok(Grant { url: url.to_owned(), ticket: Secret::new(ticket) })
}

fn path(device: &Identity, stream: &StreamName) -> String {
    let encode = |text: &str| utf8_percent_encode(text, COMPONENT).to_string();
    let module = device.module.as_ref().map(|id| format!("/modules/{}", encode(id.as_str()))).unwrap_or_default();
    let (device, stream) = (encode(device.device.as_str()), encode(stream.as_str()));
    format!("/twins/{device}{module}/streams/{stream}?api-version={API_VERSION}")
}

/// Whole seconds, as the SDKs write them, unless there is a fraction.
fn seconds(span: Duration) -> HeaderValue {
    let text = span.as_secs_f64().to_string();
    HeaderValue::from_str(&text).unwrap_or_else(|_| HeaderValue::from_static("60"))
}

fn refusal(hub: &HubClient, device: &Identity, patience: Patience, response: &HttpResponse) -> InitiateError {
    let (code, message) = error_of(&response.body);
    let device = device.clone();
    match (response.status.as_u16(), code) {
        (401, _) => InitiateError::Unauthorized {
            policy: hub.policy().map_or_else(|| "(none)".into(), ToString::to_string),
            message,
            hint: skew_hint(response),
        },
        (404, 404_103) => InitiateError::Offline { device, waited: patience.connect },
        (404, _) => InitiateError::Unknown { device },
        (504, _) => InitiateError::Silent { device, waited: patience.response },
        (status @ (429 | 503), _) => InitiateError::Busy { status, message, retry_after: response.retry_after() },
        (status, _) => InitiateError::Other { status, message },
    }
}

/// The six-digit code and the message of an error body; the message is the body's beginning if it is not of the
/// expected form.
fn error_of(body: &[u8]) -> (u64, String) {
    let parsed = || {
        let outer: serde_json::Value = serde_json::from_slice(body).ok()?;
        let inner: serde_json::Value = serde_json::from_str(outer.get("Message")?.as_str()?).ok()?;
        Some((inner.get("errorCode")?.as_u64()?, printable(inner.get("message")?.as_str()?).into_owned()))
    };
    parsed().unwrap_or_else(|| {
        let text = String::from_utf8_lossy(&body[..body.len().min(200)]);
        (0, printable(&text).into_owned())
    })
}

/// Any bytes as the hub's answer to a stream initiation: understood or not, what is printed of it drives no terminal.
/// For fuzzers.
///
/// # Panics
/// If it would.
pub fn fuzz_answer(data: &[u8]) {
    let Some(response) = fuzz_http_answer(data) else { return };
    let (_, message) = error_of(&response.body);
    let reason = response.header(REASON_HEADER).map(decoded).unwrap_or_default();
    assert!(![message, reason].iter().any(|text| text.contains(char::is_control)), "{response:?}");
}

fn decoded(text: &str) -> String {
    printable(&percent_decode_str(text).decode_utf8_lossy()).into_owned()
}

fn detail(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(": {text}") }
}

/// An error and its causes in one line.
fn chain(error: &HttpError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let words = cause.to_string();
        // Some levels repeat their cause's words.
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{base::Utc, proto::streams::ApiError};

    #[test]
    fn ids_are_encoded_into_the_path() {
        let path = path(&"a b".replace(' ', "%").parse().unwrap(), &"TestStream".parse().unwrap());
        assert_eq!(path, "/twins/a%25b/streams/TestStream?api-version=2020-09-30");
    }

    #[test]
    fn the_hubs_error_bodies_are_read() {
        let error = ApiError::DeviceNotOnline { timeout: Duration::from_secs(30) };
        let (code, message) = error_of(error.body("0", Utc(0)).as_bytes());
        assert_eq!(code, 404_103);
        assert!(message.contains("isn't online") || message.contains("isn\\'t online"), "{message}");
        assert_eq!(error_of(b"<html>\x1b"), (0, "<html>\\u{1b}".into()));
    }

    #[test]
    fn timeouts_are_written_as_decimal_seconds() {
        assert_eq!(seconds(Duration::from_secs(30)), "30");
        assert_eq!(seconds(Duration::from_millis(1500)), "1.5");
    }
}
