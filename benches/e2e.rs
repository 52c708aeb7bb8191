//! culvert beside plain relays and ssh, end to end: `cargo bench --bench e2e [-- --secs 3 --reps 3 --only NAME]`.
//!
//! Three tunnels of the same shape lead from a port of loopback to a target: three plain TCP relays, `ssh` over two
//! encrypted hops, and culvert's service, hub and device; and `bore`, one hop without encryption, if it is installed.
//! Each runs in processes of its own, with TLS (or ssh's AES-128-GCM) where it has it and with the configuration that a
//! person would write. Repetitions are interleaved, so that what is compared was measured within the same minutes. The
//! output is Markdown: medians over the repetitions, and the medians of the ratios within each repetition.
//!
//! `--only` names a tunnel (`relays`, `ssh`, `bore`, `culvert`, and `bypass`, which is culvert without the resumable link
//! and is measured only if named) or a part of a measurement's name (`1 flow`, `round trip`, `memory`); it may be given
//! more than once. Each tunnel starts fresh in every repetition; its round trips under load are measured after it has
//! carried bulk.

#[path = "support/load.rs"]
mod load;
#[path = "support/machine.rs"]
mod machine;
#[path = "support/peers.rs"]
mod peers;

use std::{
    io,
    net::SocketAddr,
    os::unix::process::CommandExt as _,
    process::Command,
    time::{Duration, Instant},
};

use load::{Load, Way};
use peers::Peer;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// For a tunnel to carry its first byte.
const USABLE_WITHIN: Duration = Duration::from_secs(20);
/// Connections that are held open for the memory figure.
const IDLE: usize = 1000;
/// Connections opened at a time.
const TOGETHER: usize = 8;
/// Set in the process that has raised its limit of open files.
const RAISED: &str = "CULVERT_BENCH_FILES_RAISED";

type Begin = fn(SocketAddr) -> io::Result<Peer>;
const TUNNELS: [(&str, Begin); 5] = [
    ("relays", peers::relays),
    ("ssh", peers::ssh),
    ("bore", peers::bore),
    ("culvert", peers::culvert),
    (BYPASS, peers::without_link),
];
const BYPASS: &str = "bypass";

/// What is measured.
#[derive(Clone, Copy)]
enum Test {
    Memory,
    RoundTrip(Option<(Way, usize)>),
    Connections,
    Bulk(Way, usize),
}

const TESTS: [(&str, Test); 11] = [
    ("memory", Test::Memory),
    ("round trip, idle", Test::RoundTrip(None)),
    ("connections", Test::Connections),
    ("1 flow down", Test::Bulk(Way::Down, 1)),
    ("1 flow up", Test::Bulk(Way::Up, 1)),
    ("16 flows down", Test::Bulk(Way::Down, 16)),
    ("16 flows up", Test::Bulk(Way::Up, 16)),
    ("round trip beside 1 flow down", Test::RoundTrip(Some((Way::Down, 1)))),
    ("round trip beside 1 flow up", Test::RoundTrip(Some((Way::Up, 1)))),
    ("round trip beside 16 flows down", Test::RoundTrip(Some((Way::Down, 16)))),
    ("round trip beside 16 flows up", Test::RoundTrip(Some((Way::Up, 16)))),
];

struct Options {
    secs: f64,
    reps: usize,
    only: Vec<String>,
}

/// One figure of one tunnel in one repetition.
struct Figure {
    tunnel: usize,
    rep: usize,
    name: String,
    value: f64,
}

fn main() -> io::Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [relay, listen, to] = words.as_slice()
        && relay == "relay"
    {
        return run_relay(listen, to);
    }
    if std::env::var_os(RAISED).is_none() {
        let mut shell = Command::new("sh");
        shell.args(["-c", "ulimit -n $(ulimit -Hn); exec \"$0\" \"$@\""]).arg(std::env::current_exe()?).args(words);
        return Err(shell.env(RAISED, "1").exec());
    }
    let options = Options::parse(&words)?;
    machine::wait_for_quiet(Duration::from_secs(60));
    println!("\n{}; {} s per figure, {} repetitions\n", machine::describe(), options.secs, options.reps);
    let load = Load::start()?;
    let mut figures = Vec::new();
    for rep in 0..options.reps {
        for (tunnel, (name, begin)) in TUNNELS.iter().enumerate() {
            if !options.wants_tunnel(name) {
                continue;
            }
            match begin(load.target) {
                Ok(peer) => figures.extend(measure(&load, &peer, &options, (tunnel, rep))),
                Err(error) => eprintln!("{name} does not run here: {error}"),
            }
        }
    }
    print_table(&figures);
    println!("\nload at the end: {}", machine::describe());
    Ok(())
}

fn measure(load: &Load, peer: &Peer, options: &Options, (tunnel, rep): (usize, usize)) -> Vec<Figure> {
    let mut figures = Vec::new();
    if !load.probe(peer.near, USABLE_WITHIN) {
        eprintln!("{} never carried a byte", TUNNELS[tunnel].0);
        return figures;
    }
    for (name, test) in TESTS.iter().filter(|(name, _)| options.wants_test(name)) {
        let begin = Instant::now();
        for (name, value) in one(load, peer, options.secs, name, *test) {
            figures.push(Figure { tunnel, rep, name, value });
        }
        eprintln!("{} {rep} {name}: {:.1} s", TUNNELS[tunnel].0, begin.elapsed().as_secs_f64());
    }
    figures
}

