use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use rmqtt_codec::v3;
use tokio_util::codec::{Decoder as _, Encoder as _};

use super::*;

const LIMIT: usize = 4096;

fn bytes_of(packet: &Packet) -> BytesMut {
    let mut out = BytesMut::new();
    encode(packet, &mut out).unwrap();
    out
}

fn id(n: u16) -> PacketId {
    PacketId::new(n).unwrap()
}

fn samples() -> Vec<Packet> {
    let will = Will { topic: "w".into(), payload: Bytes::from_static(b"gone"), qos: Qos::AtLeastOnce, retain: true };
    let connect = Connect {
        clean_session: false,
        keep_alive: 240,
        client_id: "pump-17".into(),
        will: None,
        username: Some("hub.example.com/pump-17/?api-version=2020-09-30".into()),
        password: Some(Secret::new("SharedAccessSignature sr=x&sig=y&se=1")),
    };
    vec![
        Packet::Connect(Box::new(connect.clone())),
        Packet::Connect(Box::new(Connect { will: Some(will), username: None, password: None, ..connect })),
        Packet::ConnAck { session_present: true, code: ConnectCode::Accepted },
        Packet::ConnAck { session_present: false, code: ConnectCode::NotAuthorized },
        Packet::Publish(Publish::at_most_once("$iothub/streams/res/200/?$rid=1", "")),
        Packet::Publish(Publish { id: Some(id(7)), dup: true, retain: true, ..Publish::at_most_once("t", "hello") }),
        Packet::PubAck(id(0xffff)),
        Packet::Subscribe(Subscribe {
            id: id(2),
            filters: vec![
                ("$iothub/streams/POST/#".into(), Qos::AtMostOnce),
                ("a/+/b".into(), Qos::ExactlyOnce),
                ("#".into(), Qos::AtLeastOnce),
            ],
        }),
        Packet::SubAck { id: id(2), granted: vec![Some(Qos::AtMostOnce), None, Some(Qos::AtLeastOnce)] },
        Packet::Unsubscribe { id: id(3), filters: vec!["+".into(), "a/#".into()] },
        Packet::UnsubAck(id(3)),
        Packet::PingReq,
        Packet::PingResp,
        Packet::Disconnect,
    ]
}

#[test]
fn every_packet_survives_a_round_trip_in_pieces() {
    let all: BytesMut = samples().iter().flat_map(bytes_of).collect();
    let mut input = BytesMut::new();
    let mut seen = Vec::new();
    for byte in all {
        input.extend_from_slice(&[byte]);
        seen.extend(decode(&mut input, LIMIT).unwrap());
    }
    assert_eq!(seen, samples());
}

#[test]
fn a_packet_cut_anywhere_waits_and_one_that_lies_about_its_length_is_refused() {
    for packet in samples() {
        let whole = bytes_of(&packet);
        for cut in 0..whole.len() {
            let mut input = BytesMut::from(&whole[..cut]);
            assert_eq!(decode(&mut input, LIMIT), Ok(None), "{packet:?} cut at {cut}");
            assert_eq!(input.len(), cut, "an incomplete packet stays where it is");
            if cut >= 2 {
                // The same bytes, claiming to be complete: refused, unless all that is missing is payload.
                let mut lie = BytesMut::from(&whole[..cut]);
                lie[1] = (cut - 2) as u8;
                match decode(&mut lie, LIMIT) {
                    Err(_) => {}
                    Ok(Some(Packet::Publish(_) | Packet::SubAck { .. } | Packet::Subscribe(_))) => {}
                    Ok(Some(Packet::Unsubscribe { .. })) => {}
                    other => panic!("{packet:?} cut at {cut}: {other:?}"),
                }
            }
        }
    }
}

#[test]
fn a_large_packet_is_refused_by_its_header() {
    let mut input = BytesMut::from(&b"\x10\xff\xff\xff\x7f"[..]);
    assert_eq!(decode(&mut input, LIMIT), Err(MqttError::TooLarge { limit: LIMIT }));
    let mut endless = BytesMut::from(&b"\x10\xff\xff\xff\xff"[..]);
    assert_eq!(decode(&mut endless, LIMIT), Err(MqttError::Length));
    let mut exact = BytesMut::from(&b"\x30\x80\x20"[..]);
    assert_eq!(decode(&mut exact, LIMIT), Ok(None));
}

#[test]
fn reserved_types_and_flags_are_refused_at_the_first_byte() {
    let allowed = [0x10, 0x20, 0x30, 0x31, 0x32, 0x33, 0x3a, 0x3b, 0x40, 0x82, 0x90, 0xa2, 0xb0, 0xc0, 0xd0, 0xe0];
    for first in 0..=u8::MAX {
        let verdict = decode(&mut BytesMut::from(&[first][..]), LIMIT);
        let expected = if allowed.contains(&first) { Ok(None) } else { Err(MqttError::Type(first)) };
        assert_eq!(verdict, expected, "{first:#x}");
    }
}

