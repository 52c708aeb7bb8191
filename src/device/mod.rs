//! Floor 5: `culvert device`, the device-local proxy.
//!
//! Owns the control session with the hub, the decision about each stream request, and the legs of device streams.
//! Does not know signals, files or the command line. Invariant: the device alone decides what it exposes; a hub
//! cannot widen it.

mod client;
mod control;
mod invited;
mod metrics;
mod mux_leg;
mod session;

use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::BoxFuture;
use prometheus::Registry;
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use client::{Client, ClientError, DeviceStream, Handler};
pub use metrics::DeviceMetrics;

use self::{
    control::{ControlDeps, ControlState, keep},
    invited::{Legs, handle_requests},
    mux_leg::{MuxLegs, Settings},
};
use crate::{
    agent::{
        HubClient, HubSetupError, InstanceError, NetworkChanges,
        control_socket::{ControlHandler, Reply, Request},
        follow_link_settings, load_instance, new_boot, receive_window,
    },
    base::Gate,
    config::DeviceConfig,
    forward::{Outlet, TargetMetrics},
    proto::control::StreamRequest,
    telemetry::{ForwardHealth, Health},
    transport::{
        hello::{LinkSettings, LocalHello},
        link::{LinkMetrics, ReplayBudget},
    },
};

/// Topics that wait for the control session's loop, which takes them at once.
const OUTBOX: usize = 64;
/// Stream requests that wait for their task to begin, which happens at once; the hub has at most 16 in flight.
const REQUESTS: usize = 64;

/// Why a device could not be set up.
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

/// A device daemon, ready to run.
pub struct Device {
    handle: DeviceHandle,
    control: ControlDeps,
    legs: Legs,
    requests: mpsc::Receiver<StreamRequest>,
    network: BoxFuture<'static, ()>,
    network_stop: CancellationToken,
}

/// Health, control and reconfiguration of a running device. Cheap to clone.
#[derive(Clone)]
pub struct DeviceHandle {
    shared: Arc<Shared>,
}

struct Shared {
    in_force: Mutex<DeviceConfig>,
    hub: watch::Sender<HubClient>,
    outlet: Outlet,
    mux: MuxLegs,
    plain: Gate,
    state: watch::Receiver<ControlState>,
}

impl Device {
    /// Sets the device up; nothing is connected yet.
    pub async fn bind(config: DeviceConfig, registry: &Registry) -> Result<Self, BindError> {
        let hub = hub_client(&config)?;
        let (metrics, targets, links) = (DeviceMetrics::default(), TargetMetrics::default(), LinkMetrics::default());
        metrics.register(registry)?;
        targets.register(registry)?;
        links.register(registry)?;
        let limits = &config.limits;
        let hello = LocalHello {
            instance: load_instance(&config.state_dir)?,
            boot: new_boot(),
            max_channels: limits.link.max_channels,
            receive_window: receive_window(&limits.link),
            resume_for: config.resume_for,
            links: LinkSettings {
                budget: ReplayBudget::new(limits.link.max_replay_total, limits.link.max_replay),
                metrics: links,
                ..LinkSettings::default()
            },
        };
        let settings = Settings { hello, limits: limits.link.clone(), max_services: limits.max_services };
        let network_stop = CancellationToken::new();
        let (network, network_runner) = NetworkChanges::start(network_stop.clone());
        let (outbox, outbox_receiver) = mpsc::channel(OUTBOX);
        let (requests, requests_receiver) = mpsc::channel(REQUESTS);
        let outlet = Outlet::new(&config.targets, limits.max_connections, targets);
        let mux = MuxLegs::new(settings, outlet.clone(), outbox.clone(), network.clone(), metrics.clone());
        let in_use = Arc::new(Mutex::new(hub.clone()));
        let legs = Legs::new(in_use.clone(), outlet.clone(), mux.clone(), outbox, limits);
        let hub = watch::Sender::new(hub);
        let (state_sender, state) = watch::channel(ControlState::Waiting("connecting to the hub".into()));
        let control = ControlDeps {
            hub: hub.subscribe(),
            outbox: outbox_receiver,
            requests,
            state: state_sender,
            in_use,
            is_urgent: Box::new({
                let mux = mux.clone();
                move || mux.has_flows()
            }),
            awaits_request: Box::new({
                let mux = mux.clone();
                move || mux.awaits_request()
            }),
            network,
            metrics,
        };
        let plain = legs.plain.clone();
        let shared = Arc::new(Shared { in_force: Mutex::new(config), hub, outlet, mux, plain, state });
        let handle = DeviceHandle { shared };
        let network = Box::pin(network_runner);
        Ok(Self { handle, control, legs, requests: requests_receiver, network, network_stop })
    }

