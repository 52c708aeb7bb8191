//! The streaming endpoint: tickets, legs, bytes, ends.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use tokio::io::AsyncWriteExt as _;
use tokio_tungstenite::tungstenite::{
    Message,
    protocol::{
        CloseFrame,
        frame::{
            Frame,
            coding::{CloseCode, Control, Data, OpCode},
        },
    },
};

use super::support::{HOST, TestHub, Ws, closed, key, next, send};

/// Receives until `length` bytes have come; checks every message's size.
async fn receive(ws: &mut Ws, length: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < length {
        let message = next(ws).await.unwrap();
        assert!((1..=65_536).contains(&message.len()));
        all.extend(message);
    }
    all
}

#[tokio::test]
async fn bytes_pass_both_ways_and_a_clean_close_is_passed_on() {
    let hub = TestHub::start().await;
    let mut device = hub.device("pump").await;
    let (mut service_leg, mut device_leg) = hub.stream(&mut device, "ssh").await;
    send(&mut service_leg, b"hello").await;
    assert_eq!(next(&mut device_leg).await.unwrap(), b"hello");
    send(&mut device_leg, b"world").await;
    assert_eq!(next(&mut service_leg).await.unwrap(), b"world");
    assert_eq!(hub.metrics.bridges_open.get(), 1);

    // Large, fragmented and empty messages in; text counts as data.
    let big: Vec<u8> = (0..300_000_u32).map(|n| (n / 7) as u8).collect();
    service_leg.feed(Message::binary(big.clone())).await.unwrap();
    service_leg.feed(Message::binary(Vec::new())).await.unwrap();
    let fragments = [(Data::Text, false, "t"), (Data::Continue, false, "ex"), (Data::Continue, true, "t")];
    for (opcode, last, text) in fragments {
        let frame = Frame::message(text.as_bytes().to_vec(), OpCode::Data(opcode), last);
        service_leg.feed(Message::Frame(frame)).await.unwrap();
    }
    service_leg.flush().await.unwrap();
    let received = receive(&mut device_leg, big.len() + 4).await;
    assert!(received[..big.len()] == big && &received[big.len()..] == b"text");

    // Data right before the Close arrives; 1000 is passed on.
    send(&mut service_leg, b"last words").await;
    service_leg.close(None).await.unwrap();
    assert_eq!(next(&mut device_leg).await.unwrap(), b"last words");
    assert_eq!(closed(&mut device_leg).await, (1000, String::new()));
    assert!(matches!(service_leg.next().await, Some(Ok(Message::Close(_)))), "the Close is answered");
    drop((service_leg, device_leg));
    hub.stopped().await;
}

#[tokio::test]
async fn either_leg_may_come_first_and_talk_before_the_other_is_there() {
    let hub = TestHub::start().await;
    let mut device = hub.device("pump").await;
    for device_first in [true, false] {
        let (reply, asked) = hub.accepted(&mut device, "ssh").await;
        let (first, second) = ((reply.url(), reply.token()), (asked.url, asked.auth));
        let (first, second) = if device_first { (second, first) } else { (first, second) };
        let mut early = hub.leg(&first.0, &first.1).await.unwrap();
        early.send(Message::Ping("alone".into())).await.unwrap();
        assert!(matches!(early.next().await, Some(Ok(Message::Pong(payload))) if payload == "alone"));
        send(&mut early, &[b'e'; 100_000]).await;
        early.send(Message::Ping("behind".into())).await.unwrap();
        let mut late = hub.leg(&second.0, &second.1).await.unwrap();
        assert!(receive(&mut late, 100_000).await == [b'e'; 100_000]);
        assert!(matches!(early.next().await, Some(Ok(Message::Pong(payload))) if payload == "behind"));
        send(&mut late, b"and back").await;
        assert_eq!(next(&mut early).await.unwrap(), b"and back");
    }
    hub.stopped().await;
}

