use std::time::Duration;

use futures_util::future::poll_immediate;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, protocol::Role},
};

use super::*;
use crate::transport::tls::testing::Hoard;

type Duplex = Carrier<DuplexStream>;

const QUIET: CarrierOptions = CarrierOptions { liveness: None };

/// A daemon's carrier and the hub's, over a pipe of `capacity` bytes.
async fn pair_with(options: CarrierOptions, capacity: usize) -> (Duplex, Duplex) {
    let (near, far) = duplex(capacity);
    let client = Carrier::new(near, Bytes::new(), End::Client, options);
    (client, Carrier::server(far, Bytes::new(), QUIET))
}

async fn pair() -> (Duplex, Duplex) {
    pair_with(CarrierOptions::DATA, 64 * 1024).await
}

/// A carrier against a bare WebSocket, for what our own end would never send.
async fn against_websocket(options: CarrierOptions) -> (Duplex, WebSocketStream<DuplexStream>) {
    let (near, far) = duplex(1 << 20);
    let client = Carrier::new(near, Bytes::new(), End::Client, options);
    (client, WebSocketStream::from_raw_socket(far, Role::Server, None).await)
}

fn error_of(result: io::Result<usize>) -> CarrierError {
    CarrierError::of(&result.unwrap_err()).unwrap().clone()
}

#[tokio::test]
async fn bytes_arrive_in_order_both_ways() {
    let (mut client, mut server) = pair().await;
    let mut got = [0; 5];
    client.write_all(b"hello").await.unwrap();
    client.flush().await.unwrap();
    server.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"hello");
    server.write_all(b"world").await.unwrap();
    server.flush().await.unwrap();
    client.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"world");
}

#[tokio::test]
async fn a_large_write_through_a_small_pipe_arrives_whole() {
    let (client, server) = pair_with(CarrierOptions::DATA, 1000).await;
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let (mut read, mut write) = tokio::io::split(client);
    let (mut far_read, mut far_write) = tokio::io::split(server);
    let mut got = Vec::new();
    let mut echoed = vec![0; sent.len()];
    tokio::join!(
        async {
            write.write_all(&sent).await.unwrap();
            write.flush().await.unwrap();
        },
        async {
            let mut piece = vec![0; 10_000];
            while got.len() < sent.len() {
                let length = far_read.read(&mut piece).await.unwrap();
                got.extend_from_slice(&piece[..length]);
                far_write.write_all(&piece[..length]).await.unwrap();
                far_write.flush().await.unwrap();
            }
        },
        async {
            read.read_exact(&mut echoed).await.unwrap();
        },
    );
    assert!(got == sent && echoed == sent);
}

#[tokio::test]
async fn shutdown_delivers_what_was_written_then_a_clean_end() {
    let (mut client, mut server) = pair().await;
    client.write_all(b"last words").await.unwrap();
    let mut got = Vec::new();
    let (ended, read) = tokio::join!(client.shutdown(), async {
        let read = server.read_to_end(&mut got).await;
        server.shutdown().await.unwrap();
        read
    });
    ended.unwrap();
    assert_eq!(read.unwrap(), 10);
    assert_eq!(got, b"last words");
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0, "the other end answered with the same code");
    assert_eq!(client.write(b"x").await.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

#[tokio::test]
async fn what_was_on_its_way_can_be_read_after_shutdown() {
    let (mut client, mut server) = pair().await;
    server.write_all(b"in flight").await.unwrap();
    server.flush().await.unwrap();
    let mut got = Vec::new();
    let (ended, _) = tokio::join!(client.shutdown(), server.read_to_end(&mut got));
    ended.unwrap();
    client.read_to_end(&mut got).await.unwrap();
    assert_eq!(got, b"in flight");
}

#[tokio::test]
async fn a_dropped_connection_is_not_an_end() {
    let (mut client, server) = pair().await;
    drop(server);
    assert!(matches!(error_of(client.read(&mut [0; 8]).await), CarrierError::Lost(_)));
    assert!(matches!(error_of(client.read(&mut [0; 8]).await), CarrierError::Lost(_)), "and stays so");
}

#[tokio::test]
async fn a_close_with_another_code_is_an_error_that_names_it() {
    let (mut client, server) = pair().await;
    let mut buf = [0; 8];
    let (closed, read) = tokio::join!(server.close(4001, "taken over"), client.read(&mut buf));
    closed.unwrap();
    let error = error_of(read);
    assert_eq!(error, CarrierError::Closed { code: 4001, reason: "taken over".into() });
    assert_eq!(error.to_string(), "closed by the other end with 4001: taken over");
    let error = client.write(b"x").await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    client.shutdown().await.unwrap();
}

#[tokio::test]
async fn a_close_without_a_code_is_an_end() {
    let (mut client, mut ws) = against_websocket(QUIET).await;
    let (sent, read) = tokio::join!(ws.close(None), async { client.read(&mut [0; 8]).await });
    sent.unwrap();
    assert_eq!(read.unwrap(), 0);
}

#[tokio::test]
async fn a_read_into_nothing_is_not_an_end_and_takes_nothing() {
    let (mut client, mut server) = pair().await;
    server.write_all(b"x").await.unwrap();
    server.flush().await.unwrap();
    assert_eq!(client.read(&mut []).await.unwrap(), 0);
    assert_eq!(client.read_u8().await.unwrap(), b'x');
}

#[tokio::test]
async fn empty_messages_are_swallowed_and_text_is_data() {
    use futures_util::SinkExt;
    let (mut client, mut ws) = against_websocket(QUIET).await;
    for message in [Message::Binary(Bytes::new()), Message::Text("te".into()), Message::Binary("xt".into())] {
        ws.send(message).await.unwrap();
    }
    let mut got = [0; 4];
    client.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"text");
}

