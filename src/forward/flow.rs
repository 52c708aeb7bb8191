//! One TCP socket joined to one channel.
//!
//! Owns the copying in both directions, half-close, and the reason for which a flow ends. Does not know rules, or
//! how either side came to be. Invariant: an end of one side reaches the other as what it was: an end that was
//! meant as an end, everything else as a reset.

use std::{
    cell::Cell,
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use prometheus::IntCounter;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

use crate::{
    proto::open::Verdict,
    transport::{mux::Channel, net::Socket},
};

use super::verdict::{RefusedByDevice, Unanswered};

/// Bytes read at once: one message of the carrier. The buffer belongs to the thread, not to the flow, so that an
/// idle flow holds none.
const CHUNK: usize = 64 * 1024;
/// Bytes that one flow moves before other tasks have a turn: sixteen of these take a millisecond or so.
const TURN: usize = 256 * 1024;
/// How long a local end is held on a plain device stream, which has no half-close, while the other direction is
/// silent (design.md, section 2).
const PLAIN_HOLD: Duration = Duration::from_secs(30);
/// After the far side of a plain device stream has ended, the local socket is read and discarded this long, because
/// closing a socket with unread bytes makes the kernel drop what was just written to it. As long a side is still read that
/// takes nothing any more: an answer that it gave before it left (`413`, a login refused) came in front of its reset.
const LINGER: Duration = Duration::from_secs(5);

thread_local! {
    static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// A side of a flow that can be ended by a reset.
pub trait Abort: AsyncRead + AsyncWrite + Unpin {
    /// Ends both directions at once, so that the peer sees a reset and never an end.
    fn abort(self);

    /// The same, but behind what was written to this side, if that can still be delivered.
    fn abort_behind(self)
    where
        Self: Sized,
    {
        self.abort();
    }

    /// Ready when this side has failed although its end was read: nothing else tells, then, until something is written.
    fn poll_failed(&mut self, _: &mut Context<'_>) -> Poll<io::Error> {
        Poll::Pending
    }

    /// Says whether a drop is a reset from now on. A flow's task may be dropped at any await (a daemon that is told
    /// twice to stop, a panic), and the process may be killed: none of these is an end.
    fn arm(&self, _reset: DropIsReset) {}
}

/// What the drop of a side means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DropIsReset {
    /// The flow runs: a reset.
    Yes,
    /// Both directions have ended: an ordinary close.
    No,
}

impl Abort for Socket {
    fn abort(self) {
        self.reset();
    }

    fn arm(&self, reset: DropIsReset) {
        match reset {
            DropIsReset::Yes => self.reset_on_drop(),
            DropIsReset::No => self.close_on_drop(),
        }
    }
}

impl Abort for Channel {
    fn abort(self) {
        self.reset();
    }

    fn abort_behind(self) {
        self.reset_behind();
    }

    fn poll_failed(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        Self::poll_failed(self, cx)
    }
}

/// Why a flow ended. The words are metric labels and stand in log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// Both directions ended by themselves.
    Done,
    /// The local application reset or lost its connection.
    LocalReset,
    /// The far end reset the flow.
    PeerReset,
    /// The device stream ended under the flow and could not be resumed.
    SessionLost,
    /// The device said no, and this is what it said.
    Refused(Verdict),
    /// The device rejected the plain device stream.
    Rejected,
    /// The device could not be reached in time.
    Unavailable,
    /// A limit on connections was reached.
    Limit,
    /// The rule was removed and its time to drain was over, or the daemon stopped.
    Stopped,
}

impl Reason {
    /// The reason as a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::LocalReset => "local_reset",
            Self::PeerReset => "peer_reset",
            Self::SessionLost => "session_lost",
            Self::Refused(verdict) => verdict.as_str(),
            Self::Rejected => "rejected",
            Self::Unavailable => "unavailable",
            Self::Limit => "limit",
            Self::Stopped => "stopped",
        }
    }
}

/// How a flow ended and what it moved.
#[derive(Debug)]
pub struct FlowEnd {
    /// Why.
    pub reason: Reason,
    /// The error behind it, if there was one, with the side it came from.
    pub detail: Option<String>,
    /// Bytes from the local socket to the far end.
    pub sent: u64,
    /// Bytes from the far end to the local socket.
    pub received: u64,
}

