//! Notices that the files behind a configuration changed.
//!
//! Owns the waiting: for events, for quiet after them, for writers to finish, and the poll that finds what no event
//! told. Does not know what the files mean. Invariant: [`Watcher::changed`] speaks only when a file looks different
//! from the footprint that was handed in, or when it was asked to.
//!
//! Files are watched from their folders, because editors and package managers replace them; symbolic links are
//! followed link by link, because Kubernetes swaps a link two levels away; what counts in the end is the contents,
//! because an event proves little.

mod folders;
mod trace;

use std::{sync::Arc, time::Duration};

use tokio::{
    task::JoinHandle,
    time::{Instant, sleep_until},
};

use self::folders::{Folders, Inbox, News};
use super::Footprint;

/// Quiet after the last event before the files are looked at: editors and `rsync` make several changes at a time.
const QUIET: Duration = Duration::from_millis(300);
/// Longest wait for quiet: a folder in which something is always going on must not hide a change.
const MAX_UNREST: Duration = Duration::from_secs(2);
/// Longest wait for a writer to close its file: a half-written file may be valid and mean something else.
const MAX_WRITING: Duration = Duration::from_secs(5);
/// Time between looks without any event: for network file systems, and where the kernel has no watch left.
const POLL: Duration = Duration::from_secs(30);

/// Why [`Watcher::changed`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trigger {
    /// A file looks different.
    Files,
    /// [`Poker::poke`] was called: SIGHUP.
    Poke,
}

/// Watches the files of a [`Footprint`].
pub struct Watcher {
    inbox: Arc<Inbox>,
    seen: Footprint,
    unrest: Option<Unrest>,
    poll: Instant,
    look: Option<JoinHandle<(Folders, Footprint)>>,
    folders: Option<Folders>,
    /// The look under way began before the footprint that now counts.
    outdated: bool,
}

/// A burst of events.
#[derive(Clone, Copy)]
struct Unrest {
    first: Instant,
    last: Instant,
}

/// Makes a [`Watcher`] speak at once, from anywhere.
#[derive(Clone)]
pub struct Poker(Arc<Inbox>);

impl Poker {
    /// Asks for a reload whether or not a file changed.
    pub fn poke(&self) {
        self.0.poke();
    }
}

enum Action {
    Poked,
    Stirred,
    Due,
    Looked(Option<(Folders, Footprint)>),
}

impl Watcher {
    /// Watches everything in a footprint. Must be called within a tokio runtime.
    pub fn start(footprint: Footprint) -> Self {
        let inbox = Arc::<Inbox>::default();
        let folders = Some(Folders::new(inbox.clone()));
        let now = Instant::now();
        let unrest = Some(Unrest { first: now, last: now });
        Self { inbox, seen: footprint, unrest, poll: now + POLL, look: None, folders, outdated: false }
    }

    /// From now on compares with this footprint: what the latest attempt to load saw. What changed since that
    /// attempt is found too.
    pub fn follow(&mut self, footprint: Footprint) {
        self.seen = footprint;
        self.outdated = self.look.is_some();
        let now = Instant::now();
        self.unrest.get_or_insert(Unrest { first: now, last: now });
    }

    /// The means to make it speak.
    pub fn poker(&self) -> Poker {
        Poker(self.inbox.clone())
    }

    /// Waits until a file looks different or someone pokes. Cancel safe.
    pub async fn changed(&mut self) -> Trigger {
        loop {
            let action = self.next().await;
            if let Some(trigger) = self.apply(action) {
                return trigger;
            }
        }
    }

    async fn next(&mut self) -> Action {
        let due = self.due();
        tokio::select! {
            biased;
            news = self.inbox.news() => match news {
                News::Poked => Action::Poked,
                News::Stirred => Action::Stirred,
            },
            action = look_or_wait(self.look.as_mut(), due) => action,
        }
    }

    fn apply(&mut self, action: Action) -> Option<Trigger> {
        match action {
            Action::Poked => return Some(Trigger::Poke),
            Action::Stirred => {
                let now = Instant::now();
                self.unrest.get_or_insert(Unrest { first: now, last: now }).last = now;
            }
            Action::Due => self.start_looking(),
            Action::Looked(looked) => return self.judge(looked),
        }
        None
    }

    fn due(&self) -> Instant {
        match self.unrest {
            Some(Unrest { first, .. }) if self.inbox.is_being_written() => first + MAX_WRITING,
            Some(Unrest { first, last }) => (last + QUIET).min(first + MAX_UNREST),
            None => self.poll,
        }
    }

    fn start_looking(&mut self) {
        self.unrest = None;
        self.outdated = false;
        self.poll = Instant::now() + POLL;
        self.inbox.forget_writers();
        let mut folders = self.folders.take().unwrap_or_else(|| Folders::new(self.inbox.clone()));
        let seen = self.seen.clone();
        self.look = Some(tokio::task::spawn_blocking(move || {
            let found = folders.look(&seen);
            (folders, found)
        }));
    }

    /// A look that panicked comes as none: the next one begins with new watches.
    fn judge(&mut self, looked: Option<(Folders, Footprint)>) -> Option<Trigger> {
        self.look = None;
        let (folders, found) = looked?;
        self.folders = Some(folders);
        if self.outdated || found == self.seen {
            return None;
        }
        self.seen = found;
        Some(Trigger::Files)
    }
}

async fn look_or_wait(look: Option<&mut JoinHandle<(Folders, Footprint)>>, due: Instant) -> Action {
    match look {
        Some(look) => Action::Looked(look.await.ok()),
        None => {
            sleep_until(due).await;
            Action::Due
        }
    }
}

#[cfg(test)]
mod tests;
