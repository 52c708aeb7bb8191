//! `culvert registry`: device identities, through the hub's REST API.
//!
//! Owns what is asked and what is printed. Does not know where the hub keeps it.
//! Invariant: a key is printed only inside a connection string that was asked for.

use http::Method;
use serde_json::{Value, json};

use super::{
    api::{Api, Refusal, segment},
    args::{RegistryAction, RegistryArgs},
    exit::{Failure, Outcome},
    say,
};
use crate::{
    auth::{ConnectionString, Credential, Owner, key},
    base::{DeviceId, Identity, Secret},
};

/// Most devices in one answer, IoT Hub's limit too.
const PAGE: usize = 1000;
/// Bytes of a new key.
const KEY_BYTES: usize = 32;
/// How often a record that others keep changing is read again: they are people and scripts, not a flood.
const MAX_TRIES: u32 = 5;
/// Where a record keeps its keys.
const KEYS: &str = "/authentication/symmetricKey";

/// Runs the command.
pub(super) async fn run(args: &RegistryArgs) -> Outcome {
    let api = Api::open(&args.hub)?;
    match &args.action {
        RegistryAction::Add { device, thumbprint, secondary_thumbprint, ca_signed } => {
            let proof = proof(thumbprint.as_deref(), secondary_thumbprint.as_deref(), *ca_signed);
            add(&api, device, proof).await
        }
        RegistryAction::List { modules_of, json } => list(&api, modules_of.as_ref(), *json).await,
        RegistryAction::Show { device, connection_string } => show(&api, device, *connection_string).await,
        RegistryAction::Remove { device } => {
            api.call(Method::DELETE, &path(device), None, Some("*")).await?;
            say::line(format_args!("{device} is removed"))
        }
        RegistryAction::Rotate { device, both } => rotate(&api, device, *both).await,
        RegistryAction::Enable { device } => set_status(&api, device, "enabled", None).await,
        RegistryAction::Disable { device, reason } => set_status(&api, device, "disabled", reason.as_deref()).await,
    }
}

fn path(identity: &Identity) -> String {
    let device = format!("/devices/{}", segment(identity.device.as_str()));
    match &identity.module {
        None => device,
        Some(module) => format!("{device}/modules/{}", segment(module.as_str())),
    }
}

/// The record's `authentication`; without one the hub makes two keys.
fn proof(thumbprint: Option<&str>, secondary: Option<&str>, ca_signed: bool) -> Option<Value> {
    if ca_signed {
        return Some(json!({ "type": "certificateAuthority" }));
    }
    let primary = thumbprint?;
    let thumbprints = json!({ "primaryThumbprint": primary, "secondaryThumbprint": secondary });
    Some(json!({ "type": "selfSigned", "x509Thumbprint": thumbprints }))
}

async fn add(api: &Api, identity: &Identity, proof: Option<Value>) -> Outcome {
    let string = register(api, identity, proof).await?;
    say::once(exposed(&string), || told_again("is registered", identity))
}

/// Registers an identity and yields what its configuration needs.
pub(super) async fn register(api: &Api, identity: &Identity, proof: Option<Value>) -> Outcome<ConnectionString> {
    let mut record = json!({ "deviceId": identity.device.as_str(), "status": "enabled" });
    if let Some(module) = &identity.module {
        record["moduleId"] = json!(module.as_str());
    }
    if let Some(proof) = proof {
        record["authentication"] = proof;
    }
    let made = api.call(Method::PUT, &path(identity), Some(&record), None).await?;
    connection_string(api, identity, &made)
}

async fn list(api: &Api, modules_of: Option<&DeviceId>, as_json: bool) -> Outcome {
    let path = match modules_of {
        None => format!("/devices?top={PAGE}"),
        Some(device) => format!("/devices/{}/modules", segment(device.as_str())),
    };
    let mut found = api.call(Method::GET, &path, None, None).await?;
    let records = found.as_array_mut().ok_or_else(|| Failure::unavailable(anyhow::anyhow!("the answer is no list")))?;
    records.iter_mut().for_each(hide_keys);
    if as_json {
        return print_json(&found);
    }
    let records = found.as_array().map(Vec::as_slice).unwrap_or_default();
    let width = records.iter().map(|record| name(record).len()).max().unwrap_or(0).max("DEVICE".len());
    say::line(format_args!("{:width$}  {:8}  {:12}  PROVES ITSELF BY", "DEVICE", "STATUS", "CONNECTION"))?;
    for record in records {
        let text = |key: &str| record[key].as_str().unwrap_or("-").to_owned();
        let proof = record["authentication"]["type"].as_str().unwrap_or("-");
        let (status, connection) = (text("status"), text("connectionState"));
        say::line(format_args!("{:width$}  {status:8}  {connection:12}  {proof}", name(record)))?;
    }
    if modules_of.is_none() && records.len() == PAGE {
        say::aside(format_args!("culvert: only the first {PAGE} devices are shown"));
    }
    Ok(())
}

fn name(record: &Value) -> String {
    let device = record["deviceId"].as_str().unwrap_or("-");
    record["moduleId"].as_str().map_or_else(|| device.to_owned(), |module| format!("{device}/{module}"))
}

async fn show(api: &Api, identity: &Identity, connection_string: bool) -> Outcome {
    let mut record = api.call(Method::GET, &path(identity), None, None).await?;
    if connection_string {
        return say::line(exposed(&self::connection_string(api, identity, &record)?));
    }
    hide_keys(&mut record);
    print_json(&record)
}

