//! The device control channel as stock MQTT clients speak it: `mosquitto_sub` and `mosquitto_pub`
//! (Debian package `mosquitto-clients`) over TLS.

#![allow(clippy::unwrap_used, reason = "a helper of a test fails the test")]

use std::{net::SocketAddr, path::PathBuf, process::Stdio, sync::Arc, time::Duration};

use culvert::{
    auth::sas::sign,
    base::Secret,
    config::{Certificate, FileContents, HubConfig, SecretFile},
    hub::{
        courier::{Answer, Invitation},
        metrics::HubMetrics,
        mqtt_listener::MqttListener,
        record::{Authentication, DeviceSpec, Thumbprint},
        registry::{Precondition, Registry},
        shared::HubShared,
    },
    transport::tls::{Alpn, ServerTls},
};
use rcgen::{CertificateParams, DnType, KeyPair};
use sha2::Digest as _;
use tokio::{process::Command, task::JoinSet};

/// Clients take their host name from the command line; the certificate and the tokens are for this one.
const HOST: &str = "127.0.0.1";
const MINUTE: Duration = Duration::from_secs(60);

/// A hub's MQTT port on loopback, with the device `pump` (a key) and the device `cam` (a certificate).
struct World {
    folder: PathBuf,
    addr: SocketAddr,
    hub: Arc<HubShared>,
    tasks: JoinSet<()>,
}

