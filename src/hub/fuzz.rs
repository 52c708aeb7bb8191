//! Whole faces of the hub over bytes in memory, for fuzzing.
//!
//! Owns the plain functions that any fuzzer or test can feed. Does not know the fuzzer. Invariant: whatever the
//! bytes, the face comes to an end by itself, and nothing of the peer is left in the hub.

use std::{
    io::Cursor,
    sync::{Arc, LazyLock, Mutex},
};

use http::{Request, Response};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{Join, Sink},
    runtime::Runtime,
};
use tokio_util::sync::CancellationToken;

use super::{
    answer::Answer,
    control::{self, PeerInfo},
    heads::Guarded,
    metrics::HubMetrics,
    record::{Authentication, DeviceSpec},
    registry::{Precondition, Registry},
    server::{self, Connection},
    shared::HubShared,
};
use crate::{
    auth::{
        Rights,
        sas::{device_resource, sign},
    },
    base::Secret,
    config::{Certificate, FileContents, HubConfig, HubLimits, PolicyRule, SecretFile},
    proto::mqtt::{self, Connect, Packet},
};

const HOST: &str = "hub.example.com";
const DEVICE: &str = "pump";
/// Of the device and of the policy: seeds hold tokens that it signed.
const KEY: [u8; 32] = [7; 32];
/// Tokens of seeds end here, in 2106.
const EXPIRY: u64 = u32::MAX as u64;

/// One hub for all sessions: they leave nothing behind.
static HUB: LazyLock<(Runtime, Arc<HubShared>)> = LazyLock::new(|| started(true));
/// One for all requests, without a device: nobody is to be waited for.
static EMPTY_HUB: LazyLock<(Runtime, Arc<HubShared>)> = LazyLock::new(|| started(false));

fn started(with_device: bool) -> (Runtime, Arc<HubShared>) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build();
    let runtime = runtime.expect("a machine that fuzzes has a thread to spare");
    let hub = runtime.block_on(hub(with_device));
    (runtime, hub)
}

async fn hub(with_device: bool) -> Arc<HubShared> {
    let nothing = || FileContents { path: "hub.pem".into(), contents: Vec::new() };
    let private_key = SecretFile { path: "hub.key".into(), secret: Secret::new([]) };
    let mut config = HubConfig::new(HOST, Certificate { certificate: nothing(), private_key }, "/nowhere");
    // No right to write: an input must not see what an earlier one left.
    let rights = Rights::SERVICE_CONNECT.with(Rights::REGISTRY_READ);
    config.policies = vec![PolicyRule {
        name: "service".parse().expect("a name"),
        rights,
        primary_key: Secret::new(KEY),
        secondary_key: None,
        devices: Vec::new(),
    }];
    let registry = Registry::default();
    let authentication = Authentication::Keys { primary: Secret::new(KEY), secondary: Secret::new(KEY) };
    let identity = DEVICE.parse().expect("an identity");
    let spec = DeviceSpec { identity, enabled: true, status_reason: None, authentication };
    if with_device {
        registry.put(spec, Precondition::Any).await.expect("memory has room for one device");
    }
    Arc::new(HubShared::new(config, registry, HubMetrics::default(), CancellationToken::new()))
}

fn peer() -> PeerInfo {
    PeerInfo { addr: ([192, 0, 2, 1], 1).into(), certificates: Vec::new() }
}

/// A peer that says this, reads everything, and ends.
fn saying(bytes: Vec<u8>) -> Join<Cursor<Vec<u8>>, Sink> {
    tokio::io::join(Cursor::new(bytes), tokio::io::sink())
}

/// Any bytes as a device's side of a control session: behind a good CONNECT if the first byte is odd, else from the
/// beginning.
///
/// # Panics
/// If something of the session is left in the hub.
pub fn fuzz_session(data: &[u8]) {
    let Some((&first, data)) = data.split_first() else { return };
    let (runtime, hub) = &*HUB;
    let mut bytes = if first & 1 == 1 { good_connect() } else { Vec::new() };
    bytes.extend_from_slice(data);
    let served = async { control::serve(&mut saying(bytes), &peer(), hub, || {}).await };
    let end = runtime.block_on(served);
    assert!(!end.label().is_empty());
    assert_eq!((hub.courier.sessions(), hub.metrics.device_sessions.get()), (0, 0), "a session is left");
}

fn good_connect() -> Vec<u8> {
    let identity = DEVICE.parse().expect("an identity");
    let connect = Packet::Connect(Box::new(Connect {
        clean_session: true,
        keep_alive: 240,
        client_id: DEVICE.into(),
        will: None,
        username: Some(format!("{HOST}/{DEVICE}/?api-version=2020-09-30&DeviceClientType=culvert")),
        password: Some(sign(&device_resource(HOST, &identity), &Secret::new(KEY), EXPIRY, None)),
    }));
    let mut bytes = bytes::BytesMut::new();
    mqtt::encode(&connect, &mut bytes).expect("a CONNECT fits its length fields");
    bytes.to_vec()
}

/// Any bytes on the public listener, inside TLS: the guard, hyper, every route and what they read of a request.
///
/// # Panics
/// If the connection does not come to an end when its peer has ended.
pub fn fuzz_request(data: &[u8]) {
    let (runtime, hub) = &*EMPTY_HUB;
    let limits = HubLimits::default();
    let connection = Arc::new(Connection {
        hub: hub.clone(),
        peer: peer(),
        newcomer: Mutex::default(),
        _open: super::metrics::Counted::new(&hub.metrics.connections_open),
    });
    let served = async {
        let io = Guarded::new(saying(data.to_vec()), limits.request_head_timeout, limits.write_stall_timeout);
        let service = service_fn(move |request| observed(connection.clone(), request));
        let mut http = hyper::server::conn::http1::Builder::new();
        http.max_headers(super::heads::MAX_HEADERS);
        let served = http.serve_connection(TokioIo::new(io), service).with_upgrades();
        tokio::time::timeout(limits.request_head_timeout, served).await
    };
    assert!(runtime.block_on(served).is_ok(), "the connection goes on without its peer");
}

/// The answer, which must be one that HTTP can carry.
async fn observed(connection: Arc<Connection>, request: Request<Incoming>) -> Result<Answer, std::convert::Infallible> {
    let answer: Response<_> = server::answer(connection, request).await?;
    assert!(answer.status().as_u16() < 600 && answer.headers().len() < 20, "an answer of another kind");
    Ok(answer)
}
