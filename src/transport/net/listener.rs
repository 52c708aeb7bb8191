//! Listening sockets, TCP and Unix.
//!
//! Owns binding, stale Unix sockets, and accepting under shortage of file descriptors. Does not know what is done with
//! a connection. Invariant: `accept` never spins and never gives up.

use std::{
    fmt, fs, io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use socket2::{Domain, Protocol, SockRef, Type};
use tokio::{
    net::{TcpListener, UnixListener},
    time::timeout,
};

use super::{Endpoint, Socket, tune_flow};

/// Connections that wait to be accepted: bursts of hundreds are normal for HTTP forwards.
const BACKLOG: i32 = 1024;
/// A name to listen on is one of this machine's, from the hosts file or a resolver nearby: one that answers later is
/// asked again at the next try.
const RESOLVE: Duration = Duration::from_secs(3);
/// The pause after a failed accept doubles from here...
const MIN_PAUSE: Duration = Duration::from_millis(10);
/// ...to here: a freed descriptor is used within a second.
const MAX_PAUSE: Duration = Duration::from_secs(1);

/// Why a listener could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address is in use.
    #[error("cannot listen on {0}: another program already does (see: ss -ltnpx)")]
    InUse(Endpoint),
    /// The address is not this machine's.
    #[error("cannot listen on {0}: this machine has no such address")]
    NotLocal(Endpoint),
    /// Ports below 1024, or a folder we may not write to.
    #[error("cannot listen on {0}: permission denied ({hint})", hint = denied(.0))]
    Denied(Endpoint),
    /// Something that is not a socket has the path.
    #[error("cannot listen on {0}: there is a file of that name that is not a socket")]
    NotSocket(Endpoint),
    /// The host name of the address could not be resolved.
    #[error("cannot listen on {0}: the name has no address")]
    Unresolved(Endpoint),
    /// Nobody answered what the host name's address is.
    #[error("cannot listen on {0}: the name was not resolved within {limit} s", limit = RESOLVE.as_secs())]
    Resolving(Endpoint),
    /// Anything else.
    #[error("cannot listen on {endpoint}: {problem}")]
    Other {
        /// The address.
        endpoint: Endpoint,
        /// Why.
        problem: io::Error,
    },
}

fn denied(endpoint: &Endpoint) -> &'static str {
    match endpoint {
        Endpoint::Tcp { .. } => "ports below 1024 need CAP_NET_BIND_SERVICE",
        Endpoint::Unix(_) => "who runs the daemon may not write to the socket's folder",
    }
}

impl BindError {
    fn new(endpoint: &Endpoint, source: io::Error) -> Self {
        let endpoint = endpoint.clone();
        match source.kind() {
            io::ErrorKind::AddrInUse => Self::InUse(endpoint),
            io::ErrorKind::AddrNotAvailable => Self::NotLocal(endpoint),
            io::ErrorKind::PermissionDenied => Self::Denied(endpoint),
            _ => Self::Other { endpoint, problem: source },
        }
    }
}

/// Who connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// A TCP address.
    Tcp(SocketAddr),
    /// A process on this machine.
    Unix,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix => f.write_str("unix"),
        }
    }
}

/// A listening socket. A Unix socket's file is removed on drop.
#[derive(Debug)]
pub struct Listener {
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Tcp(TcpListener),
    Unix { listener: UnixListener, path: PathBuf, inode: u64 },
}

impl Listener {
    /// Opens a listener. `unix_mode` is the permission of a Unix socket's file, for example 0o600.
    pub async fn bind(endpoint: &Endpoint, unix_mode: u32) -> Result<Self, BindError> {
        let kind = match endpoint {
            Endpoint::Tcp { host, port } => {
                let address = first_of(tokio::net::lookup_host((host.as_str(), *port)), endpoint).await?;
                Kind::Tcp(bind_tcp(address).map_err(|source| BindError::new(endpoint, source))?)
            }
            Endpoint::Unix(path) => bind_unix(path, unix_mode, endpoint)?,
        };
        Ok(Self { kind })
    }

