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
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, sleep_until},
};
use tracing::{debug, info, warn};

use super::{
    initiator::Patience,
    tunnel::{AttemptError, NUDGED_PAUSE, Obstacle, TunnelDeps, open_leg},
};
use crate::{
    agent::{Failure, HubClient, Retry, calm, random_u64},
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
/// The first attempt begins within this time, in microseconds: a hub that stops cuts all links in one instant.
const SPREAD_MICROS: u64 = 200_000;
/// A carrier that lived no longer is not replaced at once: something cuts each one, and would be asked for ever more.
const SHORT_LIFE: Duration = Duration::from_millis(1500);
/// Attempts at once. A dial gives up after 10 s, in which seven begin.
const MAX_ATTEMPTS: usize = 8;
/// Data that the device has not acknowledged for so long, while nothing was heard from it: the hub is there, the device's
/// leg may not be. A second carrier is tried beside the first.
const SUSPECT_AFTER: Duration = Duration::from_secs(5);
/// The same, and no second carrier came up: the link counts as detached. As long as a carrier's own silence.
const DEAD_AFTER: Duration = Duration::from_secs(37);
/// How often a silent device is looked after.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// Causes of failure that are logged for people during one loss; there are about a dozen in all.
const MAX_TOLD: usize = 16;
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
    (first, obstacle, nudge): (CarrierMonitor, &Obstacle, &Notify),
    publish: impl Fn(CarrierMonitor),
) {
    obstacle.set(None);
    let mut monitor = first;
    let mut attached = Instant::now();
    let mut network = deps.network.from_now();
    let mut hub = deps.hub.clone();
    let policy = hub.borrow_and_update().policy().cloned();
    loop {
        let mut is_beside = false;
        let suspicion = tokio::select! {
            () = network.changed() => {
                monitor.probe();
                continue;
            }
            Ok(()) = hub.changed() => {
                // Under another policy the device would not know the link: it stays where it is as long as it can.
                if hub.borrow_and_update().policy() != policy.as_ref() {
                    continue;
                }
                is_beside = true;
                "the hub or the credential changed".to_owned()
            }
            why = detached(link) => format!("carrier lost: {why}"),
            () = monitor.suspect() => "the carrier does not answer".to_owned(),
            () = unanswered(link, SUSPECT_AFTER) => "the device does not answer".to_owned(),
        };
        let Some(link) = link else {
            // Nothing can be resumed; the carrier's own limit decides.
            if !is_beside {
                monitor.recovered().await;
            }
            continue;
        };
        if link.end().is_some() {
            return;
        }
        // The link itself tells people when it is lost and resumed.
        debug!("{suspicion}; trying another carrier");
        deps.trouble.notify_one();
        let attempts = Attempts::new(deps, device, link, mux, (first_attempt(attached), obstacle, nudge));
        let outcome = attempts.run(&monitor, is_beside, &mut hub).await;
        obstacle.set(None);
        match outcome {
            Outcome::Attached(next) => {
                publish(next.clone());
                (monitor, attached) = (next, Instant::now());
            }
            Outcome::Recovered => debug!("the carrier answers again"),
            Outcome::Ended => return,
        }
    }
}

/// When the first attempt begins after the loss of a carrier that was attached then.
fn first_attempt(attached: Instant) -> Instant {
    let now = Instant::now();
    let spread = Duration::from_micros(random_u64() % SPREAD_MICROS);
    let calm = if now < attached + SHORT_LIFE { PATH_RETRY } else { Duration::ZERO };
    now + calm + spread
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
    asked: Asked,
    /// The next one begins at this time, if nothing holds it off.
    next: Instant,
    /// When the last one began.
    begun: Instant,
    retry: Retry,
    /// The hub asked to be left alone until then.
    not_before: Instant,
    /// The causes of failure that were logged for people, each once.
    told: Vec<String>,
    obstacle: &'a Obstacle,
    /// Rings when a connection comes that needs the link.
    nudge: &'a Notify,
}

