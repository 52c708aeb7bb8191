//! Floor 5: the hub. It registers devices, brokers device streams and relays their bytes.
//!
//! Owns the public listeners, the registry and the bridges. Does not know what the bytes of a device stream mean.
//! Invariant: nothing but the two MQTT upgrades is served to a caller who has not been authenticated first.
//!
//! A stream initiation takes this way, down by calls and up by return values: `server` (TLS, HTTP, route), `guard`
//! (policy), `streams_api` (headers), `initiate` (reserve, invite, hand back), `courier` (which control session),
//! [`control`] (MQTT). The bytes take this one: `gateway` (ticket, upgrade), `bridge` (pair, relay).

mod answer;
mod authorities;
mod bridge;
pub mod control;
pub mod courier;
mod devices_api;
mod fuzz;
mod gateway;
mod guard;
mod heads;
mod initiate;
pub mod limits;
pub mod metrics;
pub mod mqtt_listener;
mod random;
pub mod record;
pub mod registry;
pub mod resource_log;
mod routes;
mod server;
pub mod shared;
mod streams_api;
mod upgrade;

pub use bridge::{fuzz_frames, fuzz_relay};
pub use devices_api::fuzz_device;
pub use fuzz::{fuzz_request, fuzz_session};
pub use heads::fuzz_head;
pub use routes::fuzz_path;

use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use tokio::{task::JoinSet, time::timeout};
use tokio_util::sync::CancellationToken;

use self::{
    bridge::Plain,
    metrics::HubMetrics,
    mqtt_listener::MqttListener,
    registry::{Registry, RegistryError},
    resource_log::ResourceLog,
    server::HttpsListener,
    shared::HubShared,
};
use crate::{
    config::{HubConfig, ResourceLogConfig},
    transport::{
        net::BindError,
        tls::{Alpn, ServerTls, TlsError},
    },
};

/// How often the hub looks whether its own certificate is about to end: a line a day is seen, and is no noise.
const CERTIFICATE_LOOK: Duration = Duration::from_hours(24);

/// The registry's file in the state folder.
pub const REGISTRY_FILE: &str = "registry.db";

/// Why the hub could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No policy: nobody could ever open a stream or register a device.
    #[error("the hub has no [[policy]], so nobody could use it; `culvert hub init` writes five")]
    NoPolicy,
    /// Nowhere to listen.
    #[error("the hub has no address in `listen`")]
    NoListen,
    /// The certificate cannot be used.
    #[error("TLS")]
    Tls(#[source] TlsError),
    /// A port cannot be used.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// The registry cannot be used.
    #[error("the registry {path} cannot be opened")]
    Registry {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: RegistryError,
    },
    /// The resource log cannot be used.
    #[error("the resource log {path} cannot be opened")]
    ResourceLog {
        /// Its file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A hub whose ports are known and that serves nothing yet.
#[derive(Debug)]
pub struct Hub {
    shared: Arc<HubShared>,
    tls: ServerTls,
    https: Vec<HttpsListener>,
    mqtt: Vec<MqttListener>,
}

/// A running hub, as those see it who reload its configuration or look at it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct HubHandle {
    shared: Arc<HubShared>,
    tls: ServerTls,
}

impl Hub {
    /// Reads the certificate, opens registry and resource log, and binds the ports.
    pub async fn bind(mut config: HubConfig, metrics: HubMetrics) -> Result<Self, StartError> {
        if config.policies.is_empty() {
            return Err(StartError::NoPolicy);
        }
        let tls = load_tls(&config).map_err(StartError::Tls)?;
        look_at_certificate(&tls, &config, &metrics);
        let registry = open_registry(&config)?;
        let (mut https, mut mqtt) = (Vec::new(), Vec::new());
        for address in &mut config.listen {
            let listener = HttpsListener::bind(*address).await?;
            *address = listener.addr;
            https.push(listener);
        }
        for address in &mut config.mqtt_listen {
            let listener = MqttListener::bind(*address).await?;
            *address = listener.addr();
            mqtt.push(listener);
        }
        if https.is_empty() {
            return Err(StartError::NoListen);
        }
        let log = open_log(&config.resource_log, &config.hostname, &metrics)?;
        let mut shared = HubShared::new(config, registry, metrics, CancellationToken::new());
        shared.log_to(log);
        Ok(Self { shared: Arc::new(shared), tls, https, mqtt })
    }

    /// The first HTTPS address, with the port that the kernel chose.
    pub fn addr(&self) -> SocketAddr {
        // `bind` refuses a hub without one.
        self.https[0].addr
    }

    /// The first address of MQTT over TLS, if it is served.
    pub fn mqtt_addr(&self) -> Option<SocketAddr> {
        self.mqtt.first().map(MqttListener::addr)
    }

    /// A handle for reloads and status.
    pub fn handle(&self) -> HubHandle {
        HubHandle { shared: self.shared.clone(), tls: self.tls.clone() }
    }

    /// Serves until `shutdown`, then stops in order: no new connections, control sessions told, mux bridges ended
    /// (they resume), plain bridges drained for a limited time.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), StartError> {
        let https_tls = self.tls.acceptor(Alpn::Http).map_err(StartError::Tls)?;
        let mqtt_tls = self.tls.acceptor(Alpn::Unspoken).map_err(StartError::Tls)?;
        let handle = self.handle();
        let hub = self.shared;
        let mut listeners = JoinSet::new();
        for listener in self.https {
            listeners.spawn(listener.run(https_tls.clone(), hub.clone()));
        }
        for listener in self.mqtt {
            listeners.spawn(listener.run(mqtt_tls.clone(), hub.clone()));
        }
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = hub.enforce_revocations() => {}
            () = handle.watch_certificate() => {}
        }
        hub.shutdown.cancel();
        stop(&hub).await;
        while listeners.join_next().await.is_some() {}
        Ok(())
    }
}

