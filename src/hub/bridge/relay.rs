//! The relay of one bridge: payload in on one side, the same payload out on the other, both ways in one task.
//!
//! Owns the two legs' frames and the bytes under way. Does not know tickets, devices or why a bridge exists.
//! Invariant: a direction holds at most one buffer of bytes and reads nothing while its receiver takes nothing;
//! a receiver may pause for as long as its sender is there.

use std::{
    any::Any,
    convert::Infallible,
    io,
    ops::Range,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use prometheus::IntCounter;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    time::timeout,
};

use super::LegIo;
use crate::proto::websocket::{Decoder, End, PeerClose, SERVER_HEADROOM as HEADROOM, Violation, pong, put_header};

/// Largest payload of a frame that is sent: the Azure gateway's limit, on which the C sample relies.
pub(super) const MAX_PAYLOAD_OUT: usize = 65_536;
/// Bytes of a buffer: one full frame out and its header.
const BUFFER: usize = HEADROOM + MAX_PAYLOAD_OUT;
/// Buffers that are kept for the next busy direction: 16 MiB; more are freed.
const POOLED: usize = 256;
/// Buffers moved in one direction before the task lets others run: 1 MiB, some 300 us of work.
const TURNS: usize = 16;
/// Answers to pings that wait for their turn, in bytes; a peer that pings on without reading gets no more of them.
const MAX_CONTROL_OUT: usize = 512;
/// How long a leg has to answer our Close: as long as a slow path's round trip with retransmissions.
const CLOSE_ANSWER: Duration = Duration::from_secs(5);

/// Buffers shared by all bridges. A direction takes one while it has bytes under way.
#[derive(Debug, Clone, Default)]
pub(in crate::hub) struct BufferPool(Arc<Mutex<Vec<Box<[u8]>>>>);

impl BufferPool {
    fn take(&self) -> Box<[u8]> {
        let pooled = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        pooled.unwrap_or_else(|| vec![0; BUFFER].into())
    }

    fn put(&self, buffer: Box<[u8]>) {
        let mut pool = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if pool.len() < POOLED {
            pool.push(buffer);
        }
    }
}

/// One side's WebSocket, after its upgrade.
pub(in crate::hub) struct Leg<S> {
    io: S,
    /// Bytes that came right behind the upgrade request.
    early: bytes::Bytes,
    decoder: Decoder,
    control: Vec<u8>,
    /// A data frame has been written in part: nothing may come between.
    mid_frame: bool,
    unflushed: bool,
    /// The end of its bridge is on its way to it.
    owed: bool,
    ended: Option<Ended>,
    /// What it said while it waited for the other leg.
    said: Pipe,
    /// What lives as long as the leg.
    _held: Option<Arc<dyn Any + Send + Sync>>,
}

/// How a leg ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// With a Close frame.
    Closed(PeerClose),
    /// Without one: the connection is gone.
    Lost(Option<io::Error>),
    /// By breaking the protocol.
    Violated(Violation),
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Closed(PeerClose { code: Some(code), .. }) => write!(f, "closed with {code}"),
            Self::Closed(PeerClose { code: None, .. }) => f.write_str("closed"),
            Self::Lost(Some(error)) => write!(f, "lost: {error}"),
            Self::Lost(None) => f.write_str("ended without a Close"),
            Self::Violated(violation) => write!(f, "violated the protocol: {violation}"),
        }
    }
}

/// What a leg still gets when its bridge is over.
#[derive(Debug)]
pub(super) struct Goodbye {
    /// Its last frame; none for a leg that is gone.
    pub(super) frame: Vec<u8>,
    /// How long it may need to take all that is under way to it and the frame: a buffer or two.
    pub(super) patience: Duration,
}

/// One direction's bytes under way.
#[derive(Default)]
struct Pipe {
    buffer: Option<Box<[u8]>>,
    /// The rest of a frame that is to be written.
    out: Range<usize>,
    /// Bytes of payload in the frame that was made last.
    payload: usize,
}

/// Both legs and both directions.
pub(super) struct Relay<A, B> {
    pub(super) service: Leg<A>,
    pub(super) device: Leg<B>,
    to_device: Pipe,
    to_service: Pipe,
    pool: BufferPool,
    counters: Counters,
    /// How far both directions were at the last look.
    seen: [Position; 2],
}

