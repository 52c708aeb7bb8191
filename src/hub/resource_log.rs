//! The DeviceStreams resource log: one record per initiation, in the cloud's schema (wire.md, section g).
//!
//! Owns the record, the file, its rotation, and the threads that write. Does not know how an initiation is done.
//! Invariant: the hub never waits for the disk, nor the file for whoever reads standard output: a record that finds no
//! room in a queue is counted and dropped.
//!
//! The file has one JSON object per line, as the cloud writes them into a storage account. `properties` is JSON within
//! a string, as there. Keys of ours beside the documented ones: `policy`, `result` and `reason`.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        mpsc::{self, RecvTimeoutError, SyncSender},
    },
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
/// At the end, what is queued has this long to get out, for each of file and standard output.
const END_WAIT: Duration = Duration::from_secs(2);
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
    /// accepted, rejected, abandoned (the service left), or an error's name.
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
    /// accepted, rejected, abandoned (the service left), or the error's name.
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

    fn line(&self) -> Vec<u8> {
        // A struct of strings always becomes JSON.
        let mut line = serde_json::to_vec(self).unwrap_or_default();
        line.push(b'\n');
        line
    }

    /// The inner part.
    pub fn properties(&self) -> Option<Properties> {
        serde_json::from_str(&self.properties).ok()
    }
}

/// Takes records; threads write them.
#[derive(Debug)]
pub(in crate::hub) struct ResourceLog {
    // Ended in this order: what the first still writes goes to the second.
    file: Lane<Initiated>,
    _stdout: Option<Lane<Vec<u8>>>,
    failures: IntCounter,
}

impl ResourceLog {
    /// Opens the file and starts the writers.
    pub(in crate::hub) fn open(config: ResourceLogConfig, hostname: String, failures: IntCounter) -> io::Result<Self> {
        let stdout = config.stdout.then(io::stdout);
        Self::start(config, hostname, failures, stdout)
    }

    fn start(
        config: ResourceLogConfig,
        hostname: String,
        failures: IntCounter,
        stdout: Option<impl io::Write + Send + 'static>,
    ) -> io::Result<Self> {
        let mut sink = Sink::open(config)?;
        // Shown by the metric; a message per record would fill the disk that is full.
        let (failed, unprinted, unqueued) = (failures.clone(), failures.clone(), failures.clone());
        let print = |mut out: Box<dyn io::Write + Send>| {
            Lane::start("resource-log-stdout", move |line: Vec<u8>| {
                if out.write_all(&line).and_then(|()| out.flush()).is_err() {
                    unprinted.inc();
                }
            })
        };
        let stdout = stdout.map(|out| print(Box::new(out))).transpose()?;
        let lines = stdout.as_ref().and_then(|lane| lane.queue.clone());
        let file = Lane::start("resource-log", move |initiated| {
            let line = Record::new(&hostname, &initiated).line();
            if sink.write(&line).is_err() {
                failed.inc();
            }
            if lines.as_ref().is_some_and(|lines| lines.try_send(line).is_err()) {
                unqueued.inc();
            }
        })?;
        Ok(Self { file, _stdout: stdout, failures })
    }

    pub(in crate::hub) fn record(&self, initiated: Initiated) {
        let sent = self.file.queue.as_ref().is_some_and(|queue| queue.try_send(initiated).is_ok());
        if !sent {
            self.failures.inc();
        }
    }
}

/// A thread behind a queue.
#[derive(Debug)]
struct Lane<T> {
    queue: Option<SyncSender<T>>,
    /// Never receives; closes when the thread has done everything. Only a drop looks: the lock is for `Sync`.
    done: Mutex<mpsc::Receiver<()>>,
    thread: Option<JoinHandle<()>>,
}

impl<T: Send + 'static> Lane<T> {
    fn start(name: &str, mut work: impl FnMut(T) + Send + 'static) -> io::Result<Self> {
        let (queue, items) = mpsc::sync_channel(QUEUE);
        let (alive, done) = mpsc::channel();
        let run = move || {
            items.into_iter().for_each(&mut work);
            drop(alive);
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn(run)?;
        Ok(Self { queue: Some(queue), done: Mutex::new(done), thread: Some(thread) })
    }
}

/// Lets the thread finish what is queued. One that is stuck, as a pipe that nobody reads makes it, is left behind: the
/// process ends.
impl<T> Drop for Lane<T> {
    fn drop(&mut self) {
        self.queue = None;
        match self.done.get_mut().unwrap_or_else(PoisonError::into_inner).recv_timeout(END_WAIT) {
            Err(RecvTimeoutError::Timeout) => tracing::warn!("the last DeviceStreams records could not be written"),
            // A panic of the writer has been printed by the panic hook.
            _ => drop(self.thread.take().map(JoinHandle::join)),
        }
    }
}

/// The file and its size.
struct Sink {
    config: ResourceLogConfig,
    file: File,
    size: u64,
    /// The last record may be there in part.
    is_torn: bool,
}

