//! `service.toml`: what it can say and what it says by default.
//!
//! Owns the service daemon's settings and their defaults. Does not know how a forward is opened.
//! Invariant: a forward's name is unique, and so is its address.

use std::{path::PathBuf, time::Duration};

use super::parts::{DEFAULT_RESUME_FOR, FileContents, LinkLimits, ListenAddress, LogConfig, MetricsConfig, ProxyRule};
use crate::{
    auth::ConnectionString,
    base::{DeviceId, Identity, ModuleId, Name},
};

/// The service's metrics port: beside the hub's and the device's, so that all three can share a machine.
const METRICS_PORT: u16 = 9466;

/// Everything in `service.toml` and `forwards.d/*.toml`.
#[derive(Debug, Clone, PartialEq)]
pub struct ServiceConfig {
    /// Which policy the service acts under, where its hub is and how it proves itself.
    pub connection_string: ConnectionString,
    /// The CA that signed the hub's certificate; without it the system's roots decide.
    pub ca: Option<FileContents>,
    /// How to get out.
    pub proxy: ProxyRule,
    /// Holds the instance ID.
    pub state_dir: PathBuf,
    /// The socket for `culvert connect`, `check` and `status`; none only in programs that embed the service.
    pub control_socket: Option<PathBuf>,
    /// How long a detached link is kept; zero turns resuming off.
    pub resume_for: Duration,
    /// What is forwarded.
    pub forwards: Vec<ForwardRule>,
    /// Bounds.
    pub limits: ServiceLimits,
    /// The metrics listener.
    pub metrics: MetricsConfig,
    /// Logging.
    pub log: LogConfig,
}

impl ServiceConfig {
    /// The metrics listener when nothing is said about it.
    pub fn default_metrics() -> MetricsConfig {
        MetricsConfig::on_loopback(METRICS_PORT)
    }

    /// A service with nothing but defaults: it forwards nothing.
    pub fn new(connection_string: ConnectionString, state_dir: impl Into<PathBuf>) -> Self {
        Self {
            connection_string,
            ca: None,
            proxy: ProxyRule::default(),
            state_dir: state_dir.into(),
            control_socket: None,
            resume_for: DEFAULT_RESUME_FOR,
            forwards: Vec::new(),
            limits: ServiceLimits::default(),
            metrics: Self::default_metrics(),
            log: LogConfig::default(),
        }
    }
}

/// `[[forward]]`: a local listener and the target behind a device that it leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForwardRule {
    /// Its name, in logs and metrics.
    pub name: Name,
    /// Where it listens.
    pub listen: ListenAddress,
    /// The device.
    pub device: DeviceId,
    /// The module of the device, if the daemon there runs as one.
    pub module: Option<ModuleId>,
    /// The device's target; in plain mode also the stream name.
    pub target: Name,
    /// Shared device stream or one per connection.
    pub mode: ForwardMode,
    /// When the shared device stream is opened.
    pub connect: ConnectMode,
    /// Most connections at once.
    pub max_connections: usize,
    /// Plain mode: an end without a Close is an end, not a reset (SDK programs in C).
    pub plain_eof: bool,
    /// When the rule is removed, its flows have this long to end by themselves.
    pub drain_timeout: Duration,
    /// A new connection waits this long for the device and its target.
    pub connect_timeout: Duration,
}

impl ForwardRule {
    /// A forward with nothing but defaults. 1024 connections are what one process may open by default on Linux; an
    /// hour of draining lets a copy finish and ends a forgotten shell; 30 s is what the SDKs ask for.
    pub fn new(name: Name, listen: ListenAddress, device: DeviceId, target: Name) -> Self {
        Self {
            name,
            listen,
            device,
            module: None,
            target,
            mode: ForwardMode::Mux,
            connect: ConnectMode::Start,
            max_connections: 1024,
            plain_eof: false,
            drain_timeout: Duration::from_secs(3600),
            connect_timeout: Duration::from_secs(30),
        }
    }

    /// The far end: the device, or its module.
    pub fn identity(&self) -> Identity {
        Identity { device: self.device.clone(), module: self.module.clone() }
    }
}

/// How connections of a forward share device streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ForwardMode {
    /// All connections to a device share one device stream.
    #[default]
    Mux,
    /// Each connection is a device stream of its own: for SDK programs at the far end.
    Plain,
}

/// When a mux device stream is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum ConnectMode {
    /// When the daemon starts or the rule appears, and again for ever.
    #[default]
    Start,
    /// When the first connection needs it.
    OnDemand,
}

/// `[limits]` of the service. The reasons for the numbers stand at [`Default`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceLimits {
    /// Most connections at once, over all forwards.
    pub max_connections: usize,
    /// Most connections to one device at once, over all its forwards.
    pub max_connections_per_device: usize,
    /// Memory of mux and link.
    pub link: LinkLimits,
}

impl Default for ServiceLimits {
    /// 4096 to one device are one full device stream; 16,384 in all are four of them.
    fn default() -> Self {
        Self { max_connections: 16_384, max_connections_per_device: 4096, link: LinkLimits::for_service(None) }
    }
}
