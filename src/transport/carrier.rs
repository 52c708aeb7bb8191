//! A carrier: one WebSocket as a byte stream. Mortal.
//!
//! Owns the framing of bytes into binary messages, liveness and the closing handshake. Does not know what the bytes
//! mean, nor how the connection below was made. Invariant: a read yields zero bytes only if the other end sent a
//! Close with code 1000 or without a code; every other end is an error that says which.
//!
//! No task of its own: everything happens inside `poll_read`, `poll_write`, `poll_flush` and `poll_shutdown`. Pings
//! are sent and judged while somebody reads; that is when silence means something.
//!
//! Writes gather into messages of at most [`MAX_MESSAGE`] bytes; a flush sends what has gathered. Empty messages are
//! never sent, and swallowed when received. Text messages are data. There is no half-close: after `poll_shutdown`
//! what was already on its way can still be read, then the stream ends.

mod error;
mod farewell;
mod life;
mod monitor;
mod outbox;
mod pulse;
#[cfg(test)]
mod tests;
mod upgrade;

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

use error::{read_error, write_error};
use farewell::Farewell;
use life::Life;
use monitor::Shared;
use outbox::Outbox;

use crate::proto::websocket::{Decoder, End, MAX_CONTROL, Violation};

pub use error::CarrierError;
pub use life::{Liveness, Silence};
pub use monitor::CarrierMonitor;
pub use upgrade::{Upgrade, UpgradeError, fuzz_upgrade};

/// The payload of a full message. With a client's header (8 bytes) a message is exactly four TLS records, and within
/// the 65,536 bytes that every receiver takes.
pub const MAX_MESSAGE: usize = 65_536 - 8;

/// What a carrier is made with.
#[derive(Debug, Clone, Copy)]
pub struct CarrierOptions {
    /// Pings and their judgement; `None` at the hub, which never pings first.
    pub liveness: Option<Liveness>,
}

impl CarrierOptions {
    /// A data carrier of a daemon, for mux streams.
    pub const DATA: Self = Self { liveness: Some(Liveness::DEFAULT) };
    /// A data carrier of a daemon, for plain streams.
    pub const PLAIN: Self = Self { liveness: Some(Liveness::PLAIN) };
    /// A control session, as the daemon sees it.
    pub const CONTROL: Self = Self { liveness: Some(Liveness::DEFAULT) };
    /// A control session, as the hub sees it.
    pub const HUB_CONTROL: Self = Self { liveness: None };

    /// True if the far reader may pause for as long as it likes: a plain stream's application.
    pub fn may_pause(&self) -> bool {
        self.liveness.is_some_and(|liveness| matches!(liveness.silence, Silence::ProvesWhenSettled))
    }
}