impl<'a> Attempts<'a> {
    fn new(
        deps: &'a TunnelDeps,
        device: &'a Identity,
        link: &'a LinkControl,
        mux: &'a Mux,
        (next, obstacle, nudge): (Instant, &'a Obstacle, &'a Notify),
    ) -> Self {
        let (running, asked) = (FuturesUnordered::new(), Asked::default());
        Self {
            deps,
            device,
            link,
            mux,
            running,
            asked,
            next,
            begun: Instant::now(),
            retry: Retry::default(),
            not_before: Instant::now(),
            told: Vec::new(),
            obstacle,
            nudge,
        }
    }

    /// Until the link has another carrier, or needs none any more. With `is_beside` the old one is good, and another is
    /// wanted all the same.
    async fn run(mut self, old: &CarrierMonitor, is_beside: bool, hub: &mut watch::Receiver<HubClient>) -> Outcome {
        let mut network = self.deps.network.from_now();
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
                    self.network_changed();
                }
                Ok(()) = hub.changed() => self.hub_changed(),
                () = self.nudge.notified() => self.nudged(),
                () = unanswered(Some(self.link), DEAD_AFTER) => {
                    self.link.lose_carrier("no sign of life from the device");
                }
                _ = self.link.ended() => return Outcome::Ended,
                () = recovered(self.link, old), if !is_beside => return Outcome::Recovered,
            }
        }
    }

    /// When the next attempt may begin.
    fn due(&self) -> Instant {
        self.asked.held_until().map_or(self.next, |hold| hold.max(self.next))
    }

    /// True if connections wait, or would if they had something to say.
    fn is_urgent(&self) -> bool {
        self.mux.channels() > 0
    }

    /// What waits at the hub may wait at the far end of a path that is gone.
    fn network_changed(&mut self) {
        let delay = if self.is_urgent() { Duration::ZERO } else { calm() };
        self.next = self.due().min(Instant::now() + delay).max(self.not_before);
        self.asked = Asked::default();
    }

    /// What runs was begun at another hub, or with another credential.
    fn hub_changed(&mut self) {
        self.running.clear();
        self.asked = Asked::default();
        self.not_before = Instant::now();
        self.next = self.not_before;
    }

    /// Somebody waits who did not when the present delay was chosen.
    fn nudged(&mut self) {
        let spread = Duration::from_micros(random_u64() % NUDGED_PAUSE.as_micros() as u64);
        let soon = (Instant::now() + spread).max(self.begun + NUDGED_PAUSE);
        self.next = self.next.min(soon.max(self.not_before));
    }

    fn begin(&mut self) {
        let now = Instant::now();
        if self.due() > now {
            // An attempt has reached the hub meanwhile.
            return;
        }
        (self.begun, self.next) = (now, now + PATH_RETRY);
        let reached = self.asked.begin(now);
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
        self.tell(error);
        let is_urgent = self.is_urgent();
        if matches!(error, AttemptError::Hello(HelloError::Refused(_))) && self.link.end().is_none() {
            // Another carrier came first, or the device will tell with the next attempt.
            return;
        }
        let next = self.retry.after(error.failure(), is_urgent);
        self.not_before = self.not_before.max(Instant::now() + next.at_least);
        let at = Instant::now() + next.delay;
        let is_urgent_path = error.failure() == Failure::Path && is_urgent;
        let at = if is_urgent_path { self.next.min(at) } else { at };
        // Another attempt, beside this one, may have reached the hub and been told to stay away.
        self.next = at.max(self.not_before);
    }

    /// Says why connections go on waiting: each cause once, because attempts are many.
    fn tell(&mut self, error: &AttemptError) {
        let why = error.to_string();
        self.obstacle.set(Some(&why));
        if self.told.len() == MAX_TOLD || self.told.contains(&why) {
            debug!("cannot resume yet: {why}");
        } else if error.is_refusal() {
            warn!("cannot resume yet: {why}");
            self.told.push(why);
        } else {
            info!("cannot resume yet: {why}");
            self.told.push(why);
        }
    }
}