    /// Hands plain device streams to a program instead of to targets.
    pub(crate) fn with_handler(mut self, handler: Arc<dyn Handler>) -> Self {
        self.legs.handler = Some(handler);
        self
    }

    /// The handle by which the running device is asked and changed.
    pub fn handle(&self) -> DeviceHandle {
        self.handle.clone()
    }

    /// Serves until `shutdown`: then device streams end with a goodbye, the control session last, because it carries
    /// the notices.
    pub async fn run(self, shutdown: CancellationToken) {
        let Self { handle: _, control, legs, requests, network, network_stop } = self;
        let control_stop = CancellationToken::new();
        let serve = async {
            handle_requests(legs, requests, shutdown).await;
            control_stop.cancel();
        };
        let control = async {
            keep(control, control_stop.clone()).await;
            network_stop.cancel();
        };
        tokio::join!(serve, control, network);
    }
}

impl DeviceHandle {
    /// Puts another configuration in force: targets at once; a changed hub or credential is tried beside the one in
    /// use.
    pub fn reconfigure(&self, config: DeviceConfig) {
        let shared = &self.shared;
        let mut in_force = shared.in_force.lock().unwrap_or_else(PoisonError::into_inner);
        shared.outlet.set_targets(&config.targets, config.limits.max_connections);
        shared.plain.set_limit(config.limits.max_plain);
        shared.mux.reconfigure(|settings| {
            follow_link_settings(&mut settings.hello, config.resume_for, &config.limits.link);
            settings.limits = config.limits.link.clone();
            settings.max_services = config.limits.max_services;
        });
        let same_hub = in_force.connection_string == config.connection_string
            && in_force.ca == config.ca
            && in_force.certificate == config.certificate
            && in_force.proxy == config.proxy;
        if !same_hub {
            match hub_client(&config) {
                Ok(hub) => {
                    info!(hub = hub.name(), "trying the changed hub or credential beside the one in use");
                    shared.hub.send_replace(hub);
                }
                Err(error) => warn!("the changed hub or credential cannot be used, so the old one stays: {error}"),
            }
        }
        *in_force = config;
    }
}

fn hub_client(config: &DeviceConfig) -> Result<HubClient, HubSetupError> {
    HubClient::new(&config.connection_string, config.ca.as_ref(), config.certificate.as_ref(), &config.proxy)
}

impl Health for DeviceHandle {
    fn ready(&self) -> Result<(), Vec<String>> {
        match &*self.shared.state.borrow() {
            ControlState::Connected => Ok(()),
            ControlState::Waiting(why) => Err(vec![format!("hub: {why}")]),
        }
    }

    fn forward(&self, _name: &str) -> BoxFuture<'_, ForwardHealth> {
        // Forwards are the service's.
        Box::pin(async { ForwardHealth::Unknown })
    }
}

impl ControlHandler for DeviceHandle {
    fn handle(&self, request: Request) -> BoxFuture<'_, Reply> {
        Box::pin(async move {
            match request {
                Request::Status => Reply::Json(self.status()),
                Request::Connect { .. } => Reply::Refused("a device opens no connections; ask the service".into()),
                Request::Plan => Reply::Refused("the daemon answers this itself".into()),
            }
        })
    }
}

impl DeviceHandle {
    /// The live state, for `culvert status`.
    fn status(&self) -> serde_json::Value {
        let problems = self.ready().err().unwrap_or_default();
        json!({
            "role": "device",
            "ready": problems.is_empty(),
            "problems": problems,
            "hub": self.shared.hub.borrow().name(),
            "device_streams": self.shared.mux.status(),
        })
    }
}
