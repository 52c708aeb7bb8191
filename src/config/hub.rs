//! `hub.toml`: what it can say and what it says by default.
//!
//! Owns the hub's settings and their defaults. Does not know what the hub does with them.
//! Invariant: every limit has a default that is safe on a small machine.

use std::{fmt, net::SocketAddr, path::PathBuf, time::Duration};

use super::parts::{Certificate, FileContents, LogConfig, MetricsConfig};
use crate::{
    auth::Rights,
    base::{DeviceId, Name, Secret},
};

/// The hub's metrics port: the agreed three are 9464, 9465 and 9466, so that all roles can share a machine.
const METRICS_PORT: u16 = 9464;

/// Everything in `hub.toml`.
#[derive(Debug, Clone, PartialEq)]
pub struct HubConfig {
    /// The name in SAS resources and certificates.
    pub hostname: String,
    /// Where HTTPS is served: service API, registry, MQTT over WebSocket, streaming endpoint.
    pub listen: Vec<SocketAddr>,
    /// Where MQTT over TLS is served; empty turns it off.
    pub mqtt_listen: Vec<SocketAddr>,
    /// What clients use in place of `https://hostname:port-of-listen`, for a hub behind a proxy or NAT.
    pub public_url: Option<PublicUrl>,
    /// Holds the registry.
    pub state_dir: PathBuf,
    /// The socket for `culvert check` and `status`; none only in programs that embed the hub.
    pub control_socket: Option<PathBuf>,
    /// The hub's certificate and key.
    pub tls: Certificate,
    /// Signs certificates of devices registered as `certificateAuthority`.
    pub client_ca: Option<FileContents>,
    /// Values of `Origin` that browsers may send to the streaming endpoint; none by default.
    pub allowed_origins: Vec<String>,
    /// Who may do what.
    pub policies: Vec<PolicyRule>,
    /// Bounds.
    pub limits: HubLimits,
    /// The metrics listener.
    pub metrics: MetricsConfig,
    /// Logging.
    pub log: LogConfig,
    /// The DeviceStreams records.
    pub resource_log: ResourceLogConfig,
}

impl HubConfig {
    /// The metrics listener when nothing is said about it.
    pub fn default_metrics() -> MetricsConfig {
        MetricsConfig::on_loopback(METRICS_PORT)
    }

    /// A hub with nothing but defaults, on the standard ports.
    pub fn new(hostname: impl Into<String>, tls: Certificate, state_dir: impl Into<PathBuf>) -> Self {
        let state_dir = state_dir.into();
        Self {
            hostname: hostname.into(),
            listen: vec![SocketAddr::from(([0, 0, 0, 0], 443))],
            mqtt_listen: vec![SocketAddr::from(([0, 0, 0, 0], 8883))],
            public_url: None,
            control_socket: None,
            tls,
            client_ca: None,
            allowed_origins: Vec::new(),
            policies: Vec::new(),
            limits: HubLimits::default(),
            metrics: Self::default_metrics(),
            log: LogConfig::default(),
            resource_log: ResourceLogConfig::in_folder(&state_dir),
            state_dir,
        }
    }

    /// The policy of that name.
    pub fn policy(&self, name: &Name) -> Option<&PolicyRule> {
        self.policies.iter().find(|policy| policy.name == *name)
    }
}

/// `https://host:port`, without a path: the wire's paths are fixed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicUrl {
    /// The host name, or the address without brackets.
    pub host: String,
    /// The port; 443 if the text names none.
    pub port: u16,
}

impl fmt::Display for PublicUrl {
    /// Always with the port: C SDK programs know no default (wire.md, section b).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "https://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "https://{}:{}", self.host, self.port)
        }
    }
}

/// `[[policy]]`: a shared access policy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PolicyRule {
    /// Its name, `skn` in tokens.
    pub name: Name,
    /// What it grants.
    pub rights: Rights,
    /// The key that signs, decoded.
    pub primary_key: Secret,
    /// The other key that is accepted, for rotation.
    pub secondary_key: Option<Secret>,
    /// The devices it reaches; empty is every device.
    pub devices: Vec<DevicePattern>,
}

impl PolicyRule {
    /// The keys that verify its tokens.
    pub fn keys(&self) -> impl Iterator<Item = &Secret> {
        std::iter::once(&self.primary_key).chain(&self.secondary_key)
    }

    /// True if the policy reaches that device.
    pub fn may_reach(&self, device: &DeviceId) -> bool {
        self.devices.is_empty() || self.devices.iter().any(|pattern| pattern.matches(device))
    }
}