/// How far a direction is: payload bytes read, and where in its buffer it writes.
type Position = (u64, usize);

/// Payload bytes, counted as they are read.
#[derive(Debug, Clone)]
pub(super) struct Counters {
    pub(super) to_device: IntCounter,
    pub(super) to_service: IntCounter,
    pub(super) this: Relayed,
}

/// Payload bytes of one bridge.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Relayed {
    pub(super) to_device: u64,
    pub(super) to_service: u64,
}

/// Which leg.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(in crate::hub) enum Side {
    /// The service's.
    Service,
    /// The device's.
    Device,
}

impl Counters {
    fn count_to_device(&mut self, payload: u64) {
        self.this.to_device += payload;
        self.to_device.inc_by(payload);
    }

    fn count_to_service(&mut self, payload: u64) {
        self.this.to_service += payload;
        self.to_service.inc_by(payload);
    }
}

// === impl Leg ===

impl<S: AsyncRead + AsyncWrite + Unpin> Leg<S> {
    /// A leg over a connection that has switched to WebSocket.
    pub(in crate::hub) fn new(io: S, early: bytes::Bytes) -> Self {
        let decoder = Decoder::new(End::Client);
        let (control, said) = (Vec::new(), Pipe::default());
        Self {
            io,
            early,
            decoder,
            control,
            mid_frame: false,
            unflushed: false,
            owed: false,
            ended: None,
            said,
            _held: None,
        }
    }

    /// Keeps what counts its connection for as long as it lives.
    #[must_use]
    pub(in crate::hub) fn with(mut self, held: Arc<dyn Any + Send + Sync>) -> Self {
        self._held = Some(held);
        self
    }

    /// Answers pings as long as the other leg is not there, and keeps one buffer of what this one says. No end.
    pub(super) async fn wait(&mut self, pool: &BufferPool) -> Infallible {
        std::future::poll_fn(|cx| self.poll_wait(cx, pool)).await
    }

