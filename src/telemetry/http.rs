//! The loopback listener with `/metrics`, `/healthz` and `/readyz`.
//!
//! Owns the socket, its connections and their limits. Does not know what is measured.
//! Invariant: a request whose Host is a name that we do not go by is refused, so that a web page in the
//! operator's browser cannot read it by pointing its own name at this address (DNS rebinding).

use std::{convert::Infallible, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::{Registry, TextEncoder};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use super::health::{ForwardHealth, Health};

/// Connections at once: a few scrapers and a person or two; more are left in the kernel's backlog.
const MAX_CONNECTIONS: usize = 32;
/// Time for a request's head, and with keep-alive between requests: above Prometheus' default interval of 60 s,
/// so that a scraper keeps its connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// Bytes of a request's head; also hyper's smallest buffer.
const MAX_HEAD: usize = 8192;
/// After a failed accept (no descriptor left), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Why the listener could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("the metrics listener cannot be opened on {address}")]
pub struct BindError {
    address: SocketAddr,
    #[source]
    source: io::Error,
}

/// A bound listener that serves nothing yet.
pub struct Server {
    listener: TcpListener,
    addr: SocketAddr,
    names: Vec<String>,
}

impl Server {
    /// Binds `address`. Beside addresses, `localhost` and this machine's own name, a Host header may carry
    /// `allowed_hosts`.
    pub async fn bind(address: SocketAddr, allowed_hosts: &[String]) -> Result<Self, BindError> {
        let error = |source| BindError { address, source };
        let listener = TcpListener::bind(address).await.map_err(error)?;
        let addr = listener.local_addr().map_err(error)?;
        let mut names = vec!["localhost".to_owned()];
        names.extend(allowed_hosts.iter().map(|name| strip_port(name).to_owned()));
        names.extend(std::fs::read_to_string("/proc/sys/kernel/hostname").map(|name| name.trim().to_owned()));
        Ok(Self { listener, addr, names })
    }

    /// The address that was bound, its port known.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Serves until `shutdown`, then ends its connections.
    pub async fn run(self, registry: Registry, health: Arc<dyn Health>, shutdown: CancellationToken) {
        let pages = Arc::new(Pages { registry, health, names: self.names });
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = shutdown.cancelled() => break,
                Some(_) = connections.join_next() => continue,
                accepted = accept(&self.listener, &slots) => accepted,
            };
            match accepted {
                Ok((socket, slot)) => {
                    let pages = pages.clone();
                    connections.spawn(async move {
                        serve(socket, pages).await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "the metrics listener could not accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
        connections.shutdown().await;
    }
}

async fn accept(
    listener: &TcpListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(TcpStream, tokio::sync::OwnedSemaphorePermit)> {
    let slot = slots.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (socket, _) = listener.accept().await?;
    Ok((socket, slot))
}

async fn serve(socket: TcpStream, pages: Arc<Pages>) {
    let service = hyper::service::service_fn(move |request| {
        let pages = pages.clone();
        async move { Ok::<_, Infallible>(pages.answer(&request).await) }
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD)
        .serve_connection(TokioIo::new(socket), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection to the metrics listener ended");
    }
}

/// What is served, the same for every connection.
struct Pages {
    registry: Registry,
    health: Arc<dyn Health>,
    names: Vec<String>,
}

impl Pages {
    async fn answer<B>(&self, request: &Request<B>) -> Response<Full<Bytes>> {
        if !self.goes_by(request) {
            return text(StatusCode::FORBIDDEN, "this server does not go by that Host name; use its address\n");
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        }
        match request.uri().path() {
            "/metrics" => self.metrics(),
            "/healthz" => text(StatusCode::OK, "ok\n"),
            "/readyz" => match query_value(request.uri().query(), "forward") {
                Some(name) => self.forward(name).await,
                None => self.ready(),
            },
            _ => text(StatusCode::NOT_FOUND, "here are /metrics, /healthz, /readyz and /readyz?forward=NAME\n"),
        }
    }

    /// An address cannot be rebound, a name can: literals pass, names must be ours. HTTP/1.0 has no Host.
    fn goes_by<B>(&self, request: &Request<B>) -> bool {
        let Some(host) = request.headers().get(header::HOST) else { return true };
        let Ok(host) = host.to_str() else { return false };
        let host = strip_port(host);
        let literal = host.trim_start_matches('[').trim_end_matches(']');
        literal.parse::<std::net::IpAddr>().is_ok() || self.names.iter().any(|name| name.eq_ignore_ascii_case(host))
    }

    fn metrics(&self) -> Response<Full<Bytes>> {
        match TextEncoder::new().encode_to_string(&self.registry.gather()) {
            Ok(page) => {
                let mut response = text(StatusCode::OK, page);
                let format = header::HeaderValue::from_static(prometheus::TEXT_FORMAT);
                response.headers_mut().insert(header::CONTENT_TYPE, format);
                response
            }
            Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
        }
    }

    fn ready(&self) -> Response<Full<Bytes>> {
        match self.health.ready() {
            Ok(()) => text(StatusCode::OK, "ready\n"),
            Err(reasons) => text(StatusCode::SERVICE_UNAVAILABLE, reasons.join("\n") + "\n"),
        }
    }

    async fn forward(&self, name: &str) -> Response<Full<Bytes>> {
        match self.health.forward(name).await {
            ForwardHealth::Usable => text(StatusCode::OK, "usable\n"),
            ForwardHealth::Idle => text(StatusCode::OK, "idle: opens its device stream on first use\n"),
            ForwardHealth::Unusable(reason) => text(StatusCode::SERVICE_UNAVAILABLE, reason + "\n"),
            ForwardHealth::Unknown => text(StatusCode::NOT_FOUND, "no forward of that name\n"),
        }
    }
}

/// Names of forwards need no percent-encoding, so none is undone.
fn query_value<'a>(query: Option<&'a str>, key: &str) -> Option<&'a str> {
    query?.split('&').find_map(|pair| pair.strip_prefix(key)?.strip_prefix('='))
}

/// `host:port` → `host`, `[::1]:9464` → `[::1]`, `::1` stays.
fn strip_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port))
            if port.bytes().all(|b| b.is_ascii_digit()) && (!name.contains(':') || name.ends_with(']')) =>
        {
            name
        }
        _ => host,
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, header::HeaderValue::from_static("no-store"));
    response
}