/// A device ID, or all that begin alike: `kiosk-*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DevicePattern {
    /// This one.
    Exact(DeviceId),
    /// All whose ID begins with this text.
    Prefix(String),
}

impl DevicePattern {
    /// True if the pattern covers that device.
    pub fn matches(&self, device: &DeviceId) -> bool {
        match self {
            Self::Exact(id) => id == device,
            Self::Prefix(prefix) => device.as_str().starts_with(prefix.as_str()),
        }
    }
}

/// `[limits]` of the hub. The reasons for the numbers stand at [`Default`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubLimits {
    /// Most connections that have not authenticated yet.
    pub max_unauthenticated: usize,
    /// Most of those from one address.
    pub max_unauthenticated_per_address: usize,
    /// Most control sessions.
    pub max_sessions: usize,
    /// Most bridges.
    pub max_bridges: usize,
    /// Most bridges to one device.
    pub max_bridges_per_device: usize,
    /// Most initiations to one device that wait for their answer.
    pub max_pending_per_device: usize,
    /// A TLS handshake ends within this time.
    pub tls_handshake_timeout: Duration,
    /// A request's head is complete within this time.
    pub request_head_timeout: Duration,
    /// A request's body is complete within this time.
    pub request_body_timeout: Duration,
    /// A peer that takes no byte of an answer for this long is cut; never applied to relayed data.
    pub write_stall_timeout: Duration,
    /// From the service's request to both sides at the streaming endpoint.
    pub stream_handshake_timeout: Duration,
    /// At shutdown, plain bridges have this long to end by themselves.
    pub drain_timeout: Duration,
    /// A SAS token that is valid for longer than this from now is refused; none by default.
    pub max_token_lifetime: Option<Duration>,
}

impl Default for HubLimits {
    /// 1,024 half-open connections and 64 from one address let a fleet behind one NAT come back and a flood not
    /// in. 100,000 sessions at 32 KiB each are 3 GiB; 10,000 bridges hold at most 5 GiB when every one is full.
    /// 256 bridges are 16 mux services and 240 plain connections. 60 s is the documented limit of the handshake.
    fn default() -> Self {
        Self {
            max_unauthenticated: 1024,
            max_unauthenticated_per_address: 64,
            max_sessions: 100_000,
            max_bridges: 10_000,
            max_bridges_per_device: 256,
            max_pending_per_device: 16,
            tls_handshake_timeout: Duration::from_secs(5),
            request_head_timeout: Duration::from_secs(10),
            request_body_timeout: Duration::from_secs(30),
            write_stall_timeout: Duration::from_secs(30),
            stream_handshake_timeout: Duration::from_secs(60),
            drain_timeout: Duration::from_secs(30),
            max_token_lifetime: None,
        }
    }
}

/// `[resource_log]`: one DeviceStreams record per initiation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResourceLogConfig {
    /// The file; rotated ones are `file.1`, `file.2`, ...
    pub file: PathBuf,
    /// A file that has grown to this size is rotated.
    pub max_size: u64,
    /// How many rotated files are kept.
    pub keep: u32,
    /// Write the records to standard output too.
    pub stdout: bool,
}

impl ResourceLogConfig {
    /// Most rotated files: each rotation looks at them all.
    pub const MAX_KEEP: u32 = 1000;

    /// The default: in the hub's state folder, at most 144 MiB, about 200,000 initiations.
    pub fn in_folder(state_dir: &std::path::Path) -> Self {
        Self { file: state_dir.join("device-streams.log"), max_size: 16 << 20, keep: 8, stdout: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_without_devices_reaches_all_and_with_them_only_those() {
        let mut policy = PolicyRule {
            name: "service".parse().unwrap(),
            rights: Rights::SERVICE_CONNECT,
            primary_key: Secret::new([1; 32]),
            secondary_key: None,
            devices: Vec::new(),
        };
        let reaches = |policy: &PolicyRule, id: &str| policy.may_reach(&id.parse().unwrap());
        assert!(reaches(&policy, "anything"));
        policy.devices = vec![DevicePattern::Exact("pump-17".parse().unwrap()), DevicePattern::Prefix("kiosk-".into())];
        assert!(reaches(&policy, "pump-17") && reaches(&policy, "kiosk-9"));
        assert!(!reaches(&policy, "pump-171") && !reaches(&policy, "Kiosk-9"));
    }

    #[test]
    fn a_public_url_always_shows_its_port() {
        let url = |host: &str| PublicUrl { host: host.into(), port: 443 }.to_string();
        assert_eq!(url("hub.example.com"), "https://hub.example.com:443");
        assert_eq!(url("::1"), "https://[::1]:443");
    }
}
