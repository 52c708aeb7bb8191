//! Whether the service can be used, and if not, why.
//!
//! Owns the checks and what they found. Does not know who asks. Invariant: one offline device never makes the service
//! unready; a check never opens an on-demand device stream.

use std::{
    collections::BTreeMap,
    io,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use http::Method;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};

use super::{Shared, tunnel::TunnelState};
use crate::{
    agent::{HubClient, is_unauthorized, random_bytes, random_u64, skew_hint},
    base::{Backoff, Name},
    config::{ConnectMode, ForwardMode, ForwardRule},
    forward::Verdicted,
    proto::open::OpenRequest,
    telemetry::ForwardHealth,
    transport::mux::Mux,
};

/// A finding about a forward is good for this long (design.md, section 5).
const CACHED: Duration = Duration::from_secs(30);
/// An echo that takes longer is no help to anybody.
const ECHO_LIMIT: Duration = Duration::from_secs(10);
/// How often the hub is asked whether it accepts our credential.
const HUB_CHECK: Duration = Duration::from_secs(60);
/// After failed checks: soon at first, and a fleet whose hub restarted not in step.
const HUB_CHECK_AGAIN: Backoff = Backoff::new(Duration::from_secs(5), Duration::from_secs(60));
/// Forwards that are examined at once: an offline device's takes all of its time.
const CHECKS: usize = 16;
/// A hub that did not answer is not asked sooner than this.
const HUB_SOONEST: Duration = Duration::from_secs(1);
/// When device streams are lost or cannot be opened, the hub is asked at once, but not more often than this.
const HUB_DOUBTED: Duration = Duration::from_secs(2);
/// For one question to the hub.
const HUB_LIMIT: Duration = Duration::from_secs(15);

/// One forward's listener: its rule, address and flows if it listens, and the problem if not.
type ListenerRow = (Name, ForwardRule, Option<(String, usize)>, Option<String>);

/// What the checks found.
#[derive(Default)]
pub(super) struct HealthBoard {
    listeners: Mutex<Vec<ListenerRow>>,
    hub: Mutex<HubFinding>,
    forwards: Mutex<BTreeMap<String, (Instant, ForwardHealth)>>,
}

#[derive(Default)]
enum HubFinding {
    #[default]
    NotAsked,
    Good,
    Bad(String),
}

impl HealthBoard {
    pub(super) fn set_listeners(&self, rows: Vec<ListenerRow>) {
        *lock(&self.listeners) = rows;
    }

    pub(super) fn endpoint(&self, forward: &str) -> Option<String> {
        let rows = lock(&self.listeners);
        let row = rows.iter().find(|row| row.0.as_str() == forward)?;
        row.2.as_ref().map(|(endpoint, _)| endpoint.clone())
    }

    /// Listeners, hub and credential.
    pub(super) fn ready(&self) -> Result<(), Vec<String>> {
        let rows = lock(&self.listeners);
        let mut problems: Vec<String> = rows
            .iter()
            .filter_map(|(name, _, _, problem)| problem.as_ref().map(|problem| format!("forward {name}: {problem}")))
            .collect();
        match &*lock(&self.hub) {
            HubFinding::Good => {}
            HubFinding::NotAsked => problems.push("hub: not reached yet".into()),
            HubFinding::Bad(why) => problems.push(format!("hub: {why}")),
        }
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    /// One entry per forward, for `culvert status`.
    pub(super) fn forwards(&self) -> serde_json::Value {
        let rows = lock(&self.listeners);
        let row = |(name, rule, listens, problem): &ListenerRow| {
            json!({
                "forward": name.as_str(),
                "device": rule.identity().to_string(),
                "target": rule.target.as_str(),
                "listen": listens.as_ref().map(|(endpoint, _)| endpoint),
                "flows": listens.as_ref().map_or(0, |(_, flows)| *flows),
                "problem": problem,
            })
        };
        rows.iter().map(row).collect()
    }

    fn rule(&self, forward: &str) -> Option<ForwardRule> {
        lock(&self.listeners).iter().find(|row| row.0.as_str() == forward).map(|row| row.1.clone())
    }

    fn rules(&self) -> Vec<ForwardRule> {
        lock(&self.listeners).iter().map(|row| row.1.clone()).collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Asks the hub, for ever, whether it accepts our credential.
pub(super) async fn watch_hub(shared: &Shared) {
    let mut hub = shared.hub.subscribe();
    let mut failures = HUB_CHECK_AGAIN;
    loop {
        let client = hub.borrow_and_update().clone();
        let found = ask_hub(&client).await;
        let pause = match &found {
            Ok(()) => {
                failures.reset();
                HUB_CHECK
            }
            Err(_) => HUB_SOONEST + failures.next_delay(random_u64()),
        };
        shared.metrics.set_hub_usable(found.is_ok());
        *lock(&shared.board.hub) = found.map_or_else(HubFinding::Bad, |()| HubFinding::Good);
        let trouble = async {
            sleep(pause.min(HUB_DOUBTED)).await;
            shared.trouble.notified().await;
        };
        tokio::select! {
            () = sleep(pause) => {}
            // A changed hub is asked at once, and so is one that device streams have trouble with.
            _ = hub.changed() => {}
            () = trouble => {}
        }
    }
}

/// Asks once.
pub(super) async fn ask_hub(hub: &HubClient) -> Result<(), String> {
    let asked = hub.request(Method::GET, "/deviceStreams", Vec::new(), Bytes::new(), HUB_LIMIT).await;
    match asked {
        Err(error) => Err(error_chain(&error)),
        Ok(response) if response.status.is_success() => Ok(()),
        Ok(response) if is_unauthorized(&response) => {
            let policy = hub.policy().map_or_else(|| "(none)".into(), ToString::to_string);
            Err(format!("{} does not accept our credential for policy {policy}{}", hub.name(), skew_hint(&response)))
        }
        Ok(response) => Err(format!("{} answered {}", hub.name(), response.status)),
    }
}

fn error_chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let words = cause.to_string();
        if !text.ends_with(&words) {
            text = format!("{text}: {words}");
        }
        source = cause.source();
    }
    text
}

/// Keeps `culvert_forward_usable` true, for ever.
pub(super) async fn watch_forwards(shared: &Shared) {
    let mut checks = interval(CACHED);
    checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        checks.tick().await;
        let check = async |rule: ForwardRule| {
            check_forward(shared, rule.name.as_str()).await;
        };
        futures_util::stream::iter(shared.board.rules()).for_each_concurrent(CHECKS, check).await;
    }
}

