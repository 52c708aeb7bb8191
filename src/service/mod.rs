//! Floor 5: `culvert service`, the service-local proxy.
//!
//! Owns forwards and the device streams below them, from configuration to closing line. Does not know signals, files
//! or the command line. Invariant: what runs follows the configuration in force; a rule that cannot be followed now
//! is tried again, and touches no other.

mod client;
mod connector;
mod health;
mod initiator;
mod joined;
mod metrics;
mod resume;
mod supervisor;
mod tunnel;
mod tunnels;

use std::sync::{Arc, Mutex};

use futures_util::future::BoxFuture;
use prometheus::Registry;
use serde_json::json;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

pub use client::{Client, ClientError, DeviceStream};
pub use initiator::{InitiateError, fuzz_answer};
pub use metrics::ServiceMetrics;

use self::{
    connector::ServiceConnector,
    health::{HealthBoard, watch_forwards, watch_hub},
    supervisor::Supervisor,
    tunnel::{TunnelDeps, TunnelSettings},
    tunnels::Tunnels,
};
use crate::{
    agent::{
        HubClient, HubSetupError, InstanceError, NetworkChanges,
        control_socket::{ControlHandler, Reply, Request},
        follow_link_settings, load_instance, new_boot, receive_window,
    },
    config::ServiceConfig,
    forward::{ForwardMetrics, InletDeps},
    telemetry::{ForwardHealth, Health},
    transport::{
        hello::{LinkSettings, LocalHello},
        link::{LinkMetrics, ReplayBudget},
    },
};

