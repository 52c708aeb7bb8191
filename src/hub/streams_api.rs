//! `POST /twins/{device}[/modules/{module}]/streams/{name}`: the service API (wire.md, section a).
//!
//! Owns the reading of the request and the writing of the answer, the metric and the resource log record. Does not
//! know bridges or control sessions. Invariant: every initiation by a policy that may, of a stream that has a valid name,
//! leaves one record.

use std::time::{Duration, Instant, SystemTime};

use http::{StatusCode, header, request::Parts};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::{
    answer::{self, Answer},
    guard::Caller,
    initiate::{self, Initiation, Outcome},
    resource_log::Initiated,
    shared::HubShared,
};
use crate::{
    base::{IdError, Identity},
    proto::streams::{
        ACCEPTED_HEADER, ApiError, CONNECT_TIMEOUT_HEADER, HANDSHAKE_LIMIT, MAX_TIMEOUT, REASON_HEADER,
        RESPONSE_TIMEOUT_HEADER, TOKEN_HEADER, URL_HEADER, parse_timeout,
    },
};

/// The longest api-version that is recorded: `2019-05-01-preview` has 18 characters.
const MAX_API_VERSION: usize = 32;
/// The code in the record of an initiation whose service left. Nobody is answered with it; 499 is what nginx logs then.
const ABANDONED: u32 = 499_000;

/// Serves a request. `gaps` are the path's: device, perhaps module, stream name.
pub(in crate::hub) async fn serve(
    hub: &HubShared,
    caller: &Caller,
    gaps: &[String],
    parts: &Parts,
) -> Result<Answer, ApiError> {
    let wish = read(caller, gaps, parts)
        .inspect_err(|error| hub.metrics.initiations.with_label_values(&[error.name()]).inc())?;
    let mut pending = Pending::new(hub, &wish, api_version(parts));
    let outcome = initiate::initiate(hub, &wish).await;
    pending.ended(&outcome);
    outcome.map(|outcome| write(outcome, is_culvert(parts)))
}

/// An initiation that is recorded when it is over, even if that is because its service left: the request is dropped
/// then wherever it waits.
struct Pending<'a> {
    hub: &'a HubShared,
    began: Instant,
    record: Initiated,
}

impl<'a> Pending<'a> {
    fn new(hub: &'a HubShared, wish: &Initiation, api_version: String) -> Self {
        let record = Initiated {
            at: SystemTime::now(),
            identity: wish.identity.clone(),
            stream: wish.stream.clone(),
            policy: wish.caller.policy.clone(),
            api_version,
            took: Duration::ZERO,
            result: "abandoned",
            code: Some(ABANDONED),
            description: Some("The service left before there was an answer.".into()),
        };
        Self { hub, began: Instant::now(), record }
    }

    fn ended(&mut self, outcome: &Result<Outcome, ApiError>) {
        (self.record.result, self.record.code, self.record.description) = match outcome {
            Ok(Outcome::Accepted { .. }) => ("accepted", None, None),
            Ok(Outcome::Rejected { reason }) => ("rejected", None, reason.clone()),
            Err(error) => (error.name(), Some(error.code()), Some(error.to_string())),
        };
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        self.hub.metrics.initiations.with_label_values(&[self.record.result]).inc();
        self.hub.record(Initiated { took: self.began.elapsed(), ..self.record.clone() });
    }
}

fn read(caller: &Caller, gaps: &[String], parts: &Parts) -> Result<Initiation, ApiError> {
    let invalid = |error: IdError| ApiError::ArgumentInvalid(format!("In the path: {error}."));
    let (device, module, stream) = match gaps {
        [device, stream] => (device, None, stream),
        [device, module, stream] => (device, Some(module), stream),
        _ => return Err(ApiError::NotFound),
    };
    let module = module.map(|module| module.parse()).transpose().map_err(invalid)?;
    // Who names no time at all means the documented limit of the handshake, not twice that.
    let named = [CONNECT_TIMEOUT_HEADER, RESPONSE_TIMEOUT_HEADER].iter().any(|name| parts.headers.contains_key(*name));
    let total = if named { 2 * MAX_TIMEOUT } else { HANDSHAKE_LIMIT };
    Ok(Initiation {
        identity: Identity { device: device.parse().map_err(invalid)?, module },
        stream: stream.parse().map_err(invalid)?,
        caller: caller.clone(),
        connect: timeout(parts, CONNECT_TIMEOUT_HEADER)?,
        response: timeout(parts, RESPONSE_TIMEOUT_HEADER)?,
        total,
    })
}

fn timeout(parts: &Parts, name: &'static str) -> Result<Duration, ApiError> {
    let value = parts.headers.get(name).map(|value| value.to_str().unwrap_or("not text"));
    parse_timeout(value).ok_or_else(|| ApiError::ArgumentInvalid(format!("{name} is not a number of seconds.")))
}

fn api_version(parts: &Parts) -> String {
    let pairs = parts.uri.query().unwrap_or_default().split('&');
    let version = pairs.filter_map(|pair| pair.strip_prefix("api-version=")).next().unwrap_or_default();
    version.chars().take(MAX_API_VERSION).collect()
}

fn is_culvert(parts: &Parts) -> bool {
    let agent = parts.headers.get(header::USER_AGENT).and_then(|value| value.to_str().ok());
    agent.is_some_and(|agent| agent.starts_with("culvert"))
}

fn write(outcome: Outcome, for_culvert: bool) -> Answer {
    let mut answer = answer::empty(StatusCode::OK);
    match outcome {
        Outcome::Accepted { url, token } => {
            answer::set(&mut answer, ACCEPTED_HEADER, "True");
            answer::set(&mut answer, URL_HEADER, &url);
            answer::set(&mut answer, TOKEN_HEADER, token.expose_str().unwrap_or_default());
        }
        Outcome::Rejected { reason } => {
            answer::set(&mut answer, ACCEPTED_HEADER, "False");
            if let Some(reason) = reason.filter(|_| for_culvert) {
                let encoded = utf8_percent_encode(&reason, NON_ALPHANUMERIC).to_string();
                answer::set(&mut answer, REASON_HEADER, &encoded);
            }
        }
    }
    answer
}
