//! How culvert scales: `cargo bench --bench scale [-- --devices 10000 --flows 5000 --secs 2]`.
//!
//! One hub with many idle devices (MQTT over WebSocket, each with its own key, subscribed as a device is), then many
//! idle flows on one device stream, then a device daemon at rest and with 32 busy flows, then what one hub does in a
//! second: device streams initiated and joined, and bytes relayed over 1 to 64 bridges. Memory is the processes' own
//! share (Pss, from `/proc`), rates are those of this machine with the load beside the hub on the same cores.

#[path = "support/load.rs"]
#[allow(dead_code, reason = "only the flows are used here")]
mod load;
#[path = "support/machine.rs"]
mod machine;
#[path = "support/peers.rs"]
#[allow(dead_code, reason = "only culvert is used here")]
mod peers;

use std::{
    os::unix::process::CommandExt as _,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::{Bytes, BytesMut};
use culvert::{
    auth::{
        ConnectionString,
        connstr::{Credential, Owner},
        sas,
    },
    base::{Identity, Name, Secret, StreamName},
    device::{self, DeviceStream},
    proto::mqtt::{self, Connect, Packet, Qos, Subscribe},
    service,
    transport::{
        carrier::{Carrier, CarrierOptions, Upgrade},
        dial::{Dialer, ProxyRules},
        http::{HttpRequest, Url, request},
        tls::{ClientStream, ClientTls, Trust},
    },
};
use futures_util::future::BoxFuture;
use http::{HeaderValue, Method, header};
use load::{Load, Way};
use peers::{DEVICE, Hub, Processes};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// Handshakes under way at a time: fewer than the hub takes from one address.
const TOGETHER: usize = 32;
/// For one handshake on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// Set in the process that has raised its limit of open files.
const RAISED: &str = "CULVERT_BENCH_FILES_RAISED";
/// A key that every idle device has; the hub does not mind.
const KEY: &str = "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=";

struct Options {
    devices: usize,
    flows: usize,
    secs: f64,
}

fn main() -> anyhow::Result<()> {
    if std::env::var_os(RAISED).is_none() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "ulimit -n $(ulimit -Hn); exec \"$0\" \"$@\""]).arg(std::env::current_exe()?);
        return Err(shell.args(std::env::args().skip(1)).env(RAISED, "1").exec().into());
    }
    let options = options()?;
    machine::wait_for_quiet(Duration::from_secs(60));
    println!("\n{}\n\n| | |\n|---|---|", machine::describe());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(idle_devices(options.devices))?;
    idle_flows(options.flows)?;
    busy_device(options.secs)?;
    runtime.block_on(initiations(options.secs))?;
    for bridges in [1, 16, 64] {
        runtime.block_on(relayed(bridges, options.secs))?;
    }
    println!("\nload at the end: {}", machine::describe());
    Ok(())
}

fn options() -> anyhow::Result<Options> {
    let mut options = Options { devices: 10_000, flows: 5000, secs: 2.0 };
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    while let Some(word) = words.next() {
        let value = words.next().with_context(|| format!("{word} needs a value"))?;
        match word.as_str() {
            "--devices" => options.devices = value.parse()?,
            "--flows" => options.flows = value.parse()?,
            "--secs" => options.secs = value.parse()?,
            _ => anyhow::bail!("unknown option {word}; see the head of benches/scale.rs"),
        }
    }
    Ok(options)
}

fn row(what: impl std::fmt::Display, value: impl std::fmt::Display) {
    println!("| {what} | {value} |");
}

/// Runs `one` for each number, some at a time, and keeps what it yields.
async fn each<T: Send + 'static, F>(count: usize, one: impl Fn(usize) -> F) -> anyhow::Result<Vec<T>>
where
    F: Future<Output = anyhow::Result<T>> + Send + 'static,
{
    let mut all: JoinSet<Result<anyhow::Result<T>, tokio::time::error::Elapsed>> = JoinSet::new();
    let mut done = Vec::with_capacity(count);
    for number in 0..count {
        all.spawn(tokio::time::timeout(PATIENCE, one(number)));
        if all.len() == TOGETHER {
            done.push(all.join_next().await.context("a task")????);
        }
    }
    while let Some(result) = all.join_next().await {
        done.push(result???);
    }
    Ok(done)
}

// === idle devices ===

/// How a client reaches the hub.
struct Reach {
    owner: ConnectionString,
    tls: ClientTls,
    dialer: Dialer,
}

impl Reach {
    fn new(hub: &Hub) -> anyhow::Result<Self> {
        let owner = std::fs::read_to_string(hub.folder.0.join("owner.connection"))?.trim().parse()?;
        let tls = ClientTls::new(&Trust::File(hub.folder.0.join("ca.pem")), None)?;
        Ok(Self { owner, dialer: Dialer::new(tls.clone(), ProxyRules::none()), tls })
    }

    fn token(&self) -> anyhow::Result<Secret> {
        let (Owner::Policy(policy), Credential::Key(key)) = (&self.owner.owner, &self.owner.credential) else {
            anyhow::bail!("a policy's connection string is needed");
        };
        Ok(sas::sign(&self.owner.host, key, u64::from(u32::MAX), Some(policy)))
    }

