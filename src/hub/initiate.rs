//! The initiation of a device stream: reserve a bridge, invite the device, hand its answer back.
//!
//! Owns the order of these steps and the deadline of the handshake. Does not know HTTP, MQTT or WebSocket.
//! Invariant: a bridge is kept only if the device accepted; every other way out takes it back.

use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::time::{Instant, sleep_until};

use super::{
    bridge::{About, Full, Sid, Side},
    courier::{Answered, Invitation, InviteError},
    guard::Caller,
    random,
    shared::HubShared,
};
use crate::{
    base::{Identity, Secret, StreamName},
    proto::streams::ApiError,
};

/// After a late answer both legs still have this long to connect: a TCP, a TLS and a WebSocket handshake over a
/// slow mobile path, with one retransmission each.
const LEGS_AFTER_ANSWER: Duration = Duration::from_secs(15);
/// What a client that met a limit is told to wait, in seconds.
const RETRY_AFTER: u64 = 5;

const SEGMENT: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// A request for a device stream.
#[derive(Debug)]
pub(in crate::hub) struct Initiation {
    pub(in crate::hub) identity: Identity,
    pub(in crate::hub) stream: StreamName,
    pub(in crate::hub) caller: Caller,
    /// How long an absent device is waited for.
    pub(in crate::hub) connect: Duration,
    /// How long its answer is waited for.
    pub(in crate::hub) response: Duration,
    /// How long both together may take, if less than their sum.
    pub(in crate::hub) total: Duration,
}

/// What the device said.
#[derive(Debug)]
pub(in crate::hub) enum Outcome {
    /// It accepted: where the service's leg connects, and what admits it.
    Accepted { url: String, token: Secret },
    /// It rejected.
    Rejected { reason: Option<String> },
}

/// Opens a device stream.
pub(in crate::hub) async fn initiate(hub: &HubShared, wish: &Initiation) -> Result<Outcome, ApiError> {
    let began = Instant::now();
    check(hub, wish)?;
    let limits = hub.config().limits.clone();
    let about = About {
        identity: wish.identity.clone(),
        stream: wish.stream.clone(),
        policy: wish.caller.policy.clone(),
        policy_key: wish.caller.key.clone(),
    };
    let waited_for = began + wish.connect + wish.response + limits.stream_handshake_timeout;
    let random = [random::bytes(), random::bytes(), random::bytes()];
    let reservation =
        hub.bridges.reserve(about.clone(), random, waited_for, &limits).map_err(|full| too_many(hub, full))?;
    let invitation = Invitation {
        stream: wish.stream.clone(),
        url: url(hub, &wish.identity, &reservation.sid, Side::Device),
        ticket: reservation.device.token().clone(),
        policy: wish.caller.policy.clone(),
        rid: random::uuid(),
    };
    let invited = tokio::select! {
        biased;
        invited = hub.courier.invite(&wish.identity, invitation, wish.connect, wish.response) => invited,
        () = sleep_until(began + wish.total) => Err(InviteError::NoAnswer),
        () = hub.shutdown.cancelled() => return Err(ApiError::Unavailable { retry_after: RETRY_AFTER }),
    };
    let Answered { answer, admission } = invited.map_err(|error| match error {
        InviteError::NotOnline => ApiError::DeviceNotOnline { timeout: wish.connect },
        InviteError::NoAnswer => ApiError::GatewayTimeout { timeout: wish.response },
    })?;
    if !answer.accepted {
        return Ok(Outcome::Rejected { reason: answer.reason });
    }
    let url = url(hub, &wish.identity, &reservation.sid, Side::Service);
    let token = reservation.service.token().clone();
    let expires = (began + limits.stream_handshake_timeout).max(Instant::now() + LEGS_AFTER_ANSWER);
    reservation.accepted(admission.clone(), expires);
    // Only now does a revocation find the bridge; one that came before has missed it, and the control session of who is
    // revoked may live for another second.
    if !hub.admits_bridge(&about, Some(&admission)) {
        return Err(ApiError::DeviceNotOnline { timeout: wish.connect });
    }
    reservation.keep();
    Ok(Outcome::Accepted { url, token })
}

/// May this policy reach this device, does the device exist, and has it not too many requests before it?
fn check(hub: &HubShared, wish: &Initiation) -> Result<(), ApiError> {
    let Initiation { identity, caller, .. } = wish;
    let config = hub.config();
    caller.require_reach(&config, &identity.device)?;
    if hub.registry.find(&Identity::device(identity.device.clone())).is_none() {
        return Err(ApiError::DeviceNotFound);
    }
    if hub.registry.find(identity).is_none() {
        return Err(ApiError::ModuleNotFound);
    }
    if hub.courier.pending(identity) >= config.limits.max_pending_per_device {
        hub.metrics.limited.with_label_values(&["max_pending_per_device"]).inc();
        return Err(ApiError::Throttled { retry_after: RETRY_AFTER });
    }
    Ok(())
}

fn too_many(hub: &HubShared, full: Full) -> ApiError {
    let (limit, error) = match full {
        Full::Hub => ("max_bridges", ApiError::Unavailable { retry_after: RETRY_AFTER }),
        Full::Device => ("max_bridges_per_device", ApiError::Throttled { retry_after: RETRY_AFTER }),
    };
    hub.metrics.limited.with_label_values(&[limit]).inc();
    error
}

/// `wss://host:port/bridges/ih/HUB/d/DEVICE[/m/MODULE]/sid/SID/r/SIDE`: all routing in the path, the port always
/// there (wire.md, section b).
fn url(hub: &HubShared, identity: &Identity, sid: &Sid, side: Side) -> String {
    let config = hub.config();
    let endpoint = hub.endpoint().to_string();
    let authority = endpoint.trim_start_matches("https://");
    let encode = |text: &str| utf8_percent_encode(text, SEGMENT).to_string();
    let name = encode(config.hostname.split('.').next().unwrap_or_default());
    let device = encode(identity.device.as_str());
    let module = identity.module.as_ref().map(|module| format!("/m/{}", encode(module.as_str()))).unwrap_or_default();
    let side = match side {
        Side::Service => "service",
        Side::Device => "device",
    };
    format!("wss://{authority}/bridges/ih/{name}/d/{device}{module}/sid/{sid}/r/{side}")
}
