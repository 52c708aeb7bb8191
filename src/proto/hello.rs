//! The hello: the first bytes of a mux stream in each direction.
//!
//! Owns the format of the messages, the feature bits, and the proofs by which the two ends of a link know each other
//! again. Does not know carriers, clocks or randomness: nonces and secrets are handed in. Invariant: positions of a
//! resume reach a link only together with a proof that covers them.
//!
//! # Bytes
//!
//! ```text
//! magic (8: C5 'c' 'u' 'l' 'v' 'e' 'r' 't') | length u16 | version u8 = 1 | kind u8 | fields
//! field = tag u8 | length u8 | value
//! ```
//!
//! Big-endian; `length` counts what follows it; a message has at most 1024 bytes in all. Unknown tags are ignored, a tag
//! that occurs twice is a violation. The first byte of the magic begins no text protocol.
//!
//! | kind | from | fields |
//! |---|---|---|
//! | 1 New | service | required, optional, instance, boot, channels, window; with the link feature: link, secret, resume-for |
//! | 2 Resume | service | required, instance, boot, link, nonce, epoch, received, consumed |
//! | 3 Accept | device | optional (agreed), instance, boot, channels, window, resume-for |
//! | 4 Answer | device | nonce, received, consumed, proof (last) |
//! | 5 Refuse | either | code, text |
//! | 6 Confirm | service | proof |
//!
//! # Flow
//!
//! The service speaks first. New, Accept: the features that both know are agreed; with the link feature, link frames
//! follow, and the smaller resume-for holds; otherwise the mux follows on the bare carrier. Resume, Answer, Confirm: the
//! device proves the secret over everything said so far, then the service does. Link frames follow behind
//! the Answer and the Confirm; the device attaches when it has checked the Confirm, so that nobody without the secret
//! can push a carrier aside.
//!
//! ```text
//! proof of the device  = HMAC-SHA256(secret, "culvert link 1 device"  | Resume | Answer up to its proof)
//! proof of the service = HMAC-SHA256(secret, "culvert link 1 service" | Resume | Answer)
//! ```
//!
//! The nonce of each side makes every transcript new: a recorded Answer or Confirm proves nothing. The epoch rises with
//! each attempt; the device refuses one that is not newer than the carrier it has, and takes one that was used before,
//! or a wrong proof, as the end of the link.
//!
//! # Limits and violations
//!
//! 1024 bytes and 10 s for the whole exchange. A wrong magic is an SDK program at the other end. A malformed
//! message ends the carrier. Another version is answered with Refuse.

use std::{collections::BTreeMap, fmt, time::Duration};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::{base::Secret, proto::link::Positions};

/// The first bytes of every message.
pub const MAGIC: [u8; 8] = *b"\xc5culvert";

/// The major version of the mux stream.
pub const VERSION: u8 = 1;

/// Bytes of a message before its version.
pub const PREFIX: usize = MAGIC.len() + 2;

/// Longest message: eight times what the longest of today needs, small enough to be read before anything is known.
pub const MAX_MESSAGE: usize = 1024;

/// Longest text of a refusal.
const MAX_TEXT: usize = 200;

/// Feature bits of the hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(pub u32);

impl Features {
    /// No feature.
    pub const NONE: Self = Self(0);
    /// The resumable link below the mux.
    pub const LINK: Self = Self(1);
    /// All that this release knows.
    pub const KNOWN: Self = Self::LINK;

    /// Those that both sets have.
    pub fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether all of `other` are in here.
    pub fn contain(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

macro_rules! id {
    ($name:ident, $doc:literal) => {
        #[doc = $doc]
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }
    };
}

id!(InstanceId, "Names an installation of a daemon: random, kept in its state folder.");
id!(BootId, "Names one run of a daemon: random, new at every start.");
id!(LinkId, "Names a link: random, drawn by the service when the link begins.");

/// What each side says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Side {
    /// The installation.
    pub instance: InstanceId,
    /// The run.
    pub boot: BootId,
    /// Channels it allows on the mux.
    pub max_channels: u32,
    /// Bytes of a link it takes ahead of their consumption.
    pub receive_window: u32,
}

