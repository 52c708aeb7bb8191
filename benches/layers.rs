//! The price of each layer: `cargo bench --bench layers [-- --secs 3 --reps 3]`.
//!
//! One connection on loopback, bulk one way, both ends in this process: first plain TCP, then one layer more each time,
//! up to a channel of a mux over a link over two carriers that a hub in its own process relays. The last two layers
//! are measured with the link, without it, and with a link that never limits what is on the way: without the link
//! nothing does so, and the short queue of the first kind costs wake-ups, which is another price than the link's.
//! Repetitions are interleaved; the figures are medians. CPU time is user and system of this process, the load's ends
//! included, and of the hub, from `/proc`. System calls are those of the same processes, counted by `perf stat` (which
//! needs root; without it the column says NaN); allocations are those of this process, the hub's are not seen.

#[path = "support/load.rs"]
#[allow(dead_code, reason = "only the pumps are used here")]
mod load;
#[path = "support/machine.rs"]
#[allow(dead_code, reason = "memory is not measured here")]
mod machine;
#[path = "support/peers.rs"]
#[allow(dead_code, reason = "only the hub is used here")]
mod peers;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use culvert::{
    base::{Name, StreamName},
    device::{self, DeviceStream},
    proto::hello::{BootId, InstanceId, LinkId},
    service,
    transport::{
        carrier::{Carrier, CarrierOptions, Upgrade},
        hello::{BoxedCarrier, LinkControl, LinkSettings, LocalHello, Received, Session, offer_new, receive},
        mux::{self, MuxOptions, Role},
        tls::{Alpn, ClientTls, ServerTls, Trust},
    },
};
use futures_util::future::BoxFuture;
use peers::{DEVICE, Folder, Hub, Processes};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
};
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_util::sync::CancellationToken;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<std::alloc::System> = &INSTRUMENTED_SYSTEM;

const HOST: &str = "localhost";
/// What a daemon takes of a link ahead of its consumption, by default.
const RECEIVE_WINDOW: u32 = 32 * 1024 * 1024;
/// For the device to come online and the stream to be opened.
const PATIENCE: Duration = Duration::from_secs(20);

const LAYERS: [(&str, Layer); 11] = [
    ("TCP", Layer::Tcp),
    ("+ TLS", Layer::Tls),
    ("+ WebSocket (carrier)", Layer::Carrier),
    ("+ link", Layer::Link),
    ("+ mux", Layer::Mux(Link::Default)),
    ("+ mux, link without limit", Layer::Mux(Link::Unlimited)),
    ("+ mux, without link", Layer::Mux(Link::None)),
    ("hub between two carriers", Layer::Hub),
    ("hub, link and mux", Layer::HubMux(Link::Default)),
    ("hub, link without limit and mux", Layer::HubMux(Link::Unlimited)),
    ("hub and mux, without link", Layer::HubMux(Link::None)),
];

#[derive(Clone, Copy, PartialEq)]
enum Layer {
    Tcp,
    Tls,
    Carrier,
    Link,
    Mux(Link),
    Hub,
    HubMux(Link),
}

#[derive(Clone, Copy, PartialEq)]
enum Link {
    None,
    Default,
    /// Its window is the largest from the start.
    Unlimited,
}

/// A byte stream's two ends, with whatever must live as long.
struct Ends {
    writer: BoxedCarrier,
    reader: BoxedCarrier,
    keep: Keep,
}

/// What ends when it is dropped.
#[derive(Default)]
struct Keep {
    tasks: JoinSet<()>,
    processes: Processes,
    _folder: Option<Folder>,
}

struct Figures {
    megabytes_per_second: f64,
    cpu_per_gigabyte: f64,
    allocations_per_megabyte: f64,
    calls_per_megabyte: f64,
}

fn main() -> anyhow::Result<()> {
    let (secs, reps) = options()?;
    machine::wait_for_quiet(Duration::from_secs(60));
    println!("\n{}; {secs} s per figure, {reps} repetitions\n", machine::describe());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let mut all: Vec<Vec<Figures>> = LAYERS.iter().map(|_| Vec::new()).collect();
    for rep in 0..reps {
        for ((name, layer), figures) in LAYERS.iter().zip(&mut all) {
            let measured = runtime.block_on(async { measure(ends(*layer).await?, secs).await });
            figures.push(measured.with_context(|| (*name).to_owned())?);
            eprintln!("{name} {rep}");
        }
    }
    print(&all);
    println!("\nload at the end: {}", machine::describe());
    Ok(())
}

