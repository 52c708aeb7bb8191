//! From the bytes of frames to payload.
//!
//! Owns the state between two reads. Does not know where the bytes come from. Invariant: bytes in any chunking have
//! the same effect, and a violation is found before the payload of its frame is taken.

use std::{collections::VecDeque, ops::Range, str};

use super::{End, FIN, MASKED, MAX_CONTROL, OPCODE_CLOSE, OPCODE_PING, OPCODE_PONG, OPCODE_TEXT, encode::Mask};

/// Largest frame that is accepted. Nothing is allocated for it; the bound cuts off peers that announce nonsense.
/// Twice the 2,000,000 bytes that SDK programs were seen to cope with (wire.md, section d).
const MAX_FRAME_IN: u64 = 4 << 20;
/// Pings that are kept, in bytes: every ping of a peer that sends a handful at once is answered.
const MAX_PINGS: usize = 2048;
/// Longest header: two bytes, eight of length, four of mask.
const MAX_HEADER: usize = 14;

/// What a peer did against the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// RFC 6455 does not allow it.
    #[error("{0}")]
    Protocol(&'static str),
    /// A text message or the reason of a Close that is not UTF-8 (RFC 6455, 8.1).
    #[error("text that is not UTF-8")]
    Text,
    /// A frame longer than 4 MiB.
    #[error("a frame of more than {MAX_FRAME_IN} bytes")]
    TooLong,
}

impl Violation {
    /// The code to close with.
    pub fn close_code(self) -> u16 {
        match self {
            Self::Protocol(_) => 1002,
            Self::Text => 1007,
            Self::TooLong => 1009,
        }
    }
}

/// A Close frame as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerClose {
    /// Its code, if it had one.
    pub code: Option<u16>,
    /// Its reason.
    pub reason: String,
}

/// Decodes what one end sends. Either in place ([`strip`](Self::strip)), or by reading the framing
/// ([`wanted`](Self::wanted), [`take_framing`](Self::take_framing)) and the payload
/// ([`payload_left`](Self::payload_left), [`take_payload`](Self::take_payload)) apart.
#[derive(Debug)]
pub struct Decoder {
    /// Frames come from a client, and are masked.
    masked: bool,
    state: State,
    header: [u8; MAX_HEADER],
    header_len: usize,
    control: Vec<u8>,
    /// A fragmented message is under way: the next data frame must be a continuation.
    fragmented: bool,
    /// The message under way is text. Its bytes are data like any other, but must be UTF-8.
    text: Option<Utf8>,
    pings: VecDeque<Vec<u8>>,
    pong: Option<Vec<u8>>,
    close: Option<PeerClose>,
}

/// Text in pieces that end anywhere: what has come of a character that is not whole yet.
#[derive(Debug, Clone, Copy, Default)]
struct Utf8 {
    begun: [u8; 4],
    length: usize,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Header,
    Payload(Frame),
}

#[derive(Debug, Clone, Copy)]
struct Frame {
    /// With its FIN bit.
    first: u8,
    left: u64,
    mask: Mask,
}

impl Decoder {
    /// A decoder at the start of a connection.
    #[must_use]
    pub fn new(from: End) -> Self {
        Self {
            masked: from == End::Client,
            state: State::Header,
            header: [0; MAX_HEADER],
            header_len: 0,
            control: Vec::new(),
            fragmented: false,
            text: None,
            pings: VecDeque::new(),
            pong: None,
            close: None,
        }
    }

