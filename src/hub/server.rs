//! The public HTTPS listener: connections, their limits, and the way of a request to its handler.
//!
//! Owns accepting, TLS, HTTP/1.1 and the order in which a request is judged. Does not know what handlers do.
//! Invariant: authentication comes before routing: without a good credential every path but the MQTT upgrade
//! answers 401, whether it exists or not.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use http::{HeaderValue, Method, Request, StatusCode, header};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

use super::{
    answer::{self, Answer},
    control::PeerInfo,
    devices_api, gateway,
    guard::{self, Caller},
    heads::{Guarded, MAX_HEADERS},
    limits::Newcomer,
    metrics::Counted,
    routes::{self, Access, Endpoint, Route},
    shared::HubShared,
    streams_api,
};
use crate::{
    proto::streams::ApiError,
    transport::{
        net::{BindError, CarrierSocket, Endpoint as Address, Listener, Peer, Socket, acknowledge_now},
        tls::Acceptor,
    },
};

/// The listener's name in metrics.
const LABEL: &str = "https";

/// A connection to the public listener.
#[derive(Debug)]
pub(in crate::hub) struct Connection {
    pub(in crate::hub) hub: Arc<HubShared>,
    pub(in crate::hub) peer: PeerInfo,
    pub(in crate::hub) newcomer: Mutex<Option<Newcomer>>,
    /// Whatever the connection has become: it is open for as long as this lives.
    pub(in crate::hub) _open: Counted,
}

impl Connection {
    /// The peer is no stranger any more.
    pub(in crate::hub) fn authenticated(&self) {
        self.newcomer.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}

/// A bound port, not served yet.
#[derive(Debug)]
pub(in crate::hub) struct HttpsListener {
    listener: Listener,
    pub(in crate::hub) addr: SocketAddr,
}

impl HttpsListener {
    pub(in crate::hub) async fn bind(addr: SocketAddr) -> Result<Self, BindError> {
        let endpoint = Address::Tcp { host: addr.ip().to_string(), port: addr.port() };
        let listener = Listener::bind(&endpoint, 0).await?;
        let port = match listener.endpoint() {
            Ok(Address::Tcp { port, .. }) => port,
            Ok(Address::Unix(_)) | Err(_) => addr.port(),
        };
        Ok(Self { listener, addr: SocketAddr::new(addr.ip(), port) })
    }

