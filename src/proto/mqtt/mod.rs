//! MQTT 3.1.1 packets, in both directions, as far as IoT Hub's control channel goes: QoS 0 and 1.
//!
//! Owns the bytes of a packet (OASIS MQTT 3.1.1, sections 2 and 3). Does not know topics of IoT Hub, sessions or
//! who may send what: `hub::control` and the device's session decide that.
//! Invariant: a packet that decodes obeys every length, flag and UTF-8 rule of the standard, nothing in it is larger
//! than the limit handed to [`decode`], and printing it shows no password.
//!
//! # Why not a crate
//!
//! `rmqtt-codec` 0.3 was the first choice and is the oracle of the tests beside this file. It fails these requirements, none of
//! which a wrapper can restore because the information is gone after decoding: it accepts trailing bytes after
//! CONNECT, a body in PINGREQ and DISCONNECT, a password without a user name, reserved bits in a requested QoS,
//! U+0000 and wildcards in a topic; it reserves memory for a packet as soon as its header has come; and the derived
//! `Debug` of its CONNECT prints the password.
//!
//! # Violations
//!
//! Any error of [`decode`] ends the connection; MQTT 3.1.1 has no other answer. The first byte is judged as soon as
//! it is there, the length as soon as it is complete: nothing is awaited that would be refused later.

mod decode;
mod encode;
#[cfg(test)]
mod tests;

use std::{fmt, num::NonZeroU16};

use bytes::Bytes;

use crate::base::Secret;

pub use decode::{decode, fuzz_mqtt};
pub use encode::encode;

/// The identifier of a packet that expects an answer.
pub type PacketId = NonZeroU16;

/// Delivery promise of a message or a subscription. QoS 2 can only be asked for, never granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Qos {
    /// At most once.
    AtMostOnce = 0,
    /// At least once: answered by PUBACK.
    AtLeastOnce = 1,
    /// Exactly once: only in the QoS that a SUBSCRIBE or a will asks for.
    ExactlyOnce = 2,
}

/// A control packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// Client: opens the session.
    Connect(Box<Connect>),
    /// Server: answers CONNECT.
    ConnAck {
        /// The server kept a session of this client.
        session_present: bool,
        /// Accepted, or why not.
        code: ConnectCode,
    },
    /// Either: a message.
    Publish(Publish),
    /// Either: a message of QoS 1 has arrived.
    PubAck(PacketId),
    /// Client: wants topics.
    Subscribe(Subscribe),
    /// Server: answers SUBSCRIBE, one verdict per filter in the same order.
    SubAck {
        /// The SUBSCRIBE's identifier.
        id: PacketId,
        /// The granted QoS, or `None` for a refusal (0x80).
        granted: Vec<Option<Qos>>,
    },
    /// Client: no longer wants topics.
    Unsubscribe {
        /// To be repeated in the answer.
        id: PacketId,
        /// At least one filter.
        filters: Vec<String>,
    },
    /// Server: answers UNSUBSCRIBE.
    UnsubAck(PacketId),
    /// Client: are you there?
    PingReq,
    /// Server: yes.
    PingResp,
    /// Client: leaves in an orderly way.
    Disconnect,
}

/// CONNECT. `Debug` shows no password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connect {
    /// Drop what an earlier session of this client left.
    pub clean_session: bool,
    /// Seconds between packets of the client; 0 turns the check off.
    pub keep_alive: u16,
    /// The client's name; may be empty.
    pub client_id: String,
    /// What to publish when the connection is lost.
    pub will: Option<Will>,
    /// The user name, if there is one.
    pub username: Option<String>,
    /// The password; never there without a user name.
    pub password: Option<Secret>,
}

/// The will of a CONNECT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Will {
    /// Where to publish.
    pub topic: String,
    /// What to publish.
    pub payload: Bytes,
    /// How.
    pub qos: Qos,
    /// Whether to keep it.
    pub retain: bool,
}

/// PUBLISH.
#[derive(Clone, PartialEq, Eq)]
pub struct Publish {
    /// Not empty, without wildcards.
    pub topic: String,
    /// The message.
    pub payload: Bytes,
    /// `Some` means QoS 1, `None` QoS 0.
    pub id: Option<PacketId>,
    /// Sent before.
    pub dup: bool,
    /// To be kept for later subscribers.
    pub retain: bool,
}

/// SUBSCRIBE.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscribe {
    /// To be repeated in the answer.
    pub id: PacketId,
    /// At least one filter with the QoS asked for.
    pub filters: Vec<(String, Qos)>,
}

