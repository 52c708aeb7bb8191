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

/// Within it some have a control session and some half a device stream.
const HALF_BACK: Duration = Duration::from_millis(700);

/// One way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cut {
    /// `ss -K` on a host: the sockets to or from the hub die in an instant.
    Kill(Host),
    /// A host's packets vanish for so many seconds.
    Silence(Host, u64),
    /// The NAT forgets.
    Forget,
    /// A host gets another address.
    Move(Host),
    /// The hub is killed and started again.
    Crash,
    /// The same once more, while everybody comes back.
    CrashTwice,
    /// The hub is stopped in order and started again.
    Restart,
}

/// Twenty cuts with each kind among them, in a little over three minutes.
pub(crate) const ROUND: [Cut; 20] = [
    Cut::Kill(Host::Device),
    Cut::Move(Host::Device),
    Cut::Silence(Host::Device, 5),
    Cut::Crash,
    Cut::Kill(Host::Service),
    Cut::Forget,
    Cut::Kill(Host::Hub),
    Cut::Restart,
    Cut::Silence(Host::Service, 5),
    Cut::Move(Host::Service),
    Cut::Kill(Host::Device),
    Cut::CrashTwice,
    Cut::Silence(Host::Service, 20),
    Cut::Kill(Host::Hub),
    Cut::Move(Host::Device),
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
            Self::Move(host) => lab.move_host(host),
            Self::Crash => daemons.crash(lab, Host::Hub),
            Self::CrashTwice => {
                daemons.crash(lab, Host::Hub);
                sleep(HALF_BACK);
                daemons.crash(lab, Host::Hub);
            }
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
            Self::Move(host) => write!(f, "{host:?} moves"),
            Self::Crash => f.write_str("hub kill -9"),
            Self::CrashTwice => f.write_str("hub kill -9, twice"),
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
        let words = "seconds from healed to the shell's next number";
        writeln!(f, "{:24} {:>4} {:>8} {:>8} {:>8}   {words}", "", "cuts", "p50", "p99", "max")?;
        let mut row = |name: &str, all: Vec<Duration>| {
            let [p50, p99, max] = [0.5, 0.99, 1.0].map(|share| quantile(all.clone(), share).as_secs_f64());
            writeln!(f, "{name:24} {:4} {p50:8.3} {p99:8.3} {max:8.3}", all.len())
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
