//! Who is calling: the one place where a policy's token is judged.
//!
//! Owns the check of `Authorization: SharedAccessSignature ...` on the HTTPS API. Does not know routes or what the
//! caller wants. Invariant: every refusal costs the same work, whether the policy exists or not.

use std::time::SystemTime;

use http::{HeaderMap, header::AUTHORIZATION};

use crate::{
    auth::{Rights, Sas},
    base::{DeviceId, Name, Secret, Utc},
    config::HubConfig,
    proto::streams::ApiError,
};

/// A caller that proved to be a policy.
#[derive(Debug, Clone)]
pub(in crate::hub) struct Caller {
    pub(in crate::hub) policy: Name,
    /// The key that signed: what the caller opens ends when the policy loses it.
    pub(in crate::hub) key: Secret,
    pub(in crate::hub) rights: Rights,
}

/// Judges the token of a request. Every failure is a 401 whose text helps the holder of a good key and tells
/// nobody which policies exist.
pub(in crate::hub) fn authenticate(config: &HubConfig, headers: &HeaderMap) -> Result<Caller, ApiError> {
    let unauthorized = |text: String| ApiError::Unauthorized(text);
    let mut tokens = headers.get_all(AUTHORIZATION).iter();
    let (Some(token), None) = (tokens.next(), tokens.next()) else {
        return Err(unauthorized("one Authorization header with a SharedAccessSignature is needed.".into()));
    };
    let token = token.to_str().map_err(|_| unauthorized("the Authorization header is not text.".into()))?;
    let sas = Sas::parse(token).map_err(|error| unauthorized(format!("{error}.")))?;
    let policy = sas.policy().and_then(|name| config.policy(name));
    // Two keys are tried in every case, so that the answer takes as long: without such a policy one that nobody has.
    let nobody = Secret::new([0; 32]);
    let keys = policy.map_or([&nobody, &nobody], |policy| {
        [&policy.primary_key, policy.secondary_key.as_ref().unwrap_or(&policy.primary_key)]
    });
    let now = Utc::from(SystemTime::now());
    sas.verify(&keys, now.seconds())
        .map_err(|error| unauthorized(format!("{error} (the hub's clock shows {now}).")))?;
    let policy =
        policy.ok_or_else(|| unauthorized("the token's signature is not by a key of this identity.".into()))?;
    check_audience(config, &sas)?;
    check_lifetime(config, &sas, now)?;
    let key = keys.into_iter().find(|key| sas.verify(&[key], now.seconds()).is_ok()).unwrap_or(&policy.primary_key);
    Ok(Caller { policy: policy.name.clone(), key: key.clone(), rights: policy.rights })
}

/// The token must be for this hub as a whole. A host name with a port is tolerated: some clients sign what they dial.
fn check_audience(config: &HubConfig, sas: &Sas) -> Result<(), ApiError> {
    let host = sas.resource().split('/').next().unwrap_or_default();
    let without_port = host.rsplit_once(':').filter(|(_, port)| port.bytes().all(|b| b.is_ascii_digit()));
    let host = without_port.map_or(host, |(host, _)| host);
    let path = sas.resource().trim_end_matches('/').contains('/');
    if host.eq_ignore_ascii_case(&config.hostname) && !path {
        return Ok(());
    }
    Err(ApiError::Unauthorized(format!("the token's resource (sr) is not this hub, which is {}.", config.hostname)))
}

fn check_lifetime(config: &HubConfig, sas: &Sas, now: Utc) -> Result<(), ApiError> {
    let Some(longest) = config.limits.max_token_lifetime else { return Ok(()) };
    if sas.expiry() <= now.seconds().saturating_add(longest.as_secs()) {
        return Ok(());
    }
    Err(ApiError::Unauthorized(format!("the token is valid for longer than the {} s allowed.", longest.as_secs())))
}

impl Caller {
    /// True if the policy, as it is now, is for this device.
    pub(in crate::hub) fn may_reach(&self, config: &HubConfig, device: &DeviceId) -> bool {
        config.policy(&self.policy).is_some_and(|policy| policy.may_reach(device))
    }

    /// Refuses a caller whose policy is not for this device.
    pub(in crate::hub) fn require_reach(&self, config: &HubConfig, device: &DeviceId) -> Result<(), ApiError> {
        if self.may_reach(config, device) {
            return Ok(());
        }
        Err(ApiError::Unauthorized(format!("policy {} does not reach this device.", self.policy)))
    }

    /// Refuses a caller without the right.
    pub(in crate::hub) fn require(&self, right: Rights) -> Result<(), ApiError> {
        if self.rights.include(right) {
            return Ok(());
        }
        Err(ApiError::Unauthorized(format!("policy {} has the rights {}; needed: {right}.", self.policy, self.rights)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        auth::sas::{macs_made, sign},
        hub::control::testing::{HOST, config, in_an_hour, key},
    };

    /// Threats.md, row 22: time must not tell which policies exist. What takes the time is counted.
    #[test]
    fn every_refusal_takes_the_same_work() {
        let mut config = config();
        config.policies[0].secondary_key = Some(key(0xd1));
        let cost = |policy: &str, byte| {
            let token = sign(HOST, &key(byte), in_an_hour(), Some(&policy.parse().unwrap()));
            let headers = HeaderMap::from_iter([(AUTHORIZATION, token.expose_str().unwrap().parse().unwrap())]);
            let before = macs_made();
            (authenticate(&config, &headers).is_ok(), macs_made() - before)
        };
        let [unknown, two_keys, one_key] = ["nobody", "device", "service"].map(|policy| cost(policy, 9));
        assert_eq!((unknown, two_keys, one_key), ((false, 2), (false, 2), (false, 2)));
    }
}