#[tokio::test]
async fn an_end_without_a_close_is_told_as_1011() {
    let hub = TestHub::start().await;
    let mut device = hub.device("pump").await;
    // The C sample: data, then TLS torn down without a Close.
    let (mut service_leg, mut device_leg) = hub.stream(&mut device, "ssh").await;
    send(&mut device_leg, b"data before the end").await;
    device_leg.get_mut().shutdown().await.unwrap();
    assert_eq!(next(&mut service_leg).await.unwrap(), b"data before the end");
    assert_eq!(closed(&mut service_leg).await, (1011, "WS disconnected".into()));
    // TCP cut off.
    let (service_leg, mut device_leg) = hub.stream(&mut device, "ssh").await;
    socket2::SockRef::from(service_leg.get_ref().get_ref().0.get_ref()).set_linger(Some(Duration::ZERO)).unwrap();
    drop(service_leg);
    assert_eq!(closed(&mut device_leg).await, (1011, "WS disconnected".into()));
    // A Close that means failure stays one.
    let (mut service_leg, mut device_leg) = hub.stream(&mut device, "ssh").await;
    let failure = CloseFrame { code: CloseCode::from(4000), reason: "no".into() };
    service_leg.close(Some(failure)).await.unwrap();
    assert_eq!(closed(&mut device_leg).await, (1011, "WS disconnected".into()));
    drop((service_leg, device_leg));
    hub.stopped().await;
}

#[tokio::test]
async fn pings_are_answered_and_never_sent() {
    let hub = TestHub::start().await;
    let mut device = hub.device("pump").await;
    let (mut service_leg, mut device_leg) = hub.stream(&mut device, "ssh").await;
    service_leg.send(Message::Pong("unasked".into())).await.unwrap();
    service_leg.send(Message::Ping("ping".into())).await.unwrap();
    assert!(matches!(service_leg.next().await, Some(Ok(Message::Pong(payload))) if payload == "ping"));
    device_leg.send(Message::Ping("back".into())).await.unwrap();
    assert!(matches!(device_leg.next().await, Some(Ok(Message::Pong(payload))) if payload == "back"));
    send(&mut service_leg, b"data").await;
    assert_eq!(next(&mut device_leg).await.unwrap(), b"data");
    drop((service_leg, device_leg));
    hub.stopped().await;
}

#[tokio::test]
async fn protocol_violations_end_the_bridge_with_their_code() {
    let hub = TestHub::start().await;
    let mut device = hub.device("pump").await;
    // An unmasked frame, a reserved bit, a fragmented ping, and a length of 2^62.
    let cases: [(&[u8], u16); 4] = [
        (&[0x82, 0x01, 0x00], 1002),
        (&[0xc2, 0x81, 0, 0, 0, 0, 0], 1002),
        (&[0x09, 0x81, 0, 0, 0, 0, 0], 1002),
        (&[0x82, 0xff, 0x40, 0, 0, 0, 0, 0, 0, 0], 1009),
    ];
    for (bytes, code) in cases {
        let (mut service_leg, mut device_leg) = hub.stream(&mut device, "ssh").await;
        service_leg.get_mut().write_all(bytes).await.unwrap();
        service_leg.get_mut().flush().await.unwrap();
        // The header of the last case is not complete yet: two more mask bytes, then two.
        service_leg.get_mut().write_all(&[0; 4]).await.unwrap();
        assert_eq!(closed(&mut service_leg).await.0, code);
        assert_eq!(closed(&mut device_leg).await, (1011, "WS disconnected".into()));
    }
    // A good stream still works.
    let (mut service_leg, mut device_leg) = hub.stream(&mut device, "ssh").await;
    let close = Frame::from_payload(
        tokio_tungstenite::tungstenite::protocol::frame::FrameHeader {
            opcode: OpCode::Control(Control::Close),
            ..Default::default()
        },
        Vec::new().into(),
    );
    service_leg.send(Message::Frame(close)).await.unwrap();
    assert_eq!(closed(&mut device_leg).await.0, 1000, "a Close without a code is clean: Node's way");
    drop((service_leg, device_leg));
    hub.stopped().await;
}

#[tokio::test]
async fn a_ticket_admits_one_leg_once() {
    let hub = TestHub::start().await;
    let mut device = hub.device("pump").await;
    let (reply, asked) = hub.accepted(&mut device, "ssh").await;
    let (url, token) = (reply.url(), reply.token());
    assert_eq!(hub.leg(&asked.url, &token).await.err(), Some(401), "the service's ticket is not the device's");
    assert_eq!(hub.leg(&url, &asked.auth).await.err(), Some(401));
    assert_eq!(hub.leg(&url, "nonsense").await.err(), Some(401));
    let elsewhere = url.replace("/sid/", "/sid/0");
    assert_eq!(hub.leg(&elsewhere, &token).await.err(), Some(401));
    assert_eq!(hub.leg_with(&url, &[]).await.err(), Some(401));
    let bearer = format!("Bearer {token}");
    let foreign = [("Authorization", bearer.as_str()), ("Origin", "https://evil.example")];
    assert_eq!(hub.leg_with(&url, &foreign).await.err(), Some(403));
    let line = format!("GET {}", &url[url.find("/bridges").unwrap()..]);
    let plain = hub.request(&line, &[format!("Authorization: {bearer}")], "").await;
    assert_eq!(plain.status, 426);
    let leg = hub.leg(&url, &token).await.unwrap();
    assert_eq!(hub.leg(&url, &token).await.err(), Some(401), "used up");
    drop(leg);
    hub.stopped().await;
}

