//! The parts of a configuration that several daemons share.
//!
//! Owns addresses, files with their contents, the proxy, logging and metrics. Does not know TOML.
//! Invariant: an address prints as it is written in a configuration file.

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use crate::base::Secret;

/// Where a forward listens: `host:port` or `unix:/path`. A host is a name, an IPv4 address or an IPv6 address in
/// brackets.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ListenAddress {
    /// `host:port`, checked to be just that.
    Tcp(String),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

/// What a target dials: the same spellings as where a forward listens.
pub type TargetAddress = ListenAddress;

/// Why a text is not an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an address; write it like \"127.0.0.1:22\", \"[::1]:22\", \"host:22\" or \"unix:/run/app.sock\"")]
pub struct AddressError(String);

/// Longest path of a Unix socket in bytes: `sun_path` without its final zero, from unix(7).
const MAX_SOCKET_PATH: usize = 107;

impl ListenAddress {
    /// The port of a TCP address.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Tcp(address) => address.rsplit_once(':').and_then(|(_, port)| port.parse().ok()),
            Self::Unix(_) => None,
        }
    }

    /// The host of a TCP address, without the brackets of IPv6.
    pub fn host(&self) -> Option<&str> {
        match self {
            Self::Tcp(address) => {
                address.rsplit_once(':').map(|(host, _)| host.trim_start_matches('[').trim_end_matches(']'))
            }
            Self::Unix(_) => None,
        }
    }
}

impl FromStr for ListenAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let error = || AddressError(text.into());
        if let Some(path) = text.strip_prefix("unix:") {
            let fits = path.starts_with('/') && path.len() <= MAX_SOCKET_PATH && !path.contains('\0');
            return fits.then(|| Self::Unix(path.into())).ok_or_else(error);
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(error)?;
        if host_is_valid(host) && port_is_valid(port) { Ok(Self::Tcp(text.into())) } else { Err(error()) }
    }
}

fn port_is_valid(port: &str) -> bool {
    port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok()
}

/// A host name, an IPv4 address, or an IPv6 address in brackets (with a zone, as in `[fe80::1%eth0]`).
pub(crate) fn host_is_valid(host: &str) -> bool {
    // What names of hosts and of network interfaces consist of.
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if let Some(inner) = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
        let (address, zone) = inner.split_once('%').unwrap_or((inner, "0"));
        return address.parse::<std::net::Ipv6Addr>().is_ok() && !zone.is_empty() && zone.chars().all(allowed);
    }
    let looks_numeric = host.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    !host.is_empty()
        && host.len() <= 253
        && host.chars().all(allowed)
        && (!looks_numeric || host.parse::<Ipv4Addr>().is_ok())
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A file that the configuration names, and what it held when the configuration was loaded. Two of them are equal
/// when path and contents are: a renewed certificate is a change.
#[derive(Clone, PartialEq, Eq)]
pub struct FileContents {
    /// Where it was read, for messages.
    pub path: PathBuf,
    /// What it held.
    pub contents: Vec<u8>,
}

impl fmt::Debug for FileContents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes)", self.path.display(), self.contents.len())
    }
}

/// A file whose contents must never be printed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SecretFile {
    /// Where it was read, for messages.
    pub path: PathBuf,
    /// What it held.
    pub secret: Secret,
}

/// A certificate chain and its private key, both PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// The chain, the end's own certificate first.
    pub certificate: FileContents,
    /// The private key.
    pub private_key: SecretFile,
}

/// How to get out to the hub.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ProxyRule {
    /// No `proxy` key: `HTTPS_PROXY` and `NO_PROXY` of the environment decide.
    #[default]
    Environment,
    /// `proxy = "off"`: always straight to the hub, whatever the environment says.
    Off,
    /// `proxy = "http://user@host:port"`: always through this HTTP CONNECT proxy.
    Via(Proxy),
}

/// An HTTP CONNECT proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// Its host name or address, without brackets.
    pub host: String,
    /// Its port.
    pub port: u16,
    /// The user for basic authentication.
    pub user: Option<String>,
    /// The password, from `proxy_password_file`.
    pub password: Option<Secret>,
}

/// Memory of mux and link, in device and service alike. The reasons for the numbers stand at [`Default`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkLimits {
    /// Most channels on one device stream.
    pub max_channels: u32,
    /// Most received bytes that wait in the mux, over all channels of one device stream.
    pub max_buffered: usize,
    /// Most bytes that one link keeps for a resume.
    pub max_replay: usize,
    /// Most bytes that all links of the process together keep for a resume.
    pub max_replay_total: usize,
}

impl Default for LinkLimits {
    /// 4096 channels are more than any browser fleet behind one operator opens; 8 MiB keep a small device within
    /// 32 MiB of memory at worst; 32 MiB of replay are 2.5 Gbit/s at 100 ms; 256 MiB are eight such links.
    fn default() -> Self {
        Self { max_channels: 4096, max_buffered: 8 << 20, max_replay: 32 << 20, max_replay_total: 256 << 20 }
    }
}

