//! The device registry: who may connect, and how each proves itself.
//!
//! Owns the records: in memory for every question, in one SQLite file for good. Does not know HTTP, MQTT or what a
//! proof is checked against. Invariant: what [`Registry::find`] returns has been committed, and whoever waits on
//! [`Registry::changes`] sees the records of every commit up to the one it was woken for.
//!
//! The file is read once, at start. One writer at a time checks its precondition against memory, commits to the file
//! (with an fsync: a revoked device must stay revoked after a power cut), then changes memory. What another program
//! writes into the file counts from the next start on; `sqlite3 FILE .backup` is safe at any time.

mod store;

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use tokio::sync::{Mutex, watch};

use self::store::Store;
use super::record::{DeviceRecord, DeviceSpec};
use crate::base::{DeviceId, Identity};

pub use self::store::StoreError;

/// Most identities: IoT Hub's documented limit of devices. At about 500 bytes each they are held in memory.
pub const MAX_IDENTITIES: usize = 1_000_000;
/// Most modules of a device: IoT Hub's documented limit.
pub const MAX_MODULES: usize = 50;

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
    /// A limit is reached.
    #[error("the registry is full: at most {MAX_IDENTITIES} identities and {MAX_MODULES} modules of a device")]
    Full,
    /// The file could not be read or written.
    #[error("the registry's file failed")]
    Store(#[from] StoreError),
    /// The writer ended before it was done: the hub is stopping, or has a bug.
    #[error("the registry's writer ended")]
    Interrupted,
}

/// The registry. Cheap to clone; clones are one registry.
#[derive(Debug, Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

type Records = BTreeMap<Identity, Arc<DeviceRecord>>;

#[derive(Debug)]
struct Inner {
    records: RwLock<Records>,
    changes: watch::Sender<u64>,
    store: Arc<Mutex<Store>>,
}

/// A registry that is forgotten with the process: for tests.
impl Default for Registry {
    fn default() -> Self {
        Store::in_memory().and_then(Self::with).expect("SQLite in memory needs nothing from outside")
    }
}

// === impl Registry ===

impl Registry {
    /// Opens the registry's file and reads it; creates it, for the owner's eyes only, if it is not there. Blocks.
    pub fn open(file: &Path) -> Result<Self, RegistryError> {
        Ok(Self::with(Store::open(file)?)?)
    }

    fn with(store: Store) -> Result<Self, StoreError> {
        let records = store.load()?.into_iter().map(|record| (record.identity.clone(), Arc::new(record))).collect();
        let store = Arc::new(Mutex::new(store));
        Ok(Self { inner: Arc::new(Inner { records: RwLock::new(records), changes: watch::Sender::new(0), store }) })
    }

    /// The record of an identity, from memory.
    pub fn find(&self, identity: &Identity) -> Option<Arc<DeviceRecord>> {
        self.inner.read().get(identity).cloned()
    }

    /// The first `top` devices by ID of those that are `wanted`, without modules.
    pub fn devices(&self, top: usize, wanted: impl Fn(&DeviceId) -> bool) -> Vec<Arc<DeviceRecord>> {
        let records = self.inner.read();
        let devices = records.values().filter(|record| record.identity.module.is_none());
        devices.filter(|record| wanted(&record.identity.device)).take(top).cloned().collect()
    }

    /// A device's modules by ID.
    pub fn modules(&self, device: &DeviceId) -> Vec<Arc<DeviceRecord>> {
        let records = self.inner.read();
        let modules = of_device(&records, device).filter(|record| record.identity.module.is_some());
        modules.cloned().collect()
    }

    /// Creates or changes a record.
    pub async fn put(&self, spec: DeviceSpec, when: Precondition) -> Result<Arc<DeviceRecord>, RegistryError> {
        self.write(move |inner, store| inner.put(store, &spec.identity.clone(), &when, |_| Ok(spec))).await
    }