/// The attempts that may have reached the hub: when each began, how long it holds off others, whether it has.
#[derive(Default)]
struct Asked(Vec<(Instant, Duration, Arc<AtomicBool>)>);

impl Asked {
    /// Notes another attempt. Each one that waits at the hub already doubles its hold: an absent device is awaited,
    /// and when it comes back it does not find a dozen requests of each service.
    fn begin(&mut self, now: Instant) -> Arc<AtomicBool> {
        self.0.retain(|(begun, hold, reached)| reached.load(Ordering::Relaxed) || *begun + *hold > now);
        let waiting = self.0.iter().filter(|(.., reached)| reached.load(Ordering::Relaxed)).count();
        let reached = Arc::new(AtomicBool::new(false));
        let hold = HUB_HOLD * (1 << waiting.min(MAX_ATTEMPTS));
        self.0.push((now, hold, reached.clone()));
        reached
    }

    fn held_until(&self) -> Option<Instant> {
        let holding = self.0.iter().filter(|(.., reached)| reached.load(Ordering::Relaxed));
        holding.map(|(begun, hold, _)| *begun + *hold).max()
    }
}

/// Waits until the link is attached to a carrier that answers, and the device does so too.
async fn recovered(link: &LinkControl, monitor: &CarrierMonitor) {
    if link.attached() {
        monitor.recovered().await;
        while link.state().unanswered_for.is_some_and(|silent| silent >= SUSPECT_AFTER) {
            sleep(LOOK_EVERY).await;
        }
    }
    if !link.attached() {
        std::future::pending::<()>().await;
    }
}

