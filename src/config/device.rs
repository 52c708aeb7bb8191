//! `device.toml`: what it can say and what it says by default.
//!
//! Owns the device daemon's settings and their defaults. Does not know how a target is dialled.
//! Invariant: nothing is reachable unless a target names it.

use std::{path::PathBuf, time::Duration};

use super::parts::{
    Certificate, DEFAULT_RESUME_FOR, FileContents, LinkLimits, LogConfig, MetricsConfig, ProxyRule, TargetAddress,
};
use crate::{auth::ConnectionString, base::Name};

/// The device's metrics port: beside the hub's, so that all three can share a machine.
const METRICS_PORT: u16 = 9465;

/// Everything in `device.toml` and `targets.d/*.toml`.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceConfig {
    /// Who the device is, where its hub is and how it proves itself.
    pub connection_string: ConnectionString,
    /// The certificate for `x509=true`.
    pub certificate: Option<Certificate>,
    /// The CA that signed the hub's certificate; without it the system's roots decide.
    pub ca: Option<FileContents>,
    /// How to get out.
    pub proxy: ProxyRule,
    /// Holds the instance ID.
    pub state_dir: PathBuf,
    /// The socket for `culvert check` and `status`; none only in programs that embed the device.
    pub control_socket: Option<PathBuf>,
    /// How long a detached link is kept; zero turns resuming off.
    pub resume_for: Duration,
    /// What can be reached.
    pub targets: Vec<TargetRule>,
    /// Bounds.
    pub limits: DeviceLimits,
    /// The metrics listener.
    pub metrics: MetricsConfig,
    /// Logging.
    pub log: LogConfig,
}

impl DeviceConfig {
    /// The metrics listener when nothing is said about it.
    pub fn default_metrics() -> MetricsConfig {
        MetricsConfig::on_loopback(METRICS_PORT)
    }

    /// A device with nothing but defaults: it exposes nothing.
    pub fn new(connection_string: ConnectionString, state_dir: impl Into<PathBuf>) -> Self {
        Self {
            connection_string,
            certificate: None,
            ca: None,
            proxy: ProxyRule::default(),
            state_dir: state_dir.into(),
            control_socket: None,
            resume_for: DEFAULT_RESUME_FOR,
            targets: Vec::new(),
            limits: DeviceLimits::default(),
            metrics: Self::default_metrics(),
            log: LogConfig::default(),
        }
    }

    /// The target of that name.
    pub fn target(&self, name: &Name) -> Option<&TargetRule> {
        self.targets.iter().find(|target| target.name == *name)
    }
}

/// `[[target]]`: something that services may reach through this device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetRule {
    /// Its name; plain device streams carry it as their stream name.
    pub name: Name,
    /// What is dialled.
    pub address: TargetAddress,
    /// The policies that may use it; none given is any policy the hub lets through.
    pub policies: Option<Vec<Name>>,
    /// Most connections at once.
    pub max_connections: usize,
    /// Plain device streams: an end without a Close is an end, not a reset (SDK programs in C).
    pub plain_eof: bool,
    /// Permit link-local addresses, where clouds keep their metadata services.
    pub allow_link_local: bool,
    /// A dial that takes longer has failed.
    pub connect_timeout: Duration,
}

impl TargetRule {
    /// A target with nothing but defaults. 1024 connections are what one process may open by default on Linux;
    /// 10 s are three retransmissions of a SYN (1 + 2 + 4 s) and some.
    pub fn new(name: Name, address: TargetAddress) -> Self {
        Self {
            name,
            address,
            policies: None,
            max_connections: 1024,
            plain_eof: false,
            allow_link_local: false,
            connect_timeout: Duration::from_secs(10),
        }
    }

    /// True if that policy may use the target. A hub that names no policy reaches only targets open to all.
    pub fn allows(&self, policy: Option<&Name>) -> bool {
        match &self.policies {
            None => true,
            Some(allowed) => policy.is_some_and(|policy| allowed.contains(policy)),
        }
    }
}

/// `[limits]` of the device. The reasons for the numbers stand at [`Default`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceLimits {
    /// Most mux device streams at once, one per service daemon.
    pub max_services: usize,
    /// Most plain device streams at once.
    pub max_plain: usize,
    /// Most connections to targets at once, over all device streams.
    pub max_connections: usize,
    /// Memory of mux and link.
    pub link: LinkLimits,
}

impl Default for DeviceLimits {
    /// 16 operators at one device are a crowd. 256 plain streams leave most of the default 1024 descriptors to
    /// channels; 4096 connections are one full device stream.
    fn default() -> Self {
        Self { max_services: 16, max_plain: 256, max_connections: 4096, link: LinkLimits::default() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_with_policies_refuses_others_and_the_nameless() {
        let mut target = TargetRule::new("ssh".parse().unwrap(), "127.0.0.1:22".parse().unwrap());
        let (admin, guest) = ("admin".parse().unwrap(), "guest".parse().unwrap());
        assert!(target.allows(Some(&guest)) && target.allows(None));
        target.policies = Some(vec!["admin".parse().unwrap()]);
        assert!(target.allows(Some(&admin)) && !target.allows(Some(&guest)) && !target.allows(None));
    }
}
