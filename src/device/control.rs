//! Keeps one control session with the hub, for ever.
//!
//! Owns when to open a session: at first, when the last one ended, when it stopped answering, before its credential
//! ends, when the configuration names another hub. Does not know what requests lead to: they go to a handler.
//! Invariant: a session is given up for a new one only once the new one is subscribed (make before break).

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{
    metrics::DeviceMetrics,
    session::{ControlSession, SessionError},
};
use crate::{
    agent::{Failure, HubClient, NetworkChanges, Retry, TOKEN_LIFETIME, calm, random_u64},
    proto::control::{DeviceTopic, StreamRequest},
};

/// A new session is opened at this share of the token's life, as the SDKs do: 80 %.
const RENEW_AFTER: Duration = Duration::from_secs(TOKEN_LIFETIME * 4 / 5);
/// Attempts at once: on a path that swallows packets a dial gives up after 10 s, in which seven begin.
const MAX_ATTEMPTS: usize = 8;
/// Between attempts while device streams wait for the control session to be asked through.
const SUSPECT_RETRY: Duration = Duration::from_millis(1500);
/// An attempt that takes longer has failed or will: 10 s to connect, 10 s for TLS, 10 s for the upgrade, and some.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(35);
/// The first attempt after a loss under live connections begins within this time, in microseconds.
const URGENT_SPREAD_MICROS: u64 = 200_000;
/// An attempt that logs in holds off others this long, and a login that was given up may take the session over this
/// much later: the hub knows one session per device, so two logins at once would end each other.
const LOGIN_HOLD: Duration = Duration::from_secs(10);
/// Between attempts at the configured hub or credential while the former one is in use because it does not work.
const CONFIGURED_RETRY: Duration = Duration::from_secs(30);
/// A leg was lost, and the request for the next one is awaited: the session is probed after this time, and again after
/// twice as long each, for a NAT may have forgotten it without a word to us...
const FIRST_LOOK: Duration = Duration::from_secs(1);
/// ... until its own pings come as often.
const LAST_LOOK: Duration = Duration::from_secs(15);
/// What was published so shortly before the hub was last heard may have been on its way when the hub spoke: the hub
/// may have said goodbye, because a login of ours that was given up took the session over. A slow round trip.
const UNREAD: Duration = Duration::from_secs(2);
/// A cause that was told is told again when attempts are at least this far apart.
const TELL_AGAIN: Duration = Duration::from_secs(5);
/// Answers and notices that wait for a session. The hub asks again when a newer session subscribes.
const MAX_WAITING: usize = 64;

/// What is known about the control session.
#[derive(Debug, Clone)]
pub(super) enum ControlState {
    /// Not there, for this reason.
    Waiting(Arc<str>),
    /// There.
    Connected,
}

/// The keeper's inputs.
pub(super) struct ControlDeps {
    /// The hub as configured; a change is tried beside the session in use.
    pub(super) hub: watch::Receiver<HubClient>,
    /// Topics to publish: answers and notices.
    pub(super) outbox: mpsc::Receiver<String>,
    /// Where stream requests go.
    pub(super) requests: mpsc::Sender<StreamRequest>,
    /// What is known.
    pub(super) state: watch::Sender<ControlState>,
    /// The hub client of the session in use, for the data legs.
    pub(super) in_use: Arc<Mutex<HubClient>>,
    /// True if connections wait for the hub to be reached again.
    pub(super) is_urgent: Box<dyn Fn() -> bool + Send + Sync>,
    /// True if connections wait for a stream request.
    pub(super) awaits_request: Box<dyn Fn() -> bool + Send + Sync>,
    /// Notice of network changes.
    pub(super) network: NetworkChanges,
    /// Counts.
    pub(super) metrics: DeviceMetrics,
}

type Attempt = BoxFuture<'static, (HubClient, Result<ControlSession, SessionError>)>;

/// The loop's state.
struct Keeper {
    deps: ControlDeps,
    session: Option<ControlSession>,
    attempts: FuturesUnordered<Attempt>,
    /// How far each attempt is.
    begun: Vec<Arc<Mutex<Stage>>>,
    /// Until then, being taken over may be the work of a login of ours that was given up.
    own_takeover: Instant,
    /// The client that opened the last session.
    proven: Option<HubClient>,
    /// The configured client failed since it was last passed over for the proven one.
    doubted: bool,
    /// The hub asked to be left alone until then.
    not_before: Instant,
    /// When the next attempt begins; `None` while the session in use is good.
    next: Option<Instant>,
    renew: Instant,
    retry: Retry,
    opened: Instant,
    waiting: VecDeque<String>,
    /// What was published on the session in use, and when: it is lost if nothing was heard since.
    published: VecDeque<(Instant, String)>,
    /// When the session is probed because a request is awaited through it, and how long that is after the time before.
    look: Option<(Instant, Duration)>,
    last_problem: String,
    was_connected: bool,
}

