//! The one mux device stream to one device, kept for as long as somebody wants it.
//!
//! Owns opening, resuming and opening anew. Does not know forwards or listeners: they ask for channels. Invariant: at
//! most one mux per device is current, and what is known about it, usable or not and why, is always published.

use std::{
    pin::pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, info, info_span, warn};

use super::{
    initiator::{self, InitiateError, Patience},
    metrics::ServiceMetrics,
    resume::keep_attached,
};
use crate::{
    agent::{Failure, HubCarrier, HubClient, MuxSession, NetworkChanges, Next, Retry, calm, end_session},
    base::{Identity, StreamName},
    config::LinkLimits,
    proto::streams::MUX_STREAM,
    transport::{
        carrier::{CarrierMonitor, CarrierOptions},
        hello::{HelloError, LinkControl, LocalHello, Session, offer_new},
        mux::{Mux, Role},
    },
};

/// The hub waits this long for an absent device before it answers, and we ask again: absence costs one request in
/// four minutes, not a poll. Below the five minutes that the hub allows.
const AWAIT_DEVICE: Duration = Duration::from_secs(240);
/// A device that is online answers at once; the documented default.
const AWAIT_ANSWER: Duration = Duration::from_secs(30);
/// Between attempts while connections come in for a tunnel that is not there.
pub(super) const NUDGED_PAUSE: Duration = Duration::from_secs(1);
/// An attempt that is older than this when the network changes is made again: it may wait at the far end of a path that
/// is gone. A younger one was made on the network as it is now; events come in bursts.
const SETTLED: Duration = Duration::from_secs(5);

/// What all tunnels of a service share.
#[derive(Clone)]
pub(crate) struct TunnelDeps {
    /// The hub, as the configuration in force has it.
    pub hub: watch::Receiver<HubClient>,
    /// What a reload may change: it holds for the device streams to come.
    pub settings: watch::Receiver<TunnelSettings>,
    /// Notice of network changes.
    pub network: NetworkChanges,
    /// Counts.
    pub metrics: ServiceMetrics,
    /// Told when a carrier is lost or an attempt fails: is it the hub?
    pub trouble: Arc<Notify>,
}

/// What we say of ourselves, and the bounds of the mux.
#[derive(Clone)]
pub(crate) struct TunnelSettings {
    /// What we say of ourselves.
    pub hello: LocalHello,
    /// Bounds of the mux.
    pub limits: LinkLimits,
}

/// What is known about a tunnel.
#[derive(Debug, Clone)]
pub(crate) enum TunnelState {
    /// Nobody wants it yet.
    Idle,
    /// Not there, for this reason, since then.
    Waiting {
        /// What is waited for, or what failed last.
        why: Arc<str>,
        /// Since when it is not there.
        since: Instant,
        /// Attempts so far, and whether somebody said no to the last one.
        attempts: u64,
        refused: bool,
    },
    /// There. Its link may be detached for the moment; channels can be opened all the same.
    Up {
        /// Opens channels.
        mux: Mux,
        /// The link, if the device has that feature.
        link: Option<LinkControl>,
        /// The present carrier's round-trip time and silence.
        monitor: CarrierMonitor,
        /// Since when.
        since: Instant,
    },
}

/// A tunnel. Clones are handles of the same one.
#[derive(Clone)]
pub(crate) struct Tunnel {
    state: watch::Receiver<TunnelState>,
    wanted: Arc<watch::Sender<bool>>,
    /// Wakes who waits for the next attempt, at a session or at a carrier of its link: a connection is there now.
    nudge: Arc<Notify>,
    obstacle: Obstacle,
}

/// Why a link has no carrier, as far as an attempt has found out. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Obstacle(Arc<Mutex<Option<Arc<str>>>>);

impl Obstacle {
    pub(super) fn set(&self, why: Option<&str>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = why.map(Arc::from);
    }

