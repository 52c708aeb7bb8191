//! The header that opens a channel, and the verdict that answers it.
//!
//! Owns the bytes below. Does not know channels, targets or rules. Invariant: a header or verdict is at most
//! [`MAX_HEADER`] / [`MAX_VERDICT`] bytes, known after three of them.
//!
//! # Wire format, version 1
//!
//! The service writes, as the first bytes of a channel:
//!
//! | bytes | field | value |
//! |---|---|---|
//! | 1 | version | 1 |
//! | 1 | kind | 1 = join a target, 2 = echo (the device sends back what it gets: a health check) |
//! | 1 | length | of the name: 1..=64 for a target, 0 for an echo |
//! | n | name | the target's name, `[A-Za-z0-9._-]` |
//!
//! Application data may follow at once. The device answers, as the first bytes of its direction:
//!
//! | bytes | field | value |
//! |---|---|---|
//! | 1 | version | 1 |
//! | 1 | code | see [`Verdict`] |
//! | 1 | length | of the text: 0..=255 |
//! | n | text | UTF-8, for a person; empty for `ok` |
//!
//! After `ok`, bytes of the target follow. After any other code the device ends its direction, and the service
//! resets the application's socket. A violation (wrong version, kind, length or alphabet) resets the channel; it
//! touches no other channel.

use bytes::{BufMut as _, BytesMut};

use crate::base::{IdError, Name};

/// Version of both formats.
const VERSION: u8 = 1;
const KIND_TARGET: u8 = 1;
const KIND_ECHO: u8 = 2;
/// Bytes before the name or text.
const FIXED: usize = 3;
/// Longest header in bytes: the fixed part and a name.
pub const MAX_HEADER: usize = FIXED + 64;
/// Longest verdict in bytes: the fixed part and a text whose length fits one byte.
pub const MAX_VERDICT: usize = FIXED + 255;

/// Why bytes are not a header or a verdict.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// A version this release does not know.
    #[error("channel header of version {0}; this release knows version {VERSION}")]
    Version(u8),
    /// A kind or code out of the table.
    #[error("channel header of unknown kind {0}")]
    Kind(u8),
    /// A length that the kind does not allow.
    #[error("channel header with a name of {0} bytes")]
    Length(u8),
    /// The name is not a name.
    #[error("channel header: {0}")]
    Name(#[from] IdError),
    /// A verdict whose text is not UTF-8.
    #[error("verdict with a text that is not UTF-8")]
    Text,
}

/// What a channel is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OpenRequest {
    /// Join this target.
    Target(Name),
    /// Send everything back.
    Echo,
}

/// The device's word on a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// Joined.
    Ok,
    /// The target's host refused the connection.
    Refused,
    /// No route, or the host did not answer.
    Unreachable,
    /// The target did not answer in time.
    Timeout,
    /// This policy may not use this target, or the address is not one that a target may have.
    NotAllowed,
    /// The device has no target of that name.
    UnknownTarget,
    /// A limit on connections is reached.
    Limit,
    /// The target's host name does not resolve.
    Unresolved,
    /// Anything else; the text says what.
    Failed,
}

/// Codes on the wire.
const CODES: [(u8, Verdict); 9] = [
    (0, Verdict::Ok),
    (1, Verdict::Refused),
    (2, Verdict::Unreachable),
    (3, Verdict::Timeout),
    (4, Verdict::NotAllowed),
    (5, Verdict::UnknownTarget),
    (6, Verdict::Limit),
    (7, Verdict::Unresolved),
    (8, Verdict::Failed),
];

impl OpenRequest {
    /// Appends the header.
    pub fn encode(&self, out: &mut BytesMut) {
        let (kind, name) = match self {
            Self::Target(name) => (KIND_TARGET, name.as_str()),
            Self::Echo => (KIND_ECHO, ""),
        };
        put(out, kind, name.as_bytes());
    }

    /// Reads a header from the front of `bytes`; `None` means that more bytes are needed. Also says how many bytes
    /// it took.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>, OpenError> {
        let Some((kind, length, name)) = take(bytes)? else { return Ok(None) };
        let request = match (kind, length) {
            (KIND_TARGET, 1..=64) => name.map(Self::target).transpose()?,
            (KIND_ECHO, 0) => Some(Self::Echo),
            (KIND_TARGET | KIND_ECHO, _) => return Err(OpenError::Length(length)),
            (other, _) => return Err(OpenError::Kind(other)),
        };
        Ok(request.map(|request| (request, FIXED + usize::from(length))))
    }

    fn target(name: &[u8]) -> Result<Self, OpenError> {
        Ok(Self::Target(String::from_utf8_lossy(name).parse()?))
    }
}