#[tokio::test]
async fn a_message_never_exceeds_what_every_receiver_takes() {
    use futures_util::StreamExt;
    let (mut client, mut ws) = against_websocket(QUIET).await;
    client.write_all(&[7; 200_000]).await.unwrap();
    client.flush().await.unwrap();
    let mut total = 0;
    while total < 200_000 {
        let Message::Binary(data) = ws.next().await.unwrap().unwrap() else { panic!("not binary") };
        assert!(!data.is_empty() && data.len() <= 65_536);
        total += data.len();
    }
}

#[tokio::test]
async fn a_cancelled_write_loses_and_repeats_nothing() {
    let (mut client, mut server) = pair_with(CarrierOptions::DATA, 256).await;
    let mut sent = 0_u64;
    let mut received = Vec::new();
    let mut piece = vec![0; 5000];
    while sent < 400_000 {
        let bytes: Vec<u8> = (sent..sent + 7000).map(|n| (n % 253) as u8).collect();
        // Each write races with a read at the other end; whichever is second is cancelled wherever it stands.
        tokio::select! {
            written = client.write(&bytes) => sent += written.unwrap() as u64,
            length = server.read(&mut piece) => received.extend_from_slice(&piece[..length.unwrap()]),
        }
    }
    let (ended, rest) = tokio::join!(client.shutdown(), server.read_to_end(&mut received));
    ended.unwrap();
    rest.unwrap();
    assert_eq!(received.len() as u64, sent);
    assert!(received.iter().enumerate().all(|(n, byte)| *byte == (n as u64 % 253) as u8));
}

#[tokio::test(start_paused = true)]
async fn pings_measure_the_round_trip_and_a_silent_peer_is_dead_after_37_s() {
    let (mut client, mut server) = pair().await;
    let monitor = client.monitor();
    let began = Instant::now();
    {
        // The hub answers while it reads.
        let idle = async { tokio::time::timeout(Duration::from_secs(60), server.read_u8()).await };
        let waiting = async { tokio::time::timeout(Duration::from_secs(60), client.read_u8()).await };
        let (server, client) = tokio::join!(idle, waiting);
        assert!(server.is_err() && client.is_err(), "idle is alive");
    }
    assert!(monitor.rtt().is_some() && !monitor.is_suspect());
    // Now it reads no more.
    let error = error_of(client.read(&mut [0; 8]).await);
    assert!(matches!(error, CarrierError::Silent(_)), "{error}");
    assert!(monitor.is_suspect());
    let lasted = began.elapsed() - Duration::from_secs(60);
    assert!(lasted >= Duration::from_secs(22) && lasted <= Duration::from_secs(38), "{lasted:?}");
}

