//! Notice of changes of the host's network: a route or an address came or went, or the machine slept.
//!
//! Owns a netlink socket and a look at the boot clock. Does not know what to do about a change. Invariant: a missing
//! netlink (a sandbox without AF_NETLINK) costs the notice only, never the daemon.

mod rtnetlink;

use std::{io, time::Duration};

use futures_util::FutureExt as _;
use netlink_sys::{AsyncSocket as _, AsyncSocketExt as _, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use self::rtnetlink::Addresses;

/// Multicast groups of rtnetlink(7): IPv4 and IPv6 addresses and routes.
const GROUPS: u32 = 0x10 | 0x40 | 0x100 | 0x400;
/// Events come in bursts (an interface that comes up makes a dozen). The first is told at once, because what it took
/// away is gone; the rest as one, because only then the network is what it will be.
const BURST: Duration = Duration::from_millis(200);
/// How often the boot clock is compared with the monotonic clock: within the 3 s in which a person who opens a laptop
/// expects to go on.
const CLOCK_CHECK: Duration = Duration::from_secs(2);
/// A difference of this much is a suspend and not scheduling.
const SUSPEND: Duration = Duration::from_secs(3);
/// Messages that are taken at once; a flood goes on as the next burst.
const MAX_BURST: usize = 1000;
/// Longer than a message about an address or a route; a truncated one counts as a change.
const MESSAGE: usize = 4096;

/// Counts changes; clones see the same count.
#[derive(Debug, Clone)]
pub struct NetworkChanges(watch::Receiver<u64>);

impl NetworkChanges {
    /// The notice, and the loop that keeps it: spawn it, and await it after cancelling `shutdown`.
    pub fn start(shutdown: CancellationToken) -> (Self, impl Future<Output = ()> + Send) {
        let (sender, receiver) = watch::channel(0);
        (Self(receiver), watch_network(sender, shutdown))
    }

    /// A view that knows only the changes to come.
    #[must_use]
    pub fn from_now(&self) -> Self {
        let mut view = self.clone();
        view.0.mark_unchanged();
        view
    }

    /// Waits for the next change after the last one seen through this clone.
    pub async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

async fn watch_network(changes: watch::Sender<u64>, shutdown: CancellationToken) {
    let mut netlink = open_netlink().inspect_err(|error| debug!(%error, "no notice of network changes")).ok();
    let (mut known, mut clocks) = (Addresses::default(), Clocks::read());
    let mut check = tokio::time::interval(CLOCK_CHECK);
    check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let changed = tokio::select! {
            () = shutdown.cancelled() => return,
            _ = check.tick() => clocks.slept(),
            received = receive(&mut netlink, &mut known) => received.unwrap_or_else(|error| {
                debug!(%error, "the notice of network changes has ended");
                netlink = None;
                true
            }),
        };
        if changed {
            debug!("the host's network changed, or the host slept");
            changes.send_modify(|count| *count += 1);
            tokio::time::sleep(BURST).await;
            if drain(&mut netlink, &mut known) {
                changes.send_modify(|count| *count += 1);
            }
        }
    }
}

/// Takes what has come meanwhile; true if there was a change among it.
fn drain(netlink: &mut Option<TokioSocket>, known: &mut Addresses) -> bool {
    let mut any = false;
    for _ in 0..MAX_BURST {
        match receive(netlink, known).now_or_never() {
            Some(Ok(is_change)) => any |= is_change,
            // An error comes again, to the loop.
            Some(Err(_)) | None => break,
        }
    }
    any
}

fn open_netlink() -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
    socket.socket_mut().bind(&SocketAddr::new(0, GROUPS))?;
    Ok(socket)
}

/// The next message, and whether it tells of a change.
async fn receive(netlink: &mut Option<TokioSocket>, known: &mut Addresses) -> io::Result<bool> {
    match netlink {
        None => std::future::pending().await,
        Some(socket) => {
            let mut message = Vec::with_capacity(MESSAGE);
            match socket.recv_from(&mut message).await {
                // The kernel had more events than room: they were events all the same.
                Err(error) if error.raw_os_error() == Some(ENOBUFS) => {
                    known.forget();
                    Ok(true)
                }
                other => other.map(|_| known.learn(&message)),
            }
        }
    }
}

/// "No buffer space available" on Linux, errno(3).
const ENOBUFS: i32 = 105;

/// Both clocks at one moment. `/proc/uptime` counts the time asleep (CLOCK_BOOTTIME), `Instant` does not.
struct Clocks {
    boot: Option<Duration>,
    monotonic: Instant,
}

impl Clocks {
    fn read() -> Self {
        let text = std::fs::read_to_string("/proc/uptime").ok();
        let seconds = text.and_then(|text| text.split(' ').next()?.parse().ok());
        Self { boot: seconds.map(Duration::from_secs_f64), monotonic: Instant::now() }
    }

    /// True if the machine slept since the last look.
    fn slept(&mut self) -> bool {
        let last = std::mem::replace(self, Self::read());
        let (Some(boot), Some(last_boot)) = (self.boot, last.boot) else { return false };
        let asleep = boot.saturating_sub(last_boot).saturating_sub(self.monotonic - last.monotonic);
        if asleep >= SUSPEND {
            info!(seconds = asleep.as_secs(), "the machine slept");
        }
        asleep >= SUSPEND
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changed_before_is_no_news() {
        let (sender, receiver) = watch::channel(0);
        let network = NetworkChanges(receiver);
        sender.send_modify(|count| *count += 1);
        assert!(network.clone().changed().now_or_never().is_some());
        assert!(network.from_now().changed().now_or_never().is_none());
        let mut view = network.from_now();
        sender.send_modify(|count| *count += 1);
        assert!(view.changed().now_or_never().is_some());
    }
}
