//! The files behind a configuration: bounded, resolved, remembered.
//!
//! Owns where a named file is looked for, how large it may be, who may read it, and the list of problems found on
//! the way. Does not know what the files mean. Invariant: no message holds a byte of a file's contents.

use std::{
    cell::RefCell,
    fs, io,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

use super::{
    environment::Environment,
    footprint::{Footprint, Print, rule_files},
    parts::{FileContents, SecretFile},
    problem::Problem,
    section::Section,
};
use crate::{auth::key::decode_key, base::Secret};

/// Largest configuration file in bytes: 10,000 forwards of 100 bytes each.
const MAX_CONFIG_FILE: u64 = 1 << 20;
/// Largest secret, certificate or CA file in bytes: a bundle of all public roots has 250 KiB.
pub(super) const MAX_NAMED_FILE: u64 = 1 << 20;

/// Everything that was read so far and everything that was wrong with it.
#[derive(Default)]
pub(super) struct Sources {
    environment: Environment,
    problems: RefCell<Vec<Problem>>,
    warnings: RefCell<Vec<Problem>>,
    footprint: RefCell<Footprint>,
}

impl Sources {
    pub(super) fn new(environment: &Environment) -> Self {
        Self { environment: environment.clone(), ..Self::default() }
    }

    pub(super) fn environment(&self) -> &Environment {
        &self.environment
    }

    pub(super) fn problem(&self, problem: Problem) {
        self.problems.borrow_mut().push(problem);
    }

    pub(super) fn warn(&self, warning: Problem) {
        self.warnings.borrow_mut().push(warning);
    }

    /// Reads a file and remembers how it looked.
    fn read(&self, path: &Path, max: u64) -> io::Result<Vec<u8>> {
        let read = read_bounded(path, max);
        self.footprint.borrow_mut().insert(path, Print::of_file(&read));
        read
    }

    /// Problems, warnings and files.
    pub(super) fn into_parts(self) -> (Vec<Problem>, Vec<Problem>, Footprint) {
        (self.problems.into_inner(), self.warnings.into_inner(), self.footprint.into_inner())
    }

    /// Reads a configuration file; what keeps it from being read is reported.
    pub(super) fn config_text(&self, path: &Path) -> Option<String> {
        let text = self
            .read(path, MAX_CONFIG_FILE)
            .and_then(|bytes| String::from_utf8(bytes).map_err(|_| io::Error::other("is not UTF-8 text")));
        text.map_err(|error| {
            let reason = format!("cannot be read: {error}");
            self.problem(Problem { file: path.into(), line: 0, key: String::new(), reason });
        })
        .ok()
    }

    /// The files of rules in a folder, which need not be there.
    pub(super) fn folder(&self, folder: &Path) -> Vec<PathBuf> {
        let listed = rule_files(folder);
        self.footprint.borrow_mut().insert(folder, Print::of_folder(&listed));
        match listed {
            Ok(files) => files,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => {
                let reason = format!("cannot be read: {error}");
                self.problem(Problem { file: folder.into(), line: 0, key: String::new(), reason });
                Vec::new()
            }
        }
    }
}

/// Reads a regular file up to a size. A pipe or a device would block or never end.
pub(super) fn read_bounded(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    let metadata = fs::metadata(path)?;
    if !metadata.is_file() {
        return Err(io::Error::other("is not a regular file"));
    }
    if metadata.len() > max {
        return Err(io::Error::other(format!("is larger than {max} bytes")));
    }
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(fs::File::open(path)?, max), &mut bytes)?;
    Ok(bytes)
}

impl Section<'_> {
    /// The file that a key names.
    pub(super) fn file(&self, key: &'static str) -> Option<FileContents> {
        let named: String = self.optional(key)?;
        let (path, contents) = self.read_named(key, &named)?;
        Some(FileContents { path, contents })
    }

    /// The secret in the file that a key names, without the white space around it.
    pub(super) fn secret(&self, key: &'static str) -> Option<SecretFile> {
        let named: String = self.optional(key)?;
        let (path, contents) = self.read_named(key, &named)?;
        let secret = Secret::new(contents.trim_ascii());
        drop(zeroize::Zeroizing::new(contents));
        if secret.is_empty() {
            self.problem(key, format!("{} is empty", path.display()));
            return None;
        }
        self.warn_if_open(key, &path);
        Some(SecretFile { path, secret })
    }

    /// A file that must be named.
    pub(super) fn required_secret(&self, key: &'static str) -> Option<SecretFile> {
        if !self.has(key) {
            self.problem(key, "is missing");
        }
        self.secret(key)
    }

    /// Looks beside the configuration file first, then among systemd's credentials.
    fn read_named(&self, key: &'static str, named: &str) -> Option<(PathBuf, Vec<u8>)> {
        if named.contains("SharedAccess") {
            self.problem(key, "holds a connection string; put it into a file and name the file here");
            return None;
        }
        let beside = self.document.path.parent().unwrap_or(Path::new("")).join(named);
        let error = match self.sources.read(&beside, MAX_NAMED_FILE) {
            Ok(contents) => return Some((beside, contents)),
            Err(error) => error,
        };
        if let Some(credential) = self.sources.environment().credential(Path::new(named))
            && let Ok(contents) = self.sources.read(&credential, MAX_NAMED_FILE)
        {
            return Some((credential, contents));
        }
        let shown = if decode_key(named).is_ok() {
            "the named file (if this is the key itself, put it into a file and name the file)".into()
        } else {
            beside.display().to_string()
        };
        self.problem(key, format!("cannot read {shown}: {error}"));
        None
    }

    fn warn_if_open(&self, key: &'static str, path: &Path) {
        let mode = fs::metadata(path).map_or(0, |metadata| metadata.permissions().mode());
        if mode & 0o004 != 0 {
            self.warn(key, format!("{} is readable by everyone; chmod o= it", path.display()));
        }
    }
}