/// Waits until something that the link sent has been unanswered for `limit`.
async fn unanswered(link: Option<&LinkControl>, limit: Duration) {
    let Some(link) = link else { return std::future::pending().await };
    loop {
        let state = link.state();
        match state.unanswered_for.filter(|_| state.attached) {
            Some(silent) if silent >= limit => return,
            Some(silent) => sleep(limit - silent).await,
            None => sleep(SUSPECT_AFTER).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::{
        agent::{MuxSession, NetworkChanges},
        config::{FileContents, LinkLimits, ProxyRule},
        service::{metrics::ServiceMetrics, tunnel::TunnelSettings},
        transport::{
            hello::{BootId, InstanceId, LinkId, LinkSettings, LocalHello, offer_new, receive},
            mux::Role,
            tls::testing::Authority,
        },
    };

    #[test]
    fn an_absent_device_is_awaited_and_not_polled() {
        let zero = Instant::now();
        let (mut asked, mut now, mut waiting) = (Asked::default(), zero, Vec::new());
        let mut begun = 0;
        // A quarter of an hour, in which the hub waits 60 s for the device with each request.
        while now < zero + Duration::from_secs(900) {
            let reached = asked.begin(now);
            reached.store(true, Ordering::Relaxed);
            waiting.push((now + PATIENCE.connect, reached));
            begun += 1;
            now = asked.held_until().unwrap();
            waiting.retain(|(until, reached)| {
                reached.fetch_and(*until > now, Ordering::Relaxed);
                *until > now
            });
            assert!(waiting.len() <= 3, "{} requests wait at once", waiting.len());
        }
        assert!(begun <= 40, "{begun} requests");
    }

    /// A link that has lost its carrier, and its mux.
    async fn detached_link() -> (LinkControl, MuxSession) {
        let hello = hello();
        let (near, far) = tokio::io::duplex(65_536);
        let none = |_: &LinkId| None;
        let (session, far) = tokio::join!(offer_new(Box::new(near), &hello), receive(Box::new(far), &hello, &none));
        far.unwrap();
        let session = MuxSession::begin(session.unwrap(), Role::Client, &LinkLimits::default());
        let link = session.link.clone().unwrap();
        link.lose_carrier("gone");
        (link, session)
    }

    fn hello() -> LocalHello {
        LocalHello {
            instance: InstanceId([1; 16]),
            boot: BootId([1; 16]),
            max_channels: 16,
            receive_window: 65_536,
            resume_for: Duration::from_secs(900),
            links: LinkSettings::default(),
        }
    }

    fn deps() -> TunnelDeps {
        let authority = Authority::new();
        let ca = FileContents { path: "ca.pem".into(), contents: authority.pem().into() };
        let hub = HubClient::new(&HUB.parse().unwrap(), Some(&ca), None, &ProxyRule::Off).unwrap();
        let settings = TunnelSettings { hello: hello(), limits: LinkLimits::default() };
        TunnelDeps {
            hub: watch::channel(hub).1,
            settings: watch::channel(settings).1,
            network: NetworkChanges::start(CancellationToken::new()).0,
            metrics: ServiceMetrics::default(),
            trouble: Arc::default(),
        }
    }

    const HUB: &str = "HostName=127.0.0.1:1;SharedAccessKeyName=service;SharedAccessKey=MDEyMzQ1Njc4OWFiY2RlZg==";

    /// What happens to attempts whose next one begins in a minute.
    async fn check(story: impl FnOnce(&mut Attempts<'_>)) {
        let (deps, (link, session), device) = (deps(), detached_link().await, "pump".parse().unwrap());
        let (obstacle, nudge) = (Obstacle::default(), Notify::new());
        let next = Instant::now() + Duration::from_secs(60);
        story(&mut Attempts::new(&deps, &device, &link, &session.mux, (next, &obstacle, &nudge)));
    }

    fn wait(attempts: &Attempts<'_>) -> Duration {
        attempts.due().saturating_duration_since(Instant::now())
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_comes_does_not_wait_for_an_old_delay() {
        check(|attempts| {
            attempts.nudged();
            assert!(wait(attempts) <= NUDGED_PAUSE, "{:?}", wait(attempts));
            // Many connections make no more attempts.
            for _ in 0..100 {
                attempts.begun = Instant::now();
                attempts.next = Instant::now() + PATH_RETRY;
                attempts.nudged();
                assert!(wait(attempts) >= NUDGED_PAUSE);
            }
            attempts.not_before = Instant::now() + Duration::from_secs(30);
            attempts.next = attempts.not_before + Duration::from_secs(30);
            attempts.nudged();
            assert_eq!(wait(attempts), Duration::from_secs(30), "the hub asked for it");
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_of_the_network_is_followed_within_2_s_where_nobody_waits() {
        check(|attempts| {
            let mut waits = Vec::new();
            for _ in 0..20 {
                attempts.next = Instant::now();
                attempts.asked.begin(Instant::now()).store(true, Ordering::Relaxed);
                assert!(wait(attempts) >= HUB_HOLD);
                attempts.network_changed();
                waits.push(wait(attempts));
            }
            assert!(waits.iter().all(|wait| *wait <= Duration::from_secs(2)), "{waits:?}");
            assert!(waits.iter().any(|wait| *wait != waits[0]), "a fleet comes in step");
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_path_that_fails_does_not_hurry_what_the_hub_forbade() {
        check(|attempts| {
            attempts.not_before = Instant::now() + Duration::from_secs(90);
            attempts.failed(&AttemptError::Hello(HelloError::Timeout(Duration::from_secs(10))));
            assert_eq!(wait(attempts), Duration::from_secs(90));
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn another_hub_is_asked_at_once() {
        check(|attempts| {
            attempts.begin();
            attempts.asked.begin(Instant::now()).store(true, Ordering::Relaxed);
            attempts.not_before = Instant::now() + Duration::from_secs(30);
            attempts.hub_changed();
            assert!(wait(attempts).is_zero() && attempts.running.is_empty());
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_carrier_that_was_cut_at_once_is_not_replaced_at_once() {
        let now = Instant::now();
        assert!(first_attempt(now) >= now + PATH_RETRY);
        let long_ago = now;
        tokio::time::advance(Duration::from_secs(5)).await;
        let first: Vec<_> = (0..20).map(|_| first_attempt(long_ago) - Instant::now()).collect();
        assert!(first.iter().all(|delay| *delay < Duration::from_millis(200)), "{first:?}");
        assert!(first.iter().any(|delay| *delay != first[0]), "a fleet comes in step");
    }
}
