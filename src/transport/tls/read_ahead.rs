//! Reading ahead below TLS.
//!
//! Owns the bytes that one system call brought and TLS has not taken yet. Does not know records. Invariant: memory is
//! held only while there are such bytes; a connection that waits holds none.
//!
//! rustls reads at most one record at a time, and of a connection that was drained only 4 KiB at first: a message of
//! 64 KiB, which the kernel has in one piece, would cost seven system calls.

use std::{
    cell::Cell,
    io,
    ops::Range,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes read at once: a message of 64 KiB, as TLS records, in one call.
const AHEAD: usize = 66 * 1024;

thread_local! {
    /// The buffer of whoever reads next on this thread.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// A stream whose reads fetch more than was asked for.
#[derive(Debug)]
pub struct ReadAhead<S> {
    io: S,
    /// Empty unless it holds bytes for the reader.
    buffer: Vec<u8>,
    left: Range<usize>,
}

impl<S> ReadAhead<S> {
    pub(super) fn new(io: S) -> Self {
        Self { io, buffer: Vec::new(), left: 0..0 }
    }

    /// The stream below.
    pub fn get_ref(&self) -> &S {
        &self.io
    }

    /// The stream below, for its options: what is read from it is lost to TLS.
    pub fn get_mut(&mut self) -> &mut S {
        &mut self.io
    }

    /// Hands over what was read ahead; gives the buffer back when it is empty.
    fn take(&mut self, buf: &mut ReadBuf<'_>) {
        let length = self.left.len().min(buf.remaining());
        buf.put_slice(&self.buffer[self.left.start..self.left.start + length]);
        self.left.start += length;
        if self.left.is_empty() {
            SPARE.set(std::mem::take(&mut self.buffer));
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadAhead<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.left.is_empty() {
            let mut spare = SPARE.take();
            spare.resize(AHEAD, 0);
            let mut ahead = ReadBuf::new(&mut spare);
            let read = Pin::new(&mut this.io).poll_read(cx, &mut ahead);
            let filled = ahead.filled().len();
            if filled == 0 {
                SPARE.set(spare);
                return read;
            }
            ready!(read)?;
            (this.buffer, this.left) = (spare, 0..filled);
        }
        this.take(buf);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ReadAhead<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[tokio::test]
    async fn nothing_is_lost_between_readers_that_share_a_thread() {
        let text: Vec<u8> = (0..300_000_u32).map(|n| (n / 3) as u8).collect();
        let (near, mut far) = tokio::io::duplex(100_000);
        let (other, mut friend) = tokio::io::duplex(1000);
        let (mut one, mut two) = (ReadAhead::new(near), ReadAhead::new(other));
        let write = async {
            for piece in text.chunks(7777) {
                far.write_all(piece).await.unwrap();
                friend.write_all(b"between").await.unwrap();
            }
            drop((far, friend));
        };
        let read = async {
            let (mut all, mut piece) = (Vec::new(), [0; 5000]);
            loop {
                let n = one.read(&mut piece).await.unwrap();
                if n == 0 {
                    break;
                }
                all.extend_from_slice(&piece[..n]);
                let mut between = [0; 3];
                if two.read_exact(&mut between).await.is_ok() {
                    assert!(b"betweenbetween".windows(3).any(|window| window == between));
                }
            }
            all
        };
        let ((), all) = tokio::join!(write, read);
        assert!(all == text);
    }

    #[tokio::test]
    async fn who_waits_holds_no_memory() {
        let (near, mut far) = tokio::io::duplex(1000);
        let mut reader = ReadAhead::new(near);
        far.write_all(b"hello").await.unwrap();
        assert_eq!(reader.read_u8().await.unwrap(), b'h');
        assert!(reader.buffer.capacity() > 0);
        reader.read_exact(&mut [0; 4]).await.unwrap();
        assert_eq!(reader.buffer.capacity(), 0);
    }
}
