//! What every connection of the hub shares.
//!
//! Owns the handles to the registry, the courier, the metrics and the configuration in force, and the one place that
//! judges whether an admission still holds. Does not know any protocol.
//! Invariant: an admission that no longer holds is noticed by whoever awaits [`HubShared::revoked`].

use std::{
    net::SocketAddr,
    panic::AssertUnwindSafe,
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use futures_util::FutureExt as _;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    authorities::Authorities,
    bridge::{About, Bridges},
    control::Sessions,
    courier::Courier,
    limits::Newcomers,
    metrics::HubMetrics,
    record::Admission,
    registry::Registry,
    resource_log::{Initiated, ResourceLog},
};
use crate::{
    auth::{Rights, connstr::DEFAULT_PORT},
    base::{DeviceId, Identity, Name, Secret},
    config::{HubConfig, PublicUrl},
};

/// The first change is looked at immediately, later ones at most this often: each of 100,000 sessions looks, and a
/// bulk import changes the registry hundreds of times per second. Well below the 5 s within which a revocation takes
/// effect.
const RECHECK: Duration = Duration::from_secs(1);

/// Shared by reference (`Arc`) by all tasks of the hub.
#[derive(Debug)]
pub struct HubShared {
    /// Who may connect.
    pub registry: Registry,
    /// Who is connected.
    pub courier: Courier,
    /// What is counted.
    pub metrics: HubMetrics,
    /// Cancelled when the hub ends.
    pub shutdown: CancellationToken,
    /// Who may still be counted as a stranger.
    pub newcomers: Newcomers,
    pub(in crate::hub) bridges: Bridges,
    pub(in crate::hub) sessions: Sessions,
    log: Option<ResourceLog>,
    tasks: TaskTracker,
    config: watch::Sender<Arc<HubConfig>>,
    authorities: RwLock<Arc<Authorities>>,
}

impl HubShared {
    /// Ties the parts together.
    pub fn new(config: HubConfig, registry: Registry, metrics: HubMetrics, shutdown: CancellationToken) -> Self {
        let bridges = Bridges::new(metrics.clone(), config.limits.write_stall_timeout);
        let authorities = RwLock::new(Arc::new(Authorities::of(&config)));
        let config = watch::Sender::new(Arc::new(config));
        let (courier, newcomers) = (Courier::default(), Newcomers::default());
        Self {
            registry,
            courier,
            metrics,
            shutdown,
            newcomers,
            bridges,
            sessions: Sessions::default(),
            log: None,
            tasks: TaskTracker::new(),
            config,
            authorities,
        }
    }

    /// Where initiations are recorded.
    pub(in crate::hub) fn log_to(&mut self, log: ResourceLog) {
        self.log = Some(log);
    }

    pub(in crate::hub) fn record(&self, initiated: Initiated) {
        if let Some(log) = &self.log {
            log.record(initiated);
        }
    }

    /// Runs a connection's task. Its panic ends it alone and is counted.
    pub(in crate::hub) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let panics = self.metrics.task_panics.clone();
        self.tasks.spawn(async move {
            if AssertUnwindSafe(task).catch_unwind().await.is_err() {
                panics.inc();
            }
        });
    }

    /// Waits until the last task has ended. Call after `shutdown` was cancelled.
    pub(in crate::hub) async fn tasks_ended(&self) {
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// The configuration in force. Take it once per request or session, not once per byte.
    pub fn config(&self) -> Arc<HubConfig> {
        self.config.borrow().clone()
    }

    /// Puts another configuration in force. Whatever it no longer admits ends.
    pub fn reconfigure(&self, config: HubConfig) {
        let authorities = Arc::new(Authorities::of(&config));
        *self.authorities.write().unwrap_or_else(PoisonError::into_inner) = authorities;
        // After the authorities: whoever is woken by this looks at them, too.
        self.config.send_replace(Arc::new(config));
    }

    /// The device CAs in force.
    pub(in crate::hub) fn authorities(&self) -> Arc<Authorities> {
        // The only change is of the whole.
        self.authorities.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where clients reach this hub: `public_url`, else its name and the port it listens on.
    pub fn endpoint(&self) -> PublicUrl {
        let config = self.config();
        let port = config.listen.first().map_or(DEFAULT_PORT, SocketAddr::port);
        config.public_url.clone().unwrap_or_else(|| PublicUrl { host: config.hostname.clone(), port })
    }

    /// A device says that its leg of a bridge is gone: the bridge ends at once.
    pub fn device_lost_leg(&self, identity: &Identity, sid: &str) {
        self.bridges.device_lost(identity, sid);
    }

    /// Ends the bridges whose admissions no longer hold, for as long as it is polled.
    pub(in crate::hub) async fn enforce_revocations(&self) {
        let (mut registry, mut config) = (self.registry.changes(), self.config.subscribe());
        loop {
            self.bridges.end_unless(|about, device| self.admits_bridge(about, device));
            // Neither sender can be dropped while `self` is borrowed.
            tokio::select! {
                _ = registry.changed() => {}
                _ = config.changed() => {}
            }
        }
    }

    /// True while both sides of a bridge would be admitted again.
    pub(in crate::hub) fn admits_bridge(&self, about: &About, device: Option<&Admission>) -> bool {
        let About { identity, policy, policy_key, .. } = about;
        self.admits_policy(policy, policy_key, Rights::SERVICE_CONNECT, &identity.device)
            && device.is_none_or(|admission| self.admits_device(identity, admission))
    }

    /// True while `identity` is registered and enabled, and `admission` would be accepted again.
    pub fn admits_device(&self, identity: &Identity, admission: &Admission) -> bool {
        let Some(record) = self.registry.find(identity).filter(|record| record.enabled) else { return false };
        // A module of a disabled device may not connect either.
        let device = Identity::device(identity.device.clone());
        if identity.module.is_some() && !self.registry.find(&device).is_some_and(|device| device.enabled) {
            return false;
        }
        match admission {
            Admission::Policy(name, key) => self.admits_policy(name, key, Rights::DEVICE_CONNECT, &identity.device),
            Admission::Authority(anchor) if !self.authorities().include(*anchor) => false,
            own => record.authentication.accepts(own),
        }
    }

    /// True while the policy exists, has the right and this key, and reaches the device.
    pub fn admits_policy(&self, name: &Name, key: &Secret, right: Rights, device: &DeviceId) -> bool {
        let config = self.config();
        let Some(policy) = config.policy(name) else { return false };
        policy.rights.include(right) && policy.may_reach(device) && policy.keys().any(|held| held == key)
    }

    /// Resolves when `admission` no longer admits `identity`.
    pub async fn revoked(&self, identity: &Identity, admission: &Admission) {
        let (mut registry, mut config) = (self.registry.changes(), self.config.subscribe());
        let mut due = Instant::now();
        while self.admits_device(identity, admission) {
            // Neither sender can be dropped while `self` is borrowed.
            tokio::select! {
                _ = registry.changed() => {}
                _ = config.changed() => {}
            }
            sleep_until(due).await;
            due = Instant::now() + RECHECK;
        }
    }
}
