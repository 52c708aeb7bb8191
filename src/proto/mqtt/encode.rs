//! Packets to bytes.
//!
//! Owns the layout of each packet. Does not know when one may be sent.
//! Invariant: what is appended decodes to the packet it was made from, or nothing is appended.

use bytes::{BufMut, BytesMut};

use super::{
    Connect, MqttError, PROTOCOL_LEVEL, PROTOCOL_NAME, Packet, PacketId, Publish, SUBSCRIBE_REFUSED, Subscribe,
    connect_flag, first_byte,
};

/// The largest value of a length field (section 2.2.3).
const MAX_REMAINING_LENGTH: usize = 268_435_455;

/// Appends a packet to `out`.
pub fn encode(packet: &Packet, out: &mut BytesMut) -> Result<(), MqttError> {
    let start = out.len();
    let done = append(packet, out);
    if done.is_err() {
        out.truncate(start);
    }
    done
}

fn append(packet: &Packet, out: &mut BytesMut) -> Result<(), MqttError> {
    match packet {
        Packet::Connect(connect) => put_connect(connect, out),
        Packet::ConnAck { session_present, code } => {
            out.put_slice(&[first_byte::CONNACK, 2, u8::from(*session_present), *code as u8]);
            Ok(())
        }
        Packet::Publish(publish) => put_publish(publish, out),
        Packet::PubAck(id) => put_ack(first_byte::PUBACK, *id, out),
        Packet::Subscribe(subscribe) => put_subscribe(subscribe, out),
        Packet::SubAck { id, granted } => {
            put_header(first_byte::SUBACK, 2 + granted.len(), out)?;
            out.put_u16(id.get());
            granted.iter().for_each(|qos| out.put_u8(qos.map_or(SUBSCRIBE_REFUSED, |qos| qos as u8)));
            Ok(())
        }
        Packet::Unsubscribe { id, filters } => {
            put_header(first_byte::UNSUBSCRIBE, 2 + filters.iter().map(|f| 2 + f.len()).sum::<usize>(), out)?;
            out.put_u16(id.get());
            filters.iter().try_for_each(|filter| put_bytes("topic filter", filter.as_bytes(), out))
        }
        Packet::UnsubAck(id) => put_ack(first_byte::UNSUBACK, *id, out),
        Packet::PingReq => put_header(first_byte::PINGREQ, 0, out),
        Packet::PingResp => put_header(first_byte::PINGRESP, 0, out),
        Packet::Disconnect => put_header(first_byte::DISCONNECT, 0, out),
    }
}

fn put_connect(connect: &Connect, out: &mut BytesMut) -> Result<(), MqttError> {
    let mut flags = if connect.clean_session { connect_flag::CLEAN_SESSION } else { 0 };
    let mut fields: Vec<(&'static str, &[u8])> = vec![("client identifier", connect.client_id.as_bytes())];
    if let Some(will) = &connect.will {
        let retain = if will.retain { connect_flag::WILL_RETAIN } else { 0 };
        flags |= connect_flag::WILL | (will.qos as u8) << connect_flag::WILL_QOS_SHIFT | retain;
        fields.extend([("will topic", will.topic.as_bytes()), ("will message", &will.payload)]);
    }
    if let Some(username) = &connect.username {
        flags |= connect_flag::USERNAME;
        fields.push(("user name", username.as_bytes()));
    }
    if let Some(password) = &connect.password {
        flags |= connect_flag::PASSWORD;
        fields.push(("password", password.expose()));
    }
    let length = 2 + PROTOCOL_NAME.len() + 4 + fields.iter().map(|(_, bytes)| 2 + bytes.len()).sum::<usize>();
    put_header(first_byte::CONNECT, length, out)?;
    put_bytes("protocol name", PROTOCOL_NAME.as_bytes(), out)?;
    out.put_slice(&[PROTOCOL_LEVEL, flags]);
    out.put_u16(connect.keep_alive);
    fields.iter().try_for_each(|(what, bytes)| put_bytes(what, bytes, out))
}

fn put_publish(publish: &Publish, out: &mut BytesMut) -> Result<(), MqttError> {
    let qos = if publish.id.is_some() { 0x02 } else { 0 };
    let dup = if publish.dup { 0x08 } else { 0 };
    let id_len = if publish.id.is_some() { 2 } else { 0 };
    let first = first_byte::PUBLISH | dup | qos | u8::from(publish.retain);
    put_header(first, 2 + publish.topic.len() + id_len + publish.payload.len(), out)?;
    put_bytes("topic", publish.topic.as_bytes(), out)?;
    if let Some(id) = publish.id {
        out.put_u16(id.get());
    }
    out.put_slice(&publish.payload);
    Ok(())
}

fn put_subscribe(subscribe: &Subscribe, out: &mut BytesMut) -> Result<(), MqttError> {
    let length = 2 + subscribe.filters.iter().map(|(filter, _)| 3 + filter.len()).sum::<usize>();
    put_header(first_byte::SUBSCRIBE, length, out)?;
    out.put_u16(subscribe.id.get());
    subscribe.filters.iter().try_for_each(|(filter, qos)| {
        put_bytes("topic filter", filter.as_bytes(), out)?;
        out.put_u8(*qos as u8);
        Ok(())
    })
}

fn put_ack(first: u8, id: PacketId, out: &mut BytesMut) -> Result<(), MqttError> {
    put_header(first, 2, out)?;
    out.put_u16(id.get());
    Ok(())
}

fn put_header(first: u8, length: usize, out: &mut BytesMut) -> Result<(), MqttError> {
    if length > MAX_REMAINING_LENGTH {
        return Err(MqttError::Unencodable("packet"));
    }
    out.reserve(5 + length);
    out.put_u8(first);
    let mut left = length;
    while left > 0x7f {
        out.put_u8((left & 0x7f) as u8 | 0x80);
        left >>= 7;
    }
    out.put_u8(left as u8);
    Ok(())
}

fn put_bytes(what: &'static str, bytes: &[u8], out: &mut BytesMut) -> Result<(), MqttError> {
    let length = u16::try_from(bytes.len()).map_err(|_| MqttError::Unencodable(what))?;
    out.put_u16(length);
    out.put_slice(bytes);
    Ok(())
}
