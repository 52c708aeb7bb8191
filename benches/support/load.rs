//! The load: the target that tunnels dial, and the clients that dial tunnels.
//!
//! Both ends are in this process, so that delivered bytes are counted at the receiver without a word in the stream.
//! A connection begins with eight bytes: what the target shall do, and a number; the rest is payload.

use std::{
    collections::HashMap,
    io::{self, Read as _, Write as _},
    net::{SocketAddr, TcpStream as BlockingStream},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
    task::JoinSet,
};

const HEADER: usize = 8;
const WRITE: usize = 64 * 1024;
const READ: usize = 256 * 1024;
/// The target echoes on its main thread.
const ECHO: u8 = b'E';
/// The target echoes on a thread of its own, so that its other work is no part of a round trip.
const ECHO_ALONE: u8 = b'A';
/// The target counts and forgets.
const SINK: u8 = b'S';
/// The target sends as fast as it can.
const SOURCE: u8 = b'G';
/// How long a round trip, a connection or the end of one may take before it counts as an error.
const PATIENCE: Duration = Duration::from_secs(20);

/// Which way bulk goes, as the client sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Down,
    Up,
}

/// What a window of bulk delivered.
#[derive(Debug)]
pub(crate) struct Bulk {
    pub(crate) megabytes_per_second: f64,
    pub(crate) gigabytes: f64,
    pub(crate) jain: f64,
}

/// Round trips, or connections, in microseconds.
#[derive(Debug)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

#[derive(Default)]
struct Shared {
    received: Mutex<HashMap<u32, Arc<AtomicU64>>>,
    serving: AtomicUsize,
}

/// A running target.
pub(crate) struct Load {
    pub(crate) target: SocketAddr,
    shared: Arc<Shared>,
    next: AtomicU32,
}

