//! A hub on loopback, and clients made of raw parts: TLS, HTTP by hand, tungstenite, MQTT packets. None of culvert's
//! own daemons' code is used.

use std::{collections::HashMap, path::PathBuf, sync::atomic::AtomicU32, time::Duration};

use bytes::BytesMut;
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{Error as WsError, Message, client::IntoClientRequest as _, protocol::CloseFrame},
};
use tokio_util::sync::CancellationToken;

use super::super::{Hub, HubHandle, metrics::HubMetrics};
use crate::{
    auth::{
        Rights,
        sas::{device_resource, sign},
    },
    base::{Identity, Name, Secret},
    config::{Certificate, FileContents, HubConfig, PolicyRule, SecretFile},
    proto::mqtt::{self, Connect, Packet, PacketId, Publish, Qos, Subscribe},
    transport::tls::{ClientStream, ClientTls, Trust},
};

pub(super) const HOST: &str = "localhost";

pub(super) type Tls = ClientStream<TcpStream>;
pub(super) type Ws = WebSocketStream<Tls>;

/// A running hub in a folder of its own, with the policies `service`, `registry`, `device` and `weak` (no rights).
pub(super) struct TestHub {
    pub(super) handle: HubHandle,
    pub(super) metrics: HubMetrics,
    pub(super) config: HubConfig,
    pub(super) port: u16,
    pub(super) mqtt_port: u16,
    pub(super) folder: PathBuf,
    tls: ClientTls,
    shutdown: CancellationToken,
    tasks: JoinSet<()>,
}

pub(super) fn key(byte: u8) -> Secret {
    Secret::new([byte; 32])
}

pub(super) fn policy(name: &str, rights: Rights, byte: u8) -> PolicyRule {
    PolicyRule { name: name.parse().unwrap(), rights, primary_key: key(byte), secondary_key: None, devices: Vec::new() }
}

