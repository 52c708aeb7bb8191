//! Answers of the HTTPS API.
//!
//! Owns the shape of success and failure on the wire. Does not know routes. Invariant: every answer carries
//! an ID; that of a failure within the hub is in the log, too.

use std::time::SystemTime;

use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::Full;
use serde_json::Value;

use super::random;
use crate::{
    base::Utc,
    proto::streams::{ApiError, ERROR_HEADER},
};

/// A whole answer.
pub(in crate::hub) type Answer = Response<Full<Bytes>>;

const JSON: HeaderValue = HeaderValue::from_static("application/json; charset=utf-8");
const REQUEST_ID: &str = "x-ms-request-id";

/// An answer without a body.
pub(in crate::hub) fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(Full::default());
    *answer.status_mut() = status;
    set(&mut answer, REQUEST_ID, &random::uuid());
    answer
}

/// 200 with JSON.
pub(in crate::hub) fn json(value: &Value) -> Answer {
    let mut answer = empty(StatusCode::OK);
    *answer.body_mut() = Full::from(value.to_string());
    answer.headers_mut().insert(header::CONTENT_TYPE, JSON);
    answer
}

/// An error in the cloud's shape. A refused caller's connection ends, so that guessing costs a handshake each.
pub(in crate::hub) fn error(error: &ApiError) -> Answer {
    let id = random::uuid();
    let tracking = id.replace('-', "");
    if matches!(error, ApiError::Internal) {
        tracing::error!(tracking, "answered that the hub itself failed: the line before this one has the reason");
    }
    let mut answer = Response::new(Full::from(error.body(&tracking, Utc::from(SystemTime::now()))));
    *answer.status_mut() = StatusCode::from_u16(error.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    answer.headers_mut().insert(header::CONTENT_TYPE, JSON);
    set(&mut answer, REQUEST_ID, &id);
    set(&mut answer, ERROR_HEADER, error.name());
    if let Some(seconds) = error.retry_after() {
        answer.headers_mut().insert(header::RETRY_AFTER, seconds.into());
    }
    if matches!(error, ApiError::Unauthorized(_)) {
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        challenge(&mut answer, "SharedAccessSignature");
    }
    answer
}

/// A refusal in one line of text, for paths that are not the API: the connection ends.
pub(in crate::hub) fn refusal(status: StatusCode, text: &'static str) -> Answer {
    let mut answer = empty(status);
    *answer.body_mut() = Full::from(text);
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    answer
}

/// Says which kind of credential a 401 wants (RFC 9110, section 11.6.1).
pub(in crate::hub) fn challenge(answer: &mut Answer, scheme: &'static str) {
    answer.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(scheme));
}

/// Sets a header. A value that HTTP does not allow is left out.
pub(in crate::hub) fn set(answer: &mut Answer, name: &'static str, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        answer.headers_mut().insert(name, value);
    }
}