    /// Takes the bytes in `read` and gathers their payload, unmasked, in one piece within the same bytes. Returns
    /// where it is, and how it went on: what came before a violation is payload like any other. After a Close nothing
    /// more is taken.
    pub fn strip(&mut self, buffer: &mut [u8], read: Range<usize>) -> (Range<usize>, Result<(), Violation>) {
        let (mut at, mut outcome) = (read.start, Ok(()));
        let mut payload: Option<Range<usize>> = None;
        while at < read.end && self.close.is_none() && outcome.is_ok() {
            let left = self.payload_left().min((read.end - at) as u64) as usize;
            if left > 0 {
                outcome = self.take_payload(&mut buffer[at..at + left]);
                if outcome.is_ok() {
                    payload = Some(append(buffer, payload, at..at + left));
                }
                at += left;
            } else {
                let wanted = self.wanted().min(read.end - at);
                outcome = self.take_framing(&buffer[at..at + wanted]);
                at += wanted;
            }
        }
        (payload.unwrap_or(read.start..read.start), outcome)
    }

    /// Bytes of data that come next; what comes after them is framing.
    #[must_use]
    pub fn payload_left(&self) -> u64 {
        match self.state {
            State::Payload(frame) if !is_control(frame.first) => frame.left,
            _ => 0,
        }
    }

    /// Unmasks the next bytes of data in place; at most [`payload_left`](Self::payload_left) of them.
    pub fn take_payload(&mut self, bytes: &mut [u8]) -> Result<(), Violation> {
        let State::Payload(frame) = &mut self.state else { return Ok(()) };
        if self.masked {
            frame.mask.apply(bytes);
        }
        frame.left = frame.left.saturating_sub(bytes.len() as u64);
        if let Some(text) = &mut self.text {
            text.take(bytes)?;
        }
        self.finish_frame()
    }

    /// How many bytes complete what is expected next, if that is not data: never more than belong to it.
    #[must_use]
    pub fn wanted(&self) -> usize {
        match self.state {
            State::Header => self.needed_header() - self.header_len,
            State::Payload(frame) => frame.left.min(MAX_CONTROL as u64) as usize,
        }
    }

    /// Takes bytes of a header or of a control frame; at most [`wanted`](Self::wanted) of them.
    pub fn take_framing(&mut self, bytes: &[u8]) -> Result<(), Violation> {
        if let State::Payload(frame) = &mut self.state {
            let start = self.control.len();
            self.control.extend_from_slice(bytes);
            if self.masked {
                frame.mask.apply(&mut self.control[start..]);
            }
            frame.left = frame.left.saturating_sub(bytes.len() as u64);
            return self.finish_frame();
        }
        let end = self.header_len + bytes.len();
        self.header[self.header_len..end].copy_from_slice(bytes);
        self.header_len = end;
        if self.header_len >= 2 {
            self.check_start()?;
        }
        if self.header_len < self.needed_header() {
            return Ok(());
        }
        let frame = self.parse_header()?;
        if frame.first & 0x0f == OPCODE_TEXT {
            self.text = Some(Utf8::default());
        }
        self.state = State::Payload(frame);
        self.header_len = 0;
        self.finish_frame()
    }

    /// The next Ping, to be answered with its payload. Of more than a handful the latest are left (RFC 6455, 5.5.3
    /// allows to answer the latest only).
    pub fn take_ping(&mut self) -> Option<Vec<u8>> {
        self.pings.pop_front()
    }

    /// The latest Pong, once.
    pub fn take_pong(&mut self) -> Option<Vec<u8>> {
        self.pong.take()
    }

    /// The Close that came, if one did.
    #[must_use]
    pub fn close(&self) -> Option<&PeerClose> {
        self.close.as_ref()
    }

    /// If the frame is complete: what follows from it.
    fn finish_frame(&mut self) -> Result<(), Violation> {
        let State::Payload(Frame { first, left: 0, .. }) = self.state else { return Ok(()) };
        self.state = State::Header;
        match first & 0x0f {
            OPCODE_CLOSE => self.close = Some(parse_close(&self.control)?),
            OPCODE_PING => self.keep_ping(),
            OPCODE_PONG => self.pong = Some(std::mem::take(&mut self.control)),
            _ => {
                self.fragmented = first & FIN == 0;
                if !self.fragmented && self.text.take().is_some_and(|text| text.length > 0) {
                    return Err(Violation::Text);
                }
            }
        }
        self.control.clear();
        Ok(())
    }

