//! A channel whose first bytes from the device are a verdict.
//!
//! Owns the reading of the verdict in front of the data. Does not know rules or sockets. Invariant: no byte of data
//! is handed out before the verdict was `ok`, and a refusal is an error that names the reason.

use std::{
    fmt, io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

use super::flow::Abort;
use crate::{
    base::printable,
    proto::open::{MAX_VERDICT, Verdict},
};

/// The device said no. Carried inside an [`io::Error`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedByDevice {
    /// What it said.
    pub verdict: Verdict,
    /// Its words.
    pub text: String,
}

impl fmt::Display for RefusedByDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.text.as_str() {
            "" => write!(f, "the device answered {}", self.verdict.as_str()),
            text => write!(f, "the device answered {}: {}", self.verdict.as_str(), printable(text)),
        }
    }
}

impl std::error::Error for RefusedByDevice {}

/// The device said nothing in time; why, as far as it is known. Carried inside an [`io::Error`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unanswered(String);

/// A channel that reads its verdict before its data; data may be written at once.
pub struct Verdicted<C> {
    channel: C,
    head: Option<Vec<u8>>,
    limit: Option<Limit>,
}

/// How long the verdict is waited for, and what is said then.
struct Limit {
    at: Pin<Box<Sleep>>,
    why: Box<dyn Fn() -> String + Send>,
}

impl<C: AsyncRead + Unpin> Verdicted<C> {
    /// A channel whose header has been written.
    pub fn new(channel: C) -> Self {
        Self { channel, head: Some(Vec::new()), limit: None }
    }

    /// Fails with [`Unanswered`] if the verdict has not come by then.
    #[must_use]
    pub fn until(self, deadline: Instant, why: impl Fn() -> String + Send + 'static) -> Self {
        Self { limit: Some(Limit { at: Box::pin(sleep_until(deadline)), why: Box::new(why) }), ..self }
    }

    /// Waits for the verdict alone.
    pub async fn verdict(&mut self) -> io::Result<()> {
        std::future::poll_fn(|cx| self.poll_verdict(cx)).await
    }

    /// Reads no byte more than the verdict has, so that data need not be kept.
    fn poll_verdict(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(head) = &mut self.head {
            if let Some((verdict, text, _)) = Verdict::decode(head).map_err(invalid)? {
                if verdict != Verdict::Ok {
                    return Poll::Ready(Err(io::Error::other(RefusedByDevice { verdict, text })));
                }
                (self.head, self.limit) = (None, None);
                break;
            }
            // Three bytes tell the length of the rest.
            let wanted = head.get(2).map_or(3, |length| 3 + usize::from(*length)) - head.len();
            let mut bytes = [0; MAX_VERDICT];
            let mut buffer = ReadBuf::new(&mut bytes[..wanted]);
            let Poll::Ready(read) = Pin::new(&mut self.channel).poll_read(cx, &mut buffer) else {
                return self.poll_limit(cx).map(Err);
            };
            read?;
            if buffer.filled().is_empty() {
                let text = "the device ended the channel without a verdict";
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionReset, text)));
            }
            head.extend_from_slice(buffer.filled());
        }
        Poll::Ready(Ok(()))
    }

    fn poll_limit(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let Some(Limit { at, why }) = &mut self.limit else { return Poll::Pending };
        ready!(at.as_mut().poll(cx));
        Poll::Ready(io::Error::other(Unanswered(why())))
    }
}

fn invalid(error: crate::proto::open::OpenError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl<C: AsyncRead + Unpin> AsyncRead for Verdicted<C> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_verdict(cx))?;
        Pin::new(&mut self.channel).poll_read(cx, buf)
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Verdicted<C> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.channel).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.channel).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.channel).poll_shutdown(cx)
    }
}

impl<C: Abort> Abort for Verdicted<C> {
    fn abort(self) {
        self.channel.abort();
    }

    fn abort_behind(self) {
        self.channel.abort_behind();
    }

    fn poll_failed(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        self.channel.poll_failed(cx)
    }
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    fn encoded(verdict: Verdict, text: &str) -> BytesMut {
        let mut bytes = BytesMut::new();
        verdict.encode(text, &mut bytes);
        bytes
    }

    #[tokio::test]
    async fn data_follows_an_ok_however_it_is_cut() {
        let (near, mut far) = duplex(1);
        let device = async {
            far.write_all(&encoded(Verdict::Ok, "")).await.unwrap();
            far.write_all(b"SSH-2.0").await.unwrap();
            drop(far);
        };
        let mut text = String::new();
        let mut channel = Verdicted::new(near);
        let (read, ()) = tokio::join!(channel.read_to_string(&mut text), device);
        assert_eq!((read.unwrap(), text.as_str()), (7, "SSH-2.0"));
    }

    #[tokio::test]
    async fn a_refusal_is_an_error_with_the_devices_words() {
        let (near, mut far) = duplex(64);
        far.write_all(&encoded(Verdict::Refused, "127.0.0.1:22\u{1b}[31m")).await.unwrap();
        let error = Verdicted::new(near).read_u8().await.unwrap_err();
        assert_eq!(error.to_string(), "the device answered refused: 127.0.0.1:22\\u{1b}[31m");
    }

    #[tokio::test(start_paused = true)]
    async fn a_verdict_is_waited_for_as_long_as_was_said_and_data_for_ever() {
        let limit = Instant::now() + std::time::Duration::from_secs(30);
        let (near, _far) = duplex(64);
        let error = Verdicted::new(near).until(limit, || "it is offline".into()).read_u8().await.unwrap_err();
        assert!(error.get_ref().unwrap().is::<Unanswered>());
        assert_eq!((error.to_string().as_str(), Instant::now()), ("it is offline", limit));

        let (near, mut far) = duplex(64);
        far.write_all(&encoded(Verdict::Ok, "")).await.unwrap();
        let mut channel = Verdicted::new(near).until(Instant::now(), || unreachable!("it answered"));
        let late = async {
            tokio::time::sleep(std::time::Duration::from_secs(3600)).await;
            far.write_u8(7).await.unwrap();
        };
        assert_eq!(tokio::join!(channel.read_u8(), late).0.unwrap(), 7);
    }

    #[tokio::test]
    async fn an_end_before_the_verdict_is_not_an_end() {
        let (near, far) = duplex(64);
        drop(far);
        let error = Verdicted::new(near).read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
}
