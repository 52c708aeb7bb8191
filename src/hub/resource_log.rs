//! The DeviceStreams resource log: one record per initiation, in the cloud's schema (wire.md, section g).
//!
//! Owns the record, the file, its rotation, and the thread that writes it. Does not know how an initiation is done.
//! Invariant: the hub never waits for the disk: a record that finds no room in the queue is counted and dropped.
//!
//! The file has one JSON object per line, as the cloud writes them into a storage account. `properties` is JSON within
//! a string, as there. Keys of ours beside the documented ones: `policy`, `result` and `reason`.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::mpsc,
    thread::JoinHandle,
    time::{Duration, SystemTime},
};

use prometheus::IntCounter;
use serde::{Deserialize, Serialize};

use crate::{
    base::{Identity, Name, StreamName, Utc},
    config::ResourceLogConfig,
};

/// Records that wait for the disk: two seconds of what a hub can initiate.
const QUEUE: usize = 1024;
/// Only the hub's user and group read who talked to whom.
const FILE_MODE: u32 = 0o640;

/// What is recorded of one initiation.
#[derive(Debug, Clone)]
pub(in crate::hub) struct Initiated {
    pub(in crate::hub) at: SystemTime,
    pub(in crate::hub) identity: Identity,
    pub(in crate::hub) stream: StreamName,
    pub(in crate::hub) policy: Name,
    pub(in crate::hub) api_version: String,
    pub(in crate::hub) took: Duration,
    /// accepted, rejected, or an error's name.
    pub(in crate::hub) result: &'static str,
    /// The error's six-digit code.
    pub(in crate::hub) code: Option<u32>,
    /// What went wrong or why the device rejected.
    pub(in crate::hub) description: Option<String>,
}

/// A line of the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// When the request came: ISO 8601, UTC.
    pub time: String,
    /// Which hub.
    pub resource_id: String,
    /// Always `invoke`.
    pub operation_name: String,
    /// Always `DeviceStreams`.
    pub category: String,
    /// Empty on success, else the name of the error.
    pub result_type: String,
    /// Empty on success, else the error's text.
    pub result_description: String,
    /// `Information` or `Error`.
    pub level: String,
    /// How long the service waited for the answer.
    pub duration_ms: String,
    /// Where the hub is: its host name.
    pub location: String,
    /// [`Properties`] as JSON in a string.
    pub properties: String,
}

/// The inner part of a [`Record`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Properties {
    /// The device that was asked for.
    pub device_id: String,
    /// Its module.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub module_id: Option<String>,
    /// The api-version of the request.
    pub sdk_version: String,
    /// Bytes of the request's body: streams have none.
    pub request_size: String,
    /// Bytes of the answer's body.
    pub response_size: String,
    /// The error's code.
    pub status_code: Option<String>,
    /// The stream's name.
    pub request_name: String,
    /// Always `c2d`.
    pub direction: String,
    /// The policy that asked.
    pub policy: String,
    /// accepted, rejected, or the error's name.
    pub result: String,
    /// Why the device rejected.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reason: Option<String>,
}

impl Record {
    fn new(hostname: &str, initiated: &Initiated) -> Self {
        let failed = initiated.code.is_some();
        let description = initiated.description.clone().unwrap_or_default();
        let properties = Properties {
            device_id: initiated.identity.device.to_string(),
            module_id: initiated.identity.module.as_ref().map(ToString::to_string),
            sdk_version: initiated.api_version.clone(),
            request_size: "0".into(),
            response_size: "0".into(),
            status_code: initiated.code.map(|code| code.to_string()),
            request_name: initiated.stream.to_string(),
            direction: "c2d".into(),
            policy: initiated.policy.to_string(),
            result: initiated.result.into(),
            reason: initiated.description.clone().filter(|_| !failed),
        };
        Self {
            time: Utc::from(initiated.at).to_string(),
            resource_id: format!("/culvert/hubs/{hostname}"),
            operation_name: "invoke".into(),
            category: "DeviceStreams".into(),
            result_type: if failed { initiated.result.into() } else { String::new() },
            result_description: if failed { description } else { String::new() },
            level: if failed { "Error" } else { "Information" }.into(),
            duration_ms: initiated.took.as_millis().to_string(),
            location: hostname.into(),
            // A struct of strings always becomes JSON.
            properties: serde_json::to_string(&properties).unwrap_or_default(),
        }
    }

    /// The inner part.
    pub fn properties(&self) -> Option<Properties> {
        serde_json::from_str(&self.properties).ok()
    }
}

/// Takes records; a thread writes them.
#[derive(Debug)]
pub(in crate::hub) struct ResourceLog {
    queue: Option<mpsc::SyncSender<Initiated>>,
    writer: Option<JoinHandle<()>>,
    failures: IntCounter,
}