impl World {
    async fn start() -> Self {
        let folder = std::env::temp_dir().join(format!("culvert-it-mqtt-{}", getrandom::u64().unwrap()));
        std::fs::create_dir(&folder).unwrap();
        write_certificate(&folder, "hub");
        let cam = Thumbprint::from_digest(&sha2::Sha256::digest(write_certificate(&folder, "cam")));
        let registry = Registry::open(&folder.join("registry.db")).unwrap();
        let proofs = [
            ("pump", Authentication::Keys { primary: Secret::new([1; 32]), secondary: Secret::new([2; 32]) }),
            ("cam", Authentication::SelfSigned { primary: Some(cam), secondary: None }),
        ];
        for (name, authentication) in proofs {
            let identity = name.parse().unwrap();
            let spec = DeviceSpec { identity, enabled: true, status_reason: None, authentication };
            registry.put(spec, Precondition::Absent).await.unwrap();
        }
        let tls = ServerTls::load(&folder.join("hub.pem"), &folder.join("hub.key")).unwrap();
        let config = HubConfig::new(HOST, certificate_of_hub(&folder), &folder);
        let hub = Arc::new(HubShared::new(config, registry, HubMetrics::default(), Default::default()));
        let listener = MqttListener::bind((std::net::Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
        let addr = listener.addr();
        let mut tasks = JoinSet::new();
        tasks.spawn(listener.run(tls.acceptor(Alpn::Unspoken).unwrap(), hub.clone()));
        Self { folder, addr, hub, tasks }
    }

    /// A client program with everything but its topic.
    fn client(&self, program: &str, device: &str) -> Command {
        let mut command = Command::new(program);
        command
            .args(["-V", "mqttv311", "-h", HOST, "-p", &self.addr.port().to_string(), "-i", device])
            .args(["-u", &format!("{HOST}/{device}/?api-version=2020-09-30")])
            .arg("--cafile")
            .arg(self.folder.join("hub.pem"))
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    fn with_token(&self, program: &str, key: u8) -> Command {
        let token = sign(&format!("{HOST}/devices/pump"), &Secret::new([key; 32]), 4_000_000_000, None);
        let mut command = self.client(program, "pump");
        command.args(["-P", token.expose_str().unwrap()]);
        command
    }

    async fn stop(mut self) {
        self.hub.shutdown.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
        std::fs::remove_dir_all(&self.folder).unwrap();
    }
}

fn certificate_of_hub(folder: &std::path::Path) -> Certificate {
    let file = |name: &str| FileContents { path: folder.join(name), contents: Vec::new() };
    let private_key = SecretFile { path: folder.join("hub.key"), secret: Secret::new([]) };
    Certificate { certificate: file("hub.pem"), private_key }
}

/// Writes NAME.pem and NAME.key and returns the certificate.
fn write_certificate(folder: &std::path::Path, name: &str) -> Vec<u8> {
    let mut params = CertificateParams::new(vec![HOST.to_owned()]).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    let key = KeyPair::generate().unwrap();
    let certificate = params.self_signed(&key).unwrap();
    std::fs::write(folder.join(format!("{name}.pem")), certificate.pem()).unwrap();
    std::fs::write(folder.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    certificate.der().to_vec()
}

async fn run(mut command: Command) -> std::process::Output {
    let output = tokio::time::timeout(MINUTE, command.output()).await.expect("the client ended");
    output.expect("mosquitto clients are installed (Debian package mosquitto-clients)")
}

fn invitation() -> Invitation {
    Invitation {
        stream: "TestStream".parse().unwrap(),
        url: "wss://127.0.0.1:443/bridges/ih/hub/d/pump/sid/00ff/r/device".into(),
        ticket: Secret::new("tok"),
        policy: "service".parse().unwrap(),
        rid: "r1".into(),
    }
}

#[tokio::test]
async fn a_stock_client_gets_a_stream_request_and_its_answer_counts() {
    let world = World::start().await;
    let mut subscriber = world.with_token("mosquitto_sub", 1);
    subscriber.args(["-v", "-C", "1", "-t", "$iothub/streams/POST/#"]);
    let device = async {
        let output = run(subscriber).await;
        let mut publisher = world.with_token("mosquitto_pub", 2);
        publisher.args(["-n", "-t", "$iothub/streams/res/200/?$rid=r1"]);
        assert!(run(publisher).await.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let pump = "pump".parse().unwrap();
    let (answer, heard) = tokio::join!(world.hub.courier.invite(&pump, invitation(), MINUTE, MINUTE), device);
    assert!(
        heard.starts_with("$iothub/streams/POST/TestStream/?$rid=r1&$url=wss%3A%2F%2F127.0.0.1%3A443%2F"),
        "{heard}"
    );
    assert_eq!(answer.unwrap().answer, Answer { accepted: true, reason: None });
    world.stop().await;
}

#[tokio::test]
async fn stock_clients_see_the_right_refusals() {
    let world = World::start().await;
    let telemetry = ["-q", "1", "-m", "21.5", "-t", "devices/pump/messages/events/"];
    let mut accepted = world.with_token("mosquitto_pub", 1);
    accepted.args(telemetry);
    assert!(run(accepted).await.status.success());
    assert_eq!(world.hub.metrics.telemetry.get(), 1);

    let mut wrong_key = world.with_token("mosquitto_pub", 3);
    wrong_key.args(telemetry);
    let output = run(wrong_key).await;
    assert_eq!(output.status.code(), Some(5), "the CONNACK's code is the program's");
    assert!(String::from_utf8_lossy(&output.stderr).contains("not authorised"), "{output:?}");

    let mut version_5 = world.with_token("mosquitto_pub", 1);
    version_5.args(["-V", "mqttv5"]).args(telemetry);
    assert!(String::from_utf8_lossy(&run(version_5).await.stderr).contains("Unsupported Protocol Version"));
    world.stop().await;
}

#[tokio::test]
async fn a_stock_client_comes_in_by_certificate() {
    let world = World::start().await;
    let mut with = world.client("mosquitto_pub", "cam");
    with.arg("--cert").arg(world.folder.join("cam.pem")).arg("--key").arg(world.folder.join("cam.key"));
    with.args(["-q", "1", "-m", "x", "-t", "devices/cam/messages/events/"]);
    assert!(run(with).await.status.success());
    let mut without = world.client("mosquitto_pub", "cam");
    without.args(["-q", "1", "-m", "x", "-t", "devices/cam/messages/events/"]);
    assert_eq!(run(without).await.status.code(), Some(5));
    world.stop().await;
}
