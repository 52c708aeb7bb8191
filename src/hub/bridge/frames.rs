//! The WebSocket frames of a relay: what a client sent, stripped in place to its payload, and the frames to a client.
//!
//! Owns the decoding of client frames and the encoding of server frames (RFC 6455, section 5). Does not know
//! sockets, bridges or what the payload means. Invariant: memory does not grow with what a peer claims: payload
//! stays where it was read, and of a control frame at most 125 bytes are kept.
//!
//! Why not tungstenite here: a relay wants neither messages nor text, only payload bytes. tungstenite clears its
//! read buffer before each read, holds a frame until it is whole, copies it to a write buffer and shifts that buffer
//! after a partial write; the hub's CPU time per byte is what all users of a hub share. It is the oracle in the tests.

use std::{ops::Range, str};

/// Largest frame that is accepted. Nothing is allocated for it; the bound cuts off peers that announce nonsense.
/// Twice the 2,000,000 bytes that SDK programs were seen to cope with (wire.md, section d).
pub(super) const MAX_FRAME_IN: u64 = 4 << 20;
/// Largest payload of a frame that is sent: the Azure gateway's limit, on which the C sample relies.
pub(super) const MAX_PAYLOAD_OUT: usize = 65_536;
/// Room in front of a payload for a server frame's header.
pub(super) const HEADROOM: usize = 10;
/// Longest payload of a control frame (RFC 6455, 5.5).
const MAX_CONTROL: usize = 125;
/// Pongs of one read that are kept, in bytes: every ping of a peer that sends a handful at once is answered.
const MAX_PONGS: usize = 2048;
/// Longest header of a client frame: two bytes, eight of length, four of mask.
const MAX_HEADER: usize = 14;

const OPCODE_TEXT: u8 = 1;
const OPCODE_BINARY: u8 = 2;
const OPCODE_CLOSE: u8 = 8;
const OPCODE_PING: u8 = 9;
const OPCODE_PONG: u8 = 10;
const FIN: u8 = 0x80;
const MASKED: u8 = 0x80;

/// What a peer did against the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    /// RFC 6455 does not allow it.
    #[error("{0}")]
    Protocol(&'static str),
    /// A text message or the reason of a Close that is not UTF-8 (RFC 6455, 8.1).
    #[error("text that is not UTF-8")]
    Text,
    /// A frame longer than [`MAX_FRAME_IN`].
    #[error("a frame of more than {MAX_FRAME_IN} bytes")]
    TooLong,
}

impl Violation {
    /// The code to close with.
    pub(super) fn close_code(self) -> u16 {
        match self {
            Self::Protocol(_) => 1002,
            Self::Text => 1007,
            Self::TooLong => 1009,
        }
    }
}

/// A Close frame as it came: its code, if it had one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PeerClose {
    pub(super) code: Option<u16>,
}

/// Decodes what one client sends.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    state: State,
    header: [u8; MAX_HEADER],
    header_len: usize,
    control: Vec<u8>,
    /// A fragmented message is under way: the next data frame must be a continuation.
    fragmented: bool,
    /// The message under way is text. Its bytes are data like any other, but must be UTF-8.
    text: Option<Utf8>,
    /// Frames that answer pings.
    pongs: Vec<u8>,
    close: Option<PeerClose>,
}

/// Text in pieces that end anywhere: what has come of a character that is not whole yet.
#[derive(Debug, Clone, Copy, Default)]
struct Utf8 {
    begun: [u8; 4],
    length: usize,
}

#[derive(Debug, Clone, Copy, Default)]
enum State {
    #[default]
    Header,
    Payload(Frame),
}

#[derive(Debug, Clone, Copy)]
struct Frame {
    opcode: u8,
    left: u64,
    mask: [u8; 4],
}

