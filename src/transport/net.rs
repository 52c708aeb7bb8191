//! Plain sockets: TCP and Unix, connected and accepted.
//!
//! Owns addresses, name resolution, the race of addresses, socket options and listeners. Does not know TLS, proxies
//! or who is allowed what. Invariant: names are resolved anew at every connect, and the address that a filter saw is
//! the address that is connected to.

mod carrier_socket;
mod connect;
mod listener;
mod socket;

use std::{
    fmt, io,
    net::{SocketAddr, UdpSocket},
    path::PathBuf,
    str::FromStr,
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

pub use carrier_socket::CarrierSocket;
pub use connect::{ConnectError, connect, connect_tcp};
pub use listener::{BindError, Listener, Peer};
pub use socket::Socket;

/// Unacknowledged data for this long ends a carrier; the same as the ping's verdict.
const USER_TIMEOUT: Duration = Duration::from_secs(37);
/// Carriers are pinged above TCP; this is for the time when nobody reads them.
const CARRIER_KEEPALIVE: Duration = Duration::from_secs(30);
/// Between application and daemon: a host that vanished is noticed within two minutes.
const FLOW_KEEPALIVE: Duration = Duration::from_secs(60);
/// Between keepalive probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// Unanswered keepalive probes before the end.
const KEEPALIVE_RETRIES: u32 = 4;

/// Where to connect to or to listen: `host:port`, `[v6]:port` or `unix:/path`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// A host name or address, without brackets, and a port.
    Tcp {
        /// Host name or address.
        host: String,
        /// Port.
        port: u16,
    },
    /// The path of a Unix socket.
    Unix(PathBuf),
}

/// Why a text is not an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an address; write \"host:port\", \"[::1]:port\" or \"unix:/path\"")]
pub struct EndpointError(String);

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let error = || EndpointError(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            let is_path = path.starts_with('/') && !path.contains('\0');
            return if is_path { Ok(Self::Unix(path.into())) } else { Err(error()) };
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(error)?;
        let unbracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        if unbracketed.is_none() && host.contains([':', '[', ']']) {
            return Err(error());
        }
        let host = unbracketed.unwrap_or(host);
        let is_port = port.bytes().all(|byte| byte.is_ascii_digit());
        if host.is_empty() || !is_port || host.contains(|c: char| c.is_whitespace() || c.is_control() || c == '/') {
            return Err(error());
        }
        Ok(Self::Tcp { host: host.to_owned(), port: port.parse().map_err(|_| error())? })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Sets the options of a carrier's socket. A kernel that refuses one of them costs comfort, not correctness.
pub fn tune_carrier(socket: &TcpStream) {
    let options = SockRef::from(socket);
    let _ = options.set_tcp_nodelay(true);
    let _ = options.set_tcp_keepalive(&keepalive(CARRIER_KEEPALIVE));
    #[cfg(target_os = "linux")]
    let _ = options.set_tcp_user_timeout(Some(USER_TIMEOUT));
}

/// Has what has come acknowledged now. A client that leaves Nagle's algorithm on (Python's bare `ssl`, the C SDK) holds
/// its request back until the last flight of its handshake is acknowledged, and the server of TLS 1.3 has nothing to say
/// then: the kernel would wait 40 ms for something to send along.
pub fn acknowledge_now(socket: &TcpStream) {
    // A kernel without the option costs these 40 ms.
    #[cfg(target_os = "linux")]
    let _ = SockRef::from(socket).set_tcp_quickack(true);
}

/// Takes back what would end a plain carrier whose far reader pauses: Linux counts probes of a closed window against
/// the user timeout, and a reader may pause for ever. Pings judge such a carrier (`CarrierOptions::PLAIN`).
pub fn tolerate_pauses(socket: &TcpStream) {
    #[cfg(target_os = "linux")]
    let _ = SockRef::from(socket).set_tcp_user_timeout(None);
}

/// Sets the options of a socket between an application and a daemon, or of the listening socket that hands them down:
/// tcp(7) and socket(7) options are inherited on Linux, which saves five system calls per connection.
fn tune_flow(options: &SockRef<'_>) {
    let _ = options.set_tcp_nodelay(true);
    let _ = options.set_tcp_keepalive(&keepalive(FLOW_KEEPALIVE));
}

/// False if this host does not have the address, or no longer: nothing that is sent to it arrives here. A host that
/// binds addresses it does not have (`ip_nonlocal_bind`) is believed.
pub fn is_own_address(mut address: SocketAddr) -> bool {
    address.set_port(0);
    let bound = UdpSocket::bind(address);
    !bound.is_err_and(|error| error.kind() == io::ErrorKind::AddrNotAvailable)
}

fn keepalive(idle: Duration) -> TcpKeepalive {
    TcpKeepalive::new().with_time(idle).with_interval(KEEPALIVE_INTERVAL).with_retries(KEEPALIVE_RETRIES)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_knows_its_own_addresses() {
        for (address, own) in [("127.0.0.1:1", true), ("127.9.9.9:443", true), ("192.0.2.1:1", false)] {
            assert_eq!(is_own_address(address.parse().unwrap()), own, "{address}");
        }
    }

    #[test]
    fn endpoints_survive_a_round_trip() {
        for text in ["127.0.0.1:22", "[::1]:2222", "db.local:5432", "unix:/run/x.sock", "localhost:0"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
        let long =
            ["", "x", ":22", "host", "host:", "host:x", "host:65536", "::1:22", "[::1:22", "h:+1", "unix:x", "a b:1"];
        for bad in long {
            assert!(bad.parse::<Endpoint>().is_err(), "{bad}");
        }
    }
}
