//! The registry's REST API in the shape of IoT Hub: `/devices`, `/devices/{id}`, `/devices/{id}/modules[/{id}]`.
//!
//! Owns the JSON of an identity and the meaning of If-Match. Does not know SQL or who is calling.
//! Invariant: what is read can be written back unchanged; a body never names another identity than its path.

use std::time::SystemTime;

use http::{HeaderMap, Method, StatusCode, header, request::Parts};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{
    answer::{self, Answer},
    guard::Caller,
    random,
    record::{Authentication, DeviceRecord, DeviceSpec, Thumbprint},
    registry::{Precondition, RegistryError},
    shared::HubShared,
};
use crate::{
    auth::key::{decode_key, encode_key},
    base::{DeviceId, Identity, Secret, Utc},
    proto::streams::ApiError,
};

/// Longest body of a request: an identity with everything has less than 4 KiB.
const MAX_BODY: usize = 64 * 1024;
/// Most devices in one answer, as in IoT Hub.
const MAX_TOP: usize = 1000;
/// Longest text for people that is stored with an identity, as in IoT Hub.
const MAX_STATUS_REASON: usize = 128;
/// What IoT Hub shows for a time that never was.
const NEVER: &str = "0001-01-01T00:00:00";

/// `GET /devices?top=N`.
pub(in crate::hub) fn list(hub: &HubShared, caller: &Caller, query: &str) -> Result<Answer, ApiError> {
    let top = query.split('&').find_map(|pair| pair.strip_prefix("top="));
    let top = top.map_or(Ok(MAX_TOP), str::parse).ok().filter(|top| (1..=MAX_TOP).contains(top));
    let top = top.ok_or_else(|| ApiError::ArgumentInvalid(format!("top is not a number from 1 to {MAX_TOP}.")))?;
    let config = hub.config();
    let devices = hub.registry.devices(top, |device| caller.may_reach(&config, device));
    Ok(answer::json(&devices.iter().map(|record| to_json(hub, record)).collect()))
}

/// `GET /devices/{id}/modules`.
pub(in crate::hub) fn modules(hub: &HubShared, caller: &Caller, gaps: &[String]) -> Result<Answer, ApiError> {
    let identity = identity_of(gaps)?;
    caller.require_reach(&hub.config(), &identity.device)?;
    hub.registry.find(&identity).ok_or(ApiError::DeviceNotFound)?;
    let modules = hub.registry.modules(&identity.device);
    Ok(answer::json(&modules.iter().map(|record| to_json(hub, record)).collect()))
}

/// `GET`, `PUT` and `DELETE` of one identity.
pub(in crate::hub) async fn serve(
    hub: &HubShared,
    caller: &Caller,
    gaps: &[String],
    parts: &Parts,
    body: Incoming,
) -> Result<Answer, ApiError> {
    let identity = identity_of(gaps)?;
    caller.require_reach(&hub.config(), &identity.device)?;
    match parts.method {
        Method::GET => {
            let record = hub.registry.find(&identity).ok_or_else(|| not_found(&identity))?;
            Ok(with_etag(hub, &record))
        }
        Method::PUT => put(hub, identity, &parts.headers, body).await,
        Method::DELETE => delete(hub, &identity, &parts.headers).await,
        _ => Err(ApiError::MethodNotAllowed),
    }
}

async fn put(hub: &HubShared, identity: Identity, headers: &HeaderMap, body: Incoming) -> Result<Answer, ApiError> {
    let body = read_body(hub, body).await?;
    let body: Body = serde_json::from_slice(&body)
        .map_err(|error| ApiError::ArgumentInvalid(format!("The body is not a device in JSON: {error}.")))?;
    body.check_names(&identity)?;
    // Without If-Match a PUT creates, as in IoT Hub.
    let when = if_match(headers)?.unwrap_or(Precondition::Absent);
    let record = hub.registry.update(identity.clone(), when, move |old| body.spec(identity, old)).await?;
    tracing::info!(device = %record.identity, enabled = record.enabled, "identity registered");
    Ok(with_etag(hub, &record))
}

