//! A channel as a byte stream.
//!
//! Owns one key of the core until it is dropped. Does not know the driver's state. Invariant: dropping a channel before
//! both directions have ended is a reset.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::{Arc, MutexGuard};
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::{Shared, State, channel_error};
use crate::proto::yamux::{Key, Reading, Writing};

/// One forwarded connection's worth of the mux.
///
/// Writes are taken into a bounded queue and sent when it is this channel's turn; there is nothing to flush.
/// `shutdown` ends our direction behind what was written, at once. Dropped early, the channel is reset; dropped after
/// both ends, what is still queued is sent.
pub struct Channel {
    shared: Arc<Shared>,
    key: Key,
    id: u32,
}

impl Channel {
    pub(super) fn new(shared: Arc<Shared>, key: Key, id: u32) -> Self {
        Self { shared, key, id }
    }

    /// The channel's number on the wire.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Ends the channel at once, whatever has ended already: the peer's reads and writes fail.
    pub fn reset(self) {
        let mut state = self.shared.lock();
        state.core.reset(&self.key);
        self.shared.dispatch(state);
    }

    /// Ends the channel behind what was written: the peer still gets that, unless it reads nothing for long, and then the
    /// reset.
    pub fn reset_behind(self) {
        let mut state = self.shared.lock();
        state.core.reset_behind(Instant::now().into_std(), &self.key);
        self.shared.dispatch(state);
    }

    /// Ready once the channel carries nothing any more for a reason that is no end: also behind an end that was read,
    /// where a read does not tell.
    pub fn poll_failed(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let mut state = self.shared.lock();
        match state.core.failure(&self.key) {
            Some(failure) => Poll::Ready(channel_error(failure)),
            None => {
                wait(&mut state.waiting(self.key.slot()).reader, cx);
                Poll::Pending
            }
        }
    }

    /// Like reading, but hands out what was received without copying, at most 16 KiB at a time; none is the end.
    /// Needs no buffer while it waits.
    pub fn poll_read_chunk(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        let mut state = self.shared.lock();
        let result = match state.core.read(&self.key) {
            Reading::Data(_) => Ok(state.core.take(&self.key)),
            Reading::End => Ok(None),
            Reading::Failed(failure) => Err(channel_error(failure)),
            Reading::Wait => {
                wait(&mut state.waiting(self.key.slot()).reader, cx);
                return Poll::Pending;
            }
        };
        self.shared.dispatch(state);
        Poll::Ready(result)
    }

    fn poll_write_slices<'a>(
        &self,
        cx: &Context<'_>,
        slices: impl Iterator<Item = &'a [u8]>,
    ) -> Poll<io::Result<usize>> {
        let mut state = self.shared.lock();
        let mut taken = 0;
        for slice in slices {
            match state.core.write(&self.key, slice) {
                Writing::Taken(n) => {
                    taken += n;
                    if n < slice.len() {
                        break;
                    }
                }
                Writing::Wait | Writing::Failed(_) if taken > 0 => break,
                Writing::Failed(failure) => return Poll::Ready(Err(channel_error(failure))),
                Writing::Wait => {
                    wait(&mut state.waiting(self.key.slot()).writer, cx);
                    return Poll::Pending;
                }
            }
        }
        self.shared.dispatch(state);
        Poll::Ready(Ok(taken))
    }
}

/// Copies what there is; true unless there was nothing to copy and nothing is decided.
fn fill(state: &mut MutexGuard<'_, State>, key: &Key, buf: &mut ReadBuf<'_>) -> io::Result<bool> {
    let before = buf.remaining();
    while buf.remaining() > 0 {
        let n = match state.core.read(key) {
            Reading::Data(data) => {
                let n = data.len().min(buf.remaining());
                buf.put_slice(&data[..n]);
                n
            }
            Reading::Failed(_) | Reading::Wait if buf.remaining() < before => break,
            Reading::End => break,
            Reading::Failed(failure) => return Err(channel_error(failure)),
            Reading::Wait => return Ok(false),
        };
        state.core.consume(key, n);
    }
    Ok(true)
}

fn wait(place: &mut Option<Waker>, cx: &Context<'_>) {
    match place {
        Some(waker) => waker.clone_from(cx.waker()),
        None => *place = Some(cx.waker().clone()),
    }
}

impl AsyncRead for Channel {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = self.shared.lock();
        if !fill(&mut state, &self.key, buf)? {
            wait(&mut state.waiting(self.key.slot()).reader, cx);
            return Poll::Pending;
        }
        self.shared.dispatch(state);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Channel {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_slices(cx, std::iter::once(data))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_slices(cx, slices.iter().map(|slice| &**slice))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.shared.lock();
        let result = state.core.finish(&self.key).map_err(channel_error);
        self.shared.dispatch(state);
        Poll::Ready(result)
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if let Some(waiting) = state.waiting.get_mut(self.key.slot()) {
            *waiting = super::Waiting::default();
        }
        state.core.release(&self.key);
        self.shared.dispatch(state);
    }
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Channel").field("id", &self.id).finish_non_exhaustive()
    }
}