/// Bulk flows that run until they are dropped.
pub(crate) struct Flows {
    counters: Vec<Arc<AtomicU64>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    /// Starts a target on a free port of loopback.
    pub(crate) fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let runtime = current_thread();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0"))?;
        let target = listener.local_addr()?;
        let serving = shared.clone();
        std::thread::spawn(move || runtime.block_on(serve_all(listener, serving)));
        Ok(Self { target, shared, next: AtomicU32::new(0) })
    }

    /// True once a byte came back through the tunnel.
    pub(crate) fn probe(&self, near: SocketAddr, within: Duration) -> bool {
        let begin = Instant::now();
        while begin.elapsed() < within {
            let echo = || -> io::Result<()> {
                let mut socket = BlockingStream::connect(near)?;
                socket.set_read_timeout(Some(Duration::from_secs(5)))?;
                socket.write_all(&header(ECHO, 0))?;
                socket.write_all(b"?")?;
                socket.read_exact(&mut [0])
            };
            if echo().is_ok() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        false
    }

    /// Starts bulk flows.
    pub(crate) fn flows(&self, near: SocketAddr, way: Way, flows: usize) -> Flows {
        let stop = Arc::new(AtomicBool::new(false));
        let first = self.next.fetch_add(flows as u32, Relaxed);
        let ids: Vec<u32> = (first..).take(flows).collect();
        let counters: Vec<_> = ids.iter().map(|id| self.shared.counter(*id)).collect();
        let (stopped, counted) = (stop.clone(), counters.clone());
        let thread = std::thread::spawn(move || {
            current_thread().block_on(async {
                let mut all = JoinSet::new();
                for (id, counter) in ids.into_iter().zip(counted) {
                    all.spawn(one_flow(near, way, id, counter));
                }
                while !stopped.load(Relaxed) {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            });
        });
        Flows { counters, stop, thread: Some(thread) }
    }

    /// Measures bulk. `cpu` is asked at both ends of the window; the difference is the second result.
    pub(crate) fn bulk(
        &self,
        near: SocketAddr,
        way: Way,
        flows: usize,
        secs: f64,
        cpu: impl Fn() -> f64,
    ) -> (Bulk, f64) {
        let running = self.flows(near, way, flows);
        std::thread::sleep(warm_up(secs));
        let (cpu_before, before, begin) = (cpu(), running.snapshot(), Instant::now());
        std::thread::sleep(Duration::from_secs_f64(secs));
        let (after, seconds, cpu_after) = (running.snapshot(), begin.elapsed().as_secs_f64(), cpu());
        drop(running);
        self.settle();
        let each: Vec<f64> = before.iter().zip(&after).map(|(before, after)| (after - before) as f64).collect();
        let sum: f64 = each.iter().sum();
        let squares: f64 = each.iter().map(|bytes| bytes * bytes).sum();
        let jain = sum * sum / (each.len() as f64 * squares.max(1.0));
        (Bulk { megabytes_per_second: sum / seconds / 1e6, gigabytes: sum / 1e9, jain }, cpu_after - cpu_before)
    }

    /// Round trips of 64 bytes while so many bulk flows run.
    pub(crate) fn ping(&self, near: SocketAddr, bulk: Option<(Way, usize)>, secs: f64) -> io::Result<Latency> {
        let background = bulk.map(|(way, flows)| self.flows(near, way, flows));
        std::thread::sleep(warm_up(secs));
        let times = round_trips(near, Duration::from_secs_f64(secs));
        drop(background);
        self.settle();
        Ok(percentiles(times?))
    }

    /// Connections per second, `together` at a time: open, one byte and back, close. With the number of failures.
    pub(crate) fn churn(&self, near: SocketAddr, together: usize, secs: f64) -> (f64, usize) {
        let (begin, window) = (Instant::now(), Duration::from_secs_f64(secs));
        let (mut done, mut failed) = (0, 0);
        current_thread().block_on(async {
            let mut all = JoinSet::new();
            for _ in 0..together {
                all.spawn(async move {
                    let (mut done, mut failed) = (0, 0);
                    while begin.elapsed() < window && failed < 100 {
                        match tokio::time::timeout(PATIENCE, echo_once(near)).await {
                            Ok(Ok(_)) => done += 1,
                            _ => failed += 1,
                        }
                    }
                    (done, failed)
                });
            }
            while let Some(Ok((more, fewer))) = all.join_next().await {
                (done, failed) = (done + more, failed + fewer);
            }
        });
        self.settle();
        (f64::from(done) / begin.elapsed().as_secs_f64(), failed)
    }

    /// Holds so many connections, each of which has echoed a byte, while `look` runs. Says how many there were.
    pub(crate) fn idle<T>(&self, near: SocketAddr, connections: usize, look: impl FnOnce() -> T) -> (usize, T) {
        let runtime = current_thread();
        let held: Vec<TcpStream> = runtime.block_on(async {
            let (mut all, mut held) = (JoinSet::new(), Vec::new());
            for index in 0..connections {
                all.spawn(async move { tokio::time::timeout(PATIENCE, echo_once(near)).await });
                if index >= 16
                    && let Some(Ok(Ok(Ok(socket)))) = all.join_next().await
                {
                    held.push(socket);
                }
            }
            while let Some(ended) = all.join_next().await {
                held.extend(ended.ok().and_then(Result::ok).and_then(Result::ok));
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
            held
        });
        let looked = look();
        let count = held.len();
        drop(held);
        self.settle();
        (count, looked)
    }

    /// Waits until the target has seen all connections end, so that tests do not run into each other.
    fn settle(&self) {
        let begin = Instant::now();
        while self.shared.serving.load(Relaxed) > 0 && begin.elapsed() < PATIENCE / 2 {
            std::thread::sleep(Duration::from_millis(10));
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

impl Flows {
    fn snapshot(&self) -> Vec<u64> {
        self.counters.iter().map(|counter| counter.load(Relaxed)).collect()
    }
}

impl Drop for Flows {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        if matches!(ended, Some(Err(_))) {
            eprintln!("a thread of the load has panicked");
        }
    }
}

impl Shared {
    fn counter(&self, id: u32) -> Arc<AtomicU64> {
        self.received.lock().unwrap_or_else(PoisonError::into_inner).entry(id).or_default().clone()
    }
}

fn warm_up(secs: f64) -> Duration {
    Duration::from_secs_f64((secs / 3.0).clamp(0.3, 1.0))
}

fn current_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime needs nothing but memory")
}

fn header(what: u8, id: u32) -> [u8; HEADER] {
    let mut header = [what; HEADER];
    header[4..].copy_from_slice(&id.to_le_bytes());
    header
}

// === the target ===

async fn serve_all(listener: TcpListener, shared: Arc<Shared>) {
    let mut all = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                if let Ok((socket, _)) = accepted {
                    let shared = shared.clone();
                    all.spawn(async move {
                        shared.serving.fetch_add(1, Relaxed);
                        // How a connection of the load ends is the client's business.
                        let _ = serve(socket, &shared).await;
                        shared.serving.fetch_sub(1, Relaxed);
                    });
                }
            }
            Some(_) = all.join_next() => {}
        }
    }
}