async fn delete(hub: &HubShared, identity: &Identity, headers: &HeaderMap) -> Result<Answer, ApiError> {
    let when = if_match(headers)?.unwrap_or(Precondition::Any);
    hub.registry.delete(identity, when).await?;
    // Who is registered anew under this name finds nothing of it.
    match identity.module {
        Some(_) => hub.sessions.forget(identity),
        None => hub.sessions.forget_family(&identity.device),
    }
    tracing::info!(device = %identity, "identity removed");
    Ok(answer::empty(StatusCode::NO_CONTENT))
}

async fn read_body(hub: &HubShared, body: Incoming) -> Result<bytes::Bytes, ApiError> {
    let limit = hub.config().limits.request_body_timeout;
    match timeout(limit, Limited::new(body, MAX_BODY).collect()).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ApiError::BodyTooLarge),
        Ok(Err(_)) | Err(_) => Err(ApiError::ArgumentInvalid("The body did not come in time, or not whole.".into())),
    }
}

/// `*`, `"*"`, `etag` or `"etag"`: SDKs differ.
fn if_match(headers: &HeaderMap) -> Result<Option<Precondition>, ApiError> {
    let Some(value) = headers.get(header::IF_MATCH) else { return Ok(None) };
    let text = value.to_str().map_err(|_| ApiError::ArgumentInvalid("If-Match is not text.".into()))?;
    let etag = text.trim().trim_start_matches("W/").trim_matches('"');
    Ok(Some(if etag == "*" { Precondition::Present } else { Precondition::Etag(etag.into()) }))
}

fn identity_of(gaps: &[String]) -> Result<Identity, ApiError> {
    let invalid = |error| ApiError::ArgumentInvalid(format!("In the path: {error}."));
    let (device, module) = match gaps {
        [device] => (device, None),
        [device, module] => (device, Some(module.parse().map_err(invalid)?)),
        _ => return Err(ApiError::NotFound),
    };
    Ok(Identity { device: device.parse::<DeviceId>().map_err(invalid)?, module })
}

fn not_found(identity: &Identity) -> ApiError {
    if identity.module.is_some() { ApiError::ModuleNotFound } else { ApiError::DeviceNotFound }
}

impl From<RegistryError> for ApiError {
    fn from(error: RegistryError) -> Self {
        match error {
            RegistryError::Exists(Identity { module: Some(_), .. }) => Self::ModuleAlreadyExists,
            RegistryError::Exists(_) => Self::DeviceAlreadyExists,
            RegistryError::NotFound(identity) => not_found(&identity),
            RegistryError::Changed(_) => Self::PreconditionFailed,
            RegistryError::Full => Self::QuotaExceeded(format!("{error}.")),
            RegistryError::Store(cause) => {
                tracing::error!(%cause, "the registry's file failed");
                Self::Internal
            }
            RegistryError::Interrupted => Self::Unavailable { retry_after: 5 },
        }
    }
}

