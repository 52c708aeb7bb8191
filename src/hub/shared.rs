//! What every connection of the hub shares.
//!
//! Owns the handles to the registry, the courier, the metrics and the settings in force, and the one place that
//! judges whether an admission still holds. Does not know any protocol.
//! Invariant: an admission that no longer holds is noticed by whoever awaits [`HubShared::revoked`].

use std::{collections::HashMap, sync::Arc};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{courier::Courier, metrics::HubMetrics, record::Admission, registry::Registry};
use crate::{
    auth::Rights,
    base::{Identity, Name, Secret},
};

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
    settings: watch::Sender<Arc<Settings>>,
}

/// What of the configuration can change while the hub runs.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// The name in SAS resources.
    pub hostname: String,
    /// The shared access policies.
    pub policies: HashMap<Name, Policy>,
}

/// A shared access policy.
#[derive(Debug, Clone)]
pub struct Policy {
    /// What it may do.
    pub rights: Rights,
    /// Its keys, decoded.
    pub keys: Vec<Secret>,
}

impl HubShared {
    /// Ties the parts together.
    pub fn new(registry: Registry, metrics: HubMetrics, settings: Settings, shutdown: CancellationToken) -> Self {
        let settings = watch::Sender::new(Arc::new(settings));
        Self { registry, courier: Courier::default(), metrics, shutdown, settings }
    }

    /// The settings in force.
    pub fn settings(&self) -> Arc<Settings> {
        self.settings.borrow().clone()
    }

    /// Puts other settings in force. Whatever they no longer admit ends.
    pub fn change_settings(&self, settings: Settings) {
        self.settings.send_replace(Arc::new(settings));
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
            Admission::Policy(name, key) => self.admits_policy(name, key, Rights::DEVICE_CONNECT),
            own => record.authentication.accepts(own),
        }
    }

    /// True while the policy exists, has the right, and has this key.
    pub fn admits_policy(&self, name: &Name, key: &Secret, right: Rights) -> bool {
        let settings = self.settings();
        settings.policies.get(name).is_some_and(|p| p.rights.include(right) && p.keys.contains(key))
    }

    /// Resolves when `admission` no longer admits `identity`.
    pub async fn revoked(&self, identity: &Identity, admission: &Admission) {
        let (mut registry, mut settings) = (self.registry.changes(), self.settings.subscribe());
        while self.admits_device(identity, admission) {
            // Neither sender can be dropped while `self` is borrowed.
            tokio::select! {
                _ = registry.changed() => {}
                _ = settings.changed() => {}
            }
        }
    }
}
