//! The resumable link over mortal carriers.
//!
//! Owns the byte stream that the mux runs over, and the handle that gives it carriers and watches it. Does not know how
//! carriers are made or what a hello is: see [`super::hello`]. Invariant: a read gives zero bytes only if the other side
//! ended the stream; a lost session is an error.
//!
//! There is no task: carrier, timer and core move inside the polls of [`Link`]. One lock is taken per poll; it is free
//! unless the control is used in that moment. No byte of bulk is copied: what the mux writes becomes part of the replay
//! buffer, from where it is sent by reference; the payload of a frame is read from the carrier straight into the
//! reader's buffer.

mod budget;
mod driver;
mod metrics;
mod wakers;

#[cfg(test)]
mod tests;

use std::{
    fmt, io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::watch,
    time::Instant,
};

pub use self::{budget::ReplayBudget, metrics::LinkMetrics};
use self::{driver::Driver, wakers::Wakers};
use super::mux::Tunnel;
pub use crate::proto::{hello::LinkId, link::EndReason};
use crate::{
    base::Secret,
    proto::link::{AttachError, Core, INITIAL_WINDOW, Options, Positions},
};

/// How long the last word of a link may take on a path that is full. A peer that does not hear it waits for another carrier
/// until its grace is over, with all its flows.
const LAST_WORD: Duration = Duration::from_secs(5);

/// What a link runs over: one mortal connection through the hub.
pub trait CarrierIo: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> CarrierIo for T {}

/// A carrier of any kind.
pub type BoxedCarrier = Box<dyn CarrierIo>;

/// What all links of a process share: the bound on replay memory, and the metrics.
#[derive(Clone, Debug)]
pub struct LinkSettings {
    /// What a link's replay window starts with, in bytes; no less than what a local network needs, or it would limit.
    pub initial_window: usize,
    /// Bound over the replay buffers of all links.
    pub budget: ReplayBudget,
    /// Counters of all links.
    pub metrics: LinkMetrics,
}

impl Default for LinkSettings {
    fn default() -> Self {
        let (budget, metrics) = (ReplayBudget::default(), LinkMetrics::default());
        Self { initial_window: INITIAL_WINDOW, budget, metrics }
    }
}

/// Why a link has no carrier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetachReason {
    label: &'static str,
    text: String,
}

impl DetachReason {
    /// The word for metrics.
    pub fn label(&self) -> &'static str {
        self.label
    }

    fn from_io(error: Option<&io::Error>) -> Self {
        let Some(error) = error else {
            return Self { label: "closed", text: "the carrier was closed".to_owned() };
        };
        let label = match error.kind() {
            io::ErrorKind::TimedOut => "silent",
            io::ErrorKind::AddrNotAvailable => "address_gone",
            io::ErrorKind::ConnectionReset => "reset",
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionAborted => "broken",
            _ => "other",
        };
        Self { label, text: error.to_string() }
    }
}

impl fmt::Display for DetachReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl LinkId {
    /// Enough of the name for a log line.
    pub(crate) fn short(&self) -> String {
        self.to_string()[..8].to_owned()
    }
}

/// A snapshot of a link.
#[derive(Debug, Clone)]
pub struct LinkState {
    /// Whether a carrier is attached.
    pub attached: bool,
    /// Since when it is so.
    pub since: Instant,
    /// Bytes held until the other side has consumed them.
    pub replay_bytes: usize,
    /// Number of the newest attach.
    pub epoch: u64,
    /// Whether the other side is known to have the link: see [`Core::is_confirmed`].
    pub confirmed: bool,
    /// How long something that was sent on this carrier has waited while nothing at all was heard.
    pub unanswered_for: Option<Duration>,
}

/// What the control can wait for.
#[derive(Debug, Default)]
struct Status {
    attached: bool,
    detached: Option<DetachReason>,
    ended: Option<EndReason>,
}

struct Shared {
    id: LinkId,
    secret: Secret,
    resume_for: Duration,
    epochs: AtomicU64,
    driver: Mutex<Driver>,
    wakers: Arc<Wakers>,
    status: watch::Receiver<Status>,
}

impl Shared {
    fn driver(&self) -> MutexGuard<'_, Driver> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A byte stream that outlives its carriers. Dropping it ends the link.
pub struct Link {
    shared: Arc<Shared>,
    waker: Waker,
}

/// The handle by which a link is given carriers, watched and closed.
#[derive(Clone)]
pub struct LinkControl {
    shared: Arc<Shared>,
}

impl Link {
    /// A link with its first carrier, whose hello is done.
    pub(super) fn begin(
        id: LinkId,
        secret: Secret,
        options: Options,
        settings: LinkSettings,
        carrier: BoxedCarrier,
    ) -> (Self, LinkControl) {
        let wakers = Arc::new(Wakers::default());
        let (sender, status) = watch::channel(Status::default());
        let core = Core::new(Instant::now().into_std(), options);
        let mut driver = Driver::new(core, id, settings, Arc::clone(&wakers), sender);
        driver.attach(carrier, 1, Positions::default()).expect("a new link takes its first carrier");
        let shared = Arc::new(Shared {
            id,
            secret,
            resume_for: options.resume_for,
            epochs: AtomicU64::new(1),
            driver: Mutex::new(driver),
            wakers: Arc::clone(&wakers),
            status,
        });
        (Self { shared: Arc::clone(&shared), waker: wakers.waker() }, LinkControl { shared })
    }

