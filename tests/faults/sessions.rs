//! What people do over the device stream: a shell, copies, downloads and a database, all at once and all the time.
//!
//! Owns the programs and the judgement of what came through. Does not know what happens to the network. Invariant: a
//! program that ends with an error, a wrong checksum, or a number out of order is remembered as a failure.

use std::{
    fs,
    io::{BufReader, Write as _},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::{JoinHandle, sleep, spawn},
    time::{Duration, Instant},
};

use super::{
    lab::{Host, Lab, run},
    targets::{BIG_FILE, Targets, checksum},
};

/// The shell prints a number this often.
pub(crate) const TICK: Duration = Duration::from_millis(50);
/// Something is typed this often.
const TYPE_EVERY: Duration = Duration::from_millis(200);
/// The shell's program: counts, and repeats what is typed. A `read` that times out in the middle of a line gives what it
/// has.
const COUNT: &str = "stty -echo; echo N 0; i=0; p=; while :; do if read -t 0.05 x; then echo E $p$x; p=; \
    else p=$p$x; i=$((i+1)); echo N $i; fi; done";

/// An interactive shell through ssh whose numbers must come each once and in order, in both directions.
pub(crate) struct Shell {
    child: Child,
    seen: Arc<Mutex<Vec<Instant>>>,
    faults: Arc<Mutex<Vec<String>>>,
    ended: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Shell {
    /// Logs in, and waits until the counter runs.
    pub(crate) fn open(lab: &Lab, targets: &Targets) -> Self {
        let mut command = lab.on(Host::Service, "ssh");
        command.args(targets.ssh_options()).args(["-tt", "-p", "7022", "root@127.0.0.1", "bash", "-c"]);
        command.arg(format!("'{COUNT}'")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.stderr(fs::File::create(lab.dir.join("ssh.log")).unwrap()).spawn().unwrap();
        let (output, input) = (child.stdout.take().unwrap(), child.stdin.take().unwrap());
        let (seen, faults) = (Arc::<Mutex<Vec<Instant>>>::default(), Arc::<Mutex<Vec<String>>>::default());
        let ended = Arc::<AtomicBool>::default();
        let reader = {
            let (seen, faults, ended) = (seen.clone(), faults.clone(), ended.clone());
            spawn(move || {
                read_numbers(BufReader::new(output), &seen, &faults);
                ended.store(true, Relaxed);
            })
        };
        let writer = {
            let ended = ended.clone();
            spawn(move || type_numbers(input, &ended))
        };
        let shell = Self { child, seen, faults, ended, threads: vec![reader, writer] };
        shell.wait_steady(Instant::now(), Duration::from_secs(30)).expect("the shell's numbers come");
        shell
    }

    /// Waits until numbers come evenly again after `since`.
    pub(crate) fn wait_steady(&self, since: Instant, limit: Duration) -> Result<(), String> {
        // A carrier that lived less than 1.5 s is not replaced at once, by design.
        let (window, gap) = (Duration::from_secs(2), Duration::from_millis(400));
        let begun = Instant::now();
        loop {
            let now = Instant::now();
            if now - since >= window {
                let seen = self.seen.lock().unwrap();
                let recent: Vec<_> = seen.iter().rev().take_while(|at| now - **at < window).collect();
                let even = recent.windows(2).all(|pair| *pair[0] - *pair[1] < gap);
                let fresh = recent.first().is_some_and(|at| now - **at < gap);
                let early = recent.last().is_some_and(|at| now - **at > window - gap);
                if even && fresh && early {
                    return Ok(());
                }
            }
            if self.ended.load(Relaxed) {
                return Err("the ssh session ended".into());
            }
            if now - begun > limit {
                return Err(format!("no numbers for {limit:?}"));
            }
            sleep(TICK);
        }
    }

    /// Waits until so many numbers have come after `since`, however they come.
    pub(crate) fn wait_numbers(&self, since: Instant, count: usize, limit: Duration) -> Result<(), String> {
        let begun = Instant::now();
        while self.seen.lock().unwrap().iter().rev().take_while(|at| **at > since).count() < count {
            if self.ended.load(Relaxed) {
                return Err("the ssh session ended".into());
            }
            if begun.elapsed() > limit {
                return Err(format!("fewer than {count} numbers for {limit:?}"));
            }
            sleep(TICK);
        }
        Ok(())
    }

    /// How long nothing came after `healed`, by the longest pause since `cut`.
    pub(crate) fn stall(&self, cut: Instant, healed: Instant) -> Duration {
        let seen = self.seen.lock().unwrap();
        let from = seen.partition_point(|at| *at < cut).saturating_sub(1);
        let longest = seen[from..].windows(2).max_by_key(|pair| pair[1] - pair[0]);
        match longest {
            Some(pair) if pair[1] - pair[0] > 4 * TICK => pair[1].saturating_duration_since(healed),
            _ => Duration::ZERO,
        }
    }

    /// True once ssh has ended.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Relaxed)
    }

    /// Ends the session; gives how many numbers came, and what was wrong.
    pub(crate) fn finish(mut self) -> (usize, Vec<String>) {
        let mut faults = Vec::new();
        if let Some(status) = self.child.try_wait().unwrap() {
            faults.push(format!("the ssh session ended by itself: {status}"));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.threads.drain(..).for_each(|thread| thread.join().unwrap());
        faults.append(&mut self.faults.lock().unwrap());
        (self.seen.lock().unwrap().len(), faults)
    }
}

fn read_numbers(lines: impl std::io::BufRead, seen: &Mutex<Vec<Instant>>, faults: &Mutex<Vec<String>>) {
    let (mut next, mut echo) = (0_u64, 1_u64);
    for line in lines.lines().map_while(Result::ok) {
        seen.lock().unwrap().push(Instant::now());
        let expected = match line.chars().next() {
            Some('E') => &mut echo,
            _ => &mut next,
        };
        let number = line.trim().get(2..).and_then(|number| number.parse().ok());
        if number != Some(*expected) {
            faults.lock().unwrap().push(format!("the shell printed {line:?} instead of {expected}"));
        }
        *expected = number.unwrap_or(*expected) + 1;
    }
}

fn type_numbers(mut input: ChildStdin, ended: &AtomicBool) {
    // What is typed before the terminal's echo is off would come twice.
    sleep(Duration::from_secs(3));
    for number in 1_u64.. {
        if ended.load(Relaxed) {
            return;
        }
        if writeln!(input, "{number}").and_then(|()| input.flush()).is_err() {
            return;
        }
        sleep(TYPE_EVERY);
    }
}

/// Programs that are run again and again until told to stop.
#[derive(Default)]
pub(crate) struct Loops {
    stop: Arc<AtomicBool>,
    threads: Vec<(&'static str, JoinHandle<Result<u64, String>>)>,
}

impl Loops {
    /// scp, curl and pgbench.
    pub(crate) fn start(lab: &Lab, targets: &Targets, speed: u64) -> Self {
        let mut loops = Self::default();
        let expected = targets.checksum;

        let copy = lab.dir.join("copy");
        let mut scp = lab.on(Host::Service, "scp");
        scp.args(targets.ssh_options()).args(["-l", &(speed * 8 / 1000).to_string(), "-P", "7022"]);
        scp.arg(format!("root@127.0.0.1:{}", lab.dir.join("www").join(BIG_FILE).display())).arg(&copy);
        loops.repeat("scp", move || {
            finished(&mut scp)?;
            let same = checksum(fs::File::open(&copy).map_err(|error| error.to_string())?) == expected;
            if same { Ok(1) } else { Err("the copy differs".into()) }
        });

        let mut curl = lab.on(Host::Service, "curl");
        curl.args(["-sS", "--fail", "--limit-rate", &speed.to_string(), &format!("http://127.0.0.1:7080/{BIG_FILE}")]);
        loops.repeat("http", move || {
            let mut child = curl.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            let same = checksum(child.stdout.take().unwrap()) == expected;
            let output = child.wait_with_output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            if same && output.status.success() { Ok(1) } else { Err(format!("download: {} {said}", output.status)) }
        });

        let mut pgbench = lab.on(Host::Service, "pgbench");
        pgbench.args([
            "-n",
            "-h",
            "127.0.0.1",
            "-p",
            "7054",
            "-U",
            "postgres",
            "-c",
            "2",
            "-T",
            "15",
            "-R",
            "40",
            "bench",
        ]);
        loops.repeat("pgbench", move || {
            let said = finished(&mut pgbench)?;
            let number = |what: &str| {
                let line = said.lines().find_map(|line| line.strip_prefix(what))?;
                line.split(|c: char| !c.is_ascii_digit()).find(|part| !part.is_empty())?.parse::<u64>().ok()
            };
            match (number("number of transactions actually processed:"), number("number of failed transactions:")) {
                (Some(done), Some(0)) => Ok(done),
                _ => Err(said),
            }
        });
        loops
    }

    fn repeat(&mut self, name: &'static str, mut once: impl FnMut() -> Result<u64, String> + Send + 'static) {
        let stop = self.stop.clone();
        let thread = spawn(move || {
            let mut done = 0;
            while !stop.load(Relaxed) {
                done += once()?;
            }
            Ok(done)
        });
        self.threads.push((name, thread));
    }

    /// Lets each program finish what it does, and gives how much it did; what was wrong is added to `faults`.
    pub(crate) fn finish(self, faults: &mut Vec<String>) -> Vec<(&'static str, u64)> {
        self.stop.store(true, Relaxed);
        let ends = self.threads.into_iter().map(|(name, thread)| (name, thread.join().unwrap()));
        let mut done = Vec::new();
        for (name, end) in ends {
            match end {
                Ok(count) => done.push((name, count)),
                Err(fault) => faults.push(format!("{name}: {fault}")),
            }
        }
        done
    }
}

/// What a program printed, if it succeeded.
fn finished(command: &mut Command) -> Result<String, String> {
    let output = run(command);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if output.status.success() { Ok(out.into_owned()) } else { Err(format!("{}: {out}{err}", output.status)) }
}
