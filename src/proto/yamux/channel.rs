//! The state of one channel.
//!
//! Owns what was received and not read, what was written and not sent, both windows, and how each direction ended.
//! Does not know frames or other channels. Invariant: bytes that the application has not read and credit that the
//! peer holds add up to at most the channel's window.

use super::chunks::Chunks;
use super::round_trip::Growth;
use super::schedule::Turn;

/// The window every channel starts with; yamux's specification fixes it.
pub(super) const INITIAL_WINDOW: u32 = 256 * 1024;

/// The most credit kept back to save window updates, each of which is a message through three daemons. Windows below
/// twice this send theirs at the half, as the yamux specification suggests.
const UPDATE_STEP: u32 = 256 * 1024;

/// Why a channel does not carry data any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// The peer reset it.
    #[error("the peer reset the channel")]
    ResetByPeer,
    /// This side reset it.
    #[error("the channel was reset")]
    Reset,
    /// This side reset it: too much data was unread over all channels, and here was most of it.
    #[error("the channel was reset: it held too much data that nobody read")]
    Unread,
    /// This side reset it: the peer sent data after its end.
    #[error("the channel was reset: the peer sent data after it had ended its direction")]
    DataAfterEnd,
    /// The mux ended.
    #[error("the tunnel ended")]
    Aborted,
    /// Written to after its end.
    #[error("this direction of the channel has been ended")]
    Finished,
}

/// Our direction's end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Fin {
    #[default]
    Open,
    /// To be sent behind what is unsent.
    Queued,
    Sent,
    /// A reset, behind what is unsent.
    Reset,
}

/// One channel.
#[derive(Debug, Default)]
pub(super) struct Channel {
    pub(super) id: u32,
    /// Opened by this side.
    pub(super) outbound: bool,

    pub(super) received: Chunks,
    /// What the peer may still send.
    pub(super) credit: u32,
    /// What it has announced in the header of a frame, and we do not have yet.
    pub(super) arriving: u32,
    /// What `credit`, `arriving` and `received` may add up to.
    pub(super) window: u32,
    pub(super) growth: Growth,
    /// It could use a larger window than the initial one.
    pub(super) wants_growth: bool,
    pub(super) fin_received: bool,

    pub(super) unsent: Chunks,
    /// What we may still send.
    pub(super) send_credit: u32,
    pub(super) fin: Fin,
    pub(super) turn: Turn,

    /// Set once: the channel is over before its directions ended.
    pub(super) failure: Option<Failure>,
    pub(super) owes: Owes,
    /// In the control queue.
    pub(super) queued: bool,
    pub(super) reader_waits: bool,
    pub(super) writer_waits: bool,
    /// The application has let go of it.
    pub(super) released: bool,
    /// Nothing of it is on the wire any more.
    pub(super) settled: bool,
}

/// Control frames the channel owes.
#[derive(Debug, Default)]
pub(super) struct Owes {
    pub(super) syn: bool,
    pub(super) ack: bool,
    pub(super) reset: bool,
}

impl Channel {
    pub(super) fn new(id: u32, outbound: bool) -> Self {
        let owes = Owes { syn: outbound, ack: !outbound, reset: false };
        let (credit, window, send_credit) = (INITIAL_WINDOW, INITIAL_WINDOW, INITIAL_WINDOW);
        Self { id, outbound, credit, window, send_credit, owes, ..Self::default() }
    }

    /// Something may go out now, as far as the peer's window is concerned.
    pub(super) fn sendable(&self) -> bool {
        let data = !self.unsent.is_empty();
        self.failure.is_none() && if data { self.send_credit > 0 } else { matches!(self.fin, Fin::Queued | Fin::Reset) }
    }

    /// Both directions ended as they should, or a reset is through.
    pub(super) fn is_over(&self) -> bool {
        match self.failure {
            Some(_) => !self.owes.reset,
            None => self.fin == Fin::Sent && self.fin_received,
        }
    }

    /// Nothing would be lost if the application let go now.
    pub(super) fn is_complete(&self) -> bool {
        self.failure.is_none() && self.fin != Fin::Open && self.fin_received && self.received.is_empty()
    }

    /// The credit to return to the peer, if it is worth a frame.
    pub(super) fn update_due(&self) -> bool {
        self.returnable() >= (self.window / 2).clamp(1, UPDATE_STEP)
    }

    /// What the peer may be granted on top of what it has.
    pub(super) fn returnable(&self) -> u32 {
        if self.fin_received || self.failure.is_some() {
            return 0;
        }
        let unread = u32::try_from(self.received.len()).unwrap_or(u32::MAX);
        self.window.saturating_sub(self.credit).saturating_sub(self.arriving).saturating_sub(unread)
    }
}