/// How far an attempt is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The hub has heard nothing yet.
    Dials,
    /// The login was sent at that time.
    LogsIn(Instant),
    Over,
}

/// What woke the loop.
enum Action {
    Request(StreamRequest),
    Ended(SessionError),
    Opened(HubClient, Box<ControlSession>),
    Failed(HubClient, SessionError),
    Begin,
    Renew,
    Suspect,
    Look,
    Network,
    HubChanged,
    Publish(String),
    Stop,
}

/// Keeps the session until `stop`.
pub(super) async fn keep(deps: ControlDeps, stop: CancellationToken) {
    let mut keeper = Keeper::new(deps);
    loop {
        match keeper.next(&stop).await {
            Action::Stop => break,
            action => keeper.apply(action),
        }
    }
    if let Some(session) = keeper.session.take() {
        session.leave().await;
    }
}

impl Keeper {
    fn new(deps: ControlDeps) -> Self {
        let now = Instant::now();
        Self {
            deps,
            session: None,
            attempts: FuturesUnordered::new(),
            begun: Vec::new(),
            own_takeover: now,
            proven: None,
            doubted: false,
            not_before: now,
            next: Some(now),
            renew: now + RENEW_AFTER,
            retry: Retry::default(),
            opened: now,
            waiting: VecDeque::new(),
            published: VecDeque::new(),
            look: None,
            last_problem: String::new(),
            was_connected: false,
        }
    }

    /// Every await of the loop.
    async fn next(&mut self, stop: &CancellationToken) -> Action {
        let monitor = self.session.as_ref().map(ControlSession::monitor);
        let begin = self.next.filter(|_| self.attempts.len() < MAX_ATTEMPTS);
        let watching = self.session.is_some() && self.next.is_none() && self.attempts.is_empty();
        tokio::select! {
            () = stop.cancelled() => Action::Stop,
            received = next_request(&mut self.session) => match received {
                Ok(request) => Action::Request(request),
                Err(error) => Action::Ended(error),
            },
            Some((hub, opened)) = self.attempts.next(), if !self.attempts.is_empty() => match opened {
                Ok(session) => Action::Opened(hub, Box::new(session)),
                Err(error) => Action::Failed(hub, error),
            },
            () = sleep_until(begin.unwrap_or_else(Instant::now)), if begin.is_some() => Action::Begin,
            () = sleep_until(self.renew), if watching => Action::Renew,
            () = suspect(monitor.as_ref()), if watching => Action::Suspect,
            () = at(self.look.map(|(at, _)| at)) => Action::Look,
            () = self.deps.network.changed() => Action::Network,
            Ok(()) = self.deps.hub.changed() => Action::HubChanged,
            Some(topic) = self.deps.outbox.recv() => Action::Publish(topic),
        }
    }

    /// Every change of the loop's state.
    fn apply(&mut self, action: Action) {
        match action {
            Action::Stop => {}
            Action::Request(request) => {
                self.deps.metrics.requests.inc();
                // The handler's inbox is as long as the hub's limit of requests in flight; more are refused by silence.
                if self.deps.requests.try_send(request).is_err() {
                    warn!("more stream requests at once than this device handles; one is left unanswered");
                }
            }
            Action::Ended(error) => self.ended(&error),
            Action::Opened(hub, session) => self.opened(hub, *session),
            Action::Failed(hub, error) => self.failed(&hub, &error),
            Action::Begin => self.begin(),
            Action::Renew => {
                debug!("the credential ends soon; opening the next control session");
                self.next = Some(Instant::now());
            }
            Action::Suspect => {
                debug!("the hub does not answer on the control session; trying another beside it");
                self.next = Some(Instant::now());
            }
            Action::Network => {
                if let Some(session) = &self.session {
                    session.monitor().probe();
                } else {
                    let delay = if (self.deps.is_urgent)() { Duration::ZERO } else { calm() };
                    let at = self.not_before.max(Instant::now() + delay);
                    self.next = Some(self.next.map_or(at, |next| next.min(at)));
                }
            }
            Action::HubChanged => {
                self.doubted = false;
                // That was another hub, or it did not like another credential.
                self.not_before = Instant::now();
                self.next = Some(Instant::now());
            }
            Action::Look => self.look(),
            Action::Publish(topic) => {
                // A leg that was lost casts a doubt on its neighbour, through which the hub shall learn of it.
                if matches!(DeviceTopic::parse(&topic), DeviceTopic::Lost(_)) {
                    self.session.iter().for_each(|session| session.monitor().probe());
                    self.look = Some((Instant::now() + FIRST_LOOK, FIRST_LOOK));
                }
                self.publish(topic);
            }
        }
    }

