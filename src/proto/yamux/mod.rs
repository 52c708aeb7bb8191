//! The multiplexer: many channels over one tunnel, as yamux (version 0) specifies them.
//!
//! Owns the frames, the channels' states and windows, and the order in which frames go out. Knows no sockets, clock,
//! tasks or wakers: bytes and `now` go in; bytes, events and deadlines come out (the driver is
//! `transport::mux`). Invariant: a channel's bytes arrive complete and in order, followed by an end only if the peer
//! meant one; whatever else happens is a [`Failure`] with a name.
//!
//! # Why not the `yamux` crate
//!
//! It cannot express what flows need: dropping a stream after the peer's end sends an end and not a reset, so a
//! failed response looks complete; after our own end nothing is sent, so the peer hangs; a reset and a dead tunnel
//! both read as a clean end; its limit on streams ends the tunnel; it has no bound on memory over all streams, and no
//! say in whose frame is next. It is the oracle in the tests of both roles.
//!
//! # Bytes
//!
//! A frame is a header of twelve bytes, and for data a body. Numbers are in network order.
//!
//! ```text
//!  0          1          2 .. 3      4 .. 7        8 .. 11
//!  version=0  type       flags       channel ID    length
//! ```
//!
//! | type | length is | we send it |
//! |---|---|---|
//! | 0 data | bytes of body that follow | at most 16 KiB of body; an end alone, never with a body |
//! | 1 window update | credit granted to the receiver of the frame | opening, acknowledging, granting, resetting |
//! | 2 ping | opaque, returned in the answer | SYN asks, ACK answers |
//! | 3 go away | 0 normal, 1 protocol error, 2 internal error | once, as the last frame |
//!
//! Flags: 1 SYN opens, 2 ACK acknowledges, 4 FIN ends the sender's direction, 8 RST ends both at once. All four are
//! understood on data and on window updates, combined too. Clients open odd IDs, servers even ones, in any order.
//!
//! # Flow
//!
//! *Opening* sends SYN; data may follow at once. The peer's ACK is not waited for: there are implementations that
//! never acknowledge a channel on which they have nothing to say. Ours goes out with the next turn.
//!
//! *Windows* start at 256 KiB and never shrink below. Credit goes back when the application has taken data, from a
//! half of the window on (at most 256 KiB). A window grows to twice what its reader takes in the *shortest* round
//! trip seen, so it fills the path but cannot chase the queues it makes; one that came late, when the queue of others
//! had made the path look long, grows to their average. Growth is paid from the memory for received data and shared
//! among the channels that want it. Pings measure the round trip, only while data flows.
//!
//! *Order*: control frames first, then data by deficit round robin with a quantum of 32 KiB and priority for channels
//! that just became active. Bytes wait here, per channel, until the driver has room for them.
//!
//! *Ends*: FIN in each direction, in any order. A channel that the application releases before both directions have
//! ended and everything was read is reset, in every state. A reset overtakes unread ends, not unread data.
//!
//! *Closing*: channels in use are reset, finished ones have 3 s to send what is left, then GoAway 0 and the end of the
//! tunnel. After the peer's GoAway 0 nothing is opened, what is open goes on. A tunnel that ends with channels open
//! fails these with [`Failure::Aborted`].
//!
//! # Limits
//!
//! | what | limit | at the limit |
//! |---|---|---|
//! | channels per direction | [`Options::max_channels`] | opening waits; the peer's are reset |
//! | channels the peer ended but the application still holds | as many again | the peer's next are reset |
//! | unread data of a channel | its window | violation |
//! | unread data over all | [`Options::max_buffered`] | input waits; after 1 s the channel with most of it is reset |
//! | unsent data of a channel | 64 KiB, less when memory is short | writes wait |
//! | unsent data over all | [`Options::max_buffered`], and 1 KiB per channel | writes wait |
//! | answers to pings not yet sent | 256 | violation |
//! | resets of refused channels not yet sent | 1024 | violation |
//!
//! # Violations
//!
//! See [`Violation`]: the mux sends GoAway 1 and ends; its channels fail. Frames for channels that do not exist (any
//! more) are no violation but ignored: they were on their way when the channel was reset. Data after an end resets
//! that channel.

mod channel;
mod chunks;
mod core;
mod frame;
mod fuzz;
mod input;
mod output;
mod round_trip;
mod schedule;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;

pub use channel::Failure;
pub use core::{Core, Event, Key, OpenRefusal, Options, Reading, Role, Writing};
pub use frame::Violation;
pub use fuzz::fuzz_yamux;
pub use input::InputError;
pub use output::TURN;
