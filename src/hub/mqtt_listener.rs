//! MQTT over TLS, port 8883.
//!
//! Owns accepting, the TLS handshake's time limit and the tasks of its connections. Does not know MQTT: each
//! connection is one [`control::serve`]. Invariant: [`MqttListener::run`] returns only when all its connections have
//! ended, and one connection's panic ends that connection only.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{
    io::AsyncWriteExt as _,
    net::TcpStream,
    task::{JoinError, JoinSet},
    time::timeout,
};

use super::{
    control::{self, PeerInfo},
    limits::Newcomer,
    metrics::Counted,
    shared::HubShared,
};
use crate::transport::{
    net::{BindError, Endpoint, Listener, Peer, Socket, acknowledge_now, tune_carrier},
    tls::{Acceptor, ServerStream},
};

/// How long saying goodbye may take: a peer that is gone does not answer.
const GOODBYE: Duration = Duration::from_secs(5);
/// The listener's name in metrics.
const LABEL: &str = "mqtt";

/// A bound port, not served yet.
#[derive(Debug)]
pub struct MqttListener {
    listener: Listener,
    addr: SocketAddr,
}

impl MqttListener {
    /// Binds the port.
    pub async fn bind(addr: SocketAddr) -> Result<Self, BindError> {
        let endpoint = Endpoint::Tcp { host: addr.ip().to_string(), port: addr.port() };
        let listener = Listener::bind(&endpoint, 0).await?;
        let port = match listener.endpoint() {
            Ok(Endpoint::Tcp { port, .. }) => port,
            Ok(Endpoint::Unix(_)) | Err(_) => addr.port(),
        };
        Ok(Self { listener, addr: SocketAddr::new(addr.ip(), port) })
    }

    /// Where it listens, with the port that the kernel chose.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Serves until the hub shuts down and every connection has ended. `tls` should ask clients for certificates
    /// and speak no protocol name ([`Alpn::Unspoken`](crate::transport::tls::Alpn::Unspoken)).
    pub async fn run(self, tls: Acceptor, hub: Arc<HubShared>) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                () = hub.shutdown.cancelled() => break,
                (socket, peer) = self.listener.accept() => {
                    if let (Socket::Tcp(socket), Peer::Tcp(addr)) = (socket, peer) {
                        accepted(&mut connections, socket, addr, &tls, &hub);
                    }
                }
                Some(ended) = connections.join_next() => count_panic(&ended, &hub),
            }
        }
        drop(self.listener);
        while let Some(ended) = connections.join_next().await {
            count_panic(&ended, &hub);
        }
    }
}

/// Counts a connection and, if strangers are few enough, gives it a task.
fn accepted(connections: &mut JoinSet<()>, socket: TcpStream, addr: SocketAddr, tls: &Acceptor, hub: &Arc<HubShared>) {
    hub.metrics.connections.with_label_values(&[LABEL]).inc();
    match hub.newcomers.admit(addr.ip(), &hub.config().limits) {
        Ok(newcomer) => {
            let (tls, hub) = (tls.clone(), hub.clone());
            connections.spawn(async move {
                let _counted = Counted::new(&hub.metrics.connections_open);
                connection(socket, addr, newcomer, &tls, &hub).await;
            });
        }
        Err(refused) => hub.metrics.limited.with_label_values(&[refused.label()]).inc(),
    }
}

/// A connection's life: handshake, session, goodbye.
async fn connection(socket: TcpStream, addr: SocketAddr, newcomer: Newcomer, tls: &Acceptor, hub: &HubShared) {
    tune_carrier(&socket);
    let mut stream = match handshake(socket, tls, hub).await {
        Ok(stream) => stream,
        Err(error) => {
            hub.metrics.tls_failures.with_label_values(&[LABEL]).inc();
            tracing::debug!(peer = %addr, %error, "TLS handshake failed");
            return;
        }
    };
    acknowledge_now(stream.get_ref().0.get_ref());
    let certificates = stream.get_ref().1.peer_certificates().unwrap_or_default().iter();
    let certificates = certificates.map(|certificate| certificate.clone().into_owned()).collect();
    let peer = PeerInfo { addr, certificates };
    control::serve(&mut stream, &peer, hub, || drop(newcomer)).await;
    // The peer may be gone; what matters to it has been sent.
    let _ = timeout(GOODBYE, stream.shutdown()).await;
}

