//! Where configuration is looked for when the command line does not say.
//!
//! Owns the default configuration files. Does not know what they hold.
//! Invariant: a user's own file goes before the system's, and root has only the system's.

use std::{
    env,
    path::{Path, PathBuf},
};

use super::args::Role;
use crate::config::Environment;

/// The system's configuration folder.
const SYSTEM: &str = "/etc/culvert";

/// The role's configuration file.
pub(super) fn config_file(given: Option<&Path>, role: Role) -> PathBuf {
    given.map_or_else(|| find(&format!("{}.toml", role.name())), Path::to_path_buf)
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