    async fn register(self: Arc<Self>, device: String) -> anyhow::Result<()> {
        let mut token = HeaderValue::from_bytes(self.token()?.expose())?;
        token.set_sensitive(true);
        let key = format!(r#"{{"primaryKey":"{KEY}","secondaryKey":"{KEY}"}}"#);
        let body = format!(
            r#"{{"deviceId":"{device}","status":"enabled","authentication":{{"type":"sas","symmetricKey":{key}}}}}"#
        );
        let url = Url {
            host: self.owner.host.clone(),
            port: self.owner.port,
            path: format!("/devices/{device}?api-version=2020-09-30"),
        };
        let headers = vec![
            (header::AUTHORIZATION, token),
            (header::CONTENT_TYPE, HeaderValue::from_static("application/json; charset=utf-8")),
        ];
        let (method, body) = (Method::PUT, Bytes::from(body));
        let answer = request(&self.dialer, HttpRequest { method, url, headers, body, timeout: PATIENCE }).await?;
        anyhow::ensure!(answer.status.is_success(), "{device}: {}", answer.status);
        Ok(())
    }

    /// A control session that is subscribed to initiations.
    async fn session(self: Arc<Self>, device: String) -> anyhow::Result<Carrier<ClientStream<TcpStream>>> {
        let io = TcpStream::connect((self.owner.host.as_str(), self.owner.port)).await?;
        let io = self.tls.connect(&self.owner.host, io).await?;
        let upgrade = Upgrade {
            host: &format!("{}:{}", self.owner.host, self.owner.port),
            path: "/$iothub/websocket",
            subprotocol: Some("mqtt"),
            bearer: None,
            user_agent: "bench",
        };
        let mut carrier = Carrier::client(io, &upgrade, CarrierOptions::HUB_CONTROL).await?;
        let text: ConnectionString =
            format!("HostName={};DeviceId={device};SharedAccessKey={KEY}", self.owner.host).parse()?;
        let Credential::Key(key) = &text.credential else { anyhow::bail!("a key") };
        let resource = format!("{}/devices/{device}", self.owner.host);
        let connect = Packet::Connect(Box::new(Connect {
            clean_session: true,
            keep_alive: 0,
            client_id: device.clone(),
            will: None,
            username: Some(format!("{}/{device}/?api-version=2021-04-12", self.owner.host)),
            password: Some(sas::sign(&resource, key, u64::from(u32::MAX), None)),
        }));
        let filters = vec![(culvert::proto::control::REQUEST_FILTER.to_owned(), Qos::AtMostOnce)];
        let id = 1.try_into().context("an identifier")?;
        let mut bytes = BytesMut::new();
        mqtt::encode(&connect, &mut bytes)?;
        mqtt::encode(&Packet::Subscribe(Subscribe { id, filters }), &mut bytes)?;
        carrier.write_all(&bytes).await?;
        carrier.flush().await?;
        let mut answers = [0; 4 + 5];
        carrier.read_exact(&mut answers).await?;
        anyhow::ensure!(answers[3] == 0 && answers[8] == 0, "{device}: {answers:?}");
        Ok(carrier)
    }
}

async fn idle_devices(count: usize) -> anyhow::Result<()> {
    let (hub, processes) = Hub::start()?;
    let reach = Arc::new(Reach::new(&hub)?);
    let name = |number| format!("idle-{number}");
    let begin = Instant::now();
    each(count, |number| reach.clone().register(name(number))).await?;
    row(
        format!("{count} devices registered, per second"),
        format!("{:.0}", count as f64 / begin.elapsed().as_secs_f64()),
    );
    let before = machine::memory_of(&processes.pids());
    let begin = Instant::now();
    let sessions = each(count, |number| reach.clone().session(name(number))).await?;
    row("their control sessions, per second", format!("{:.0}", count as f64 / begin.elapsed().as_secs_f64()));
    let memory = machine::memory_of(&processes.pids()) - before;
    row(format!("hub, KiB per idle device of {}", sessions.len()), format!("{:.1}", memory / sessions.len() as f64));
    let cpu = machine::cpu_of(&processes.pids());
    tokio::time::sleep(Duration::from_secs(5)).await;
    let cpu = (machine::cpu_of(&processes.pids()) - cpu) / 5.0 * 100.0;
    row("hub's CPU with all of them idle, percent of a core", format!("{cpu:.1}"));
    Ok(())
}

// === flows ===

fn idle_flows(count: usize) -> anyhow::Result<()> {
    let load = Load::start()?;
    let peer = peers::culvert_with(load.target, count + 1000, "")?;
    anyhow::ensure!(load.probe(peer.near, PATIENCE), "the tunnel never carried a byte");
    let pids = peer.processes.pids();
    let before = machine::memory_of(&pids);
    let (held, after) = load.idle(peer.near, count, || machine::memory_of(&pids));
    anyhow::ensure!(held == count, "{} of {count} idle flows failed", count - held);
    row(
        format!("all daemons, KiB per idle flow of {held} on one device stream"),
        format!("{:.1}", (after - before) / held as f64),
    );
    Ok(())
}

fn busy_device(secs: f64) -> anyhow::Result<()> {
    let load = Load::start()?;
    let peer = peers::culvert_with(load.target, 4096, "")?;
    anyhow::ensure!(load.probe(peer.near, PATIENCE), "the tunnel never carried a byte");
    // Started in this order: hub, device, service.
    let device = &peer.processes.pids()[1..2];
    row("device daemon, idle, MiB", format!("{:.1}", machine::memory_of(device) / 1024.0));
    for way in [Way::Down, Way::Up] {
        let flows = load.flows(peer.near, way, 32);
        std::thread::sleep(Duration::from_secs_f64(secs));
        row(
            format!("device daemon, 32 busy flows {way:?}, MiB"),
            format!("{:.1}", machine::memory_of(device) / 1024.0),
        );
        drop(flows);
    }
    Ok(())
}

// === the hub's own work ===

/// A device that sends all it can on a stream named `bulk`, and ends others at once.
struct Source;

impl device::Handler for Source {
    fn accepts<'a>(&'a self, _: &'a StreamName, _: Option<&'a Name>) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn serve<'a>(&'a self, name: &'a StreamName, mut io: DeviceStream) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let block = vec![7; 64 * 1024];
            while name.as_str() == "bulk" && io.write_all(&block).await.is_ok() {}
            // The service has gone.
            let _ = io.shutdown().await;
        })
    }
}