/// What a flow must know about its two sides.
#[derive(Debug, Clone)]
pub struct FlowOptions {
    /// False for plain device streams, where closing one direction closes both.
    pub half_close: bool,
    /// Counts bytes from the local socket.
    pub sent: IntCounter,
    /// Counts bytes to the local socket.
    pub received: IntCounter,
}

/// Joins a local socket with the far end until both directions have ended, either side fails, or `stop` resolves. The
/// drop of the local socket is a reset already: whoever got it has waited for the other side with it.
pub async fn join<A: Abort, B: Abort>(
    local: A,
    far: B,
    options: FlowOptions,
    stop: impl Future<Output = ()>,
) -> FlowEnd {
    let mut flow = Flow::new(local, far, options);
    let end = tokio::select! {
        // In this order, so that a flow that has its own reason to end says that one.
        biased;
        end = std::future::poll_fn(|cx| flow.poll(cx)) => end,
        () = stop => Err(Failure { side: None, error: io::ErrorKind::Interrupted.into(), writing: false }),
    };
    flow.finish(end)
}

struct Flow<A, B> {
    local: A,
    far: B,
    up: Direction,
    down: Direction,
    half_close: bool,
    /// Plain device streams: the far side's Close has been answered.
    far_closed: bool,
    timer: Option<Pin<Box<Sleep>>>,
    /// Why the flow will end, once what its broken side had said before is passed on.
    broken: Option<Failure>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Local,
    Far,
}

/// An error with the side it came from; no side means that the flow was stopped.
struct Failure {
    side: Option<Side>,
    error: io::Error,
    /// It showed when something was written: there may be bytes to read from that side still.
    writing: bool,
}

impl<A: Abort, B: Abort> Flow<A, B> {
    fn new(local: A, far: B, options: FlowOptions) -> Self {
        Self {
            local,
            far,
            up: Direction::new(options.sent, !options.half_close),
            down: Direction::new(options.received, false),
            half_close: options.half_close,
            far_closed: false,
            timer: None,
            broken: None,
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        if self.broken.is_none() {
            match ready!(self.poll_both(cx)) {
                Err(failure) if failure.writing => self.broken = Some(failure),
                end => return Poll::Ready(end),
            }
        }
        ready!(self.poll_rest(cx));
        Poll::Ready(self.broken.take().map_or(Ok(()), Err))
    }

    /// What the broken side had said: until it ends, or nothing has moved for a while. Its end is not passed on: a socket
    /// whose reset was told to the writer reads as if it had ended.
    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let is_local = self.broken.as_ref().is_some_and(|failure| failure.side == Some(Side::Local));
        let rest = if is_local { &mut self.up } else { &mut self.down };
        rest.hold = true;
        let polled = if is_local {
            rest.poll(cx, &mut self.local, &mut self.far)
        } else {
            rest.poll(cx, &mut self.far, &mut self.local)
        };
        let (is_over, until) = (polled.is_ready() || rest.state == State::Held, rest.last_activity + LINGER);
        if is_over { Poll::Ready(()) } else { self.poll_timer(cx, until) }
    }

    fn poll_both(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        let down = self.down.poll(cx, &mut self.far, &mut self.local);
        let down = down.map_err(|error| error.at(Side::Far, Side::Local))?;
        if down.is_ready() && !self.half_close {
            return self.poll_linger(cx).map(Ok);
        }
        let up = self.up.poll(cx, &mut self.local, &mut self.far);
        let up = up.map_err(|error| error.at(Side::Local, Side::Far))?;
        // While the client is slow to take what came, the far side waits for it and is not silent.
        if self.up.state == State::Held && self.down.pending.is_empty() && self.poll_hold(cx).is_ready() {
            self.up.state = State::ShuttingDown;
            cx.waker().wake_by_ref();
        }
        if down.is_ready() && up.is_ready() {
            return Poll::Ready(Ok(()));
        }
        if down.is_ready() {
            let error = ready!(self.far.poll_failed(cx));
            return Poll::Ready(Err(Failure { side: Some(Side::Far), error, writing: false }));
        }
        Poll::Pending
    }

