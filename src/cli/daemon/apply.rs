//! A reload's outcome, applied and told.
//!
//! Owns the configuration in force. Does not know how the files were read or how a role takes it.
//! Invariant: what is in force was valid as a whole; a refused file changes one log line and one metric.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use super::{Daemon, Running, Settings};
use crate::{
    config::{Change, ChangeClass, Changes, LoadError, Outcome as Loading, Problem, Reload},
    telemetry::{DaemonMetrics, LogHandle},
};

/// The configuration that a daemon runs with, for whoever compares with it.
pub(super) type InForce<C> = Arc<Mutex<C>>;

/// The files are valid, but the role could not take them up: the next load is a change again.
pub(super) struct RoleRefused;

/// Applies what the reloader found.
pub(super) struct Applier<C> {
    pub(super) in_force: InForce<C>,
    pub(super) role: Arc<dyn Running<C>>,
    metrics: DaemonMetrics,
    log: LogHandle,
    settings: fn(&C) -> Settings<'_>,
}

impl<C: Changes + Clone> Applier<C> {
    /// Starts from a configuration that was just accepted.
    pub(super) fn new<D: Daemon<Config = C>>(
        config: C,
        role: Arc<dyn Running<C>>,
        metrics: DaemonMetrics,
        log: LogHandle,
    ) -> Self {
        metrics.reload_succeeded();
        Self { in_force: Arc::new(Mutex::new(config)), role, metrics, log, settings: D::settings }
    }

    /// Takes a new configuration up, or tells why not.
    pub(super) fn apply(&self, reload: Reload<C>) -> Result<(), RoleRefused> {
        match reload.outcome {
            Loading::Changed { config, warnings } => {
                warn(&warnings);
                self.change_to(*config)
            }
            Loading::Unchanged => {
                self.metrics.reload_succeeded();
                tracing::info!("the configuration is what it was");
                Ok(())
            }
            Loading::Invalid(error) => {
                self.refuse(&error);
                Ok(())
            }
        }
    }

    fn change_to(&self, wanted: C) -> Result<(), RoleRefused> {
        let running = self.current();
        let changes = running.changes(&wanted);
        let next = wanted.without_restart(&running);
        if next != running
            && let Err(error) = self.role.reconfigure(next.clone())
        {
            self.metrics.reload_failed();
            tracing::error!("{error:#}; the daemon goes on with the last good configuration");
            return Err(RoleRefused);
        }
        if let Err(error) = self.log.set_level((self.settings)(&next).log.level.as_str()) {
            tracing::warn!(%error, "the log level stays");
        }
        *self.in_force.lock().unwrap_or_else(PoisonError::into_inner) = next;
        self.tell(&changes);
        Ok(())
    }

    fn tell(&self, changes: &[Change]) {
        self.metrics.reload_succeeded();
        let restart = changes.iter().any(|change| change.class == ChangeClass::Restart);
        self.metrics.restart_needed.set(i64::from(restart));
        for change in changes {
            match change.class {
                ChangeClass::Restart => tracing::warn!("{change}"),
                ChangeClass::Live | ChangeClass::NextCarrier => tracing::info!("{change}"),
            }
        }
        tracing::info!("reloaded");
    }

    fn refuse(&self, error: &LoadError) {
        self.metrics.reload_failed();
        for problem in &error.problems {
            tracing::error!("{problem}");
        }
        tracing::error!("the configuration is refused; the daemon goes on with the last good one");
    }

    /// How long a stop may take by the configuration in force.
    pub(super) fn drain(&self) -> Duration {
        (self.settings)(&self.current()).drain
    }

    fn current(&self) -> C {
        self.in_force.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// One line each: what is no mistake but deserves attention.
pub(super) fn warn(warnings: &[Problem]) {
    for warning in warnings {
        tracing::warn!("{warning}");
    }
}
