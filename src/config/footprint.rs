//! What the files behind a configuration looked like when they were read.
//!
//! Owns the comparison of then and now. Does not know what is in the files. Invariant: a footprint holds hashes, no
//! contents, so that keeping one keeps no secret.

use std::{
    collections::BTreeMap,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::{Path, PathBuf},
};

use super::files::{MAX_NAMED_FILE, read_bounded};

/// Every file and folder that a configuration came from or could have come from, and how each of them looked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Footprint(BTreeMap<PathBuf, Print>);

/// How a file or a folder of rules looked: the hash of its contents or of the names in it, or why there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Print {
    /// A file.
    File(Result<u64, io::ErrorKind>),
    /// A folder.
    Folder(Result<u64, io::ErrorKind>),
}

impl Footprint {
    /// The files and folders.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.0.keys().map(PathBuf::as_path)
    }

    /// True if that file or folder is among them.
    pub fn contains(&self, path: &Path) -> bool {
        self.0.contains_key(path)
    }

    /// The same files and folders as they look now. Blocks on the file system.
    pub(super) fn look_again(&self) -> Self {
        let look = |(path, print): (&PathBuf, &Print)| match print {
            Print::File(_) => (path.clone(), Print::of_file(&read_bounded(path, MAX_NAMED_FILE))),
            Print::Folder(_) => (path.clone(), Print::of_folder(&rule_files(path))),
        };
        Self(self.0.iter().map(look).collect())
    }

    /// The folders among them.
    pub(super) fn folders(&self) -> impl Iterator<Item = &Path> {
        self.0.iter().filter(|(_, print)| matches!(print, Print::Folder(_))).map(|(path, _)| path.as_path())
    }

    pub(super) fn insert(&mut self, path: &Path, print: Print) {
        self.0.insert(path.into(), print);
    }
}

impl Print {
    pub(super) fn of_file(read: &io::Result<Vec<u8>>) -> Self {
        Self::File(read.as_ref().map(hash).map_err(io::Error::kind))
    }

    pub(super) fn of_folder(listed: &io::Result<Vec<PathBuf>>) -> Self {
        Self::Folder(listed.as_ref().map(hash).map_err(io::Error::kind))
    }
}

fn hash<T: Hash>(value: T) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// The `*.toml` files of a folder, by name; hidden files and editors' leavings do not count.
pub(super) fn rule_files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries: io::Result<Vec<fs::DirEntry>> = fs::read_dir(folder)?.collect();
    let mut files: Vec<PathBuf> = entries?.iter().map(fs::DirEntry::path).filter(|path| counts(path)).collect();
    files.sort();
    Ok(files)
}

/// True for the name of a file of rules.
pub(super) fn counts(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    name.ends_with(b".toml") && !name.starts_with(b".")
}
