//! The far side of a `culvert connect`, as the log sees it.
//!
//! Owns the lines that tell of its beginning and its end. Does not know how it was opened or who reads it.
//! Invariant: each that began ends with one line, however it ends.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::Instant,
};
use tracing::info;

use crate::base::{Identity, Name};

/// A joined far side that counts what passes. Its owner drops it when either end is done.
pub(super) struct Joined<F> {
    far: F,
    device: Identity,
    target: Name,
    begun: Instant,
    sent: u64,
    received: u64,
}

impl<F> Joined<F> {
    pub(super) fn new(far: F, device: Identity, target: Name) -> Self {
        info!(%device, %target, "culvert connect joined");
        Self { far, device, target, begun: Instant::now(), sent: 0, received: 0 }
    }
}

impl<F> Drop for Joined<F> {
    fn drop(&mut self) {
        let Self { device, target, sent, received, .. } = self;
        let seconds = self.begun.elapsed().as_secs_f64();
        info!(%device, %target, sent, received, seconds, "culvert connect ended");
    }
}

impl<F: AsyncRead + Unpin> AsyncRead for Joined<F> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut self.far).poll_read(cx, buf));
        self.received += (buf.filled().len() - before) as u64;
        Poll::Ready(read)
    }
}

impl<F: AsyncWrite + Unpin> AsyncWrite for Joined<F> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.far).poll_write(cx, buf));
        self.sent += written.as_ref().map_or(0, |&written| written as u64);
        Poll::Ready(written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.far).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.far).poll_shutdown(cx)
    }
}
