//! Sessions live through everything that can happen to their carrier: real daemons, real programs, real cuts.
//!
//! Each role runs on a host of its own (a network namespace); the device sits behind a NAT. An SSH shell, scp, HTTP
//! downloads, pgbench and a remote desktop share one device stream while it is cut again and again. The short form runs
//! with all other tests; the long form, with optimised daemons, is `tests/faults/run`.
//!
//! Whether everything goes on, whole and in order, is asserted; how long people waited is printed.
//!
//! Needs root, and the programs that are named above. With `netbox` beside the repository (`../shared/tools`) the hub's
//! line has a round trip of 50 ms, and can be made bad.

#![allow(clippy::unwrap_used, reason = "a helper of a test fails the test")]

mod cut;
mod daemons;
mod desktop;
mod lab;
mod sessions;
mod targets;

use std::{
    fs::File,
    time::{Duration, Instant},
};

use self::{
    cut::{Cut, ROUND, Stalls},
    daemons::Daemons,
    desktop::Desktop,
    lab::{Host, Lab},
    sessions::{Loops, Shell},
    targets::{ROUTES, Targets},
};

/// How many cuts, in the environment.
const CUTS: &str = "CULVERT_FAULTS";
/// Round trip to the hub of each leg.
const GOOD_LINE: &str = "delay=25";
/// "At once" on a machine that is busy with other tests, and far from the grace of 15 minutes.
const AT_ONCE: Duration = Duration::from_secs(30);
/// What the shell counts in 2 s: more than lay on the way to it when the carrier was cut.
const LUMP: usize = 40;
/// A stall that counts as "never".
const LOST: Duration = Duration::from_secs(90);

fn wanted_cuts() -> usize {
    std::env::var(CUTS).map_or(ROUND.len(), |text| text.parse().expect("a number of cuts"))
}

/// Tests that measure time run one at a time, in whatever processes they are.
fn alone() -> File {
    let file = File::create(std::env::temp_dir().join("culvert-faults.lock")).unwrap();
    file.lock().unwrap();
    file
}

/// A lab with everything in it.
struct World {
    // Dropped in this order.
    shell: Option<Shell>,
    desktop: Option<Desktop>,
    /// On a bad line numbers come in lumps.
    is_even: bool,
    daemons: Daemons,
    targets: Targets,
    lab: Lab,
}

impl World {
    fn new(name: &str, resume_for: &str, mebibytes: usize) -> Option<Self> {
        let lab = Lab::new(name)?;
        let targets = Targets::start(&lab, mebibytes);
        let daemons = Daemons::start(&lab, &ROUTES, resume_for);
        lab.line(GOOD_LINE);
        let shell = Shell::open(&lab, &targets);
        Some(Self { shell: Some(shell), desktop: None, is_even: true, daemons, targets, lab })
    }

    /// Adds a remote desktop to what goes on.
    fn open_desktop(&mut self) {
        self.desktop = Some(Desktop::open(&self.lab, &self.targets.xrdp));
    }

    fn shell(&self) -> &Shell {
        self.shell.as_ref().unwrap()
    }

    /// Makes a cut and waits until shell and desktop go on; gives the shell's stall.
    fn cut(&mut self, number: usize, cut: Cut) -> Duration {
        self.daemons.note(&format!("{number}: {cut}"));
        let before = resumes(&self.daemons);
        let begun = Instant::now();
        let healed = cut.make(&mut self.lab, &mut self.daemons);
        let goes_on = if self.is_even {
            self.shell().wait_steady(healed, LOST)
        } else {
            self.shell().wait_numbers(healed, LUMP, LOST)
        };
        if let Err(why) = goes_on {
            panic!("cut {number} ({cut}): {why}");
        }
        if let Some(Err(why)) = self.desktop.as_mut().map(|desktop| desktop.wait_answers(healed, 2, LOST)) {
            panic!("cut {number} ({cut}): {why}");
        }
        let stall = self.shell().stall(begun, healed);
        let resumed = resumes(&self.daemons) - before;
        println!("cut {number:3} {:24} stall {:6.3} s, resumed {resumed}x", cut.to_string(), stall.as_secs_f64());
        stall
    }

    /// Ends the programs and judges them. Gives the faults.
    fn judge(&mut self, loops: Loops) -> Vec<String> {
        let mut faults = Vec::new();
        let done = loops.finish(&mut faults);
        let (numbers, mut wrong) = self.shell.take().unwrap().finish();
        faults.append(&mut wrong);
        let (answers, wrong) = self.desktop.take().unwrap().finish();
        faults.extend(wrong);
        println!("the shell printed {numbers} lines, the desktop answered {answers} times; done: {done:?}");
        let transactions = done.iter().find(|(name, _)| *name == "pgbench").map_or(0, |(_, count)| *count);
        let recorded = self.targets.query(&self.lab, "select count(*) from pgbench_history");
        if recorded != i64::try_from(transactions).unwrap() {
            faults.push(format!("{transactions} transactions were reported and {recorded} recorded"));
        }
        for host in [Host::Device, Host::Service] {
            let log = self.daemons.log(host);
            let bad = |line: &&str| {
                ["ERROR", "panicked", "link ended", "device stream ended: "].iter().any(|word| line.contains(word))
            };
            faults.extend(log.lines().filter(bad).map(|line| format!("{host:?}: {line}")));
        }
        let streams = self.daemons.log(Host::Service).matches("device stream open").count();
        if streams != 1 {
            faults.push(format!("{streams} device streams instead of one that was resumed"));
        }
        faults
    }
}

