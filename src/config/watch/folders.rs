//! The kernel's eyes on the folders of a [`Trail`], and the inbox that their events fall into.
//!
//! Owns the inotify instance. Does not know when an event is acted upon. Invariant: an event that no path of the
//! trail caused is dropped here, on the thread that received it, so that a busy folder wakes nobody.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use notify::{
    Event, EventKind, RecommendedWatcher, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode, ModifyKind},
};

use super::trace::Trail;
use crate::config::Footprint;

/// What happened since the driver last looked.
#[derive(Default)]
pub(super) struct Inbox {
    state: Mutex<State>,
    arrived: tokio::sync::Notify,
}

#[derive(Default)]
struct State {
    trail: Trail,
    stirred: bool,
    poked: bool,
    /// Files that someone changed and has not closed yet.
    writing: BTreeSet<PathBuf>,
}

/// What the driver takes out of the inbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// Someone asked for a look.
    Poked,
    /// Something happened to a path of the trail.
    Stirred,
}

impl Inbox {
    /// Waits for news. Cancel safe: what is not returned stays.
    pub(super) async fn news(&self) -> News {
        loop {
            if let Some(news) = self.take() {
                return news;
            }
            self.arrived.notified().await;
        }
    }

    pub(super) fn poke(&self) {
        self.lock().poked = true;
        self.arrived.notify_one();
    }

    /// True while a file of the trail is open with changes.
    pub(super) fn is_being_written(&self) -> bool {
        !self.lock().writing.is_empty()
    }

    /// Stops waiting for writers that never close.
    pub(super) fn forget_writers(&self) {
        self.lock().writing.clear();
    }

    fn take(&self) -> Option<News> {
        let mut state = self.lock();
        if std::mem::take(&mut state.poked) {
            return Some(News::Poked);
        }
        std::mem::take(&mut state.stirred).then_some(News::Stirred)
    }

    fn receive(&self, event: notify::Result<Event>) {
        let mut state = self.lock();
        let relevant = match event {
            Ok(event) => event.need_rescan() || state.note(&event),
            Err(_) => true,
        };
        if relevant {
            state.stirred = true;
            drop(state);
            self.arrived.notify_one();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Follows writers; true if the event may have changed something.
    fn note(&mut self, event: &Event) -> bool {
        let closed = event.kind == EventKind::Access(AccessKind::Close(AccessMode::Write));
        if matches!(event.kind, EventKind::Access(_)) && !closed {
            return false;
        }
        let mut relevant = false;
        for path in event.paths.iter().filter(|path| self.trail.covers(path)) {
            relevant = true;
            match event.kind {
                EventKind::Modify(ModifyKind::Data(_)) => self.writing.insert(path.clone()),
                EventKind::Modify(ModifyKind::Metadata(_)) => false,
                _ => self.writing.remove(path),
            };
        }
        relevant
    }
}

/// The watched folders. Used on a blocking thread.
pub(super) struct Folders {
    inbox: Arc<Inbox>,
    /// None where the kernel has no watch left for us: the poll alone has to do.
    watcher: Option<RecommendedWatcher>,
    /// Each folder with its device and inode: a folder that was removed and made again is another one.
    watched: BTreeMap<PathBuf, (u64, u64)>,
    complained: bool,
}

impl Folders {
    pub(super) fn new(inbox: Arc<Inbox>) -> Self {
        let receiver = inbox.clone();
        let watcher = notify::recommended_watcher(move |event| receiver.receive(event));
        let mut folders = Self { inbox, watcher: None, watched: BTreeMap::new(), complained: false };
        match watcher {
            Ok(watcher) => folders.watcher = Some(watcher),
            Err(error) => folders.complain(&error),
        }
        folders
    }

    /// Watches what a footprint needs, then looks at it: a change in between causes an event.
    pub(super) fn look(&mut self, footprint: &Footprint) -> Footprint {
        let mut trail = Trail::default();
        let folders: Vec<&Path> = footprint.folders().collect();
        footprint.paths().filter(|path| !folders.contains(path)).for_each(|path| trail.add_file(path));
        folders.iter().for_each(|folder| trail.add_folder(folder));
        let wanted: BTreeMap<PathBuf, (u64, u64)> =
            trail.folders().filter_map(|folder| Some((folder.clone(), identity(folder)?))).collect();
        self.inbox.lock().trail = trail;
        self.replace(wanted);
        footprint.look_again()
    }

    fn replace(&mut self, wanted: BTreeMap<PathBuf, (u64, u64)>) {
        let Some(watcher) = &mut self.watcher else { return };
        // A folder that is gone took its watch with it, hence the ignored errors.
        for (folder, _) in self.watched.iter().filter(|(folder, id)| wanted.get(*folder) != Some(*id)) {
            let _ = watcher.unwatch(folder);
        }
        let mut failure = None;
        let mut watched = BTreeMap::new();
        for (folder, id) in wanted {
            let known = self.watched.get(&folder) == Some(&id);
            match if known { Ok(()) } else { watcher.watch(&folder, RecursiveMode::NonRecursive) } {
                Ok(()) => {
                    watched.insert(folder, id);
                }
                Err(error) => failure = Some(error),
            }
        }
        self.watched = watched;
        if let Some(error) = failure {
            self.complain(&error);
        }
    }

    fn complain(&mut self, error: &notify::Error) {
        if !std::mem::replace(&mut self.complained, true) {
            tracing::warn!(
                %error,
                "changes of the configuration are noticed late: the system has no file watch left \
                 (sysctl fs.inotify.max_user_instances, fs.inotify.max_user_watches)"
            );
        }
    }
}

fn identity(folder: &Path) -> Option<(u64, u64)> {
    fs::metadata(folder).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

#[cfg(test)]
impl Folders {
    /// As on a machine with no watch left.
    pub(super) fn without_events(inbox: Arc<Inbox>) -> Self {
        Self { inbox, watcher: None, watched: BTreeMap::new(), complained: true }
    }
}

#[cfg(test)]
mod tests {
    use notify::event::{CreateKind, DataChange, MetadataKind};

    use super::*;

    #[test]
    fn only_what_may_change_a_traced_file_stirs_and_only_data_makes_a_writer() {
        let scratch = crate::config::scratch::Scratch::new();
        let file = fs::canonicalize(scratch.write("a.toml", "")).unwrap();
        let mut state = State::default();
        state.trail.add_file(&file);
        let mut note = |kind, path: &Path| {
            let relevant = state.note(&Event::new(kind).add_path(path.into()));
            (relevant, state.writing.len())
        };
        let data = EventKind::Modify(ModifyKind::Data(DataChange::Any));
        assert_eq!(note(data, &file.with_file_name("other")), (false, 0));
        assert_eq!(note(EventKind::Access(AccessKind::Open(AccessMode::Any)), &file), (false, 0));
        assert_eq!(note(EventKind::Create(CreateKind::File), &file), (true, 0));
        assert_eq!(note(data, &file), (true, 1));
        assert_eq!(note(EventKind::Modify(ModifyKind::Metadata(MetadataKind::Any)), &file), (true, 1));
        assert_eq!(note(EventKind::Access(AccessKind::Close(AccessMode::Write)), &file), (true, 0));
    }
}