/// The return code of a CONNACK.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectCode {
    /// The session is open.
    Accepted = 0,
    /// Not MQTT 3.1.1.
    UnacceptableProtocol = 1,
    /// The client identifier is not allowed.
    IdentifierRejected = 2,
    /// Try again later.
    ServerUnavailable = 3,
    /// Malformed user name or password.
    BadCredentials = 4,
    /// Wrong, expired, unknown or disabled.
    NotAuthorized = 5,
}

/// Why bytes are not a packet, or a packet not bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MqttError {
    /// A packet type or flags that the standard reserves, or QoS 2.
    #[error("packet type byte {0:#04x} is not supported")]
    Type(u8),
    /// The packet announces more bytes than allowed here.
    #[error("packet of more than {limit} bytes")]
    TooLarge {
        /// The limit that was handed to [`decode`].
        limit: usize,
    },
    /// The length field has more than four bytes.
    #[error("malformed packet length")]
    Length,
    /// A field reaches beyond the packet, or bytes are left over.
    #[error("{0}: fields and packet length disagree")]
    Truncated(&'static str),
    /// A value that the standard forbids.
    #[error("{0}")]
    Forbidden(&'static str),
    /// CONNECT names another protocol level: the answer is [`ConnectCode::UnacceptableProtocol`].
    #[error("protocol level {0} is not MQTT 3.1.1")]
    Level(u8),
    /// Only when encoding: a text or payload does not fit its length field.
    #[error("{0} is too long for its length field")]
    Unencodable(&'static str),
}

impl Publish {
    /// A message of QoS 0.
    pub fn at_most_once(topic: impl Into<String>, payload: impl Into<Bytes>) -> Self {
        Self { topic: topic.into(), payload: payload.into(), id: None, dup: false, retain: false }
    }
}

/// The payload's size only: it belongs to the device's owner.
impl fmt::Debug for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Publish")
            .field("topic", &self.topic.split('?').next())
            .field("payload_len", &self.payload.len())
            .field("id", &self.id)
            .field("dup", &self.dup)
            .field("retain", &self.retain)
            .finish()
    }
}

impl TryFrom<u8> for Qos {
    type Error = MqttError;

    fn try_from(bits: u8) -> Result<Self, MqttError> {
        match bits {
            0 => Ok(Self::AtMostOnce),
            1 => Ok(Self::AtLeastOnce),
            2 => Ok(Self::ExactlyOnce),
            _ => Err(MqttError::Forbidden("reserved QoS")),
        }
    }
}

impl TryFrom<u8> for ConnectCode {
    type Error = MqttError;

    fn try_from(code: u8) -> Result<Self, MqttError> {
        match code {
            0 => Ok(Self::Accepted),
            1 => Ok(Self::UnacceptableProtocol),
            2 => Ok(Self::IdentifierRejected),
            3 => Ok(Self::ServerUnavailable),
            4 => Ok(Self::BadCredentials),
            5 => Ok(Self::NotAuthorized),
            _ => Err(MqttError::Forbidden("reserved CONNACK return code")),
        }
    }
}

/// The first byte of each packet: type in the high half, flags as the standard fixes them in the low half.
mod first_byte {
    pub(super) const CONNECT: u8 = 0x10;
    pub(super) const CONNACK: u8 = 0x20;
    /// Flags below: DUP 8, QoS 1 2, RETAIN 1.
    pub(super) const PUBLISH: u8 = 0x30;
    pub(super) const PUBACK: u8 = 0x40;
    pub(super) const SUBSCRIBE: u8 = 0x82;
    pub(super) const SUBACK: u8 = 0x90;
    pub(super) const UNSUBSCRIBE: u8 = 0xa2;
    pub(super) const UNSUBACK: u8 = 0xb0;
    pub(super) const PINGREQ: u8 = 0xc0;
    pub(super) const PINGRESP: u8 = 0xd0;
    pub(super) const DISCONNECT: u8 = 0xe0;
}

/// The flags of a CONNECT.
mod connect_flag {
    pub(super) const RESERVED: u8 = 0x01;
    pub(super) const CLEAN_SESSION: u8 = 0x02;
    pub(super) const WILL: u8 = 0x04;
    pub(super) const WILL_QOS_SHIFT: u8 = 3;
    pub(super) const WILL_RETAIN: u8 = 0x20;
    pub(super) const PASSWORD: u8 = 0x40;
    pub(super) const USERNAME: u8 = 0x80;
}

/// The protocol name and level of MQTT 3.1.1.
const PROTOCOL_NAME: &str = "MQTT";
const PROTOCOL_LEVEL: u8 = 4;
/// SUBACK's verdict for a filter that is not granted.
const SUBSCRIBE_REFUSED: u8 = 0x80;