impl Verdict {
    /// Appends the verdict with a text for a person, which is cut at 255 bytes.
    pub fn encode(self, text: &str, out: &mut BytesMut) {
        let code = CODES.iter().find(|(_, verdict)| *verdict == self).map_or(8, |(code, _)| *code);
        put(out, code, &text.as_bytes()[..text.floor_char_boundary(255)]);
    }

    /// Reads a verdict from the front of `bytes`; `None` means that more bytes are needed. Also yields the text and
    /// how many bytes both took. A code that a later release added reads as [`Verdict::Failed`].
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, String, usize)>, OpenError> {
        let Some((code, length, Some(text))) = take(bytes)? else { return Ok(None) };
        let verdict = CODES.iter().find(|(known, _)| *known == code).map_or(Self::Failed, |(_, verdict)| *verdict);
        let text = std::str::from_utf8(text).map_err(|_| OpenError::Text)?;
        Ok(Some((verdict, text.into(), FIXED + usize::from(length))))
    }

    /// The verdict as a metric label and a word in a log line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Refused => "refused",
            Self::Unreachable => "unreachable",
            Self::Timeout => "timeout",
            Self::NotAllowed => "not_allowed",
            Self::UnknownTarget => "unknown_target",
            Self::Limit => "limit",
            Self::Unresolved => "unresolved",
            Self::Failed => "failed",
        }
    }
}

fn put(out: &mut BytesMut, code: u8, text: &[u8]) {
    out.put_slice(&[VERSION, code, text.len() as u8]);
    out.put_slice(text);
}

/// `(code, length, the text if it is there whole)`, or `None` before the fixed part is there.
type Parts<'a> = Option<(u8, u8, Option<&'a [u8]>)>;

fn take(bytes: &[u8]) -> Result<Parts<'_>, OpenError> {
    match bytes.first() {
        None => return Ok(None),
        Some(&VERSION) => {}
        Some(&other) => return Err(OpenError::Version(other)),
    }
    let &[_, code, length, ref rest @ ..] = bytes else { return Ok(None) };
    Ok(Some((code, length, rest.get(..usize::from(length)))))
}

/// Any bytes as a header and as a verdict, whole and cut. For fuzzers.
///
/// # Panics
/// If a header changes on the way through its own bytes, or a prefix of it is taken for something else.
pub fn fuzz_open(data: &[u8]) {
    if let Ok(Some((request, used))) = OpenRequest::decode(data) {
        let mut bytes = BytesMut::new();
        request.encode(&mut bytes);
        assert_eq!(bytes, &data[..used], "a header has one form");
        assert!(used <= MAX_HEADER && (0..used).all(|cut| OpenRequest::decode(&data[..cut]) == Ok(None)));
    }
    if let Ok(Some((_, text, used))) = Verdict::decode(data) {
        assert!(used <= MAX_VERDICT && text.len() + FIXED == used);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_verdicts_survive_any_cut() {
        let mut header = BytesMut::new();
        OpenRequest::Target("ssh".parse().unwrap()).encode(&mut header);
        let mut verdict = BytesMut::new();
        Verdict::Refused.encode("127.0.0.1:22 refused", &mut verdict);
        for cut in 0..header.len() {
            assert_eq!(OpenRequest::decode(&header[..cut]), Ok(None));
        }
        for cut in 0..verdict.len() {
            assert_eq!(Verdict::decode(&verdict[..cut]), Ok(None));
        }
        header.put_slice(b"SSH-2.0");
        assert_eq!(
            OpenRequest::decode(&header).unwrap().unwrap(),
            (OpenRequest::Target("ssh".parse().unwrap()), header.len() - 7)
        );
        assert_eq!(
            Verdict::decode(&verdict).unwrap().unwrap(),
            (Verdict::Refused, "127.0.0.1:22 refused".into(), verdict.len())
        );
    }

    #[test]
    fn violations_are_named() {
        assert_eq!(OpenRequest::decode(&[2]), Err(OpenError::Version(2)));
        assert_eq!(OpenRequest::decode(&[1, 9, 0]), Err(OpenError::Kind(9)));
        assert_eq!(OpenRequest::decode(&[1, 1, 0]), Err(OpenError::Length(0)));
        assert_eq!(OpenRequest::decode(&[1, 1, 65]), Err(OpenError::Length(65)));
        assert!(matches!(OpenRequest::decode(&[1, 1, 1, b'/']), Err(OpenError::Name(_))));
        assert_eq!(Verdict::decode(&[1, 1, 1, 0xff]), Err(OpenError::Text));
        assert_eq!(Verdict::decode(&[1, 77, 0]).unwrap().unwrap().0, Verdict::Failed);
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let mut out = BytesMut::new();
        Verdict::Failed.encode(&"ü".repeat(200), &mut out);
        let (_, text, length) = Verdict::decode(&out).unwrap().unwrap();
        assert_eq!((text.chars().count(), length), (127, out.len()));
    }
}