    /// Creates or changes a record as `change` says, which sees the one there is: no other write comes in between.
    pub async fn update<E: From<RegistryError> + Send + 'static>(
        &self,
        identity: Identity,
        when: Precondition,
        change: impl FnOnce(Option<&DeviceRecord>) -> Result<DeviceSpec, E> + Send + 'static,
    ) -> Result<Arc<DeviceRecord>, E> {
        self.write(move |inner, store| inner.put(store, &identity, &when, change)).await
    }

    /// Removes a record, and with a device its modules.
    pub async fn delete(&self, identity: &Identity, when: Precondition) -> Result<(), RegistryError> {
        let identity = identity.clone();
        self.write(move |inner, store| inner.delete(store, &identity, &when)).await
    }

    /// Changes after every committed write: whoever admitted someone checks again.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    /// Runs one write off the async threads. A caller who goes away does not stop it half-way.
    async fn write<T: Send + 'static, E: From<RegistryError> + Send + 'static>(
        &self,
        change: impl FnOnce(&Inner, &mut Store) -> Result<T, E> + Send + 'static,
    ) -> Result<T, E> {
        let inner = self.inner.clone();
        let mut store = inner.store.clone().lock_owned().await;
        let done = tokio::task::spawn_blocking(move || change(&inner, &mut store)).await;
        done.unwrap_or_else(|_| Err(RegistryError::Interrupted.into()))
    }
}

// === impl Inner ===

impl Inner {
    fn put<E: From<RegistryError>>(
        &self,
        store: &mut Store,
        identity: &Identity,
        when: &Precondition,
        change: impl FnOnce(Option<&DeviceRecord>) -> Result<DeviceSpec, E>,
    ) -> Result<Arc<DeviceRecord>, E> {
        let old = self.read().get(identity).cloned();
        check(identity, old.as_deref(), when)?;
        if old.is_none() {
            self.check_room(identity)?;
        }
        let record = next_record(change(old.as_deref())?, old.as_deref(), store.next_stamp(SystemTime::now()));
        store.save(&record).map_err(RegistryError::from)?;
        let record = Arc::new(record);
        self.commit(|records| records.insert(record.identity.clone(), record.clone()));
        Ok(record)
    }

    fn delete(&self, store: &mut Store, identity: &Identity, when: &Precondition) -> Result<(), RegistryError> {
        let old = self.read().get(identity).cloned();
        check(identity, old.as_deref(), when)?;
        old.ok_or_else(|| RegistryError::NotFound(identity.clone()))?;
        store.remove(identity)?;
        self.commit(|records| match identity.module {
            Some(_) => drop(records.remove(identity)),
            None => records.retain(|other, _| other.device != identity.device),
        });
        Ok(())
    }

    /// A new module needs its device; both need room.
    fn check_room(&self, identity: &Identity) -> Result<(), RegistryError> {
        let records = self.read();
        let device = Identity::device(identity.device.clone());
        let family = of_device(&records, &identity.device).count();
        match identity.module {
            Some(_) if !records.contains_key(&device) => Err(RegistryError::NotFound(device)),
            Some(_) if family > MAX_MODULES => Err(RegistryError::Full),
            _ if records.len() >= MAX_IDENTITIES => Err(RegistryError::Full),
            _ => Ok(()),
        }
    }

    fn commit<T>(&self, change: impl FnOnce(&mut Records) -> T) {
        change(&mut self.records.write().unwrap_or_else(PoisonError::into_inner));
        self.changes.send_modify(|count| *count += 1);
    }