    /// Where it listens, with the port that the kernel chose.
    pub fn endpoint(&self) -> io::Result<Endpoint> {
        match &self.kind {
            Kind::Tcp(listener) => {
                let address = listener.local_addr()?;
                Ok(Endpoint::Tcp { host: address.ip().to_string(), port: address.port() })
            }
            Kind::Unix { path, .. } => Ok(Endpoint::Unix(path.clone())),
        }
    }

    /// Waits for the next connection. Failures are the kernel's (no descriptors, no memory) or the client's (it left):
    /// the former pause accepting with growing delays, the latter do not matter.
    pub async fn accept(&self) -> (Socket, Peer) {
        let mut pause = MIN_PAUSE;
        loop {
            match self.try_accept().await {
                Ok(accepted) => return accepted,
                Err(error) if is_clients_fault(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, pause_ms = pause.as_millis(), "cannot accept a connection; waiting");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(MAX_PAUSE);
                }
            }
        }
    }

    async fn try_accept(&self) -> io::Result<(Socket, Peer)> {
        match &self.kind {
            Kind::Tcp(listener) => {
                let (socket, peer) = listener.accept().await?;
                if cfg!(not(target_os = "linux")) {
                    tune_flow(&SockRef::from(&socket));
                }
                Ok((Socket::Tcp(socket), Peer::Tcp(peer)))
            }
            Kind::Unix { listener, .. } => {
                let (socket, _) = listener.accept().await?;
                Ok((Socket::Unix(socket), Peer::Unix))
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Kind::Unix { path, inode, .. } = &self.kind
            && inode_of(path).is_some_and(|current| current == *inode)
        {
            // Left behind, it would be recognised as stale at the next start.
            let _ = fs::remove_file(path);
        }
    }
}

/// The first address that the look-up yields, in time.
async fn first_of<A: Iterator<Item = SocketAddr>>(
    lookup: impl Future<Output = io::Result<A>>,
    endpoint: &Endpoint,
) -> Result<SocketAddr, BindError> {
    let found = timeout(RESOLVE, lookup).await.map_err(|_| BindError::Resolving(endpoint.clone()))?;
    found.ok().and_then(|mut found| found.next()).ok_or_else(|| BindError::Unresolved(endpoint.clone()))
}

fn is_clients_fault(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

/// An IPv6 address means IPv6 only, so that `0.0.0.0` and `[::]` can stand side by side.
fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket2::Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    tune_flow(&SockRef::from(&socket));
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Binds under a passing name, sets the mode, then renames: nobody can connect before the mode is right, and no
/// moment has neither the old nor the new socket.
fn bind_unix(path: &Path, mode: u32, endpoint: &Endpoint) -> Result<Kind, BindError> {
    refuse_living(path, endpoint)?;
    let failed = |source| BindError::new(endpoint, source);
    let passing = path.with_extension(format!("{}.new", std::process::id()));
    let _ = fs::remove_file(&passing);
    let listener = UnixListener::bind(&passing).map_err(failed)?;
    let install = || {
        fs::set_permissions(&passing, fs::Permissions::from_mode(mode))?;
        fs::rename(&passing, path)
    };
    if let Err(source) = install() {
        let _ = fs::remove_file(&passing);
        return Err(failed(source));
    }
    Ok(Kind::Unix { listener, path: path.to_owned(), inode: inode_of(path).unwrap_or_default() })
}

/// A socket file is replaced only if nobody answers behind it.
fn refuse_living(path: &Path, endpoint: &Endpoint) -> Result<(), BindError> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    if !metadata.file_type().is_socket() {
        return Err(BindError::NotSocket(endpoint.clone()));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound) => Ok(()),
        Err(source) => Err(BindError::new(endpoint, source)),
        Ok(_) => Err(BindError::InUse(endpoint.clone())),
    }
}

