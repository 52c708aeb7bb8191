//! The life of a daemon, whatever its role: load, bind, say ready, serve, reload, drain, end.
//!
//! Owns signals, the order of starting and stopping, and the exit code. Does not know what a role does.
//! Invariant: after READY=1 a daemon ends only by a signal or by a bug.

mod apply;
mod control;
mod folders;
mod support;

use std::{path::Path, sync::Arc, time::Duration};

use anyhow::anyhow;
use prometheus::Registry;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::{JoinError, JoinSet},
    time::Interval,
};
use tokio_util::sync::CancellationToken;

use self::{apply::Applier, folders::StateLock, support::Support};
use super::{
    args::Role,
    exit::{Failure, Outcome},
    places,
};
use crate::{
    agent::control_socket::ControlHandler,
    config::{Changes, Environment, Load, Loaded, LogConfig, LogFormat, MetricsConfig, Reload, Reloader, watch::Poker},
    telemetry::{
        DaemonMetrics, Health, LogHandle, LogOptions,
        log::{self, LogError},
        metrics,
        systemd::{self, Beat, Loops},
    },
};

/// What blocking calls (name resolution, files) may still take when everything else has ended.
const RUNTIME_END: Duration = Duration::from_secs(1);
/// Longest status line for systemd: `systemctl status` shows one line.
const MAX_STATUS: usize = 200;

/// A role that can be run as a daemon.
pub(super) trait Daemon: Sized + Send + 'static {
    /// Its configuration.
    type Config: Load + Changes + Sync;
    /// Which role.
    const ROLE: Role;

    /// The settings that every daemon has.
    fn settings(config: &Self::Config) -> Settings<'_>;
    /// Opens what it listens on; nothing is served yet.
    fn bind(config: Self::Config, registry: &Registry) -> impl Future<Output = Outcome<Self>> + Send;
    /// The handle for health, reloads and control while it runs.
    fn handle(&self) -> Arc<dyn Running<Self::Config>>;
    /// Serves until `shutdown`, then drains.
    fn run(self, shutdown: CancellationToken) -> impl Future<Output = anyhow::Result<()>> + Send + 'static;
}

/// A running role.
pub(super) trait Running<C>: Health + ControlHandler {
    /// Puts another configuration in force, or changes nothing and says why.
    fn reconfigure(&self, config: C) -> anyhow::Result<()>;
}

/// What every daemon's configuration has.
pub(super) struct Settings<'a> {
    pub(super) metrics: &'a MetricsConfig,
    pub(super) log: &'a LogConfig,
    pub(super) control_socket: Option<&'a Path>,
    pub(super) state_dir: &'a Path,
    /// How long connections may take to end by themselves when the daemon stops, beyond a few seconds.
    pub(super) drain: Duration,
}

/// Runs a daemon until a signal ends it.
pub(super) fn run<D: Daemon>(config: Option<&Path>) -> Outcome {
    let file = places::config_file(config, D::ROLE);
    let loaded = D::Config::load(&file, &Environment::of_process()).map_err(Failure::config)?;
    let log = log::init(&log_options(D::settings(&loaded.config).log)).map_err(|error| match error {
        // The file is right; the journal may be there at the next try.
        LogError::Journal(_) => Failure::unavailable(error),
        LogError::Level(_) | LogError::Running => Failure::config(error),
    })?;
    metrics::count_panics();
    run_to_end(async { start::<D>(&file, loaded, log).await?.run().await })
}

/// Runs daemons on all processors until they have ended.
pub(super) fn run_to_end(daemons: impl Future<Output = Outcome>) -> Outcome {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Failure::unavailable)?;
    let ended = runtime.block_on(daemons);
    runtime.shutdown_timeout(RUNTIME_END);
    ended
}

fn log_options(config: &LogConfig) -> LogOptions {
    let format = match config.format {
        LogFormat::Auto => log::LogFormat::Auto,
        LogFormat::Text => log::LogFormat::Text,
        LogFormat::Json => log::LogFormat::Json,
        LogFormat::Journald => log::LogFormat::Journald,
    };
    LogOptions { level: config.level.clone(), format }
}

/// A daemon that is up.
pub(super) struct Started<C> {
    life: Life<C>,
    support: Support,
    /// Until all has ended.
    state: StateLock,
}

