//! A plain device stream as the far side of a flow.
//!
//! Owns the reading of its end: what is an end and what is a cut. Does not know who opened it. Invariant: an end
//! without a Close is an end only where the rule says `plain_eof`.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::HubCarrier;
use crate::{forward::Abort, transport::carrier::CarrierError};

/// The code with which the hub reports that the other side ended without a Close (wire.md, d).
const ABNORMAL: u16 = 1011;

/// A plain device stream.
pub struct PlainStream {
    carrier: HubCarrier,
    plain_eof: bool,
}

impl PlainStream {
    /// `plain_eof`: the far side's end without a Close counts as an end.
    pub fn new(carrier: HubCarrier, plain_eof: bool) -> Self {
        Self { carrier, plain_eof }
    }

    fn is_end(&self, error: &io::Error) -> bool {
        self.plain_eof
            && matches!(CarrierError::of(error), Some(CarrierError::Closed { code, .. }) if *code == ABNORMAL)
    }
}

impl Abort for PlainStream {
    /// Dropped without a Close: the hub tells the far side that the flow broke.
    fn abort(self) {}
}

impl AsyncRead for PlainStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match ready!(Pin::new(&mut self.carrier).poll_read(cx, buf)) {
            Err(error) if self.is_end(&error) => Poll::Ready(Ok(())),
            other => Poll::Ready(other),
        }
    }
}

impl AsyncWrite for PlainStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.carrier).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.carrier).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.carrier).poll_shutdown(cx)
    }
}