/// A message of the hello.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// A service begins a session.
    New {
        /// Features without which it will not go on.
        required: Features,
        /// Features it would like.
        optional: Features,
        /// The service.
        side: Side,
        /// The link it proposes.
        link: Option<NewLink>,
    },
    /// A service brings the next carrier of a link.
    Resume(Resume),
    /// A device takes a new session.
    Accept {
        /// Features that both sides have.
        agreed: Features,
        /// The device.
        side: Side,
        /// How long it keeps a link without a carrier.
        resume_for: Duration,
    },
    /// A device knows the link.
    Answer {
        /// Fresh randomness of the device.
        nonce: [u8; 16],
        /// How far it has come.
        positions: Positions,
        /// Its proof.
        proof: [u8; 32],
    },
    /// No.
    Refuse(Refusal),
    /// The service proves itself.
    Confirm {
        /// Its proof.
        proof: [u8; 32],
    },
}

/// The link that a service proposes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewLink {
    /// Its name.
    pub id: LinkId,
    /// What both sides will prove to have.
    pub secret: Secret,
    /// How long the service keeps it without a carrier.
    pub resume_for: Duration,
}

/// The content of a Resume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resume {
    /// Features without which the service will not go on.
    pub required: Features,
    /// The service.
    pub instance: InstanceId,
    /// Its run.
    pub boot: BootId,
    /// Which link.
    pub link: LinkId,
    /// Fresh randomness of the service.
    pub nonce: [u8; 16],
    /// The number of this attempt: higher than all before.
    pub epoch: u64,
    /// How far the service has come.
    pub positions: Positions,
}

/// Why one side says no.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It does not know the link: it restarted, or the link ended, or another policy created it.
    #[error("session lost: the other side does not know the link any more")]
    UnknownLink,
    /// A newer attach of the same link came first.
    #[error("a newer carrier of the link came first")]
    Stale,
    /// The link has ended on the other side, perhaps by this very hello.
    #[error("session lost: {0}")]
    SessionLost(String),
    /// It takes no more sessions.
    #[error("refused: {0}")]
    NotAdmitted(String),
    /// It lacks a required feature or speaks another version.
    #[error("not supported by the other side: {0}")]
    Unsupported(String),
}

/// How a message breaks the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HelloFault {
    /// Not a hello at all.
    #[error("wrong magic")]
    Magic,
    /// Another major version.
    #[error("version {0}")]
    Version(u8),
    /// A length beyond the limit or the message.
    #[error("impossible length")]
    Length,
    /// A kind that does not exist.
    #[error("unknown kind {0}")]
    Kind(u8),
    /// A field is missing, twice there, or has a wrong size.
    #[error("bad field {0}")]
    Field(u8),
}

/// Why a resume came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResumeError {
    /// A message breaks the format.
    #[error("malformed hello: {0}")]
    Malformed(#[from] HelloFault),
    /// A message that has no place here.
    #[error("unexpected message")]
    Unexpected,
    /// The other side said no.
    #[error("{0}")]
    Refused(Refusal),
    /// The other side does not have the secret.
    #[error("wrong proof of the link's secret")]
    WrongProof,
}

/// How many bytes the message has that begins with this prefix. Decides with as few bytes as it can.
pub fn message_length(prefix: &[u8]) -> Result<Option<usize>, HelloFault> {
    let compared = prefix.len().min(MAGIC.len());
    if prefix[..compared] != MAGIC[..compared] {
        return Err(HelloFault::Magic);
    }
    let Some(length) = prefix.get(MAGIC.len()..PREFIX) else { return Ok(None) };
    let total = PREFIX + usize::from(u16::from_be_bytes([length[0], length[1]]));
    if (PREFIX + 2..=MAX_MESSAGE).contains(&total) { Ok(Some(total)) } else { Err(HelloFault::Length) }
}

mod tag {
    pub(super) const REQUIRED: u8 = 1;
    pub(super) const OPTIONAL: u8 = 2;
    pub(super) const INSTANCE: u8 = 3;
    pub(super) const BOOT: u8 = 4;
    pub(super) const CHANNELS: u8 = 5;
    pub(super) const WINDOW: u8 = 6;
    pub(super) const LINK: u8 = 7;
    pub(super) const SECRET: u8 = 8;
    pub(super) const RESUME_FOR: u8 = 9;
    pub(super) const NONCE: u8 = 10;
    pub(super) const EPOCH: u8 = 11;
    pub(super) const RECEIVED: u8 = 12;
    pub(super) const CONSUMED: u8 = 13;
    pub(super) const PROOF: u8 = 14;
    pub(super) const CODE: u8 = 15;
    pub(super) const TEXT: u8 = 16;
}

/// Bytes of a proof field, always the last of its message.
const PROOF_FIELD: usize = 2 + 32;

