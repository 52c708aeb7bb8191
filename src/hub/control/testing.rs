//! What tests of control sessions share: a hub with three identities, and a device that speaks MQTT to it.

use std::{sync::Arc, time::Duration};

use bytes::BytesMut;
use rustls_pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use super::{End, PeerInfo, serve};
use crate::{
    auth::{
        Rights,
        sas::{device_resource, sign},
    },
    base::{Identity, Secret},
    config::{Certificate, FileContents, HubConfig, PolicyRule, SecretFile},
    hub::{
        metrics::HubMetrics,
        record::{Authentication, DeviceSpec},
        registry::{Precondition, Registry},
        shared::HubShared,
    },
    proto::mqtt::{self, Connect, ConnectCode, Packet, PacketId, Publish, Qos, Subscribe},
};

pub(in crate::hub) const HOST: &str = "hub.example.com";
pub(in crate::hub) const NODE: &str = "node%2F1.0";
pub(in crate::hub) const CULVERT: &str = "culvert%2F0.1";

pub(in crate::hub) fn key(byte: u8) -> Secret {
    Secret::new([byte; 32])
}

pub(in crate::hub) fn id(text: &str) -> Identity {
    text.parse().unwrap()
}

pub(in crate::hub) fn config() -> HubConfig {
    let nothing = || FileContents { path: "hub.pem".into(), contents: Vec::new() };
    let private_key = SecretFile { path: "hub.key".into(), secret: Secret::new([]) };
    let mut config = HubConfig::new(HOST, Certificate { certificate: nothing(), private_key }, "/nowhere");
    let policy = |name: &str, rights, byte| PolicyRule {
        name: name.parse().unwrap(),
        rights,
        primary_key: key(byte),
        secondary_key: None,
        devices: Vec::new(),
    };
    config.policies =
        vec![policy("device", Rights::DEVICE_CONNECT, 0xd0), policy("service", Rights::SERVICE_CONNECT, 0x50)];
    config
}

/// A hub with the devices `pump` (keys 1 and 2), its module `pump/flow` (keys 3 and 4) and `kiosk` (keys 5 and 6).
pub(in crate::hub) async fn hub() -> Arc<HubShared> {
    let registry = Registry::default();
    for (name, first) in [("pump", 1), ("pump/flow", 3), ("kiosk", 5)] {
        put(&registry, name, Authentication::Keys { primary: key(first), secondary: key(first + 1) }, true).await;
    }
    Arc::new(HubShared::new(config(), registry, HubMetrics::default(), CancellationToken::new()))
}

pub(in crate::hub) async fn put(registry: &Registry, name: &str, authentication: Authentication, enabled: bool) {
    let spec = DeviceSpec { identity: id(name), enabled, status_reason: None, authentication };
    registry.put(spec, Precondition::Any).await.unwrap();
}

pub(in crate::hub) fn in_an_hour() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    now.as_secs() + 3600
}

pub(in crate::hub) fn token(identity: &str, key: &Secret) -> Secret {
    sign(&device_resource(HOST, &id(identity)), key, in_an_hour(), None)
}

/// The CONNECT of an SDK, but with a clean session: what a test did not subscribe to stays silent.
pub(in crate::hub) fn connect(identity: &str, client: &str, password: Option<Secret>) -> Packet {
    let username = format!("{HOST}/{identity}/?api-version=2020-09-30&DeviceClientType={client}");
    Packet::Connect(Box::new(Connect {
        clean_session: true,
        keep_alive: 240,
        client_id: identity.into(),
        will: None,
        username: Some(username),
        password,
    }))
}

/// A session that the hub serves, and the device's end of it.
pub(in crate::hub) struct Dialogue<IO> {
    pub(in crate::hub) io: IO,
    input: BytesMut,
    served: JoinSet<End>,
}

impl Dialogue<TcpStream> {
    /// Over a real socket.
    pub(in crate::hub) async fn tcp(hub: &Arc<HubShared>, certificates: Vec<CertificateDer<'static>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let io = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (served, addr) = listener.accept().await.unwrap();
        Self::new(io, served, hub, PeerInfo { addr, certificates })
    }
}

impl Dialogue<DuplexStream> {
    /// Over a pipe of `capacity` bytes, for tests that own the clock.
    pub(in crate::hub) fn pipe(hub: &Arc<HubShared>, capacity: usize) -> Self {
        let (io, served) = tokio::io::duplex(capacity);
        let addr = "192.0.2.7:1".parse().unwrap();
        Self::new(io, served, hub, PeerInfo { addr, certificates: Vec::new() })
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Dialogue<IO> {
    fn new(
        io: IO,
        mut served: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        hub: &Arc<HubShared>,
        peer: PeerInfo,
    ) -> Self {
        let hub = hub.clone();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move { serve(&mut served, &peer, &hub, || {}).await });
        Self { io, input: BytesMut::new(), served: tasks }
    }

    pub(in crate::hub) async fn send(&mut self, packet: &Packet) {
        let mut bytes = BytesMut::new();
        mqtt::encode(packet, &mut bytes).unwrap();
        self.io.write_all(&bytes).await.unwrap();
    }

    pub(in crate::hub) async fn publish(&mut self, topic: &str) {
        self.send(&Packet::Publish(Publish::at_most_once(topic, ""))).await;
    }

    /// The next packet from the hub; `None` when it closed the connection.
    pub(in crate::hub) async fn packet(&mut self) -> Option<Packet> {
        loop {
            if let Some(packet) = mqtt::decode(&mut self.input, 1 << 20).unwrap() {
                return Some(packet);
            }
            if self.io.read_buf(&mut self.input).await.unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    /// Logs in and returns the CONNACK's code.
    pub(in crate::hub) async fn log_in(&mut self, connect: &Packet) -> ConnectCode {
        self.send(connect).await;
        match self.packet().await {
            Some(Packet::ConnAck { session_present: false, code }) => code,
            other => panic!("{other:?}"),
        }
    }

    pub(in crate::hub) async fn subscribe(&mut self, filters: &[&str]) -> Vec<Option<Qos>> {
        let filters = filters.iter().map(|filter| ((*filter).to_owned(), Qos::AtMostOnce)).collect();
        self.send(&Packet::Subscribe(Subscribe { id: PacketId::new(2).unwrap(), filters })).await;
        match self.packet().await {
            Some(Packet::SubAck { id, granted }) if id.get() == 2 => granted,
            other => panic!("{other:?}"),
        }
    }

    /// Waits for the end of the session and tells why it ended.
    pub(in crate::hub) async fn end(mut self) -> End {
        self.served.join_next().await.unwrap().unwrap()
    }
}

/// A packet as it travels.
pub(in crate::hub) fn bytes_of(packet: &Packet) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    mqtt::encode(packet, &mut bytes).unwrap();
    bytes.to_vec()
}

/// Waits until `condition` holds.
pub(in crate::hub) async fn until(condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), waiting).await.expect("the condition came true");
}