#[test]
fn what_the_standard_forbids_is_refused() {
    let bad: &[(&str, &[u8])] = &[
        ("a body in PINGREQ", b"\xc0\x01x"),
        ("a body in DISCONNECT", b"\xe0\x01x"),
        ("PUBACK of three bytes", b"\x40\x03\0\x01\0"),
        ("PUBACK of id 0", b"\x40\x02\0\0"),
        ("SUBSCRIBE without filters", b"\x82\x02\0\x01"),
        ("SUBSCRIBE of id 0", b"\x82\x06\0\0\0\x01a\0"),
        ("reserved QoS bits", b"\x82\x06\0\x01\0\x01a\x04"),
        ("QoS 3", b"\x82\x06\0\x01\0\x01a\x03"),
        ("an empty filter", b"\x82\x05\0\x01\0\0\0"),
        ("a + beside text", b"\x82\x07\0\x01\0\x02a+\0"),
        ("a # that is not last", b"\x82\x08\0\x01\0\x03#/a\0"),
        ("UNSUBSCRIBE without filters", b"\xa2\x02\0\x01"),
        ("an empty topic", b"\x30\x02\0\0"),
        ("a wildcard in a topic", b"\x30\x03\0\x01#"),
        ("U+0000 in a topic", b"\x30\x03\0\x01\0"),
        ("a topic that is not UTF-8", b"\x30\x03\0\x01\xff"),
        ("a surrogate", b"\x30\x05\0\x03\xed\xa0\x80"),
        ("another protocol", b"\x10\x0c\0\x04MQTX\x04\x02\0\0\0\0"),
        ("the reserved flag", b"\x10\x0c\0\x04MQTT\x04\x03\0\0\0\0"),
        ("a password without a user name", b"\x10\x0e\0\x04MQTT\x04\x42\0\0\0\0\0\0"),
        ("will flags without a will", b"\x10\x0c\0\x04MQTT\x04\x22\0\0\0\0"),
        ("will QoS 3", b"\x10\x12\0\x04MQTT\x04\x1e\0\0\0\0\0\x01w\0\0\0"),
        ("bytes after CONNECT", b"\x10\x0d\0\x04MQTT\x04\x02\0\0\0\0x"),
        ("reserved CONNACK flags", b"\x20\x02\x02\0"),
        ("a reserved CONNACK code", b"\x20\x02\0\x06"),
        ("SUBACK without verdicts", b"\x90\x02\0\x01"),
        ("a reserved verdict", b"\x90\x03\0\x01\x03"),
    ];
    for (what, bytes) in bad {
        assert!(decode(&mut BytesMut::from(*bytes), LIMIT).is_err(), "{what}");
    }
    let mut level5 = BytesMut::from(&b"\x10\x0d\0\x04MQTT\x05\x02\0\0\0\0\0"[..]);
    assert_eq!(decode(&mut level5, LIMIT), Err(MqttError::Level(5)));
}

#[test]
fn a_packet_prints_neither_password_nor_stream_token() {
    let mut publish = samples();
    publish.push(Packet::Publish(Publish::at_most_once("$iothub/streams/POST/s/?$rid=1&$auth=canary", "canary")));
    let printed = format!("{publish:?}");
    assert!(!printed.contains("SharedAccess") && !printed.contains("canary"), "{printed}");
}

#[test]
fn too_long_a_text_leaves_the_output_as_it_was() {
    let mut out = BytesMut::from(&b"before"[..]);
    let packet = Packet::Publish(Publish::at_most_once("x".repeat(65_536), ""));
    assert_eq!(encode(&packet, &mut out), Err(MqttError::Unencodable("topic")));
    assert_eq!(out, "before");
}

/// The oracle: another implementation reads what we write, and writes it back to the same bytes.
#[test]
fn another_implementation_agrees() {
    for packet in samples() {
        let ours = bytes_of(&packet);
        let mut codec = v3::Codec::new(0);
        let (theirs, _) = codec.decode(&mut ours.clone()).unwrap().unwrap();
        let mut back = BytesMut::new();
        codec.encode(theirs, &mut back).unwrap();
        assert_eq!(back, ours, "{packet:?}");
    }
}

proptest! {
    /// Whatever we accept, the oracle accepts: we are the stricter of the two.
    #[test]
    fn we_accept_nothing_that_the_oracle_refuses(first in prop::sample::select(vec![0x10u8, 0x20, 0x30, 0x32, 0x82, 0x90, 0xa2]),
                                                 body in prop::collection::vec(prop_oneof![Just(0u8), Just(1), Just(4), any::<u8>()], 0..40)) {
        let mut input = BytesMut::from(&[first, body.len() as u8][..]);
        input.extend_from_slice(&body);
        let theirs = v3::Codec::new(0).decode(&mut input.clone());
        fuzz_mqtt(&input);
        if let Ok(Some(_)) = decode(&mut input, LIMIT) {
            prop_assert!(matches!(theirs, Ok(Some(_))));
        }
    }

    #[test]
    fn mutated_packets_never_panic(index in 0usize..14, at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>()) {
        let mut bytes = bytes_of(&samples()[index]);
        let position = at.index(bytes.len());
        bytes[position] = byte;
        fuzz_mqtt(&bytes);
        fuzz_mqtt(&bytes[..cut.index(bytes.len())]);
    }
}