impl Message {
    /// The bytes of the message.
    pub fn encode(&self) -> Vec<u8> {
        match self {
            Self::New { required, optional, side, link } => {
                let mut writer = Writer::new(1);
                writer.u32(tag::REQUIRED, required.0).u32(tag::OPTIONAL, optional.0).side(side);
                if let Some(link) = link {
                    writer.field(tag::LINK, &link.id.0).field(tag::SECRET, link.secret.expose());
                    writer.u32(tag::RESUME_FOR, millis(link.resume_for));
                }
                writer.finish()
            }
            Self::Resume(resume) => resume.encode(),
            Self::Accept { agreed, side, resume_for } => {
                let mut writer = Writer::new(3);
                writer.u32(tag::OPTIONAL, agreed.0).side(side).u32(tag::RESUME_FOR, millis(*resume_for));
                writer.finish()
            }
            Self::Answer { nonce, positions, proof } => {
                let mut writer = Writer::new(4);
                writer.field(tag::NONCE, nonce).positions(*positions).field(tag::PROOF, proof);
                writer.finish()
            }
            Self::Refuse(refusal) => {
                let (code, text) = refusal.parts();
                let text = &text.as_bytes()[..text.floor_char_boundary(MAX_TEXT)];
                let mut writer = Writer::new(5);
                writer.u32(tag::CODE, code).field(tag::TEXT, text);
                writer.finish()
            }
            Self::Confirm { proof } => {
                let mut writer = Writer::new(6);
                writer.field(tag::PROOF, proof);
                writer.finish()
            }
        }
    }

    /// Parses a whole message.
    pub fn decode(bytes: &[u8]) -> Result<Self, HelloFault> {
        if message_length(bytes)? != Some(bytes.len()) {
            return Err(HelloFault::Length);
        }
        // A message has at least a version and a kind: message_length saw to it.
        let (version, kind) = (bytes[PREFIX], bytes[PREFIX + 1]);
        if version != VERSION {
            return Err(HelloFault::Version(version));
        }
        let fields = Fields::parse(&bytes[PREFIX + 2..])?;
        Ok(match kind {
            1 => Self::New {
                required: Features(fields.u32(tag::REQUIRED)?),
                optional: Features(fields.u32(tag::OPTIONAL)?),
                side: fields.side()?,
                link: if fields.has(tag::LINK) { Some(fields.new_link()?) } else { None },
            },
            2 => Self::Resume(fields.resume()?),
            3 => Self::Accept {
                agreed: Features(fields.u32(tag::OPTIONAL)?),
                side: fields.side()?,
                resume_for: fields.resume_for()?,
            },
            4 => Self::Answer {
                nonce: fields.array(tag::NONCE)?,
                positions: fields.positions()?,
                proof: fields.array(tag::PROOF)?,
            },
            5 => Self::Refuse(Refusal::from_parts(fields.u32(tag::CODE)?, fields.text()?)),
            6 => Self::Confirm { proof: fields.array(tag::PROOF)? },
            other => return Err(HelloFault::Kind(other)),
        })
    }
}

impl Resume {
    fn encode(&self) -> Vec<u8> {
        let mut writer = Writer::new(2);
        writer.u32(tag::REQUIRED, self.required.0);
        writer.field(tag::INSTANCE, &self.instance.0).field(tag::BOOT, &self.boot.0);
        writer.field(tag::LINK, &self.link.0).field(tag::NONCE, &self.nonce).u64(tag::EPOCH, self.epoch);
        writer.positions(self.positions);
        writer.finish()
    }
}

impl Refusal {
    fn parts(&self) -> (u32, &str) {
        match self {
            Self::UnknownLink => (1, ""),
            Self::Stale => (2, ""),
            Self::SessionLost(text) => (3, text),
            Self::NotAdmitted(text) => (4, text),
            Self::Unsupported(text) => (5, text),
        }
    }

    /// An unknown code is taken as "not admitted": the carrier is of no use, the link is not proven dead.
    fn from_parts(code: u32, text: String) -> Self {
        match code {
            1 => Self::UnknownLink,
            2 => Self::Stale,
            3 => Self::SessionLost(text),
            5 => Self::Unsupported(text),
            _ => Self::NotAdmitted(text),
        }
    }
}

/// The service's half of a resume.
#[derive(Debug)]
pub struct ResumeOffer {
    hello: Vec<u8>,
    secret: Secret,
}

