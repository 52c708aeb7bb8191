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
mod pulse;
#[cfg(test)]
mod tests;
mod upgrade;

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Sink, Stream};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};

use error::{carrier_error, write_error};
use farewell::Farewell;
use life::Life;
use monitor::Shared;

pub use error::CarrierError;
pub use life::{Liveness, Silence};
pub use monitor::CarrierMonitor;
pub use upgrade::{Upgrade, UpgradeError, fuzz_upgrade};

/// The payload of a full message. With a client's header (8 bytes) a message is exactly four TLS records, and within
/// the 65,536 bytes that every receiver takes.
pub const MAX_MESSAGE: usize = 65_536 - 8;
/// The largest message or frame we take: the hub sends 64 KiB at most; the rest is for foreign relays.
const MAX_INCOMING: usize = 1 << 20;
/// The write buffer holds one message and the control frames that may queue behind it.
const MAX_WRITE_BUFFER: usize = 2 * 65_536;

/// What a carrier is made with.
#[derive(Debug, Clone, Copy)]
pub struct CarrierOptions {
    /// Pings and their judgement; `None` at the hub, which never pings first.
    pub liveness: Option<Liveness>,
    /// Allocated at once for reading. 16 KiB for data (one TLS record), 4 KiB for control sessions.
    pub read_buffer: usize,
}

impl CarrierOptions {
    /// A data carrier of a daemon, for mux streams.
    pub const DATA: Self = Self { liveness: Some(Liveness::DEFAULT), read_buffer: 16 * 1024 };
    /// A data carrier of a daemon, for plain streams.
    pub const PLAIN: Self = Self { liveness: Some(Liveness::PLAIN), read_buffer: 16 * 1024 };
    /// A control session, as the daemon sees it.
    pub const CONTROL: Self = Self { liveness: Some(Liveness::DEFAULT), read_buffer: 4 * 1024 };
    /// A control session, as the hub sees it.
    pub const HUB_CONTROL: Self = Self { liveness: None, read_buffer: 4 * 1024 };

    /// True if the far reader may pause for as long as it likes: a plain stream's application.
    pub fn may_pause(&self) -> bool {
        self.liveness.is_some_and(|liveness| matches!(liveness.silence, Silence::ProvesWhenSettled))
    }

    fn websocket(&self) -> WebSocketConfig {
        WebSocketConfig::default()
            .read_buffer_size(self.read_buffer)
            .write_buffer_size(0)
            .max_write_buffer_size(MAX_WRITE_BUFFER)
            .max_message_size(Some(MAX_INCOMING))
            .max_frame_size(Some(MAX_INCOMING))
    }
}

/// One WebSocket as a byte stream. See the [module](self).
pub struct Carrier<S> {
    ws: WebSocketStream<S>,
    /// Received, not yet read. More than one piece only during a farewell.
    inbox: VecDeque<Bytes>,
    /// Written, not yet a message.
    outbox: BytesMut,
    /// A ping that the transport has not taken yet.
    ping: Option<u64>,
    /// Something of ours waits in the layers below, and nobody has promised to flush it.
    flush_wanted: bool,
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
    pub async fn server(io: S, already_read: Bytes, options: CarrierOptions) -> Self {
        Self::from_role(io, already_read, Role::Server, options).await
    }

    async fn from_role(io: S, already_read: Bytes, role: Role, options: CarrierOptions) -> Self {
        let config = Some(options.websocket());
        let ws = WebSocketStream::from_partially_read(io, already_read.into(), role, config).await;
        let now = Instant::now();
        Self {
            ws,
            inbox: VecDeque::new(),
            outbox: BytesMut::new(),
            ping: None,
            flush_wanted: false,
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
        self.ws.get_ref()
    }

    /// Sends a Close with this code and reason, and waits for the answer a moment. Reads are over.
    pub async fn close(mut self, code: u16, reason: &str) -> io::Result<()> {
        self.monitor().close_as(code, reason);
        tokio::io::AsyncWriteExt::shutdown(&mut self).await
    }

    // === receiving ===

    /// Takes one message. Ready means that the inbox, the end or both may have changed.
    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match Pin::new(&mut self.ws).poll_next(cx) {
            Poll::Ready(Some(Ok(message))) => {
                self.take(message, cx);
                Poll::Ready(())
            }
            Poll::Ready(Some(Err(error))) => {
                let error = carrier_error(error);
                if let CarrierError::Protocol(_) = error {
                    // The other end may like to know; if it cannot be told now, it will see the connection end.
                    let _ = Pin::new(&mut self.ws).start_send(close_message(CloseCode::Protocol.into(), ""));
                }
                self.finish(Err(error));
                Poll::Ready(())
            }
            Poll::Ready(None) => {
                self.finish(Err(CarrierError::Lost("ended without a Close".into())));
                Poll::Ready(())
            }
            Poll::Pending => self.poll_life(cx),
        }
    }

