//! The registry's SQLite file.
//!
//! Owns the tables and their versions. Does not know preconditions, memory or who asks.
//! Invariant: a row that is not a valid record is an error with its name, never skipped: a device must not get in,
//! or stay out, because the hub misread a row.

use std::{
    fs::OpenOptions,
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::{
    super::record::{Authentication, DeviceRecord, Thumbprint},
    micros,
};
use crate::{
    auth::key::{decode_key, encode_key},
    base::Identity,
};

/// The layout that this release writes.
const LAYOUT: i64 = 1;
/// How long to wait for another program that holds the file, such as a backup.
const BUSY: Duration = Duration::from_secs(5);

/// Times are milliseconds since 1970. A module of `''` is the device itself.
const CREATE: &str = "
CREATE TABLE identity (
    device         TEXT    NOT NULL,
    module         TEXT    NOT NULL,
    generation     INTEGER NOT NULL,
    version        INTEGER NOT NULL,
    enabled        INTEGER NOT NULL,
    status_reason  TEXT,
    status_updated INTEGER,
    proof          TEXT    NOT NULL CHECK (proof IN ('sas', 'selfSigned', 'certificateAuthority')),
    primary_proof   TEXT,
    secondary_proof TEXT,
    PRIMARY KEY (device, module)
) STRICT, WITHOUT ROWID;
PRAGMA user_version = 1;";

const SAVE: &str = "INSERT OR REPLACE INTO identity VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";

/// Why the file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It cannot be created or opened.
    #[error("cannot open {path}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// SQLite failed.
    #[error("SQLite failed")]
    Sqlite(#[from] rusqlite::Error),
    /// A newer culvert wrote it.
    #[error("the file has layout {found}; this release knows layouts up to {LAYOUT}: use the newer release")]
    TooNew {
        /// Its layout.
        found: i64,
    },
    /// A row is not a record.
    #[error("the row of {identity:?} has an invalid {field}")]
    Corrupt {
        /// Device, or device/module.
        identity: String,
        /// The column.
        field: &'static str,
    },
}

/// The file, open for reading and writing.
#[derive(Debug)]
pub(super) struct Store {
    connection: Connection,
    last_stamp: u64,
}

impl Store {
    pub(super) fn open(file: &Path) -> Result<Self, StoreError> {
        // Made before SQLite does, because it holds keys: SQLite gives its side files the same mode.
        let made = OpenOptions::new().create(true).append(true).mode(0o600).open(file);
        made.map_err(|source| StoreError::Open { path: file.into(), source })?;
        let connection = Connection::open(file)?;
        connection.busy_timeout(BUSY)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        connection.pragma_update(None, "synchronous", "FULL")?;
        Self::prepare(connection)
    }

    pub(super) fn in_memory() -> Result<Self, StoreError> {
        Self::prepare(Connection::open_in_memory()?)
    }

    fn prepare(mut connection: Connection) -> Result<Self, StoreError> {
        let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        match transaction.query_row("PRAGMA user_version", [], |row| row.get(0))? {
            0 => transaction.execute_batch(CREATE)?,
            LAYOUT => {}
            found => return Err(StoreError::TooNew { found }),
        }
        let last: Option<i64> =
            transaction.query_row("SELECT max(version) FROM identity", [], |row| row.get(0)).optional()?.flatten();
        transaction.commit()?;
        Ok(Self { connection, last_stamp: last.and_then(|last| u64::try_from(last).ok()).unwrap_or(0) })
    }

    /// A number newer than that of any earlier write, whatever the clock does.
    pub(super) fn next_stamp(&mut self, now: SystemTime) -> u64 {
        self.last_stamp = micros(now).max(self.last_stamp + 1);
        self.last_stamp
    }

    pub(super) fn load(&self) -> Result<Vec<DeviceRecord>, StoreError> {
        let mut statement = self.connection.prepare("SELECT * FROM identity")?;
        let mut rows = statement.query([])?;
        let mut records = Vec::new();
        while let Some(row) = rows.next()? {
            records.push(record(row)?);
        }
        Ok(records)
    }

    pub(super) fn save(&mut self, record: &DeviceRecord) -> Result<(), StoreError> {
        let (proof, primary, secondary) = proof_columns(&record.authentication);
        let version = STANDARD.decode(&record.etag).ok().and_then(|bytes| bytes.try_into().ok());
        self.connection.prepare_cached(SAVE)?.execute(params![
            record.identity.device.as_str(),
            record.identity.module.as_ref().map_or("", |module| module.as_str()),
            record.generation.parse::<i64>().unwrap_or_default(),
            version.map(i64::from_be_bytes).unwrap_or_default(),
            record.enabled,
            record.status_reason,
            record.status_updated.map(millis),
            proof,
            primary,
            secondary,
        ])?;
        Ok(())
    }

    /// Removes an identity, and with a device its modules.
    pub(super) fn remove(&mut self, identity: &Identity) -> Result<(), StoreError> {
        let device = identity.device.as_str();
        match &identity.module {
            None => self.connection.execute("DELETE FROM identity WHERE device = ?", [device])?,
            Some(module) => self
                .connection
                .execute("DELETE FROM identity WHERE device = ? AND module = ?", [device, module.as_str()])?,
        };
        Ok(())
    }
}

fn proof_columns(authentication: &Authentication) -> (&'static str, Option<String>, Option<String>) {
    let text = |thumbprint: &Option<Thumbprint>| thumbprint.as_ref().map(ToString::to_string);
    match authentication {
        Authentication::Keys { primary, secondary } => ("sas", Some(encode_key(primary)), Some(encode_key(secondary))),
        Authentication::SelfSigned { primary, secondary } => ("selfSigned", text(primary), text(secondary)),
        Authentication::Authority => ("certificateAuthority", None, None),
    }
}

fn record(row: &Row<'_>) -> Result<DeviceRecord, StoreError> {
    let (device, module): (String, String) = (row.get("device")?, row.get("module")?);
    let name = if module.is_empty() { device } else { format!("{device}/{module}") };
    let corrupt = |field| StoreError::Corrupt { identity: name.clone(), field };
    let identity: Identity = name.parse().map_err(|_| corrupt("ID"))?;
    if identity.module.is_none() != module.is_empty() {
        return Err(corrupt("ID"));
    }
    let status_updated: Option<i64> = row.get("status_updated")?;
    Ok(DeviceRecord {
        identity,
        generation: row.get::<_, i64>("generation")?.to_string(),
        etag: STANDARD.encode(row.get::<_, i64>("version")?.to_be_bytes()),
        enabled: row.get("enabled")?,
        status_reason: row.get("status_reason")?,
        status_updated: status_updated.and_then(|at| u64::try_from(at).ok()).map(from_millis),
        authentication: authentication(row)?.ok_or_else(|| corrupt("proof"))?,
    })
}

fn authentication(row: &Row<'_>) -> Result<Option<Authentication>, StoreError> {
    let (primary, secondary): (Option<String>, Option<String>) =
        (row.get("primary_proof")?, row.get("secondary_proof")?);
    let proof: String = row.get("proof")?;
    Ok(match (proof.as_str(), primary, secondary) {
        ("sas", Some(primary), Some(secondary)) => {
            let keys = decode_key(&primary).ok().zip(decode_key(&secondary).ok());
            keys.map(|(primary, secondary)| Authentication::Keys { primary, secondary })
        }
        ("selfSigned", primary, secondary) => {
            let read = |text: Option<String>| text.map(|text| text.parse::<Thumbprint>()).transpose().ok();
            let both = read(primary).zip(read(secondary));
            both.map(|(primary, secondary)| Authentication::SelfSigned { primary, secondary })
        }
        ("certificateAuthority", ..) => Some(Authentication::Authority),
        _ => None,
    })
}

fn millis(time: SystemTime) -> i64 {
    i64::try_from(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis()).unwrap_or(i64::MAX)
}

fn from_millis(millis: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(millis)
}
