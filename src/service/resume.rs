//! Gives a link its next carrier when the present one is gone, or seems to be.
//!
//! Owns the schedule of attempts. Does not know what the link carries. Invariant: at most [`MAX_ATTEMPTS`] attempts
//! run at once; an absent device is awaited by the hub, not polled; a hub that said no is left alone for a while.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::time::{Instant, sleep_until};
use tracing::debug;

use super::{
    initiator::Patience,
    tunnel::{AttemptError, TunnelDeps, open_leg},
};
use crate::{
    agent::{Failure, Retry},
    base::Identity,
    transport::{
        carrier::CarrierMonitor,
        hello::{HelloError, LinkControl, offer_resume},
        mux::Mux,
    },
};

/// Between attempts on a path that does not answer, while flows wait (issue 4).
const PATH_RETRY: Duration = Duration::from_millis(1500);
/// An attempt that has reached the hub holds off others this long: the hub is waiting for the device. After that the
/// path may have failed again under it.
const HUB_HOLD: Duration = Duration::from_secs(10);
/// Attempts at once. A dial gives up after 10 s, in which seven begin.
const MAX_ATTEMPTS: usize = 8;
/// While a link is detached its flows wait. The hub's wait for the device is shorter than for a new device stream, so
/// that a request that a dying hub took with it is soon made again.
const PATIENCE: Patience = Patience { connect: Duration::from_secs(60), response: Duration::from_secs(15) };

/// Keeps the link attached; ends when the link has ended. Each new carrier's monitor is published. Without a link it
/// only probes the carrier when the network changes, and never ends.
pub(super) async fn keep_attached(
    deps: &TunnelDeps,
    device: &Identity,
    mux: &Mux,
    link: Option<&LinkControl>,
    first: CarrierMonitor,
    publish: impl Fn(CarrierMonitor),
) {
    let mut monitor = first;
    let mut network = deps.network.clone();
    loop {
        let suspicion = tokio::select! {
            () = network.changed() => {
                monitor.probe();
                continue;
            }
            why = detached(link) => format!("carrier lost: {why}"),
            () = monitor.suspect() => "the carrier does not answer".to_owned(),
        };
        let Some(link) = link else {
            // Nothing can be resumed; the carrier's own limit decides.
            monitor.recovered().await;
            continue;
        };
        if link.end().is_some() {
            return;
        }
        // The link itself tells people when it is lost and resumed.
        debug!("{suspicion}; trying another carrier");
        let attempts = Attempts::new(deps, device, link, mux);
        match attempts.run(&monitor).await {
            Outcome::Attached(next) => {
                publish(next.clone());
                monitor = next;
            }
            Outcome::Recovered => debug!("the carrier answers again"),
            Outcome::Ended => return,
        }
    }
}

async fn detached(link: Option<&LinkControl>) -> String {
    match link {
        None => std::future::pending().await,
        Some(link) => link.wait_detached().await.to_string(),
    }
}

enum Outcome {
    /// The link has a new carrier.
    Attached(CarrierMonitor),
    /// The old carrier was only slow.
    Recovered,
    /// The link is over.
    Ended,
}

struct Attempts<'a> {
    deps: &'a TunnelDeps,
    device: &'a Identity,
    link: &'a LinkControl,
    mux: &'a Mux,
    running: FuturesUnordered<BoxFuture<'a, Result<CarrierMonitor, AttemptError>>>,
    /// When each running attempt began, and whether it has reached the hub.
    begun: Vec<(Instant, Arc<AtomicBool>)>,
    /// The next one begins at this time, if nothing holds it off.
    next: Instant,
    retry: Retry,
}

impl<'a> Attempts<'a> {
    fn new(deps: &'a TunnelDeps, device: &'a Identity, link: &'a LinkControl, mux: &'a Mux) -> Self {
        let (running, begun) = (FuturesUnordered::new(), Vec::new());
        Self { deps, device, link, mux, running, begun, next: Instant::now(), retry: Retry::default() }
    }

    async fn run(mut self, old: &CarrierMonitor) -> Outcome {
        let mut network = self.deps.network.clone();
        loop {
            let due = self.due();
            tokio::select! {
                Some(result) = self.running.next(), if !self.running.is_empty() => match result {
                    Ok(monitor) => return Outcome::Attached(monitor),
                    Err(error) => self.failed(&error),
                },
                () = sleep_until(due), if self.running.len() < MAX_ATTEMPTS => self.begin(),
                () = network.changed() => {
                    old.probe();
                    self.next = Instant::now();
                    self.begun.clear();
                }
                _ = self.link.ended() => return Outcome::Ended,
                () = recovered(self.link, old) => return Outcome::Recovered,
            }
        }
    }

    /// When the next attempt may begin.
    fn due(&self) -> Instant {
        let holding = self.begun.iter().filter(|(_, reached)| reached.load(Ordering::Relaxed));
        holding.map(|(begun, _)| *begun + HUB_HOLD).max().map_or(self.next, |hold| hold.max(self.next))
    }

    fn begin(&mut self) {
        let now = Instant::now();
        if self.due() > now {
            // An attempt has reached the hub meanwhile.
            return;
        }
        self.next = now + PATH_RETRY;
        let reached = Arc::new(AtomicBool::new(false));
        self.begun.retain(|(begun, _)| *begun + HUB_HOLD > now);
        self.begun.push((now, reached.clone()));
        let (deps, device, link) = (self.deps, self.device, self.link);
        self.running.push(Box::pin(async move {
            let carrier = open_leg(deps, device, PATIENCE, || reached.store(true, Ordering::Relaxed)).await;
            let carrier = carrier.inspect_err(|_| reached.store(false, Ordering::Relaxed))?;
            let (monitor, hello) = (carrier.monitor(), deps.settings.borrow().hello.clone());
            let offered = offer_resume(Box::new(carrier), link, &hello).await;
            offered.inspect_err(|_| reached.store(false, Ordering::Relaxed))?;
            Ok(monitor)
        }));
    }

    fn failed(&mut self, error: &AttemptError) {
        debug!("could not resume yet: {error}");
        let is_urgent = self.mux.channels() > 0;
        if matches!(error, AttemptError::Hello(HelloError::Refused(_))) && self.link.end().is_none() {
            // Another carrier came first, or the device will tell with the next attempt.
            return;
        }
        let next = self.retry.after(error.failure(), is_urgent);
        if error.failure() != Failure::Path || !is_urgent {
            self.next = Instant::now() + next.delay;
        }
    }
}

/// Waits until the link is attached to a carrier that answers.
async fn recovered(link: &LinkControl, monitor: &CarrierMonitor) {
    if link.attached() {
        monitor.recovered().await;
    }
    if !link.attached() {
        std::future::pending::<()>().await;
    }
}