    fn take(&mut self, message: Message, cx: &mut Context<'_>) {
        let now = Instant::now();
        self.alive(now);
        match message {
            Message::Binary(data) => self.receive(data),
            Message::Text(text) => self.receive(text.into()),
            Message::Pong(payload) => {
                let number = <[u8; 8]>::try_from(payload.as_ref()).map(u64::from_be_bytes);
                let rtt = number.ok().and_then(|number| self.life.as_mut()?.pong(number, now));
                rtt.inspect(|rtt| self.shared.set_rtt(*rtt));
            }
            Message::Close(frame) => {
                let frame = frame.map(|frame| (u16::from(frame.code), frame.reason.as_str().to_owned()));
                self.finish(match frame {
                    None | Some((1000, _)) => Ok(()),
                    Some((code, reason)) => Err(CarrierError::Closed { code, reason }),
                });
                // Our answer is queued; whatever does not leave now leaves at shutdown.
                let _ = Pin::new(&mut self.ws).poll_flush(cx);
            }
            // tungstenite has queued the pong and sends it with the next read.
            Message::Ping(_) | Message::Frame(_) => {}
        }
    }

    fn receive(&mut self, data: Bytes) {
        if !data.is_empty() {
            self.inbox.push_back(data);
        }
    }

    /// The other direction has ended; both tasks must learn it.
    fn finish(&mut self, end: Result<(), CarrierError>) {
        self.end.get_or_insert(end);
        self.reader.take().into_iter().chain(self.writer.take()).for_each(Waker::wake);
    }

    // === sending ===

    /// Makes a message of what has gathered.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.outbox.is_empty() {
            return Poll::Ready(Ok(()));
        }
        ready!(Pin::new(&mut self.ws).poll_ready(cx)).map_err(write_error)?;
        let message = Message::Binary(self.outbox.split().freeze());
        Pin::new(&mut self.ws).start_send(message).map_err(write_error)?;
        self.flush_wanted = true;
        if let Some(life) = &mut self.life {
            let now = Instant::now();
            life.sent_payload(now);
            let deadline = life.deadline(now);
            if self.timer.deadline() > deadline {
                self.timer.as_mut().reset(deadline);
            }
        }
        Poll::Ready(Ok(()))
    }

    fn poll_send_and_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_send(cx))?;
        if let Some(number) = self.ping {
            ready!(Pin::new(&mut self.ws).poll_ready(cx)).map_err(write_error)?;
            self.send_ping(number);
        }
        ready!(Pin::new(&mut self.ws).poll_flush(cx)).map_err(write_error)?;
        self.flush_wanted = false;
        Poll::Ready(Ok(()))
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

    /// How much of `length` bytes fits into the message that is being gathered; sends it first if it is full.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.farewell != Farewell::None {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::BrokenPipe, "written after shutdown")));
        }
        if let Some(end) = &self.end {
            let why = end.clone().err().unwrap_or(CarrierError::Closed { code: 1000, reason: String::new() });
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::BrokenPipe, why)));
        }
        if self.outbox.len() >= MAX_MESSAGE {
            ready!(self.poll_send(cx))?;
        }
        Poll::Ready(Ok(MAX_MESSAGE - self.outbox.len()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Carrier<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            if let Some(front) = this.inbox.front_mut() {
                let length = front.len().min(buf.remaining());
                buf.put_slice(&front[..length]);
                front.advance(length);
                if front.is_empty() {
                    this.inbox.pop_front();
                }
                return Poll::Ready(Ok(()));
            }
            if let Some(end) = &this.end {
                return Poll::Ready(end.clone().map_err(CarrierError::into_io));
            }
            if this.poll_message(cx).is_pending() {
                remember(&mut this.reader, cx);
                return Poll::Pending;
            }
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
        let room = this.poll_room(cx);
        let mut room = ready!(this.note_writer(cx, room))?;
        let before = room;
        this.outbox.reserve(bufs.iter().map(|buf| buf.len()).sum::<usize>().min(room));
        for buf in bufs {
            let length = buf.len().min(room);
            this.outbox.extend_from_slice(&buf[..length]);
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
    let (role, options) = match first & 1 {
        0 => (Role::Client, CarrierOptions { liveness: None, ..CarrierOptions::DATA }),
        _ => (Role::Server, CarrierOptions::HUB_CONTROL),
    };
    let io = tokio::io::join(io::Cursor::new(data.to_vec()), tokio::io::sink());
    let used = async {
        let mut carrier = Carrier::from_role(io, Bytes::new(), role, options).await;
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

fn close_message(code: u16, reason: &str) -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::from(code), reason: reason.into() }))
}