fn inode_of(path: &Path) -> Option<u64> {
    fs::symlink_metadata(path).ok().map(|metadata| metadata.ino())
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::transport::net::connect;

    const LIMIT: Duration = Duration::from_secs(5);

    fn scratch(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("culvert-net-{}-{name}", getrandom::u64().unwrap()))
    }

    async fn joined(listener: &Listener) -> (Socket, Socket) {
        let endpoint = listener.endpoint().unwrap();
        let (near, (far, _)) = tokio::join!(connect(&endpoint, LIMIT, &|_| true), listener.accept());
        (near.unwrap(), far)
    }

    #[tokio::test]
    async fn both_kinds_carry_bytes_and_half_close() {
        let unix = Endpoint::Unix(scratch("both"));
        for endpoint in ["127.0.0.1:0".parse().unwrap(), "[::1]:0".parse().unwrap(), unix] {
            let listener = Listener::bind(&endpoint, 0o600).await.unwrap();
            let (mut near, mut far) = joined(&listener).await;
            near.write_all(b"question").await.unwrap();
            near.shutdown().await.unwrap();
            let mut got = String::new();
            far.read_to_string(&mut got).await.unwrap();
            far.write_all(b"answer").await.unwrap();
            far.shutdown().await.unwrap();
            near.read_to_string(&mut got).await.unwrap();
            assert_eq!(got, "questionanswer", "{endpoint}");
        }
    }

    #[tokio::test]
    async fn an_accepted_connection_has_the_options_of_its_listener() {
        let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap(), 0).await.unwrap();
        let (_near, far) = joined(&listener).await;
        let Socket::Tcp(far) = &far else { panic!("not TCP") };
        let options = SockRef::from(far);
        assert!(options.tcp_nodelay().unwrap() && options.keepalive().unwrap());
        assert_eq!(options.tcp_keepalive_time().unwrap(), crate::transport::net::FLOW_KEEPALIVE);
    }

    #[tokio::test]
    async fn a_reset_is_seen_as_one() {
        let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap(), 0).await.unwrap();
        let (near, mut far) = joined(&listener).await;
        near.reset();
        let error = far.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test]
    async fn a_port_that_is_taken_says_so() {
        let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap(), 0).await.unwrap();
        let taken = listener.endpoint().unwrap();
        let error = Listener::bind(&taken, 0).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("cannot listen on {taken}: another program already does (see: ss -ltnpx)")
        );
        let foreign = Listener::bind(&"192.0.2.1:0".parse().unwrap(), 0).await.unwrap_err();
        assert!(matches!(foreign, BindError::NotLocal(_)), "{foreign}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_that_nobody_resolves_is_given_up_soon() {
        let endpoint = "nas.example:8080".parse().unwrap();
        let lookup = std::future::pending::<io::Result<std::vec::IntoIter<SocketAddr>>>();
        let error = first_of(lookup, &endpoint).await.unwrap_err();
        assert_eq!(error.to_string(), "cannot listen on nas.example:8080: the name was not resolved within 3 s");
    }

    #[tokio::test]
    async fn both_families_share_a_port() {
        let four = Listener::bind(&"0.0.0.0:0".parse().unwrap(), 0).await.unwrap();
        let Endpoint::Tcp { port, .. } = four.endpoint().unwrap() else { panic!("not TCP") };
        Listener::bind(&format!("[::]:{port}").parse().unwrap(), 0).await.unwrap();
    }

    #[tokio::test]
    async fn a_unix_socket_has_its_mode_replaces_the_dead_and_spares_the_living() {
        let path = scratch("unix");
        let endpoint = Endpoint::Unix(path.clone());
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a dead socket is left behind");
        let living = Listener::bind(&endpoint, 0o600).await.unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let error = Listener::bind(&endpoint, 0o600).await.unwrap_err();
        assert!(matches!(error, BindError::InUse(_)), "{error}");
        drop(living);
        assert!(!path.exists());
        fs::write(&path, "precious").unwrap();
        let error = Listener::bind(&endpoint, 0o600).await.unwrap_err();
        assert!(matches!(error, BindError::NotSocket(_)), "{error}");
        fs::remove_file(&path).unwrap();
    }
}