    /// Accepts until the hub shuts down. Connections are tasks of the hub.
    pub(in crate::hub) async fn run(self, tls: Acceptor, hub: Arc<HubShared>) {
        loop {
            tokio::select! {
                () = hub.shutdown.cancelled() => return,
                (socket, peer) = self.listener.accept() => {
                    if let (Socket::Tcp(socket), Peer::Tcp(addr)) = (socket, peer) {
                        accepted(socket, addr, &tls, &hub);
                    }
                }
            }
        }
    }
}

/// Counts a connection and, if strangers are few enough, gives it a task.
fn accepted(socket: TcpStream, addr: SocketAddr, tls: &Acceptor, hub: &Arc<HubShared>) {
    hub.metrics.connections.with_label_values(&[LABEL]).inc();
    match hub.newcomers.admit(addr.ip(), &hub.config().limits) {
        Ok(newcomer) => {
            let (tls, shared) = (tls.clone(), hub.clone());
            let open = Counted::new(&hub.metrics.connections_open);
            hub.spawn(async move { serve(socket, addr, (newcomer, open), &tls, &shared).await });
        }
        Err(refused) => hub.metrics.limited.with_label_values(&[refused.label()]).inc(),
    }
}

/// One connection until it ends or has switched protocols.
async fn serve(
    socket: TcpStream,
    addr: SocketAddr,
    (newcomer, open): (Newcomer, Counted),
    tls: &Acceptor,
    hub: &Arc<HubShared>,
) {
    let limits = hub.config().limits.clone();
    let stream = match timeout(limits.tls_handshake_timeout, tls.accept(CarrierSocket::from(socket))).await {
        Ok(Ok(stream)) => stream,
        failed => {
            hub.metrics.tls_failures.with_label_values(&[LABEL]).inc();
            let error = failed.map_or_else(|_| "too slow".to_owned(), |done| format!("{:?}", done.err()));
            tracing::debug!(peer = %addr, error, "TLS handshake failed");
            return;
        }
    };
    acknowledge_now(stream.get_ref().0.get_ref().get_ref());
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default().iter();
    let certificates = certificates.map(|certificate| certificate.clone().into_owned()).collect();
    let peer = PeerInfo { addr, certificates };
    let connection = Arc::new(Connection { hub: hub.clone(), peer, newcomer: Mutex::new(Some(newcomer)), _open: open });
    let io = TokioIo::new(Guarded::new(stream, limits.request_head_timeout, limits.write_stall_timeout));
    let service = service_fn(|request| answer(connection.clone(), request));
    let mut http = http1::Builder::new();
    http.max_headers(MAX_HEADERS);
    let mut served = std::pin::pin!(http.serve_connection(io, service).with_upgrades());
    let result = tokio::select! {
        result = served.as_mut() => result,
        () = hub.shutdown.cancelled() => {
            served.as_mut().graceful_shutdown();
            served.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(peer = %addr, %error, "connection ended");
    }
}

pub(in crate::hub) async fn answer(
    connection: Arc<Connection>,
    request: Request<Incoming>,
) -> Result<Answer, Infallible> {
    let found = routes::find(request.uri().path());
    let label = found.as_ref().map_or("none", |(route, _)| route.label);
    let metrics = connection.hub.metrics.clone();
    let wants_upgrade = request.headers().contains_key(header::UPGRADE);
    let mut answer = judge(&connection, found, request).await;
    if wants_upgrade && answer.status() != StatusCode::SWITCHING_PROTOCOLS {
        // The guard looks at nothing behind a request that could have switched protocols: it is the last.
        answer.headers_mut().entry(header::CONNECTION).or_insert(HeaderValue::from_static("close"));
    }
    metrics.requests.with_label_values(&[label, answer.status().as_str()]).inc();
    Ok(answer)
}

/// Origin, credential, existence, method: in this order.
async fn judge(
    connection: &Arc<Connection>,
    found: Option<(&'static Route, Vec<String>)>,
    mut request: Request<Incoming>,
) -> Answer {
    let config = connection.hub.config();
    let allowed = |origin| is_own(&connection.hub, origin) || config.allowed_origins.iter().any(|one| origin == one);
    if !request.headers().get_all(header::ORIGIN).iter().all(allowed) {
        return answer::refusal(StatusCode::FORBIDDEN, "This Origin is not allowed.\n");
    }
    match found {
        Some((route, gaps)) if route.access == Access::Ticket && *request.method() == Method::GET => {
            gateway::join(connection, &gaps, &mut request)
        }
        Some((route, _)) if route.access == Access::Login && *request.method() == Method::GET => {
            gateway::control(connection, &mut request)
        }
        found => {
            let caller = match guard::authenticate(&config, request.headers()) {
                Ok(caller) => caller,
                Err(error) => return refused(connection, &request, &error),
            };
            connection.authenticated();
            let methods = found.as_ref().map_or(&[][..], |(route, _)| route.methods);
            let done = dispatch(&connection.hub, &caller, found, request).await;
            done.unwrap_or_else(|error| explained(&error, methods))
        }
    }
}

/// The hub's own address, which MQTT libraries name as their Origin (paho does). No page of a browser has it: the hub
/// serves none.
fn is_own(hub: &HubShared, origin: &HeaderValue) -> bool {
    let own = hub.endpoint().to_string();
    let short = own.strip_suffix(":443").unwrap_or(&own);
    [own.as_str(), short].iter().any(|own| origin.as_bytes().eq_ignore_ascii_case(own.as_bytes()))
}

fn refused(connection: &Connection, request: &Request<Incoming>, error: &ApiError) -> Answer {
    // Without the query, which could hold what a confused client took for a place for secrets.
    tracing::info!(peer = %connection.peer.addr, path = request.uri().path(), reason = %error, "request refused");
    answer::error(error)
}

/// An error; a method that is not allowed comes with those that are (RFC 9110, section 15.5.6).
fn explained(error: &ApiError, methods: &[Method]) -> Answer {
    let mut answer = answer::error(error);
    if matches!(error, ApiError::MethodNotAllowed) {
        let names: Vec<&str> = methods.iter().map(Method::as_str).collect();
        answer::set(&mut answer, "allow", &names.join(", "));
    }
    answer
}

/// Leads an authenticated caller to what it asked for.
async fn dispatch(
    hub: &HubShared,
    caller: &Caller,
    found: Option<(&'static Route, Vec<String>)>,
    request: Request<Incoming>,
) -> Result<Answer, ApiError> {
    let (route, gaps) = found.ok_or(ApiError::NotFound)?;
    if !route.methods.contains(request.method()) {
        return Err(ApiError::MethodNotAllowed);
    }
    if let Access::Policy { read, write } = route.access {
        caller.require(if *request.method() == Method::GET { read } else { write })?;
    }
    let (parts, body) = request.into_parts();
    match route.endpoint {
        Endpoint::Stream => streams_api::serve(hub, caller, &gaps, &parts).await,
        Endpoint::DeviceStreams => {
            Ok(answer::json(&serde_json::json!({ "streamingEndpoints": [hub.endpoint().to_string()] })))
        }
        Endpoint::Devices => devices_api::list(hub, caller, parts.uri.query().unwrap_or_default()),
        Endpoint::Modules => devices_api::modules(hub, caller, &gaps),
        Endpoint::Device | Endpoint::Module => devices_api::serve(hub, caller, &gaps, &parts, body).await,
        Endpoint::Bridge | Endpoint::Mqtt => Err(ApiError::MethodNotAllowed),
    }
}