impl ResumeOffer {
    /// Begins a resume.
    pub fn new(resume: &Resume, secret: Secret) -> Self {
        Self { hello: resume.encode(), secret }
    }

    /// The message to send first.
    pub fn hello(&self) -> &[u8] {
        &self.hello
    }

    /// Checks the device's answer: its positions, and the message to send next.
    pub fn answered(self, answer: &[u8]) -> Result<(Positions, Vec<u8>), ResumeError> {
        let (positions, proof) = match Message::decode(answer)? {
            Message::Answer { positions, proof, .. } => (positions, proof),
            Message::Refuse(refusal) => return Err(ResumeError::Refused(refusal)),
            _ => return Err(ResumeError::Unexpected),
        };
        let unproven = answer.len().checked_sub(PROOF_FIELD).ok_or(ResumeError::WrongProof)?;
        let transcript = device_transcript(&self.secret, &self.hello, &answer[..unproven]);
        transcript.verify_slice(&proof).map_err(|_| ResumeError::WrongProof)?;
        let proof = service_transcript(&self.secret, &self.hello, answer).finalize().into_bytes().into();
        Ok((positions, Message::Confirm { proof }.encode()))
    }
}

/// The device's half of a resume.
#[derive(Debug)]
pub struct ResumeAnswer {
    hello: Vec<u8>,
    answer: Vec<u8>,
    secret: Secret,
    resume: Resume,
    #[cfg(test)]
    pub(crate) believes_everything: bool,
}

impl ResumeAnswer {
    /// Answers the message `hello`, which says `resume`.
    pub fn new(hello: &[u8], resume: Resume, secret: Secret, nonce: [u8; 16], positions: Positions) -> Self {
        let unproven = Message::Answer { nonce, positions, proof: [0; 32] }.encode();
        let transcript = device_transcript(&secret, hello, &unproven[..unproven.len() - PROOF_FIELD]);
        let proof = transcript.finalize().into_bytes().into();
        let answer = Message::Answer { nonce, positions, proof }.encode();
        Self {
            hello: hello.to_vec(),
            answer,
            secret,
            resume,
            #[cfg(test)]
            believes_everything: false,
        }
    }

    /// The message to send.
    pub fn answer(&self) -> &[u8] {
        &self.answer
    }

    /// Checks the service's proof: what it said may be believed.
    pub fn confirmed(self, confirm: &[u8]) -> Result<Resume, ResumeError> {
        let proof = match Message::decode(confirm)? {
            Message::Confirm { proof } => proof,
            Message::Refuse(refusal) => return Err(ResumeError::Refused(refusal)),
            _ => return Err(ResumeError::Unexpected),
        };
        #[cfg(test)]
        if self.believes_everything {
            return Ok(self.resume);
        }
        let transcript = service_transcript(&self.secret, &self.hello, &self.answer);
        transcript.verify_slice(&proof).map_err(|_| ResumeError::WrongProof)?;
        Ok(self.resume)
    }
}

fn device_transcript(secret: &Secret, hello: &[u8], answer: &[u8]) -> Hmac<Sha256> {
    transcript(secret, b"culvert link 1 device", hello, answer)
}

fn service_transcript(secret: &Secret, hello: &[u8], answer: &[u8]) -> Hmac<Sha256> {
    transcript(secret, b"culvert link 1 service", hello, answer)
}

/// Messages carry their length, so that the parts cannot be shifted against each other.
fn transcript(secret: &Secret, label: &[u8], hello: &[u8], answer: &[u8]) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.expose()).expect("HMAC takes keys of any length");
    mac.update(label);
    mac.update(hello);
    mac.update(answer);
    mac
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

struct Writer(Vec<u8>);

impl Writer {
    fn new(kind: u8) -> Self {
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&[0, 0, VERSION, kind]);
        Self(bytes)
    }

    /// Values are fixed in size or cut to [`MAX_TEXT`]: they fit the length byte.
    fn field(&mut self, tag: u8, value: &[u8]) -> &mut Self {
        self.0.extend_from_slice(&[tag, value.len() as u8]);
        self.0.extend_from_slice(value);
        self
    }

    fn u32(&mut self, tag: u8, value: u32) -> &mut Self {
        self.field(tag, &value.to_be_bytes())
    }

    fn u64(&mut self, tag: u8, value: u64) -> &mut Self {
        self.field(tag, &value.to_be_bytes())
    }

    fn positions(&mut self, positions: Positions) -> &mut Self {
        self.u64(tag::RECEIVED, positions.received).u64(tag::CONSUMED, positions.consumed)
    }

    fn side(&mut self, side: &Side) -> &mut Self {
        self.field(tag::INSTANCE, &side.instance.0).field(tag::BOOT, &side.boot.0);
        self.u32(tag::CHANNELS, side.max_channels).u32(tag::WINDOW, side.receive_window)
    }

    fn finish(mut self) -> Vec<u8> {
        let length = (self.0.len() - PREFIX) as u16;
        self.0[MAGIC.len()..PREFIX].copy_from_slice(&length.to_be_bytes());
        self.0
    }
}

