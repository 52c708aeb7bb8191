//! Where things are when the configuration does not say: systemd's folders, the system's, or the user's.
//!
//! Owns the default places of state, control sockets and credentials. Does not know what lies there.
//! Invariant: the process's environment is read in [`Environment::of_process`] and nowhere else.

use super::parts::LinkLimits;
use std::{
    env, fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

/// What the process's environment says about places. The default says nothing: the system's places.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment {
    /// `$CREDENTIALS_DIRECTORY` (systemd's `LoadCredential=`).
    pub credentials: Option<PathBuf>,
    /// `$STATE_DIRECTORY` (systemd's `StateDirectory=`).
    pub state: Option<PathBuf>,
    /// `$RUNTIME_DIRECTORY` (systemd's `RuntimeDirectory=`).
    pub runtime: Option<PathBuf>,
    /// The user's own places, for anyone but root.
    pub user: Option<UserPlaces>,
    /// The machine's memory or the process's limit, whichever is less, in bytes; none if it cannot be told.
    pub memory: Option<u64>,
}

/// The XDG places of a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UserPlaces {
    /// `$XDG_STATE_HOME` or `~/.local/state`.
    pub state: PathBuf,
    /// `$XDG_RUNTIME_DIR`, if there is a session.
    pub runtime: Option<PathBuf>,
}

/// The system's state folder.
const SYSTEM_STATE: &str = "/var/lib/culvert";
/// The system's folder of control sockets.
const SYSTEM_RUNTIME: &str = "/run/culvert";

impl Environment {
    /// What this process was started with.
    pub fn of_process() -> Self {
        let path = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let home_state = || path("HOME").map(|home| home.join(".local/state"));
        let user = (!is_root()).then(|| path("XDG_STATE_HOME").or_else(home_state)).flatten();
        Self {
            credentials: path("CREDENTIALS_DIRECTORY"),
            state: path("STATE_DIRECTORY").map(first_of_list),
            runtime: path("RUNTIME_DIRECTORY").map(first_of_list),
            user: user.map(|state| UserPlaces { state, runtime: path("XDG_RUNTIME_DIR") }),
            memory: machine_memory().into_iter().chain(memory_limit()).min(),
        }
    }

    /// The same without the user's own places.
    #[must_use]
    pub fn of_system(self) -> Self {
        Self { user: None, ..self }
    }

    /// The default state folder of a role. Roles never share one: an instance ID lies in it.
    pub fn state_dir(&self, role: &str) -> PathBuf {
        match (&self.state, &self.user) {
            (Some(own), _) if own.ends_with(role) => own.clone(),
            (Some(own), _) => own.join(role),
            (None, Some(user)) => user.state.join("culvert").join(role),
            (None, None) => Path::new(SYSTEM_STATE).join(role),
        }
    }

    /// The control socket that a role's daemon binds by default.
    pub fn control_socket(&self, role: &str) -> PathBuf {
        let user = || self.user.as_ref().and_then(|user| user.runtime.as_ref()).map(|runtime| runtime.join("culvert"));
        let folder = self.runtime.clone().or_else(user).unwrap_or_else(|| SYSTEM_RUNTIME.into());
        folder.join(format!("{role}.sock"))
    }

    /// Where a client looks for a role's daemon: the user's own first, then the system's.
    pub fn control_sockets(&self, role: &str) -> Vec<PathBuf> {
        let system = Path::new(SYSTEM_RUNTIME).join(format!("{role}.sock"));
        let mut sockets = vec![self.control_socket(role)];
        if sockets[0] != system {
            sockets.push(system);
        }
        sockets
    }

    /// The default memory of mux and link on this machine.
    pub(super) fn link_limits(&self) -> LinkLimits {
        LinkLimits::for_memory(self.memory)
    }

    /// The same for a service.
    pub(super) fn service_link_limits(&self) -> LinkLimits {
        LinkLimits::for_service(self.memory)
    }

    /// The credential that stands in for a file.
    pub(super) fn credential(&self, named: &Path) -> Option<PathBuf> {
        Some(self.credentials.as_ref()?.join(named.file_name()?))
    }
}

/// systemd separates several folders by colons; the first is the main one.
fn first_of_list(list: PathBuf) -> PathBuf {
    match list.to_str().and_then(|list| list.split_once(':')) {
        Some((first, _)) => first.into(),
        None => list,
    }
}

/// `MemTotal` of `/proc/meminfo`, which counts in KiB.
fn machine_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// `memory.max` of the process's own control group (version 2); none if it is `max`.
fn memory_limit() -> Option<u64> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    fs::read_to_string(Path::new("/sys/fs/cgroup").join(own).join("memory.max")).ok()?.trim().parse().ok()
}

/// The owner of `/proc/self` is the effective user.
fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|metadata| metadata.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_decides_then_the_user_then_the_system() {
        let mut environment = Environment::default();
        assert_eq!(environment.state_dir("hub"), Path::new("/var/lib/culvert/hub"));
        assert_eq!(environment.control_sockets("hub"), [Path::new("/run/culvert/hub.sock")]);
        environment.user =
            Some(UserPlaces { state: "/home/a/.local/state".into(), runtime: Some("/run/user/1".into()) });
        assert_eq!(environment.state_dir("hub"), Path::new("/home/a/.local/state/culvert/hub"));
        assert_eq!(
            environment.control_sockets("hub"),
            [Path::new("/run/user/1/culvert/hub.sock"), Path::new("/run/culvert/hub.sock")]
        );
        environment.state = Some("/var/lib/culvert/hub".into());
        environment.runtime = Some("/run/x".into());
        assert_eq!(environment.state_dir("hub"), Path::new("/var/lib/culvert/hub"));
        assert_eq!(environment.state_dir("device"), Path::new("/var/lib/culvert/hub/device"));
        assert_eq!(environment.control_socket("hub"), Path::new("/run/x/hub.sock"));
    }

    #[test]
    fn the_first_of_several_folders_is_taken() {
        assert_eq!(first_of_list("/a:/b".into()), Path::new("/a"));
        assert_eq!(first_of_list("/a".into()), Path::new("/a"));
    }
}