/// How often a link was resumed, as the service tells.
fn resumes(daemons: &Daemons) -> usize {
    daemons.log(Host::Service).matches("link resumed").count()
}

#[test]
fn sessions_live_through_cuts_of_every_kind() {
    let _alone = alone();
    let cuts = wanted_cuts();
    let Some(mut world) = World::new("cuts", "15m", 200) else { return };
    world.open_desktop();
    let loops = Loops::start(&world.lab, &world.targets, 6_000_000);
    let mut stalls = Stalls::default();
    for (number, cut) in ROUND.into_iter().cycle().take(cuts).enumerate() {
        stalls.add(cut, world.cut(number + 1, cut));
    }
    println!("{stalls}");
    let faults = world.judge(loops);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn sessions_live_through_cuts_on_bad_lines() {
    let _alone = alone();
    let lines = [
        "delay=50 jitter=20 loss=1",
        "delay=20 reorder=5 dup=1 loss=0.5",
        "delay=40 rate=8e6 queue=65536",
        "delay=100 jitter=50 loss=3 reorder=2 rate=2e7",
    ];
    let cuts = [Cut::Kill(Host::Device), Cut::Silence(Host::Service, 5), Cut::Kill(Host::Hub), Cut::Crash, Cut::Forget];
    let Some(mut world) = World::new("lines", "15m", 20) else { return };
    if !world.lab.has_netbox() {
        eprintln!("SKIPPED: no netbox beside the repository");
        return;
    }
    world.open_desktop();
    world.is_even = false;
    let loops = Loops::start(&world.lab, &world.targets, 1_000_000);
    // Half as many as on the good line, in all; in the short form the kinds are shared out among the lines.
    let per_line = wanted_cuts() / 2 / lines.len();
    let mut cuts = cuts.into_iter().cycle().enumerate();
    for line in lines {
        world.lab.line(line);
        println!("line: {line}");
        let mut stalls = Stalls::default();
        for (number, cut) in cuts.by_ref().take(per_line) {
            stalls.add(cut, world.cut(number + 1, cut));
        }
        println!("{stalls}");
    }
    world.lab.line(GOOD_LINE);
    let faults = world.judge(loops);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn a_session_that_cannot_be_resumed_ends_by_a_reset_with_the_reason() {
    let _alone = alone();
    let Some(mut world) = World::new("expiry", "3s", 1) else { return };
    world.lab.silence(Host::Device);
    let begun = Instant::now();
    while !world.shell().has_ended() {
        assert!(begun.elapsed() < LOST, "ssh still waits for a session that cannot come back");
        std::thread::sleep(Duration::from_millis(100));
    }
    println!("ssh ended {:.1} s after the cut", begun.elapsed().as_secs_f64());
    let log = world.daemons.log(Host::Service);
    assert!(log.contains("session lost") && log.contains("reason=\"session_lost\""), "{log}");
    // What it says when a connection ends in order. A reset shows at its next read or write: "reset" or "broken pipe".
    let said = std::fs::read_to_string(world.lab.dir.join("ssh.log")).unwrap();
    assert!(!said.contains("closed by"), "ssh said {said:?}");
    world.lab.heal();
    // With nothing to keep alive, the device asks again within a minute only.
    let healed = Instant::now();
    while world.daemons.log(Host::Device).matches("ready for device streams").count() < 2 {
        assert!(healed.elapsed() < LOST, "the device never came back");
        std::thread::sleep(Duration::from_millis(100));
    }
    world.shell = Some(Shell::open(&world.lab, &world.targets));
}

#[test]
fn a_restart_of_a_daemon_is_learnt_at_once_by_the_other_side() {
    let _alone = alone();
    let Some(mut world) = World::new("restart", "15m", 1) else { return };
    for (host, is_crash) in [(Host::Device, false), (Host::Device, true), (Host::Service, false), (Host::Service, true)]
    {
        let login = || world.lab.sh(Host::Device, "ss -Htn state established 'sport = :7022' | wc -l");
        assert_eq!(login().trim(), "1");
        let begun = Instant::now();
        if is_crash {
            world.daemons.crash(&world.lab, host);
        } else {
            world.daemons.restart(&world.lab, host);
        }
        let ready = Instant::now();
        // The person's end, and the target's.
        while !world.shell().has_ended() || login().trim() != "0" {
            assert!(ready.elapsed() < AT_ONCE, "a restart (crash: {is_crash}) of {host:?} went unnoticed");
            std::thread::sleep(Duration::from_millis(50));
        }
        let (whole, after) = (begun.elapsed().as_secs_f64(), ready.elapsed().as_secs_f64());
        println!("{host:?}, crash {is_crash}: noticed {whole:.2} s after the end, {after:.2} s after the start");
        world.shell = Some(Shell::open(&world.lab, &world.targets));
    }
}
