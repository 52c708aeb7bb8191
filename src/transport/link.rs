//! The resumable link over mortal carriers.

use std::{
    fmt, io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

pub use crate::proto::hello::LinkId;

/// What a link runs over: one mortal connection through the hub.
pub trait CarrierIo: AsyncRead + AsyncWrite + Send + Unpin + 'static {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> CarrierIo for T {}

/// A carrier of any kind.
pub type BoxedCarrier = Box<dyn CarrierIo>;

/// What all links of a process share: the bound on replay memory, and the metrics.
#[derive(Clone, Debug, Default)]
pub struct LinkSettings {
    /// Bound over the replay buffers of all links.
    pub budget: ReplayBudget,
    /// Counters of all links.
    pub metrics: LinkMetrics,
}

/// A bound on the replay memory of all links of a process.
#[derive(Clone, Debug, Default)]
pub struct ReplayBudget;

impl ReplayBudget {
    /// A budget of `total` bytes over all links, of which one link takes at most `per_link`.
    pub fn new(_total: usize, _per_link: usize) -> Self {
        Self
    }
}

/// Counters of all links of a process.
#[derive(Clone, Debug, Default)]
pub struct LinkMetrics;

impl LinkMetrics {
    /// Adds the metrics to a registry.
    pub fn register(&self, _registry: &prometheus::Registry) -> Result<(), prometheus::Error> {
        Ok(())
    }
}

/// Why a link has no carrier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DetachReason(String);

impl fmt::Display for DetachReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a link ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndReason {
    /// Both directions ended in order.
    #[error("finished")]
    Finished,
    /// This side closed it.
    #[error("closed here: {0}")]
    ClosedHere(String),
    /// The other side closed it.
    #[error("closed by the other side: {0}")]
    ClosedByPeer(String),
    /// No carrier came in time, or the other side no longer knows the link.
    #[error("session lost: {0}")]
    SessionLost(String),
    /// The other side broke the rules of the link.
    #[error("session lost: {0}")]
    Violation(String),
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
    /// How long bytes that were sent have waited for an answer, if any do.
    pub unanswered_for: Option<Duration>,
}

/// A byte stream that outlives its carriers.
#[derive(Debug)]
pub struct Link {
    shared: Arc<()>,
}

/// The handle by which a link is given carriers, watched and closed.
#[derive(Clone, Debug)]
pub struct LinkControl {
    _shared: Arc<()>,
}

impl LinkControl {
    /// The link's name.
    pub fn id(&self) -> LinkId {
        LinkId([0; 16])
    }

    /// Whether a carrier is attached.
    pub fn attached(&self) -> bool {
        false
    }

    /// How long a detached link lives; the smaller of both sides' settings.
    pub fn resume_for(&self) -> Duration {
        Duration::ZERO
    }

    /// Waits until no carrier is attached (or the link has ended), and says why.
    pub async fn wait_detached(&self) -> DetachReason {
        DetachReason(String::new())
    }

    /// Waits until a carrier is attached (true) or the link has ended (false).
    pub async fn wait_attached(&self) -> bool {
        false
    }

    /// Ends the link, tells the other side, and drops the carrier.
    pub fn close(&self, _reason: &str) {}

    /// A snapshot.
    pub fn state(&self) -> LinkState {
        LinkState { attached: false, since: Instant::now(), replay_bytes: 0, epoch: 0, unanswered_for: None }
    }

    /// How the link ended, if it has.
    pub fn end(&self) -> Option<EndReason> {
        None
    }

    /// Waits for the end.
    pub async fn ended(&self) -> EndReason {
        EndReason::Finished
    }
}

impl AsyncRead for Link {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let _ = &self.shared;
        Poll::Ready(Err(io::ErrorKind::Unsupported.into()))
    }
}

impl AsyncWrite for Link {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Err(io::ErrorKind::Unsupported.into()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Err(io::ErrorKind::Unsupported.into()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Err(io::ErrorKind::Unsupported.into()))
    }
}
