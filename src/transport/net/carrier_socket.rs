//! The socket below a carrier: TCP whose queue in the kernel stays short.
//!
//! Owns how much the kernel may hold that it has not sent yet. Does not know what flows. Invariant: the limit follows
//! what the socket takes; a pause at most halves it.
//!
//! What lies unsent in the kernel can no longer be put in order, so that it should be little. But congestion control
//! learns what a path carries only while the kernel has something to send: bbr never leaves its start-up, in which it
//! sends three times what the path takes, if the queue runs empty once in each round trip (`is_app_limited` in Linux's
//! `tcp_bbr.c`). So the limit is a time, not a size.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;
use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
};

use super::{tolerate_pauses, tune_carrier};

/// How long the kernel may need for what it holds unsent. It asks for more when half of it is left, and bbr's start-up
/// sends at three times the rate: the writer has a good millisecond then to come.
const UNSENT_TIME: Duration = Duration::from_millis(8);
/// The least limit, and the first. The kernel exceeds it by up to one segment of 64 KiB.
const LEAST_UNSENT: u32 = 16 * 1024;
/// The largest limit: 8 ms of 1 Gbit/s. Faster paths are short ones.
const MOST_UNSENT: u32 = 1024 * 1024;
/// A rate is measured over at least so much, and over at least so long.
const SAMPLE_BYTES: u64 = 64 * 1024;
/// See [`SAMPLE_BYTES`]: long enough for a scheduler's bursts to level out.
const SAMPLE_TIME: Duration = Duration::from_millis(20);

/// A TCP connection that carries a device stream or a control session.
#[derive(Debug)]
pub struct CarrierSocket {
    socket: TcpStream,
    unsent: Option<Unsent>,
}

/// How much may be unsent.
#[derive(Debug)]
struct Unsent {
    limit: u32,
    since: Instant,
    written: u64,
}

impl CarrierSocket {
    /// A connection that is a carrier's from the start.
    pub fn new(socket: TcpStream) -> Self {
        tune_carrier(&socket);
        let mut this = Self::from(socket);
        this.limit_unsent();
        this
    }

    /// From now on, little is held by the kernel.
    pub fn limit_unsent(&mut self) {
        let unsent = Unsent { limit: LEAST_UNSENT, since: Instant::now(), written: 0 };
        self.apply(unsent.limit);
        self.unsent = Some(unsent);
    }

    /// See [`tolerate_pauses`].
    pub fn tolerate_pauses(&self) {
        tolerate_pauses(&self.socket);
    }

    /// True once the other end has ended or reset the connection, even if there is more of it to read.
    pub fn is_ended(&self) -> bool {
        let ready = self.socket.ready(Interest::READABLE).now_or_never();
        ready.is_some_and(|ready| ready.map_or(true, |ready| ready.is_read_closed()))
    }

    /// From now on the connection's end is a reset: what the other end lacks must not look like a whole.
    pub fn end_with_reset(&self) {
        // A socket that refuses this is one that has ended already.
        let _ = SockRef::from(&self.socket).set_linger(Some(Duration::ZERO));
    }

    /// The connection itself.
    pub fn get_ref(&self) -> &TcpStream {
        &self.socket
    }

    /// Counts what a write has taken.
    fn wrote(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let (Poll::Ready(Ok(bytes)), Some(unsent)) = (&written, &mut self.unsent) {
            unsent.written += *bytes as u64;
            if unsent.written >= SAMPLE_BYTES
                && let Some(limit) = unsent.adapt(Instant::now())
            {
                self.apply(limit);
            }
        }
        written
    }

    /// A kernel without the option costs latency under load, not correctness.
    fn apply(&self, limit: u32) {
        #[cfg(target_os = "linux")]
        let _ = SockRef::from(&self.socket).set_tcp_notsent_lowat(limit);
    }
}

impl Unsent {
    /// The limit that follows from what was written since the last one, if it is another.
    fn adapt(&mut self, now: Instant) -> Option<u32> {
        let time = now.saturating_duration_since(self.since);
        if time < SAMPLE_TIME {
            return None;
        }
        let bytes = u128::from(self.written) * UNSENT_TIME.as_micros() / time.as_micros().max(1);
        // A pause is no slow path: at most halved. Powers of two, so that it seldom changes.
        let wanted = u32::try_from(bytes).unwrap_or(MOST_UNSENT).max(self.limit / 2).clamp(LEAST_UNSENT, MOST_UNSENT);
        (self.since, self.written) = (now, 0);
        let limit = wanted.next_power_of_two();
        (limit != std::mem::replace(&mut self.limit, limit)).then_some(limit)
    }
}

impl From<TcpStream> for CarrierSocket {
    /// A connection that may become a carrier's.
    fn from(socket: TcpStream) -> Self {
        Self { socket, unsent: None }
    }
}

impl AsyncRead for CarrierSocket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_read(cx, buf)
    }
}

impl AsyncWrite for CarrierSocket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.socket).poll_write(cx, buf);
        this.wrote(written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let written = Pin::new(&mut this.socket).poll_write_vectored(cx, bufs);
        this.wrote(written)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The limit after a second of so many bytes per second.
    fn settled(unsent: &mut Unsent, rate: u64) -> u32 {
        let start = unsent.since;
        for turn in 1..=50 {
            unsent.written += rate / 50;
            unsent.adapt(start + SAMPLE_TIME * turn);
        }
        unsent.limit
    }

    #[test]
    fn the_limit_is_a_time() {
        let mut unsent = Unsent { limit: LEAST_UNSENT, since: Instant::now(), written: 0 };
        assert_eq!(settled(&mut unsent, 125_000_000), MOST_UNSENT, "1 Gbit/s");
        assert_eq!(settled(&mut unsent, 12_500_000), 128 * 1024, "100 Mbit/s");
        assert_eq!(settled(&mut unsent, 2_000_000), LEAST_UNSENT, "16 Mbit/s");
        assert_eq!(settled(&mut unsent, 10_000_000_000), MOST_UNSENT);
    }

    #[test]
    fn a_pause_halves_it_at_most() {
        let start = Instant::now();
        let mut unsent = Unsent { limit: MOST_UNSENT, since: start, written: SAMPLE_BYTES };
        assert_eq!(unsent.adapt(start + Duration::from_secs(60)), Some(MOST_UNSENT / 2));
        assert_eq!(unsent.adapt(start + Duration::from_secs(60)), None, "too soon to tell");
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn the_kernel_is_told() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let mut socket = CarrierSocket::from(socket);
        let limit = |socket: &CarrierSocket| SockRef::from(socket.get_ref()).tcp_notsent_lowat().unwrap();
        assert_ne!(limit(&socket), LEAST_UNSENT);
        socket.limit_unsent();
        assert_eq!(limit(&socket), LEAST_UNSENT);
        // What was written in the last second.
        let unsent = socket.unsent.as_mut().unwrap();
        (unsent.since, unsent.written) = (Instant::now() - Duration::from_secs(1), 12_500_000);
        let _ = socket.wrote(Poll::Ready(Ok(1)));
        assert_eq!(limit(&socket), 128 * 1024);
    }
}
