//! Dialling the hub: resolve, connect (through a proxy if there is one), TLS.
//!
//! Owns the way to the hub and the words for its failures. Does not know what is spoken over the connection.
//! Invariant: what comes out is a TLS connection to a server that proved its name, whatever lies between.

mod proxy;
#[cfg(test)]
mod tests;

use std::{net::SocketAddr, time::Duration};

use tokio::net::TcpStream;

use super::{
    net::{CarrierSocket, ConnectError, connect_tcp},
    tls::{ClientStream, ClientTls, HandshakeError},
};

pub use proxy::{NoProxy, Proxy, ProxyError, ProxyRules, ProxySyntaxError, fuzz_proxy_answer};

/// Name resolution and all attempts to connect: three retransmissions of a SYN (1 + 2 + 4 s) fit.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A proxy connects on our behalf within its own time-outs, which are of this order.
const PROXY_TIMEOUT: Duration = Duration::from_secs(15);
/// Two round trips and a signature.
const TLS_TIMEOUT: Duration = Duration::from_secs(10);

/// Why there is no connection to the hub.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// No TCP connection.
    #[error("{0}")]
    Connect(#[source] ConnectError),
    /// The proxy could not be reached.
    #[error("the proxy {proxy} cannot be reached: {source}")]
    ProxyUnreachable {
        /// Which.
        proxy: Proxy,
        /// Why.
        source: ConnectError,
    },
    /// The proxy did not connect us.
    #[error("the proxy {proxy} {source}")]
    Proxy {
        /// Which.
        proxy: Proxy,
        /// Why.
        source: ProxyError,
    },
    /// No TLS with the server.
    #[error("no TLS connection to {host}: {source}")]
    Tls {
        /// Whom.
        host: String,
        /// Why.
        source: HandshakeError,
    },
    /// The TLS handshake took too long.
    #[error("{host} accepted the connection, but did not finish the TLS handshake within {} s: is it an HTTPS port?", TLS_TIMEOUT.as_secs())]
    TlsTimeout {
        /// Whom.
        host: String,
    },
}

impl DialError {
    /// True if the path failed (resolution, unreachable, time-out), so that another attempt soon may succeed; false
    /// if somebody said no.
    pub fn is_path_failure(&self) -> bool {
        match self {
            Self::Connect(error) | Self::ProxyUnreachable { source: error, .. } => !error.is_refused(),
            Self::Proxy { source, .. } => source.is_path_failure(),
            Self::Tls { source, .. } => source.is_path_failure(),
            Self::TlsTimeout { .. } => true,
        }
    }

    /// True if nothing listens at the address: the hub is down, or restarting.
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::Connect(error) if error.is_refused())
    }
}

/// Dials hubs. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Dialer {
    tls: ClientTls,
    proxies: ProxyRules,
}

impl Dialer {
    /// A dialler that trusts as `tls` says and goes through a proxy where `proxies` says so.
    pub fn new(tls: ClientTls, proxies: ProxyRules) -> Self {
        Self { tls, proxies }
    }

    /// Connects to `host:port`. With `address`, TCP goes there, past name resolution and proxies, and the server must
    /// still prove to be `host`.
    pub async fn connect(
        &self,
        host: &str,
        port: u16,
        address: Option<SocketAddr>,
    ) -> Result<ClientStream<CarrierSocket>, DialError> {
        let socket = match (address, self.proxies.proxy_for(host, port)) {
            (Some(address), _) => self.connect_directly(&address.ip().to_string(), address.port()).await?,
            (None, None) => self.connect_directly(host, port).await?,
            (None, Some(proxy)) => connect_through(proxy, host, port).await?,
        };
        match tokio::time::timeout(TLS_TIMEOUT, self.tls.connect(host, CarrierSocket::new(socket))).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(source)) => Err(DialError::Tls { host: host.to_owned(), source }),
            Err(_) => Err(DialError::TlsTimeout { host: host.to_owned() }),
        }
    }

    async fn connect_directly(&self, host: &str, port: u16) -> Result<TcpStream, DialError> {
        connect_tcp(host, port, CONNECT_TIMEOUT, &|_| true).await.map_err(DialError::Connect)
    }
}

async fn connect_through(proxy: &Proxy, host: &str, port: u16) -> Result<TcpStream, DialError> {
    let reached = connect_tcp(&proxy.host, proxy.port, CONNECT_TIMEOUT, &|_| true).await;
    let mut socket = reached.map_err(|source| DialError::ProxyUnreachable { proxy: proxy.clone(), source })?;
    let asked = tokio::time::timeout(PROXY_TIMEOUT, proxy.ask(&mut socket, host, port)).await;
    match asked.unwrap_or(Err(ProxyError::Timeout(PROXY_TIMEOUT))) {
        Ok(()) => Ok(socket),
        Err(source) => Err(DialError::Proxy { proxy: proxy.clone(), source }),
    }
}
