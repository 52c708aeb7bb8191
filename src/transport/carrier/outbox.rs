//! Frames on their way to the transport.
//!
//! Owns the frame that is being gathered or sent, the control frames that wait for their turn, and the masking keys.
//! Does not know liveness or the closing handshake. Invariant: at most one data frame is held, and nothing comes
//! between its bytes.

use std::{
    io,
    ops::Range,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::io::AsyncWrite;

use super::MAX_MESSAGE;
use crate::proto::websocket::{self, End, HEADROOM, Mask};

/// Control frames that wait, in bytes: a ping, a Close and the latest pong; further pongs are not owed.
const MAX_CONTROL_OUT: usize = 512;
/// Masking keys drawn at once, so that a small frame does not cost a system call for its key.
const KEYS: usize = 64;

#[derive(Debug)]
pub(super) struct Outbox {
    keys: Option<Keys>,
    /// Room for a header, and the payload behind it. Empty if there is none.
    frame: Vec<u8>,
    mask: Option<Mask>,
    /// What is left of a frame that takes no more; empty while it is gathered.
    sealed: Range<usize>,
    /// Some of the sealed frame is out.
    mid_frame: bool,
    control: Vec<u8>,
    /// The transport has something that it was not told to flush.
    unflushed: bool,
}

impl Outbox {
    pub(super) fn new(end: End) -> Self {
        Self {
            keys: (end == End::Client).then(Keys::default),
            frame: Vec::new(),
            mask: None,
            sealed: 0..0,
            mid_frame: false,
            control: Vec::new(),
            unflushed: false,
        }
    }

    /// Bytes of payload that have been gathered.
    pub(super) fn gathered(&self) -> usize {
        if self.sealed.is_empty() { self.frame.len().saturating_sub(HEADROOM) } else { 0 }
    }

    /// True if the transport may hold back something of ours.
    pub(super) fn is_unflushed(&self) -> bool {
        self.unflushed || !self.control.is_empty() || !self.sealed.is_empty()
    }

    /// Adds payload, at most what [`MAX_MESSAGE`] leaves. No frame may be sealed.
    pub(super) fn gather(&mut self, bytes: &[u8], whole: usize) {
        if self.frame.is_empty() {
            self.frame.reserve(HEADROOM + whole.min(MAX_MESSAGE));
            self.frame.extend_from_slice(&[0; HEADROOM]);
            self.mask = self.keys.as_mut().map(Keys::next);
        }
        match &mut self.mask {
            Some(mask) => mask.copy(bytes, &mut self.frame),
            None => self.frame.extend_from_slice(bytes),
        }
    }

    /// The frame takes no more. True if there is one that was gathered.
    pub(super) fn seal(&mut self) -> bool {
        let gathered = self.gathered() > 0;
        if gathered {
            let payload = HEADROOM..self.frame.len();
            self.sealed = websocket::put_header(&mut self.frame, &payload, self.mask)..payload.end;
        }
        gathered
    }

    pub(super) fn ping(&mut self, number: u64) {
        let mask = self.mask_once();
        self.control(websocket::ping(&number.to_be_bytes(), mask));
    }

    pub(super) fn pong(&mut self, payload: &[u8]) {
        let mask = self.mask_once();
        self.control(websocket::pong(payload, mask));
    }

    pub(super) fn close(&mut self, code: Option<u16>, reason: &str) {
        let mask = self.mask_once();
        self.control(websocket::close(code, reason, mask));
    }

    /// Gives memory back; for a carrier that idles.
    pub(super) fn shrink(&mut self) {
        if self.frame.is_empty() {
            self.frame = Vec::new();
        }
        if self.control.is_empty() {
            self.control = Vec::new();
        }
    }

    /// Gives the transport the sealed frame and the control frames.
    pub(super) fn poll_drain<S: AsyncWrite + Unpin>(
        &mut self,
        io: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            let control = !self.mid_frame && !self.control.is_empty();
            let bytes = if control { &self.control[..] } else { &self.frame[self.sealed.clone()] };
            if bytes.is_empty() {
                return Poll::Ready(Ok(()));
            }
            let written = ready!(Pin::new(&mut *io).poll_write(cx, bytes))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            if control {
                self.control.drain(..written);
                continue;
            }
            self.sealed.start += written;
            self.mid_frame = !self.sealed.is_empty();
            if !self.mid_frame {
                self.sealed = 0..0;
                self.frame.clear();
            }
        }
    }

    /// Gives the transport everything that is complete, and sees that it leaves.
    pub(super) fn poll_flush<S: AsyncWrite + Unpin>(
        &mut self,
        io: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(io, cx))?;
        if self.unflushed {
            ready!(Pin::new(io).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn control(&mut self, frame: Vec<u8>) {
        if self.control.len() + frame.len() <= MAX_CONTROL_OUT {
            self.control.extend_from_slice(&frame);
        }
    }

    fn mask_once(&mut self) -> Option<Mask> {
        self.keys.as_mut().map(Keys::next)
    }
}

/// Masking keys, which nobody outside may predict (RFC 6455, 10.3).
#[derive(Default)]
struct Keys {
    drawn: Vec<[u8; 4]>,
}

impl Keys {
    fn next(&mut self) -> Mask {
        if self.drawn.is_empty() {
            let mut bytes = [0; 4 * KEYS];
            // The system's source fails only before it is seeded, at boot; TLS above could not have been set up then.
            // An unmasked frame would still be a correct one.
            let _ = getrandom::fill(&mut bytes);
            self.drawn.extend(bytes.as_chunks::<4>().0);
        }
        Mask::new(self.drawn.pop().unwrap_or_default())
    }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Keys")
    }
}
