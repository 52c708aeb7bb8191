//! All tunnels of a service, by device.
//!
//! Owns which tunnels exist, and their tasks. Does not know forwards beyond the set of devices they need. Invariant:
//! one tunnel per device; a tunnel that no forward needs ends once nothing uses it.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde_json::json;
use tokio::time::Instant;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::tunnel::{Tunnel, TunnelDeps, TunnelState};
use crate::base::Identity;

/// A tunnel that no forward names, opened by `culvert connect`, is kept this long for the next use.
const AD_HOC: Duration = Duration::from_secs(60);

/// How often a command that is done looks whether its last bytes are: less than a person notices.
const LOOK: Duration = Duration::from_millis(20);

/// The tunnels. Clones share them.
#[derive(Clone)]
pub(crate) struct Tunnels {
    deps: TunnelDeps,
    open: Arc<Mutex<BTreeMap<Identity, Entry>>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

struct Entry {
    tunnel: Tunnel,
    stop: CancellationToken,
    /// When something last used it that no forward accounts for.
    used: Instant,
}

impl Tunnels {
    pub(super) fn new(deps: TunnelDeps, stop: CancellationToken) -> Self {
        Self { deps, open: Arc::default(), tasks: TaskTracker::new(), stop }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Identity, Entry>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The tunnel to a device; made if there is none.
    pub(super) fn to(&self, device: &Identity) -> Tunnel {
        let mut open = self.lock();
        let entry = open.entry(device.clone()).or_insert_with(|| {
            let stop = self.stop.child_token();
            let (tunnel, keeper) = Tunnel::new(device.clone(), self.deps.clone(), stop.clone());
            // Awaited in `wait`.
            self.tasks.spawn(keeper);
            Entry { tunnel, stop, used: Instant::now() }
        });
        entry.used = Instant::now();
        entry.tunnel.clone()
    }

    /// The tunnel to a device, if there is one.
    pub(super) fn existing(&self, device: &Identity) -> Option<Tunnel> {
        self.lock().get(device).map(|entry| entry.tunnel.clone())
    }

    /// Ends tunnels to devices that no forward needs and nothing uses.
    pub(super) fn prune(&self, needed: &BTreeSet<Identity>) {
        self.lock().retain(|device, entry| {
            let busy = match entry.tunnel.state() {
                TunnelState::Up { mux, .. } => mux.channels() > 0,
                TunnelState::Idle | TunnelState::Waiting { .. } => false,
            };
            if busy {
                entry.used = Instant::now();
            }
            let keep = needed.contains(device) || entry.used.elapsed() < AD_HOC;
            if !keep {
                entry.stop.cancel();
            }
            keep
        });
    }

    /// Waits until the devices have taken what was written to connections that have ended, or the sessions are lost.
    pub(super) async fn delivered(&self) {
        while self.lock().values().any(|entry| is_under_way(&entry.tunnel)) {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Waits until all tunnels have ended; call it after `stop` was cancelled.
    pub(super) async fn wait(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// One entry per tunnel.
    pub(super) fn status(&self) -> serde_json::Value {
        let open = self.lock();
        open.iter().map(|(device, entry)| status(device, &entry.tunnel)).collect()
    }
}

fn is_under_way(tunnel: &Tunnel) -> bool {
    let TunnelState::Up { mux, link, .. } = tunnel.state() else { return false };
    mux.channels() > 0 || link.is_some_and(|link| link.end().is_none() && link.state().replay_bytes > 0)
}

fn status(device: &Identity, tunnel: &Tunnel) -> serde_json::Value {
    let device = device.to_string();
    match tunnel.state() {
        TunnelState::Idle => json!({ "device": device, "state": "idle" }),
        TunnelState::Waiting { why, since, .. } => {
            json!({ "device": device, "state": "waiting", "why": *why, "seconds": since.elapsed().as_secs() })
        }
        TunnelState::Up { mux, link, monitor, since } => json!({
            "device": device,
            "state": if link.as_ref().is_none_or(|link| link.attached()) { "up" } else { "detached" },
            "seconds": since.elapsed().as_secs(),
            "flows": mux.channels(),
            "resumable": link.is_some(),
            "rtt_seconds": monitor.rtt().map(|rtt| rtt.as_secs_f64()),
        }),
    }
}
