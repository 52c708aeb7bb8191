//! One connected socket, TCP or Unix.
//!
//! Owns the difference between the two. Does not know what flows. Invariant: after `reset` a TCP peer sees a reset,
//! never a clean end.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::{TcpStream, UnixStream},
};

/// A connected socket between an application or a target and a daemon.
#[derive(Debug)]
pub enum Socket {
    /// TCP.
    Tcp(TcpStream),
    /// Unix.
    Unix(UnixStream),
}

impl Socket {
    /// Makes the coming drop a reset, with whatever is unsent thrown away. A Unix socket has no reset: its peer sees
    /// an end, or a reset if it has sent what we did not read.
    pub fn reset_on_drop(&self) {
        if let Self::Tcp(socket) = self {
            // It fails only on a socket that is already gone.
            let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
        }
    }

    /// Takes [`reset_on_drop`](Self::reset_on_drop) back: the drop is an ordinary close.
    pub fn close_on_drop(&self) {
        if let Self::Tcp(socket) = self {
            // It fails only on a socket that is already gone.
            let _ = SockRef::from(socket).set_linger(None);
        }
    }

    /// Ends both directions now: a reset on TCP.
    pub fn reset(self) {
        self.reset_on_drop();
    }

    /// Ready when there is something to read, an end, or an error: so that a buffer is needed only then.
    pub fn poll_read_ready(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Tcp(socket) => socket.poll_read_ready(cx),
            Self::Unix(socket) => socket.poll_read_ready(cx),
        }
    }

    /// Waits until there is something to read, an end, or an error.
    pub async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Tcp(socket) => socket.readable().await,
            Self::Unix(socket) => socket.readable().await,
        }
    }

    /// Waits until the connection is broken (a reset, a lost peer); an end is none of that. What can be read stays there.
    pub async fn failed(&self) {
        match self {
            // An error of the wait itself is no news of the connection.
            Self::Tcp(socket) if socket.ready(Interest::ERROR).await.is_ok() => {}
            // A Unix socket has no reset.
            Self::Tcp(_) | Self::Unix(_) => std::future::pending().await,
        }
    }

    /// Reads without waiting.
    pub fn try_read(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.try_read(buf),
            Self::Unix(socket) => socket.try_read(buf),
        }
    }
}

macro_rules! delegate {
    ($self:ident, $socket:ident => $call:expr) => {
        match $self.get_mut() {
            Socket::Tcp($socket) => $call,
            Socket::Unix($socket) => $call,
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        delegate!(self, socket => Pin::new(socket).poll_read(cx, buf))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        delegate!(self, socket => Pin::new(socket).poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, socket => Pin::new(socket).poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, socket => Pin::new(socket).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, socket => Pin::new(socket).poll_shutdown(cx))
    }
}