impl Decoder {
    /// Takes the bytes in `read` and gathers their payload, unmasked, in one piece within the same bytes. Returns
    /// where it is. After a Close nothing more is taken.
    pub(super) fn strip(&mut self, buffer: &mut [u8], read: Range<usize>) -> Result<Range<usize>, Violation> {
        let mut at = read.start;
        let mut payload: Option<Range<usize>> = None;
        while at < read.end && self.close.is_none() {
            match self.state {
                State::Header => at += self.take_header(&buffer[at..read.end])?,
                State::Payload(mut frame) => {
                    let take = frame.left.min((read.end - at) as u64) as usize;
                    apply_mask(&mut buffer[at..at + take], frame.mask);
                    frame.mask.rotate_left(take % 4);
                    frame.left -= take as u64;
                    if is_control(frame.opcode) {
                        self.control.extend_from_slice(&buffer[at..at + take]);
                    } else {
                        if let Some(text) = &mut self.text {
                            text.take(&buffer[at..at + take])?;
                        }
                        payload = Some(append(buffer, payload, at..at + take));
                    }
                    at += take;
                    self.state = State::Payload(frame);
                    self.finish_frame()?;
                }
            }
        }
        Ok(payload.unwrap_or(read.start..read.start))
    }

    /// The Pongs that are owed, once, as frames. Of more than [`MAX_PONGS`] bytes of them the latest are left (RFC
    /// 6455, 5.5.3 allows to answer the latest only).
    pub(super) fn take_pongs(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.pongs)
    }

    /// The Close that came, if one did.
    pub(super) fn close(&self) -> Option<PeerClose> {
        self.close
    }

    /// Takes bytes of a header; returns how many. The state changes when the header is whole.
    fn take_header(&mut self, bytes: &[u8]) -> Result<usize, Violation> {
        let mut taken = 0;
        loop {
            let needed = needed_header(&self.header[..self.header_len]);
            let want = (needed - self.header_len).min(bytes.len() - taken);
            self.header[self.header_len..self.header_len + want].copy_from_slice(&bytes[taken..taken + want]);
            self.header_len += want;
            taken += want;
            if self.header_len >= 2 {
                check_start(self.header[0], self.header[1], self.fragmented)?;
            }
            if self.header_len < needed {
                return Ok(taken);
            }
            if needed == needed_header(&self.header[..self.header_len]) {
                break;
            }
        }
        let frame = parse_header(&self.header[..self.header_len])?;
        if frame.opcode & 0x0f == OPCODE_TEXT {
            self.text = Some(Utf8::default());
        }
        self.state = State::Payload(frame);
        self.header_len = 0;
        self.finish_frame()?;
        Ok(taken)
    }

    /// If the frame is complete: what follows from it.
    fn finish_frame(&mut self) -> Result<(), Violation> {
        let State::Payload(Frame { opcode, left: 0, .. }) = self.state else { return Ok(()) };
        self.state = State::Header;
        let control = std::mem::take(&mut self.control);
        match opcode & 0x0f {
            OPCODE_CLOSE => self.close = Some(parse_close(&control)?),
            OPCODE_PING => self.owe_pong(&control),
            OPCODE_PONG => {}
            _ => {
                self.fragmented = opcode & FIN == 0;
                if !self.fragmented && self.text.take().is_some_and(|text| text.length > 0) {
                    return Err(Violation::Text);
                }
            }
        }
        Ok(())
    }

    fn owe_pong(&mut self, ping: &[u8]) {
        if self.pongs.len() + 2 + ping.len() > MAX_PONGS {
            self.pongs.clear();
        }
        self.pongs.extend(control(OPCODE_PONG, ping));
    }
}

impl Utf8 {
    /// Takes the next bytes. What cannot become text is an error as soon as it is there.
    fn take(&mut self, mut bytes: &[u8]) -> Result<(), Violation> {
        while let (1.., [next, rest @ ..]) = (self.length, bytes) {
            self.begun[self.length] = *next;
            self.length += 1;
            bytes = rest;
            match str::from_utf8(&self.begun[..self.length]) {
                Ok(_) => self.length = 0,
                Err(error) if error.error_len().is_none() => {}
                Err(_) => return Err(Violation::Text),
            }
        }
        let Err(error) = str::from_utf8(bytes) else { return Ok(()) };
        if error.error_len().is_some() {
            return Err(Violation::Text);
        }
        // The beginning of a character: at most three bytes.
        let begun = &bytes[error.valid_up_to()..];
        self.begun[..begun.len()].copy_from_slice(begun);
        self.length = begun.len();
        Ok(())
    }
}

