//! Connecting: resolve, filter, race.
//!
//! Owns happy eyeballs (RFC 8305): addresses of both families in turn, a new attempt every 250 ms, the first that
//! connects wins. Does not know sockets' purposes. Invariant: no attempt outlives the call.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use socket2::SockRef;
use tokio::{
    net::{TcpStream, UnixStream},
    time::{Instant, sleep_until, timeout},
};

use super::{Endpoint, Socket, tune_flow};

/// The pause before the next address is tried beside the others: RFC 8305, section 5, recommends 250 ms.
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Addresses of one name that are tried; no real name has more that differ in anything.
const MAX_ADDRESSES: usize = 16;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The name could not be resolved.
    #[error("cannot resolve {host} ({source}): is the name right, and is DNS reachable from here?")]
    Resolve {
        /// The name.
        host: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// The name has no address.
    #[error("{0} has no address")]
    NoAddress(String),
    /// All addresses are forbidden.
    #[error("{host} is {address}, which is not allowed")]
    NotAllowed {
        /// The name.
        host: String,
        /// One of its addresses.
        address: IpAddr,
    },
    /// The last of the addresses failed like this.
    #[error("cannot connect to {address}: {}", reason(source))]
    Failed {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The Unix socket failed like this.
    #[error("cannot connect to {path}: {}", reason(source))]
    Unix {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No answer in time.
    #[error("{host} did not answer within {} s: is it up, and does a firewall drop the packets?", .after.as_secs())]
    Timeout {
        /// The name.
        host: String,
        /// The limit.
        after: Duration,
    },
}

impl ConnectError {
    /// The other end said no: nothing listens there.
    pub fn is_refused(&self) -> bool {
        let (Self::Failed { source, .. } | Self::Unix { source, .. }) = self else { return false };
        matches!(source.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
    }
}

/// The error in a person's words.
fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "refused (nothing listens there, or a firewall rejects it)".into(),
        io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable => "no route to it".into(),
        io::ErrorKind::TimedOut => "no answer".into(),
        _ => error.to_string(),
    }
}

/// Connects to an endpoint. Only addresses that `allowed` approves are tried.
pub async fn connect(
    endpoint: &Endpoint,
    limit: Duration,
    allowed: &(dyn Fn(IpAddr) -> bool + Sync),
) -> Result<Socket, ConnectError> {
    match endpoint {
        Endpoint::Tcp { host, port } => {
            let socket = connect_tcp(host, *port, limit, allowed).await?;
            if is_this_host(host) {
                // It cannot vanish without us: four system calls for keepalive are saved.
                let _ = socket.set_nodelay(true);
            } else {
                tune_flow(&SockRef::from(&socket));
            }
            Ok(Socket::Tcp(socket))
        }
        Endpoint::Unix(path) => match timeout(limit, UnixStream::connect(path)).await {
            Ok(Ok(socket)) => Ok(Socket::Unix(socket)),
            Ok(Err(source)) => Err(ConnectError::Unix { path: path.clone(), source }),
            Err(_) => Err(ConnectError::Timeout { host: path.display().to_string(), after: limit }),
        },
    }
}

/// True for a loopback address, and for `localhost`, which is never another host (RFC 6761, section 6.3).
fn is_this_host(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Connects to a host by name or address. Only addresses that `allowed` approves are tried.
pub async fn connect_tcp(
    host: &str,
    port: u16,
    limit: Duration,
    allowed: &(dyn Fn(IpAddr) -> bool + Sync),
) -> Result<TcpStream, ConnectError> {
    let attempt = async {
        let addresses = resolve(host, port, allowed).await?;
        race(host, addresses).await
    };
    let timed_out = |_| ConnectError::Timeout { host: host.to_owned(), after: limit };
    timeout(limit, attempt).await.map_err(timed_out)?
}

/// The addresses of a host in the order in which they are tried.
async fn resolve(
    host: &str,
    port: u16,
    allowed: &(dyn Fn(IpAddr) -> bool + Sync),
) -> Result<Vec<SocketAddr>, ConnectError> {
    let found = tokio::net::lookup_host((host, port)).await;
    let found: Vec<_> =
        found.map_err(|source| ConnectError::Resolve { host: host.to_owned(), source })?.take(MAX_ADDRESSES).collect();
    let first = found.first().ok_or_else(|| ConnectError::NoAddress(host.to_owned()))?.ip();
    let permitted: Vec<_> = found.into_iter().filter(|address| allowed(canonical(address.ip()))).collect();
    if permitted.is_empty() {
        return Err(ConnectError::NotAllowed { host: host.to_owned(), address: first });
    }
    Ok(interleave(permitted))
}

/// `::ffff:169.254.169.254` is 169.254.169.254 to the kernel, so it must be to a filter.
fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

/// Both families in turn, beginning with that of the first address (the resolver has sorted by RFC 6724).
fn interleave(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let first_is_v6 = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (preferred, other): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == first_is_v6);
    let mut other = other.into_iter();
    let mut mixed: Vec<_> = preferred.into_iter().flat_map(|address| [Some(address), other.next()]).flatten().collect();
    mixed.extend(other);
    mixed
}

async fn race(host: &str, addresses: Vec<SocketAddr>) -> Result<TcpStream, ConnectError> {
    let mut waiting = addresses.into_iter();
    let mut running = FuturesUnordered::new();
    let mut last = ConnectError::NoAddress(host.to_owned());
    let mut next_at = Instant::now();
    loop {
        tokio::select! {
            biased;
            Some((address, result)) = running.next(), if !running.is_empty() => match result {
                Ok(socket) => return Ok(socket),
                Err(source) => {
                    last = ConnectError::Failed { address, source };
                    // A failure makes room for the next attempt at once.
                    next_at = Instant::now();
                }
            },
            () = sleep_until(next_at), if waiting.len() > 0 => {
                if let Some(address) = waiting.next() {
                    running.push(async move { (address, TcpStream::connect(address).await) });
                    next_at = Instant::now() + ATTEMPT_DELAY;
                }
            }
            else => return Err(last),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: &(dyn Fn(IpAddr) -> bool + Sync) = &|_| true;
    const LIMIT: Duration = Duration::from_secs(5);

    #[test]
    fn families_take_turns() {
        let parse = |text: &str| text.parse::<SocketAddr>().unwrap();
        let mixed = interleave(["[::1]:1", "[::2]:1", "[::3]:1", "1.1.1.1:1"].map(parse).to_vec());
        assert_eq!(mixed, ["[::1]:1", "1.1.1.1:1", "[::2]:1", "[::3]:1"].map(parse));
    }

    #[tokio::test]
    async fn a_refusal_does_not_hold_up_the_next_address() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let good = listener.local_addr().unwrap();
        let closed = SocketAddr::from(([127, 0, 0, 2], good.port()));
        let began = Instant::now();
        let socket = race("test", vec![closed, good]).await.unwrap();
        assert_eq!(socket.peer_addr().unwrap(), good);
        assert!(began.elapsed() < ATTEMPT_DELAY);
        let error = race("test", vec![closed]).await.unwrap_err();
        assert!(error.is_refused(), "{error}");
        assert!(error.to_string().contains("nothing listens there"), "{error}");
    }

    #[tokio::test]
    async fn forbidden_addresses_are_not_touched() {
        let not_loopback: &(dyn Fn(IpAddr) -> bool + Sync) = &|address| !address.is_loopback();
        let error = connect_tcp("127.0.0.1", 9, LIMIT, not_loopback).await.unwrap_err();
        assert_eq!(error.to_string(), "127.0.0.1 is 127.0.0.1, which is not allowed");
        let error = connect_tcp("::ffff:127.0.0.1", 9, LIMIT, not_loopback).await.unwrap_err();
        assert!(matches!(error, ConnectError::NotAllowed { .. }), "{error}");
    }

    #[tokio::test]
    async fn an_unknown_name_says_so() {
        let error = connect_tcp("no-such-host.invalid", 443, LIMIT, ANY).await.unwrap_err();
        assert!(error.to_string().starts_with("cannot resolve no-such-host.invalid"), "{error}");
    }
}
