//! WebSocket frames (RFC 6455, section 5), as the streaming endpoint and the daemons' carriers speak them.
//!
//! Owns the decoding of frames into payload bytes, for both ends, and the encoding of frames. Does not know sockets,
//! the upgrade, or what the payload means. Invariant: memory does not grow with what a peer claims: payload stays
//! where it was read, and of a control frame at most 125 bytes are kept.
//!
//! Why not tungstenite here: neither a relay nor a carrier wants messages or text, only payload bytes. tungstenite
//! zeroes and clears its read buffer around each read, holds a frame until it is whole, copies what it sends once more
//! in order to mask it and shifts that buffer after a partial write; together that was an eighth of the CPU time per
//! byte. It is the oracle in the tests.

mod decode;
mod encode;
#[cfg(test)]
mod tests;

pub use decode::{Decoder, PeerClose, Violation};
pub use encode::{Mask, close, ping, pong, put_header};

/// Longest payload of a control frame (RFC 6455, 5.5).
pub const MAX_CONTROL: usize = 125;
/// Room in front of a payload for the header of a frame of at most 65,535 bytes, its mask included.
pub const HEADROOM: usize = 8;
/// Room for the header of any frame that a server sends.
pub const SERVER_HEADROOM: usize = 10;

/// Which end frames come from: clients mask theirs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The end that asked for the upgrade.
    Client,
    /// The end that granted it.
    Server,
}

const OPCODE_TEXT: u8 = 1;
const OPCODE_BINARY: u8 = 2;
const OPCODE_CLOSE: u8 = 8;
const OPCODE_PING: u8 = 9;
const OPCODE_PONG: u8 = 10;
const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;
