//! Stories of channels over a pipe.

use std::io::ErrorKind;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Context;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex};
use tokio::task::JoinSet;

use super::*;

/// Two muxes on a pipe, their drivers in a set.
struct Pair {
    client: Mux,
    server: Mux,
    incoming: Incoming,
    /// Opened by the server: rarely used.
    backwards: Incoming,
    drivers: JoinSet<Result<(), MuxError>>,
}

impl Pair {
    fn new() -> Self {
        Self::with(64 * 1024, |options| options)
    }

    fn with(pipe: usize, change: impl Fn(MuxOptions) -> MuxOptions) -> Self {
        let (near, far) = duplex(pipe);
        let (client, backwards, client_driver) = start(near, change(MuxOptions::new(Role::Client)));
        let (server, incoming, server_driver) = start(far, change(MuxOptions::new(Role::Server)));
        let mut drivers = JoinSet::new();
        drivers.spawn(client_driver);
        drivers.spawn(server_driver);
        Self { client, server, incoming, backwards, drivers }
    }

    async fn channel(&mut self) -> (Channel, Channel) {
        let near = self.client.open().await.unwrap();
        (near, self.incoming.accept().await.unwrap())
    }
}

/// A mux against a peer that the test plays itself, byte by byte.
impl Tunnel for DuplexStream {}

fn against_bytes(role: Role) -> (Mux, Incoming, JoinSet<Result<(), MuxError>>, DuplexStream) {
    let (near, far) = duplex(64 * 1024);
    let (mux, incoming, driver) = start(near, MuxOptions::new(role));
    let mut drivers = JoinSet::new();
    drivers.spawn(driver);
    (mux, incoming, drivers, far)
}

fn noise(len: usize) -> Vec<u8> {
    (0..len as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_end_is_an_end() {
    let mut pair = Pair::new();
    let (mut near, mut far) = pair.channel().await;
    assert_eq!((near.id(), far.id()), (1, 1));
    near.write_all(b"ping").await.unwrap();
    near.shutdown().await.unwrap();
    let mut heard = Vec::new();
    far.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard, b"ping");
    far.write_all(&noise(3_000_000)[..]).await_with(&mut near).await;
    far.shutdown().await.unwrap();
    let mut end = Vec::new();
    near.read_to_end(&mut end).await.unwrap();
    assert!(end.is_empty());
    drop((near, far));
    while pair.client.channels() + pair.server.channels() > 0 {
        tokio::task::yield_now().await;
    }
}

/// Writes while the other side reads and compares.
trait AwaitWith {
    async fn await_with(self, reader: &mut Channel);
}

impl<F: Future<Output = io::Result<()>>> AwaitWith for F {
    async fn await_with(self, reader: &mut Channel) {
        let mut heard = vec![0; 3_000_000];
        let (written, read) = tokio::join!(self, reader.read_exact(&mut heard));
        written.unwrap();
        read.unwrap();
        assert!(heard == noise(3_000_000));
    }
}

#[tokio::test]
async fn a_drop_is_a_reset_in_every_state() {
    for state in 0..6 {
        let mut pair = Pair::new();
        let (mut near, mut far) = pair.channel().await;
        near.write_all(b"x").await.unwrap();
        let mut byte = [0];
        far.read_exact(&mut byte).await.unwrap();
        match state {
            0 => {}
            1 => far.shutdown().await.unwrap(),
            2 => near.shutdown().await.unwrap(),
            3 => {
                near.shutdown().await.unwrap();
                assert_eq!(far.read(&mut byte).await.unwrap(), 0);
            }
            4 => {
                far.shutdown().await.unwrap();
                assert_eq!(near.read(&mut byte).await.unwrap(), 0);
            }
            _ => far.write_all(b"unsent, perhaps").await.unwrap(),
        }
        drop(far);
        let mut rest = Vec::new();
        match state {
            // The far end's direction had ended and was read: only writing can tell.
            4 => {
                while near.write(b"y").await.is_ok() {
                    tokio::task::yield_now().await;
                }
            }
            _ => {
                assert_eq!(near.read_to_end(&mut rest).await.unwrap_err().kind(), ErrorKind::ConnectionReset, "{state}")
            }
        }
    }
}

#[tokio::test]
async fn dropped_after_both_ends_a_channel_still_delivers() {
    let mut pair = Pair::new();
    let (mut near, mut far) = pair.channel().await;
    far.shutdown().await.unwrap();
    let mut end = Vec::new();
    near.read_to_end(&mut end).await.unwrap();
    let data = noise(200_000);
    near.write_all(&data).await.unwrap();
    near.shutdown().await.unwrap();
    drop(near);
    let mut heard = Vec::new();
    far.read_to_end(&mut heard).await.unwrap();
    assert!(heard == data);
}

#[tokio::test]
async fn a_dead_tunnel_is_an_abort_behind_what_was_received() {
    let mut pair = Pair::new();
    let (mut near, mut far) = pair.channel().await;
    let (mut ended, mut other) = pair.channel().await;
    near.write_all(b"half a sen").await.unwrap();
    ended.write_all(b"whole").await.unwrap();
    ended.shutdown().await.unwrap();
    let mut start = [0; 4];
    far.read_exact(&mut start).await.unwrap();
    other.read_exact(&mut start).await.unwrap();
    pair.drivers.abort_all();
    pair.server.closed().await;
    pair.client.closed().await;
    let mut rest = Vec::new();
    assert_eq!(far.read_to_end(&mut rest).await.unwrap_err().kind(), ErrorKind::ConnectionAborted);
    assert_eq!(rest, b" a sen");
    assert_eq!(far.write(b"x").await.unwrap_err().kind(), ErrorKind::ConnectionAborted);
    rest.clear();
    other.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"e");
    assert_eq!(near.read(&mut start).await.unwrap_err().kind(), ErrorKind::ConnectionAborted);
    assert_eq!(pair.client.open().await.unwrap_err(), OpenError::Closed);
    assert!(pair.incoming.accept().await.is_none());
}

