//! The hub's REST API, as a policy's owner sees it.
//!
//! Owns the signing of requests and the reading of errors. Does not know which requests there are.
//! Invariant: a connection string's secret goes nowhere but into a signature.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use http::{HeaderValue, Method, StatusCode, header};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::Value;

use super::{
    args::HubAccess,
    exit::{Failure, Outcome},
    init::{CA_FILE, OWNER_FILE},
    places,
};
use crate::{
    auth::{ConnectionString, Credential, Owner, sas},
    base::{Secret, Utc, printable},
    transport::{
        dial::{Dialer, ProxyRules},
        http::{HttpRequest, HttpResponse, Url, request},
        tls::{ClientTls, Trust},
    },
};

/// The version that we name; the hub takes any.
const API_VERSION: &str = "api-version=2020-09-30";
/// For one request, the connection included: a person waits.
const TIMEOUT: Duration = Duration::from_secs(20);
/// A token is made for one request; this leaves room for a wrong clock.
const TOKEN_SECONDS: u64 = 900;
/// What needs no encoding in one segment of a path.
const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// The hub's refusal, in its own words.
#[derive(Debug, thiserror::Error)]
#[error("the hub refuses: {} {words}{hint}", status.as_u16())]
pub(super) struct Refusal {
    status: StatusCode,
    words: String,
    hint: &'static str,
}

impl Refusal {
    #[cfg(test)]
    pub(super) fn of(status: StatusCode) -> Self {
        Self { status, words: String::new(), hint: "" }
    }

    /// True if somebody else changed the record after it was read.
    pub(super) fn is_stale(&self) -> bool {
        self.status == StatusCode::PRECONDITION_FAILED
    }
}

/// A hub, and the right to ask it.
pub(super) struct Api {
    dialer: Dialer,
    who: ConnectionString,
}

impl Api {
    /// Reads the connection string and the CA that the options name.
    pub(super) fn open(access: &HubAccess) -> Outcome<Self> {
        let file = access.connection_string_file.clone().unwrap_or_else(|| places::find(OWNER_FILE));
        let text = std::fs::read_to_string(&file)
            .with_context(|| format!("{} (--connection-string-file names another)", file.display()))
            .map_err(Failure::config)?;
        let who: ConnectionString =
            text.parse().with_context(|| file.display().to_string()).map_err(Failure::config)?;
        if !matches!(who.owner, Owner::Policy(_)) {
            let wrong = anyhow!("{}: this is a device's connection string; a policy's is needed", file.display());
            return Err(Failure::config(wrong));
        }
        let beside = || file.parent().unwrap_or(Path::new(".")).join(CA_FILE);
        let ca = access.ca_file.clone().or_else(|| Some(beside()).filter(|ca| ca.exists()));
        let tls = ClientTls::new(&ca.map_or(Trust::System, Trust::File), None).map_err(Failure::config)?;
        let proxies = ProxyRules::from_environment(|name| std::env::var(name).ok()).map_err(Failure::config)?;
        Ok(Self { dialer: Dialer::new(tls, proxies), who })
    }

    /// The hub's name.
    pub(super) fn hub(&self) -> &ConnectionString {
        &self.who
    }

    /// Sends a request to a path of encoded segments, and yields the JSON of a good answer.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        etag: Option<&str>,
    ) -> Outcome<Value> {
        let mut headers = vec![(header::AUTHORIZATION, self.token()?)];
        headers.push((header::USER_AGENT, HeaderValue::from_static(concat!("culvert/", env!("CARGO_PKG_VERSION")))));
        if body.is_some() {
            headers.push((header::CONTENT_TYPE, HeaderValue::from_static("application/json; charset=utf-8")));
        }
        if let Some(etag) = etag {
            headers.push((header::IF_MATCH, HeaderValue::from_str(etag).map_err(Failure::software)?));
        }
        let joint = if path.contains('?') { '&' } else { '?' };
        let url = Url {
            host: self.who.dial_host().to_owned(),
            port: self.who.port,
            path: format!("{path}{joint}{API_VERSION}"),
        };
        let body = body.map(|value| Bytes::from(value.to_string())).unwrap_or_default();
        let sent = request(&self.dialer, HttpRequest { method, url, headers, body, timeout: TIMEOUT }).await;
        read_answer(&sent.map_err(Failure::unavailable)?)
    }

    fn token(&self) -> Outcome<HeaderValue> {
        let token = match (&self.who.credential, &self.who.owner) {
            (Credential::Key(key), Owner::Policy(policy)) => {
                let expiry = Utc::from(std::time::SystemTime::now()).seconds() + TOKEN_SECONDS;
                sas::sign(&self.who.host, key, expiry, Some(policy))
            }
            (Credential::Token(token), _) => token.clone(),
            (Credential::Key(_) | Credential::X509, _) => Secret::new([]),
        };
        let mut value = HeaderValue::from_bytes(token.expose()).map_err(Failure::config)?;
        value.set_sensitive(true);
        Ok(value)
    }
}

/// A path segment with everything encoded that a device ID may hold.
pub(super) fn segment(text: &str) -> impl std::fmt::Display + '_ {
    utf8_percent_encode(text, SEGMENT)
}

fn read_answer(answer: &HttpResponse) -> Outcome<Value> {
    if !answer.status.is_success() {
        return Err(Failure::unavailable(refusal(answer)));
    }
    if answer.body.is_empty() {
        return Ok(Value::Null);
    }
    let parsed = serde_json::from_slice(&answer.body).context("the hub's answer is not JSON");
    parsed.map_err(Failure::unavailable)
}

/// The hub's own words, which stand in JSON inside JSON (wire.md, section a), and what to do about them.
fn refusal(answer: &HttpResponse) -> Refusal {
    let outer: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    let message = outer["Message"].as_str().unwrap_or_default();
    let inner: Value = serde_json::from_str(message).unwrap_or_default();
    let words = inner["message"].as_str().unwrap_or(message);
    let hint = match answer.status {
        StatusCode::UNAUTHORIZED if words.contains("needed: ") => {
            " (use the connection string of a policy that has this right: on the hub's machine, owner.connection)"
        }
        StatusCode::UNAUTHORIZED => " (is the connection string this hub's, and this machine's clock right?)",
        _ => "",
    };
    Refusal { status: answer.status, words: printable(words).into_owned(), hint }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_in_the_hubs_words() {
        let body = r#"{"Message":"{\"errorCode\":404001,\"message\":\"No device\\nhere\"}","ExceptionMessage":""}"#;
        let answer = HttpResponse {
            status: StatusCode::NOT_FOUND,
            headers: http::HeaderMap::new(),
            body: Bytes::from_static(body.as_bytes()),
        };
        assert_eq!(refusal(&answer).to_string(), r"the hub refuses: 404 No device\nhere");
    }

    #[test]
    fn a_segment_hides_every_character_with_a_meaning() {
        assert_eq!(segment("a:b%c?d#e;f=g").to_string(), "a%3Ab%25c%3Fd%23e%3Bf%3Dg");
    }
}