/// The finding about one forward, at most [`CACHED`] old; a good one only as long as its tunnel is there.
pub(super) async fn check_forward(shared: &Shared, name: &str) -> ForwardHealth {
    let Some(rule) = shared.board.rule(name) else { return ForwardHealth::Unknown };
    if let Some((when, found)) = lock(&shared.board.forwards).get(name)
        && when.elapsed() < CACHED
        && *found == ForwardHealth::Usable
        && shared.tunnels.existing(&rule.identity()).is_some_and(|tunnel| tunnel.is_attached())
    {
        return found.clone();
    }
    let found = examine(shared, &rule).await;
    if shared.board.rule(name).is_none() {
        // Removed meanwhile: its series are not to come back.
        return ForwardHealth::Unknown;
    }
    match &found {
        ForwardHealth::Usable => shared.metrics.set_usable(name, true),
        ForwardHealth::Unusable(_) => shared.metrics.set_usable(name, false),
        // Nothing is known any more, and what was known is no answer.
        ForwardHealth::Idle => shared.metrics.forget_forward(name),
        ForwardHealth::Unknown => {}
    }
    let mut cache = lock(&shared.board.forwards);
    cache.retain(|_, (when, _)| when.elapsed() < CACHED);
    cache.insert(name.to_owned(), (Instant::now(), found.clone()));
    found
}

async fn examine(shared: &Shared, rule: &ForwardRule) -> ForwardHealth {
    if let Err(problems) = shared.board.ready() {
        let own = format!("forward {}:", rule.name);
        if let Some(problem) = problems.iter().find(|problem| problem.starts_with(&own)) {
            return ForwardHealth::Unusable(problem.clone());
        }
    }
    if rule.mode == ForwardMode::Plain {
        // Each connection is a device stream of its own: there is none to send an echo through.
        return ForwardHealth::Idle;
    }
    let Some(tunnel) = shared.tunnels.existing(&rule.identity()) else { return ForwardHealth::Idle };
    match tunnel.state() {
        TunnelState::Idle if rule.connect == ConnectMode::OnDemand => ForwardHealth::Idle,
        TunnelState::Idle | TunnelState::Waiting { .. } => ForwardHealth::Unusable(tunnel.why()),
        TunnelState::Up { link: Some(link), .. } if !link.attached() => ForwardHealth::Unusable(tunnel.why()),
        TunnelState::Up { mux, .. } => match timeout(ECHO_LIMIT, echo(&mux)).await {
            Ok(Ok(())) => ForwardHealth::Usable,
            Ok(Err(error)) => ForwardHealth::Unusable(format!("the echo failed: {error}")),
            Err(_) => ForwardHealth::Unusable(format!("no echo within {} s ({})", ECHO_LIMIT.as_secs(), tunnel.why())),
        },
    }
}

/// Sends random bytes through the device stream and compares what comes back.
async fn echo(mux: &Mux) -> io::Result<()> {
    let mut channel = mux.open().await.map_err(io::Error::other)?;
    let sent = random_bytes::<16>();
    let mut header = BytesMut::new();
    OpenRequest::Echo.encode(&mut header);
    header.extend_from_slice(&sent);
    channel.write_all(&header).await?;
    channel.shutdown().await?;
    let mut channel = Verdicted::new(channel);
    let mut received = [0; 16];
    channel.read_exact(&mut received).await?;
    // The far end ends the channel too; what is dropped before that would be reset.
    let rest = channel.read(&mut [0; 1]).await?;
    if received == sent && rest == 0 { Ok(()) } else { Err(io::Error::other("other bytes came back")) }
}