struct Fields<'a>(BTreeMap<u8, &'a [u8]>);

impl<'a> Fields<'a> {
    fn parse(mut bytes: &'a [u8]) -> Result<Self, HelloFault> {
        let mut fields = BTreeMap::new();
        while let [tag, length, rest @ ..] = bytes {
            let (value, rest) = rest.split_at_checked(usize::from(*length)).ok_or(HelloFault::Field(*tag))?;
            if fields.insert(*tag, value).is_some() {
                return Err(HelloFault::Field(*tag));
            }
            bytes = rest;
        }
        if bytes.is_empty() { Ok(Self(fields)) } else { Err(HelloFault::Length) }
    }

    fn has(&self, tag: u8) -> bool {
        self.0.contains_key(&tag)
    }

    fn array<const N: usize>(&self, tag: u8) -> Result<[u8; N], HelloFault> {
        self.0.get(&tag).and_then(|value| (*value).try_into().ok()).ok_or(HelloFault::Field(tag))
    }

    fn u32(&self, tag: u8) -> Result<u32, HelloFault> {
        self.array(tag).map(u32::from_be_bytes)
    }

    fn u64(&self, tag: u8) -> Result<u64, HelloFault> {
        self.array(tag).map(u64::from_be_bytes)
    }

    fn resume_for(&self) -> Result<Duration, HelloFault> {
        Ok(Duration::from_millis(self.u32(tag::RESUME_FOR)?.into()))
    }

    fn positions(&self) -> Result<Positions, HelloFault> {
        Ok(Positions { received: self.u64(tag::RECEIVED)?, consumed: self.u64(tag::CONSUMED)? })
    }

    /// Control characters of a text are dropped: it ends in a log line.
    fn text(&self) -> Result<String, HelloFault> {
        let bytes = self.0.get(&tag::TEXT).ok_or(HelloFault::Field(tag::TEXT))?;
        Ok(String::from_utf8_lossy(bytes).chars().filter(|c| !c.is_control()).collect())
    }

    fn side(&self) -> Result<Side, HelloFault> {
        Ok(Side {
            instance: InstanceId(self.array(tag::INSTANCE)?),
            boot: BootId(self.array(tag::BOOT)?),
            max_channels: self.u32(tag::CHANNELS)?,
            receive_window: self.u32(tag::WINDOW)?,
        })
    }

    fn new_link(&self) -> Result<NewLink, HelloFault> {
        Ok(NewLink {
            id: LinkId(self.array(tag::LINK)?),
            secret: Secret::new(self.array::<32>(tag::SECRET)?),
            resume_for: self.resume_for()?,
        })
    }

    fn resume(&self) -> Result<Resume, HelloFault> {
        Ok(Resume {
            required: Features(self.u32(tag::REQUIRED)?),
            instance: InstanceId(self.array(tag::INSTANCE)?),
            boot: BootId(self.array(tag::BOOT)?),
            link: LinkId(self.array(tag::LINK)?),
            nonce: self.array(tag::NONCE)?,
            epoch: self.u64(tag::EPOCH)?,
            positions: self.positions()?,
        })
    }
}

/// Any bytes as a message of the hello. For fuzzers.
///
/// # Panics
/// If a message changes on the way through its own bytes, or an answer without the secret is taken.
pub fn fuzz_hello(data: &[u8]) {
    if let Ok(Some(length)) = message_length(data) {
        assert!(length <= MAX_MESSAGE, "the limit holds before anything is read");
    }
    let Ok(message) = Message::decode(data) else { return };
    assert_eq!(Message::decode(&message.encode()).as_ref(), Ok(&message), "a message can be said again");
    if let Message::Resume(resume) = message {
        let offer = ResumeOffer::new(&resume, Secret::new([7; 32]));
        assert!(offer.answered(data).is_err(), "a question is no answer");
    }
}

#[cfg(test)]
mod tests;
