//! Keeps the last good configuration and offers each new one.
//!
//! Owns the loop of watch, load, compare. Does not know how a configuration is applied. Invariant: an invalid file
//! changes nothing but what is reported.

use std::path::PathBuf;

use tokio::task::JoinHandle;

use super::{
    Environment, Load, LoadError, Loaded, Problem,
    change::Changes,
    watch::{Poker, Trigger, Watcher},
};

/// Watches a configuration and loads it again when it changes.
pub struct Reloader<T> {
    path: PathBuf,
    environment: Environment,
    watcher: Watcher,
    /// What the files said last; none if that was not taken up.
    file: Option<T>,
    loading: Option<Loading<T>>,
}

type Loading<T> = (Trigger, JoinHandle<Result<Loaded<T>, LoadError>>);

/// What came of a change or of a request.
#[derive(Debug)]
pub struct Reload<T> {
    /// What caused it.
    pub trigger: Trigger,
    /// What came of it.
    pub outcome: Outcome<T>,
}

/// What came of loading the files again.
#[derive(Debug)]
pub enum Outcome<T> {
    /// A valid configuration that differs from the last valid one.
    Changed {
        /// The configuration.
        config: Box<T>,
        /// What deserves attention but is no mistake.
        warnings: Vec<Problem>,
    },
    /// The files are valid and say what they said before.
    Unchanged,
    /// The files are not valid; the last valid configuration stays.
    Invalid(LoadError),
}

impl<T: Load + Changes> Reloader<T> {
    /// Takes over where a first load ended. Must be called within a tokio runtime.
    pub fn start(path: PathBuf, environment: Environment, loaded: Loaded<T>) -> Self {
        Self { path, environment, watcher: Watcher::start(loaded.files), file: Some(loaded.config), loading: None }
    }

    /// The means to ask for a reload: for SIGHUP.
    pub fn poker(&self) -> Poker {
        self.watcher.poker()
    }

    /// The last configuration was not taken up, so that whatever is loaded next counts as a change.
    pub fn not_applied(&mut self) {
        self.file = None;
    }

    /// Waits for the next change or request and loads. Cancel safe.
    pub async fn next(&mut self) -> Reload<T> {
        let (trigger, loaded) = match &mut self.loading {
            Some((trigger, loading)) => (*trigger, loading.await),
            None => {
                let trigger = self.watcher.changed().await;
                let (path, environment) = (self.path.clone(), self.environment.clone());
                let loading = tokio::task::spawn_blocking(move || T::load(&path, &environment));
                let (_, loading) = self.loading.insert((trigger, loading));
                (trigger, loading.await)
            }
        };
        self.loading = None;
        match loaded {
            Ok(loaded) => Reload { trigger, outcome: self.judge(loaded) },
            Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // The runtime is being shut down; nobody is left to tell.
            Err(_) => std::future::pending().await,
        }
    }

    fn judge(&mut self, loaded: Result<Loaded<T>, LoadError>) -> Outcome<T> {
        match loaded {
            Ok(Loaded { config, warnings, files }) => {
                self.watcher.follow(files);
                if self.file.as_ref() == Some(&config) {
                    return Outcome::Unchanged;
                }
                self.file = Some(config.clone());
                Outcome::Changed { config: Box::new(config), warnings }
            }
            Err(error) => {
                self.watcher.follow(error.files.clone());
                Outcome::Invalid(error)
            }
        }
    }
}
