//! MQTT packets over a byte stream, both ways from one task.
//!
//! Owns the buffers and the two time limits of a connection: silence of the peer, and its refusal to read. Does not
//! know what a packet means. Invariant: while more than [`MAX_OUTPUT`] bytes wait to be written nothing is read, so
//! a peer that does not read cannot make the hub hold more.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, timeout_at},
};

use crate::proto::mqtt::{self, MqttError, Packet};

/// Largest packet before authentication (threats.md, row 13): a CONNECT with the longest IDs and token fits.
const MAX_CONNECT: usize = 4096;
/// Largest packet of a device that is let in: IoT Hub's largest message (256 KiB) with room for its topic.
pub(super) const MAX_PACKET: usize = 264 * 1024;
/// Answers that may wait for the peer before it is no longer listened to. One packet more may be appended, so the
/// total stays below the 1 MiB of threats.md, row 13.
pub(super) const MAX_OUTPUT: usize = 64 * 1024;
/// Bytes taken from the connection at once; on the stack, so that an idle session holds no buffer.
const READ_CHUNK: usize = 8 * 1024;

/// Why no packet came.
#[derive(Debug)]
pub(super) enum WireError {
    /// The connection ended.
    Eof,
    /// The connection failed.
    Io(io::Error),
    /// What came is not MQTT.
    Mqtt(MqttError),
    /// Nothing came for too long.
    Silent,
    /// The peer takes nothing.
    Stalled,
}

/// A connection that speaks MQTT.
pub(super) struct Wire<'a, IO> {
    io: &'a mut IO,
    input: BytesMut,
    output: BytesMut,
    flushed: bool,
    limit: usize,
    /// How long the peer may be silent; not limited here before authentication, where one limit covers all.
    silence: Option<Duration>,
    stall: Duration,
    heard: Instant,
    /// When output was last empty or shrank.
    progress: Instant,
}

impl<'a, IO> Wire<'a, IO> {
    /// A connection of a stranger. `stall` is how long it may take no byte of what waits for it.
    pub(super) fn new(io: &'a mut IO, stall: Duration) -> Self {
        let now = Instant::now();
        Self {
            io,
            input: BytesMut::new(),
            output: BytesMut::new(),
            flushed: true,
            limit: MAX_CONNECT,
            silence: None,
            stall,
            heard: now,
            progress: now,
        }
    }

    /// The peer is no stranger any more: larger packets, and `silence` as the limit between two of them.
    pub(super) fn admit(&mut self, silence: Duration) {
        self.limit = MAX_PACKET;
        self.silence = Some(silence);
    }

    /// Queues a packet; [`packet`](Self::packet) and [`flush`](Self::flush) write it.
    pub(super) fn send(&mut self, packet: &Packet) {
        if self.output.is_empty() {
            self.progress = Instant::now();
        }
        // What the hub sends is made of parts that came in packets of at most MAX_PACKET; a topic that grew beyond
        // 65,535 bytes by its prefix belongs to a peer that asked for it, and is dropped.
        if let Err(error) = mqtt::encode(packet, &mut self.output) {
            tracing::debug!(%error, "packet dropped");
        }
        self.flushed = false;
    }

    /// True if more may be queued without being asked for.
    pub(super) fn has_room(&self) -> bool {
        self.output.len() < MAX_OUTPUT
    }

    fn deadline(&self) -> Option<Instant> {
        let silent = self.silence.map(|limit| self.heard + limit);
        let stalled = (!self.output.is_empty()).then(|| self.progress + self.stall);
        silent.into_iter().chain(stalled).min()
    }

    fn overdue(&self) -> Option<WireError> {
        let now = Instant::now();
        if !self.output.is_empty() && now >= self.progress + self.stall {
            return Some(WireError::Stalled);
        }
        self.silence.is_some_and(|limit| now >= self.heard + limit).then_some(WireError::Silent)
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> Wire<'_, IO> {
    /// The next packet, while what is queued is written. Dropping the future loses nothing.
    pub(super) async fn packet(&mut self) -> Result<Packet, WireError> {
        loop {
            let Some(deadline) = self.deadline() else { return poll_fn(|cx| self.poll_packet(cx)).await };
            if let Ok(result) = timeout_at(deadline, poll_fn(|cx| self.poll_packet(cx))).await {
                return result;
            }
            if let Some(error) = self.overdue() {
                return Err(error);
            }
        }
    }

    /// Writes all that is queued.
    pub(super) async fn flush(&mut self) -> io::Result<()> {
        poll_fn(|cx| self.poll_output(cx)).await
    }

    fn poll_packet(&mut self, cx: &mut Context<'_>) -> Poll<Result<Packet, WireError>> {
        loop {
            if let Poll::Ready(Err(error)) = self.poll_output(cx) {
                return Poll::Ready(Err(WireError::Io(error)));
            }
            if !self.has_room() {
                return Poll::Pending;
            }
            if let Some(packet) = mqtt::decode(&mut self.input, self.limit).map_err(WireError::Mqtt)? {
                self.heard = Instant::now();
                if self.input.is_empty() {
                    self.input = BytesMut::new();
                }
                return Poll::Ready(Ok(packet));
            }
            ready!(self.poll_input(cx))?;
        }
    }

    fn poll_input(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), WireError>> {
        let mut chunk = [0; READ_CHUNK];
        let mut chunk = ReadBuf::new(&mut chunk);
        ready!(Pin::new(&mut *self.io).poll_read(cx, &mut chunk)).map_err(WireError::Io)?;
        if chunk.filled().is_empty() {
            return Poll::Ready(Err(WireError::Eof));
        }
        self.input.extend_from_slice(chunk.filled());
        Poll::Ready(Ok(()))
    }

    fn poll_output(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.output.is_empty() {
            let written = ready!(Pin::new(&mut *self.io).poll_write(cx, &self.output))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.output.advance(written);
            self.progress = Instant::now();
        }
        if !self.flushed {
            ready!(Pin::new(&mut *self.io).poll_flush(cx))?;
            self.flushed = true;
            self.output = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}