#[tokio::test]
async fn a_connection_is_open_until_it_ends_whatever_it_has_become() {
    let hub = TestHub::start().await;
    let open = async |wanted: i64| {
        let reached = async {
            while hub.metrics.connections_open.get() != wanted {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let reached = tokio::time::timeout(Duration::from_secs(10), reached).await;
        assert!(reached.is_ok(), "{} instead of {wanted}", hub.metrics.connections_open.get());
    };
    let mut device = hub.device("pump").await;
    let (service_leg, device_leg) = hub.stream(&mut device, "ssh").await;
    // The request that made the stream has ended; the control session and both legs have not.
    open(3).await;
    drop((service_leg, device_leg));
    open(1).await;
    drop(device);
    open(0).await;
    hub.stopped().await;
}

#[tokio::test]
async fn a_stream_name_with_a_space_reaches_the_device_as_it_is() {
    let hub = TestHub::start().await;
    let mut device = hub.device("pump").await;
    let (_, asked) = hub.accepted(&mut device, "my%20stream").await;
    assert!(asked.topic.starts_with("$iothub/streams/POST/my stream/?"), "{}", asked.topic);
    hub.stopped().await;
}

#[tokio::test]
async fn one_subprotocol_is_echoed_if_offered_and_never_an_extension() {
    let hub = TestHub::start().await;
    let mut device = hub.device("pump").await;
    let (reply, asked) = hub.accepted(&mut device, "ssh").await;
    let bearer = format!("Bearer {}", reply.token());
    let node = [
        ("Authorization", bearer.as_str()),
        ("Sec-WebSocket-Extensions", "permessage-deflate; client_max_window_bits"),
    ];
    let (service_leg, headers) = hub.leg_with(&reply.url(), &node).await.unwrap();
    assert!(!headers.contains_key("sec-websocket-extensions") && !headers.contains_key("sec-websocket-protocol"));
    let bearer = format!("Bearer {}", asked.auth);
    let c = [("Authorization", bearer.as_str()), ("Sec-WebSocket-Protocol", "MQTT")];
    let (device_leg, headers) = hub.leg_with(&asked.url, &c).await.unwrap();
    assert_eq!(headers.get("sec-websocket-protocol").map(String::as_str), Some("MQTT"));
    drop((service_leg, device_leg));
    hub.stopped().await;
}

#[tokio::test]
async fn a_leg_that_waits_in_vain_is_told() {
    let hub = TestHub::with(|config| config.limits.stream_handshake_timeout = Duration::from_millis(300)).await;
    let mut device = hub.device("pump").await;
    // An answer leaves 15 s at least; a bridge without an answer goes with its request.
    let path = "/twins/pump/streams/ssh";
    let early = async {
        let asked = device.asked().await;
        let leg = hub.leg(&asked.url, &asked.auth).await.unwrap();
        device.publish(&format!("$iothub/streams/res/400/?$rid={}", asked.rid)).await;
        leg
    };
    let (reply, mut leg) = tokio::join!(hub.initiate(path, "5", "5"), early);
    assert_eq!(reply.header("iothub-streaming-is-accepted"), Some("False"));
    assert_eq!(closed(&mut leg).await.0, 1011);
    drop(leg);
    hub.stopped().await;
}

#[tokio::test]
async fn a_daemons_leg_that_has_left_takes_its_bridge_with_it() {
    let hub = TestHub::start().await;
    let mut device = hub.device("pump").await;
    let ended = |reason: &str| hub.metrics.bridges.with_label_values(&[reason]).get();
    let (reply, asked) = hub.accepted(&mut device, "culvert-mux-1").await;
    let mut early = hub.leg(&reply.url(), &reply.token()).await.unwrap();
    send(&mut early, b"hello").await;
    drop(early);
    while ended("service_lost") == 0 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(hub.leg(&asked.url, &asked.auth).await.err(), Some(401), "nobody is there any more");

    let (_, asked) = hub.accepted(&mut device, "culvert-mux-1").await;
    let mut early = hub.leg(&asked.url, &asked.auth).await.unwrap();
    early.close(None).await.unwrap();
    assert!(matches!(early.next().await, Some(Ok(Message::Close(_)))), "the Close is answered");
    while ended("device_closed") == 0 {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    // What a program says before it leaves is delivered.
    let (reply, asked) = hub.accepted(&mut device, "ssh").await;
    let mut early = hub.leg(&reply.url(), &reply.token()).await.unwrap();
    send(&mut early, b"hello").await;
    early.close(None).await.unwrap();
    drop(early);
    tokio::time::sleep(Duration::from_millis(1500)).await;
    let mut late = hub.leg(&asked.url, &asked.auth).await.unwrap();
    assert_eq!(next(&mut late).await.unwrap(), b"hello");
    assert_eq!(closed(&mut late).await.0, 1000);
    drop(late);
    hub.stopped().await;
}

#[tokio::test]
async fn revocation_ends_bridges_at_once() {
    let hub = TestHub::start().await;
    let mut device = hub.device("pump").await;
    let (mut service_leg, mut device_leg) = hub.stream(&mut device, "ssh").await;
    // A change that touches no credential in use changes nothing.
    hub.register("kiosk").await;
    send(&mut service_leg, b"still here").await;
    assert_eq!(next(&mut device_leg).await.unwrap(), b"still here");
    let disabled = hub.put("pump", r#","status":"disabled""#, Some("*")).await;
    assert_eq!(disabled.status, 200, "{}", disabled.body);
    assert_eq!(closed(&mut service_leg).await, (1008, "revoked".into()));
    assert_eq!(closed(&mut device_leg).await, (1008, "revoked".into()));

    let enabled = hub.put("pump", r#","status":"enabled""#, Some("*")).await;
    assert_eq!(enabled.status, 200);
    let mut device = hub.device("pump").await;
    drop((service_leg, device_leg));
    let (mut service_leg, device_leg) = hub.stream(&mut device, "ssh").await;
    let mut config = hub.config.clone();
    config.policies[0].primary_key = key(0x99);
    hub.handle.reconfigure(config).unwrap();
    assert_eq!(closed(&mut service_leg).await, (1008, "revoked".into()));
    drop((service_leg, device_leg));
    hub.stopped().await;
}

#[tokio::test]
async fn a_certificate_in_other_files_is_taken_up_although_the_former_files_are_gone() {
    let hub = TestHub::start().await;
    let mut config = hub.config.clone();
    let former = [config.tls.certificate.path.clone(), config.tls.private_key.path.clone()];
    let made = rcgen::generate_simple_self_signed([HOST.to_owned()]).unwrap();
    config.tls.certificate.path = hub.folder.join("moved.pem");
    config.tls.private_key.path = hub.folder.join("moved.key");
    std::fs::write(&config.tls.certificate.path, made.cert.pem()).unwrap();
    std::fs::write(&config.tls.private_key.path, made.signing_key.serialize_pem()).unwrap();
    former.iter().for_each(|file| std::fs::remove_file(file).unwrap());
    config.policies.retain(|policy| policy.name.as_str() != "weak");
    hub.handle.reconfigure(config.clone()).unwrap();
    assert_eq!(hub.handle.tls.leaf(), *made.cert.der());
    assert!(hub.handle.shared.config().policy(&"weak".parse().unwrap()).is_none());
    hub.stopped().await;
}

#[tokio::test]
async fn who_is_revoked_while_a_stream_is_initiated_gets_none() {
    let hub = TestHub::start().await;
    let mut device = hub.device("pump").await;
    let answer = async {
        let asked = device.asked().await;
        // The first change is looked at immediately by the control session, the next one a second later.
        hub.register("kiosk").await;
        assert_eq!(hub.put("pump", r#","status":"disabled""#, Some("*")).await.status, 200);
        device.publish(&format!("$iothub/streams/res/200/?$rid={}", asked.rid)).await;
        asked
    };
    let (reply, asked) = tokio::join!(hub.initiate("/twins/pump/streams/ssh", "5", "5"), answer);
    assert_eq!(reply.status, 404, "{}", reply.body);
    assert_eq!(hub.leg(&asked.url, &asked.auth).await.err(), Some(401), "its bridge is gone");
    hub.stopped().await;
}

#[tokio::test]
async fn a_device_that_lost_its_leg_says_so() {
    let hub = TestHub::start().await;
    hub.register("kiosk").await;
    let (mut device, mut kiosk) = (hub.device("pump").await, hub.device("kiosk").await);
    let (reply, asked) = hub.accepted(&mut device, "culvert-mux-1").await;
    let mut service_leg = hub.leg(&reply.url(), &reply.token()).await.unwrap();
    let mut device_leg = hub.leg(&asked.url, &asked.auth).await.unwrap();
    let sid = crate::proto::control::sid_of_url(&asked.url).unwrap();
    // Another device's word does not count.
    kiosk.publish(&format!("$culvert/streams/lost/?sid={sid}")).await;
    kiosk.send(&crate::proto::mqtt::Packet::PingReq).await;
    assert!(matches!(kiosk.packet().await, Some(crate::proto::mqtt::Packet::PingResp)));
    send(&mut service_leg, b"still here").await;
    assert_eq!(next(&mut device_leg).await.unwrap(), b"still here");
    device.publish(&format!("$culvert/streams/lost/?sid={sid}")).await;
    assert_eq!(closed(&mut service_leg).await, (1011, "WS disconnected".into()));
    drop((service_leg, device_leg));
    hub.stopped().await;
}

#[tokio::test]
async fn at_shutdown_mux_bridges_end_and_plain_ones_finish() {
    let hub = TestHub::with(|config| config.limits.drain_timeout = Duration::from_secs(30)).await;
    let mut device = hub.device("pump").await;
    let (mut mux_service, mut mux_device) = hub.stream(&mut device, "culvert-mux-1").await;
    let (mut service_leg, mut device_leg) = hub.stream(&mut device, "ssh").await;
    hub.stop();
    assert_eq!(closed(&mut mux_service).await.0, 1012);
    assert_eq!(closed(&mut mux_device).await.0, 1012);
    drop((mux_service, mux_device));
    send(&mut service_leg, b"the rest of a copy").await;
    assert_eq!(next(&mut device_leg).await.unwrap(), b"the rest of a copy");
    device_leg.close(None).await.unwrap();
    assert_eq!(closed(&mut service_leg).await.0, 1000);
    drop((service_leg, device_leg));
    hub.stopped().await;
}

/// Sends until nothing goes for a while: the hub does not hold what its reader does not take. How many were sent.
async fn send_until_it_stalls(leg: &mut Ws, chunk: &[u8]) -> usize {
    let mut sent = 0_usize;
    while tokio::time::timeout(Duration::from_millis(500), leg.send(Message::binary(chunk.to_vec()))).await.is_ok() {
        sent += 1;
        assert!(sent < 2000, "the hub holds {} MB", sent * 65 / 1000);
    }
    sent
}

#[tokio::test]
async fn a_sender_that_left_ends_the_bridge_even_if_its_receiver_takes_nothing() {
    let hub = TestHub::with(|config| config.limits.write_stall_timeout = Duration::from_millis(20)).await;
    let mut device = hub.device("pump").await;
    for leaves in ["service", "device"] {
        let (service_leg, device_leg) = hub.stream(&mut device, "ssh").await;
        let (mut sender, receiver) =
            if leaves == "service" { (service_leg, device_leg) } else { (device_leg, service_leg) };
        send_until_it_stalls(&mut sender, &[7; 65_000]).await;
        socket2::SockRef::from(sender.get_ref().get_ref().0.get_ref()).set_linger(Some(Duration::ZERO)).unwrap();
        drop(sender);
        while hub.metrics.bridges_open.get() > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        drop(receiver);
    }
    hub.stopped().await;
}

#[tokio::test]
async fn a_stalled_reader_stops_the_sender_and_loses_nothing() {
    // A sender that is there may wait for its receiver: looked at during the stall.
    let hub = TestHub::with(|config| config.limits.write_stall_timeout = Duration::from_millis(10)).await;
    let mut device = hub.device("pump").await;
    let (mut service_leg, mut device_leg) = hub.stream(&mut device, "ssh").await;
    let chunk: Vec<u8> = (0..65_000_u32).map(|n| n as u8).collect();
    let sent = send_until_it_stalls(&mut service_leg, &chunk).await;
    // The message that was cut short is in the sender's buffer: flush it while the other side reads.
    let total = (sent + 1) * chunk.len();
    let (flushed, received) = tokio::join!(service_leg.flush(), receive(&mut device_leg, total));
    flushed.unwrap();
    assert!(received.chunks(chunk.len()).all(|received| received == chunk));
    drop((service_leg, device_leg));
    hub.stopped().await;
}
