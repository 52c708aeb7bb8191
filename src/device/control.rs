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
    agent::{Failure, HubClient, NetworkChanges, Retry, TOKEN_LIFETIME, random_u64},
    proto::control::StreamRequest,
};

/// A new session is opened at this share of the token's life, as the SDKs do: 80 %.
const RENEW_AFTER: Duration = Duration::from_secs(TOKEN_LIFETIME * 4 / 5);
/// Attempts at once: on a path that swallows packets, a dial gives up after 10 s.
const MAX_ATTEMPTS: usize = 4;
/// Between attempts while device streams wait for the control session to be asked through.
const SUSPECT_RETRY: Duration = Duration::from_millis(1500);
/// An attempt that takes longer has failed or will: 10 s to connect, 10 s for TLS, 10 s for the upgrade, and some.
const ATTEMPT_LIMIT: Duration = Duration::from_secs(35);
/// The first attempt after a loss under live connections begins within this time, in microseconds.
const URGENT_SPREAD_MICROS: u64 = 200_000;
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
    /// When the next attempt begins; `None` while the session in use is good.
    next: Option<Instant>,
    renew: Instant,
    retry: Retry,
    opened: Instant,
    waiting: VecDeque<String>,
    last_problem: String,
    was_connected: bool,
}

/// What woke the loop.
enum Action {
    Request(StreamRequest),
    Ended(SessionError),
    Opened(HubClient, Box<ControlSession>),
    Failed(SessionError),
    Begin,
    Renew,
    Suspect,
    Network,
    HubChanged,
    Publish(String),
    Stop,
}

/// Keeps the session until `stop`.
pub(super) async fn keep(deps: ControlDeps, stop: CancellationToken) {
    let now = Instant::now();
    let mut keeper = Keeper {
        deps,
        session: None,
        attempts: FuturesUnordered::new(),
        next: Some(now),
        renew: now + RENEW_AFTER,
        retry: Retry::default(),
        opened: now,
        waiting: VecDeque::new(),
        last_problem: String::new(),
        was_connected: false,
    };
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
                Err(error) => Action::Failed(error),
            },
            () = sleep_until(begin.unwrap_or_else(Instant::now)), if begin.is_some() => Action::Begin,
            () = sleep_until(self.renew), if watching => Action::Renew,
            () = suspect(monitor.as_ref()), if watching => Action::Suspect,
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
            Action::Failed(error) => self.failed(&error),
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
                    self.next = Some(Instant::now());
                }
            }
            Action::HubChanged => self.next = Some(Instant::now()),
            Action::Publish(topic) => self.publish(topic),
        }
    }

    fn begin(&mut self) {
        // Others begin beside it while connections wait, because the path may swallow packets. Without connections one
        // attempt at a time must do: a hub that is slow because a fleet comes back must not be asked fourfold.
        let beside = if (self.deps.is_urgent)() { SUSPECT_RETRY } else { ATTEMPT_LIMIT };
        self.next = Some(Instant::now() + beside);
        let hub = self.deps.hub.borrow_and_update().clone();
        self.attempts.push(Box::pin(async move {
            let opened = ControlSession::open(&hub).await;
            (hub, opened)
        }));
    }

    fn opened(&mut self, hub: HubClient, session: ControlSession) {
        self.attempts.clear();
        self.next = None;
        self.opened = Instant::now();
        self.renew = if hub.renews() { self.opened + RENEW_AFTER } else { self.opened + Duration::from_secs(86_400) };
        if self.session.is_none() {
            let again = if self.was_connected { " again" } else { "" };
            info!(hub = hub.name(), "connected to the hub{again}, ready for device streams");
        }
        self.was_connected = true;
        self.last_problem.clear();
        *self.deps.in_use.lock().unwrap_or_else(PoisonError::into_inner) = hub;
        self.deps.metrics.connected.set(1);
        self.deps.state.send_replace(ControlState::Connected);
        if let Some(old) = self.session.replace(session) {
            // The hub has ended it already; what it still carried is asked again on the new one.
            drop(old);
        }
        for topic in std::mem::take(&mut self.waiting) {
            self.publish(topic);
        }
    }

    fn ended(&mut self, error: &SessionError) {
        self.session = None;
        self.deps.metrics.connected.set(0);
        self.retry.lived(self.opened.elapsed());
        let delay = match error.failure() {
            // A person is waiting: at once, but not a whole fleet in the same instant.
            Failure::Path if (self.deps.is_urgent)() => Duration::from_micros(random_u64() % URGENT_SPREAD_MICROS),
            Failure::Path => self.retry.after(Failure::Answered(None), false).delay,
            other @ (Failure::Refused | Failure::Answered(_)) => self.retry.after(other, false).delay,
        };
        self.next = Some(Instant::now() + delay);
        warn!(retry_seconds = delay.as_secs_f64(), "the control session with the hub ended: {error}");
        self.deps.state.send_replace(ControlState::Waiting(error.to_string().into()));
    }

    fn failed(&mut self, error: &SessionError) {
        let failure = error.failure();
        let is_beside = self.session.is_some();
        let next = self.retry.after(failure, is_beside || (self.deps.is_urgent)());
        let at = Instant::now() + next.delay;
        self.next = Some(self.next.map_or(at, |next| if failure == Failure::Path { next.max(at) } else { at }));
        let problem = error.to_string();
        if is_beside {
            if problem != self.last_problem {
                warn!("a second control session could not be opened, so the first stays in use: {problem}");
            }
        } else {
            warn!(retry_seconds = next.delay.as_secs_f64(), "no control session with the hub: {problem}");
            self.deps.state.send_replace(ControlState::Waiting(problem.as_str().into()));
        }
        self.last_problem = problem;
    }

    fn publish(&mut self, topic: String) {
        if let Some(session) = &mut self.session {
            match session.publish(&topic) {
                Ok(()) => return,
                Err(error) => self.ended(&error),
            }
        }
        if self.waiting.len() == MAX_WAITING {
            self.waiting.pop_front();
        }
        self.waiting.push_back(topic);
    }
}

async fn next_request(session: &mut Option<ControlSession>) -> Result<StreamRequest, SessionError> {
    match session {
        Some(session) => session.next().await,
        None => std::future::pending().await,
    }
}

async fn suspect(monitor: Option<&crate::transport::carrier::CarrierMonitor>) {
    match monitor {
        Some(monitor) => monitor.suspect().await,
        None => std::future::pending().await,
    }
}