/// What a client may write. Other keys (capabilities, connection state, times) are the hub's to say, and ignored.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    device_id: Option<String>,
    module_id: Option<String>,
    status: Option<String>,
    status_reason: Option<String>,
    authentication: Option<BodyAuthentication>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct BodyAuthentication {
    #[serde(rename = "type")]
    kind: Option<String>,
    symmetric_key: Option<BodyKeys>,
    #[serde(alias = "x509Thumbprint")]
    x509_thumbprint: Option<BodyThumbprints>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct BodyKeys {
    primary_key: Option<String>,
    secondary_key: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct BodyThumbprints {
    primary_thumbprint: Option<String>,
    secondary_thumbprint: Option<String>,
}

impl Body {
    fn check_names(&self, identity: &Identity) -> Result<(), ApiError> {
        let device = self.device_id.as_deref().is_none_or(|id| id == identity.device.as_str());
        let module = self.module_id.as_deref() == identity.module.as_ref().map(|id| id.as_str());
        if device && (module || self.module_id.is_none()) {
            return Ok(());
        }
        Err(ApiError::ArgumentInvalid("The body names another identity than the path.".into()))
    }

    /// What the body makes of the identity that is there. What it does not say stays as it was.
    fn spec(&self, identity: Identity, old: Option<&DeviceRecord>) -> Result<DeviceSpec, ApiError> {
        let status_reason = self.status_reason()?;
        let kept = old.filter(|_| self.status.is_none() && status_reason.is_none());
        Ok(DeviceSpec {
            enabled: self.is_enabled()?.unwrap_or_else(|| old.is_none_or(|old| old.enabled)),
            status_reason: kept.map_or(status_reason, |old| old.status_reason.clone()),
            authentication: self.authentication(old.map(|old| &old.authentication))?,
            identity,
        })
    }

    fn is_enabled(&self) -> Result<Option<bool>, ApiError> {
        match self.status.as_deref() {
            None => Ok(None),
            Some("enabled" | "Enabled") => Ok(Some(true)),
            Some("disabled" | "Disabled") => Ok(Some(false)),
            Some(_) => Err(ApiError::ArgumentInvalid("status is neither \"enabled\" nor \"disabled\".".into())),
        }
    }

    fn status_reason(&self) -> Result<Option<String>, ApiError> {
        let reason = self.status_reason.clone().filter(|reason| !reason.is_empty());
        if reason.as_ref().is_some_and(|reason| reason.len() > MAX_STATUS_REASON) {
            return Err(ApiError::ArgumentInvalid(format!("statusReason is longer than {MAX_STATUS_REASON} bytes.")));
        }
        Ok(reason)
    }

    /// What is not said stays as it was; what never was is made up.
    fn authentication(&self, old: Option<&Authentication>) -> Result<Authentication, ApiError> {
        let empty = BodyAuthentication::default();
        let given = self.authentication.as_ref().unwrap_or(&empty);
        match given.kind() {
            None => old.cloned().map_or_else(|| given.keys(None), Ok),
            Some("sas") => given.keys(old),
            Some("selfSigned") => given.thumbprints(),
            Some("certificateAuthority") => Ok(Authentication::Authority),
            Some(_) => {
                let kinds = "\"sas\", \"selfSigned\" or \"certificateAuthority\"";
                Err(ApiError::ArgumentInvalid(format!("authentication.type is not {kinds}.")))
            }
        }
    }
}

impl BodyAuthentication {
    /// Old API versions have no `type`.
    fn kind(&self) -> Option<&str> {
        let thumbprints = self.x509_thumbprint.as_ref();
        let has_thumbprint = thumbprints.is_some_and(|t| t.primary_thumbprint.is_some());
        match &self.kind {
            Some(kind) => Some(kind),
            None if self.symmetric_key.as_ref().is_some_and(|keys| keys.primary_key.is_some()) => Some("sas"),
            None if has_thumbprint => Some("selfSigned"),
            None => None,
        }
    }

    fn keys(&self, old: Option<&Authentication>) -> Result<Authentication, ApiError> {
        let none = BodyKeys::default();
        let given = self.symmetric_key.as_ref().unwrap_or(&none);
        let (old_primary, old_secondary) = match old {
            Some(Authentication::Keys { primary, secondary }) => (Some(primary), Some(secondary)),
            Some(Authentication::SelfSigned { .. } | Authentication::Authority) | None => (None, None),
        };
        Ok(Authentication::Keys {
            primary: key("primaryKey", given.primary_key.as_deref(), old_primary)?,
            secondary: key("secondaryKey", given.secondary_key.as_deref(), old_secondary)?,
        })
    }

    fn thumbprints(&self) -> Result<Authentication, ApiError> {
        let none = BodyThumbprints::default();
        let given = self.x509_thumbprint.as_ref().unwrap_or(&none);
        let parse = |text: &Option<String>| -> Result<Option<Thumbprint>, ApiError> {
            let given = text.as_deref().filter(|text| !text.is_empty()).map(str::parse).transpose();
            given.map_err(|error| ApiError::ArgumentInvalid(format!("x509Thumbprint: {error}.")))
        };
        let (primary, secondary) = (parse(&given.primary_thumbprint)?, parse(&given.secondary_thumbprint)?);
        if primary.is_none() && secondary.is_none() {
            return Err(ApiError::ArgumentInvalid("A selfSigned identity needs an x509Thumbprint.".into()));
        }
        Ok(Authentication::SelfSigned { primary, secondary })
    }
}

fn key(name: &str, given: Option<&str>, old: Option<&Secret>) -> Result<Secret, ApiError> {
    match given.filter(|text| !text.is_empty()) {
        Some(text) => decode_key(text).map_err(|error| ApiError::ArgumentInvalid(format!("{name}: {error}."))),
        None => Ok(old.cloned().unwrap_or_else(|| Secret::new(random::bytes::<32>()))),
    }
}

fn with_etag(hub: &HubShared, record: &DeviceRecord) -> Answer {
    let mut answer = answer::json(&to_json(hub, record));
    answer::set(&mut answer, "etag", &format!("\"{}\"", record.etag));
    answer
}

fn to_json(hub: &HubShared, record: &DeviceRecord) -> Value {
    let attached = hub.courier.is_attached(&record.identity);
    let time = |time: Option<SystemTime>| time.map_or_else(|| NEVER.to_owned(), |time| Utc::from(time).to_string());
    let mut device = json!({
        "deviceId": record.identity.device,
        "generationId": record.generation,
        "etag": record.etag,
        "status": if record.enabled { "enabled" } else { "disabled" },
        "statusReason": record.status_reason,
        "statusUpdatedTime": time(record.status_updated),
        "connectionState": if attached { "Connected" } else { "Disconnected" },
        "connectionStateUpdatedTime": NEVER,
        "lastActivityTime": NEVER,
        "cloudToDeviceMessageCount": 0,
        "authentication": authentication_json(&record.authentication),
    });
    // IoT Hub's modules have no status of their own. Ours do: who writes back what was read must not change it.
    if let Some(module) = &record.identity.module {
        device["moduleId"] = json!(module);
        device["managedBy"] = Value::Null;
    } else {
        device["capabilities"] = json!({ "iotEdge": false });
    }
    device
}

fn authentication_json(authentication: &Authentication) -> Value {
    let (kind, primary_key, secondary_key, primary_print, secondary_print) = match authentication {
        Authentication::Keys { primary, secondary } => {
            ("sas", Some(encode_key(primary)), Some(encode_key(secondary)), None, None)
        }
        Authentication::SelfSigned { primary, secondary } => {
            ("selfSigned", None, None, primary.as_ref(), secondary.as_ref())
        }
        Authentication::Authority => ("certificateAuthority", None, None, None, None),
    };
    json!({
        "symmetricKey": { "primaryKey": primary_key, "secondaryKey": secondary_key },
        "x509Thumbprint": {
            "primaryThumbprint": primary_print.map(Thumbprint::as_str),
            "secondaryThumbprint": secondary_print.map(Thumbprint::as_str),
        },
        "type": kind,
    })
}

/// Any bytes as the body of a PUT: an identity, or a reason. For fuzzers.
pub fn fuzz_device(data: &[u8]) {
    let Ok(body) = serde_json::from_slice::<Body>(data) else { return };
    // Either is fine; only a panic is not.
    let Ok(identity) = "d".parse() else { unreachable!("an ID") };
    let _ = body.spec(identity, None);
}