async fn handshake(socket: TcpStream, tls: &Acceptor, hub: &HubShared) -> io::Result<ServerStream<TcpStream>> {
    tokio::select! {
        done = timeout(hub.config().limits.tls_handshake_timeout, tls.accept(socket)) => done?,
        () = hub.shutdown.cancelled() => Err(io::ErrorKind::ConnectionAborted.into()),
    }
}

fn count_panic(ended: &Result<(), JoinError>, hub: &HubShared) {
    if ended.as_ref().is_err_and(JoinError::is_panic) {
        hub.metrics.task_panics.inc();
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};
    use sha2::Digest as _;
    use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite};

    use super::*;
    use crate::{
        base::Secret,
        config::HubLimits,
        hub::{
            control::testing::{NODE, bytes_of, config, connect, hub, key, put, token},
            record::{Authentication, Thumbprint},
        },
        transport::tls::{Alpn, ClientCertificate, ClientStream, ClientTls, ServerTls, Trust},
    };

    /// A served listener with its own certificate in a folder of its own.
    struct Served {
        hub: Arc<HubShared>,
        addr: SocketAddr,
        folder: std::path::PathBuf,
        tasks: JoinSet<()>,
    }

    impl Served {
        async fn start(limits: HubLimits) -> Self {
            let folder = std::env::temp_dir().join(format!("culvert-mqtt-{}", getrandom::u64().unwrap()));
            std::fs::create_dir(&folder).unwrap();
            write_certificate(&folder, "hub", "127.0.0.1");
            let hub = hub().await;
            let mut config = config();
            config.limits = limits;
            hub.reconfigure(config);
            let listener = MqttListener::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
            let addr = listener.addr();
            let tls = ServerTls::load(&folder.join("hub.pem"), &folder.join("hub.key")).unwrap();
            let mut tasks = JoinSet::new();
            tasks.spawn(listener.run(tls.acceptor(Alpn::Unspoken).unwrap(), hub.clone()));
            Self { hub, addr, folder, tasks }
        }

        fn trust(&self) -> Trust {
            Trust::File(self.folder.join("hub.pem"))
        }

        async fn dial(&self, tls: &ClientTls) -> ClientStream<TcpStream> {
            let socket = TcpStream::connect(self.addr).await.unwrap();
            tls.connect("127.0.0.1", socket).await.unwrap()
        }

        async fn stop(mut self) {
            self.hub.shutdown.cancel();
            while let Some(ended) = self.tasks.join_next().await {
                ended.unwrap();
            }
            assert_eq!(self.hub.metrics.connections_open.get(), 0);
            assert_eq!(self.hub.metrics.task_panics.get(), 0);
            std::fs::remove_dir_all(&self.folder).unwrap();
        }
    }

    /// Writes NAME.pem and NAME.key and returns the certificate.
    fn write_certificate(folder: &std::path::Path, name: &str, host: &str) -> Vec<u8> {
        let mut params = CertificateParams::new(vec![host.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        std::fs::write(folder.join(format!("{name}.pem")), certificate.pem()).unwrap();
        std::fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).unwrap();
        certificate.der().to_vec()
    }

    async fn log_in(
        io: &mut (impl AsyncRead + AsyncWrite + Unpin),
        identity: &str,
        password: Option<Secret>,
    ) -> [u8; 4] {
        io.write_all(&bytes_of(&connect(identity, NODE, password))).await.unwrap();
        let mut answer = [0xff; 4];
        io.read_exact(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn devices_come_in_by_token_and_by_certificate() {
        let served = Served::start(HubLimits::default()).await;
        let leaf = write_certificate(&served.folder, "cam", "cam");
        let thumbprint = Thumbprint::from_digest(&sha2::Sha256::digest(&leaf));
        let registered = Authentication::SelfSigned { primary: Some(thumbprint), secondary: None };
        put(&served.hub.registry, "cam", registered, true).await;
        let certificate = ClientCertificate {
            certificate_file: served.folder.join("cam.pem"),
            private_key_file: served.folder.join("cam.key"),
        };
        let plain = ClientTls::new(&served.trust(), None).unwrap();
        let shows_certificate = ClientTls::new(&served.trust(), Some(&certificate)).unwrap();

        let mut pump = served.dial(&plain).await;
        assert_eq!(log_in(&mut pump, "pump", Some(token("pump", &key(1)))).await, *b"\x20\x02\0\0");
        let mut cam = served.dial(&shows_certificate).await;
        assert_eq!(log_in(&mut cam, "cam", None).await, *b"\x20\x02\0\0");
        let mut thief = served.dial(&plain).await;
        assert_eq!(log_in(&mut thief, "cam", None).await, *b"\x20\x02\0\x05");
        assert_eq!(thief.read(&mut [0; 8]).await.unwrap(), 0, "a clean end after the refusal");
        assert_eq!(served.hub.metrics.device_sessions.get(), 2);
        assert_eq!(served.hub.metrics.connections.with_label_values(&["mqtt"]).get(), 3);
        served.stop().await;
        assert_eq!(pump.read(&mut [0; 8]).await.unwrap(), 0, "shutdown ends sessions in an orderly way");
    }

    #[tokio::test]
    async fn strangers_do_not_keep_devices_out() {
        let limits = HubLimits { max_unauthenticated_per_address: 2, ..HubLimits::default() };
        let served = Served::start(limits).await;
        let tls = ClientTls::new(&served.trust(), None).unwrap();
        let mut sessions = Vec::new();
        for identity in ["pump", "pump/flow", "kiosk"] {
            let byte = match identity {
                "pump" => 1,
                "kiosk" => 5,
                _ => 3,
            };
            let mut device = served.dial(&tls).await;
            assert_eq!(log_in(&mut device, identity, Some(token(identity, &key(byte)))).await[3], 0);
            sessions.push(device);
        }
        let mut first = TcpStream::connect(served.addr).await.unwrap();
        let _second = TcpStream::connect(served.addr).await.unwrap();
        let mut third = TcpStream::connect(served.addr).await.unwrap();
        assert_eq!(third.read(&mut [0; 1]).await.unwrap_or(0), 0, "closed without a word");
        assert_eq!(served.hub.metrics.limited.with_label_values(&["max_unauthenticated_per_address"]).get(), 1);
        // A stranger that does not speak TLS makes room.
        first.write_all(b"\x10\x10\0\x04MQTT in the clear").await.unwrap();
        while first.read(&mut [0; 64]).await.unwrap_or(0) > 0 {}
        let mut fourth = served.dial(&tls).await;
        assert_eq!(log_in(&mut fourth, "kiosk", Some(token("kiosk", &key(5)))).await[3], 0);
        assert_eq!(served.hub.metrics.tls_failures.with_label_values(&["mqtt"]).get(), 1);
        served.stop().await;
    }

    #[tokio::test]
    async fn a_handshake_that_dawdles_is_cut() {
        let limits = HubLimits { tls_handshake_timeout: Duration::from_millis(50), ..HubLimits::default() };
        let served = Served::start(limits).await;
        let mut slow = TcpStream::connect(served.addr).await.unwrap();
        slow.write_all(b"\x16\x03\x01").await.unwrap();
        assert_eq!(slow.read(&mut [0; 1]).await.unwrap_or(0), 0);
        served.stop().await;
    }

    #[tokio::test]
    async fn an_idle_session_is_small() {
        let hub = hub().await;
        let (mut io, _far) = tokio::io::duplex(64);
        let peer = PeerInfo { addr: "192.0.2.1:1".parse().unwrap(), certificates: Vec::new() };
        // Issue 5: 32 KiB per idle device over all. TLS and the kernel take their part; this is ours.
        let size = size_of_val(&control::serve(&mut io, &peer, &hub, || {}));
        assert!(size <= 6 * 1024, "{size} bytes");
    }
}
