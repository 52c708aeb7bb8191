//! A server that answers any request with given bytes, for fuzzing.
//!
//! Owns the plain functions that any fuzzer or test can feed. Does not know the fuzzer. Invariant: not a byte is there
//! before the request, as from a real server: hyper takes an early one for a broken connection.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::{Buf as _, Bytes};
use http::Method;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{HttpRequest, HttpResponse, MAX_BODY, Url, exchange};

/// What a client that has connected to such a server holds.
#[derive(Debug, Default)]
pub(in crate::transport) struct Scripted {
    answer: Bytes,
    asked: bool,
    reader: Option<Waker>,
}

impl Scripted {
    /// A server that says this, and ends.
    pub(in crate::transport) fn saying(answer: &[u8]) -> Self {
        Self { answer: Bytes::copy_from_slice(answer), ..Self::default() }
    }
}

impl AsyncRead for Scripted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.asked {
            self.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let count = self.answer.len().min(buf.remaining());
        buf.put_slice(&self.answer[..count]);
        self.answer.advance(count);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Scripted {
    fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.asked = true;
        self.reader.take().into_iter().for_each(Waker::wake);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// Runs what waits for nothing but itself.
pub(in crate::transport) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
    runtime.expect("a runtime without threads needs nothing").block_on(future)
}

/// Any bytes as the answer to a request: the answer as we understood it, or an error, but always an end.
///
/// # Panics
/// If a body is longer than what came.
pub fn fuzz_answer(data: &[u8]) -> Option<HttpResponse> {
    let url = Url { host: "hub.example.com".into(), port: 443, path: "/twins/d/streams/s".into() };
    let (headers, timeout) = (Vec::new(), Duration::from_secs(60));
    let request = HttpRequest { method: Method::POST, url, headers, body: Bytes::new(), timeout };
    let response = block_on(exchange(Scripted::saying(data), request, "hub")).ok()?;
    assert!(response.body.len() <= MAX_BODY.min(data.len()), "a body is what came");
    let _ = (response.retry_after(), response.clock_hint());
    Some(response)
}

/// Any bytes as a URL that a hub hands out: what is understood can be said again.
///
/// # Panics
/// If a URL changes its meaning on the way through its own text.
pub fn fuzz_url(data: &[u8]) {
    let Ok(url) = String::from_utf8_lossy(data).parse::<Url>() else { return };
    assert!(url.path.starts_with('/') && url.port != 0 && !url.host.is_empty(), "{url:?}");
    assert_eq!(url.to_string().parse().as_ref(), Ok(&url), "a URL can be said again");
}