fn options() -> anyhow::Result<(f64, usize)> {
    let (mut secs, mut reps) = (3.0, 3);
    let mut words = std::env::args().skip(1).filter(|word| word != "--bench");
    while let Some(word) = words.next() {
        let value = words.next().with_context(|| format!("{word} needs a value"))?;
        match word.as_str() {
            "--secs" => secs = value.parse()?,
            "--reps" => reps = value.parse()?,
            _ => anyhow::bail!("unknown option {word}; see the head of benches/layers.rs"),
        }
    }
    Ok((secs, reps))
}

async fn measure(ends: Ends, secs: f64) -> anyhow::Result<Figures> {
    let Ends { mut writer, mut reader, keep } = ends;
    let mut pids = keep.processes.pids();
    pids.push(std::process::id());
    let delivered = Arc::new(AtomicU64::new(0));
    let counter = delivered.clone();
    let mut pumps = JoinSet::new();
    pumps.spawn(async move { load::pump_out(&mut writer).await });
    pumps.spawn(async move { load::pump_in(&mut reader, &counter).await });
    tokio::time::sleep(Duration::from_secs_f64((secs / 3.0).clamp(0.2, 1.0))).await;
    let (cpu, bytes, begin) = (machine::cpu_of(&pids), delivered.load(Relaxed), Instant::now());
    let allocations = ALLOCATOR.stats();
    tokio::time::sleep(Duration::from_secs_f64(secs)).await;
    let allocations = ALLOCATOR.stats() - allocations;
    let (bytes, seconds) = ((delivered.load(Relaxed) - bytes) as f64, begin.elapsed().as_secs_f64());
    let cpu = machine::cpu_of(&pids) - cpu;
    let calls = calls_per_megabyte(&pids, &delivered).await;
    anyhow::ensure!(bytes > 0.0 && pumps.try_join_next().is_none(), "the stream ended early");
    Ok(Figures {
        megabytes_per_second: bytes / seconds / 1e6,
        cpu_per_gigabyte: cpu / (bytes / 1e9),
        allocations_per_megabyte: (allocations.allocations + allocations.reallocations) as f64 / (bytes / 1e6),
        calls_per_megabyte: calls.unwrap_or(f64::NAN),
    })
}

/// System calls of the processes while they go on, as `perf` counts them; none where it may not.
async fn calls_per_megabyte(pids: &[u32], delivered: &AtomicU64) -> Option<f64> {
    let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
    let words = ["stat", "-x,", "-e", "raw_syscalls:sys_enter", "-p", &pids.join(","), "--", "sleep", "1"];
    let bytes = delivered.load(Relaxed);
    let said = tokio::process::Command::new("perf").args(words).output().await.ok()?;
    let bytes = delivered.load(Relaxed) - bytes;
    let calls: f64 = std::str::from_utf8(&said.stderr).ok()?.split(',').next()?.trim().parse().ok()?;
    Some(calls / (bytes as f64 / 1e6))
}

// === the layers ===

async fn ends(layer: Layer) -> anyhow::Result<Ends> {
    match layer {
        Layer::Tcp => tcp().await.map(|(a, b)| Ends::of(Box::new(a), Box::new(b))),
        Layer::Tls => tls().await,
        Layer::Carrier => carriers().await,
        Layer::Link => with_link(carriers().await?).await,
        Layer::Mux(link) => with_mux(carriers().await?, link).await,
        Layer::Hub => through_hub().await,
        Layer::HubMux(link) => with_mux(through_hub().await?, link).await,
    }
}

impl Ends {
    fn of(writer: BoxedCarrier, reader: BoxedCarrier) -> Self {
        Self { writer, reader, keep: Keep::default() }
    }
}

async fn tcp() -> anyhow::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let (client, accepted) = tokio::try_join!(TcpStream::connect(listener.local_addr()?), listener.accept())?;
    client.set_nodelay(true)?;
    accepted.0.set_nodelay(true)?;
    Ok((client, accepted.0))
}