fn one(load: &Load, peer: &Peer, secs: f64, name: &str, test: Test) -> Vec<(String, f64)> {
    let pids = peer.processes.pids();
    match test {
        Test::Memory => {
            let before = machine::memory_of(&pids);
            let (held, after) = load.idle(peer.near, IDLE, || machine::memory_of(&pids));
            if held < IDLE {
                eprintln!("{} of {IDLE} idle flows failed", IDLE - held);
            }
            let per_flow = (after - before) / held.max(1) as f64;
            vec![
                ("memory, no flow, MiB".into(), before / 1024.0),
                (format!("memory per idle flow of {IDLE}, KiB"), per_flow),
            ]
        }
        Test::RoundTrip(beside) => match load.ping(peer.near, beside, secs) {
            Ok(times) => vec![(format!("{name}, p50, us"), times.p50), (format!("{name}, p99, us"), times.p99)],
            Err(error) => {
                eprintln!("{name}: {error}");
                Vec::new()
            }
        },
        Test::Connections => {
            let (rate, failed) = load.churn(peer.near, TOGETHER, secs);
            if failed > 0 {
                eprintln!("{failed} connections failed");
            }
            vec![(format!("new connections per second, {TOGETHER} at a time"), rate)]
        }
        Test::Bulk(way, flows) => {
            let (bulk, cpu) = load.bulk(peer.near, way, flows, secs, || machine::cpu_of(&pids));
            let mut all = vec![
                (format!("{name}, MB/s"), bulk.megabytes_per_second),
                (format!("{name}, CPU s per GB"), cpu / bulk.gigabytes),
            ];
            if flows > 1 {
                all.push((format!("{name}, Jain fairness"), bulk.jain));
            }
            all
        }
    }
}

// === the table ===

fn print_table(figures: &[Figure]) {
    let bypassed = TUNNELS.iter().position(|(name, _)| *name == BYPASS);
    let bypassed = figures.iter().any(|figure| Some(figure.tunnel) == bypassed);
    let more = if bypassed { [" bypass | culvert / bypass |", "---|---|"] } else { ["", ""] };
    println!("| | relays | ssh | bore | culvert | culvert / relays | culvert / ssh |{}", more[0]);
    println!("|---|---|---|---|---|---|---|{}", more[1]);
    let mut names: Vec<&str> = Vec::new();
    for figure in figures {
        if !names.contains(&figure.name.as_str()) {
            names.push(&figure.name);
        }
    }
    for name in names {
        let of = |tunnel: usize| -> Vec<(usize, f64)> {
            let these = figures.iter().filter(|figure| figure.tunnel == tunnel && figure.name == name);
            these.map(|figure| (figure.rep, figure.value)).collect()
        };
        let [relays, ssh, bore, culvert, bypass] = [0, 1, 2, 3, 4].map(of);
        let value = |all: &[(usize, f64)]| text(median(all.iter().map(|(_, value)| *value)));
        let ratio = |base: &[(usize, f64)]| {
            let pairs = culvert.iter().filter_map(|(rep, value)| {
                let (_, base) = base.iter().find(|(other, _)| other == rep)?;
                Some(value / base)
            });
            text(median(pairs))
        };
        let mut cells = vec![value(&relays), value(&ssh), value(&bore), value(&culvert), ratio(&relays), ratio(&ssh)];
        if bypassed {
            cells.extend([value(&bypass), ratio(&bypass)]);
        }
        println!("| {name} | {} |", cells.join(" | "));
    }
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.get(values.len().saturating_sub(1) / 2)?, values.get(values.len() / 2)?);
    Some(f64::midpoint(*low, *high))
}

fn text(value: Option<f64>) -> String {
    match value {
        None => "-".into(),
        Some(value) if value.abs() >= 100.0 => format!("{value:.0}"),
        Some(value) if value.abs() >= 10.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    }
}

// === the relay ===

/// One hop of the chain: copies both ways, as a plain relay of a few lines would.
fn run_relay(listen: &str, to: &str) -> io::Result<()> {
    let (listen, to) = (address(listen)?, address(to)?);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async move {
        let listener = TcpListener::bind(listen).await?;
        let mut all = JoinSet::new();
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let (mut near, _) = accepted?;
                    all.spawn(async move {
                        let mut far = TcpStream::connect(to).await?;
                        near.set_nodelay(true)?;
                        far.set_nodelay(true)?;
                        tokio::io::copy_bidirectional_with_sizes(&mut near, &mut far, 65_536, 65_536).await
                    });
                }
                Some(_) = all.join_next() => {}
            }
        }
    })
}

fn address(text: &str) -> io::Result<SocketAddr> {
    text.parse().map_err(io::Error::other)
}

// === the options ===

impl Options {
    fn parse(words: &[String]) -> io::Result<Self> {
        let mut options = Self { secs: 3.0, reps: 3, only: Vec::new() };
        let mut words = words.iter().filter(|word| *word != "--bench");
        while let Some(word) = words.next() {
            let mut value = || words.next().ok_or_else(|| io::Error::other(format!("{word} needs a value")));
            match word.as_str() {
                "--secs" => options.secs = value()?.parse().map_err(io::Error::other)?,
                "--reps" => options.reps = value()?.parse().map_err(io::Error::other)?,
                "--only" => options.only.push(value()?.clone()),
                _ => return Err(io::Error::other(format!("unknown option {word}; see the head of benches/e2e.rs"))),
            }
        }
        Ok(options)
    }

    fn wants_tunnel(&self, name: &str) -> bool {
        let named = |(tunnel, _): &(&str, Begin)| self.only.iter().any(|only| only == tunnel);
        self.only.iter().any(|only| only == name) || (name != BYPASS && !TUNNELS.iter().any(named))
    }

    fn wants_test(&self, name: &str) -> bool {
        let mut tests = self.only.iter().filter(|only| TUNNELS.iter().all(|(tunnel, _)| tunnel != only)).peekable();
        tests.peek().is_none() || tests.any(|only| name.contains(only.as_str()))
    }
}