    fn poll<T>(&self, poll: impl FnOnce(&mut Driver, &mut Context<'_>) -> Poll<T>) -> Poll<T> {
        poll(&mut self.shared.driver(), &mut Context::from_waker(&self.waker))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let carrier = self.shared.driver().abandon(&mut Context::from_waker(Waker::noop()));
        drop(carrier);
    }
}

impl AsyncRead for Link {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.shared.wakers.reader.register(cx.waker());
        self.poll(|driver, cx| driver.poll_read(cx, buf))
    }
}

impl Tunnel for Link {
    fn poll_turn(self: Pin<&mut Self>, cx: &mut Context<'_>, most: usize) -> Poll<io::Result<usize>> {
        self.shared.wakers.writer.register(cx.waker());
        self.poll(|driver, cx| driver.poll_turn(cx, most))
    }

    /// A turn of bulk becomes a frame as it is, without a copy.
    fn poll_write_turn(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &mut BytesMut) -> Poll<io::Result<()>> {
        self.shared.wakers.writer.register(cx.waker());
        self.poll(|driver, cx| driver.poll_write_turn(cx, bytes))
    }
}

impl AsyncWrite for Link {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.shared.wakers.writer.register(cx.waker());
        self.poll(|driver, cx| driver.poll_write(cx, bytes))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.wakers.writer.register(cx.waker());
        self.poll(Driver::poll_flush)
    }

    /// Ends the outgoing stream; done when the other side has consumed everything. May wait for a carrier as long as the
    /// link lives: who is in a hurry closes the link by its control.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.wakers.writer.register(cx.waker());
        self.poll(Driver::poll_shutdown)
    }
}

impl LinkControl {
    /// The link's name.
    pub fn id(&self) -> LinkId {
        self.shared.id
    }

    /// Whether a carrier is attached.
    pub fn attached(&self) -> bool {
        self.shared.status.borrow().attached
    }

    /// How long a detached link lives; the smaller of both sides' settings.
    pub fn resume_for(&self) -> Duration {
        self.shared.resume_for
    }

    /// Waits until no carrier is attached, or the link has ended, and says why.
    pub async fn wait_detached(&self) -> DetachReason {
        let mut status = self.shared.status.clone();
        let Ok(status) = status.wait_for(|status| !status.attached).await else { return self.gone().into() };
        match &status.ended {
            Some(reason) => reason.clone().into(),
            None => status.detached.clone().unwrap_or_else(|| DetachReason::from_io(None)),
        }
    }

    /// Waits until a carrier is attached (true) or the link has ended (false).
    pub async fn wait_attached(&self) -> bool {
        let mut status = self.shared.status.clone();
        let status = status.wait_for(|status| status.attached || status.ended.is_some()).await;
        status.is_ok_and(|status| status.attached)
    }

    /// Ends the link and tells the other side, if that is possible without waiting.
    pub fn close(&self, reason: &str) {
        self.fail(EndReason::ClosedHere(reason.to_owned()));
    }

    /// Ends the link, if it has not ended, and waits until the other side could hear it; on a path that is full, for five
    /// seconds. Whoever polled the link has stopped doing so.
    pub async fn say_goodbye(&self, reason: &str) {
        self.close(reason);
        let farewell = std::future::poll_fn(|cx| self.shared.driver().poll_farewell(cx));
        // Who has not heard it by then, finds out by the grace.
        let _ = tokio::time::timeout(LAST_WORD, farewell).await;
    }

    /// Takes the carrier away: whoever watches over the link knows that it leads nowhere. The link waits for another.
    pub fn lose_carrier(&self, why: &str) {
        self.shared
            .driver()
            .lose(Instant::now().into_std(), Some(io::Error::new(io::ErrorKind::TimedOut, why.to_owned())));
        self.shared.wakers.wake_both();
    }

    /// A snapshot.
    pub fn state(&self) -> LinkState {
        let driver = self.shared.driver();
        let core = &driver.core;
        let now = Instant::now().into_std();
        LinkState {
            attached: core.is_attached(),
            since: core.since().into(),
            replay_bytes: core.replay_bytes(),
            epoch: core.epoch(),
            confirmed: core.is_confirmed(),
            unanswered_for: core.unanswered_since().map(|since| now.saturating_duration_since(since)),
        }
    }

    /// How the link ended, if it has.
    pub fn end(&self) -> Option<EndReason> {
        self.shared.status.borrow().ended.clone()
    }

    /// Waits for the end.
    pub async fn ended(&self) -> EndReason {
        let mut status = self.shared.status.clone();
        let Ok(status) = status.wait_for(|status| status.ended.is_some()).await else { return self.gone() };
        status.ended.clone().unwrap_or_else(|| self.gone())
    }

    pub(super) fn secret(&self) -> &Secret {
        &self.shared.secret
    }

    /// The number of the next attempt to attach.
    pub(super) fn next_epoch(&self) -> u64 {
        self.shared.epochs.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(super) fn positions(&self) -> Positions {
        self.shared.driver().core.positions()
    }

    pub(super) fn asked(&self, epoch: u64) -> Result<Positions, AttachError> {
        self.shared.driver().asked(epoch)
    }

    pub(super) fn attach(&self, carrier: BoxedCarrier, epoch: u64, positions: Positions) -> Result<(), AttachError> {
        let former = self.shared.driver().attach(carrier, epoch, positions);
        self.shared.wakers.wake_both();
        former.map(drop)
    }

    pub(super) fn fail(&self, reason: EndReason) {
        self.shared.driver().fail(&mut Context::from_waker(Waker::noop()), reason);
        self.shared.wakers.wake_both();
    }

    /// The sender of the status lives in the driver, which we hold: this is for completeness.
    fn gone(&self) -> EndReason {
        self.end().unwrap_or(EndReason::Finished)
    }
}

impl From<EndReason> for DetachReason {
    fn from(reason: EndReason) -> Self {
        Self { label: "ended", text: reason.to_string() }
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Link({})", self.shared.id.short())
    }
}

impl fmt::Debug for LinkControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LinkControl({})", self.shared.id.short())
    }
}