impl ResourceLog {
    /// Opens the file and starts the writer.
    pub(in crate::hub) fn open(config: ResourceLogConfig, hostname: String, failures: IntCounter) -> io::Result<Self> {
        let mut sink = Sink::open(config)?;
        let (queue, records) = mpsc::sync_channel::<Initiated>(QUEUE);
        let failed = failures.clone();
        let write = move || {
            for initiated in records {
                // Shown by the metric; a message per record would fill the disk that is full.
                if sink.write(&Record::new(&hostname, &initiated)).is_err() {
                    failed.inc();
                }
            }
        };
        let writer = std::thread::Builder::new().name("resource-log".into()).spawn(write)?;
        Ok(Self { queue: Some(queue), writer: Some(writer), failures })
    }

    pub(in crate::hub) fn record(&self, initiated: Initiated) {
        let sent = self.queue.as_ref().is_some_and(|queue| queue.try_send(initiated).is_ok());
        if !sent {
            self.failures.inc();
        }
    }
}

/// Writes what is queued before the process ends.
impl Drop for ResourceLog {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(writer) = self.writer.take() {
            // A panic of the writer has been printed by the panic hook.
            let _ = writer.join();
        }
    }
}

/// The file and its size.
struct Sink {
    config: ResourceLogConfig,
    file: File,
    size: u64,
}

impl Sink {
    fn open(config: ResourceLogConfig) -> io::Result<Self> {
        let file = open_file(&config.file)?;
        let size = file.metadata()?.len();
        Ok(Self { config, file, size })
    }

    fn write(&mut self, record: &Record) -> io::Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        if self.config.stdout {
            io::stdout().write_all(&line)?;
        }
        if self.size > 0 && self.size + line.len() as u64 > self.config.max_size {
            self.rotate()?;
        }
        self.size += line.len() as u64;
        self.file.write_all(&line)
    }

    /// `file` becomes `file.1`, that `file.2`, and so on; the oldest goes.
    fn rotate(&mut self) -> io::Result<()> {
        let numbered = |number: u32| PathBuf::from(format!("{}.{number}", self.config.file.display()));
        if self.config.keep == 0 {
            std::fs::remove_file(&self.config.file)?;
        } else {
            for number in (1..self.config.keep).rev() {
                // Most numbers do not exist yet.
                let _ = std::fs::rename(numbered(number), numbered(number + 1));
            }
            std::fs::rename(&self.config.file, numbered(1))?;
        }
        self.file = open_file(&self.config.file)?;
        self.size = 0;
        Ok(())
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(FILE_MODE).open(path)
}

/// The records of a log, oldest first, rotated files included. Lines that are no records are passed over: the last
/// one may be half written.
pub fn read(config: &ResourceLogConfig) -> io::Result<Vec<Record>> {
    let rotated = (1..=config.keep).rev().map(|number| PathBuf::from(format!("{}.{number}", config.file.display())));
    let mut records = Vec::new();
    for path in rotated.filter(|path| path.exists()).chain([config.file.clone()]) {
        let text = std::fs::read_to_string(path)?;
        records.extend(text.lines().filter_map(|line| serde_json::from_str::<Record>(line).ok()));
    }
    Ok(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn initiated(device: &str) -> Initiated {
        Initiated {
            at: SystemTime::UNIX_EPOCH,
            identity: device.parse().unwrap(),
            stream: "ssh".parse().unwrap(),
            policy: "service".parse().unwrap(),
            api_version: "2018-10-20-preview".into(),
            took: Duration::from_millis(42),
            result: "DeviceNotOnline",
            code: Some(404_103),
            description: Some("offline\n\x1b[31m".into()),
        }
    }

    #[test]
    fn records_are_rotated_and_read_back_in_order() {
        let folder = std::env::temp_dir().join(format!("culvert-resource-log-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let config = ResourceLogConfig { file: folder.join("log"), max_size: 1500, keep: 3, stdout: false };
        let failures = IntCounter::new("failures", "failures").unwrap();
        let log = ResourceLog::open(config.clone(), "hub.example".into(), failures.clone()).unwrap();
        for number in 0..6 {
            log.record(initiated(&format!("pump-{number}/m")));
        }
        drop(log);
        let records = read(&config).unwrap();
        assert!(folder.join("log.1").exists());
        let ids: Vec<_> = records.iter().map(|record| record.properties().unwrap().device_id).collect();
        assert_eq!(ids, ["pump-0", "pump-1", "pump-2", "pump-3", "pump-4", "pump-5"]);
        let record = &records[0];
        assert_eq!(record.time, "1970-01-01T00:00:00.000Z");
        assert_eq!((record.category.as_str(), record.operation_name.as_str()), ("DeviceStreams", "invoke"));
        assert_eq!((record.level.as_str(), record.result_type.as_str()), ("Error", "DeviceNotOnline"));
        let properties = record.properties().unwrap();
        assert_eq!((properties.module_id.as_deref(), properties.status_code.as_deref()), (Some("m"), Some("404103")));
        let raw = std::fs::read_to_string(folder.join("log")).unwrap();
        assert!(!raw.contains('\x1b'), "escapes stay escaped");
        assert_eq!(failures.get(), 0);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
