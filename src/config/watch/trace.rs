//! Which folders to watch so that a change of a path is noticed.
//!
//! Owns the walk along symbolic links and missing folders. Does not know events. Invariant: every folder it names
//! existed when it looked.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
    path::{Component, Path, PathBuf},
};

use crate::config::footprint::counts;

/// Most symbolic links along one path: the kernel's own limit (path_resolution(7)).
const MAX_LINKS: usize = 40;

/// Folders, and what in each of them matters.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Trail(BTreeMap<PathBuf, Interest>);

#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Interest {
    names: BTreeSet<OsString>,
    rules: bool,
}

impl Trail {
    /// The folders.
    pub(super) fn folders(&self) -> impl Iterator<Item = &PathBuf> {
        self.0.keys()
    }

    /// True if something that happened to this path may have changed what was traced.
    pub(super) fn covers(&self, path: &Path) -> bool {
        let within = |folder: &Path| self.0.get(folder).is_some_and(|interest| interest.covers(path));
        self.0.contains_key(path) || path.parent().is_some_and(within)
    }

    /// Adds a file: the folder of every link on the way and of the file itself. Where something is missing, the
    /// last folder that is there.
    pub(super) fn add_file(&mut self, path: &Path) {
        let Ok(mut path) = std::path::absolute(path) else { return };
        for _ in 0..MAX_LINKS {
            match self.walk(&path) {
                Some(target) => path = target,
                None => return,
            }
        }
    }

    /// Adds a folder of rules: everything on the way to it, and the rules in it.
    pub(super) fn add_folder(&mut self, path: &Path) {
        self.add_file(path);
        if let Ok(folder) = fs::canonicalize(path)
            && folder.is_dir()
        {
            self.0.entry(folder).or_default().rules = true;
        }
    }

    /// Walks until a symbolic link and returns the path with the link resolved, or to the end.
    fn walk(&mut self, path: &Path) -> Option<PathBuf> {
        let mut walked = PathBuf::new();
        let mut components = path.components();
        while let Some(component) = components.next() {
            let Component::Normal(name) = component else {
                if component == Component::ParentDir {
                    walked.pop();
                } else {
                    walked.push(component)
                }
                continue;
            };
            let step = walked.join(name);
            let last = components.as_path().as_os_str().is_empty();
            match fs::symlink_metadata(&step) {
                Ok(metadata) if metadata.is_symlink() => {
                    self.note(&walked, name);
                    let target = fs::read_link(&step).ok()?;
                    return Some(walked.join(target).join(components.as_path()));
                }
                Ok(_) if !last => walked = step,
                Ok(_) | Err(_) => {
                    self.note(&walked, name);
                    return None;
                }
            }
        }
        None
    }

    fn note(&mut self, folder: &Path, name: &std::ffi::OsStr) {
        self.0.entry(folder.into()).or_default().names.insert(name.into());
    }
}

impl Interest {
    fn covers(&self, path: &Path) -> bool {
        path.file_name().is_some_and(|name| self.names.contains(name)) || (self.rules && counts(path))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::config::scratch::Scratch;

    fn trail(scratch: &Scratch, file: &str) -> Vec<String> {
        let mut trail = Trail::default();
        trail.add_file(&scratch.path(file));
        let root = fs::canonicalize(scratch.path("")).unwrap();
        let shown = |(folder, interest): (&PathBuf, &Interest)| {
            let folder = folder.strip_prefix(&root).unwrap().display().to_string();
            interest.names.iter().map(|name| format!("{folder}:{}", name.display())).collect::<Vec<_>>()
        };
        trail.0.iter().flat_map(shown).collect()
    }

    #[test]
    fn a_file_is_watched_from_its_folder() {
        let scratch = Scratch::new();
        scratch.write("etc/a.toml", "");
        assert_eq!(trail(&scratch, "etc/a.toml"), ["etc:a.toml"]);
        assert_eq!(trail(&scratch, "etc/../etc/./a.toml"), ["etc:a.toml"]);
    }

    #[test]
    fn every_link_on_the_way_is_watched_from_its_folder() {
        let scratch = Scratch::new();
        scratch.write("etc/..2024/a.toml", "");
        symlink("..2024", scratch.path("etc/..data")).unwrap();
        symlink("..data/a.toml", scratch.path("etc/a.toml")).unwrap();
        assert_eq!(trail(&scratch, "etc/a.toml"), ["etc:..data", "etc:a.toml", "etc/..2024:a.toml"]);
    }

    #[test]
    fn what_is_missing_is_awaited_in_the_last_folder_there_is() {
        let scratch = Scratch::new();
        fs::create_dir(scratch.path("etc")).unwrap();
        assert_eq!(trail(&scratch, "etc/culvert/a.toml"), ["etc:culvert"]);
        symlink("nowhere/x", scratch.path("etc/culvert")).unwrap();
        assert_eq!(trail(&scratch, "etc/culvert/a.toml"), ["etc:culvert", "etc:nowhere"]);
    }

    #[test]
    fn a_circle_of_links_ends() {
        let scratch = Scratch::new();
        symlink("b", scratch.path("a")).unwrap();
        symlink("a", scratch.path("b")).unwrap();
        assert_eq!(trail(&scratch, "a"), [":a", ":b"]);
    }

    #[test]
    fn in_a_folder_of_rules_only_rules_matter() {
        let scratch = Scratch::new();
        fs::create_dir(scratch.path("forwards.d")).unwrap();
        let folder = fs::canonicalize(scratch.path("forwards.d")).unwrap();
        let mut trail = Trail::default();
        trail.add_folder(&folder);
        assert!(trail.covers(&folder.join("new.toml")));
        assert!(trail.covers(&folder));
        assert!(!trail.covers(&folder.join(".new.toml.swp")) && !trail.covers(&folder.join("4913")));
        assert!(!trail.covers(&folder.join("deeper/new.toml")));
    }
}
