use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn hello() -> Packet {
    connect("pump", NODE, Some(token("pump", &key(1))))
}

/// Sends bytes as they are, then nothing, and returns what the hub answered and why it ended.
async fn raw(hub: &Arc<HubShared>, bytes: &[u8]) -> (Vec<u8>, End) {
    let mut peer = Dialogue::pipe(hub, 1 << 20);
    peer.io.write_all(bytes).await.unwrap();
    peer.io.shutdown().await.unwrap();
    let mut answer = Vec::new();
    peer.io.read_to_end(&mut answer).await.unwrap();
    (answer, peer.end().await)
}

#[tokio::test]
async fn a_session_cut_at_any_byte_just_ends() {
    let hub = hub().await;
    let subscribe =
        Subscribe { id: PacketId::new(2).unwrap(), filters: vec![("$iothub/streams/POST/#".into(), Qos::AtMostOnce)] };
    let answer = Publish::at_most_once("$iothub/streams/res/200/?$rid=1", "");
    let login = bytes_of(&hello());
    let story: Vec<u8> = [
        login.clone(),
        bytes_of(&Packet::Subscribe(subscribe)),
        bytes_of(&Packet::Publish(answer)),
        bytes_of(&Packet::PingReq),
    ]
    .concat();
    for cut in 0..story.len() {
        let (answer, end) = raw(&hub, &story[..cut]).await;
        assert!(matches!(end, End::Lost(_)), "cut at {cut}: {end:?}");
        assert_eq!(answer.is_empty(), cut < login.len(), "cut at {cut}");
    }
    assert_eq!(hub.courier.sessions(), 0);
}

#[tokio::test]
async fn a_connect_shortened_anywhere_that_claims_to_be_whole_is_refused() {
    let hub = hub().await;
    let whole = bytes_of(&hello());
    // The length field of this packet has two bytes.
    for body in 0..whole.len() - 3 {
        let mut lie = vec![0x10, (body & 0x7f) as u8 | 0x80, (body >> 7) as u8];
        lie.extend_from_slice(&whole[3..3 + body]);
        let (answer, end) = raw(&hub, &lie).await;
        assert!(matches!(end, End::Malformed(_) | End::Refused(_)), "{body}: {end:?}");
        assert!(answer.is_empty() || answer[3] != 0, "{body}");
    }
}

#[tokio::test]
async fn only_connect_may_come_first_and_only_once() {
    let hub = hub().await;
    let others: [&[u8]; 12] = [
        b"\x20\x02\0\0",
        b"\x30\x03\0\x01t",
        b"\x40\x02\0\x01",
        b"\x50\x02\0\x01",
        b"\x62\x02\0\x01",
        b"\x82\x06\0\x01\0\x01#\0",
        b"\x90\x03\0\x01\0",
        b"\xa2\x05\0\x01\0\x01#",
        b"\xb0\x02\0\x01",
        b"\xc0\0",
        b"\xd0\0",
        b"\xe0\0",
    ];
    for first in others {
        let (answer, end) = raw(&hub, first).await;
        assert!(answer.is_empty(), "{first:x?}");
        assert!(matches!(end, End::Unexpected(_) | End::Malformed(_)), "{first:x?}: {end:?}");
    }
    for second in [&b"\x20\x02\0\0"[..], b"\x90\x03\0\x01\0", b"\xb0\x02\0\x01", b"\xd0\0", b"\x34\x05\0\x01t\0\x01"] {
        let story = [bytes_of(&hello()), second.to_vec()].concat();
        let (answer, end) = raw(&hub, &story).await;
        assert_eq!(answer, b"\x20\x02\0\0");
        assert_eq!(end.close().0, 1002, "{second:x?}: {end:?}");
    }
    let twice = [bytes_of(&hello()), bytes_of(&hello())].concat();
    assert!(matches!(raw(&hub, &twice).await.1, End::Unexpected(_)));
}

#[tokio::test]
async fn other_protocol_levels_are_told_and_http_is_not_answered() {
    let hub = hub().await;
    let (answer, _) = raw(&hub, b"\x10\x0d\0\x04MQTT\x05\x02\0\0\0\0\0").await;
    assert_eq!(answer, b"\x20\x02\0\x01");
    for noise in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\x16\x03\x01\x02\0", b"SSH-2.0-x\r\n", b"\0\0\0\0"] {
        let (answer, end) = raw(&hub, noise).await;
        assert!(answer.is_empty() && matches!(end, End::Malformed(_)), "{noise:?} {end:?}");
    }
}