/// A hub with a device in this process, and a client for it.
struct World {
    service: Arc<service::Client>,
    device: Identity,
    processes: Processes,
    _tasks: JoinSet<()>,
    _hub: Hub,
}

impl World {
    async fn start() -> anyhow::Result<Self> {
        let (hub, processes) = Hub::start()?;
        let read = |name: &str| std::fs::read_to_string(hub.folder.0.join(name));
        let (ca, state) = (hub.folder.0.join("ca.pem"), hub.folder.0.join("state"));
        let client = device::Client::new(&read("device.connection")?, Some(&ca), &state, Arc::new(Source)).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(client.run(CancellationToken::new()));
        let service = service::Client::new(&read("service.connection")?, Some(&ca))?.with_timeouts(PATIENCE, PATIENCE);
        let world = Self { service: Arc::new(service), device: DEVICE.parse()?, processes, _tasks: tasks, _hub: hub };
        world.open("first").await?;
        Ok(world)
    }

    async fn open(&self, name: &str) -> anyhow::Result<DeviceStream> {
        Ok(self.service.open(&self.device, &name.parse()?).await?)
    }
}

async fn initiations(secs: f64) -> anyhow::Result<()> {
    let world = World::start().await?;
    let done = Arc::new(AtomicU64::new(0));
    let (cpu, begin) = (machine::cpu_of(&world.processes.pids()), Instant::now());
    let mut all = JoinSet::new();
    for _ in 0..8 {
        let (service, device, done) = (world.service.clone(), world.device.clone(), done.clone());
        all.spawn(async move {
            let name: StreamName = "short".parse()?;
            while begin.elapsed().as_secs_f64() < secs {
                let mut stream = service.open(&device, &name).await?;
                stream.read_to_end(&mut Vec::new()).await?;
                done.fetch_add(1, Relaxed);
            }
            anyhow::Ok(())
        });
    }
    while let Some(result) = all.join_next().await {
        result??;
    }
    let (done, seconds) = (done.load(Relaxed) as f64, begin.elapsed().as_secs_f64());
    let cpu = (machine::cpu_of(&world.processes.pids()) - cpu) / done * 1e3;
    row("device streams initiated, joined and ended, per second", format!("{:.0}", done / seconds));
    row("hub's CPU for each, ms", format!("{cpu:.2}"));
    Ok(())
}

async fn relayed(bridges: usize, secs: f64) -> anyhow::Result<()> {
    let world = World::start().await?;
    let bytes = Arc::new(AtomicU64::new(0));
    let mut all = JoinSet::new();
    for _ in 0..bridges {
        let (mut stream, bytes) = (world.open("bulk").await?, bytes.clone());
        all.spawn(async move {
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(count @ 1..) = stream.read(&mut buffer).await {
                bytes.fetch_add(count as u64, Relaxed);
            }
        });
    }
    tokio::time::sleep(Duration::from_secs_f64(secs / 4.0)).await;
    let pids = world.processes.pids();
    let (cpu, before, begin) = (machine::cpu_of(&pids), bytes.load(Relaxed), Instant::now());
    tokio::time::sleep(Duration::from_secs_f64(secs)).await;
    let gigabytes = (bytes.load(Relaxed) - before) as f64 / 1e9;
    let (seconds, cpu) = (begin.elapsed().as_secs_f64(), machine::cpu_of(&pids) - cpu);
    row(
        format!("relayed over {bridges} bridges, MB/s; hub's CPU s per GB"),
        format!("{:.0}; {:.2}", gigabytes * 1e3 / seconds, cpu / gigabytes),
    );
    Ok(())
}