/// How many bytes the header has, as far as its first bytes tell.
fn needed_header(so_far: &[u8]) -> usize {
    match so_far.get(1).map(|second| second & 0x7f) {
        None => 2,
        Some(126) => 2 + 2 + 4,
        Some(127) => 2 + 8 + 4,
        Some(_) => 2 + 4,
    }
}

/// Judges the first two bytes of a header before anything more is read.
fn check_start(first: u8, second: u8, fragmented: bool) -> Result<(), Violation> {
    let (fin, opcode, length) = (first & FIN != 0, first & 0x0f, second & 0x7f);
    let wrong = |what| Err(Violation::Protocol(what));
    if first & 0x70 != 0 {
        return wrong("a reserved bit is set, and no extension was agreed");
    }
    if second & MASKED == 0 {
        return wrong("a client's frame is not masked");
    }
    match opcode {
        0 if !fragmented => wrong("a continuation without a beginning"),
        1 | 2 if fragmented => wrong("a new message within a fragmented one"),
        0..=2 => Ok(()),
        8..=10 if !fin => wrong("a fragmented control frame"),
        8..=10 if usize::from(length) > MAX_CONTROL => wrong("a control frame of more than 125 bytes"),
        8..=10 => Ok(()),
        _ => wrong("an unknown opcode"),
    }
}

fn parse_header(header: &[u8]) -> Result<Frame, Violation> {
    let (length, mask) = match header.len() {
        6 => (u64::from(header[1] & 0x7f), &header[2..]),
        8 => (u64::from(u16::from_be_bytes([header[2], header[3]])), &header[4..]),
        _ => (header[2..10].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)), &header[10..]),
    };
    let minimal = match header.len() {
        6 => 0,
        8 => 126,
        _ => 65_536,
    };
    if length < minimal {
        return Err(Violation::Protocol("a length that is not written in the shortest way"));
    }
    if length > MAX_FRAME_IN {
        return Err(if length >> 63 == 1 {
            Violation::Protocol("a length of 2^63 or more")
        } else {
            Violation::TooLong
        });
    }
    Ok(Frame { opcode: header[0], left: length, mask: [mask[0], mask[1], mask[2], mask[3]] })
}

/// `opcode` with its FIN bit still there.
fn is_control(opcode: u8) -> bool {
    opcode & 0x08 != 0
}

fn parse_close(payload: &[u8]) -> Result<PeerClose, Violation> {
    let [high, low, reason @ ..] = payload else {
        let one = !payload.is_empty();
        return if one { Err(Violation::Protocol("a Close of one byte")) } else { Ok(PeerClose { code: None }) };
    };
    let code = u16::from_be_bytes([*high, *low]);
    let valid = matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999);
    if !valid {
        return Err(Violation::Protocol("a Close with a code that may not be sent"));
    }
    if str::from_utf8(reason).is_err() {
        return Err(Violation::Text);
    }
    Ok(PeerClose { code: Some(code) })
}

/// XORs `bytes` with the mask, eight at a time.
fn apply_mask(bytes: &mut [u8], mask: [u8; 4]) {
    let [a, b, c, d] = mask;
    let wide = u64::from_ne_bytes([a, b, c, d, a, b, c, d]);
    let (chunks, rest) = bytes.as_chunks_mut::<8>();
    for chunk in chunks {
        *chunk = (u64::from_ne_bytes(*chunk) ^ wide).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask.iter().cycle()) {
        *byte ^= mask;
    }
}

/// Moves `more` behind what was gathered; the first piece stays where it is.
fn append(buffer: &mut [u8], gathered: Option<Range<usize>>, more: Range<usize>) -> Range<usize> {
    let Some(gathered) = gathered.filter(|gathered| !gathered.is_empty()) else { return more };
    let end = gathered.end + more.len();
    buffer.copy_within(more, gathered.end);
    gathered.start..end
}

