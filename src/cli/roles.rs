//! The three roles as daemons.
//!
//! Owns the fit between a role's own interface and what [`super::daemon`] asks. Does not know what a role does.
//! Invariant: nothing here decides; each method is one call.

use std::{sync::Arc, time::Duration};

use futures_util::future::BoxFuture;
use prometheus::Registry;
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::{
    args::Role,
    daemon::{Daemon, Running, Settings},
    exit::{Failure, Outcome},
};
use crate::{
    agent::{
        InstanceError,
        control_socket::{ControlHandler, Reply, Request},
    },
    config::{DeviceConfig, HubConfig, ServiceConfig},
    device::{BindError as DeviceError, Device, DeviceHandle},
    hub::{Hub, HubHandle, metrics::HubMetrics},
    service::{BindError as ServiceError, Service, ServiceHandle},
    telemetry::{ForwardHealth, Health},
};

macro_rules! settings {
    ($config:ident, $drain:expr) => {
        Settings {
            metrics: &$config.metrics,
            log: &$config.log,
            control_socket: $config.control_socket.as_deref(),
            state_dir: &$config.state_dir,
            drain: $drain,
        }
    };
}

impl Daemon for Hub {
    type Config = HubConfig;
    const ROLE: Role = Role::Hub;

    fn settings(config: &HubConfig) -> Settings<'_> {
        settings!(config, config.limits.drain_timeout)
    }

    async fn bind(config: HubConfig, registry: &Registry) -> Outcome<Self> {
        let metrics = HubMetrics::default();
        metrics.register(registry).map_err(Failure::software)?;
        let hub = Self::bind(config, metrics).await.map_err(Failure::unavailable)?;
        tracing::info!(https = %hub.addr(), mqtt = hub.mqtt_addr().map(tracing::field::display), "listening");
        Ok(hub)
    }

    fn handle(&self) -> Arc<dyn Running<HubConfig>> {
        Arc::new(self.handle())
    }

    async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        Ok(self.run(shutdown).await?)
    }
}

impl Running<HubConfig> for HubHandle {
    fn reconfigure(&self, config: HubConfig) -> anyhow::Result<()> {
        Ok(self.reconfigure(config)?)
    }
}

impl Health for HubHandle {
    /// A hub that runs has its listeners, its certificate and its registry; it waits for nobody.
    fn ready(&self) -> Result<(), Vec<String>> {
        Ok(())
    }

    fn forward(&self, _name: &str) -> BoxFuture<'_, ForwardHealth> {
        Box::pin(async { ForwardHealth::Unknown })
    }
}

impl ControlHandler for HubHandle {
    fn handle(&self, request: Request) -> BoxFuture<'_, Reply> {
        let reply = match request {
            Request::Status => Reply::Json(json!({
                "role": "hub",
                "ready": true,
                "device_sessions": self.device_sessions(),
                "device_streams": self.device_streams(),
            })),
            Request::Connect { .. } => Reply::Refused("this is a hub; connect through a culvert service".into()),
            Request::Plan => Reply::Refused("the daemon answers this itself".into()),
        };
        Box::pin(async { reply })
    }
}

impl Daemon for Device {
    type Config = DeviceConfig;
    const ROLE: Role = Role::Device;

    fn settings(config: &DeviceConfig) -> Settings<'_> {
        settings!(config, Duration::ZERO)
    }

    async fn bind(config: DeviceConfig, registry: &Registry) -> Outcome<Self> {
        Self::bind(config, registry).await.map_err(|error| match error {
            DeviceError::Instance(InstanceError::Io { .. }) => Failure::unavailable(error),
            DeviceError::Metrics(_) => Failure::software(error),
            DeviceError::Hub(_) | DeviceError::Instance(InstanceError::Content { .. }) => Failure::config(error),
        })
    }

    fn handle(&self) -> Arc<dyn Running<DeviceConfig>> {
        Arc::new(self.handle())
    }

    async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        self.run(shutdown).await;
        Ok(())
    }
}

impl Running<DeviceConfig> for DeviceHandle {
    fn reconfigure(&self, config: DeviceConfig) -> anyhow::Result<()> {
        self.reconfigure(config);
        Ok(())
    }
}

impl Daemon for Service {
    type Config = ServiceConfig;
    const ROLE: Role = Role::Service;

    fn settings(config: &ServiceConfig) -> Settings<'_> {
        settings!(config, Duration::ZERO)
    }

    async fn bind(config: ServiceConfig, registry: &Registry) -> Outcome<Self> {
        Self::bind(config, registry).await.map_err(|error| match error {
            ServiceError::Instance(InstanceError::Io { .. }) => Failure::unavailable(error),
            ServiceError::Metrics(_) => Failure::software(error),
            ServiceError::Hub(_) | ServiceError::Instance(InstanceError::Content { .. }) => Failure::config(error),
        })
    }

    fn handle(&self) -> Arc<dyn Running<ServiceConfig>> {
        Arc::new(self.handle())
    }

    async fn run(self, shutdown: CancellationToken) -> anyhow::Result<()> {
        self.run(shutdown).await;
        Ok(())
    }
}

impl Running<ServiceConfig> for ServiceHandle {
    fn reconfigure(&self, config: ServiceConfig) -> anyhow::Result<()> {
        self.reconfigure(config);
        Ok(())
    }
}
