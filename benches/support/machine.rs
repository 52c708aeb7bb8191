//! What the machine says: CPU time and memory of processes, its load, cores and date. From `/proc`, so Linux only.

use std::{
    fs,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// Of `/proc/*/stat`; the same on every Linux.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU seconds, user and system, of these processes and their descendants so far.
pub(crate) fn cpu_of(pids: &[u32]) -> f64 {
    let ticks = tree(pids).into_iter().filter_map(|pid| {
        let fields = stat(pid)?;
        Some(fields[11].parse::<f64>().ok()? + fields[12].parse::<f64>().ok()?)
    });
    ticks.sum::<f64>() / TICKS_PER_SECOND
}

/// Memory of these processes and their descendants in KiB; pages that several share are counted once over all.
pub(crate) fn memory_of(pids: &[u32]) -> f64 {
    let kib = tree(pids).into_iter().filter_map(|pid| {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
        text.lines().find(|line| line.starts_with("Pss:"))?.split_whitespace().nth(1)?.parse::<f64>().ok()
    });
    kib.sum()
}

/// One line about the machine and the moment.
pub(crate) fn describe() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let date = Command::new("date").args(["-u", "+%Y-%m-%d %H:%M UTC"]).stdin(Stdio::null()).output();
    let date = date.map_or_else(|_| String::new(), |out| String::from_utf8_lossy(&out.stdout).trim().to_owned());
    format!("{date}, {cores} cores ({}), load {:.1}", std::env::consts::ARCH, load())
}

/// Waits, for a while, until others have left the machine alone; what is measured before is worth little.
pub(crate) fn wait_for_quiet(at_most: Duration) {
    let (begin, cores) = (Instant::now(), std::thread::available_parallelism().map_or(1, usize::from));
    while load() > 1.25 * cores as f64 && begin.elapsed() < at_most {
        std::thread::sleep(Duration::from_secs(2));
    }
}

fn load() -> f64 {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|first| first.parse().ok()).unwrap_or_default()
}

/// The fields of a process's `stat` behind its name.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<String> = text.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect();
    (fields.len() > 12).then_some(fields)
}

fn tree(roots: &[u32]) -> Vec<u32> {
    let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parents: Vec<(u32, u32)> = pids.filter_map(|pid| Some((stat(pid)?[1].parse().ok()?, pid))).collect();
    let mut all = roots.to_vec();
    let mut next = 0;
    while next < all.len() {
        let parent = all[next];
        all.extend(parents.iter().filter(|(of, _)| *of == parent).map(|(_, pid)| pid));
        next += 1;
    }
    all
}