/// Writes a binary frame's header into the bytes in front of `payload`; returns where the frame begins.
/// There must be [`HEADROOM`] bytes.
pub(super) fn put_header(buffer: &mut [u8], payload: &Range<usize>) -> usize {
    let length = payload.len();
    let header_len = match length {
        0..=125 => 2,
        126..=65_535 => 4,
        _ => 10,
    };
    let start = payload.start - header_len;
    let header = &mut buffer[start..payload.start];
    header[0] = FIN | OPCODE_BINARY;
    match header_len {
        2 => header[1] = length as u8,
        4 => {
            header[1] = 126;
            header[2..].copy_from_slice(&(length as u16).to_be_bytes());
        }
        _ => {
            header[1] = 127;
            header[2..].copy_from_slice(&(length as u64).to_be_bytes());
        }
    }
    start
}

/// A Close with a code and a reason.
pub(super) fn close(code: u16, reason: &str) -> Vec<u8> {
    let mut payload = code.to_be_bytes().to_vec();
    payload.extend_from_slice(reason.as_bytes());
    control(OPCODE_CLOSE, &payload)
}

/// A Close with nothing in it, which answers one with nothing in it.
pub(super) fn close_without_code() -> Vec<u8> {
    control(OPCODE_CLOSE, &[])
}

fn control(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let payload = &payload[..payload.len().min(MAX_CONTROL)];
    let mut frame = vec![FIN | opcode, payload.len() as u8];
    frame.extend_from_slice(payload);
    frame
}

#[cfg(test)]
mod tests {
    use tokio_tungstenite::tungstenite::{Message, WebSocket, protocol::Role};

    use super::*;

