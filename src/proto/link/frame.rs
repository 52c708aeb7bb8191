//! The head of a link frame.
//!
//! Owns the 20 bytes before each payload. Does not know what positions mean to the two ends.
//! Invariant: a parsed head's length is at most [`MAX_PAYLOAD`], and what must be zero is zero.

use bytes::{BufMut, Bytes, BytesMut};

use super::Violation;

/// Bytes of a head.
pub const HEAD: usize = 20;

/// Largest payload of a frame: with its head it just fits a WebSocket message of 65,536 bytes, the largest that the
/// hub passes on, so a full frame is one message.
pub const MAX_PAYLOAD: usize = 65_536 - HEAD;

/// Longest text of a CLOSE: a sentence for a log line.
pub const MAX_REASON: usize = 256;

/// Flag of a DATA frame: the sender is about to run out of room, so acknowledge as soon as this is consumed.
pub(super) const ANSWER_AT_ONCE: u8 = 1;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// Bytes of the stream.
    Data = 1,
    /// An acknowledgement and nothing else.
    Ack = 2,
    /// The stream ends at this position.
    Fin = 3,
    /// The link ends now.
    Close = 4,
}

/// The fields of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// What follows.
    pub kind: Kind,
    /// Of DATA: `ANSWER_AT_ONCE`; of CLOSE: the code.
    pub flags: u8,
    /// Bytes of payload.
    pub length: usize,
    /// Position of the first byte of DATA, or of the end; otherwise zero.
    pub position: u64,
    /// Position up to which the sender of this frame has consumed what it received.
    pub consumed: u64,
}

impl Head {
    /// The bytes of the head.
    pub fn encode(&self) -> [u8; HEAD] {
        let mut bytes = [0; HEAD];
        bytes[0] = self.kind as u8;
        bytes[1] = self.flags;
        bytes[2..4].copy_from_slice(&u16::try_from(self.length).unwrap_or(u16::MAX).to_be_bytes());
        bytes[4..12].copy_from_slice(&self.position.to_be_bytes());
        bytes[12..20].copy_from_slice(&self.consumed.to_be_bytes());
        bytes
    }

    /// Parses and checks a head.
    pub fn decode(bytes: &[u8; HEAD]) -> Result<Self, Violation> {
        let kind = match bytes[0] {
            1 => Kind::Data,
            2 => Kind::Ack,
            3 => Kind::Fin,
            4 => Kind::Close,
            other => return Err(Violation::UnknownKind(other)),
        };
        let head = Self {
            kind,
            flags: bytes[1],
            length: usize::from(u16::from_be_bytes([bytes[2], bytes[3]])),
            position: word(&bytes[4..12]),
            consumed: word(&bytes[12..20]),
        };
        let well_formed = match kind {
            Kind::Data => head.flags <= ANSWER_AT_ONCE && (1..=MAX_PAYLOAD).contains(&head.length),
            Kind::Ack => head.flags == 0 && head.length == 0 && head.position == 0,
            Kind::Fin => head.flags == 0 && head.length == 0,
            Kind::Close => head.length <= MAX_REASON && head.position == 0,
        };
        if well_formed { Ok(head) } else { Err(Violation::MalformedHead) }
    }
}

/// A frame to send: its head, and its payload by reference.
#[derive(Debug, Clone)]
pub struct Frame {
    /// The encoded head.
    pub head: [u8; HEAD],
    /// What follows it.
    pub payload: Bytes,
}

impl Frame {
    /// Appends the whole frame to a buffer.
    pub fn append_to(&self, buffer: &mut BytesMut) {
        buffer.put_slice(&self.head);
        buffer.put_slice(&self.payload);
    }
}

fn word(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| (value << 8) | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_survives_the_wire() {
        let head = Head { kind: Kind::Data, flags: 1, length: MAX_PAYLOAD, position: u64::MAX - 7, consumed: 1 << 40 };
        assert_eq!(Head::decode(&head.encode()), Ok(head));
    }

    #[test]
    fn a_head_that_says_nonsense_is_refused() {
        let good = Head { kind: Kind::Ack, flags: 0, length: 0, position: 0, consumed: 9 };
        for (at, value) in [(0, 0), (0, 5), (0, 255), (1, 1), (3, 1), (11, 1)] {
            let mut bytes = good.encode();
            bytes[at] = value;
            assert!(Head::decode(&bytes).is_err(), "byte {at} = {value}");
        }
        let empty = Head { kind: Kind::Data, ..good };
        assert_eq!(Head::decode(&empty.encode()), Err(Violation::MalformedHead));
        let wordy = Head { kind: Kind::Close, length: MAX_REASON + 1, ..good };
        assert_eq!(Head::decode(&wordy.encode()), Err(Violation::MalformedHead));
    }
}