    /// Probes the session as long as a request is awaited through it.
    fn look(&mut self) {
        let next = self.look.take().map(|(_, pause)| 2 * pause);
        if (self.deps.awaits_request)() {
            self.session.iter().for_each(|session| session.monitor().probe());
            self.look = next.filter(|pause| *pause <= LAST_LOOK).map(|pause| (Instant::now() + pause, pause));
        }
    }

    fn begin(&mut self) {
        // Others begin beside it while connections wait, because the path may swallow packets. Without connections one
        // attempt at a time must do: a hub that is slow because a fleet comes back must not be asked fourfold.
        let beside = if (self.deps.is_urgent)() { SUSPECT_RETRY } else { ATTEMPT_LIMIT };
        self.next = Some(Instant::now() + beside);
        self.begun.retain(|stage| match get(stage) {
            Stage::Dials => true,
            Stage::LogsIn(since) => since + LOGIN_HOLD > Instant::now(),
            Stage::Over => false,
        });
        if self.is_logging_in() {
            self.next = Some(Instant::now() + SUSPECT_RETRY);
            return;
        }
        let hub = self.choose();
        let stage = Arc::new(Mutex::new(Stage::Dials));
        self.begun.push(stage.clone());
        self.attempts.push(Box::pin(async move {
            let opened = ControlSession::open(&hub, || set(&stage, Stage::LogsIn(Instant::now()))).await;
            set(&stage, Stage::Over);
            (hub, opened)
        }));
    }

    /// True if an attempt of ours has reached the hub, which may end another session of this device for it.
    fn is_logging_in(&self) -> bool {
        self.begun.iter().any(|stage| matches!(get(stage), Stage::LogsIn(_)))
    }

    /// The hub client for the next attempt: the configured one, and every other time the one that worked last if the
    /// configured one does not work and there is no session, or soon none. Whoever edits the credential through the
    /// tunnel that it opens can still correct it tomorrow.
    fn choose(&mut self) -> HubClient {
        let configured = self.deps.hub.borrow_and_update().clone();
        let is_needed = self.session.is_none() || Instant::now() >= self.renew;
        match &self.proven {
            Some(proven) if self.doubted && is_needed && !proven.is_same(&configured) => {
                self.doubted = false;
                proven.clone()
            }
            _ => configured,
        }
    }

    fn opened(&mut self, hub: HubClient, session: ControlSession) {
        if self.is_logging_in() {
            self.own_takeover = Instant::now() + LOGIN_HOLD;
        }
        self.attempts.clear();
        self.begun.clear();
        self.retry.succeeded();
        self.opened = Instant::now();
        self.not_before = self.opened;
        // An attempt at a former hub may succeed after the configuration has changed: that is tried all the same.
        let is_configured = self.deps.hub.borrow().is_same(&hub);
        let again = if self.doubted { CONFIGURED_RETRY } else { Duration::ZERO };
        self.next = (!is_configured).then(|| self.opened + again);
        let is_changed = self.proven.as_ref().is_some_and(|proven| !proven.is_same(&hub));
        self.proven = Some(hub.clone());
        self.renew = if hub.renews() { self.opened + RENEW_AFTER } else { self.opened + Duration::from_secs(86_400) };
        if matches!(*self.deps.state.borrow(), ControlState::Waiting(_)) {
            let again = if self.was_connected { " again" } else { "" };
            info!(hub = hub.name(), "connected to the hub{again}, ready for device streams");
        } else if is_changed {
            info!(hub = hub.name(), "the changed hub or credential works and is in use");
        }
        self.was_connected = true;
        self.last_problem.clear();
        *self.deps.in_use.lock().unwrap_or_else(PoisonError::into_inner) = hub;
        self.deps.metrics.connected.set(1);
        self.deps.state.send_replace(ControlState::Connected);
        // The hub has ended the old one already; what it still carried is asked again on the new one.
        self.drop_session();
        self.session = Some(session);
        for topic in std::mem::take(&mut self.waiting) {
            self.publish(topic);
        }
    }