    fn keep_ping(&mut self) {
        // With what its entry costs.
        let cost = |ping: &Vec<u8>| ping.len() + size_of::<Vec<u8>>();
        if self.pings.iter().map(cost).sum::<usize>() + cost(&self.control) > MAX_PINGS {
            self.pings.clear();
        }
        self.pings.push_back(std::mem::take(&mut self.control));
    }

    /// How many bytes the header has, as far as its first bytes tell.
    fn needed_header(&self) -> usize {
        if self.header_len < 2 {
            return 2;
        }
        let mask = if self.masked { 4 } else { 0 };
        match self.header[1] & 0x7f {
            126 => 2 + 2 + mask,
            127 => 2 + 8 + mask,
            _ => 2 + mask,
        }
    }

    /// Judges the first two bytes of a header before anything more is read.
    fn check_start(&self) -> Result<(), Violation> {
        let [first, second, ..] = self.header;
        let (fin, opcode, length) = (first & FIN != 0, first & 0x0f, second & 0x7f);
        let wrong = |what| Err(Violation::Protocol(what));
        if first & 0x70 != 0 {
            return wrong("a reserved bit is set, and no extension was agreed");
        }
        match (second & MASKED != 0, self.masked) {
            (false, true) => return wrong("a client's frame is not masked"),
            (true, false) => return wrong("a server's frame is masked"),
            _ => {}
        }
        match opcode {
            0 if !self.fragmented => wrong("a continuation without a beginning"),
            1 | 2 if self.fragmented => wrong("a new message within a fragmented one"),
            0..=2 => Ok(()),
            8..=10 if !fin => wrong("a fragmented control frame"),
            8..=10 if usize::from(length) > MAX_CONTROL => wrong("a control frame of more than 125 bytes"),
            8..=10 => Ok(()),
            _ => wrong("an unknown opcode"),
        }
    }

    fn parse_header(&self) -> Result<Frame, Violation> {
        let [first, second, rest @ ..] = self.header;
        let number = |bytes: &[u8]| bytes.iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let (length, shortest, mask) = match second & 0x7f {
            126 => (number(&rest[..2]), 126, &rest[2..6]),
            127 => (number(&rest[..8]), 65_536, &rest[8..12]),
            short => (u64::from(short), 0, &rest[..4]),
        };
        if length < shortest {
            return Err(Violation::Protocol("a length that is not written in the shortest way"));
        }
        if length >> 63 == 1 {
            return Err(Violation::Protocol("a length of 2^63 or more"));
        }
        if length > MAX_FRAME_IN {
            return Err(Violation::TooLong);
        }
        Ok(Frame { first, left: length, mask: Mask::new([mask[0], mask[1], mask[2], mask[3]]) })
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

fn is_control(first: u8) -> bool {
    first & 0x08 != 0
}

fn parse_close(payload: &[u8]) -> Result<PeerClose, Violation> {
    let [high, low, reason @ ..] = payload else {
        if payload.is_empty() {
            return Ok(PeerClose { code: None, reason: String::new() });
        }
        return Err(Violation::Protocol("a Close of one byte"));
    };
    let code = u16::from_be_bytes([*high, *low]);
    let valid = matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999);
    if !valid {
        return Err(Violation::Protocol("a Close with a code that may not be sent"));
    }
    let reason = str::from_utf8(reason).map_err(|_| Violation::Text)?;
    Ok(PeerClose { code: Some(code), reason: reason.to_owned() })
}

/// Moves `more` behind what was gathered; the first piece stays where it is.
fn append(buffer: &mut [u8], gathered: Option<Range<usize>>, more: Range<usize>) -> Range<usize> {
    let Some(gathered) = gathered.filter(|gathered| !gathered.is_empty()) else { return more };
    let end = gathered.end + more.len();
    buffer.copy_within(more, gathered.end);
    gathered.start..end
}