/// Received bytes that wait in the mux where there is memory, as services run where there is: 256 downloads that a person
/// has paused hold 256 KiB each, and one download over 300 ms at 1 Gbit/s needs 38 MiB on the way.
const AMPLE_BUFFERED: usize = 64 << 20;
/// From this much memory on a device has it, too: 16 services at their worst take half of it.
const LARGE_MACHINE: u64 = 2 << 30;
/// Below this much memory a machine is small (issue 4: routers, gateways, containers).
const SMALL_MACHINE: u64 = 256 << 20;

impl LinkLimits {
    /// The defaults on a machine, or within a memory limit, of that size: on small ones a link keeps 4 MiB and
    /// all together four times as much; on large ones an upload gets the window that a fast long path needs.
    pub fn for_memory(bytes: Option<u64>) -> Self {
        match bytes {
            Some(bytes) if bytes < SMALL_MACHINE => {
                Self { max_replay: 4 << 20, max_replay_total: 16 << 20, ..Self::default() }
            }
            Some(bytes) if bytes >= LARGE_MACHINE => Self { max_buffered: AMPLE_BUFFERED, ..Self::default() },
            _ => Self::default(),
        }
    }

    /// The same for a service, which receives what many devices send.
    pub fn for_service(bytes: Option<u64>) -> Self {
        match bytes {
            Some(bytes) if bytes < SMALL_MACHINE => Self::for_memory(Some(bytes)),
            _ => Self { max_buffered: AMPLE_BUFFERED, ..Self::default() },
        }
    }
}

/// `[metrics]`: where `/metrics`, `/healthz` and `/readyz` are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricsConfig {
    /// The address, or none with `listen = "off"`.
    pub listen: Option<SocketAddr>,
    /// Names that a `Host` header may carry beside loopback names and the address itself.
    pub allowed_hosts: Vec<String>,
}

impl MetricsConfig {
    /// On loopback, at the role's own port.
    pub fn on_loopback(port: u16) -> Self {
        Self { listen: Some((Ipv4Addr::LOCALHOST, port).into()), allowed_hosts: Vec::new() }
    }
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// `info`, or with exceptions: `info,culvert::hub=debug`. Checked; fit for `tracing_subscriber`'s `Targets`.
    pub level: String,
    /// The form of the lines.
    pub format: LogFormat,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Auto }
    }
}

/// The form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// Text on a terminal, journald under systemd, JSON otherwise.
    #[default]
    Auto,
    /// Text, for people.
    Text,
    /// One JSON object per line.
    Json,
    /// Straight to journald, with fields.
    Journald,
}

/// How long a detached link is kept: long enough for a hub upgrade, a tunnel under a mountain or a change of
/// networks; short enough that a dead peer's memory comes back.
pub(super) const DEFAULT_RESUME_FOR: Duration = Duration::from_secs(15 * 60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_holds_what_its_memory_allows() {
        let held = |mebibytes: u64| {
            let limits = LinkLimits::for_memory(Some(mebibytes << 20));
            (limits.max_buffered >> 20, limits.max_replay >> 20)
        };
        assert_eq!([held(128), held(512), held(4096)], [(8, 4), (8, 32), (64, 32)]);
        assert_eq!(LinkLimits::for_memory(None), LinkLimits::default());
    }

    #[test]
    fn addresses_print_as_they_are_written() {
        for text in [
            "127.0.0.1:22",
            "[::1]:22",
            "host.example:8080",
            "[fe80::1%eth0.100]:22",
            "[fe80::1%br-lan]:22",
            "unix:/run/app.sock",
        ] {
            assert_eq!(text.parse::<ListenAddress>().unwrap().to_string(), text);
        }
        let v6: ListenAddress = "[::1]:22".parse().unwrap();
        assert_eq!((v6.host(), v6.port()), (Some("::1"), Some(22)));
    }

    #[test]
    fn what_is_not_an_address_is_refused() {
        let long = format!("unix:/{}", "x".repeat(MAX_SOCKET_PATH));
        for text in [
            "",
            "22",
            ":22",
            "[fe80::1%]:22",
            "[fe80::1%e/0]:22",
            "host",
            "host:",
            "host:+22",
            "host:65536",
            "::1:22",
            "1.2.3:22",
            "a b:1",
            "unix:x",
            &long,
        ] {
            assert!(text.parse::<ListenAddress>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_key_file_prints_its_path_only() {
        let file = SecretFile { path: "/etc/k".into(), secret: Secret::new("canary") };
        let pem = FileContents { path: "/etc/c".into(), contents: b"canary".to_vec() };
        assert_eq!(format!("{file:?} {pem:?}"), r#"SecretFile { path: "/etc/k", secret: [secret] } /etc/c (6 bytes)"#);
    }
}