/// One WebSocket as a byte stream. See the [module](self).
pub struct Carrier<S> {
    io: S,
    /// What came behind the upgrade.
    early: Bytes,
    decoder: Decoder,
    /// Received during a farewell, for the reader.
    inbox: BytesMut,
    outbox: Outbox,
    /// A ping that waits for the writer.
    ping: Option<u64>,
    /// How the other direction ended.
    end: Option<Result<(), CarrierError>>,
    farewell: Farewell,
    life: Option<Life>,
    timer: Pin<Box<Sleep>>,
    reader: Option<Waker>,
    writer: Option<Waker>,
    shared: Arc<Shared>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Carrier<S> {
    /// The hub's end, after an upgrade that it has answered itself. `already_read` is what came behind the request.
    pub fn server(io: S, already_read: Bytes, options: CarrierOptions) -> Self {
        Self::new(io, already_read, End::Server, options)
    }

    fn new(io: S, early: Bytes, end: End, options: CarrierOptions) -> Self {
        let now = Instant::now();
        let other = if end == End::Client { End::Server } else { End::Client };
        Self {
            io,
            early,
            decoder: Decoder::new(other),
            inbox: BytesMut::new(),
            outbox: Outbox::new(end),
            ping: None,
            end: None,
            farewell: Farewell::None,
            life: options.liveness.map(|liveness| Life::new(liveness, now)),
            timer: Box::pin(sleep_until(now)),
            reader: None,
            writer: None,
            shared: Arc::new(Shared::new(now)),
        }
    }

    /// Notes the address of this host that the connection below comes from.
    pub fn comes_from(&self, address: SocketAddr) {
        self.shared.set_address(address);
    }

    /// A view for those who watch over the carrier while another task moves its bytes.
    pub fn monitor(&self) -> CarrierMonitor {
        CarrierMonitor::new(self.shared.clone())
    }

    /// The transport below.
    pub fn transport(&self) -> &S {
        &self.io
    }

    /// Sends a Close with this code and reason, and waits for the answer a moment. Reads are over.
    pub async fn close(mut self, code: u16, reason: &str) -> io::Result<()> {
        self.monitor().close_as(code, reason);
        tokio::io::AsyncWriteExt::shutdown(&mut self).await
    }

    // === receiving ===

    /// Reads payload into `buf`, as much as is there. Ready means that some came, or the end.
    fn poll_receive(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<()> {
        let before = buf.filled().len();
        while self.end.is_none() && buf.remaining() > 0 {
            let left = self.decoder.payload_left();
            let poll = if left == 0 { self.poll_framing(cx) } else { self.poll_payload(cx, buf, left) };
            if poll.is_pending() {
                return if buf.filled().len() > before { Poll::Ready(()) } else { Poll::Pending };
            }
        }
        Poll::Ready(())
    }

    fn poll_payload(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>, left: u64) -> Poll<()> {
        let before = buf.filled().len();
        ready!(self.poll_transport(cx, buf, left));
        match self.decoder.take_payload(&mut buf.filled_mut()[before..]) {
            Ok(()) => {}
            Err(violation) => self.violated(violation),
        }
        Poll::Ready(())
    }

    /// Takes a piece of a header or of a control frame.
    fn poll_framing(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut scratch = [0; MAX_CONTROL];
        let mut buf = ReadBuf::new(&mut scratch);
        ready!(self.poll_transport(cx, &mut buf, self.decoder.wanted() as u64));
        match self.decoder.take_framing(buf.filled()) {
            Ok(()) => self.react(cx),
            Err(violation) => self.violated(violation),
        }
        Poll::Ready(())
    }

    /// Reads at most `limit` bytes. Ready without any means that the end is known. While nothing comes, the clock is
    /// watched.
    fn poll_transport(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>, limit: u64) -> Poll<()> {
        if !self.early.is_empty() {
            let length = self.early.len().min(buf.remaining()).min(usize::try_from(limit).unwrap_or(usize::MAX));
            buf.put_slice(&self.early.split_to(length));
            return Poll::Ready(());
        }
        let before = buf.filled().len();
        match Pin::new(&mut (&mut self.io).take(limit)).poll_read(cx, buf) {
            Poll::Pending => return self.poll_life(cx),
            Poll::Ready(Err(error)) => self.finish(Err(read_error(&error))),
            Poll::Ready(Ok(())) if buf.filled().len() == before => {
                self.finish(Err(CarrierError::Lost("ended without a Close".into())));
            }
            Poll::Ready(Ok(())) => self.alive(Instant::now()),
        }
        Poll::Ready(())
    }

    /// Does what a control frame asks for, if one is complete.
    fn react(&mut self, cx: &mut Context<'_>) {
        while let Some(payload) = self.decoder.take_ping() {
            self.outbox.pong(&payload);
            // A writer that waits sends it; otherwise it leaves now, or before the next wait.
            let _ = self.poll_control(cx);
        }
        if let Some(payload) = self.decoder.take_pong() {
            let number = payload.try_into().map(u64::from_be_bytes);
            let rtt = number.ok().and_then(|number| self.life.as_mut()?.pong(number, Instant::now()));
            rtt.inspect(|rtt| self.shared.set_rtt(*rtt));
        }
        let Some(close) = self.decoder.close() else { return };
        let (code, reason) = (close.code, close.reason.clone());
        if self.farewell == Farewell::None {
            self.outbox.close(code, "");
        }
        self.finish(match code {
            None | Some(1000) => Ok(()),
            Some(code) => Err(CarrierError::Closed { code, reason }),
        });
        // What does not leave now leaves at shutdown.
        let _ = self.poll_control(cx);
    }

    fn violated(&mut self, violation: Violation) {
        // The other end may like to know; if it cannot be told now, it will see the connection end.
        self.outbox.close(Some(violation.close_code()), "");
        self.finish(Err(CarrierError::Protocol(violation.to_string())));
    }

    /// The other direction has ended; both tasks must learn it.
    fn finish(&mut self, end: Result<(), CarrierError>) {
        self.end.get_or_insert(end);
        self.reader.take().into_iter().chain(self.writer.take()).for_each(Waker::wake);
    }

    // === sending ===

    /// Makes a message of what has gathered, and hands it down.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.outbox.seal()
            && let Some(life) = &mut self.life
        {
            let now = Instant::now();
            life.sent_payload(now);
            let deadline = life.deadline(now);
            if self.timer.deadline() > deadline {
                self.timer.as_mut().reset(deadline);
            }
        }
        self.outbox.poll_drain(&mut self.io, cx).map_err(write_error)
    }

    fn poll_send_and_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        if let Some(number) = self.ping {
            self.send_ping(number);
        }
        self.outbox.poll_flush(&mut self.io, cx).map_err(write_error)
    }