    fn get(&self) -> Option<Arc<str>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Tunnel {
    /// The tunnel and the loop that keeps it, which ends after `stop`: spawn it and await it.
    pub(super) fn new(
        device: Identity,
        deps: TunnelDeps,
        stop: CancellationToken,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (publish, state) = watch::channel(TunnelState::Idle);
        let wanted = Arc::new(watch::Sender::new(false));
        let span = info_span!("tunnel", %device);
        let (nudge, obstacle) = (Arc::new(Notify::new()), Obstacle::default());
        let keeper = Keeper {
            device,
            deps,
            publish,
            wanted: wanted.subscribe(),
            nudge: nudge.clone(),
            obstacle: obstacle.clone(),
            retry: Retry::default(),
            attempts: 0,
            stop,
        };
        (Self { state, wanted, nudge, obstacle }, keeper.run().instrument(span))
    }

    /// Says that the tunnel is to be there from now on.
    pub(super) fn want(&self) {
        self.wanted.send_if_modified(|wanted| !std::mem::replace(wanted, true));
    }

    /// What is known now.
    pub(super) fn state(&self) -> TunnelState {
        self.state.borrow().clone()
    }

    /// Waits until the tunnel is up. Fails only if an attempt made since then was refused; bound the wait.
    pub(super) async fn mux(&self) -> Result<Mux, Arc<str>> {
        self.want();
        let mut state = self.state.clone();
        let mut before = None;
        loop {
            match &*state.borrow_and_update() {
                TunnelState::Up { mux, link, .. } if !mux.is_closed() => {
                    if link.as_ref().is_some_and(|link| !link.attached()) {
                        self.nudge.notify_one();
                    }
                    return Ok(mux.clone());
                }
                TunnelState::Waiting { attempts, refused, why, .. } => {
                    let before = *before.get_or_insert(*attempts);
                    if *refused && *attempts > before {
                        return Err(why.clone());
                    }
                    self.nudge.notify_one();
                }
                TunnelState::Up { .. } | TunnelState::Idle => before = Some(before.unwrap_or(0)),
            }
            if state.changed().await.is_err() {
                // The keeper has stopped, and with it the service.
                std::future::pending::<()>().await;
            }
        }
    }

    /// True if it is up and its link has a carrier.
    pub(super) fn is_attached(&self) -> bool {
        match &*self.state.borrow() {
            TunnelState::Up { link, .. } => link.as_ref().is_none_or(LinkControl::attached),
            TunnelState::Idle | TunnelState::Waiting { .. } => false,
        }
    }

    /// Why it is not up, for the closing line of a flow that waited in vain.
    pub(super) fn why(&self) -> String {
        match &*self.state.borrow() {
            TunnelState::Idle => "not opened yet".into(),
            TunnelState::Waiting { why, .. } => why.to_string(),
            TunnelState::Up { link: Some(link), .. } if !link.attached() => match self.obstacle.get() {
                None => "detached; resuming".into(),
                Some(why) => format!("detached; {why}"),
            },
            TunnelState::Up { .. } => "up".into(),
        }
    }
}

/// The loop's state.
struct Keeper {
    device: Identity,
    deps: TunnelDeps,
    publish: watch::Sender<TunnelState>,
    wanted: watch::Receiver<bool>,
    nudge: Arc<Notify>,
    obstacle: Obstacle,
    retry: Retry,
    attempts: u64,
    stop: CancellationToken,
}

/// Why an attempt at a session failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum AttemptError {
    #[error("{0}")]
    Initiate(#[from] InitiateError),
    #[error("{0}")]
    Hello(#[from] HelloError),
}

impl AttemptError {
    pub(super) fn is_refusal(&self) -> bool {
        match self {
            Self::Initiate(error) => error.is_refusal(),
            Self::Hello(error) => {
                matches!(error, HelloError::WrongMagic | HelloError::Refused(_) | HelloError::Version(_))
            }
        }
    }

    pub(super) fn failure(&self) -> Failure {
        match self {
            Self::Initiate(error) => error.failure(),
            Self::Hello(HelloError::Io(_) | HelloError::Timeout(_)) => Failure::Path,
            Self::Hello(_) => Failure::Answered(None),
        }
    }
}

impl Keeper {
    async fn run(mut self) {
        let stop = self.stop.clone();
        if stop.run_until_cancelled(self.wanted.wait_for(|wanted| *wanted)).await.is_none() {
            return;
        }
        let mut since = Instant::now();
        self.waiting("not there yet; the device may be offline", since, false);
        while !stop.is_cancelled() {
            match stop.run_until_cancelled(self.attempt_while_it_holds()).await {
                None => break,
                Some(None) => {}
                Some(Some(Ok((session, monitor)))) => {
                    let begun = Instant::now();
                    let why = self.serve(session, monitor).await;
                    since = Instant::now();
                    self.waiting(&why, since, false);
                    if let Some(next) = self.retry.after_session(begun.elapsed())
                        && !stop.is_cancelled()
                    {
                        info!(retry_seconds = next.delay.as_secs_f64(), "the device stream did not live long");
                        self.pause(next).await;
                    }
                }
                Some(Some(Err(error))) => {
                    let why = error.to_string();
                    let next = self.retry.after(error.failure(), false);
                    warn!(device = %self.device, retry_seconds = next.delay.as_secs_f64(), "no device stream: {why}");
                    self.deps.metrics.attempt_failed(&self.device);
                    self.deps.trouble.notify_one();
                    self.attempts += 1;
                    self.waiting(&why, since, error.is_refusal());
                    self.pause(next).await;
                }
            }
        }
    }

    fn waiting(&self, why: &str, since: Instant, refused: bool) {
        let attempts = self.attempts;
        self.publish.send_replace(TunnelState::Waiting { why: why.into(), since, attempts, refused });
    }

    /// Waits, unless the network changes, the hub's configuration changes, or we stop; and not for long if a
    /// connection is there. None of these but another hub makes the wait shorter than the hub asked for.
    async fn pause(&self, Next { delay, at_least }: Next) {
        let nudged = async {
            sleep(delay.min(NUDGED_PAUSE).max(at_least)).await;
            self.nudge.notified().await;
        };
        let mut network = self.deps.network.from_now();
        let moved = async {
            sleep(at_least).await;
            network.changed().await;
            sleep(calm()).await;
        };
        let mut hub = self.deps.hub.clone();
        hub.mark_unchanged();
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = sleep(delay) => {}
            () = nudged => {}
            () = moved => {}
            Ok(()) = hub.changed() => {}
        }
    }

    /// One attempt at a new session; none if it was overtaken by another hub, credential or network: it may wait for
    /// an absent device for minutes, and would do so in the wrong place.
    async fn attempt_while_it_holds(&self) -> Option<Result<(Session, CarrierMonitor), AttemptError>> {
        let begun = Instant::now();
        let (mut hub, mut network) = (self.deps.hub.clone(), self.deps.network.from_now());
        hub.mark_unchanged();
        let moved = async {
            loop {
                network.changed().await;
                if begun.elapsed() >= SETTLED {
                    break;
                }
            }
            sleep(calm()).await;
        };
        tokio::select! {
            attempt = self.attempt() => Some(attempt),
            Ok(()) = hub.changed() => None,
            () = moved => None,
        }
    }

    /// One attempt at a new session.
    async fn attempt(&self) -> Result<(Session, CarrierMonitor), AttemptError> {
        let patience = Patience { connect: AWAIT_DEVICE, response: AWAIT_ANSWER };
        let carrier = open_leg(&self.deps, &self.device, patience, || {}).await?;
        let (monitor, hello) = (carrier.monitor(), self.deps.settings.borrow().hello.clone());
        let session = offer_new(Box::new(carrier), &hello).await?;
        Ok((session, monitor))
    }

    /// Keeps a session until it ends, and says why it ended.
    async fn serve(&mut self, session: Session, monitor: CarrierMonitor) -> String {
        let begun = Instant::now();
        let limits = self.deps.settings.borrow().limits.clone();
        let MuxSession { mux, incoming, driver, link, peer: _ } = MuxSession::begin(session, Role::Client, &limits);
        // The device opens no channels; the mux resets those that nobody takes.
        drop(incoming);
        self.deps.metrics.opened(&self.device);
        info!(resumable = link.is_some(), "device stream open");
        let publish = |monitor| {
            let (mux, link) = (mux.clone(), link.clone());
            self.publish.send_replace(TunnelState::Up { mux, link, monitor, since: begun });
        };
        publish(monitor.clone());
        let mut driver = pin!(driver);
        let ended = tokio::select! {
            ended = &mut driver => Some(ended),
            () = keep_attached(&self.deps, &self.device, &mux, link.as_ref(), (monitor, &self.obstacle, &self.nudge), publish) => None,
            () = self.stop.cancelled() => {
                end_session(&mux, driver.as_mut(), link.as_ref()).await;
                Some(Ok(()))
            }
        };
        let lost = link.as_ref().and_then(LinkControl::end).map(|end| end.to_string());
        let why = match ended {
            Some(Ok(())) if self.stop.is_cancelled() => "the service stops".into(),
            Some(Ok(())) => "ended by the device".into(),
            Some(Err(error)) => lost.unwrap_or_else(|| error.to_string()),
            None => lost.unwrap_or_else(|| "its keeper gave up".into()),
        };
        if let Some(link) = &link {
            link.say_goodbye(&why).await;
        }
        self.deps.metrics.ended(&self.device);
        info!(seconds = begun.elapsed().as_secs_f64(), "device stream ended: {why}");
        why
    }
}

/// Asks for a device stream to the device's mux, and opens our leg of it.
pub(super) async fn open_leg(
    deps: &TunnelDeps,
    device: &Identity,
    patience: Patience,
    reached: impl FnOnce() + Send,
) -> Result<HubCarrier, InitiateError> {
    let hub = deps.hub.borrow().clone();
    initiator::open(&hub, device, &mux_stream(), patience, CarrierOptions::DATA, reached).await
}

fn mux_stream() -> StreamName {
    MUX_STREAM.parse().unwrap_or_else(|error| unreachable!("{MUX_STREAM} is a stream name: {error}"))
}