    /// What the hub may not have read is published again on the next session: an answer to a request that is settled and
    /// a notice of a leg that is gone change nothing.
    fn drop_session(&mut self) {
        let Some(old) = self.session.take() else { return };
        let heard = Instant::now().checked_sub(old.monitor().silent_for());
        for (at, topic) in std::mem::take(&mut self.published) {
            if may_be_unread(at, heard) {
                self.keep_for_later(topic);
            }
        }
    }

    fn ended(&mut self, error: &SessionError) {
        self.drop_session();
        self.retry.lived(self.opened.elapsed());
        if matches!(error, SessionError::TakenOver) && self.is_logging_in() {
            // By ourselves: the hub lets go of the old session at the login of the new one.
            debug!("the new control session has replaced the old one");
            return;
        }
        self.deps.metrics.connected.set(0);
        let delay = match error.failure() {
            // A person is waiting: at once, but not a whole fleet in the same instant.
            Failure::Path if (self.deps.is_urgent)() => Duration::from_micros(random_u64() % URGENT_SPREAD_MICROS),
            _ if matches!(error, SessionError::TakenOver) && Instant::now() < self.own_takeover => {
                Duration::from_micros(random_u64() % URGENT_SPREAD_MICROS)
            }
            Failure::Path => self.retry.after(Failure::Answered(None), false).delay,
            other @ (Failure::Refused | Failure::Answered(_)) => {
                let next = self.retry.after(other, false);
                self.not_before = self.not_before.max(Instant::now() + next.at_least);
                next.delay
            }
        };
        self.next = Some(self.not_before.max(Instant::now() + delay));
        warn!(retry_seconds = delay.as_secs_f64(), "the control session with the hub ended: {error}");
        self.deps.state.send_replace(ControlState::Waiting(error.to_string().into()));
    }

    fn failed(&mut self, hub: &HubClient, error: &SessionError) {
        self.doubted |= self.deps.hub.borrow().is_same(hub);
        let failure = error.failure();
        let is_beside = self.session.is_some();
        let next = self.retry.after(failure, is_beside || (self.deps.is_urgent)());
        let at = Instant::now() + next.delay;
        self.not_before = self.not_before.max(Instant::now() + next.at_least);
        let others = self.next.filter(|_| failure == Failure::Path);
        let at = match others {
            // As long as the path fails, one begins every so often.
            Some(next) if (self.deps.is_urgent)() => next.min(at),
            // Others that are under way on a path that swallows packets keep their distance.
            Some(next) if !self.attempts.is_empty() => next.max(at),
            _ => at,
        };
        self.next = Some(at.max(self.not_before));
        let problem = error.to_string();
        if is_beside {
            if problem != self.last_problem {
                warn!("a second control session could not be opened, so the first stays in use: {problem}");
            }
        } else {
            // While people wait, attempts are many: each cause once, and again when it stays.
            let retry_seconds = next.delay.as_secs_f64();
            if problem != self.last_problem || next.delay >= TELL_AGAIN {
                warn!(retry_seconds, "no control session with the hub: {problem}");
            } else {
                debug!(retry_seconds, "no control session with the hub: {problem}");
            }
            self.deps.metrics.connected.set(0);
            self.deps.state.send_replace(ControlState::Waiting(problem.as_str().into()));
        }
        self.last_problem = problem;
    }

    fn publish(&mut self, topic: String) {
        if let Some(session) = &mut self.session {
            match session.publish(&topic) {
                Ok(()) => {
                    if self.published.len() == MAX_WAITING {
                        self.published.pop_front();
                    }
                    return self.published.push_back((Instant::now(), topic));
                }
                Err(error) => self.ended(&error),
            }
        }
        self.keep_for_later(topic);
    }

    fn keep_for_later(&mut self, topic: String) {
        if self.waiting.len() == MAX_WAITING {
            self.waiting.pop_front();
        }
        self.waiting.push_back(topic);
    }
}

fn get(stage: &Mutex<Stage>) -> Stage {
    *stage.lock().unwrap_or_else(PoisonError::into_inner)
}

fn set(stage: &Mutex<Stage>, next: Stage) {
    *stage.lock().unwrap_or_else(PoisonError::into_inner) = next;
}

