//! The end of a carrier that we chose.
//!
//! Owns the closing handshake: what was written, our Close, the other end's answer, the transport's end. Does not know
//! why it ends. Invariant: every wait of it is bounded, but for the delivery of what was written before.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};

use super::{Carrier, CarrierError, error::write_error};

/// A closing handshake takes one round trip; a peer that needs longer is not waited for.
const FAREWELL: Duration = Duration::from_secs(3);
/// Received bytes that are kept for the reader while we wait for the answer to our Close.
const MAX_FAREWELL_BYTES: usize = 256 * 1024;

/// Read at once while waiting: on the stack.
const KEPT_AT_ONCE: usize = 4 * 1024;

/// How far our own end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Farewell {
    /// Nobody has said goodbye.
    None,
    /// Our Close waits in the layers below.
    Sending,
    /// The other end's Close is awaited until the timer fires.
    Waiting,
    /// The transport is being shut down.
    Closing,
    /// Nothing left to do.
    Done,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Carrier<S> {
    pub(super) fn poll_farewell(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            match self.farewell {
                Farewell::None if self.end.is_some() => self.wait_for(Farewell::Closing),
                Farewell::None => {
                    ready!(self.poll_send_and_flush(cx))?;
                    let (code, reason) = self.shared.take_close();
                    self.outbox.close(Some(code), &reason);
                    self.farewell = Farewell::Sending;
                }
                Farewell::Sending => {
                    ready!(self.outbox.poll_flush(&mut self.io, cx)).map_err(write_error)?;
                    self.wait_for(Farewell::Waiting);
                }
                Farewell::Waiting => {
                    ready!(self.poll_answer(cx));
                    self.farewell = Farewell::Closing;
                }
                Farewell::Closing => {
                    if self.poll_close_transport(cx).is_pending() {
                        ready!(self.timer.as_mut().poll(cx));
                    }
                    self.farewell = Farewell::Done;
                }
                Farewell::Done => return Poll::Ready(Ok(())),
            }
        }
    }

    fn wait_for(&mut self, stage: Farewell) {
        self.farewell = stage;
        // From here on nothing is judged but the farewell itself.
        self.life = None;
        self.timer.as_mut().reset(Instant::now() + FAREWELL);
    }

    /// Waits for the other end's Close. What arrives before it is kept for the reader.
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while self.end.is_none() {
            if self.inbox.len() > MAX_FAREWELL_BYTES {
                self.finish(Err(CarrierError::Lost("more data came after our Close than is kept".into())));
            } else if self.poll_keep(cx).is_ready() {
                self.reader.take().into_iter().for_each(Waker::wake);
            } else if self.timer.as_mut().poll(cx).is_ready() {
                self.finish(Err(CarrierError::Lost("our Close was not answered".into())));
            } else {
                return Poll::Pending;
            }
        }
        Poll::Ready(())
    }

    /// Receives into the inbox.
    fn poll_keep(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut piece = [0; KEPT_AT_ONCE];
        let mut buf = ReadBuf::new(&mut piece);
        ready!(self.poll_receive(cx, &mut buf));
        self.inbox.extend_from_slice(buf.filled());
        Poll::Ready(())
    }

    /// Flushes our answer to a Close and ends the transport; errors no longer matter.
    fn poll_close_transport(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let _ = ready!(self.outbox.poll_flush(&mut self.io, cx));
        let _ = ready!(Pin::new(&mut self.io).poll_shutdown(cx));
        Poll::Ready(())
    }
}
