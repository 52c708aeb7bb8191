//! The price of small frames at the hub: `cargo bench --bench frames [-- --reps 5]`.
//!
//! The SDK for C sends its device streams in frames of 64 bytes, the one for Node in 64 KiB. Both ends are in this
//! process and the hub in its own; the sender's frames are made before the clock starts, so that what is compared is
//! the hub's work. 8 MB travel from a service to a device in 64 KiB frames; in 64-byte frames, many to a TLS record, as
//! they come where a sender's writes gather; and in 64-byte frames with a TLS record for each, as the C sample writes
//! them, where the sender's own work counts too. Repetitions are interleaved; figures are medians. CPU time is the
//! hub's, from `/proc`.

#[path = "support/machine.rs"]
#[allow(dead_code, reason = "memory is not measured here")]
mod machine;
#[path = "support/peers.rs"]
#[allow(dead_code, reason = "only the hub is used here")]
mod peers;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use culvert::{
    auth::{ConnectionString, sas},
    base::{Name, Secret, StreamName},
    device::{self, DeviceStream},
    transport::tls::{ClientStream, ClientTls, Trust},
};
use futures_util::future::BoxFuture;
use peers::{DEVICE, Hub, Processes};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    sync::mpsc,
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// What travels: 125,000 frames of 64 bytes.
const BYTES: usize = 8_000_000;
/// Bytes of frames in one write where they gather.
const GATHERED: usize = 64 * 1024;
/// The hub's CPU time has a resolution of 10 ms: this many runs are one measurement.
const RUNS: usize = 5;

/// Name, payload of a frame, and whether each frame is a write of its own.
const KINDS: [(&str, usize, bool); 3] = [
    ("64 KiB frames", 65_536, false),
    ("64-byte frames, gathered", 64, false),
    ("64-byte frames, a TLS record each", 64, true),
];

/// A plain device stream with a service that frames by hand.
struct World {
    service: ClientStream<TcpStream>,
    device: DeviceStream,
    processes: Processes,
    _tasks: JoinSet<()>,
    _hub: Hub,
}

#[derive(Clone, Copy)]
struct Figures {
    seconds: f64,
    hub_cpu: f64,
}

fn main() -> anyhow::Result<()> {
    let reps = reps()?;
    machine::wait_for_quiet(Duration::from_secs(60));
    println!("\n{}; {BYTES} bytes, {RUNS} times per repetition, {reps} repetitions\n", machine::describe());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let all = runtime.block_on(async {
        let mut world = World::start().await?;
        let mut all: [Vec<Figures>; KINDS.len()] = Default::default();
        for _ in 0..reps {
            for ((_, size, single), figures) in KINDS.iter().zip(&mut all) {
                figures.push(world.measure(*size, *single).await?);
            }
        }
        Ok::<_, anyhow::Error>(all)
    })?;
    print(&all);
    println!("\nload at the end: {}", machine::describe());
    Ok(())
}

fn reps() -> anyhow::Result<usize> {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => Ok(5),
        ["--reps", reps] => Ok(reps.parse()?),
        _ => anyhow::bail!("the only option is --reps; see the head of benches/frames.rs"),
    }
}

impl World {
    async fn start() -> anyhow::Result<Self> {
        let (hub, processes) = Hub::start()?;
        let read = |name: &str| std::fs::read_to_string(hub.folder.0.join(name));
        let ca = hub.folder.0.join("ca.pem");
        let (sender, mut accepted) = mpsc::channel(1);
        let state = hub.folder.0.join("state");
        let client =
            device::Client::new(&read("device.connection")?, Some(&ca), &state, Arc::new(HandOver(sender))).await?;
        let mut tasks = JoinSet::new();
        tasks.spawn(client.run(CancellationToken::new()));
        let service = open(&read("service.connection")?.trim().parse()?, Trust::File(ca)).await?;
        let device = accepted.recv().await.context("the device got no stream")?;
        Ok(Self { service, device, processes, _tasks: tasks, _hub: hub })
    }

    /// The mean over some runs.
    async fn measure(&mut self, size: usize, single: bool) -> anyhow::Result<Figures> {
        let writes = writes(size, single);
        let Self { service, device, processes, .. } = self;
        let (cpu, begin) = (machine::cpu_of(&processes.pids()), Instant::now());
        for _ in 0..RUNS {
            let send = async {
                for bytes in &writes {
                    service.write_all(bytes).await?;
                }
                service.flush().await
            };
            let receive = async {
                let (mut buffer, mut left) = (vec![0; 256 * 1024], BYTES);
                while left > 0 {
                    match device.read(&mut buffer).await? {
                        0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
                        count => left -= count,
                    }
                }
                Ok(())
            };
            tokio::try_join!(send, receive)?;
        }
        let runs = RUNS as f64;
        let hub_cpu = (machine::cpu_of(&processes.pids()) - cpu) / runs;
        Ok(Figures { seconds: begin.elapsed().as_secs_f64() / runs, hub_cpu })
    }
}