async fn rotate(api: &Api, identity: &Identity, both: bool) -> Outcome {
    let mut record = api.call(Method::GET, &path(identity), None, None).await?;
    let etag = etag(&record);
    let Some(keys) = record.pointer_mut(KEYS).filter(|keys| keys["primaryKey"].is_string()) else {
        let error = anyhow::anyhow!("{identity} proves itself by certificate; it has no key to rotate");
        return Err(Failure::usage(error));
    };
    let secondary = if both { json!(random_key()?) } else { keys["primaryKey"].take() };
    *keys = json!({ "primaryKey": random_key()?, "secondaryKey": secondary });
    let record = api.call(Method::PUT, &path(identity), Some(&record), etag.as_deref()).await?;
    say::once(exposed(&connection_string(api, identity, &record)?), || told_again("has a new key", identity))
}

async fn set_status(api: &Api, identity: &Identity, status: &str, reason: Option<&str>) -> Outcome {
    unless_stale(async || {
        let mut record = api.call(Method::GET, &path(identity), None, None).await?;
        // The record holds the keys: over a newer one it would bring back those of before a rotation.
        let etag = etag(&record);
        record["status"] = json!(status);
        record["statusReason"] = json!(reason);
        api.call(Method::PUT, &path(identity), Some(&record), etag.as_deref()).await
    })
    .await?;
    say::line(format_args!("{identity} is {status}"))
}

/// The record's version, as a header names it.
fn etag(record: &Value) -> Option<String> {
    record["etag"].as_str().map(|etag| format!("\"{}\"", etag.trim_matches('"')))
}

/// Changes a record, and again if somebody else did in the meantime.
async fn unless_stale<T>(mut change: impl AsyncFnMut() -> Outcome<T>) -> Outcome<T> {
    for _ in 1..MAX_TRIES {
        match change().await {
            Err(failure) if failure.cause().is_some_and(Refusal::is_stale) => {}
            done => return done,
        }
    }
    change().await
}

fn random_key() -> Outcome<String> {
    let mut bytes = [0; KEY_BYTES];
    getrandom::fill(&mut bytes).map_err(Failure::software)?;
    Ok(key::encode_key(&Secret::new(bytes)))
}

fn connection_string(api: &Api, identity: &Identity, record: &Value) -> Outcome<ConnectionString> {
    let primary = record.pointer(KEYS).and_then(|keys| keys["primaryKey"].as_str());
    let credential = match primary {
        Some(text) => Credential::Key(key::decode_key(text).map_err(Failure::unavailable)?),
        None => Credential::X509,
    };
    Ok(ConnectionString { owner: Owner::Device(identity.clone()), credential, ..api.hub().clone() })
}

fn exposed(string: &ConnectionString) -> String {
    string.expose().expose_str().unwrap_or_default().to_owned()
}

/// For a connection string that could not be written, although the hub has changed.
fn told_again(happened: &str, identity: &Identity) -> String {
    let again = format!("culvert registry show {identity} --connection-string");
    format!("{identity} {happened}, but its connection string could not be written; `{again}` tells it")
}

fn hide_keys(record: &mut Value) {
    if let Some(keys) = record.pointer_mut(KEYS).and_then(Value::as_object_mut) {
        keys.values_mut().filter(|key| key.is_string()).for_each(|key| *key = json!("[secret]"));
    }
}

fn print_json(value: &Value) -> Outcome {
    say::line(serde_json::to_string_pretty(value).map_err(Failure::software)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_lies_below_its_device_and_both_are_encoded() {
        assert_eq!(path(&"pump:17/a%b".parse().unwrap()), "/devices/pump%3A17/modules/a%25b");
    }

    #[tokio::test]
    async fn a_record_that_somebody_else_changed_is_read_again_but_not_for_ever() {
        let stale = || Failure::unavailable(Refusal::of(http::StatusCode::PRECONDITION_FAILED));
        let mut tries = 0;
        let changed = unless_stale(async || {
            tries += 1;
            if tries < 3 { Err(stale()) } else { Ok(tries) }
        });
        assert_eq!(changed.await.unwrap(), 3);
        let mut tries = 0;
        let given_up = unless_stale(async || {
            tries += 1;
            Err::<(), _>(stale())
        });
        assert!(given_up.await.unwrap_err().cause().is_some_and(Refusal::is_stale));
        assert_eq!(tries, MAX_TRIES);
        let mut tries = 0;
        let gone = unless_stale(async || {
            tries += 1;
            Err::<(), _>(Failure::unavailable(Refusal::of(http::StatusCode::NOT_FOUND)))
        });
        assert!(gone.await.is_err());
        assert_eq!(tries, 1);
    }

    #[test]
    fn shown_records_hide_their_keys() {
        let keys = json!({ "primaryKey": "canary", "secondaryKey": "canary" });
        let mut record = json!({ "deviceId": "a", "authentication": { "symmetricKey": keys } });
        hide_keys(&mut record);
        assert!(!record.to_string().contains("canary"), "{record}");
    }

    #[test]
    fn certificates_are_registered_in_the_iot_hub_shape() {
        assert_eq!(proof(None, None, false), None);
        assert_eq!(proof(None, None, true), Some(json!({ "type": "certificateAuthority" })));
        let given = proof(Some("AA"), None, false).unwrap();
        assert_eq!(given["x509Thumbprint"]["primaryThumbprint"], "AA");
    }
}