    fn read(&self) -> RwLockReadGuard<'_, Records> {
        // Each change is one call on the map: a panic elsewhere cannot have torn it.
        self.records.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The device, if there is one, then its modules by ID: a device sorts before its modules.
fn of_device<'a>(records: &'a Records, device: &'a DeviceId) -> impl Iterator<Item = &'a Arc<DeviceRecord>> {
    let from = Identity::device(device.clone());
    records.range(from..).take_while(move |(identity, _)| identity.device == *device).map(|(_, record)| record)
}

/// What `spec` makes of `old`. `stamp` is newer than that of any earlier write.
fn next_record(spec: DeviceSpec, old: Option<&DeviceRecord>, stamp: u64) -> DeviceRecord {
    let DeviceSpec { identity, enabled, status_reason, authentication } = spec;
    let unchanged = old.filter(|old| old.enabled == enabled);
    DeviceRecord {
        identity,
        generation: old.map_or_else(|| stamp.to_string(), |old| old.generation.clone()),
        etag: STANDARD.encode(stamp.to_be_bytes()),
        enabled,
        status_reason,
        status_updated: unchanged.map_or_else(|| Some(whole_millis(SystemTime::now())), |old| old.status_updated),
        authentication,
    }
}

/// Microseconds since 1970, the source of generations and etags.
fn micros(time: SystemTime) -> u64 {
    u64::try_from(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_micros()).unwrap_or(u64::MAX)
}

/// A time as the file keeps it.
fn whole_millis(time: SystemTime) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(micros(time) / 1000)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        base::Secret,
        hub::record::{Authentication, Thumbprint},
    };

    fn keys(byte: u8) -> Authentication {
        Authentication::Keys { primary: Secret::new([byte; 32]), secondary: Secret::new([byte + 1; 64]) }
    }

    fn spec(identity: &str, authentication: Authentication) -> DeviceSpec {
        DeviceSpec { identity: identity.parse().unwrap(), enabled: true, status_reason: None, authentication }
    }

    fn id(text: &str) -> Identity {
        text.parse().unwrap()
    }

    fn temporary() -> std::path::PathBuf {
        let folder = std::env::temp_dir().join(format!("culvert-registry-{}", getrandom::u64().unwrap()));
        std::fs::create_dir(&folder).unwrap();
        folder
    }

    #[tokio::test]
    async fn records_outlive_the_process_with_every_kind_of_proof() {
        let folder = temporary();
        let file = folder.join("registry.db");
        let thumbprint: Thumbprint = "ab".repeat(32).parse().unwrap();
        let self_signed = Authentication::SelfSigned { primary: None, secondary: Some(thumbprint) };
        let disabled = DeviceSpec {
            enabled: false,
            status_reason: Some("stolen \u{1F6B2}".into()),
            ..spec("d2", Authentication::Authority)
        };
        let mut written = Vec::new();
        {
            let registry = Registry::open(&file).unwrap();
            for spec in [spec("d1", keys(1)), spec("d1/m1", self_signed), disabled, spec("d'$%", keys(7))] {
                written.push(registry.put(spec, Precondition::Absent).await.unwrap());
            }
        }
        use std::os::unix::fs::PermissionsExt as _;
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        let registry = Registry::open(&file).unwrap();
        for record in &written {
            assert_eq!(registry.find(&record.identity).as_ref(), Some(record));
        }
        assert_eq!(registry.devices(10, |_| true).len(), 3);
        assert_eq!(registry.modules(&"d1".parse().unwrap()).len(), 1);
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[tokio::test]
    async fn preconditions_and_generations() {
        let registry = Registry::default();
        let first = registry.put(spec("d", keys(1)), Precondition::Absent).await.unwrap();
        let again = registry.put(spec("d", keys(1)), Precondition::Absent).await;
        assert!(matches!(again, Err(RegistryError::Exists(_))));
        let stale = Precondition::Etag("other".into());
        assert!(matches!(registry.put(spec("d", keys(1)), stale).await, Err(RegistryError::Changed(_))));
        let second = registry.put(spec("d", keys(3)), Precondition::Etag(first.etag.clone())).await.unwrap();
        assert_eq!(second.generation, first.generation);
        assert_eq!(second.status_updated, first.status_updated);
        assert_ne!(second.etag, first.etag);
        let absent = registry.put(spec("other", keys(1)), Precondition::Present).await;
        assert!(matches!(absent, Err(RegistryError::NotFound(_))));
        registry.delete(&id("d"), Precondition::Present).await.unwrap();
        assert!(matches!(registry.delete(&id("d"), Precondition::Any).await, Err(RegistryError::NotFound(_))));
        let reborn = registry.put(spec("d", keys(1)), Precondition::Absent).await.unwrap();
        assert_ne!(reborn.generation, first.generation);
    }

    #[tokio::test]
    async fn modules_need_their_device_and_go_with_it() {
        let registry = Registry::default();
        let orphan = registry.put(spec("d/m", keys(1)), Precondition::Any).await;
        assert!(matches!(orphan, Err(RegistryError::NotFound(device)) if device == id("d")));
        for name in ["d", "d-other", "d/m1", "d/m2", "d-other/m"] {
            registry.put(spec(name, keys(1)), Precondition::Absent).await.unwrap();
        }
        assert_eq!(registry.modules(&"d".parse().unwrap()).len(), 2);
        registry.delete(&id("d"), Precondition::Any).await.unwrap();
        assert!(registry.find(&id("d/m1")).is_none() && registry.find(&id("d-other/m")).is_some());
        assert!(registry.modules(&"d".parse().unwrap()).is_empty());
        for n in 0..MAX_MODULES - 1 {
            registry.put(spec(&format!("d-other/m{n}"), keys(1)), Precondition::Absent).await.unwrap();
        }
        let beyond = registry.put(spec("d-other/one-more", keys(1)), Precondition::Absent).await;
        assert!(matches!(beyond, Err(RegistryError::Full)));
        registry.put(spec("d-other/m1", keys(3)), Precondition::Present).await.unwrap();
    }

    #[tokio::test]
    async fn a_change_is_seen_by_those_who_wait_for_it() {
        let registry = Registry::default();
        let mut changes = registry.changes();
        let (seen, put) = tokio::join!(changes.changed(), registry.put(spec("d", keys(1)), Precondition::Any));
        seen.unwrap();
        assert_eq!(registry.find(&id("d")), Some(put.unwrap()));
    }

    #[tokio::test]
    async fn concurrent_creations_have_one_winner() {
        let registry = Registry::default();
        let attempts = (0..20).map(|n| registry.put(spec("d", keys(n)), Precondition::Absent));
        let results = futures_util::future::join_all(attempts).await;
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    }

    #[tokio::test]
    async fn a_change_sees_every_write_before_it() {
        let registry = Registry::default();
        registry.put(spec("d", keys(0)), Precondition::Any).await.unwrap();
        let status = (0..20).map(|n| {
            registry.update::<RegistryError>(id("d"), Precondition::Present, move |old| {
                let authentication = old.unwrap().authentication.clone();
                Ok(DeviceSpec { status_reason: Some(n.to_string()), ..spec("d", authentication) })
            })
        });
        let rotated = registry.put(spec("d", keys(9)), Precondition::Present);
        let (done, rotated) = tokio::join!(futures_util::future::join_all(status), rotated);
        assert!(done.iter().all(Result::is_ok) && rotated.is_ok());
        assert_eq!(registry.find(&id("d")).unwrap().authentication, keys(9));
    }

    #[test]
    fn a_file_that_is_no_registry_or_too_new_is_refused_and_left_alone() {
        let folder = temporary();
        let file = folder.join("registry.db");
        std::fs::write(&file, "this is not a database, but it is long enough to be looked at as one").unwrap();
        assert!(matches!(Registry::open(&file), Err(RegistryError::Store(_))));
        std::fs::remove_file(&file).unwrap();
        drop(Registry::open(&file).unwrap());
        let connection = rusqlite::Connection::open(&file).unwrap();
        connection.execute_batch("PRAGMA user_version = 99").unwrap();
        assert!(matches!(Registry::open(&file), Err(RegistryError::Store(StoreError::TooNew { .. }))));
        connection.execute_batch("PRAGMA user_version = 1").unwrap();
        let bad = "INSERT INTO identity VALUES ('a/b', '', 1, 1, 1, NULL, NULL, 'sas', 'AAAA', 'AAAA')";
        connection.execute_batch(bad).unwrap();
        assert!(matches!(Registry::open(&file), Err(RegistryError::Store(StoreError::Corrupt { .. }))));
        assert!(Registry::open(&folder.join("missing/registry.db")).is_err());
        std::fs::remove_dir_all(folder).unwrap();
    }
}