fn folder() -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let folder = std::env::temp_dir().join(format!("culvert-hub-{}-{number}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn config_in(folder: &std::path::Path) -> (HubConfig, Vec<u8>) {
    let made = rcgen::generate_simple_self_signed([HOST.to_owned()]).unwrap();
    let (certificate, private_key) = (folder.join("hub.pem"), folder.join("hub.key"));
    let pem = made.cert.pem();
    std::fs::write(&certificate, &pem).unwrap();
    std::fs::write(&private_key, made.signing_key.serialize_pem()).unwrap();
    let tls = Certificate {
        certificate: FileContents { path: certificate, contents: pem.clone().into_bytes() },
        private_key: SecretFile { path: private_key, secret: Secret::new([]) },
    };
    let mut config = HubConfig::new(HOST, tls, folder);
    config.listen = vec!["127.0.0.1:0".parse().unwrap()];
    config.mqtt_listen = vec!["127.0.0.1:0".parse().unwrap()];
    config.policies = vec![
        policy("service", Rights::SERVICE_CONNECT, 1),
        policy("registry", Rights::REGISTRY_READ.with(Rights::REGISTRY_WRITE), 2),
        policy("device", Rights::DEVICE_CONNECT, 3),
        policy("weak", Rights::NONE, 4),
    ];
    (config, pem.into_bytes())
}

impl TestHub {
    pub(super) async fn start() -> Self {
        Self::with(|_| {}).await
    }

    pub(super) async fn with(change: impl FnOnce(&mut HubConfig)) -> Self {
        let folder = folder();
        let (mut config, pem) = config_in(&folder);
        // Tests that do not ask for a drain hold no connection that is worth one.
        config.limits.drain_timeout = Duration::from_millis(100);
        change(&mut config);
        let metrics = HubMetrics::default();
        let hub = Hub::bind(config.clone(), metrics.clone()).await.unwrap();
        let (handle, shutdown, mut tasks) = (hub.handle(), CancellationToken::new(), JoinSet::new());
        let (port, mqtt_port) = (hub.addr().port(), hub.mqtt_addr().unwrap().port());
        let stop = shutdown.clone();
        tasks.spawn(async move { hub.run(stop).await.unwrap() });
        let tls = ClientTls::new(&Trust::Pem(pem), None).unwrap();
        let hub = Self { handle, metrics, config, port, mqtt_port, folder, tls, shutdown, tasks };
        hub.register("pump").await;
        hub
    }

    /// Begins to stop; [`TestHub::stopped`] waits for the end.
    pub(super) fn stop(&self) {
        self.shutdown.cancel();
    }

    pub(super) async fn stopped(mut self) {
        self.shutdown.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
        assert_eq!(self.metrics.task_panics.get(), 0);
        std::fs::remove_dir_all(&self.folder).unwrap();
    }

    pub(super) async fn connect_to(&self, port: u16) -> Tls {
        let tcp = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        self.tls.connect(HOST, tcp).await.unwrap()
    }

    pub(super) async fn connect(&self) -> Tls {
        self.connect_to(self.port).await
    }

    /// One request on a connection of its own. `headers` are whole lines.
    pub(super) async fn request(&self, line: &str, headers: &[String], body: &str) -> Reply {
        let mut io = self.connect().await;
        send_request(&mut io, line, headers, body).await;
        read_reply(&mut io).await
    }

    /// Registers a device or module with the keys 0x11.. and 0x22...
    pub(super) async fn register(&self, identity: &str) {
        let reply = self.put(identity, r#","status":"enabled""#, None).await;
        assert_eq!(reply.status, 200, "{}", reply.body);
    }

    pub(super) async fn put(&self, identity: &str, more: &str, if_match: Option<&str>) -> Reply {
        let keys = [key(0x11), key(0x22)].map(|key| crate::auth::key::encode_key(&key));
        let [one, two] = keys;
        let keys = format!(r#"{{"symmetricKey":{{"primaryKey":"{one}","secondaryKey":"{two}"}},"type":"sas"}}"#);
        let (path, ids) = match identity.split_once('/') {
            None => (format!("/devices/{identity}"), format!(r#""deviceId":"{identity}""#)),
            Some((device, module)) => (
                format!("/devices/{device}/modules/{module}"),
                format!(r#""deviceId":"{device}","moduleId":"{module}""#),
            ),
        };
        let body = format!("{{{ids},\"authentication\":{keys}{more}}}");
        let mut headers = vec![self.sas("registry", 2)];
        headers.extend(if_match.map(|etag| format!("If-Match: {etag}")));
        self.request(&format!("PUT {path}?api-version=2021-04-12"), &headers, &body).await
    }

    /// An Authorization line by a policy.
    pub(super) fn sas(&self, policy: &str, key_byte: u8) -> String {
        let policy: Name = policy.parse().unwrap();
        let token = sign(HOST, &key(key_byte), now() + 3600, Some(&policy));
        format!("Authorization: {}", token.expose_str().unwrap())
    }

    /// The service API, with both timeouts in seconds.
    pub(super) async fn initiate(&self, path: &str, connect: &str, response: &str) -> Reply {
        let headers = [
            self.sas("service", 1),
            format!("iothub-streaming-connect-timeout-in-seconds: {connect}"),
            format!("iothub-streaming-response-timeout-in-seconds: {response}"),
        ];
        self.request(&format!("POST {path}?api-version=2018-10-20-preview"), &headers, "").await
    }

    /// An SDK's device, subscribed for streams, over TLS on 8883.
    pub(super) async fn device(&self, identity: &str) -> TestDevice {
        let mut device = TestDevice { io: self.connect_to(self.mqtt_port).await, input: BytesMut::new(), known: false };
        device.log_in(identity).await;
        device
    }

    /// A stream with both legs joined: service, device.
    pub(super) async fn stream(&self, device: &mut TestDevice, name: &str) -> (Ws, Ws) {
        let (service, asked) = self.accepted(device, name).await;
        let service = self.leg(&service.url(), &service.token()).await.unwrap();
        (service, self.leg(&asked.url, &asked.auth).await.unwrap())
    }

    /// An initiation that the device has accepted.
    pub(super) async fn accepted(&self, device: &mut TestDevice, name: &str) -> (Reply, Asked) {
        let path = format!("/twins/pump/streams/{name}");
        let answer = async {
            let asked = device.asked().await;
            device.publish(&format!("$iothub/streams/res/200/?$rid={}", asked.rid)).await;
            asked
        };
        let (reply, asked) = tokio::join!(self.initiate(&path, "5", "5"), answer);
        assert_eq!((reply.status, reply.header("iothub-streaming-is-accepted")), (200, Some("True")));
        (reply, asked)
    }

    /// Connects a leg; the error is the HTTP status.
    pub(super) async fn leg(&self, url: &str, token: &str) -> Result<Ws, u16> {
        self.leg_with(url, &[("Authorization", &format!("Bearer {token}"))]).await.map(|(ws, _)| ws)
    }

    pub(super) async fn leg_with(
        &self,
        url: &str,
        headers: &[(&'static str, &str)],
    ) -> Result<(Ws, HashMap<String, String>), u16> {
        let mut request = url.into_client_request().unwrap();
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        match client_async(request, self.connect().await).await {
            Ok((ws, response)) => {
                let text = |value: &http::HeaderValue| value.to_str().unwrap().to_owned();
                let headers = response.headers().iter().map(|(name, value)| (name.to_string(), text(value)));
                Ok((ws, headers.collect()))
            }
            Err(WsError::Http(response)) => Err(response.status().as_u16()),
            Err(error) => panic!("{error}"),
        }
    }
}

pub(super) fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

pub(super) async fn send_request(io: &mut Tls, line: &str, headers: &[String], body: &str) {
    let mut text = format!("{line} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {}\r\n", body.len());
    for header in headers {
        text.push_str(&format!("{header}\r\n"));
    }
    io.write_all(format!("{text}\r\n{body}").as_bytes()).await.unwrap();
}

/// An HTTP answer.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    headers: HashMap<String, String>,
    pub(super) body: String,
}

impl Reply {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    pub(super) fn url(&self) -> String {
        self.header("iothub-streaming-url").unwrap().into()
    }

    pub(super) fn token(&self) -> String {
        self.header("iothub-streaming-auth-token").unwrap().into()
    }

    pub(super) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap()
    }

    /// The six-digit code of an error, whose message is JSON in JSON.
    pub(super) fn error_code(&self) -> u64 {
        let inner: serde_json::Value = serde_json::from_str(self.json()["Message"].as_str().unwrap()).unwrap();
        inner["errorCode"].as_u64().unwrap()
    }
}

pub(super) async fn read_reply(io: &mut Tls) -> Reply {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(io.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.trim_end().split("\r\n");
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let pairs = lines.map(|line| line.split_once(": ").unwrap());
    let headers: HashMap<_, _> = pairs.map(|(name, value)| (name.to_lowercase(), value.to_owned())).collect();
    let length = headers.get("content-length").map_or(0, |length| length.parse().unwrap());
    let mut body = vec![0; length];
    io.read_exact(&mut body).await.unwrap();
    Reply { status, headers, body: String::from_utf8(body).unwrap() }
}

/// A stream request as it reached the device.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) topic: String,
    pub(super) rid: String,
    pub(super) url: String,
    pub(super) auth: String,
}

/// A device's control connection.
pub(super) struct TestDevice {
    io: Tls,
    input: BytesMut,
    /// The hub knew its session.
    pub(super) known: bool,
}

impl TestDevice {
    async fn log_in(&mut self, identity: &str) {
        let id: Identity = identity.parse().unwrap();
        let password = sign(&device_resource(HOST, &id), &key(0x11), now() + 3600, None);
        let connect = Connect {
            clean_session: false,
            keep_alive: 240,
            client_id: identity.into(),
            will: None,
            username: Some(format!("{HOST}/{identity}/?api-version=2020-09-30&DeviceClientType=sdk")),
            password: Some(password),
        };
        self.send(&Packet::Connect(Box::new(connect))).await;
        let Some(Packet::ConnAck { session_present, .. }) = self.packet().await else { panic!("a CONNACK") };
        self.known = session_present;
        let filters = vec![("$iothub/streams/POST/#".into(), Qos::AtMostOnce)];
        self.send(&Packet::Subscribe(Subscribe { id: PacketId::new(2).unwrap(), filters })).await;
        assert!(matches!(self.packet().await, Some(Packet::SubAck { .. })));
    }

    pub(super) async fn send(&mut self, packet: &Packet) {
        let mut bytes = BytesMut::new();
        mqtt::encode(packet, &mut bytes).unwrap();
        self.io.write_all(&bytes).await.unwrap();
    }

    pub(super) async fn publish(&mut self, topic: &str) {
        self.send(&Packet::Publish(Publish::at_most_once(topic, ""))).await;
    }

    pub(super) async fn packet(&mut self) -> Option<Packet> {
        loop {
            if let Some(packet) = mqtt::decode(&mut self.input, 1 << 20).unwrap() {
                return Some(packet);
            }
            if self.io.read_buf(&mut self.input).await.unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    /// The next stream request.
    pub(super) async fn asked(&mut self) -> Asked {
        let Some(Packet::Publish(publish)) = self.packet().await else { panic!("a stream request") };
        let topic = publish.topic.to_string();
        let value = |key: &str| {
            let pairs = topic.split_once('?').unwrap().1.split('&');
            pairs.filter_map(|pair| pair.split_once('=')).find(|(name, _)| *name == key).unwrap().1.to_owned()
        };
        let url = percent_encoding::percent_decode_str(&value("$url")).decode_utf8().unwrap().into_owned();
        let (rid, auth) = (value("$rid"), value("$auth"));
        Asked { rid, url, auth, topic }
    }
}

/// The next binary message; a Close gives its code.
pub(super) async fn next(ws: &mut Ws) -> Result<Vec<u8>, Option<CloseFrame>> {
    match tokio::time::timeout(Duration::from_secs(10), ws.next()).await.expect("something comes") {
        Some(Ok(Message::Binary(bytes))) => Ok(bytes.to_vec()),
        Some(Ok(Message::Close(frame))) => Err(frame),
        other => panic!("{other:?}"),
    }
}

/// The code and reason of the Close that comes.
pub(super) async fn closed(ws: &mut Ws) -> (u16, String) {
    let frame = next(ws).await.unwrap_err().expect("a code");
    (frame.code.into(), frame.reason.to_string())
}

pub(super) async fn send(ws: &mut Ws, bytes: &[u8]) {
    ws.send(Message::binary(bytes.to_vec())).await.unwrap();
}
