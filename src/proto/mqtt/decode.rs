//! Bytes to packets.
//!
//! Owns every check of section 2 and 3 of the standard. Does not know what a session allows.
//! Invariant: no byte is consumed until a whole packet is there, and nothing is allocated before its length is
//! checked against the limit.

use bytes::{Buf, Bytes, BytesMut};

use super::{
    Connect, ConnectCode, MqttError, PROTOCOL_LEVEL, PROTOCOL_NAME, Packet, PacketId, Publish, Qos, SUBSCRIBE_REFUSED,
    Subscribe, Will, connect_flag, first_byte,
};
use crate::base::Secret;

/// A length field has at most this many bytes (section 2.2.3).
const MAX_LENGTH_BYTES: usize = 4;

/// Takes one packet off the front of `input`, or `None` if it is not complete yet. `limit` bounds the packet's
/// bytes after the fixed header.
pub fn decode(input: &mut BytesMut, limit: usize) -> Result<Option<Packet>, MqttError> {
    let Some(&first) = input.first() else { return Ok(None) };
    check_first_byte(first)?;
    let Some((length, header)) = remaining_length(&input[1..])? else { return Ok(None) };
    if length > limit {
        return Err(MqttError::TooLarge { limit });
    }
    if input.len() < 1 + header + length {
        return Ok(None);
    }
    input.advance(1 + header);
    let body = Body(input.split_to(length).freeze());
    decode_body(first, body).map(Some)
}

/// Any bytes, cut anywhere, decode to packets or to an error, and what decodes encodes to the same packet. Panics
/// when that does not hold. For fuzzers.
pub fn fuzz_mqtt(data: &[u8]) {
    const LIMIT: usize = 64 * 1024;
    let mut input = BytesMut::from(data);
    while let Ok(Some(packet)) = decode(&mut input, LIMIT) {
        let mut again = BytesMut::new();
        super::encode(&packet, &mut again).expect("what was decoded fits its length fields");
        assert_eq!(decode(&mut again, LIMIT), Ok(Some(packet)), "encoding lost something");
        assert!(again.is_empty(), "encoding left bytes over");
    }
}

fn check_first_byte(first: u8) -> Result<(), MqttError> {
    use first_byte::{
        CONNACK, CONNECT, DISCONNECT, PINGREQ, PINGRESP, PUBACK, PUBLISH, SUBACK, SUBSCRIBE, UNSUBACK, UNSUBSCRIBE,
    };
    match first {
        CONNECT | CONNACK | PUBACK | SUBSCRIBE | SUBACK | UNSUBSCRIBE | UNSUBACK | PINGREQ | PINGRESP | DISCONNECT => {
            Ok(())
        }
        // QoS 0 with DUP is forbidden (section 3.3.1.1); QoS 2 and 3 are not ours.
        _ if first & 0xf0 == PUBLISH && first & 0x04 == 0 && first & 0x0a != 0x08 => Ok(()),
        _ => Err(MqttError::Type(first)),
    }
}

/// The value of the length field and its size in bytes, or `None` if it is not complete yet.
fn remaining_length(input: &[u8]) -> Result<Option<(usize, usize)>, MqttError> {
    let mut value = 0;
    for (index, &byte) in input.iter().take(MAX_LENGTH_BYTES).enumerate() {
        value |= usize::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Ok(Some((value, index + 1)));
        }
    }
    if input.len() < MAX_LENGTH_BYTES { Ok(None) } else { Err(MqttError::Length) }
}

fn decode_body(first: u8, mut body: Body) -> Result<Packet, MqttError> {
    let packet = match first {
        first_byte::CONNECT => Packet::Connect(Box::new(connect(&mut body)?)),
        first_byte::CONNACK => connack(&mut body)?,
        first_byte::PUBACK => Packet::PubAck(body.id("PUBACK")?),
        first_byte::SUBSCRIBE => Packet::Subscribe(subscribe(&mut body)?),
        first_byte::SUBACK => suback(&mut body)?,
        first_byte::UNSUBSCRIBE => unsubscribe(&mut body)?,
        first_byte::UNSUBACK => Packet::UnsubAck(body.id("UNSUBACK")?),
        first_byte::PINGREQ => Packet::PingReq,
        first_byte::PINGRESP => Packet::PingResp,
        first_byte::DISCONNECT => Packet::Disconnect,
        _ => Packet::Publish(publish(first, &mut body)?),
    };
    if body.0.is_empty() { Ok(packet) } else { Err(MqttError::Truncated("packet")) }
}

fn connect(body: &mut Body) -> Result<Connect, MqttError> {
    const WHAT: &str = "CONNECT";
    if body.text(WHAT)? != PROTOCOL_NAME {
        return Err(MqttError::Forbidden("CONNECT names a protocol other than MQTT"));
    }
    let level = body.byte(WHAT)?;
    if level != PROTOCOL_LEVEL {
        body.0.clear();
        return Err(MqttError::Level(level));
    }
    let flags = body.byte(WHAT)?;
    let has = |flag: u8| flags & flag != 0;
    if has(connect_flag::RESERVED) {
        return Err(MqttError::Forbidden("CONNECT sets its reserved flag"));
    }
    if has(connect_flag::PASSWORD) && !has(connect_flag::USERNAME) {
        return Err(MqttError::Forbidden("CONNECT has a password but no user name"));
    }
    let keep_alive = body.number(WHAT)?;
    let client_id = body.text(WHAT)?;
    let will = will(flags, body)?;
    let username = if has(connect_flag::USERNAME) { Some(body.text(WHAT)?) } else { None };
    let password = if has(connect_flag::PASSWORD) { Some(Secret::new(body.bytes(WHAT)?.as_ref())) } else { None };
    Ok(Connect { clean_session: has(connect_flag::CLEAN_SESSION), keep_alive, client_id, will, username, password })
}