/// Binds, starts and says ready.
pub(super) async fn start<D: Daemon>(
    file: &Path,
    loaded: Loaded<D::Config>,
    log: LogHandle,
) -> Outcome<Started<D::Config>> {
    // First, so that a signal during the start is not lost.
    let signals = Signals::new().map_err(Failure::unavailable)?;
    let registry = Registry::new();
    let metrics = DaemonMetrics::register(D::ROLE.name(), &registry).map_err(Failure::software)?;
    apply::warn(&loaded.warnings);
    let state = folders::take(D::ROLE, &D::settings(&loaded.config))?;
    let daemon = D::bind(loaded.config.clone(), &registry).await?;
    let running = daemon.handle();
    let applier = Applier::new::<D>(loaded.config.clone(), running.clone(), metrics, log);
    let support = Support::start::<D>(file, &applier, registry).await?;
    let reloader = Reloader::start(file.into(), Environment::of_process(), loaded);
    let shutdown = CancellationToken::new();
    let mut role = JoinSet::new();
    role.spawn(daemon.run(shutdown.clone()));
    let mut life = Life {
        beat: support.loops.enter(),
        turns: tokio::time::interval(Loops::turn_every()),
        poker: reloader.poker(),
        status: String::new(),
        health: running,
        applier,
        reloader,
        signals,
        role,
        shutdown,
    };
    life.say_ready();
    tracing::info!(role = D::ROLE.name(), version = env!("CARGO_PKG_VERSION"), "running");
    Ok(Started { life, support, state })
}

impl<C: Load + Changes + Sync> Started<C> {
    /// What others ask of the running role.
    pub(super) fn handle(&self) -> Arc<dyn Running<C>> {
        self.life.health.clone()
    }

    /// Lives until a signal.
    pub(super) async fn run(self) -> Outcome {
        let ended = self.life.run().await;
        self.support.end().await;
        drop(self.state);
        ended
    }
}

/// Everything that the main loop owns.
struct Life<C> {
    health: Arc<dyn Running<C>>,
    applier: Applier<C>,
    reloader: Reloader<C>,
    poker: Poker,
    signals: Signals,
    role: JoinSet<anyhow::Result<()>>,
    shutdown: CancellationToken,
    beat: Beat,
    turns: Interval,
    status: String,
}

enum Event<C> {
    Turn,
    Asked(Asked),
    Reloaded(Reload<C>),
    Ended(Result<anyhow::Result<()>, JoinError>),
}

impl<C: Load + Changes + Sync> Life<C> {
    async fn run(mut self) -> Outcome {
        loop {
            match self.next().await {
                Event::Turn => self.turn(),
                Event::Asked(Asked::Reload) => {
                    systemd::reloading();
                    self.poker.poke();
                }
                Event::Reloaded(reload) => {
                    if self.applier.apply(reload).is_err() {
                        self.reloader.not_applied();
                    }
                    // Also after a refused reload: what ran before runs on, and `systemctl reload` must return.
                    self.say_ready();
                }
                Event::Asked(Asked::Stop) => return self.stop().await,
                Event::Ended(ended) => {
                    judge(ended)?;
                    return Err(Failure::software(anyhow!("the daemon stopped by itself")));
                }
            }
        }
    }

    async fn next(&mut self) -> Event<C> {
        tokio::select! {
            Some(ended) = self.role.join_next() => Event::Ended(ended),
            asked = self.signals.next() => Event::Asked(asked),
            reload = self.reloader.next() => Event::Reloaded(reload),
            _ = self.turns.tick() => Event::Turn,
        }
    }

    fn turn(&mut self) {
        self.beat.turned();
        let status = status_line(&*self.health);
        if status != self.status {
            systemd::status(&status);
            self.status = status;
        }
    }

    fn say_ready(&mut self) {
        self.status = status_line(&*self.health);
        systemd::ready(&self.status);
    }

    /// The role drains by its own deadlines; a second signal is for people who cannot wait.
    async fn stop(mut self) -> Outcome {
        systemd::stopping(self.applier.drain());
        tracing::info!("stopping; once more to stop at once");
        self.shutdown.cancel();
        loop {
            tokio::select! {
                Some(ended) = self.role.join_next() => return judge(ended),
                asked = self.signals.next() => if asked == Asked::Stop {
                    tracing::warn!("stopped before everything had drained");
                    self.role.shutdown().await;
                    return Ok(());
                },
                _ = self.turns.tick() => self.beat.turned(),
            }
        }
    }
}

/// A panic is a bug; an error is something that the role could not go on without.
fn judge(ended: Result<anyhow::Result<()>, JoinError>) -> Outcome {
    ended.map_err(Failure::software)?.map_err(Failure::unavailable)
}

/// `ready`, or what is waited for.
fn status_line<C>(health: &dyn Running<C>) -> String {
    let mut line = match health.ready() {
        Ok(()) => "ready".to_owned(),
        Err(reasons) => format!("waiting: {}", reasons.join("; ")),
    };
    line.retain(|c| !c.is_control());
    if let Some((cut, _)) = line.char_indices().nth(MAX_STATUS) {
        line.truncate(cut);
    }
    line
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> Asked {
        tokio::select! {
            _ = self.terminate.recv() => Asked::Stop,
            _ = self.interrupt.recv() => Asked::Stop,
            _ = self.hangup.recv() => Asked::Reload,
        }
    }
}

/// What a signal means.
#[derive(PartialEq)]
enum Asked {
    Stop,
    Reload,
}