    fn poll_wait(&mut self, cx: &mut Context<'_>, pool: &BufferPool) -> Poll<Infallible> {
        let mut said = std::mem::take(&mut self.said);
        if said.waiting().is_none() && self.ended.is_none() {
            match self.poll_fill(cx, &mut said, pool) {
                Poll::Ready(()) => cx.waker().wake_by_ref(),
                Poll::Pending => said.release(pool),
            }
        }
        self.said = said;
        // What fails here fails again in the relay, which tells why.
        let _ = poll_settle(cx, self, &mut Pipe::default());
        Poll::Pending
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        if !self.early.is_empty() {
            let taken = self.early.split_to(self.early.len().min(into.len()));
            into[..taken.len()].copy_from_slice(&taken);
            return Poll::Ready(Ok(taken.len()));
        }
        let mut into = ReadBuf::new(into);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut into))?;
        Poll::Ready(Ok(into.filled().len()))
    }

    /// Reads what is there, up to a full buffer, and leaves its payload in `pipe`. Pending: nothing is there.
    fn poll_fill(&mut self, cx: &mut Context<'_>, pipe: &mut Pipe, pool: &BufferPool) -> Poll<()> {
        let buffer = pipe.buffer.get_or_insert_with(|| pool.take());
        let mut end = HEADROOM;
        while end < buffer.len() && self.ended.is_none() {
            match self.poll_read(cx, &mut buffer[end..]) {
                Poll::Ready(Ok(0)) => self.ended = Some(Ended::Lost(None)),
                Poll::Ready(Ok(read)) => end += read,
                Poll::Ready(Err(error)) => self.ended = Some(Ended::Lost(Some(error))),
                Poll::Pending if end == HEADROOM => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        let (payload, outcome) = self.decoder.strip(buffer, HEADROOM..end);
        pipe.frame(payload);
        if let Err(violation) = outcome {
            self.ended = Some(Ended::Violated(violation));
        }
        if let Some(close) = self.decoder.close() {
            self.ended = Some(Ended::Closed(close.clone()));
        }
        self.answer_pings();
        Poll::Ready(())
    }

    fn answer_pings(&mut self) {
        while let Some(ping) = self.decoder.take_ping() {
            if self.control.len() < MAX_CONTROL_OUT {
                self.control.extend(pong(&ping, None));
            }
        }
    }

    /// Writes control frames that wait, then `pipe`.
    fn poll_drain(&mut self, cx: &mut Context<'_>, pipe: &mut Pipe) -> Poll<io::Result<()>> {
        loop {
            let written = if !self.mid_frame && !self.control.is_empty() {
                let written = ready!(Pin::new(&mut self.io).poll_write(cx, &self.control))?;
                self.control.drain(..written);
                written
            } else if let Some(bytes) = pipe.waiting() {
                let written = ready!(Pin::new(&mut self.io).poll_write(cx, bytes))?;
                pipe.out.start += written;
                self.mid_frame = !pipe.out.is_empty();
                written
            } else {
                return Poll::Ready(Ok(()));
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
        }
    }

    /// Gives the kernel all that waits.
    fn poll_deliver(&mut self, cx: &mut Context<'_>, pipe: &mut Pipe) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx, pipe))?;
        self.poll_flush(cx)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unflushed {
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Says goodbye to a leg that has never been joined.
    pub(super) async fn dismiss(mut self, goodbye: Goodbye) {
        self.say_goodbye(&mut Pipe::default(), goodbye).await;
    }

    /// Delivers what is under way to this leg, says goodbye, and waits a little for the answer.
    async fn say_goodbye(&mut self, under_way: &mut Pipe, goodbye: Goodbye) {
        let Goodbye { frame, patience } = goodbye;
        if frame.is_empty() {
            return;
        }
        // A leg that has ended itself may have stopped reading, too.
        self.owed = self.ended.is_none();
        if !matches!(timeout(patience, self.deliver_last(under_way, frame)).await, Ok(Ok(()))) {
            return;
        }
        self.owed = false;
        if !matches!(self.ended, Some(Ended::Closed(_))) {
            let _ = timeout(CLOSE_ANSWER, std::future::poll_fn(|cx| self.poll_forget(cx))).await;
        }
        // The leg is told that TLS ends, too, if it still listens.
        let _ = timeout(CLOSE_ANSWER, self.io.shutdown()).await;
    }

    /// What the leg says meanwhile has nowhere to go, but it may not read before it has said it.
    async fn deliver_last(&mut self, under_way: &mut Pipe, frame: Vec<u8>) -> io::Result<()> {
        let rest = |cx: &mut Context<'_>| {
            let _ = self.poll_forget(cx);
            self.answer_pings();
            self.poll_deliver(cx, under_way)
        };
        std::future::poll_fn(rest).await?;
        self.control.extend(frame);
        std::future::poll_fn(|cx| self.poll_deliver(cx, &mut Pipe::default())).await
    }

    /// Forgets what is under way to this leg, but for the rest of a frame: what comes next could not be read without it.
    fn forget(&self, under_way: &mut Pipe) {
        if !self.mid_frame {
            under_way.out = 0..0;
        }
    }

    /// Reads and forgets until the Close, the end or an error.
    fn poll_forget(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut buffer = [0; 4096];
        while self.decoder.close().is_none() {
            let Ok(read @ 1..) = ready!(self.poll_read(cx, &mut buffer)) else { return Poll::Ready(()) };
            if self.decoder.strip(&mut buffer, 0..read).1.is_err() {
                return Poll::Ready(());
            }
        }
        Poll::Ready(())
    }
}

// === impl Pipe ===

impl Pipe {
    /// Makes a frame of a payload; none of an empty one: the C sample ends when it gets one.
    fn frame(&mut self, payload: Range<usize>) {
        self.payload = payload.len();
        self.out = match &mut self.buffer {
            Some(buffer) if !payload.is_empty() => put_header(buffer, &payload, None)..payload.end,
            _ => 0..0,
        };
    }

    /// The payload bytes that were not counted yet.
    fn take_payload(&mut self) -> u64 {
        std::mem::take(&mut self.payload) as u64
    }

    fn waiting(&self) -> Option<&[u8]> {
        self.buffer.as_deref().map(|buffer| &buffer[self.out.clone()]).filter(|bytes| !bytes.is_empty())
    }

    fn release(&mut self, pool: &BufferPool) {
        if let Some(buffer) = self.buffer.take() {
            pool.put(buffer);
        }
    }
}

// === impl Relay ===

impl<A, B> Relay<A, B>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    pub(super) fn new(mut service: Leg<A>, mut device: Leg<B>, pool: BufferPool, counters: Counters) -> Self {
        let (to_device, to_service) = (std::mem::take(&mut service.said), std::mem::take(&mut device.said));
        let mut relay = Self { service, device, to_device, to_service, pool, counters, seen: [(0, 0); 2] };
        let (there, back) = (relay.to_device.take_payload(), relay.to_service.take_payload());
        relay.counters.count_to_device(there);
        relay.counters.count_to_service(back);
        relay
    }

    /// Relays until one side ends; says which.
    pub(super) async fn run(&mut self) -> Side {
        std::future::poll_fn(|cx| self.poll(cx)).await
    }

    pub(super) fn relayed(&self) -> Relayed {
        self.counters.this
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Side> {
        let Self { service, device, to_device, to_service, pool, counters, seen: _ } = self;
        let there = poll_direction(cx, service, device, to_device, pool, |payload| counters.count_to_device(payload));
        if let Poll::Ready(end) = there {
            return Poll::Ready(end.side(Side::Service, Side::Device));
        }
        let back = poll_direction(cx, device, service, to_service, pool, |payload| counters.count_to_service(payload));
        if let Poll::Ready(end) = back {
            return Poll::Ready(end.side(Side::Device, Side::Service));
        }
        // A ping read just now on the device's leg is answered in the direction that was polled first.
        if poll_settle(cx, service, to_service).is_ready() {
            return Poll::Ready(Side::Service);
        }
        poll_settle(cx, device, to_device).map(|()| Side::Device)
    }

    /// Ends both legs, each with its own last frame, after what is under way to it.
    pub(super) async fn finish(&mut self, to_service: Goodbye, to_device: Goodbye) {
        let service = self.service.say_goodbye(&mut self.to_service, to_service);
        let device = self.device.say_goodbye(&mut self.to_device, to_device);
        tokio::join!(service, device);
    }

    /// Relays no more, not even what was read already.
    pub(super) fn forget_rest(&mut self) {
        self.service.forget(&mut self.to_service);
        self.device.forget(&mut self.to_device);
    }
}

impl Relay<Box<dyn LegIo>, Box<dyn LegIo>> {
    /// Ends with a reset the legs that have not got the end of their bridge; which they are.
    pub(super) fn cut_off(self) -> impl Iterator<Item = Side> {
        let service = self.service.cut_off().then_some(Side::Service);
        let device = self.device.cut_off().then_some(Side::Device);
        service.into_iter().chain(device)
    }

    /// The side that has left while the other one takes nothing of what it sent, if that was so at the last look, too.
    /// While a receiver pauses nothing is read, so its sender's end is not seen otherwise.
    pub(super) fn abandoned(&mut self) -> Option<Side> {
        let Relayed { to_device, to_service } = self.counters.this;
        let now = [(to_device, self.to_device.out.start), (to_service, self.to_service.out.start)];
        let before = std::mem::replace(&mut self.seen, now);
        let [there, back] = [0, 1].map(|direction| before[direction] == now[direction]);
        let waits = |pipe: &Pipe, to: &Leg<_>| pipe.waiting().is_some() || to.unflushed;
        if there && waits(&self.to_device, &self.device) && self.service.io.is_gone() {
            self.service.ended = Some(Ended::Lost(None));
            return Some(Side::Service);
        }
        if back && waits(&self.to_service, &self.service) && self.device.io.is_gone() {
            self.device.ended = Some(Ended::Lost(None));
            return Some(Side::Device);
        }
        None
    }
}

impl Leg<Box<dyn LegIo>> {
    /// Ends with a reset a leg that has not got its bridge's end. True for such a one.
    fn cut_off(&self) -> bool {
        if self.owed {
            self.io.end_with_reset();
        }
        self.owed
    }

    /// True if it has ended while it was alone, even if there is more of it to read.
    pub(super) fn has_left(&mut self) -> bool {
        if self.ended.is_none() && self.io.is_gone() {
            self.ended = Some(Ended::Lost(None));
        }
        self.ended.is_some()
    }
}

impl<S> Leg<S> {
    /// How the leg ended, if it did.
    pub(super) fn ended(&self) -> Option<&Ended> {
        self.ended.as_ref()
    }
}

/// Which end of a direction ended.
enum DirectionEnd {
    Source,
    Sink,
}

impl DirectionEnd {
    fn side(&self, source: Side, sink: Side) -> Side {
        match self {
            Self::Source => source,
            Self::Sink => sink,
        }
    }
}

/// Moves one direction as far as it goes. Ready when one of its legs has ended; what its source sent before that may
/// still be under way then.
fn poll_direction<A, B>(
    cx: &mut Context<'_>,
    from: &mut Leg<A>,
    to: &mut Leg<B>,
    pipe: &mut Pipe,
    pool: &BufferPool,
    mut count: impl FnMut(u64),
) -> Poll<DirectionEnd>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    for _ in 0..TURNS {
        if from.ended.is_some() {
            return Poll::Ready(DirectionEnd::Source);
        }
        // TLS would hold another buffer while the kernel takes none.
        if let Err(error) = ready!(to.poll_deliver(cx, pipe)) {
            to.ended = Some(Ended::Lost(Some(error)));
            return Poll::Ready(DirectionEnd::Sink);
        }
        if from.poll_fill(cx, pipe, pool).is_pending() {
            pipe.release(pool);
            return Poll::Pending;
        }
        count(pipe.take_payload());
    }
    cx.waker().wake_by_ref();
    Poll::Pending
}

/// Sends what waits for this leg and flushes. Ready when the leg has ended.
fn poll_settle<S>(cx: &mut Context<'_>, leg: &mut Leg<S>, pipe: &mut Pipe) -> Poll<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    match leg.poll_deliver(cx, pipe) {
        Poll::Ready(Err(error)) => {
            leg.ended = Some(Ended::Lost(Some(error)));
            Poll::Ready(())
        }
        Poll::Ready(Ok(())) | Poll::Pending => Poll::Pending,
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{SinkExt as _, StreamExt as _, future::poll_immediate};
    use tokio::io::DuplexStream;
    use tokio_tungstenite::{
        WebSocketStream,
        tungstenite::{Message, protocol::Role},
    };

    use super::*;
    use crate::transport::tls::testing::Hoard;

    type Client = WebSocketStream<DuplexStream>;

    fn counters() -> Counters {
        let counter = || IntCounter::new("bytes", "bytes").unwrap();
        Counters { to_device: counter(), to_service: counter(), this: Relayed::default() }
    }

    async fn leg(pipe: usize) -> (Leg<DuplexStream>, Client) {
        let (io, client) = tokio::io::duplex(pipe);
        (Leg::new(io, bytes::Bytes::new()), WebSocketStream::from_raw_socket(client, Role::Client, None).await)
    }

    /// Sizes without a pattern, from empty to three frames' worth.
    fn sizes(seed: u64) -> impl Iterator<Item = usize> {
        let step =
            |state: &u64| Some(state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407));
        let states = std::iter::successors(Some(seed), step);
        states.map(|state| match state >> 61 {
            0 => 0,
            1..=5 => (state >> 33) as usize % 200,
            _ => (state >> 33) as usize % 200_000,
        })
    }

    /// Sends `total` bytes in messages of many sizes, and checks those that come from the other side.
    async fn talk(mut client: Client, seed: u64, total: usize) {
        let (mut sink, mut stream) = (&mut client).split();
        let send = async {
            let mut sent = 0;
            for size in sizes(seed) {
                let end = (sent + size).min(total);
                let bytes: Vec<u8> = (sent..end).map(|n| (n / 3) as u8).collect();
                sink.send(Message::binary(bytes)).await.unwrap();
                if size % 11 == 3 {
                    sink.send(Message::Ping("now and then".into())).await.unwrap();
                }
                sent = end;
                if sent == total {
                    break;
                }
            }
        };
        let receive = async {
            let mut received = 0;
            while received < total {
                let Message::Binary(bytes) = stream.next().await.unwrap().unwrap() else { continue };
                assert!((1..=MAX_PAYLOAD_OUT).contains(&bytes.len()));
                for byte in bytes {
                    assert_eq!(byte, (received / 3) as u8, "at {received}");
                    received += 1;
                }
            }
        };
        tokio::join!(send, receive);
    }

    #[tokio::test]
    async fn both_directions_at_once_lose_and_change_nothing() {
        const TOTAL: usize = 3_000_000;
        for (seed, pipe) in [(1, 64), (2, 1500), (3, 300_000)] {
            let total = if pipe == 64 { TOTAL / 30 } else { TOTAL };
            let ((service, one), (device, other)) = (leg(pipe).await, leg(pipe).await);
            let pool = BufferPool::default();
            let mut relay = Relay::new(service, device, pool.clone(), counters());
            let clients = async { tokio::join!(talk(one, seed, total), talk(other, seed + 10, total)) };
            tokio::select! {
                side = relay.run() => panic!("{side:?} ended"),
                _ = clients => {}
            }
            assert_eq!(relay.relayed(), Relayed { to_device: total as u64, to_service: total as u64 });
            drop(relay);
            assert!(pool.0.lock().unwrap().len() <= 2, "a direction has one buffer");
        }
    }

    #[tokio::test]
    async fn small_frames_that_are_there_travel_together() {
        let ((service, mut one), (device, mut other)) = (leg(1 << 20).await, leg(1 << 20).await);
        for _ in 0..1000 {
            one.feed(Message::binary(vec![7; 64])).await.unwrap();
        }
        one.flush().await.unwrap();
        let mut relay = Relay::new(service, device, BufferPool::default(), counters());
        let receive = async {
            let (mut messages, mut bytes) = (0, 0);
            while bytes < 64_000 {
                bytes += other.next().await.unwrap().unwrap().len();
                messages += 1;
            }
            messages
        };
        tokio::select! {
            side = relay.run() => panic!("{side:?} ended"),
            messages = receive => assert_eq!(messages, 2, "of 70,000 bytes with headers, a buffer takes 65,536"),
        }
    }

    #[tokio::test]
    async fn what_came_before_a_violation_is_delivered() {
        let ((service, mut one), (device, mut other)) = (leg(1 << 20).await, leg(1 << 20).await);
        one.feed(Message::binary("before")).await.unwrap();
        one.flush().await.unwrap();
        // A server may not get what is not masked.
        one.get_mut().write_all(&[0x82, 1, b'x']).await.unwrap();
        let mut relay = Relay::new(service, device, BufferPool::default(), counters());
        assert_eq!(relay.run().await, Side::Service);
        assert!(matches!(relay.service.ended(), Some(Ended::Violated(_))));
        let patience = Duration::from_secs(5);
        let goodbye = Goodbye { frame: crate::proto::websocket::close(Some(1011), "", None), patience };
        let read = async { other.next().await.unwrap().unwrap() };
        let finish = async { timeout(patience, relay.finish(Goodbye { frame: Vec::new(), patience }, goodbye)).await };
        let (first, _) = tokio::join!(read, finish);
        assert_eq!(first, Message::binary("before"));
    }

    #[tokio::test]
    async fn an_idle_direction_holds_no_buffer() {
        let ((service, mut one), (device, mut other)) = (leg(1 << 20).await, leg(1 << 20).await);
        let mut relay = Relay::new(service, device, BufferPool::default(), counters());
        tokio::select! {
            side = relay.run() => panic!("{side:?} ended"),
            _ = async { one.send(Message::binary("x")).await.unwrap(); other.next().await } => {}
        }
        assert!(relay.to_device.buffer.is_none() && relay.to_service.buffer.is_none());
    }

    #[tokio::test]
    async fn tls_holds_one_buffer_while_the_kernel_takes_none() {
        let (service, mut one) = leg(1 << 20).await;
        one.send(Message::binary(vec![7; 500_000])).await.unwrap();
        let mut relay =
            Relay::new(service, Leg::new(Hoard::default(), bytes::Bytes::new()), BufferPool::default(), counters());
        {
            let mut run = std::pin::pin!(relay.run());
            for _ in 0..100 {
                assert!(poll_immediate(run.as_mut()).await.is_none());
            }
        }
        let held = relay.device.io.held;
        assert!((1..=MAX_PAYLOAD_OUT + 10).contains(&held), "{held} bytes wait in TLS, where nothing overtakes them");
    }
}
