//! The folders that a daemon keeps its state and its control socket in.
//!
//! Owns their making, and the lock that keeps a second hub out of a state folder. Does not know what is written there.
//! Invariant: two running hubs never share a state folder.

use std::{
    fs::{DirBuilder, File, OpenOptions, TryLockError},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
};

use anyhow::{Context as _, anyhow};

use super::Settings;
use crate::cli::{
    args::Role,
    exit::{Failure, Outcome},
};

/// Folders that a daemon makes for itself: the group may look for sockets and logs in them.
const FOLDER_MODE: u32 = 0o750;
/// The lock file tells nobody anything but a PID.
const LOCK_MODE: u32 = 0o640;
/// A PID and a newline, with room to spare; what else somebody wrote there is not read.
const MAX_HOLDER: u64 = 32;

const LOCK_FILE: &str = "hub.lock";

/// A state folder that is ours while this lives. The kernel gives it back when the process dies, however that is.
#[derive(Debug)]
pub(super) struct StateLock {
    _file: Option<File>,
}

/// Makes the state folder and the one for the control socket (systemd makes them for the units, nobody for people),
/// and takes the first. Without the second only those who would ask the daemon go without.
pub(super) fn take(role: Role, settings: &Settings<'_>) -> Outcome<StateLock> {
    let named = || format!("state_dir, {}", settings.state_dir.display());
    make(settings.state_dir).with_context(named).map_err(Failure::unavailable)?;
    if let Some(folder) = settings.control_socket.and_then(Path::parent)
        && let Err(error) = make(folder)
    {
        tracing::warn!(%error, "the folder of control_socket, {}, cannot be made", folder.display());
    }
    let file = match role {
        // It reads its registry once: what another one changes there it would never see.
        Role::Hub => lock(settings.state_dir).map_err(Failure::unavailable)?,
        // They keep an ID there; two with the same one are told so by the devices.
        Role::Device | Role::Service => None,
    };
    Ok(StateLock { _file: file })
}

fn make(folder: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(folder)
}

/// Nothing on a file system without locks, or where the file cannot be written: then the registry cannot be, either.
fn lock(folder: &Path) -> anyhow::Result<Option<File>> {
    let mut open = OpenOptions::new();
    // Not truncated: whoever has the lock has its PID in there.
    open.read(true).write(true).create(true).truncate(false).mode(LOCK_MODE);
    let Ok(mut file) = open.open(folder.join(LOCK_FILE)) else { return Ok(None) };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(taken(folder, &file)),
        Err(TryLockError::Error(_)) => return Ok(None),
    }
    // For people only; the lock holds without it.
    let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(Some(file))
}

fn taken(folder: &Path, file: &File) -> anyhow::Error {
    let mut holder = String::new();
    let pid = file.take(MAX_HOLDER).read_to_string(&mut holder).ok().and_then(|_| holder.trim().parse::<u32>().ok());
    let who = pid.map_or_else(|| "a culvert hub".into(), |pid| format!("the culvert hub with PID {pid}"));
    let folder = folder.display();
    anyhow!(
        "another daemon is running: {who} uses state_dir {folder}; stop it, or give this hub a state_dir of its own"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_daemon_starts_without_a_folder_for_its_control_socket() {
        let folder = std::env::temp_dir().join(format!("culvert-folders-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("file"), "").unwrap();
        let (metrics, log) = (crate::config::DeviceConfig::default_metrics(), crate::config::LogConfig::default());
        let (socket, impossible) = (folder.join("file/run/device.sock"), folder.join("file/state"));
        let mut settings = Settings {
            metrics: &metrics,
            log: &log,
            control_socket: Some(&socket),
            state_dir: &folder,
            drain: std::time::Duration::ZERO,
        };
        assert!(take(Role::Device, &settings).is_ok());
        settings.state_dir = &impossible;
        assert!(take(Role::Device, &settings).is_err());
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_state_folder_has_one_hub() {
        let folder = std::env::temp_dir().join(format!("culvert-lock-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let held = lock(&folder).unwrap();
        let refused = lock(&folder).unwrap_err().to_string();
        assert!(refused.contains(&format!("PID {} uses state_dir", std::process::id())), "{refused}");
        drop(held);
        assert!(lock(&folder).unwrap().is_some());
        fs::remove_dir_all(&folder).unwrap();
    }
}