/// Both sides of a TLS connection over loopback.
async fn tls_pair() -> anyhow::Result<(impl AsyncRead + AsyncWrite + Unpin, impl AsyncRead + AsyncWrite + Unpin)> {
    let folder = Folder::new("layers")?;
    let made = rcgen::generate_simple_self_signed([HOST.to_owned()])?;
    let (certificate, key) = (folder.0.join("leaf.pem"), folder.0.join("leaf.key"));
    std::fs::write(&certificate, made.cert.pem())?;
    std::fs::write(&key, made.signing_key.serialize_pem())?;
    let server = ServerTls::load(&certificate, &key)?.acceptor(Alpn::Http)?;
    let client = ClientTls::new(&Trust::Pem(made.cert.pem().into()), None)?;
    let (near, far) = tcp().await?;
    let connect = async { Ok(client.connect(HOST, near).await?) };
    let accept = async { Ok::<_, anyhow::Error>(server.accept(far).await?) };
    tokio::try_join!(connect, accept)
}

async fn tls() -> anyhow::Result<Ends> {
    let (client, server) = tls_pair().await?;
    Ok(Ends::of(Box::new(client), Box::new(server)))
}

async fn carriers() -> anyhow::Result<Ends> {
    let (client, mut server) = tls_pair().await?;
    let upgrade = Upgrade { host: HOST, path: "/", subprotocol: None, bearer: None, user_agent: "bench" };
    let near = async { Ok(Carrier::client(client, &upgrade, CarrierOptions::DATA).await?) };
    let far = async {
        let key = request_key(&mut server).await?;
        let answer = format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Accept: {}\r\n\r\n",
            derive_accept_key(key.as_bytes())
        );
        server.write_all(answer.as_bytes()).await?;
        server.flush().await?;
        let options = CarrierOptions::HUB_CONTROL;
        Ok::<_, anyhow::Error>(Carrier::server(server, Bytes::new(), options))
    };
    let (near, far) = tokio::try_join!(near, far)?;
    Ok(Ends::of(Box::new(near), Box::new(far)))
}

/// The key of an upgrade request; nothing comes behind the request before it is answered.
async fn request_key(io: &mut (impl AsyncRead + Unpin)) -> anyhow::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        anyhow::ensure!(io.read_buf(&mut head).await? > 0, "no request");
    }
    let head = String::from_utf8(head)?;
    let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with("sec-websocket-key:"));
    Ok(line.and_then(|line| line.split_once(':')).context("no key")?.1.trim().to_owned())
}

/// A session of both daemons over a byte stream.
async fn sessions(ends: Ends, link: Link) -> anyhow::Result<(Session, Session, Keep)> {
    let local = |number| LocalHello {
        instance: InstanceId([number; 16]),
        boot: BootId([number; 16]),
        max_channels: 4096,
        receive_window: RECEIVE_WINDOW,
        resume_for: if link == Link::None { Duration::ZERO } else { Duration::from_secs(900) },
        links: match link {
            Link::Unlimited => LinkSettings { initial_window: RECEIVE_WINDOW as usize, ..LinkSettings::default() },
            _ => LinkSettings::default(),
        },
    };
    let (service, device) = (local(1), local(2));
    let no_links = |_: &LinkId| -> Option<LinkControl> { None };
    let (near, far) = tokio::try_join!(offer_new(ends.writer, &service), receive(ends.reader, &device, &no_links))?;
    let Received::New(far) = far else { anyhow::bail!("a resume that nobody asked for") };
    Ok((near, far, ends.keep))
}

async fn with_link(below: Ends) -> anyhow::Result<Ends> {
    let (near, far, keep) = sessions(below, Link::Default).await?;
    Ok(Ends { writer: Box::new(near.io), reader: Box::new(far.io), keep })
}