#[tokio::test(start_paused = true)]
async fn unanswered_data_makes_a_carrier_suspect_within_5_s_and_any_answer_clears_it() {
    let (mut client, mut server) = pair().await;
    let monitor = client.monitor();
    let greeted = tokio::time::timeout(Duration::from_secs(1), client.read_u8());
    let (_, _) = tokio::join!(greeted, tokio::time::timeout(Duration::from_secs(1), server.read_u8()));
    let (mut read, mut write) = tokio::io::split(client);
    write.write_all(b"?").await.unwrap();
    write.flush().await.unwrap();
    let began = Instant::now();
    tokio::select! {
        () = monitor.suspect() => {}
        _ = read.read_u8() => panic!("nobody answers"),
    }
    assert!(began.elapsed() >= Duration::from_secs(5) && began.elapsed() < Duration::from_secs(6));
    assert_eq!(server.read_u8().await.unwrap(), b'?');
    tokio::select! {
        () = monitor.recovered() => {}
        _ = async { tokio::join!(read.read_u8(), server.read_u8()) } => panic!("no data"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_probe_is_sent_at_once() {
    let (mut client, mut server) = pair().await;
    let monitor = client.monitor();
    let both = async { tokio::join!(client.read_u8(), server.read_u8()) };
    tokio::select! {
        _ = both => panic!("no data"),
        () = async {
            tokio::time::sleep(Duration::from_secs(8)).await;
            assert!(monitor.silent_for() >= Duration::from_secs(7));
            monitor.probe();
            tokio::time::sleep(Duration::from_millis(50)).await;
        } => {}
    }
    assert!(monitor.silent_for() < Duration::from_secs(1));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_does_not_answer_our_close_is_not_waited_for_long() {
    let (mut client, _server) = pair().await;
    let began = Instant::now();
    client.shutdown().await.unwrap();
    assert!(began.elapsed() <= Duration::from_secs(4));
    assert!(matches!(error_of(client.read(&mut [0; 8]).await), CarrierError::Lost(_)), "never a clean end");
}

#[tokio::test]
async fn a_reader_parked_elsewhere_learns_of_the_end_that_a_shutdown_found() {
    let (client, mut server) = pair().await;
    let (mut read, mut write) = tokio::io::split(client);
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(async move { read.read_u8().await.map(drop) });
    tokio::task::yield_now().await;
    let (ended, _) = tokio::join!(write.shutdown(), async { server.read_to_end(&mut Vec::new()).await });
    ended.unwrap();
    let error = tasks.join_next().await.unwrap().unwrap().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "read_u8's word for a clean end");
}

#[tokio::test]
async fn frames_that_break_the_rules_end_the_carrier_with_their_code_and_never_cleanly() {
    let table: [(&[u8], u16, &str); 9] = [
        (b"\x82\x01x", 1002, "unmasked"),
        (b"\xc2\x81\0\0\0\0x", 1002, "reserved bit"),
        (b"\x83\x81\0\0\0\0x", 1002, "reserved opcode"),
        (b"\x09\x80\0\0\0\0", 1002, "fragmented ping"),
        (b"\x89\xfe\x00\x7e\0\0\0\0", 1002, "long ping"),
        (b"\x80\x81\0\0\0\0x", 1002, "continuation of nothing"),
        (b"\x88\x81\0\0\0\0x", 1002, "half a close code"),
        (b"\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff\0\0\0\0", 1009, "endless frame"),
        (b"\x82\xff\0\0\0\0\0\x40\0\x01\0\0\0\0", 1009, "a byte too long"),
    ];
    for (bytes, code, what) in table {
        let (mut near, far) = duplex(64 * 1024);
        let mut server = Carrier::server(far, Bytes::new(), CarrierOptions::HUB_CONTROL);
        near.write_all(bytes).await.unwrap();
        // A ping of 126 bytes is complete only with its payload.
        near.write_all(&[0; 126]).await.unwrap();
        let error = error_of(server.read(&mut [0; 8]).await);
        assert!(matches!(error, CarrierError::Protocol(_)), "{what}: {error}");
        server.shutdown().await.unwrap();
        let mut answer = Vec::new();
        near.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, [&[0x88, 2], &code.to_be_bytes()[..]].concat(), "{what}");
    }
}

#[tokio::test]
async fn a_connection_that_is_reset_in_mid_message_is_lost() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (mut far, _) = listener.accept().await.unwrap();
    let mut client = Carrier::new(near, Bytes::new(), End::Client, CarrierOptions::DATA);
    far.write_all(b"\x82\x04whol\x82\x7e\x10\x00half").await.unwrap();
    let mut got = [0; 4];
    client.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"whol");
    crate::transport::net::Socket::Tcp(far).reset();
    let error = loop {
        match client.read(&mut got).await {
            Ok(0) => panic!("half a message is no end"),
            // What came of the message may be read.
            Ok(n) => assert_eq!(&got[..n], b"half"),
            error => break error_of(error),
        }
    };
    assert!(matches!(error, CarrierError::Lost(_)), "{error}");
}

#[tokio::test]
async fn tls_holds_one_message_while_the_kernel_takes_none() {
    let mut client = Carrier::new(Hoard::default(), Bytes::new(), End::Client, QUIET);
    for _ in 0..1000 {
        if poll_immediate(client.write_all(&[7; 1000])).await.is_none() {
            break;
        }
        assert!(poll_immediate(client.flush()).await.is_none());
    }
    let held = client.io.held;
    assert!((1000..MAX_MESSAGE + 14).contains(&held), "{held} bytes wait in TLS, where nothing overtakes them");
}
