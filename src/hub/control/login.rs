//! Who a CONNECT comes from, and whether it is let in.
//!
//! Owns the meaning of client identifier, user name and password (wire.md, sections b and e) and of a client
//! certificate. Does not know packets after CONNECT. Invariant: to the outside an unknown device, a wrong key and a
//! disabled device are one answer that takes the same work; only the log tells them apart.

use std::{
    sync::LazyLock,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use percent_encoding::percent_decode_str;
use rustls_pki_types::CertificateDer;
use sha2::Digest as _;
use tokio::time::Instant;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::{
    super::{
        record::{Admission, Authentication, Thumbprint},
        shared::HubShared,
    },
    PeerInfo,
};
use crate::{
    auth::{
        Sas,
        sas::{CLOCK_SKEW, SasError, VerifyError},
    },
    base::{IdError, Identity, Secret},
    config::{HubConfig, PolicyRule},
    proto::mqtt::{Connect, ConnectCode},
    transport::tls::ClientAuthorities,
};

/// What is verified against when there is no key: the work must be the same.
const NO_KEY: [u8; 32] = [0; 32];

/// A device that was let in.
#[derive(Debug)]
pub(super) struct Login {
    /// Who it is.
    pub(super) identity: Identity,
    /// What let it in: checked again whenever the registry or the policies change.
    pub(super) admission: Admission,
    /// When its token ends, or the certificate that a device CA vouched for. One known by its thumbprint has no such
    /// time here: the registry says how long it is good.
    pub(super) expires: Option<Instant>,
    /// It is a culvert daemon, which understands our extensions.
    pub(super) is_culvert: bool,
    /// It wants its subscriptions neither found nor kept.
    pub(super) clean_session: bool,
    keep_alive: u16,
}

/// Why a CONNECT is refused. For the log; the peer sees [`LoginError::code`] only.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// The client identifier is not `device` or `device/module`.
    #[error("the client identifier is not a device ID")]
    ClientId(#[source] IdError),
    /// The user name is not `hub/device/?api-version=...` for that client identifier.
    #[error("the user name of {0} does not begin with the hub's host name and the client identifier")]
    Username(Identity),
    /// Neither a password nor a certificate.
    #[error("{0} came with neither a token nor a certificate")]
    NoCredential(Identity),
    /// The password is not a SAS token.
    #[error("the password of {0} is not a token")]
    Token(Identity, #[source] SasError),
    /// The token is for something else.
    #[error("the token of {0} is for another resource")]
    Scope(Identity),
    /// The token is not good.
    #[error("the token of {0} is not accepted")]
    Verify(Identity, #[source] VerifyError),
    /// The token lives longer than the hub allows.
    #[error("the token of {0} is valid for longer than max_token_lifetime")]
    Lifetime(Identity),
    /// No such identity.
    #[error("{0} is not registered")]
    Unknown(Identity),
    /// No such policy.
    #[error("{0} came with a token of a policy that does not exist")]
    Policy(Identity),
    /// The certificate is not the registered one.
    #[error("the certificate of {0} is not the one that is registered")]
    Certificate(Identity),
    /// Registered and proven, but disabled; or its device is; or the policy may not.
    #[error("{0} is disabled, or the policy of its token may not connect it")]
    NotAdmitted(Identity),
}

impl LoginError {
    /// What the peer is told. Everything that depends on the registry is one code.
    pub(super) fn code(&self) -> ConnectCode {
        match self {
            Self::ClientId(_) => ConnectCode::IdentifierRejected,
            Self::Username(_) => ConnectCode::BadCredentials,
            _ => ConnectCode::NotAuthorized,
        }
    }

    /// Who it claimed to be.
    pub(super) fn identity(&self) -> Option<&Identity> {
        match self {
            Self::ClientId(_) => None,
            Self::Username(identity)
            | Self::NoCredential(identity)
            | Self::Token(identity, _)
            | Self::Scope(identity)
            | Self::Verify(identity, _)
            | Self::Lifetime(identity)
            | Self::Unknown(identity)
            | Self::Policy(identity)
            | Self::Certificate(identity)
            | Self::NotAdmitted(identity) => Some(identity),
        }
    }
}

impl Login {
    /// How long the device may be silent: 1.5 times what it promised (section 3.1.2.10 of the standard).
    pub(super) fn silence_limit(&self) -> Duration {
        match self.keep_alive {
            0 => Duration::MAX,
            seconds => Duration::from_millis(u64::from(seconds) * 1500),
        }
    }
}

/// Decides about a CONNECT.
pub(super) fn log_in(connect: &Connect, peer: &PeerInfo, hub: &HubShared) -> Result<Login, LoginError> {
    let config = hub.config();
    let identity: Identity = connect.client_id.parse().map_err(LoginError::ClientId)?;
    let username = connect.username.as_deref().unwrap_or_default();
    let Some(query) = username_query(username, &config.hostname, &connect.client_id) else {
        return Err(LoginError::Username(identity));
    };
    let proven = match &connect.password {
        Some(password) => by_token(password, &identity, hub, &config)?,
        None if peer.certificates.is_empty() => return Err(LoginError::NoCredential(identity)),
        None => by_certificate(&peer.certificates, &identity, hub)?,
    };
    if !hub.admits_device(&identity, &proven.admission) {
        return Err(LoginError::NotAdmitted(identity));
    }
    let is_culvert = is_culvert(query);
    let Proven { admission, expires } = proven;
    let (clean_session, keep_alive) = (connect.clean_session, connect.keep_alive);
    Ok(Login { identity, admission, expires, is_culvert, clean_session, keep_alive })
}

/// `{hub}/{client ID}/?query`, or the older `{hub}/{client ID}/api-version=...`, or neither: the query, which may be
/// empty. The hub's name is compared without regard to case, the client identifier exactly.
fn username_query<'a>(username: &'a str, hostname: &str, client_id: &str) -> Option<&'a str> {
    let (host, rest) = username.split_once('/')?;
    if !host.eq_ignore_ascii_case(hostname) {
        return None;
    }
    let rest = rest.strip_prefix(client_id)?;
    if rest.is_empty() {
        return Some(rest);
    }
    let query = rest.strip_prefix('/')?;
    Some(query.strip_prefix('?').unwrap_or(query))
}

/// True if the client says that it is one of our daemons.
fn is_culvert(query: &str) -> bool {
    let client_type = query.split('&').find_map(|pair| pair.strip_prefix("DeviceClientType="));
    client_type.is_some_and(|text| percent_decode_str(text).take(7).eq(*b"culvert"))
}

struct Proven {
    admission: Admission,
    expires: Option<Instant>,
}

fn by_token(password: &Secret, identity: &Identity, hub: &HubShared, config: &HubConfig) -> Result<Proven, LoginError> {
    let fail = |error: fn(Identity) -> LoginError| error(identity.clone());
    let text = password.expose_str().unwrap_or_default();
    let sas = Sas::parse(text).map_err(|error| LoginError::Token(identity.clone(), error))?;
    if !sas.covers(&config.hostname, identity) {
        return Err(fail(LoginError::Scope));
    }
    let policy = sas.policy().map(|name| config.policy(name));
    let keys = match policy {
        Some(policy) => policy.map(policy_keys),
        None => hub.registry.find(identity).and_then(|record| own_keys(&record.authentication)),
    };
    let absent = keys.is_none();
    let now = unix_now();
    let verdict = verify(&sas, keys.unwrap_or_else(|| [Secret::new(NO_KEY), Secret::new(NO_KEY)]), now);
    if absent {
        return Err(fail(if policy.is_some() { LoginError::Policy } else { LoginError::Unknown }));
    }
    let key = verdict.map_err(|error| LoginError::Verify(identity.clone(), error))?;
    let left = Duration::from_secs(sas.expiry().saturating_add(CLOCK_SKEW).saturating_sub(now));
    if config.limits.max_token_lifetime.is_some_and(|max| left > max + Duration::from_secs(2 * CLOCK_SKEW)) {
        return Err(fail(LoginError::Lifetime));
    }
    let admission = match policy.flatten() {
        Some(policy) => Admission::Policy(policy.name.clone(), key),
        None => Admission::Key(key),
    };
    // A time beyond what the clock can name is no end.
    Ok(Proven { admission, expires: Instant::now().checked_add(left) })
}

/// The key that signed. Both are tried in every case.
fn verify(sas: &Sas, keys: [Secret; 2], now: u64) -> Result<Secret, VerifyError> {
    let [first, second] = keys.map(|key| (sas.verify(&[&key], now), key));
    match (first, second) {
        ((Ok(()), key), _) | (_, (Ok(()), key)) => Ok(key),
        ((Err(VerifyError::Signature), _), (Err(error), _)) | ((Err(error), _), _) => Err(error),
    }
}

fn policy_keys(policy: &PolicyRule) -> [Secret; 2] {
    let secondary = policy.secondary_key.as_ref().unwrap_or(&policy.primary_key);
    [policy.primary_key.clone(), secondary.clone()]
}

fn own_keys(authentication: &Authentication) -> Option<[Secret; 2]> {
    match authentication {
        Authentication::Keys { primary, secondary } => Some([primary.clone(), secondary.clone()]),
        Authentication::SelfSigned { .. } | Authentication::Authority => None,
    }
}

fn by_certificate(chain: &[CertificateDer<'_>], identity: &Identity, hub: &HubShared) -> Result<Proven, LoginError> {
    let refused = || LoginError::Certificate(identity.clone());
    let leaf = chain.first().ok_or_else(refused)?;
    // All of this in every case: the time must not tell who is registered, and how.
    let shown = thumbprints(leaf);
    let anchor = hub.authorities().vouching_for(chain);
    let named = common_name(leaf).is_some_and(|name| name == identity.to_string());
    let record = hub.registry.find(identity).ok_or_else(|| LoginError::Unknown(identity.clone()))?;
    match &record.authentication {
        Authentication::SelfSigned { primary, secondary } => {
            let known = [primary, secondary].into_iter().flatten().find(|known| shown.contains(known));
            let admission = known.cloned().map(Admission::Thumbprint).ok_or_else(refused)?;
            Ok(Proven { admission, expires: None })
        }
        Authentication::Authority => {
            let admission = anchor.filter(|_| named).map(Admission::Authority).ok_or_else(refused)?;
            Ok(Proven { admission, expires: certificate_end(leaf) })
        }
        Authentication::Keys { .. } => Err(refused()),
    }
}

/// A certificate's SHA-1 and SHA-256.
fn thumbprints(leaf: &[u8]) -> [Thumbprint; 2] {
    [Thumbprint::from_digest(&sha1::Sha1::digest(leaf)), Thumbprint::from_digest(&sha2::Sha256::digest(leaf))]
}

/// When a certificate ends. A time beyond what the clock can name is no end.
fn certificate_end(leaf: &[u8]) -> Option<Instant> {
    let (_, certificate) = X509Certificate::from_der(leaf).ok()?;
    let end = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or_default();
    Instant::now().checked_add(Duration::from_secs(end.saturating_sub(unix_now())))
}

/// The subject's only common name.
fn common_name(leaf: &[u8]) -> Option<String> {
    let (_, certificate) = X509Certificate::from_der(leaf).ok()?;
    let mut names = certificate.subject().iter_common_name();
    let name = names.next()?.as_str().ok()?.to_owned();
    names.next().is_none().then_some(name)
}

fn unix_now() -> u64 {
    // A clock before 1970 makes every token fresh; such a machine cannot verify a certificate either.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// Any bytes as a user name, a token and a topic: an answer, never a panic. For fuzzers.
pub fn fuzz_login(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let (first, second) = text.split_at(text.floor_char_boundary(text.len() / 2));
    if let Some(query) = username_query(first, "hub.example.com", second) {
        assert!(first.ends_with(query), "the query is a part of the user name");
        is_culvert(query);
    }
    if let (Ok(sas), Ok(identity)) = (Sas::parse(text), second.parse::<Identity>()) {
        sas.covers("hub.example.com", &identity);
        let _ = verify(&sas, [Secret::new(NO_KEY), Secret::new(NO_KEY)], 0);
    }
    crate::proto::control::DeviceTopic::parse(text);
}

/// Any bytes as a client's certificate chain of one or two: it has thumbprints and perhaps a name, and no authority
/// vouches for it. For fuzzers.
///
/// # Panics
/// If a foreign authority vouches for it, or a name holds what a device ID may not.
pub fn fuzz_certificate(data: &[u8]) {
    let cut = data.first().map_or(0, |first| usize::from(*first) * 8).min(data.len());
    let chain = [&data[data.len().min(1)..], &data[cut..]].map(|der| CertificateDer::from(der.to_vec()));
    for leaf in &chain {
        assert_eq!(thumbprints(leaf).map(|print| print.as_str().len()), [40, 64]);
        if let Some(identity) = common_name(leaf).and_then(|name| name.parse::<Identity>().ok()) {
            assert!(!identity.to_string().contains(char::is_control));
        }
    }
    assert!(!FOREIGN_AUTHORITY.vouch_for(&chain), "a foreign authority vouches");
}

/// An authority whose key nobody has.
static FOREIGN_AUTHORITY: LazyLock<ClientAuthorities> = LazyLock::new(|| {
    let mut params = rcgen::CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let key = rcgen::KeyPair::generate().expect("a key pair");
    let pem = params.self_signed(&key).expect("a certificate").pem();
    ClientAuthorities::from_pem(pem.as_bytes(), "ca.pem".as_ref()).expect("an authority")
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_documented_user_name_is_understood() {
        let query = |username, client_id| username_query(username, "Hub.example.com", client_id);
        assert_eq!(
            query("hub.example.com/d1/?api-version=2020-09-30&DeviceClientType=c", "d1"),
            Some("api-version=2020-09-30&DeviceClientType=c")
        );
        assert_eq!(query("HUB.EXAMPLE.COM/d1/m/?api-version=1", "d1/m"), Some("api-version=1"));
        assert_eq!(query("hub.example.com/d1/api-version=2016-11-14", "d1"), Some("api-version=2016-11-14"));
        assert_eq!(query("hub.example.com/d1", "d1"), Some(""));
        for (username, client_id) in [
            ("", "d1"),
            ("d1", "d1"),
            ("other.example.com/d1/?x", "d1"),
            ("hub.example.com/d1x/?x", "d1"),
            ("hub.example.com/D1/?x", "d1"),
            ("hub.example.com/d2/?x", "d1"),
        ] {
            assert_eq!(query(username, client_id), None, "{username}");
        }
    }

    /// Threats.md, row 22: time must not tell which devices and policies exist. What takes the time is counted.
    #[tokio::test]
    async fn every_refusal_of_a_token_takes_the_same_work() {
        use super::super::testing::{HOST, NODE, connect, hub, in_an_hour, key, put, token};
        use crate::{
            auth::sas::{macs_made, sign},
            proto::mqtt::Packet,
        };
        let hub = hub().await;
        put(&hub.registry, "off", Authentication::Keys { primary: key(1), secondary: key(2) }, false).await;
        put(&hub.registry, "x509", Authentication::Authority, true).await;
        let policy = |name: &str, byte| sign(HOST, &key(byte), in_an_hour(), Some(&name.parse().unwrap()));
        let peer = PeerInfo { addr: "192.0.2.1:1".parse().unwrap(), certificates: Vec::new() };
        let cost = |identity: &str, password: Secret| {
            let Packet::Connect(connect) = connect(identity, NODE, Some(password)) else { unreachable!("a CONNECT") };
            let before = macs_made();
            (log_in(&connect, &peer, &hub).is_ok(), macs_made() - before)
        };
        assert_eq!(cost("pump", token("pump", &key(1))), (true, 2));
        for (what, identity, password) in [
            ("an unknown device", "nobody", token("nobody", &key(1))),
            ("a wrong key", "pump", token("pump", &key(9))),
            ("an unknown module", "pump/none", token("pump/none", &key(1))),
            ("a disabled device", "off", token("off", &key(1))),
            ("a device with a certificate", "x509", token("x509", &key(1))),
            ("an unknown policy", "pump", policy("nobody", 1)),
            ("a policy's wrong key", "pump", policy("device", 1)),
            ("a policy that may not", "pump", policy("service", 0x50)),
            ("a policy for an unknown device", "nobody", policy("device", 0xd0)),
        ] {
            assert_eq!(cost(identity, password), (false, 2), "{what}");
        }
    }

    /// The same in time (dudect's t statistic of two times 10,000 samples; below 4.5 nothing leaks). Printed, not
    /// asserted: `cargo test --release --lib time_of_refusals -- --ignored --nocapture` on an idle machine.
    #[tokio::test]
    #[ignore = "a measurement: wants a quiet machine and a release build"]
    async fn the_time_of_refusals() {
        use super::super::testing::{NODE, connect, hub, key, token};
        use crate::proto::mqtt::Packet;
        let hub = hub().await;
        let peer = PeerInfo { addr: "192.0.2.1:1".parse().unwrap(), certificates: Vec::new() };
        let [unknown, wrong] = ["nope", "pump"].map(|identity| {
            let packet = connect(identity, NODE, Some(token(identity, &key(9))));
            let Packet::Connect(connect) = packet else { unreachable!("a CONNECT") };
            connect
        });
        let mut samples = [const { Vec::new() }; 2];
        for number in 0..20_200_usize {
            // Neither class has a fixed place: the order changes with a cheap hash of the number.
            let class = (number.wrapping_mul(0x9e37_79b9) >> 13) & 1;
            let connect = if class == 0 { &unknown } else { &wrong };
            let began = std::time::Instant::now();
            let refused = log_in(connect, &peer, &hub).is_err();
            let took = began.elapsed().as_nanos() as f64;
            assert!(refused);
            if number >= 200 {
                samples[class].push(took);
            }
        }
        // As dudect does: the slowest samples are the machine's, not the code's.
        let mut all = samples.concat();
        all.sort_by(f64::total_cmp);
        let cut = all[all.len() * 95 / 100];
        let statistics = samples.map(|class| {
            let kept: Vec<f64> = class.into_iter().filter(|took| *took <= cut).collect();
            let count = kept.len() as f64;
            let mean = kept.iter().sum::<f64>() / count;
            (count, mean, kept.iter().map(|took| (took - mean).powi(2)).sum::<f64>() / (count - 1.0))
        });
        let [(n, mean, variance), (m, other, spread)] = statistics;
        let t = (mean - other) / (variance / n + spread / m).sqrt();
        println!("unknown device {mean:.0} ns ({n}), wrong key {other:.0} ns ({m}), t = {t:.2}");
    }

    #[test]
    fn our_own_daemons_are_told_by_their_client_type() {
        assert!(is_culvert("api-version=1&DeviceClientType=culvert%2F0.1"));
        assert!(is_culvert("DeviceClientType=%63ulvert"));
        assert!(!is_culvert("DeviceClientType=iothubclient%2f1.9.0&x=culvert"));
        assert!(!is_culvert("DeviceClientType=culver"));
    }
}