fn will(flags: u8, body: &mut Body) -> Result<Option<Will>, MqttError> {
    let qos = Qos::try_from((flags >> connect_flag::WILL_QOS_SHIFT) & 3)?;
    let retain = flags & connect_flag::WILL_RETAIN != 0;
    if flags & connect_flag::WILL == 0 {
        return match (qos, retain) {
            (Qos::AtMostOnce, false) => Ok(None),
            _ => Err(MqttError::Forbidden("CONNECT has will flags but no will")),
        };
    }
    let topic = body.topic("will")?;
    Ok(Some(Will { topic, payload: body.bytes("will")?, qos, retain }))
}

fn connack(body: &mut Body) -> Result<Packet, MqttError> {
    let flags = body.byte("CONNACK")?;
    if flags > 1 {
        return Err(MqttError::Forbidden("CONNACK sets reserved flags"));
    }
    Ok(Packet::ConnAck { session_present: flags == 1, code: ConnectCode::try_from(body.byte("CONNACK")?)? })
}

fn publish(first: u8, body: &mut Body) -> Result<Publish, MqttError> {
    let topic = body.topic("PUBLISH")?;
    let id = if first & 0x02 != 0 { Some(body.id("PUBLISH")?) } else { None };
    let payload = std::mem::take(&mut body.0);
    Ok(Publish { topic, payload, id, dup: first & 0x08 != 0, retain: first & 0x01 != 0 })
}

fn subscribe(body: &mut Body) -> Result<Subscribe, MqttError> {
    let id = body.id("SUBSCRIBE")?;
    let mut filters = Vec::new();
    while !body.0.is_empty() {
        let filter = body.filter("SUBSCRIBE")?;
        filters.push((filter, Qos::try_from(body.byte("SUBSCRIBE")?)?));
    }
    if filters.is_empty() {
        return Err(MqttError::Forbidden("SUBSCRIBE without a filter"));
    }
    Ok(Subscribe { id, filters })
}

fn unsubscribe(body: &mut Body) -> Result<Packet, MqttError> {
    let id = body.id("UNSUBSCRIBE")?;
    let mut filters = Vec::new();
    while !body.0.is_empty() {
        filters.push(body.filter("UNSUBSCRIBE")?);
    }
    if filters.is_empty() {
        return Err(MqttError::Forbidden("UNSUBSCRIBE without a filter"));
    }
    Ok(Packet::Unsubscribe { id, filters })
}

fn suback(body: &mut Body) -> Result<Packet, MqttError> {
    let id = body.id("SUBACK")?;
    let codes = std::mem::take(&mut body.0);
    if codes.is_empty() {
        return Err(MqttError::Forbidden("SUBACK without a verdict"));
    }
    let verdict = |code: &u8| match *code {
        SUBSCRIBE_REFUSED => Ok(None),
        code => Qos::try_from(code).map(Some),
    };
    Ok(Packet::SubAck { id, granted: codes.iter().map(verdict).collect::<Result<_, _>>()? })
}

/// What follows the fixed header. Every method checks the length before it takes.
struct Body(Bytes);

impl Body {
    fn byte(&mut self, what: &'static str) -> Result<u8, MqttError> {
        self.0.try_get_u8().map_err(|_| MqttError::Truncated(what))
    }

    fn number(&mut self, what: &'static str) -> Result<u16, MqttError> {
        self.0.try_get_u16().map_err(|_| MqttError::Truncated(what))
    }

    fn id(&mut self, what: &'static str) -> Result<PacketId, MqttError> {
        PacketId::new(self.number(what)?).ok_or(MqttError::Forbidden("packet identifier 0"))
    }

    fn bytes(&mut self, what: &'static str) -> Result<Bytes, MqttError> {
        let length = usize::from(self.number(what)?);
        if length > self.0.len() {
            return Err(MqttError::Truncated(what));
        }
        Ok(self.0.split_to(length))
    }

    fn text(&mut self, what: &'static str) -> Result<String, MqttError> {
        let bytes = self.bytes(what)?;
        let text = std::str::from_utf8(&bytes).map_err(|_| MqttError::Forbidden("text is not UTF-8"))?;
        if text.contains('\0') {
            return Err(MqttError::Forbidden("text contains U+0000"));
        }
        Ok(text.into())
    }

    fn topic(&mut self, what: &'static str) -> Result<String, MqttError> {
        let topic = self.text(what)?;
        if topic.is_empty() || topic.contains(['+', '#']) {
            return Err(MqttError::Forbidden("topic is empty or has wildcards"));
        }
        Ok(topic)
    }

    fn filter(&mut self, what: &'static str) -> Result<String, MqttError> {
        let filter = self.text(what)?;
        if is_filter(&filter) { Ok(filter) } else { Err(MqttError::Forbidden("malformed topic filter")) }
    }
}

/// `#` stands alone in the last level, `+` alone in a level (section 4.7.1).
fn is_filter(filter: &str) -> bool {
    let mut levels = filter.split('/').rev();
    let last = levels.next().unwrap_or_default();
    let level_ok = |level: &str| level == "+" || !level.contains(['+', '#']);
    !filter.is_empty() && (last == "#" || level_ok(last)) && levels.all(level_ok)
}