/// All bytes as masked binary frames, in the pieces in which they are written.
fn writes(size: usize, single: bool) -> Vec<Vec<u8>> {
    const MASK: [u8; 4] = [0x37, 0xfa, 0x21, 0x3d];
    let frames = (0..BYTES).step_by(size).map(|at| {
        let payload = at..BYTES.min(at + size);
        let mut frame = vec![0x82];
        match payload.len() {
            length @ 0..=125 => frame.push(0x80 | length as u8),
            length @ 126..=65_535 => frame.extend([&[0xfe], &(length as u16).to_be_bytes()[..]].concat()),
            length => frame.extend([&[0xff], &(length as u64).to_be_bytes()[..]].concat()),
        }
        frame.extend(MASK);
        frame.extend(payload.map(|at| (at / 3) as u8).zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        frame
    });
    if single {
        return frames.collect();
    }
    let all: Vec<u8> = frames.flatten().collect();
    all.chunks(GATHERED).map(<[u8]>::to_vec).collect()
}

/// Opens a device stream as an SDK does: POST, then a WebSocket.
async fn open(connection: &ConnectionString, trust: Trust) -> anyhow::Result<ClientStream<TcpStream>> {
    let tls = ClientTls::new(&trust, None)?;
    let address = (connection.host.clone(), connection.port);
    let dial = || async { anyhow::Ok(tls.connect(&address.0, TcpStream::connect(&address).await?).await?) };
    let authority = format!("{}:{}", connection.host, connection.port);
    let token = token(connection)?;
    let post = format!(
        "POST /twins/{DEVICE}/streams/bench?api-version=2020-09-30 HTTP/1.1\r\nHost: {authority}\r\n\
         Authorization: {token}\r\nContent-Length: 0\r\n\r\n"
    );
    let head = exchange(&mut dial().await?, &post).await?;
    let header = |name: &str| -> anyhow::Result<String> {
        let line = head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        Ok(line.with_context(|| format!("no {name} in {head}"))?.to_owned())
    };
    let (url, ticket) = (header("iothub-streaming-url")?, header("iothub-streaming-auth-token")?);
    let path = url.splitn(4, '/').nth(3).context("a URL without a path")?;
    let upgrade = format!(
        "GET /{path} HTTP/1.1\r\nHost: {authority}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nAuthorization: Bearer {ticket}\r\n\r\n"
    );
    let mut io = dial().await?;
    let head = exchange(&mut io, &upgrade).await?;
    anyhow::ensure!(head.starts_with("HTTP/1.1 101 "), "{head}");
    Ok(io)
}

fn token(connection: &ConnectionString) -> anyhow::Result<String> {
    use culvert::auth::connstr::{Credential, Owner};
    let (Owner::Policy(policy), Credential::Key(key)) = (&connection.owner, &connection.credential) else {
        anyhow::bail!("a policy's connection string is needed");
    };
    let signed: Secret = sas::sign(&connection.host, key, u64::from(u32::MAX), Some(policy));
    Ok(signed.expose_str().context("a token is text")?.to_owned())
}

/// Sends a request and reads an answer's head; nothing comes behind it.
async fn exchange(io: &mut ClientStream<TcpStream>, request: &str) -> anyhow::Result<String> {
    io.write_all(request.as_bytes()).await?;
    io.flush().await?;
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        anyhow::ensure!(io.read_buf(&mut head).await? > 0, "no answer");
    }
    Ok(String::from_utf8(head)?)
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

fn print(all: &[Vec<Figures>]) {
    println!("| 8 MB in | ms | ratio | hub's CPU ms | ratio |\n|---|---|---|---|---|");
    let base = median(&all[0]);
    for ((name, ..), figures) in KINDS.iter().zip(all) {
        let Figures { seconds, hub_cpu } = median(figures);
        let (time, cpu) = (seconds / base.seconds, hub_cpu / base.hub_cpu);
        println!("| {name} | {:.1} | {time:.2} | {:.0} | {cpu:.2} |", seconds * 1e3, hub_cpu * 1e3);
    }
}

fn median(figures: &[Figures]) -> Figures {
    let middle = |of: fn(&Figures) -> f64| {
        let mut values: Vec<f64> = figures.iter().map(of).collect();
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
    };
    Figures { seconds: middle(|figures| figures.seconds), hub_cpu: middle(|figures| figures.hub_cpu) }
}