impl Sink {
    fn open(config: ResourceLogConfig) -> io::Result<Self> {
        let file = open_file(&config.file)?;
        let size = file.metadata()?.len();
        // A hub that died may have left half a record. What cannot be read here may still be written.
        let is_torn = size > 0 && ends_in_mid_line(&config.file, size).unwrap_or(false);
        Ok(Self { config, file, size, is_torn })
    }

    /// A rotation that fails is a failure, but none of the record's: it goes to the old file.
    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        let is_full = self.size > 0 && self.size + line.len() as u64 > self.config.max_size;
        let rotated = if is_full { self.rotate() } else { Ok(()) };
        self.append(line).and(rotated)
    }

    fn append(&mut self, line: &[u8]) -> io::Result<()> {
        if self.is_torn {
            self.file.write_all(b"\n")?;
        }
        self.is_torn = true;
        self.file.write_all(line)?;
        self.is_torn = false;
        self.size += line.len() as u64;
        Ok(())
    }

    /// `file` becomes `file.1`, that `file.2`, and so on; the oldest goes.
    fn rotate(&mut self) -> io::Result<()> {
        let numbered = |number: u32| PathBuf::from(format!("{}.{number}", self.config.file.display()));
        let moved = if self.config.keep == 0 {
            std::fs::remove_file(&self.config.file)
        } else {
            // Only up to the first gap: a rotation that is tried again pushes nothing out.
            let free = (1..self.config.keep).find(|number| !numbered(*number).exists()).unwrap_or(self.config.keep);
            for number in (1..free).rev() {
                std::fs::rename(numbered(number), numbered(number + 1))?;
            }
            std::fs::rename(&self.config.file, numbered(1))
        };
        match moved {
            // Somebody else moved it away.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            moved => moved?,
        }
        self.file = open_file(&self.config.file)?;
        (self.size, self.is_torn) = (0, false);
        Ok(())
    }
}

fn open_file(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(FILE_MODE).open(path)
}

fn ends_in_mid_line(path: &Path, size: u64) -> io::Result<bool> {
    let mut last = [0];
    File::open(path)?.read_exact_at(&mut last, size.saturating_sub(1))?;
    Ok(last != *b"\n")
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

    fn scratch(name: &str) -> (PathBuf, ResourceLogConfig) {
        let folder = std::env::temp_dir().join(format!("culvert-resource-log-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).unwrap();
        let config = ResourceLogConfig { file: folder.join("log"), max_size: 1 << 20, keep: 3, stdout: true };
        (folder, config)
    }

    /// Standard output of a process whose reader has stopped reading, or has left.
    struct Pipe(Option<mpsc::Receiver<()>>);

    impl io::Write for Pipe {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            if let Some(never) = &self.0 {
                let _ = never.recv();
            }
            Err(io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_file_gets_its_records_whatever_becomes_of_standard_output() {
        let (unstick, stuck) = mpsc::channel();
        for pipe in [Pipe(None), Pipe(Some(stuck))] {
            let (folder, config) = scratch("stdout");
            let failures = IntCounter::new("failures", "failures").unwrap();
            let log = ResourceLog::start(config.clone(), "hub.example".into(), failures.clone(), Some(pipe)).unwrap();
            (0..6).for_each(|number| log.record(initiated(&format!("pump-{number}"))));
            let begun = std::time::Instant::now();
            drop(log);
            assert!(begun.elapsed() < 2 * END_WAIT, "{:?}", begun.elapsed());
            assert_eq!(read(&config).unwrap().len(), 6);
            std::fs::remove_dir_all(folder).unwrap();
        }
        drop(unstick);
    }

    #[test]
    fn half_a_record_spoils_no_other_and_a_failed_rotation_stops_nothing() {
        let (folder, config) = scratch("torn");
        let line = Record::new("hub.example", &initiated("pump")).line();
        let mut sink = Sink::open(ResourceLogConfig { max_size: 3 * line.len() as u64, ..config.clone() }).unwrap();
        sink.write(&line).unwrap();
        // As a full disk leaves it.
        sink.file.write_all(&line[..20]).unwrap();
        sink.is_torn = true;
        sink.write(&line).unwrap();
        assert_eq!(read(&config).unwrap().len(), 2);
        assert!(!Sink::open(config.clone()).unwrap().is_torn);
        std::fs::write(folder.join("died"), &line[..20]).unwrap();
        assert!(Sink::open(ResourceLogConfig { file: folder.join("died"), ..config.clone() }).unwrap().is_torn);
        // A folder has the name.
        std::fs::create_dir_all(folder.join("log.1/x")).unwrap();
        std::fs::create_dir_all(folder.join("log.2/x")).unwrap();
        std::fs::create_dir_all(folder.join("log.3/x")).unwrap();
        for _ in 0..2 {
            sink.write(&line).unwrap_or_default();
        }
        assert!(sink.write(&line).is_err(), "the rotation is a failure");
        let text = std::fs::read_to_string(folder.join("log")).unwrap();
        assert_eq!(text.lines().filter(|line| serde_json::from_str::<Record>(line).is_ok()).count(), 5);
        std::fs::remove_dir_all(folder).unwrap();
    }
}
