//! The `yamux` crate at the other end, in both roles.

use std::future::poll_fn;
use std::task::Poll;

use futures_util::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::compat::TokioAsyncReadCompatExt as _;

use super::*;

/// The crate's side: its connection is polled by a task, which opens what it is asked to and hands over the rest.
struct Oracle {
    opened: mpsc::Receiver<yamux::Stream>,
    wanted: mpsc::Sender<()>,
    arrived: mpsc::Receiver<yamux::Stream>,
}

fn oracle(io: DuplexStream, mode: yamux::Mode, tasks: &mut JoinSet<()>) -> Oracle {
    let (opened_tx, opened) = mpsc::channel(1);
    let (wanted, mut wanted_rx) = mpsc::channel(1);
    let (arrived_tx, arrived) = mpsc::channel(600);
    let mut connection = yamux::Connection::new(io.compat(), yamux::Config::default(), mode);
    tasks.spawn(async move {
        let mut opening = false;
        poll_fn(|cx| {
            loop {
                opening |= matches!(wanted_rx.poll_recv(cx), Poll::Ready(Some(())));
                if opening && let Poll::Ready(stream) = connection.poll_new_outbound(cx) {
                    opening = false;
                    opened_tx.try_send(stream.unwrap()).unwrap();
                }
                match connection.poll_next_inbound(cx) {
                    Poll::Ready(Some(Ok(stream))) => arrived_tx.try_send(stream).unwrap(),
                    Poll::Ready(_) => return Poll::Ready(()),
                    Poll::Pending => return Poll::Pending,
                }
            }
        })
        .await;
    });
    Oracle { opened, wanted, arrived }
}

struct World {
    mux: Mux,
    incoming: Incoming,
    oracle: Oracle,
    tasks: JoinSet<()>,
}

fn world(role: Role) -> World {
    let (near, far) = duplex(64 * 1024);
    let mut tasks = JoinSet::new();
    let mode = if role == Role::Client { yamux::Mode::Server } else { yamux::Mode::Client };
    let oracle = oracle(far, mode, &mut tasks);
    let (mux, incoming, driver) = start(near, MuxOptions { max_channels: 400, ..MuxOptions::new(role) });
    tasks.spawn(async move {
        // The crate ends with its test; how the tunnel ends then is not the matter here.
        let _ended = driver.await;
    });
    World { mux, incoming, oracle, tasks }
}

impl World {
    /// One channel, opened by us or by the crate; silent streams of the crate are not announced, so it says a byte.
    async fn channel(&mut self, ours: bool) -> (Channel, yamux::Stream) {
        if ours {
            let mut channel = self.mux.open().await.unwrap();
            channel.write_all(b"!").await.unwrap();
            let mut stream = self.oracle.arrived.recv().await.unwrap();
            stream.read_exact(&mut [0]).await.unwrap();
            (channel, stream)
        } else {
            self.oracle.wanted.send(()).await.unwrap();
            let mut stream = self.oracle.opened.recv().await.unwrap();
            stream.write_all(b"!").await.unwrap();
            let mut channel = self.incoming.accept().await.unwrap();
            channel.read_exact(&mut [0]).await.unwrap();
            (channel, stream)
        }
    }
}

fn noise(len: usize) -> Vec<u8> {
    (0..len as u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

const WAYS: [(Role, bool); 4] =
    [(Role::Client, true), (Role::Client, false), (Role::Server, true), (Role::Server, false)];

#[tokio::test]
async fn bulk_both_ways_with_half_close_in_either_order() {
    for (role, ours) in WAYS {
        let mut world = world(role);
        let (channel, stream) = world.channel(ours).await;
        let (mut channel_read, mut channel_write) = tokio::io::split(channel);
        let (mut stream_read, mut stream_write) = stream.split();
        let (up, down) = (noise(3_000_000), noise(2_000_001));
        let (mut heard_up, mut heard_down) = (Vec::new(), Vec::new());
        tokio::join!(
            async {
                channel_write.write_all(&up).await.unwrap();
                channel_write.shutdown().await.unwrap();
            },
            async {
                stream_write.write_all(&down).await.unwrap();
                stream_write.close().await.unwrap();
            },
            async { assert_eq!(channel_read.read_to_end(&mut heard_down).await.unwrap(), 2_000_001) },
            async { assert_eq!(stream_read.read_to_end(&mut heard_up).await.unwrap(), 3_000_000) },
        );
        assert!(heard_up == up && heard_down == down, "{role:?} {ours}");
    }
}

#[tokio::test]
async fn many_channels_at_once() {
    for (role, ours) in WAYS {
        let mut world = world(role);
        let mut flows = JoinSet::new();
        for n in 0..300 {
            let (mut channel, mut stream) = world.channel(ours).await;
            flows.spawn(async move {
                let data = noise(n * 100 + 1);
                channel.write_all(&data).await.unwrap();
                channel.shutdown().await.unwrap();
                let mut heard = Vec::new();
                stream.read_to_end(&mut heard).await.unwrap();
                stream.write_all(&heard).await.unwrap();
                stream.close().await.unwrap();
                heard.clear();
                channel.read_to_end(&mut heard).await.unwrap();
                assert!(heard == data);
            });
        }
        while let Some(flow) = flows.join_next().await {
            flow.unwrap();
        }
        while world.mux.channels() > 0 {
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn resets_reach_the_other_side() {
    for (role, ours) in WAYS {
        let mut world = world(role);
        let (mut channel, stream) = world.channel(ours).await;
        drop(stream);
        assert_eq!(channel.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        let (channel, mut stream) = world.channel(ours).await;
        channel.reset();
        // The crate shows a reset as an end; that it is closed for writing too tells them apart.
        assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
        assert!(stream.is_closed());
        let (mut channel, mut stream) = world.channel(ours).await;
        stream.write_all(b"alive").await.unwrap();
        channel.read_exact(&mut [0; 5]).await.unwrap();
    }
}

#[tokio::test]
async fn either_side_closes_the_mux() {
    for (role, ours) in WAYS {
        let mut world = world(role);
        let (mut channel, mut stream) = world.channel(ours).await;
        if ours {
            world.mux.close();
            assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
            assert!(stream.is_closed());
        } else {
            drop(world.oracle);
            world.tasks.abort_all();
        }
        world.mux.closed().await;
        assert_eq!(channel.read(&mut [0]).await.unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
    }
}