/// True if the hub, last heard at that time, may not have read what was published then.
fn may_be_unread(published: Instant, heard: Option<Instant>) -> bool {
    heard.is_none_or(|heard| published + UNREAD >= heard)
}

async fn next_request(session: &mut Option<ControlSession>) -> Result<StreamRequest, SessionError> {
    match session {
        Some(session) => session.next().await,
        None => std::future::pending().await,
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

async fn suspect(monitor: Option<&crate::transport::carrier::CarrierMonitor>) {
    match monitor {
        Some(monitor) => monitor.suspect().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ProxyRule;

    const HUB: &str = "HostName=127.0.0.1:1;DeviceId=pump-17;SharedAccessKey=MDEyMzQ1Njc4OWFiY2RlZg==";

    fn hub() -> HubClient {
        let authority = crate::transport::tls::testing::Authority::new();
        let ca = crate::config::FileContents { path: "ca.pem".into(), contents: authority.pem().into() };
        HubClient::new(&HUB.parse().unwrap(), Some(&ca), None, &ProxyRule::Off).unwrap()
    }

    fn keeper() -> (Keeper, watch::Sender<HubClient>, watch::Receiver<ControlState>) {
        let hub = watch::Sender::new(hub());
        let (state, seen) = watch::channel(ControlState::Connected);
        let deps = ControlDeps {
            hub: hub.subscribe(),
            outbox: mpsc::channel(1).1,
            requests: mpsc::channel(1).0,
            state,
            in_use: Arc::new(Mutex::new(hub.borrow().clone())),
            is_urgent: Box::new(|| false),
            awaits_request: Box::new(|| true),
            network: NetworkChanges::start(CancellationToken::new()).0,
            metrics: DeviceMetrics::default(),
        };
        (Keeper::new(deps), hub, seen)
    }

    /// An attempt that has got so far and no further.
    fn attempt(keeper: &mut Keeper, stage: Stage) -> Arc<Mutex<Stage>> {
        let stage = Arc::new(Mutex::new(stage));
        keeper.begun.push(stage.clone());
        keeper.attempts.push(Box::pin(std::future::pending()));
        stage
    }

    fn wait(keeper: &Keeper) -> Duration {
        keeper.next.unwrap().saturating_duration_since(Instant::now())
    }

    #[tokio::test(start_paused = true)]
    async fn our_own_next_session_is_no_stranger_that_takes_over() {
        let (mut keeper, _hub, state) = keeper();
        attempt(&mut keeper, Stage::LogsIn(Instant::now()));
        keeper.next = Some(Instant::now() + SUSPECT_RETRY);
        keeper.ended(&SessionError::TakenOver);
        assert!(wait(&keeper) <= SUSPECT_RETRY);
        assert!(matches!(*state.borrow(), ControlState::Connected), "a renewal is no outage");

        keeper.begun.clear();
        keeper.attempts.clear();
        keeper.ended(&SessionError::TakenOver);
        assert!(wait(&keeper) >= Duration::from_secs(30), "a stranger is left alone");
        assert!(matches!(*state.borrow(), ControlState::Waiting(_)));

        // A session was opened, and one that was given up is opened behind it.
        keeper.not_before = Instant::now();
        keeper.own_takeover = Instant::now() + LOGIN_HOLD;
        keeper.ended(&SessionError::TakenOver);
        assert!(wait(&keeper) < Duration::from_secs(1), "a login that we gave up may arrive late");
    }

    #[tokio::test(start_paused = true)]
    async fn a_login_is_not_overtaken_by_another_of_ours() {
        let (mut keeper, _hub, _) = keeper();
        attempt(&mut keeper, Stage::LogsIn(Instant::now()));
        keeper.begin();
        assert_eq!(keeper.attempts.len(), 1);
        tokio::time::advance(LOGIN_HOLD).await;
        keeper.begin();
        assert_eq!(keeper.attempts.len(), 2, "but a login that hangs is");
    }

    #[tokio::test(start_paused = true)]
    async fn a_login_that_was_long_in_coming_is_not_overtaken_either() {
        let (mut keeper, _hub, _) = keeper();
        let slow = attempt(&mut keeper, Stage::Dials);
        tokio::time::advance(LOGIN_HOLD).await;
        keeper.begin();
        assert_eq!(keeper.attempts.len(), 2, "a dial holds nothing off");
        set(&slow, Stage::LogsIn(Instant::now()));
        tokio::time::advance(LOGIN_HOLD / 2).await;
        keeper.begin();
        assert_eq!(keeper.attempts.len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_credential_that_does_not_work_does_not_cost_the_one_that_did() {
        let (mut keeper, configured, _) = keeper();
        let proven = configured.borrow().clone();
        keeper.proven = Some(proven.clone());
        configured.send_replace(hub());
        assert!(!keeper.choose().is_same(&proven), "the new one first");
        let wrong = configured.borrow().clone();
        keeper.failed(&wrong, &SessionError::Timeout);
        assert!(keeper.choose().is_same(&proven), "without a session the old one is tried again");
        assert!(keeper.choose().is_same(&wrong), "and then the new one");
    }

    #[tokio::test(start_paused = true)]
    async fn a_lone_attempt_that_failed_at_once_is_soon_made_again() {
        let (mut keeper, hub, _) = keeper();
        let hub = hub.borrow().clone();
        keeper.next = Some(Instant::now() + ATTEMPT_LIMIT);
        keeper.failed(&hub, &SessionError::Timeout);
        assert!(wait(&keeper) <= Duration::from_secs(1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_session_through_which_a_request_is_awaited_is_looked_after() {
        let (mut keeper, _hub, _) = keeper();
        keeper.apply(Action::Publish(crate::proto::control::lost_topic("abc")));
        let mut pauses = Vec::new();
        while let Some((at, _)) = keeper.look {
            pauses.push((at - Instant::now()).as_secs());
            tokio::time::advance(at - Instant::now()).await;
            keeper.apply(Action::Look);
        }
        assert_eq!(pauses, [1, 2, 4, 8]);

        keeper.deps.awaits_request = Box::new(|| false);
        keeper.apply(Action::Publish(crate::proto::control::lost_topic("abc")));
        keeper.apply(Action::Look);
        assert!(keeper.look.is_none(), "another carrier came");
    }

    #[test]
    fn a_goodbye_is_no_sign_that_what_crossed_it_was_read() {
        let published = Instant::now();
        assert!(may_be_unread(published, Some(published + Duration::from_millis(30))), "they crossed");
        assert!(!may_be_unread(published, Some(published + Duration::from_secs(3))));
        assert!(may_be_unread(published, None));
    }

    #[tokio::test(start_paused = true)]
    async fn a_path_that_fails_does_not_hurry_what_the_hub_forbade() {
        let (mut keeper, hub, _) = keeper();
        keeper.deps.is_urgent = Box::new(|| true);
        let hub = hub.borrow().clone();
        attempt(&mut keeper, Stage::Dials);
        keeper.next = Some(Instant::now() + SUSPECT_RETRY);
        // One reached the hub; one beside it gets no answer.
        keeper.failed(&hub, &SessionError::TakenOver);
        keeper.failed(&hub, &SessionError::Timeout);
        assert!(wait(&keeper) >= Duration::from_secs(30));
        keeper.ended(&SessionError::Timeout);
        assert!(wait(&keeper) >= Duration::from_secs(30));

        keeper.apply(Action::HubChanged);
        keeper.failed(&hub, &SessionError::Timeout);
        assert!(wait(&keeper) < SUSPECT_RETRY, "that was said by another hub");
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_of_the_network_is_followed_at_once_only_by_those_whom_somebody_waits_for() {
        let (mut keeper, _hub, _) = keeper();
        let mut waits = Vec::new();
        for _ in 0..20 {
            keeper.next = Some(Instant::now() + Duration::from_secs(60));
            keeper.apply(Action::Network);
            waits.push(wait(&keeper));
        }
        assert!(waits.iter().all(|wait| *wait <= Duration::from_secs(2)), "{waits:?}");
        assert!(waits.iter().any(|wait| *wait != waits[0]), "a fleet comes in step");
        keeper.next = Some(Instant::now());
        keeper.apply(Action::Network);
        assert_eq!(wait(&keeper), Duration::ZERO, "what is due is not put off");
        keeper.deps.is_urgent = Box::new(|| true);
        keeper.next = Some(Instant::now() + Duration::from_secs(60));
        keeper.apply(Action::Network);
        assert_eq!(wait(&keeper), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_of_the_network_does_not_hurry_what_the_hub_forbade() {
        let (mut keeper, _hub, _) = keeper();
        keeper.ended(&SessionError::TakenOver);
        keeper.apply(Action::Network);
        assert!(wait(&keeper) >= Duration::from_secs(30));
    }
}
