//! The twelve bytes in front of everything.
//!
//! Owns the header's layout and the list of what a peer may not do. Does not know channels.
//! Invariant: decoding never fails except for the two fields that have no meaning at all (version and type).

use bytes::{BufMut, BytesMut};

/// Size of a frame's header.
pub(super) const HEADER: usize = 12;

pub(super) const SYN: u16 = 1;
pub(super) const ACK: u16 = 2;
pub(super) const FIN: u16 = 4;
pub(super) const RST: u16 = 8;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Data = 0,
    WindowUpdate = 1,
    Ping = 2,
    GoAway = 3,
}

/// A frame's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) flags: u16,
    pub(super) id: u32,
    pub(super) length: u32,
}

impl Header {
    pub(super) fn decode(bytes: &[u8; HEADER]) -> Result<Self, Violation> {
        let [version, kind, f0, f1, i0, i1, i2, i3, l0, l1, l2, l3] = *bytes;
        if version != 0 {
            return Err(Violation::Version(version));
        }
        let kind = match kind {
            0 => Kind::Data,
            1 => Kind::WindowUpdate,
            2 => Kind::Ping,
            3 => Kind::GoAway,
            other => return Err(Violation::Type(other)),
        };
        let id = u32::from_be_bytes([i0, i1, i2, i3]);
        let length = u32::from_be_bytes([l0, l1, l2, l3]);
        Ok(Self { kind, flags: u16::from_be_bytes([f0, f1]), id, length })
    }

    pub(super) fn encode(self, out: &mut BytesMut) {
        let word = (self.kind as u32) << 16 | u32::from(self.flags);
        let mut bytes = [0; HEADER];
        bytes[..4].copy_from_slice(&word.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.id.to_be_bytes());
        bytes[8..].copy_from_slice(&self.length.to_be_bytes());
        out.put_slice(&bytes);
    }

    pub(super) fn has(self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// What the peer did that the protocol does not allow. The mux ends with a GoAway of code 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A version other than 0: the other end does not speak yamux.
    #[error("frame version {0} instead of 0: the other end does not speak yamux")]
    Version(u8),
    /// A frame type that does not exist.
    #[error("unknown frame type {0}")]
    Type(u8),
    /// A data or window frame for channel 0, which is the mux itself.
    #[error("a data or window frame for channel 0")]
    ZeroChannel,
    /// A channel opened with an ID of our own parity.
    #[error("channel {0} opened with an ID that is not the peer's to choose")]
    Parity(u32),
    /// A channel opened that is open.
    #[error("channel {0} opened twice")]
    OpenedTwice(u32),
    /// More data than the channel's window allows.
    #[error("channel {id}: a frame of {length} bytes in a window of {window}")]
    Window {
        /// The channel.
        id: u32,
        /// The frame's length.
        length: u32,
        /// What the peer could still send.
        window: u32,
    },
    /// A frame that no window could ever have allowed.
    #[error("a frame of {0} bytes")]
    FrameLength(u32),
    /// A window that grew past 2^32 - 1 bytes.
    #[error("channel {0}: the window granted is more than 2^32 - 1 bytes")]
    WindowOverflow(u32),
    /// Frames that ask for answers, faster than the peer reads the answers.
    #[error("more control frames than the peer reads answers to")]
    Flood,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_twelve_bytes_in_network_order() {
        let header = Header { kind: Kind::WindowUpdate, flags: SYN | FIN, id: 0x0102_0304, length: 0x0a0b_0c0d };
        let mut out = BytesMut::new();
        header.encode(&mut out);
        assert_eq!(&out[..], [0, 1, 0, 5, 1, 2, 3, 4, 0x0a, 0x0b, 0x0c, 0x0d]);
        let bytes: [u8; HEADER] = out[..].try_into().unwrap();
        assert_eq!(Header::decode(&bytes).unwrap(), header);
    }

    #[test]
    fn only_version_and_type_can_be_wrong() {
        assert_eq!(Header::decode(&[1; HEADER]), Err(Violation::Version(1)));
        let mut bytes = [0xff; HEADER];
        bytes[0] = 0;
        assert_eq!(Header::decode(&bytes), Err(Violation::Type(0xff)));
        bytes[1] = 3;
        assert!(Header::decode(&bytes).is_ok());
    }
}
