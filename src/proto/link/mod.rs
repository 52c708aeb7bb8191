//! The resumable link: a reliable byte stream between two daemons that outlives the carriers below it.
//!
//! Owns positions, the replay buffer, credit, acknowledgements and the end of a link. Does not know carriers, the
//! hello that introduces one (see [`crate::proto::hello`]), or what the bytes mean. Invariant: a byte that the
//! application reads here is the byte that was written at the same position there, each position once, in order.
//!
//! # Why
//!
//! A carrier (a WebSocket through the hub) dies with every LTE hand-over, NAT time-out or hub restart. The mux above
//! needs a stream that does not. The hub shall know nothing: to it, a resume is one more device stream.
//!
//! # Goals
//!
//! 1. Nothing lost, duplicated or reordered by a cut at any byte. 2. Bounded memory on both sides. 3. A direction whose
//!    reader sits still never stops the other one. 4. An end is either the end that the other side meant, or an error.
//! 5. A price per frame, not per byte.
//!
//! # Bytes
//!
//! A carrier whose hello is done holds frames in both directions, nothing else. A frame is a head of 20 bytes,
//! big-endian, and a payload:
//!
//! ```text
//!  0      1       2        4            12            20
//!  | kind | flags | length |  position  |  consumed   | payload (length bytes)
//! ```
//!
//! | kind | | flags | length | position |
//! |---|---|---|---|---|
//! | 1 | DATA | 1 = answer at once | 1 to 65,516 | of the first byte |
//! | 2 | ACK | 0 | 0 | 0 |
//! | 3 | FIN | 0 | 0 | of the end |
//! | 4 | CLOSE | 0 closed, 1 violation, 2 session lost | 0 to 256, text | 0 |
//!
//! `consumed` of every frame is an acknowledgement: all before it was *read by the application*, not merely received.
//!
//! # Flow
//!
//! Each byte of a direction has one position for life, from 0; the FIN takes the position behind the last byte. The
//! sender keeps what is not acknowledged. It may send up to `consumed + receive window` of the other side (from the
//! hello): the receiver never refuses input, its memory is bounded by that credit. Taking acknowledgements for what was
//! only received would freeze both directions when one reader sits still, because the acknowledgements of one direction
//! would wait behind unread data of the other.
//!
//! The sender bounds its own memory by a *window* that grows from 256 KiB with the rate and round trip of the path.
//! Unsent bytes are few (one frame): bytes wait in the mux, where they can be ordered. A sender about to fill its
//! window sets the flag "answer at once", and now and then one that sends a frame with nothing else on the way, to see
//! the round trip; otherwise acknowledgements ride on data, or follow after 64 KiB or 100 ms.
//!
//! On a new carrier each side has heard from the hello what the other *received* and *consumed*. It forgets what was
//! consumed and sends again from what was received. That may be a little old (the former carrier went on while the hello
//! was under way): the receiver skips bytes it has. The newest attach wins; input of an older carrier is ignored.
//!
//! CLOSE ends both directions at once; what was received before it can still be read, then reads fail. A link without a
//! carrier for `resume_for` (the smaller of both sides') ends; one that never had a frame from the other side, after 60 s.
//!
//! # Violations
//!
//! An unknown kind, a head that breaks the table, a DATA or FIN that leaves a gap or exceeds the credit or the end, an
//! acknowledgement that goes back or exceeds what was sent: the link ends with [`EndReason::Violation`] and CLOSE 1.
//! So do positions in a hello that were never sent. Nothing is repaired by guessing.
//!
//! # Versions
//!
//! The version is that of the hello. A new kind of frame or flag needs a feature bit there.
//!
//! # Rejected
//!
//! Implied positions (a lost hello would shift them unseen); acknowledging on receipt (see above); checksums (TLS has
//! them on every leg); a window field in frames (the credit is fixed by the hello, its use is the sender's business).

mod core;
mod frame;
mod fuzz;
mod inbox;
mod outbox;
mod pace;

#[cfg(test)]
#[path = "../../../tests/sim/link/mod.rs"]
mod sim;

use std::time::Duration;

pub use self::{
    core::{AttachError, Core, Event, Options, Positions, Read},
    frame::{Frame, HEAD, Head, Kind, MAX_PAYLOAD, MAX_REASON},
    fuzz::fuzz_link,
};

/// What the replay window starts with: the window of an ordinary TCP connection after its first round trips, and two
/// round trips of 20 Mbit/s at 50 ms.
pub const INITIAL_WINDOW: usize = 256 * 1024;

/// How the other side broke the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A frame of a kind that does not exist.
    #[error("frame of unknown kind {0}")]
    UnknownKind(u8),
    /// A head whose fields contradict its kind.
    #[error("malformed frame head")]
    MalformedHead,
    /// Bytes are missing before this frame.
    #[error("position {position} where {expected} was expected: bytes are missing")]
    Gap {
        /// Position of the frame.
        position: u64,
        /// First position that is missing.
        expected: u64,
    },
    /// More bytes than the receive window allows.
    #[error("more bytes than the receive window allows")]
    Overrun,
    /// Bytes behind the end of the stream, or a second, different end.
    #[error("bytes behind the end of the stream")]
    BehindEnd,
    /// An acknowledgement of bytes that were never sent.
    #[error("acknowledgement of bytes that were never sent")]
    AckOfUnsent,
    /// An acknowledgement that goes back.
    #[error("acknowledgement that goes back")]
    AckRewound,
    /// Positions of a hello that cannot be.
    #[error("impossible positions in a hello")]
    ImpossiblePositions,
    /// A hello whose number was used before.
    #[error("replayed hello")]
    ReplayedHello,
    /// A wrong proof of the link's secret.
    #[error("wrong proof of the link's secret")]
    WrongProof,
}

/// How a link ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndReason {
    /// Both directions ended in order and everything was consumed.
    #[error("finished")]
    Finished,
    /// This side closed it.
    #[error("closed here: {0}")]
    ClosedHere(String),
    /// The other side closed it.
    #[error("closed by the other side: {0}")]
    ClosedByPeer(String),
    /// No carrier came in time.
    #[error("session lost: no carrier for {} s", .0.as_secs())]
    Expired(Duration),
    /// The other side does not know the link any more, or says that the session is lost.
    #[error("session lost: {0}")]
    SessionLost(String),
    /// The other side broke the rules of the link.
    #[error("session lost: {0}")]
    Violation(Violation),
}

/// Faults planted by the simulation to prove that it would find them.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The first frame of a replay is skipped.
    ReplaySkipsAFrame,
    /// Bytes are acknowledged when their frame is announced.
    AckTooEarly,
    /// The replay buffer has no bound.
    UnboundedReplay,
    /// Input of older carriers is taken.
    NotFenced,
    /// A wrong proof is taken for a right one.
    ProofNotChecked,
    /// The loss of a session reads like the end of the stream.
    ResetReadsAsEof,
}