/// Ends everything that listeners have let in.
async fn stop(hub: &HubShared) {
    let drain = hub.config().limits.drain_timeout;
    hub.bridges.shut_down(Plain::Drain);
    tracing::info!(device_streams = hub.bridges.count(), drain_s = drain.as_secs(), "draining");
    if timeout(drain, hub.bridges.ended()).await.is_err() {
        hub.bridges.shut_down(Plain::End);
        hub.bridges.ended().await;
    }
    hub.tasks_ended().await;
}

fn load_tls(config: &HubConfig) -> Result<ServerTls, TlsError> {
    ServerTls::load(&config.tls.certificate.path, &config.tls.private_key.path)
}

/// Nobody can connect with a certificate that has expired or names another host, and only the others would say so.
fn look_at_certificate(tls: &ServerTls, config: &HubConfig, metrics: &HubMetrics) {
    metrics.certificate_not_after.set(tls.not_after().unwrap_or_default());
    if let Some(problem) = tls.complaint(&config.hostname) {
        tracing::warn!("{problem}");
    }
}

fn open_registry(config: &HubConfig) -> Result<Registry, StartError> {
    let path = config.state_dir.join(REGISTRY_FILE);
    Registry::open(&path).map_err(|source| StartError::Registry { path, source })
}

fn open_log(config: &ResourceLogConfig, hostname: &str, metrics: &HubMetrics) -> Result<ResourceLog, StartError> {
    let failures = metrics.resource_log_failures.clone();
    let opened = ResourceLog::open(config.clone(), hostname.into(), failures);
    opened.map_err(|source| StartError::ResourceLog { path: config.file.clone(), source })
}

impl HubHandle {
    /// Puts another configuration in force. Addresses stay as they are until a restart; what policies and devices no
    /// longer may ends within moments. On an error nothing changes.
    pub fn reconfigure(&self, mut config: HubConfig) -> Result<(), StartError> {
        if config.policies.is_empty() {
            return Err(StartError::NoPolicy);
        }
        // The files that are named now: the former ones may be gone.
        self.tls.reload(&config.tls.certificate.path, &config.tls.private_key.path).map_err(StartError::Tls)?;
        look_at_certificate(&self.tls, &config, &self.shared.metrics);
        let old = self.shared.config();
        config.listen.clone_from(&old.listen);
        config.mqtt_listen.clone_from(&old.mqtt_listen);
        self.shared.reconfigure(config);
        Ok(())
    }

    /// A certificate that nobody renews ends while the hub runs.
    async fn watch_certificate(&self) {
        loop {
            tokio::time::sleep(CERTIFICATE_LOOK).await;
            look_at_certificate(&self.tls, &self.shared.config(), &self.shared.metrics);
        }
    }

    /// How many control sessions are attached.
    pub fn device_sessions(&self) -> usize {
        self.shared.courier.sessions()
    }

    /// How many device streams exist, unfinished ones included.
    pub fn device_streams(&self) -> usize {
        self.shared.bridges.count()
    }
}

#[cfg(test)]
mod tests;
