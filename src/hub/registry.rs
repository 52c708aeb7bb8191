//! The device registry. (hubmqtt: the in-memory half, to be put over SQLite; keep the signatures.)
//!
//! Owns the records. Does not know HTTP or MQTT. Invariant: what [`Registry::find`] returns has been committed.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;

use super::record::{DeviceRecord, DeviceSpec};
use crate::base::{DeviceId, Identity};

/// What must hold for a write to happen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Precondition {
    /// Nothing.
    Any,
    /// No such identity exists (create).
    Absent,
    /// It exists (update, `If-Match: *`).
    Present,
    /// It exists and has this etag.
    Etag(String),
}

/// Why the registry did not do it.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// `Absent` was asked for.
    #[error("{0} exists already")]
    Exists(Identity),
    /// There is no such identity, or no device for this module.
    #[error("{0} is not registered")]
    NotFound(Identity),
    /// It was changed by another meanwhile.
    #[error("{0} was changed by someone else meanwhile: its etag is another")]
    Changed(Identity),
}

/// The registry. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Registry {
    records: Arc<Mutex<BTreeMap<Identity, Arc<DeviceRecord>>>>,
    changes: watch::Sender<u64>,
}

impl Registry {
    /// Opens the registry's file.
    pub fn open(_file: &Path) -> Result<Self, RegistryError> {
        Ok(Self::default())
    }

    /// The record of an identity, from memory.
    pub fn find(&self, identity: &Identity) -> Option<Arc<DeviceRecord>> {
        self.lock().get(identity).cloned()
    }

    /// The first `top` devices by ID, without modules.
    pub fn devices(&self, top: usize) -> Vec<Arc<DeviceRecord>> {
        self.lock().values().filter(|record| record.identity.module.is_none()).take(top).cloned().collect()
    }

    /// A device's modules by ID.
    pub fn modules(&self, device: &DeviceId) -> Vec<Arc<DeviceRecord>> {
        let records = self.lock();
        let of_device = records.values().filter(|record| record.identity.device == *device);
        of_device.filter(|record| record.identity.module.is_some()).cloned().collect()
    }

    /// Creates or changes a record.
    pub async fn put(&self, spec: DeviceSpec, when: Precondition) -> Result<Arc<DeviceRecord>, RegistryError> {
        let mut records = self.lock();
        let old = records.get(&spec.identity).cloned();
        check(&spec.identity, old.as_deref(), &when)?;
        let etag = self.changes.borrow().to_string();
        let generation = old.as_ref().map_or_else(|| etag.clone(), |old| old.generation.clone());
        let DeviceSpec { identity, enabled, status_reason, authentication } = spec;
        let record = DeviceRecord {
            identity: identity.clone(),
            generation,
            etag,
            enabled,
            status_reason,
            status_updated: None,
            authentication,
        };
        let record = Arc::new(record);
        records.insert(identity, record.clone());
        self.changes.send_modify(|count| *count += 1);
        Ok(record)
    }

    /// Removes a record, and with a device its modules.
    pub async fn delete(&self, identity: &Identity, when: Precondition) -> Result<(), RegistryError> {
        let mut records = self.lock();
        let old = records.get(identity).cloned();
        check(identity, old.as_deref(), &when)?;
        records.remove(identity).ok_or_else(|| RegistryError::NotFound(identity.clone()))?;
        if identity.module.is_none() {
            records.retain(|other, _| other.device != identity.device);
        }
        self.changes.send_modify(|count| *count += 1);
        Ok(())
    }

    /// Changes after every committed write: whoever admitted someone checks again.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Identity, Arc<DeviceRecord>>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check(identity: &Identity, old: Option<&DeviceRecord>, when: &Precondition) -> Result<(), RegistryError> {
    match (when, old) {
        (Precondition::Any, _) | (Precondition::Absent, None) | (Precondition::Present, Some(_)) => Ok(()),
        (Precondition::Absent, Some(_)) => Err(RegistryError::Exists(identity.clone())),
        (Precondition::Etag(etag), Some(old)) if old.etag == *etag => Ok(()),
        (Precondition::Etag(_), Some(_)) => Err(RegistryError::Changed(identity.clone())),
        (Precondition::Present | Precondition::Etag(_), None) => Err(RegistryError::NotFound(identity.clone())),
    }
}