/// Why a service could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Trust, certificate or proxy.
    #[error("{0}")]
    Hub(#[from] HubSetupError),
    /// The instance ID.
    #[error("{0}")]
    Instance(#[from] InstanceError),
    /// A metric exists already.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
}

/// A service daemon, ready to run.
pub struct Service {
    handle: ServiceHandle,
    supervisor: Supervisor,
    network: NetworkRunner,
}

type NetworkRunner = BoxFuture<'static, ()>;

/// Health, control and reconfiguration of a running service. Cheap to clone.
#[derive(Clone)]
pub struct ServiceHandle {
    shared: Arc<Shared>,
}

/// What the parts of a service share.
pub(crate) struct Shared {
    desired: watch::Sender<ServiceConfig>,
    hub: watch::Sender<HubClient>,
    settings: watch::Sender<TunnelSettings>,
    tunnels: Tunnels,
    connector: ServiceConnector,
    board: HealthBoard,
    metrics: ServiceMetrics,
    trouble: Arc<Notify>,
    stop: CancellationToken,
    /// Taken by the supervisor when it begins.
    network: Mutex<Option<CancellationToken>>,
}

impl Service {
    /// Sets the service up; listeners are opened by [`run`](Self::run), which tries again what fails.
    pub async fn bind(config: ServiceConfig, registry: &Registry) -> Result<Self, BindError> {
        let hub = HubClient::new(&config.connection_string, config.ca.as_ref(), None, &config.proxy)?;
        let (metrics, forwards, links) = (ServiceMetrics::default(), ForwardMetrics::default(), LinkMetrics::default());
        metrics.register(registry)?;
        forwards.register(registry)?;
        links.register(registry)?;
        let limits = config.limits.link.clone();
        let hello = LocalHello {
            instance: load_instance(&config.state_dir)?,
            boot: new_boot(),
            max_channels: limits.max_channels,
            receive_window: receive_window(&limits),
            resume_for: config.resume_for,
            links: LinkSettings {
                budget: ReplayBudget::new(limits.max_replay_total, limits.max_replay),
                metrics: links,
                ..LinkSettings::default()
            },
        };
        let (stop, network_stop) = (CancellationToken::new(), CancellationToken::new());
        let (network, network_runner) = NetworkChanges::start(network_stop.clone());
        let hub = watch::Sender::new(hub);
        let settings = watch::Sender::new(TunnelSettings { hello, limits });
        let (hubs, settings_in_force) = (hub.subscribe(), settings.subscribe());
        let trouble = Arc::new(Notify::new());
        let deps = TunnelDeps {
            hub: hubs,
            settings: settings_in_force,
            network,
            metrics: metrics.clone(),
            trouble: trouble.clone(),
        };
        let tunnels = Tunnels::new(deps, stop.clone());
        let connector = ServiceConnector::new(hub.subscribe(), tunnels.clone(), &config.limits);
        let shared = Arc::new(Shared {
            desired: watch::Sender::new(config),
            hub,
            settings,
            tunnels,
            board: HealthBoard::default(),
            metrics,
            trouble,
            stop,
            network: Mutex::new(Some(network_stop)),
            connector: connector.clone(),
        });
        let inlets = InletDeps { connector: Arc::new(connector), metrics: forwards };
        let supervisor = Supervisor::new(shared.clone(), inlets).await;
        Ok(Self { handle: ServiceHandle { shared }, supervisor, network: Box::pin(network_runner) })
    }

    /// The handle by which the running service is asked and changed.
    pub fn handle(&self) -> ServiceHandle {
        self.handle.clone()
    }

    /// Serves until `shutdown`, then closes the listeners, gives flows a moment, and says goodbye to the devices.
    pub async fn run(self, shutdown: CancellationToken) {
        let Self { handle, supervisor, network } = self;
        let shared = handle.shared;
        let checks = async {
            tokio::join!(watch_hub(&shared), watch_forwards(&shared));
        };
        let serve = async {
            tokio::select! {
                () = supervisor.run(shutdown) => {}
                // The checks end only with the service.
                () = checks => {}
            }
            shared.stop.cancel();
            shared.tunnels.wait().await;
            let network = shared.network.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            network.iter().for_each(CancellationToken::cancel);
        };
        tokio::join!(serve, network);
    }
}

impl ServiceHandle {
    /// Puts another configuration in force: at once, and without touching what it does not change.
    pub fn reconfigure(&self, config: ServiceConfig) {
        self.shared.connector.set_limits(&config.limits);
        self.shared.settings.send_modify(|settings| {
            follow_link_settings(&mut settings.hello, config.resume_for, &config.limits.link);
            settings.limits = config.limits.link.clone();
        });
        self.shared.desired.send_replace(config);
    }

    /// Waits until the devices have taken what was written to connections that have ended, or the sessions are lost.
    pub async fn delivered(&self) {
        self.shared.tunnels.delivered().await;
    }

    /// Where a forward listens, once its listener is open.
    pub fn listens_at(&self, forward: &str) -> Option<String> {
        self.shared.board.endpoint(forward)
    }
}

impl Health for ServiceHandle {
    fn ready(&self) -> Result<(), Vec<String>> {
        self.shared.board.ready()
    }

    fn forward(&self, name: &str) -> BoxFuture<'_, ForwardHealth> {
        let name = name.to_owned();
        Box::pin(async move { health::check_forward(&self.shared, &name).await })
    }
}

impl ControlHandler for ServiceHandle {
    fn handle(&self, request: Request) -> BoxFuture<'_, Reply> {
        Box::pin(async move {
            match request {
                Request::Connect { device, target } => self.shared.connector.join(device, target).await,
                Request::Status => Reply::Json(self.shared.status()),
                Request::Plan => Reply::Refused("the daemon answers this itself".into()),
            }
        })
    }
}

impl Shared {
    /// The live state, for `culvert status`.
    fn status(&self) -> serde_json::Value {
        let problems = self.board.ready().err().unwrap_or_default();
        json!({
            "role": "service",
            "ready": problems.is_empty(),
            "problems": problems,
            "hub": self.hub.borrow().name(),
            "forwards": self.board.forwards(),
            "device_streams": self.tunnels.status(),
        })
    }
}