#[tokio::test]
async fn closing_tells_the_peer_and_both_drivers_end_well() {
    let mut pair = Pair::new();
    let (mut near, mut far) = pair.channel().await;
    let (mut done, mut reader) = pair.channel().await;
    reader.shutdown().await.unwrap();
    done.read_to_end(&mut Vec::new()).await.unwrap();
    done.write_all(&noise(100_000)).await.unwrap();
    done.shutdown().await.unwrap();
    drop(done);
    pair.client.close();
    assert!(pair.client.is_closed());
    for _ in 0..2 {
        pair.drivers.join_next().await.unwrap().unwrap().unwrap();
    }
    assert!(far.read(&mut [0]).await.is_err());
    assert_eq!(near.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionAborted);
    let mut heard = Vec::new();
    reader.read_to_end(&mut heard).await.unwrap();
    assert!(heard == noise(100_000), "what a finished channel had to say was sent first");
    assert!(pair.backwards.accept().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn a_close_that_finds_no_way_out_ends_in_time() {
    let (near, _far) = duplex(16);
    let (mux, _incoming, driver) = start(near, MuxOptions::new(Role::Client));
    let mut drivers = JoinSet::new();
    drivers.spawn(driver);
    let mut channel = mux.open().await.unwrap();
    channel.write_all(&noise(1000)).await.unwrap();
    tokio::task::yield_now().await;
    mux.close();
    let ended = tokio::time::timeout(Duration::from_secs(6), drivers.join_next()).await.unwrap().unwrap().unwrap();
    assert!(matches!(ended, Err(MuxError::CloseTimeout)), "{ended:?}");
}

#[tokio::test]
async fn opening_waits_for_room_and_a_cancelled_wait_costs_none() {
    let mut pair = Pair::with(1024, |options| MuxOptions { max_channels: 2, ..options });
    let (near, far) = pair.channel().await;
    let second = pair.client.open().await.unwrap();
    let waits = tokio::time::timeout(Duration::from_millis(5), pair.client.open()).await;
    assert!(waits.is_err());
    let (third, ()) = tokio::join!(pair.client.open(), async {
        near.reset();
        drop(far);
    });
    assert_eq!(third.unwrap().id(), 5);
    drop(second);
    pair.client.open().await.unwrap();
}

#[tokio::test]
async fn a_stalled_reader_stops_only_its_own_channel() {
    let mut pair = Pair::new();
    let (mut stuck, _unread) = pair.channel().await;
    let (mut near, mut far) = pair.channel().await;
    let data = noise(4_000_000);
    let writer = async {
        loop {
            if stuck.write(&data).await.is_err() {
                return;
            }
        }
    };
    let flow = async {
        let mut heard = vec![0; data.len()];
        let (written, read) = tokio::join!(near.write_all(&data), far.read_exact(&mut heard));
        written.unwrap();
        read.unwrap();
        assert!(heard == data);
    };
    tokio::select! {
        () = writer => panic!("the stalled channel failed"),
        () = flow => {}
    }
    let unread = pair.server.shared.lock().core.unread();
    assert!(unread <= 256 * 1024, "{unread}");
}

#[tokio::test(start_paused = true)]
async fn too_much_unread_data_costs_the_worst_reader_its_channel() {
    let mut pair = Pair::with(64 * 1024, |options| MuxOptions { max_buffered: 600 * 1024, ..options });
    let mut channels = Vec::new();
    for _ in 0..3 {
        let (mut near, far) = pair.channel().await;
        near.write_all(&noise(250_000)).await.unwrap();
        channels.push((near, far));
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let mut failed = 0;
    for (_near, far) in &mut channels {
        let mut heard = vec![0; 250_000];
        failed += usize::from(far.read_exact(&mut heard).await.is_err());
    }
    assert_eq!(failed, 1, "one made room for the two others");
    let (mut near, mut far) = pair.channel().await;
    near.write_all(b"alive").await.unwrap();
    far.read_exact(&mut [0; 5]).await.unwrap();
}

#[tokio::test]
async fn dropping_incoming_refuses_channels_but_not_the_mux() {
    let pair = Pair::new();
    drop(pair.incoming);
    let mut refused = pair.client.open().await.unwrap();
    assert_eq!(refused.read(&mut [0]).await.unwrap_err().kind(), ErrorKind::ConnectionReset);
    let mut backwards = pair.backwards;
    let mut far = pair.server.open().await.unwrap();
    far.write_all(b"x").await.unwrap();
    let mut near = backwards.accept().await.unwrap();
    assert_eq!((near.id(), near.read_u8().await.unwrap()), (2, b'x'));
}

#[tokio::test]
async fn a_violation_ends_the_mux_with_go_away_one() {
    let (_mux, mut incoming, mut drivers, mut peer) = against_bytes(Role::Server);
    // Data and SYN with a length one above the window: what panicked another implementation.
    peer.write_all(&[0, 0, 0, 1, 0, 0, 0, 1, 0, 4, 0, 1]).await.unwrap();
    let ended = drivers.join_next().await.unwrap().unwrap();
    assert!(matches!(ended, Err(MuxError::Violation(_))), "{ended:?}");
    let mut heard = Vec::new();
    peer.read_to_end(&mut heard).await.unwrap();
    assert_eq!(heard[heard.len() - 12..], [0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    assert!(incoming.accept().await.is_none());
}

#[tokio::test]
async fn a_stream_cut_in_a_frame_is_no_clean_end() {
    let (_mux, _incoming, mut drivers, mut peer) = against_bytes(Role::Server);
    peer.write_all(&[0, 0, 0]).await.unwrap();
    drop(peer);
    assert!(matches!(drivers.join_next().await.unwrap().unwrap(), Err(MuxError::Truncated | MuxError::Io(_))));
}

#[tokio::test]
async fn a_flood_of_pings_from_a_peer_that_does_not_read_ends_the_mux() {
    let (_mux, _incoming, mut drivers, mut peer) = against_bytes(Role::Server);
    let mut sent = 0;
    while peer.write_all(&[0, 2, 0, 1, 0, 0, 0, 0, 0, 0, 0, 9]).await.is_ok() {
        sent += 1;
        assert!(sent < 100_000, "the flood was not noticed");
    }
    let ended = drivers.join_next().await.unwrap().unwrap();
    assert!(matches!(ended, Err(MuxError::Violation(_))), "{ended:?}");
}

#[tokio::test]
async fn chunks_and_slices_carry_the_same_bytes() {
    let mut pair = Pair::new();
    let (mut near, mut far) = pair.channel().await;
    let data = noise(400_000);
    let write = async {
        let mut left = &data[..];
        while !left.is_empty() {
            let (a, b) = left.split_at(left.len().min(1000));
            let slices = [io::IoSlice::new(a), io::IoSlice::new(b)];
            let n = near.write_vectored(&slices).await.unwrap();
            left = &left[n..];
        }
        near.shutdown().await.unwrap();
    };
    let read = async {
        let mut heard = Vec::new();
        while let Some(chunk) = poll_fn(|cx| far.poll_read_chunk(cx)).await.unwrap() {
            assert!(!chunk.is_empty() && chunk.len() <= 16 * 1024);
            heard.extend_from_slice(&chunk);
        }
        heard
    };
    let ((), heard) = tokio::join!(write, read);
    assert!(heard == data);
    assert_eq!(far.read(&mut []).await.unwrap(), 0);
}

#[tokio::test]
async fn writing_after_the_end_is_a_broken_pipe() {
    let mut pair = Pair::new();
    let (mut near, _far) = pair.channel().await;
    near.shutdown().await.unwrap();
    near.shutdown().await.unwrap();
    assert_eq!(near.write(b"x").await.unwrap_err().kind(), ErrorKind::BrokenPipe);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_channels_echo_and_leave_nothing_behind() {
    let mut pair = Pair::with(4096, |options| MuxOptions { max_channels: 64, ..options });
    let mut incoming = pair.incoming;
    pair.drivers.spawn(async move {
        let mut echoes = JoinSet::new();
        while let Some(mut channel) = incoming.accept().await {
            echoes.spawn(async move {
                let mut data = Vec::new();
                channel.read_to_end(&mut data).await.unwrap();
                channel.write_all(&data).await.unwrap();
                channel.shutdown().await.unwrap();
            });
        }
        while let Some(echo) = echoes.join_next().await {
            echo.unwrap();
        }
        Ok(())
    });
    let mut flows = JoinSet::new();
    for n in 0..1000 {
        let mux = pair.client.clone();
        flows.spawn(async move {
            let mut channel = mux.open().await.unwrap();
            let data = noise(n * 37);
            channel.write_all(&data).await.unwrap();
            channel.shutdown().await.unwrap();
            let mut heard = Vec::new();
            channel.read_to_end(&mut heard).await.unwrap();
            assert!(heard == data);
        });
    }
    while let Some(flow) = flows.join_next().await {
        flow.unwrap();
    }
    while pair.client.channels() + pair.server.channels() > 0 {
        tokio::task::yield_now().await;
    }
    pair.client.close();
    while let Some(ended) = pair.drivers.join_next().await {
        ended.unwrap().unwrap();
    }
}

/// A pipe that takes turns of at most so many bytes, and none as long as that is 0.
struct Gate {
    pipe: DuplexStream,
    turn: Arc<AtomicUsize>,
}

impl Tunnel for Gate {
    fn poll_turn(self: Pin<&mut Self>, cx: &mut Context<'_>, most: usize) -> Poll<io::Result<usize>> {
        let turn = self.turn.load(Ordering::SeqCst);
        if turn > 0 {
            return Pin::new(&mut self.get_mut().pipe).poll_turn(cx, most.min(turn));
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl AsyncRead for Gate {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_read(cx, buf)
    }
}

impl AsyncWrite for Gate {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.pipe).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.pipe).poll_shutdown(cx)
    }
}

/// Where a keystroke comes among 60,000 bytes of bulk on another channel that were written before it, through a pipe
/// that takes turns of `before` and, once it is written, of `after` bytes.
async fn place_of_a_keystroke(capacity: usize, before: usize, after: usize) -> usize {
    let ((pipe, mut far), turn) = (duplex(capacity), Arc::new(AtomicUsize::new(before)));
    let (mux, _incoming, driver) = start(Gate { pipe, turn: turn.clone() }, MuxOptions::new(Role::Client));
    let mut drivers = JoinSet::new();
    drivers.spawn(driver);
    let (mut bulk, mut shell) = (mux.open().await.unwrap(), mux.open().await.unwrap());
    bulk.write_all(&noise(60_000)).await.unwrap();
    // The driver has come round, and could have put the bulk into a turn.
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    bulk.flush().await.unwrap();
    shell.write_all(b"l").await.unwrap();
    turn.store(after, Ordering::SeqCst);
    let mut heard = vec![0; 60_000];
    far.read_exact(&mut heard).await.unwrap();
    // A data frame of one byte on the second channel: version, type, flags, channel, length (yamux's specification).
    let frame = [0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1, b'l'];
    heard.windows(frame.len()).position(|bytes| bytes == frame).unwrap_or(heard.len())
}

#[tokio::test]
async fn a_keystroke_overtakes_what_waits_for_the_tunnel() {
    let at = place_of_a_keystroke(1024 * 1024, 0, 65_280).await;
    assert!(at < 40_000, "the keystroke came at {at}");
}

#[tokio::test]
async fn where_turns_are_short_a_keystroke_waits_for_no_more_than_one() {
    // One turn fills the pipe, the next waits for it.
    let at = place_of_a_keystroke(4096, 4096, 4096).await;
    assert!(at < 3 * 4096, "the keystroke came at {at}");
}
