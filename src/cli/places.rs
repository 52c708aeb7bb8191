//! Where configuration is looked for when the command line does not say.
//!
//! Owns the default configuration files. Does not know what they hold.
//! Invariant: a user's own file goes before the system's, and root has only the system's.

use std::{
    env,
    path::{self, Path, PathBuf},
};

use super::args::Role;
use crate::config::Environment;

/// The system's configuration folder.
const SYSTEM: &str = "/etc/culvert";

/// The role's configuration file.
pub(super) fn config_file(given: Option<&Path>, role: Role) -> PathBuf {
    given.map_or_else(|| find(&format!("{}.toml", role.name())), Path::to_path_buf)
}

/// What stands in for what the file leaves open: the system's own files are those of the system's daemons, whoever
/// reads them.
pub(super) fn environment(file: &Path) -> Environment {
    environment_of(file, Environment::of_process())
}

fn environment_of(file: &Path, process: Environment) -> Environment {
    let is_systems = path::absolute(file).is_ok_and(|file| file.starts_with(SYSTEM));
    if is_systems { process.of_system() } else { process }
}

/// A file of that name in the user's or the system's configuration folder.
pub(super) fn find(name: &str) -> PathBuf {
    user_folder()
        .map(|folder| folder.join(name))
        .filter(|file| file.exists())
        .unwrap_or_else(|| Path::new(SYSTEM).join(name))
}

/// `$XDG_CONFIG_HOME/culvert`, or `~/.config/culvert`; none for root.
fn user_folder() -> Option<PathBuf> {
    Environment::of_process().user?;
    let path = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = path("XDG_CONFIG_HOME").or_else(|| path("HOME").map(|home| home.join(".config")))?;
    Some(base.join("culvert"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::UserPlaces;

    #[test]
    fn a_file_of_the_systems_has_the_systems_places() {
        let user = UserPlaces { state: "/home/a/.local/state".into(), runtime: Some("/run/user/1".into()) };
        let process = Environment { user: Some(user), ..Environment::default() };
        let socket = |file: &str| environment_of(Path::new(file), process.clone()).control_socket("hub");
        assert_eq!(socket("/etc/culvert/hub.toml"), Path::new("/run/culvert/hub.sock"));
        assert_eq!(socket("/home/a/hub.toml"), Path::new("/run/user/1/culvert/hub.sock"));
    }
}