    /// Notes whether the writer is blocked. A blocked write that moves on is a sign of life.
    fn note_writer<T>(&mut self, cx: &Context<'_>, poll: Poll<T>) -> Poll<T> {
        if poll.is_pending() {
            remember(&mut self.writer, cx);
        } else if self.writer.take().is_some()
            && let Some(life) = &mut self.life
        {
            life.moved(Instant::now());
        }
        poll
    }

    /// How much of `length` bytes fits into the message that is being gathered. One that would have to be split
    /// begins a message of its own, so that the receiver gets it in one piece.
    fn poll_room(&mut self, cx: &mut Context<'_>, length: usize) -> Poll<io::Result<usize>> {
        if self.farewell != Farewell::None {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::BrokenPipe, "written after shutdown")));
        }
        if let Some(end) = &self.end {
            let why = end.clone().err().unwrap_or(CarrierError::Closed { code: 1000, reason: String::new() });
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::BrokenPipe, why)));
        }
        let room = MAX_MESSAGE - self.outbox.gathered();
        if room == 0 || (length > room && length <= MAX_MESSAGE) {
            ready!(self.poll_send(cx))?;
        }
        if self.outbox.gathered() == 0 {
            // TLS would hold another message while the kernel takes none.
            ready!(self.outbox.poll_flush(&mut self.io, cx)).map_err(write_error)?;
        }
        Poll::Ready(Ok(MAX_MESSAGE - self.outbox.gathered()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Carrier<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        if !this.inbox.is_empty() {
            let length = this.inbox.len().min(buf.remaining());
            buf.put_slice(&this.inbox[..length]);
            this.inbox.advance(length);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        if this.poll_receive(cx, buf).is_pending() {
            remember(&mut this.reader, cx);
            return Poll::Pending;
        }
        match &this.end {
            Some(end) if buf.filled().len() == before => Poll::Ready(end.clone().map_err(CarrierError::into_io)),
            _ => Poll::Ready(Ok(())),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Carrier<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let length = bufs.iter().map(|buf| buf.len()).sum::<usize>();
        let room = this.poll_room(cx, length);
        let mut room = ready!(this.note_writer(cx, room))?;
        let (before, whole) = (room, length.min(room));
        for buf in bufs {
            let length = buf.len().min(room);
            this.outbox.gather(&buf[..length], whole);
            room -= length;
        }
        Poll::Ready(Ok(before - room))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let poll = this.poll_send_and_flush(cx);
        this.note_writer(cx, poll)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let poll = this.poll_farewell(cx);
        this.note_writer(cx, poll)
    }
}

impl<S> std::fmt::Debug for Carrier<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Carrier").field("end", &self.end).field("farewell", &self.farewell).finish_non_exhaustive()
    }
}

/// Any bytes as what a WebSocket's other end sends, the server's or the client's as the first byte says: payload, then
/// an end. For fuzzers.
///
/// # Panics
/// If the carrier yields more than came, or goes on when its other end has ended.
pub fn fuzz_carrier(data: &[u8]) {
    let Some((&first, data)) = data.split_first() else { return };
    let end = if first & 1 == 0 { End::Client } else { End::Server };
    let io = tokio::io::join(io::Cursor::new(data.to_vec()), tokio::io::sink());
    let used = async {
        let mut carrier = Carrier::new(io, Bytes::new(), end, CarrierOptions::HUB_CONTROL);
        let mut read = Vec::new();
        // How it ends is the peer's choice.
        let _ = tokio::io::AsyncReadExt::read_to_end(&mut carrier, &mut read).await;
        assert!(read.len() <= data.len(), "payload is what came");
        let _ = carrier.close(1000, "").await;
    };
    super::http::fuzz::block_on(used);
}

fn remember(slot: &mut Option<Waker>, cx: &Context<'_>) {
    match slot {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *slot = Some(cx.waker().clone()),
    }
}
