//! The driver: the one place that touches the stream below.
//!
//! Owns the stream, the buffer of a turn in each direction, and the end of the mux. Does not know frames. Invariant:
//! at most one turn of output (64 KiB) is taken from the core before the stream below has taken the one before.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use super::Shared;
use crate::proto::yamux::{InputError, TURN, Violation};

/// Bytes read at a time: what one WebSocket message holds.
const READ: usize = 64 * 1024;

/// Turns of reading and writing before other tasks get theirs: half a megabyte in each direction, under a
/// millisecond.
const TURNS: usize = 8;

/// Why the mux ended.
#[derive(Debug, thiserror::Error)]
pub enum MuxError {
    /// The stream below broke.
    #[error("the stream below the mux broke")]
    Io(#[source] io::Error),
    /// The stream below ended in the middle of a frame.
    #[error("the tunnel ended in the middle of a frame")]
    Truncated,
    /// The peer broke the protocol.
    #[error("the peer broke the mux protocol")]
    Violation(#[source] Violation),
    /// The peer ended the mux with an error code.
    #[error("the peer ended the mux with error code {0}")]
    PeerFailed(u32),
    /// A close was asked for, and its last bytes found no way out in time.
    #[error("the mux could not send its last bytes while closing")]
    CloseTimeout,
}

/// What a mux runs over.
pub trait Tunnel: AsyncRead + AsyncWrite + Unpin {
    /// Waits until it would take a turn, and says of how many bytes, `most` of them at most: what is put into one before
    /// that, or is more than it says, cannot be overtaken any more.
    fn poll_turn(self: Pin<&mut Self>, cx: &mut Context<'_>, most: usize) -> Poll<io::Result<usize>> {
        let _ = cx;
        Poll::Ready(Ok(most))
    }

    /// Writes from `bytes`, which is not empty: what it took is gone from the front. It may keep the memory instead of
    /// copying it, and leave other memory for the next turn.
    fn poll_write_turn(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &mut BytesMut) -> Poll<io::Result<()>> {
        let written = ready!(self.as_mut().poll_write(cx, bytes))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        bytes.advance(written);
        Poll::Ready(Ok(()))
    }
}

/// Does all the work of a mux; ends well if either side closed it or the stream below ended between two frames.
/// Dropped, it takes the mux with it: channels fail.
#[must_use = "a mux does nothing unless its driver is polled"]
pub struct MuxDriver<T> {
    io: T,
    shared: Arc<Shared>,
    /// What is left of a turn.
    output: BytesMut,
    /// The stream below has bytes that it was not told to flush.
    unflushed: bool,
    input: Vec<u8>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl<T: Tunnel> MuxDriver<T> {
    pub(super) fn new(io: T, shared: Arc<Shared>) -> Self {
        let output = BytesMut::new();
        Self { io, shared, output, unflushed: false, input: Vec::new(), timer: None }
    }

    /// One turn in each direction; true if it got anywhere.
    fn turn(&mut self, cx: &mut Context<'_>) -> Result<bool, Result<(), MuxError>> {
        let sent = match self.send(cx) {
            Ok(sent) => sent,
            Err(error) => return Err(self.last_words(cx, error)),
        };
        if self.shared.lock().core.is_ended() && self.output.is_empty() {
            return self.shut_down(cx);
        }
        Ok(self.receive(cx)? | sent)
    }

    /// Takes output from the core and gives it to the stream below.
    fn send(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        let mut progress = false;
        if self.output.is_empty() && !self.is_idle() {
            let Poll::Ready(ready) = Pin::new(&mut self.io).poll_turn(cx, TURN) else { return Ok(false) };
            self.take_output(ready?);
        }
        while !self.output.is_empty() {
            let Poll::Ready(written) = Pin::new(&mut self.io).poll_write_turn(cx, &mut self.output) else {
                return Ok(progress);
            };
            written?;
            (progress, self.unflushed) = (true, true);
        }
        // Only behind the last turn: as long as there is more, that pushes this one along.
        if self.unflushed && !progress {
            self.unflushed = Pin::new(&mut self.io).poll_flush(cx)?.is_pending();
        }
        Ok(progress)
    }

    /// Whether there is nothing to send; then the driver is woken when there is.
    fn is_idle(&self) -> bool {
        let mut state = self.shared.lock();
        state.idle = !state.core.wants_transmit();
        state.idle
    }

    /// Fills the output with a turn of at most so many bytes.
    fn take_output(&mut self, most: usize) {
        let mut state = self.shared.lock();
        self.output.reserve(most);
        state.core.poll_turn(Instant::now().into_std(), &mut self.output, most);
        state.idle = self.output.is_empty();
        self.shared.dispatch(state);
    }

    /// Reads once.
    fn receive(&mut self, cx: &mut Context<'_>) -> Result<bool, Result<(), MuxError>> {
        {
            let mut state = self.shared.lock();
            state.paused = !state.core.wants_input();
            if state.paused {
                return Ok(false);
            }
        }
        self.input.reserve(READ);
        let mut buf = ReadBuf::uninit(self.input.spare_capacity_mut());
        let result = match Pin::new(&mut self.io).poll_read(cx, &mut buf) {
            Poll::Pending => return Ok(false),
            Poll::Ready(result) => result,
        };
        let mut state = self.shared.lock();
        if let Err(error) = result {
            return Err(if state.core.is_closed() { Ok(()) } else { Err(MuxError::Io(error)) });
        }
        if buf.filled().is_empty() {
            let whole = state.core.is_between_frames() || state.core.is_closed();
            return Err(if whole { Ok(()) } else { Err(MuxError::Truncated) });
        }
        let result = state.core.handle_input(Instant::now().into_std(), buf.filled());
        self.shared.dispatch(state);
        match result {
            Ok(()) => Ok(true),
            Err(InputError::PeerFailed(code)) => Err(Err(MuxError::PeerFailed(code))),
            Err(InputError::Violation(violation)) => {
                // The peer is told if it listens; it is not waited for.
                let _told = self.send(cx).and_then(|_| self.send(cx));
                Err(Err(MuxError::Violation(violation)))
            }
        }
    }

    /// Writing failed: what the peer said before is still taken in, for it may explain.
    fn last_words(&mut self, cx: &mut Context<'_>, error: io::Error) -> Result<(), MuxError> {
        for _ in 0..TURNS {
            match self.receive(cx) {
                Ok(true) => {}
                Ok(false) => break,
                Err(Ok(())) if self.shared.lock().core.is_closed() => return Ok(()),
                Err(_) => break,
            }
        }
        if self.shared.lock().core.is_closed() { Ok(()) } else { Err(MuxError::Io(error)) }
    }

    /// Our GoAway is out: ends the stream below.
    fn shut_down(&mut self, cx: &mut Context<'_>) -> Result<bool, Result<(), MuxError>> {
        match Pin::new(&mut self.io).poll_shutdown(cx) {
            Poll::Pending => Ok(false),
            // The peer may have gone first: that is what was wanted.
            Poll::Ready(_) => Err(Ok(())),
        }
    }

    /// Sees to deadlines; true if one had passed and something may have changed.
    fn watch_the_clock(&mut self, cx: &mut Context<'_>) -> Result<bool, Result<(), MuxError>> {
        let mut state = self.shared.lock();
        let due = state.core.poll_timeout().map(Instant::from_std);
        let Some(at) = due.into_iter().chain(state.close_by).min() else {
            self.timer = None;
            return Ok(false);
        };
        let now = Instant::now();
        if state.close_by.is_some_and(|at| at <= now) {
            return Err(Err(MuxError::CloseTimeout));
        }
        if at <= now {
            state.core.handle_timeout(now.into_std());
            self.shared.dispatch(state);
            return Ok(true);
        }
        drop(state);
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
        if timer.deadline() != at {
            timer.as_mut().reset(at);
        }
        Ok(timer.as_mut().poll(cx).is_ready())
    }

    /// Gives the buffers back while there is no channel.
    fn rest(&mut self) {
        if self.output.is_empty() && self.shared.lock().core.channels() == 0 {
            (self.output, self.input) = (BytesMut::new(), Vec::new());
        }
    }
}

impl<T: Tunnel> Future for MuxDriver<T> {
    type Output = Result<(), MuxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        this.shared.driver_runs(cx);
        for _ in 0..TURNS {
            let step = this.turn(cx).and_then(|progress| Ok(progress || this.watch_the_clock(cx)?));
            match step {
                Ok(true) => {}
                Ok(false) => {
                    this.rest();
                    return Poll::Pending;
                }
                Err(result) => {
                    this.shared.end();
                    return Poll::Ready(result);
                }
            }
        }
        // A peer that always has something to say does not put deadlines off.
        if let Err(result) = this.watch_the_clock(cx) {
            this.shared.end();
            return Poll::Ready(result);
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl<T> Drop for MuxDriver<T> {
    fn drop(&mut self) {
        self.shared.end();
    }
}

impl<T> std::fmt::Debug for MuxDriver<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MuxDriver").finish_non_exhaustive()
    }
}

impl Shared {
    /// From here on, whoever changes something can wake the driver.
    fn driver_runs(&self, cx: &Context<'_>) {
        let mut state = self.lock();
        match &mut state.driver {
            Some(waker) => waker.clone_from(cx.waker()),
            None => state.driver = Some(cx.waker().clone()),
        }
        (state.must_run, state.idle, state.paused) = (false, false, false);
    }

    /// Nothing more will be received or sent.
    fn end(&self) {
        let mut state = self.lock();
        state.core.abort();
        state.core.refuse();
        state.driver = None;
        self.dispatch(state);
        self.ended.cancel();
    }
}