    /// Plain: the local side has ended; its Close waits until the other direction has been silent for a while.
    fn poll_hold(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let until = self.down.last_activity.max(self.up.last_activity) + PLAIN_HOLD;
        self.poll_timer(cx, until)
    }

    /// Plain: the far side has ended. Its Close is answered, and what the local side still sends is discarded.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.far_closed {
            self.far_closed = Pin::new(&mut self.far).poll_shutdown(cx).is_ready();
        }
        let until = self.down.last_activity + LINGER;
        let over = poll_discard(cx, &mut self.local).is_ready() && self.far_closed;
        if over { Poll::Ready(()) } else { self.poll_timer(cx, until) }
    }

    fn poll_timer(&mut self, cx: &mut Context<'_>, until: Instant) -> Poll<()> {
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(until)));
        if timer.deadline() != until {
            timer.as_mut().reset(until);
        }
        timer.as_mut().poll(cx)
    }

    fn finish(self, end: Result<(), Failure>) -> FlowEnd {
        let (sent, received) = (self.up.bytes, self.down.bytes);
        let Err(failure) = end else {
            self.local.arm(DropIsReset::No);
            return FlowEnd { reason: Reason::Done, detail: None, sent, received };
        };
        self.local.abort();
        if failure.side == Some(Side::Local) {
            // What the local side said before it broke is on its way.
            self.far.abort_behind();
        } else {
            self.far.abort();
        }
        FlowEnd { reason: failure.reason(), detail: failure.detail(), sent, received }
    }
}

impl Failure {
    fn reason(&self) -> Reason {
        let inner = self.error.get_ref();
        let refused = inner.and_then(|inner| inner.downcast_ref::<RefusedByDevice>());
        match (self.side, refused) {
            (None, _) => Reason::Stopped,
            (_, Some(refused)) => Reason::Refused(refused.verdict),
            (Some(Side::Local), _) => Reason::LocalReset,
            (Some(Side::Far), _) if inner.is_some_and(|inner| inner.is::<Unanswered>()) => Reason::Unavailable,
            (Some(Side::Far), _) if self.error.kind() == io::ErrorKind::ConnectionAborted => Reason::SessionLost,
            (Some(Side::Far), _) => Reason::PeerReset,
        }
    }

    fn detail(&self) -> Option<String> {
        self.side.map(|_| self.error.to_string())
    }
}

/// One direction of a flow.
struct Direction {
    state: State,
    /// What was read and not yet written; empty unless the writer is slower than the reader.
    pending: Vec<u8>,
    written: usize,
    unflushed: bool,
    /// True if the reader's end is not passed on by itself.
    hold: bool,
    bytes: u64,
    counter: IntCounter,
    last_activity: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Copying,
    Held,
    ShuttingDown,
    Done,
}

enum DirectionError {
    Reading(io::Error),
    Writing(io::Error),
}

impl DirectionError {
    fn at(self, reader: Side, writer: Side) -> Failure {
        match self {
            Self::Reading(error) => Failure { side: Some(reader), error, writing: false },
            Self::Writing(error) => Failure { side: Some(writer), error, writing: true },
        }
    }
}

impl Direction {
    fn new(counter: IntCounter, hold: bool) -> Self {
        let last_activity = Instant::now();
        let pending = Vec::new();
        Self { state: State::Copying, pending, written: 0, unflushed: false, hold, bytes: 0, counter, last_activity }
    }

    /// Ready once the reader's end has been passed on.
    fn poll<R, W>(&mut self, cx: &mut Context<'_>, reader: &mut R, writer: &mut W) -> Poll<Result<(), DirectionError>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut moved = 0;
        loop {
            match self.state {
                State::Copying if moved >= TURN => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                State::Copying => moved += ready!(self.poll_copy(cx, reader, writer))?,
                State::Held => {
                    ready!(self.poll_flush(cx, writer))?;
                    return Poll::Pending;
                }
                State::ShuttingDown => {
                    ready!(Pin::new(&mut *writer).poll_shutdown(cx)).map_err(DirectionError::Writing)?;
                    self.state = State::Done;
                    self.last_activity = Instant::now();
                }
                State::Done => return Poll::Ready(Ok(())),
            }
        }
    }