async fn serve(mut socket: TcpStream, shared: &Shared) -> io::Result<()> {
    socket.set_nodelay(true)?;
    let mut header = [0; HEADER];
    socket.read_exact(&mut header).await?;
    let id = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
    match header[0] {
        ECHO => {
            let mut buffer = [0; 64];
            loop {
                match socket.read(&mut buffer).await? {
                    0 => return Ok(()),
                    n => socket.write_all(&buffer[..n]).await?,
                }
            }
        }
        ECHO_ALONE => {
            let socket = socket.into_std()?;
            socket.set_nonblocking(false)?;
            std::thread::spawn(move || echo(socket));
            Ok(())
        }
        SOURCE => pump_out(&mut socket).await,
        _ => pump_in(&mut socket, &shared.counter(id)).await,
    }
}

fn echo(mut socket: BlockingStream) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match socket.read(&mut buffer)? {
            0 => return Ok(()),
            n => socket.write_all(&buffer[..n])?,
        }
    }
}

/// Bytes that no layer can compress or skip; one page of noise, again and again.
pub(crate) async fn pump_out(to: &mut (impl AsyncWrite + Unpin)) -> io::Result<()> {
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    let noise: Vec<u8> = (0..WRITE)
        .map(|_| {
            x = (x ^ (x << 13)) ^ ((x ^ (x << 13)) >> 7);
            (x >> 24) as u8
        })
        .collect();
    loop {
        to.write_all(&noise).await?;
    }
}

/// Counts until the end.
pub(crate) async fn pump_in(from: &mut (impl AsyncRead + Unpin), counter: &AtomicU64) -> io::Result<()> {
    let mut buffer = vec![0; READ];
    loop {
        match from.read(&mut buffer).await? {
            0 => return Ok(()),
            n => counter.fetch_add(n as u64, Relaxed),
        };
    }
}

// === the clients ===

async fn one_flow(near: SocketAddr, way: Way, id: u32, counter: Arc<AtomicU64>) {
    let what = if way == Way::Down { SOURCE } else { SINK };
    let flow = async {
        let mut socket = dial(near, &header(what, id)).await?;
        match way {
            Way::Down => pump_in(&mut socket, &counter).await,
            Way::Up => pump_out(&mut socket).await,
        }
    };
    if let Err(error) = flow.await {
        eprintln!("a bulk flow ended: {error}");
    }
}

async fn dial(near: SocketAddr, first: &[u8]) -> io::Result<TcpStream> {
    let mut socket = TcpStream::connect(near).await?;
    socket.set_nodelay(true)?;
    socket.write_all(first).await?;
    Ok(socket)
}

async fn echo_once(near: SocketAddr) -> io::Result<TcpStream> {
    let mut first = [0; HEADER + 1];
    first[..HEADER].copy_from_slice(&header(ECHO, 0));
    let mut socket = dial(near, &first).await?;
    socket.read_exact(&mut first[..1]).await?;
    Ok(socket)
}

/// On the calling thread, blocking: no scheduler of ours is in the path.
fn round_trips(near: SocketAddr, window: Duration) -> io::Result<Vec<Duration>> {
    let mut socket = BlockingStream::connect(near)?;
    socket.set_nodelay(true)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.write_all(&header(ECHO_ALONE, 0))?;
    let mut message = [7; 64];
    let mut trip = || -> io::Result<Duration> {
        let begin = Instant::now();
        socket.write_all(&message)?;
        socket.read_exact(&mut message)?;
        Ok(begin.elapsed())
    };
    // The first one waits for the connection, which is no part of the figure.
    trip()?;
    let (begin, mut times) = (Instant::now(), Vec::new());
    while begin.elapsed() < window {
        times.push(trip()?);
    }
    Ok(times)
}

fn percentiles(mut times: Vec<Duration>) -> Latency {
    times.sort_unstable();
    let at = |share: f64| {
        let index = (times.len() as f64 * share).ceil() as usize;
        times.get(index.clamp(1, times.len().max(1)) - 1).map_or(f64::NAN, |time| time.as_secs_f64() * 1e6)
    };
    Latency { p50: at(0.5), p99: at(0.99) }
}