    /// A masked client frame, made by hand.
    pub(super) fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mask = [0x37, 0xfa, 0x21, 0x3d];
        let mut bytes = vec![first];
        match payload.len() {
            0..=125 => bytes.push(MASKED | payload.len() as u8),
            126..=65_535 => {
                bytes.push(MASKED | 126);
                bytes.extend((payload.len() as u16).to_be_bytes());
            }
            _ => {
                bytes.push(MASKED | 127);
                bytes.extend((payload.len() as u64).to_be_bytes());
            }
        }
        bytes.extend(mask);
        bytes.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
        bytes
    }

    fn strip_in_pieces(bytes: &[u8], piece: usize) -> Result<(Vec<u8>, Decoder), Violation> {
        let (mut decoder, mut out) = (Decoder::default(), Vec::new());
        for chunk in bytes.chunks(piece) {
            let mut buffer = [vec![0; HEADROOM], chunk.to_vec()].concat();
            let range = decoder.strip(&mut buffer, HEADROOM..HEADROOM + chunk.len())?;
            out.extend_from_slice(&buffer[range]);
        }
        Ok((out, decoder))
    }

    #[test]
    fn payload_survives_any_chunking() {
        let big: Vec<u8> = (0..70_000_u32).map(|n| n as u8).collect();
        let stream = [
            frame(0x82, b"one"),
            frame(0x02, b"two-"),
            frame(0x89, b"ping"),
            frame(0x00, b""),
            frame(0x80, b"three"),
            frame(0x81, b"text"),
            frame(0x8a, b"unasked pong"),
            frame(0x82, &big),
            frame(0x88, &1000_u16.to_be_bytes()),
            frame(0x82, b"after the end"),
        ]
        .concat();
        let expected = [&b"onetwo-threetext"[..], &big].concat();
        for piece in [1, 2, 3, 5, 7, 64, 1000, stream.len()] {
            let (out, mut decoder) = strip_in_pieces(&stream, piece).unwrap();
            assert!(out == expected, "pieces of {piece}");
            assert_eq!(decoder.take_pongs(), *b"\x8a\x04ping");
            assert_eq!(decoder.close(), Some(PeerClose { code: Some(1000) }));
        }
    }

    #[test]
    fn violations_are_named_before_their_payload_is_read() {
        let close = |bytes: &[u8]| frame(0x88, bytes);
        let cases: Vec<(Vec<u8>, u16)> = vec![
            (vec![0x82, 0x05], 1002),
            (vec![0xc2, 0x85], 1002),
            (vec![0x92, 0x85], 1002),
            (vec![0x83, 0x85], 1002),
            (vec![0x8b, 0x85], 1002),
            (vec![0x80, 0x85], 1002),
            (vec![0x09, 0x80], 1002),
            (vec![0x89, 0xfe], 1002),
            ([frame(0x02, b"a"), frame(0x82, b"b")].concat(), 1002),
            (vec![0x82, 0xfe, 0, 125, 0, 0, 0, 0], 1002),
            (vec![0x82, 0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0], 1002),
            (vec![0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 1002),
            (vec![0x82, 0xff, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0], 1009),
            (vec![0x82, 0xff, 0, 0, 0, 0, 0, 0x40, 0, 1, 0, 0, 0, 0], 1009),
            (close(&[3]), 1002),
            (close(&999_u16.to_be_bytes()), 1002),
            (close(&1005_u16.to_be_bytes()), 1002),
            (close(&[0x03, 0xe8, 0xff, 0xfe]), 1007),
            (frame(0x81, b"\xc3\x28"), 1007),
            (frame(0x81, b"\xed\xa0\x80"), 1007),
            (frame(0x81, b"\xf4\x90"), 1007),
            (frame(0x81, b"ends \xe2\x82"), 1007),
            ([frame(0x01, b"\xe2\x82"), frame(0x89, b"\xff"), frame(0x80, b"\x41")].concat(), 1007),
        ];
        for (bytes, code) in cases {
            for piece in [1, bytes.len()] {
                let violation = strip_in_pieces(&bytes, piece).map(|(out, _)| out).unwrap_err();
                assert_eq!(violation.close_code(), code, "{bytes:02x?}");
            }
        }
    }

    #[test]
    fn text_is_checked_across_frames_and_pieces_and_binary_is_not() {
        let text = "a\u{20ac}\u{1f600}\u{e9}z".as_bytes();
        for cut in 0..text.len() {
            let (first, second) = text.split_at(cut);
            let stream = [
                frame(0x01, first),
                frame(0x89, b"between"),
                frame(0x80, second),
                frame(0x02, b"\xff"),
                frame(0x80, b"\xfe"),
                frame(0x81, b""),
            ]
            .concat();
            for piece in [1, 3, stream.len()] {
                let (out, _) = strip_in_pieces(&stream, piece).unwrap();
                assert_eq!(out, [text, b"\xff\xfe"].concat());
            }
        }
    }

    #[test]
    fn every_ping_of_a_handful_is_answered_and_of_many_the_latest() {
        let pings: Vec<u8> = (0..10).flat_map(|n| frame(0x89, format!("payload-{n}").as_bytes())).collect();
        let (_, mut decoder) = strip_in_pieces(&pings, pings.len()).unwrap();
        let pongs: Vec<u8> = (0..10).flat_map(|n| control(OPCODE_PONG, format!("payload-{n}").as_bytes())).collect();
        assert_eq!(decoder.take_pongs(), pongs);
        let flood = [frame(0x89, &[1; 125]).repeat(1000), frame(0x89, b"latest")].concat();
        let (_, mut decoder) = strip_in_pieces(&flood, flood.len()).unwrap();
        let kept = decoder.take_pongs();
        assert!(kept.len() <= MAX_PONGS && kept.ends_with(b"latest"));
        assert!(decoder.take_pongs().is_empty());
    }

    #[test]
    fn a_close_without_a_code_is_no_violation() {
        let (_, decoder) = strip_in_pieces(&frame(0x88, b""), 1).unwrap();
        assert_eq!(decoder.close(), Some(PeerClose { code: None }));
    }

    #[test]
    fn headers_are_those_that_tungstenite_writes() {
        for length in [1, 125, 126, 65_535, 65_536] {
            let payload = HEADROOM..HEADROOM + length;
            let mut buffer = vec![7; HEADROOM + length];
            let start = put_header(&mut buffer, &payload);
            let mut oracle = WebSocket::from_raw_socket(std::io::Cursor::new(Vec::new()), Role::Server, None);
            oracle.send(Message::binary(vec![7; length])).unwrap();
            let oracle = oracle.into_inner().into_inner();
            assert!(buffer[start..] == oracle[..], "{length}");
        }
    }
}
