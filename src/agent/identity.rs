//! Which installation this is, and which run of it.
//!
//! Owns the file that holds the instance ID. Does not know the hello that carries it. Invariant: the instance ID
//! stays the same for as long as the state folder does.

use std::{
    fs, io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use super::random_bytes;
use crate::transport::hello::{BootId, InstanceId};

const FILE: &str = "instance-id";

/// Why the instance ID cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum InstanceError {
    /// The file cannot be read or written.
    #[error("cannot keep the instance ID in {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file holds something else.
    #[error("{path} does not hold an instance ID (32 hexadecimal digits); remove it to get a new one")]
    Content {
        /// The file.
        path: PathBuf,
    },
}

/// The installation's ID, made at the first start.
pub fn load_instance(state_dir: &Path) -> Result<InstanceId, InstanceError> {
    let path = state_dir.join(FILE);
    let io_error = |source| InstanceError::Io { path: path.clone(), source };
    let new_id = || {
        let id = random_bytes::<16>();
        fs::create_dir_all(state_dir).map_err(io_error)?;
        write_new(&path, &hex(&id)).map_err(io_error)?;
        Ok(InstanceId(id))
    };
    match fs::read_to_string(&path) {
        // A machine that lost its power may leave that, and nothing is lost with it but links that are gone already.
        Ok(text) if text.trim_matches('\0').trim().is_empty() => {
            tracing::warn!(path = %path.display(), "the instance ID's file is empty, as after a crash; a new ID is made");
            new_id()
        }
        Ok(text) => parse_hex(text.trim()).map(InstanceId).ok_or_else(|| InstanceError::Content { path: path.clone() }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => new_id(),
        Err(error) => Err(io_error(error)),
    }
}

/// The ID of this run.
pub fn new_boot() -> BootId {
    BootId(random_bytes())
}

/// Written beside and renamed, so that a crash leaves no half of an ID.
fn write_new(path: &Path, text: &str) -> io::Result<()> {
    let draft = path.with_extension("new");
    let written = write_draft(&draft, text).and_then(|()| fs::rename(&draft, path));
    if written.is_err() {
        // A full disk gets nothing better from half a draft.
        let _ = fs::remove_file(&draft);
    }
    written
}

fn write_draft(draft: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(draft)?;
    io::Write::write_all(&mut file, format!("{text}\n").as_bytes())?;
    file.sync_all()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn parse_hex(text: &str) -> Option<[u8; 16]> {
    let mut bytes = [0; 16];
    if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_id_is_made_once_and_kept() {
        let folder = std::env::temp_dir().join(format!("culvert-instance-{}", super::super::random_u64()));
        let first = load_instance(&folder).unwrap();
        assert_eq!(load_instance(&folder).unwrap(), first);
        fs::write(folder.join(FILE), "not an ID").unwrap();
        assert!(matches!(load_instance(&folder), Err(InstanceError::Content { .. })));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn an_empty_file_is_replaced_and_a_failure_leaves_no_draft() {
        let folder = std::env::temp_dir().join(format!("culvert-instance-{}", super::super::random_u64()));
        fs::create_dir_all(&folder).unwrap();
        for empty in ["", "\n", "\0\0\0\0"] {
            fs::write(folder.join(FILE), empty).unwrap();
            let made = load_instance(&folder).unwrap();
            assert_eq!(load_instance(&folder).unwrap(), made);
        }
        // A folder has the name, so that the draft cannot be renamed.
        fs::remove_file(folder.join(FILE)).unwrap();
        fs::create_dir(folder.join(FILE)).unwrap();
        assert!(write_new(&folder.join(FILE), "x").is_err());
        assert!(!folder.join("instance-id.new").exists());
        fs::remove_dir_all(folder).unwrap();
    }
}
