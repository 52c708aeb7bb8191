//! What runs beside a role until the role has ended: metrics, control socket, watchdog.
//!
//! Owns their tasks. Does not know the role. Invariant: they are up while the role drains, and none of them keeps a
//! daemon from starting except a second daemon on the same control socket.

use std::{net::SocketAddr, path::Path, sync::Arc, time::Duration};

use prometheus::Registry;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{Daemon, apply::Applier, control::Control};
use crate::{
    agent::control_socket::{BindError, ControlHandler, ControlSocket},
    cli::exit::{Failure, Outcome},
    config::MetricsConfig,
    telemetry::{
        Health,
        http::Server,
        systemd::{self, Beat, Loops},
    },
};

/// Another try at a metrics listener whose port was taken.
const METRICS_RETRY: Duration = Duration::from_secs(10);

/// The tasks beside the role.
pub(super) struct Support {
    pub(super) loops: Loops,
    tasks: JoinSet<()>,
    shutdown: CancellationToken,
}

impl Support {
    /// Starts what the configuration asks for.
    pub(super) async fn start<D: Daemon>(
        file: &Path,
        applier: &Applier<D::Config>,
        registry: Registry,
    ) -> Outcome<Self> {
        let mut support = Self { loops: Loops::default(), tasks: JoinSet::new(), shutdown: CancellationToken::new() };
        let (metrics, socket) = {
            let config = applier.in_force.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let settings = D::settings(&config);
            (settings.metrics.clone(), settings.control_socket.map(Path::to_path_buf))
        };
        if let Some(socket) = socket {
            let (in_force, role) = (applier.in_force.clone(), applier.role.clone());
            support.control(&socket, Arc::new(Control { file: file.into(), in_force, role })).await?;
        }
        support.metrics(metrics, registry, applier.role.clone());
        let (loops, shutdown) = (support.loops.clone(), support.shutdown.clone());
        support.tasks.spawn(systemd::feed_watchdog(loops, shutdown));
        support.tasks.spawn(turn(support.loops.enter(), support.shutdown.clone()));
        Ok(support)
    }

    async fn control(&mut self, path: &Path, handler: Arc<dyn ControlHandler>) -> Outcome {
        match ControlSocket::bind(path).await {
            Ok(socket) => {
                self.tasks.spawn(socket.run(handler, self.shutdown.clone()));
                Ok(())
            }
            Err(error @ BindError::InUse(_)) => Err(Failure::unavailable(error)),
            Err(error) => {
                tracing::warn!(%error, "culvert connect and culvert check cannot reach this daemon");
                Ok(())
            }
        }
    }

    fn metrics(&mut self, config: MetricsConfig, registry: Registry, health: Arc<dyn Health>) {
        if let Some(address) = config.listen {
            self.tasks.spawn(serve_metrics(address, config.allowed_hosts, registry, health, self.shutdown.clone()));
        }
    }

    /// Ends everything, when the role has ended.
    pub(super) async fn end(mut self) {
        self.shutdown.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

/// A taken port is retried: metrics are no reason to keep people from their devices.
async fn serve_metrics(
    address: SocketAddr,
    allowed_hosts: Vec<String>,
    registry: Registry,
    health: Arc<dyn Health>,
    shutdown: CancellationToken,
) {
    loop {
        match Server::bind(address, &allowed_hosts).await {
            Ok(server) => {
                tracing::info!(address = %server.addr(), "serving /metrics, /healthz and /readyz");
                return server.run(registry, health, shutdown).await;
            }
            Err(error) => {
                let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
                tracing::error!(%error, cause, "trying again every {} s", METRICS_RETRY.as_secs());
            }
        }
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(METRICS_RETRY) => {}
        }
    }
}

/// Proves that the runtime still schedules tasks besides the main loop.
async fn turn(beat: Beat, shutdown: CancellationToken) {
    let mut turns = tokio::time::interval(Loops::turn_every());
    while shutdown.run_until_cancelled(turns.tick()).await.is_some() {
        beat.turned();
    }
}