async fn with_mux(below: Ends, link: Link) -> anyhow::Result<Ends> {
    let (near, far, mut keep) = sessions(below, link).await?;
    let (near, _, driver) = mux::start(near.io, MuxOptions::new(Role::Client));
    let (_, mut incoming, other) = mux::start(far.io, MuxOptions::new(Role::Server));
    keep.tasks.spawn(async { report(driver.await) });
    keep.tasks.spawn(async { report(other.await) });
    let mut writer = near.open().await?;
    writer.write_all(b"!").await?;
    let mut reader = incoming.accept().await.context("no channel")?;
    reader.read_exact(&mut [0]).await?;
    keep.tasks.spawn(async move {
        // What is dropped would refuse channels and end the mux.
        let _keep = (near, incoming);
        std::future::pending::<()>().await;
    });
    Ok(Ends { writer: Box::new(writer), reader: Box::new(reader), keep })
}

fn report<E: std::fmt::Debug>(ended: Result<(), E>) {
    if let Err(error) = ended {
        eprintln!("a mux ended: {error:?}");
    }
}

/// A plain device stream: service and device in this process, the hub in its own.
async fn through_hub() -> anyhow::Result<Ends> {
    let (hub, processes) = Hub::start()?;
    let read = |name: &str| std::fs::read_to_string(hub.folder.0.join(name));
    let ca = hub.folder.0.join("ca.pem");
    let (sender, mut accepted) = mpsc::channel(1);
    let state = hub.folder.0.join("state");
    let connection = read("device.connection")?;
    let device = device::Client::new(&connection, Some(&ca), &state, Arc::new(HandOver(sender))).await?;
    let mut tasks = JoinSet::new();
    tasks.spawn(device.run(CancellationToken::new()));
    let service = service::Client::new(&read("service.connection")?, Some(&ca))?.with_timeouts(PATIENCE, PATIENCE);
    let (device, stream) = (DEVICE.parse()?, "bench".parse()?);
    let writer = service.open(&device, &stream).await?;
    let reader = accepted.recv().await.context("the device got no stream")?;
    let keep = Keep { tasks, processes, _folder: Some(hub.folder) };
    Ok(Ends { writer: Box::new(writer), reader: Box::new(reader), keep })
}

/// Gives accepted streams to whoever waits.
struct HandOver(mpsc::Sender<DeviceStream>);

impl device::Handler for HandOver {
    fn accepts<'a>(&'a self, _: &'a StreamName, _: Option<&'a Name>) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn serve<'a>(&'a self, _: &'a StreamName, io: DeviceStream) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            // Nobody waits any more: the stream ends.
            let _ = self.0.send(io).await;
        })
    }
}

// === the table ===

fn print(all: &[Vec<Figures>]) {
    println!("| | MB/s | CPU s per GB, all ends | system calls per MB | allocations per MB |\n|---|---|---|---|---|");
    for ((name, _), figures) in LAYERS.iter().zip(all) {
        let of = |figure: fn(&Figures) -> f64| median(figures.iter().map(figure));
        let (speed, cpu) = (of(|figures| figures.megabytes_per_second), of(|figures| figures.cpu_per_gigabyte));
        let (calls, allocations) =
            (of(|figures| figures.calls_per_megabyte), of(|figures| figures.allocations_per_megabyte));
        println!("| {name} | {speed:.0} | {cpu:.2} | {calls:.0} | {allocations:.1} |");
    }
    for (what, with, without) in [
        ("the link, below the mux", Layer::Mux(Link::Unlimited), Layer::Mux(Link::None)),
        ("the link, through the hub", Layer::HubMux(Link::Unlimited), Layer::HubMux(Link::None)),
        ("the link and its limit, below the mux", Layer::Mux(Link::Default), Layer::Mux(Link::None)),
        ("the link and its limit, through the hub", Layer::HubMux(Link::Default), Layer::HubMux(Link::None)),
    ] {
        let find = |wanted| LAYERS.iter().zip(all).find(|((_, layer), _)| *layer == wanted).map(|(_, all)| all);
        let (Some(with), Some(without)) = (find(with), find(without)) else { continue };
        let ratio = |of: fn(&Figures) -> f64| median(with.iter().zip(without).map(|(a, b)| of(a) / of(b)));
        let cpu = ratio(|figures| figures.cpu_per_gigabyte);
        println!(
            "\n{what}: {:+.1} % CPU per GB, {:+.1} % throughput",
            (cpu - 1.0) * 100.0,
            (ratio(|figures| figures.megabytes_per_second) - 1.0) * 100.0
        );
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
