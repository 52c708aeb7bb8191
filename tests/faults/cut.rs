//! The ways to lose a carrier, and the record of how long each kept people waiting.
//!
//! Owns what is done to network and hub. Does not know what runs through them. Invariant: when a cut has been made, the
//! network is whole again, and the moment of that is known.

use std::{
    collections::BTreeMap,
    fmt,
    thread::sleep,
    time::{Duration, Instant},
};

use super::{
    daemons::Daemons,
    lab::{Host, Lab},
};

/// One way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// `ss -K` on a host: the sockets to or from the hub die in an instant.
    Kill(Host),
    /// A host's packets vanish for so many seconds.
    Silence(Host, u64),
    /// The NAT forgets.
    Forget,
    /// The device gets another address.
    Move,
    /// The hub is killed and started again.
    Crash,
    /// The hub is stopped in order and started again.
    Restart,
}

/// Twenty cuts with each kind among them, in a little over three minutes.
pub(crate) const ROUND: [Cut; 20] = [
    Cut::Kill(Host::Device),
    Cut::Move,
    Cut::Silence(Host::Device, 5),
    Cut::Crash,
    Cut::Kill(Host::Service),
    Cut::Forget,
    Cut::Kill(Host::Hub),
    Cut::Restart,
    Cut::Silence(Host::Service, 5),
    Cut::Forget,
    Cut::Kill(Host::Device),
    Cut::Crash,
    Cut::Silence(Host::Service, 20),
    Cut::Kill(Host::Hub),
    Cut::Move,
    Cut::Restart,
    Cut::Silence(Host::Device, 20),
    Cut::Kill(Host::Service),
    Cut::Forget,
    Cut::Silence(Host::Device, 60),
];

impl Cut {
    /// Makes the cut, and gives the moment from which the network was whole again.
    pub(crate) fn make(self, lab: &mut Lab, daemons: &mut Daemons) -> Instant {
        match self {
            Self::Kill(host) => lab.kill_sockets(host),
            Self::Silence(host, seconds) => {
                lab.silence(host);
                sleep(Duration::from_secs(seconds));
                lab.heal();
            }
            Self::Forget => lab.forget_mappings(),
            Self::Move => lab.move_device(),
            Self::Crash => daemons.crash(lab, Host::Hub),
            Self::Restart => daemons.restart(lab, Host::Hub),
        }
        Instant::now()
    }
}

impl fmt::Display for Cut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(host) => write!(f, "ss -K, {host:?}"),
            Self::Silence(host, seconds) => write!(f, "silence {seconds} s, {host:?}"),
            Self::Forget => f.write_str("NAT forgets"),
            Self::Move => f.write_str("device moves"),
            Self::Crash => f.write_str("hub kill -9"),
            Self::Restart => f.write_str("hub SIGTERM"),
        }
    }
}

/// The stalls of a run, by kind of cut.
#[derive(Default)]
pub(crate) struct Stalls(BTreeMap<String, Vec<Duration>>);

impl Stalls {
    /// Adds one.
    pub(crate) fn add(&mut self, cut: Cut, stall: Duration) {
        self.0.entry(cut.to_string()).or_default().push(stall);
    }
}

impl fmt::Display for Stalls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:24} {:>4} {:>8} {:>8}   seconds from healed to the shell's next number",
            "", "cuts", "p50", "p99"
        )?;
        let mut row = |name: &str, all: Vec<Duration>| {
            let (p50, p99) = (quantile(all.clone(), 0.5), quantile(all.clone(), 0.99));
            writeln!(f, "{name:24} {:4} {:8.3} {:8.3}", all.len(), p50.as_secs_f64(), p99.as_secs_f64())
        };
        for (name, stalls) in &self.0 {
            row(name, stalls.clone())?;
        }
        row("all", self.0.values().flatten().copied().collect())
    }
}

fn quantile(mut all: Vec<Duration>, share: f64) -> Duration {
    all.sort_unstable();
    let rank = (all.len() as f64 * share).ceil() as usize;
    all.get(rank.max(1) - 1).copied().unwrap_or_default()
}