    /// Moves one chunk, and says how many bytes it had.
    fn poll_copy<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
    ) -> Poll<Result<usize, DirectionError>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        ready!(self.poll_pending(cx, writer))?;
        let mut scratch = SCRATCH.take();
        scratch.resize(CHUNK, 0);
        let copied = self.poll_chunk(cx, reader, writer, &mut scratch);
        SCRATCH.set(scratch);
        if copied.is_pending() {
            // Nothing more to read for now: what was gathered goes out.
            if self.pending.is_empty()
                && let Poll::Ready(Err(error)) = self.poll_flush(cx, writer)
            {
                return Poll::Ready(Err(error));
            }
        }
        copied
    }

    fn poll_chunk<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        reader: &mut R,
        writer: &mut W,
        scratch: &mut [u8],
    ) -> Poll<Result<usize, DirectionError>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        let mut buffer = ReadBuf::new(scratch);
        ready!(Pin::new(reader).poll_read(cx, &mut buffer)).map_err(DirectionError::Reading)?;
        let chunk = buffer.filled();
        self.last_activity = Instant::now();
        if chunk.is_empty() {
            self.state = if self.hold { State::Held } else { State::ShuttingDown };
            return Poll::Ready(Ok(0));
        }
        self.bytes += chunk.len() as u64;
        self.counter.inc_by(chunk.len() as u64);
        let mut sent = 0;
        while sent < chunk.len() {
            match Pin::new(&mut *writer).poll_write(cx, &chunk[sent..]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(write_zero())),
                Poll::Ready(Ok(n)) => sent += n,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(DirectionError::Writing(error))),
                Poll::Pending => {
                    self.pending.extend_from_slice(&chunk[sent..]);
                    break;
                }
            }
        }
        self.unflushed = true;
        Poll::Ready(Ok(chunk.len()))
    }

    /// Writes what an earlier turn could not, and gives its memory back.
    fn poll_pending<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut W,
    ) -> Poll<Result<(), DirectionError>> {
        while self.written < self.pending.len() {
            let n = ready!(Pin::new(&mut *writer).poll_write(cx, &self.pending[self.written..]))
                .map_err(DirectionError::Writing)?;
            if n == 0 {
                return Poll::Ready(Err(write_zero()));
            }
            self.written += n;
            self.unflushed = true;
            self.last_activity = Instant::now();
        }
        self.pending = Vec::new();
        self.written = 0;
        Poll::Ready(Ok(()))
    }

    fn poll_flush<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        writer: &mut W,
    ) -> Poll<Result<(), DirectionError>> {
        if self.unflushed {
            ready!(Pin::new(writer).poll_flush(cx)).map_err(DirectionError::Writing)?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }
}

/// Reads and throws away; ready when the reader has ended or failed.
fn poll_discard<R: AsyncRead + Unpin>(cx: &mut Context<'_>, reader: &mut R) -> Poll<()> {
    let mut scratch = [0; 4096];
    loop {
        let mut buffer = ReadBuf::new(&mut scratch);
        match ready!(Pin::new(&mut *reader).poll_read(cx, &mut buffer)) {
            Ok(()) if !buffer.filled().is_empty() => {}
            _ => return Poll::Ready(()),
        }
    }
}