#[cfg(test)]
mod tests {
    use futures_util::future::BoxFuture;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    struct Waiting;

    impl Health for Waiting {
        fn ready(&self) -> Result<(), Vec<String>> {
            Err(vec!["waiting for hub.example.com".into()])
        }

        fn forward(&self, name: &str) -> BoxFuture<'_, ForwardHealth> {
            let known = name == "pump-17-ssh";
            Box::pin(async move { if known { ForwardHealth::Usable } else { ForwardHealth::Unknown } })
        }
    }

    async fn get(addr: SocketAddr, host: &str, path: &str) -> String {
        let mut socket = TcpStream::connect(addr).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn it_answers_scrapers_and_refuses_foreign_names() {
        let server = Server::bind(([127, 0, 0, 1], 0).into(), &["metrics.example".into()]).await.unwrap();
        let addr = server.addr();
        let registry = Registry::new();
        let metrics = super::super::DaemonMetrics::register("service", &registry).unwrap();
        metrics.reload_succeeded();
        let shutdown = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(server.run(registry, Arc::new(Waiting), shutdown.clone()));

        let host = addr.to_string();
        let page = get(addr, &host, "/metrics").await;
        assert!(page.starts_with("HTTP/1.1 200") && page.contains("culvert_build_info"), "{page}");
        assert!(page.contains("text/plain; version=0.0.4"), "{page}");
        let ready = get(addr, "localhost:9", "/readyz").await;
        assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("waiting for hub"), "{ready}");
        assert!(get(addr, &host, "/readyz?forward=pump-17-ssh").await.contains("usable"));
        assert!(get(addr, &host, "/readyz?forward=nobody").await.starts_with("HTTP/1.1 404"));
        assert!(get(addr, "[::1]:1", "/healthz").await.starts_with("HTTP/1.1 200"));
        assert!(get(addr, "metrics.example:9464", "/healthz").await.starts_with("HTTP/1.1 200"));
        for name in ["evil.example", "localhost.evil.example:9464", "127.0.0.1.evil.example"] {
            assert!(get(addr, name, "/metrics").await.starts_with("HTTP/1.1 403"), "{name}");
        }

        shutdown.cancel();
        tasks.join_next().await.unwrap().unwrap();
        assert!(TcpStream::connect(addr).await.is_err());
    }

    #[test]
    fn ports_are_told_from_addresses() {
        for (text, host) in [("a:1", "a"), ("[::1]:1", "[::1]"), ("::1", "::1"), ("[::1]", "[::1]"), ("a", "a")] {
            assert_eq!(strip_port(text), host);
        }
    }
}