#[tokio::test]
async fn a_stranger_may_not_send_much() {
    let hub = hub().await;
    let (answer, end) = raw(&hub, b"\x10\x81\x20").await;
    assert!(answer.is_empty());
    assert!(matches!(end, End::Malformed(MqttError::TooLarge { limit: 4096 })), "{end:?}");
    let big = Publish::at_most_once("devices/pump/messages/events/", vec![0; 300 * 1024]);
    let mut peer = Dialogue::pipe(&hub, 1 << 10);
    assert_eq!(peer.log_in(&hello()).await, ConnectCode::Accepted);
    let _ = peer.io.write_all(&bytes_of(&Packet::Publish(big))).await;
    assert!(matches!(peer.end().await, End::Malformed(MqttError::TooLarge { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_stranger_has_ten_seconds_even_if_it_trickles() {
    let hub = hub().await;
    let began = Instant::now();
    let silent = Dialogue::pipe(&hub, 1024);
    assert!(matches!(silent.end().await, End::NoConnect));
    assert_eq!(began.elapsed().as_secs(), 10);
    let mut trickling = Dialogue::pipe(&hub, 1024);
    for byte in bytes_of(&hello()) {
        tokio::time::sleep(Duration::from_millis(500)).await;
        if trickling.io.write_all(&[byte]).await.is_err() {
            break;
        }
    }
    assert!(matches!(trickling.end().await, End::NoConnect));
}

#[tokio::test(start_paused = true)]
async fn silence_beyond_the_promise_ends_a_session_and_pings_keep_it() {
    let hub = hub().await;
    let mut device = Dialogue::pipe(&hub, 1024);
    assert_eq!(device.log_in(&hello()).await, ConnectCode::Accepted);
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_secs(300)).await;
        device.send(&Packet::PingReq).await;
        assert_eq!(device.packet().await, Some(Packet::PingResp));
    }
    let last = Instant::now();
    assert!(matches!(device.end().await, End::Silent));
    assert_eq!(last.elapsed().as_secs(), 360);
}

#[tokio::test(start_paused = true)]
async fn a_session_without_keepalive_lives_as_long_as_iot_hub_lets_it() {
    let hub = hub().await;
    let Packet::Connect(mut connect) = hello() else { panic!() };
    connect.keep_alive = 0;
    let mut device = Dialogue::pipe(&hub, 1024);
    assert_eq!(device.log_in(&Packet::Connect(connect)).await, ConnectCode::Accepted);
    let began = Instant::now();
    assert!(matches!(device.end().await, End::Silent));
    assert_eq!(began.elapsed(), MAX_SILENCE);
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_token_is_the_end_of_its_session() {
    let hub = hub().await;
    let Packet::Connect(mut connect) = hello() else { panic!() };
    connect.password = Some(sign("hub.example.com/devices/pump", &key(1), in_an_hour() - 3000, None));
    let mut device = Dialogue::pipe(&hub, 1024);
    assert_eq!(device.log_in(&Packet::Connect(connect)).await, ConnectCode::Accepted);
    let began = Instant::now();
    let pinging = async {
        while device.packet_after(Duration::from_secs(60)).await.is_some() {}
        device
    };
    let device = pinging.await;
    assert!(matches!(device.end().await, End::Expired));
    // Ten minutes, and five more for clocks that disagree.
    assert!((840..=960).contains(&began.elapsed().as_secs()), "{:?}", began.elapsed());
}

impl Dialogue<DuplexStream> {
    async fn packet_after(&mut self, pause: Duration) -> Option<Packet> {
        tokio::time::sleep(pause).await;
        self.io.write_all(&bytes_of(&Packet::PingReq)).await.ok()?;
        self.packet().await
    }
}

#[tokio::test(start_paused = true)]
async fn a_device_that_asks_and_never_reads_is_cut_and_costs_little() {
    let hub = hub().await;
    let mut device = Dialogue::pipe(&hub, 64);
    assert_eq!(device.log_in(&hello()).await, ConnectCode::Accepted);
    let began = Instant::now();
    // Every ping is answered by two bytes that nobody takes. What the hub does not read stays in the pipe.
    let mut taken = 0;
    while device.io.write_all(&bytes_of(&Packet::PingReq)).await.is_ok() {
        taken += 2;
    }
    assert!(taken <= wire::MAX_OUTPUT + 64 + 8 * 1024 + 64, "{taken} bytes were taken");
    assert!(matches!(device.end().await, End::Stalled));
    assert_eq!(began.elapsed().as_secs(), 30);
}

/// What one packet may do to a session that was let in.
fn any_packet() -> impl Strategy<Value = Vec<u8>> {
    let topic = prop_oneof![
        Just("$iothub/streams/res/200/?$rid=".to_owned()),
        Just("$iothub/twin/GET/?$rid=".to_owned()),
        Just("devices/pump/messages/events/".to_owned()),
        Just("$culvert/streams/lost/?sid=".to_owned()),
        Just(String::new()),
    ];
    let publish = (topic, "\\PC{0,40}", any::<Option<u16>>()).prop_map(|(prefix, tail, id)| {
        let id = id.and_then(PacketId::new);
        Packet::Publish(Publish { id, ..Publish::at_most_once(format!("{prefix}{tail}"), "x") })
    });
    let subscribe = prop::collection::vec("[$a-z/+#]{1,20}", 1..5).prop_map(|filters| {
        let filters = filters.into_iter().map(|filter| (filter, Qos::AtLeastOnce)).collect();
        Packet::Subscribe(Subscribe { id: PacketId::MIN, filters })
    });
    prop_oneof![
        publish.prop_map(|packet| bytes_of(&packet)),
        subscribe.prop_map(|packet| bytes_of(&packet)),
        prop::collection::vec(any::<u8>(), 0..64),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_session_survives_or_ends_but_never_panics(packets in prop::collection::vec(any_packet(), 1..8)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let hub = hub().await;
            let story = [bytes_of(&hello()), packets.concat()].concat();
            let (answer, _) = raw(&hub, &story).await;
            assert_eq!(&answer[..4], b"\x20\x02\0\0");
            assert_eq!(hub.courier.sessions(), 0);
        });
    }

    #[test]
    fn login_parsing_never_panics(text in "\\PC{0,80}", bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        fuzz_login(text.as_bytes());
        fuzz_login(format!("hub.example.com/{text}{text}").as_bytes());
        fuzz_login(format!("SharedAccessSignature sr={text}&sig={text}&se=1").as_bytes());
        fuzz_login(&bytes);
    }
}
