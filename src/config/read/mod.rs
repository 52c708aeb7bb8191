//! From the tables of the files to the configurations.
//!
//! Owns the spelling of every key and the checks that need more than one value. Does not know how tables are
//! parsed. Invariant: a missing key leaves the default of the type's `new` or `Default`; no number stands here.

mod device;
mod hub;
mod parts;
mod service;

use std::path::{Path, PathBuf};

use super::{
    problem::Problem,
    section::{Document, Location, Section},
};

pub(super) use self::{device::device, hub::hub, service::service};

/// Names that begin like this are culvert's own: `culvert-mux-1` is a stream name.
const RESERVED: &str = "culvert-";

/// Reports every name that stands twice, at its second place.
fn refuse_duplicates<'a, K: PartialEq + std::fmt::Display + 'a>(
    sources: &super::files::Sources,
    key: &str,
    items: impl Iterator<Item = (K, &'a Location)>,
) {
    let mut seen: Vec<(K, &Location)> = Vec::new();
    for (item, location) in items {
        match seen.iter().find(|(other, _)| *other == item) {
            Some((_, first)) => sources.problem(Problem {
                file: location.file.clone(),
                line: location.line,
                key: key.into(),
                reason: format!("{item:?} is taken already, at {first}", item = item.to_string()),
            }),
            None => seen.push((item, location)),
        }
    }
}

/// Reads the rules of the main file and of its `.d` folder.
fn rules<T>(
    root: &Section<'_>,
    key: &'static str,
    folder: &str,
    read: impl Fn(Section<'_>) -> Option<(T, Location)>,
) -> Vec<(T, Location)> {
    let mut rules: Vec<(T, Location)> = root.sections(key).into_iter().filter_map(&read).collect();
    let folder = root.document.path.parent().unwrap_or(Path::new("")).join(folder);
    for path in root.sources.folder(&folder) {
        let Some(text) = root.sources.config_text(&path) else { continue };
        if text.trim().is_empty() {
            root.sources.problem(half_written(path));
            continue;
        }
        let document = Document::parse(path, &text, root.sources);
        if document.broken {
            continue;
        }
        let more = document.root(root.sources);
        rules.extend(more.sections(key).into_iter().filter_map(&read));
        more.finish();
    }
    rules
}

/// Between an editor's truncation and its write a file is empty. Taken at its word it would end every rule it held.
fn half_written(file: PathBuf) -> Problem {
    let reason = "is empty; remove the file if its rules are to go".into();
    Problem { file, line: 0, key: String::new(), reason }
}