fn write_zero() -> DirectionError {
    DirectionError::Writing(io::ErrorKind::WriteZero.into())
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    };

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};

    use super::*;

    /// One end of a pipe, which notes that it was aborted.
    struct Pipe {
        io: DuplexStream,
        armed: AtomicBool,
        aborted: Arc<AtomicBool>,
        /// Its other end was told of an end.
        ended: Arc<AtomicBool>,
    }

    impl Pipe {
        fn new(capacity: usize) -> (Self, DuplexStream, Arc<AtomicBool>) {
            let (io, peer) = duplex(capacity);
            let aborted = Arc::new(AtomicBool::new(false));
            (Self { io, armed: AtomicBool::new(true), aborted: aborted.clone(), ended: Arc::default() }, peer, aborted)
        }
    }

    impl AsyncRead for Pipe {
        fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for Pipe {
        fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.io).poll_write(cx, buf)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.io).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.ended.store(true, Ordering::Relaxed);
            Pin::new(&mut self.io).poll_shutdown(cx)
        }
    }

    impl Abort for Pipe {
        fn abort(self) {
            self.aborted.store(true, Ordering::Relaxed);
        }

        fn arm(&self, reset: DropIsReset) {
            self.armed.store(reset == DropIsReset::Yes, Ordering::Relaxed);
        }
    }

    impl Drop for Pipe {
        fn drop(&mut self) {
            self.aborted.fetch_or(self.armed.load(Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    fn options(half_close: bool) -> FlowOptions {
        let counter = || IntCounter::new("bytes", "bytes").unwrap();
        FlowOptions { half_close, sent: counter(), received: counter() }
    }

    fn never() -> std::future::Pending<()> {
        std::future::pending()
    }

    #[tokio::test]
    async fn each_direction_ends_by_itself_and_nothing_is_lost() {
        let (local, mut client, _) = Pipe::new(100);
        let (far, mut server, _) = Pipe::new(7);
        let flow = join(local, far, options(true), never());
        let upload: Vec<u8> = (0..100_000u32).map(|n| n as u8).collect();
        let sent = upload.clone();
        let client = async {
            client.write_all(&sent).await.unwrap();
            client.shutdown().await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let server = async {
            let mut received = Vec::new();
            server.read_to_end(&mut received).await.unwrap();
            server.write_all(b"got it").await.unwrap();
            server.shutdown().await.unwrap();
            received
        };
        let (end, answer, received) = tokio::join!(flow, client, server);
        assert_eq!((end.reason, end.sent, end.received), (Reason::Done, 100_000, 6));
        assert_eq!((answer.as_str(), received == upload), ("got it", true));
    }

    #[tokio::test]
    async fn what_a_side_said_before_it_broke_is_passed_on() {
        let (local, mut target, _) = Pipe::new(64);
        let (far, mut client, _) = Pipe::new(64);
        target.write_all(b"413").await.unwrap();
        drop(target);
        client.write_all(b"too much").await.unwrap();
        let ended = far.ended.clone();
        let (end, mut answer) = (join(local, far, options(true), never()).await, Vec::new());
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!((end.reason, &answer[..]), (Reason::LocalReset, &b"413"[..]));
        // A reset that the writer was told reads as an end, here as on a socket.
        assert!(!ended.load(Ordering::Relaxed));

        // The other way round, where the answer finds no room at first.
        let (local, mut client, _) = Pipe::new(1);
        let (far, mut target, _) = Pipe::new(64);
        target.write_all(b"413").await.unwrap();
        drop(target);
        client.write_all(b"x").await.unwrap();
        let answer = async {
            let mut answer = Vec::new();
            client.read_to_end(&mut answer).await.unwrap();
            answer
        };
        let ended = local.ended.clone();
        let (end, answer) = tokio::join!(join(local, far, options(true), never()), answer);
        assert_eq!((end.reason, &answer[..]), (Reason::PeerReset, &b"413"[..]));
        assert!(!ended.load(Ordering::Relaxed));
    }

    #[tokio::test]
    async fn a_stop_resets_both_sides() {
        let (local, _client, local_aborted) = Pipe::new(64);
        let (far, _server, far_aborted) = Pipe::new(64);
        let end = join(local, far, options(true), std::future::ready(())).await;
        assert_eq!(end.reason, Reason::Stopped);
        assert!(local_aborted.load(Ordering::Relaxed) && far_aborted.load(Ordering::Relaxed));
    }

    #[tokio::test]
    async fn a_flow_whose_task_is_dropped_resets_the_local_side_and_one_that_is_done_does_not() {
        let (local, _client, aborted) = Pipe::new(64);
        let (far, _server, _) = Pipe::new(64);
        let mut flow = Box::pin(join(local, far, options(true), never()));
        assert!(futures_util::poll!(&mut flow).is_pending());
        drop(flow);
        assert!(aborted.load(Ordering::Relaxed), "the client would take this for the end of its download");

        let (local, mut client, aborted) = Pipe::new(64);
        let (far, mut server, _) = Pipe::new(64);
        let ends = async { tokio::try_join!(client.shutdown(), server.shutdown()).unwrap() };
        let (end, _) = tokio::join!(join(local, far, options(true), never()), ends);
        assert!(end.reason == Reason::Done && !aborted.load(Ordering::Relaxed));
    }

    #[tokio::test]
    async fn a_flow_that_broke_says_so_even_if_it_is_stopped_at_the_same_time() {
        for _ in 0..32 {
            let (local, mut client, _) = Pipe::new(64);
            let (far, server, _) = Pipe::new(64);
            drop(server);
            client.write_all(b"x").await.unwrap();
            let end = join(local, far, options(true), std::future::ready(())).await;
            assert_eq!(end.reason, Reason::PeerReset);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_plain_stream_is_not_idle_while_its_client_is_slow_to_read() {
        let (local, mut client, _) = Pipe::new(8);
        let (far, server, _) = Pipe::new(8);
        let flow = join(local, far, options(false), never());
        let server = async {
            let (mut read, mut write) = tokio::io::split(server);
            let mut byte = [0];
            tokio::select! {
                written = write.write_all(&[7; 400_000]) => written.unwrap(),
                // There is no half-close: a Close would end the download, and look like its end.
                _ = read.read(&mut byte) => panic!("closed in mid-download"),
            }
            write.shutdown().await.unwrap();
            (read, write)
        };
        let client = async {
            client.shutdown().await.unwrap();
            tokio::time::sleep(Duration::from_secs(100)).await;
            let mut got = Vec::new();
            client.read_to_end(&mut got).await.unwrap();
            got.len()
        };
        let (end, got, _server) = tokio::join!(flow, client, server);
        assert_eq!((end.reason, got), (Reason::Done, 400_000));
    }

    #[tokio::test]
    async fn an_error_of_the_far_side_resets_the_local_one() {
        let (local, _client, local_aborted) = Pipe::new(64);
        let (far, server, _) = Pipe::new(64);
        drop(server);
        // The far pipe is gone: what the client writes cannot be delivered.
        let (flow, mut client) = (join(local, far, options(true), never()), _client);
        let (end, _) = tokio::join!(flow, client.write_all(b"x"));
        assert_eq!(end.reason, Reason::PeerReset);
        assert!(local_aborted.load(Ordering::Relaxed));
    }

    #[tokio::test(start_paused = true)]
    async fn a_plain_stream_holds_a_local_end_until_the_other_direction_is_idle() {
        let (local, mut client, _) = Pipe::new(64);
        let (far, mut server, _) = Pipe::new(64);
        let flow = join(local, far, options(false), never());
        let client = async {
            client.write_all(b"question").await.unwrap();
            client.shutdown().await.unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).await.unwrap();
            answer
        };
        let server = async {
            let mut question = [0; 8];
            server.read_exact(&mut question).await.unwrap();
            let asked = Instant::now();
            tokio::time::sleep(Duration::from_secs(20)).await;
            server.write_all(b"late answer").await.unwrap();
            // The Close comes 30 s after the answer, not after the question.
            assert_eq!(server.read(&mut question).await.unwrap(), 0);
            assert!(asked.elapsed() >= Duration::from_secs(50));
            drop(server);
        };
        let (end, answer, ()) = tokio::join!(flow, client, server);
        assert_eq!((end.reason, answer.as_str()), (Reason::Done, "late answer"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_plain_streams_far_end_lets_the_client_read_everything() {
        let (local, mut client, _) = Pipe::new(64);
        let (far, mut server, _) = Pipe::new(64);
        let flow = join(local, far, options(false), never());
        let server = async {
            server.write_all(b"all of it").await.unwrap();
            server.shutdown().await.unwrap();
            // Held open: only the far side's write end is closed, as after a WebSocket Close.
            server
        };
        let client = async {
            let mut text = String::new();
            client.read_to_string(&mut text).await.unwrap();
            text
        };
        let (end, text, _server) = tokio::join!(flow, client, server);
        assert_eq!((end.reason, text.as_str()), (Reason::Done, "all of it"));
    }
}
