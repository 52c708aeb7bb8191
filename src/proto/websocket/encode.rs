//! From payload to frames.
//!
//! Owns headers, control frames and masks. Does not know when a frame is sent, nor where randomness comes from.
//! Invariant: a header is written in the shortest way.

use std::ops::Range;

use super::{FIN, MASKED, MAX_CONTROL, OPCODE_BINARY, OPCODE_CLOSE, OPCODE_PING, OPCODE_PONG};

/// Bytes that are copied and then masked: a quarter of a small processor's first cache.
const BLOCK: usize = 8 * 1024;

/// A masking key (RFC 6455, 5.3), and how far along its four bytes the payload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mask {
    key: [u8; 4],
    /// Bytes of payload so far, modulo 4.
    at: u8,
}

impl Mask {
    /// The key at the beginning of a payload.
    #[must_use]
    pub fn new(key: [u8; 4]) -> Self {
        Self { key, at: 0 }
    }

    /// Masks, or unmasks, the next bytes of the payload in place: eight at a time.
    pub fn apply(&mut self, bytes: &mut [u8]) {
        let turned = self.turned();
        let [a, b, c, d] = turned;
        let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
        let (chunks, rest) = bytes.as_chunks_mut::<8>();
        for chunk in chunks {
            *chunk = (u64::from_ne_bytes(*chunk) ^ wide).to_ne_bytes();
        }
        for (byte, mask) in rest.iter_mut().zip(turned.iter().cycle()) {
            *byte ^= mask;
        }
        self.advance(bytes.len());
    }

    /// Appends the next bytes of the payload, masked, to `out`: block by block, so that what is masked is in the
    /// first cache still.
    pub fn copy(&mut self, bytes: &[u8], out: &mut Vec<u8>) {
        out.reserve(bytes.len());
        for block in bytes.chunks(BLOCK) {
            let start = out.len();
            out.extend_from_slice(block);
            self.apply(&mut out[start..]);
        }
    }

    fn turned(self) -> [u8; 4] {
        let mut key = self.key;
        key.rotate_left(usize::from(self.at));
        key
    }

    fn advance(&mut self, bytes: usize) {
        self.at = ((usize::from(self.at) + bytes) % 4) as u8;
    }
}

/// Writes a binary frame's header into the bytes in front of `payload`, which is masked already if there is a mask;
/// returns where the frame begins. There must be [`HEADROOM`](super::HEADROOM) bytes in front, or
/// [`SERVER_HEADROOM`](super::SERVER_HEADROOM) for a payload of more than 65,535 bytes, which must be unmasked.
pub fn put_header(buffer: &mut [u8], payload: &Range<usize>, mask: Option<Mask>) -> usize {
    let length = payload.len();
    let mut header = [0; 14];
    header[0] = FIN | OPCODE_BINARY;
    let mut end = match length {
        0..=125 => {
            header[1] = length as u8;
            2
        }
        126..=65_535 => {
            header[1] = 126;
            header[2..4].copy_from_slice(&(length as u16).to_be_bytes());
            4
        }
        _ => {
            header[1] = 127;
            header[2..10].copy_from_slice(&(length as u64).to_be_bytes());
            10
        }
    };
    if let Some(mask) = mask {
        header[1] |= MASKED;
        header[end..end + 4].copy_from_slice(&mask.key);
        end += 4;
    }
    let start = payload.start - end;
    buffer[start..payload.start].copy_from_slice(&header[..end]);
    start
}

/// A Pong with the Ping's payload.
#[must_use]
pub fn pong(payload: &[u8], mask: Option<Mask>) -> Vec<u8> {
    control(OPCODE_PONG, payload, mask)
}

/// A Ping.
#[must_use]
pub fn ping(payload: &[u8], mask: Option<Mask>) -> Vec<u8> {
    control(OPCODE_PING, payload, mask)
}

/// A Close with a code and a reason, or with nothing in it, which answers one with nothing in it.
#[must_use]
pub fn close(code: Option<u16>, reason: &str, mask: Option<Mask>) -> Vec<u8> {
    let mut payload = code.map(|code| code.to_be_bytes().to_vec()).unwrap_or_default();
    if code.is_some() {
        payload.extend_from_slice(&reason.as_bytes()[..reason.floor_char_boundary(MAX_CONTROL - 2)]);
    }
    control(OPCODE_CLOSE, &payload, mask)
}

fn control(opcode: u8, payload: &[u8], mask: Option<Mask>) -> Vec<u8> {
    let payload = &payload[..payload.len().min(MAX_CONTROL)];
    let mut frame = vec![FIN | opcode, payload.len() as u8];
    match mask {
        Some(mut mask) => {
            frame[1] |= MASKED;
            frame.extend_from_slice(&mask.key);
            mask.copy(payload, &mut frame);
        }
        None => frame.extend_from_slice(payload),
    }
    frame
}
