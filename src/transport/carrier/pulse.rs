//! The carrier's pulse: what the clock asks for, done on the socket.
//!
//! Owns the timer and the ping on its way. Does not know when a ping is due or what silence means: that is
//! [`Life`](super::life::Life). Invariant: a blocked writer never loses its place among the transport's wakers to a
//! ping.

use std::{
    io,
    task::{Context, Poll},
};

use super::{Carrier, CarrierError, farewell::Farewell, life::Due};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::Instant,
};

impl<S: AsyncRead + AsyncWrite + Unpin> Carrier<S> {
    pub(super) fn alive(&mut self, now: Instant) {
        if let Some(life) = &mut self.life {
            life.heard(now);
        }
        self.shared.set_heard(now);
    }

    /// Does what the clock asks for; Ready if that ended the carrier.
    pub(super) fn poll_life(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.poll_ping(cx);
        let Some(life) = &mut self.life else { return Poll::Pending };
        self.shared.on_probe(cx.waker());
        if self.shared.take_probe() {
            if let Some(address) = self.shared.lost_address() {
                self.finish(Err(CarrierError::AddressGone(address)));
                return Poll::Ready(());
            }
            life.probe(Instant::now());
        }
        loop {
            let now = Instant::now();
            let deadline = match life.due(now) {
                Due::Nothing(deadline) => deadline,
                Due::Ping(number) => {
                    self.ping = Some(number);
                    continue;
                }
                Due::Death => {
                    let silence = self.shared.silent_for(now);
                    self.finish(Err(CarrierError::Silent(silence)));
                    return Poll::Ready(());
                }
            };
            self.shared.set_suspect(life.is_suspect(now));
            if self.timer.deadline() > deadline || self.timer.is_elapsed() {
                self.timer.as_mut().reset(deadline);
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                break;
            }
        }
        if self.ping.is_some() {
            self.poll_ping(cx);
        }
        Poll::Pending
    }

    /// Sends the waiting ping and whatever else waits, unless the writer is blocked: then it does so when it goes on
    /// (it must not lose its place among the wakers of the transport).
    fn poll_ping(&mut self, cx: &mut Context<'_>) {
        if let Some(number) = self.ping.filter(|_| self.writer.is_none() && self.farewell == Farewell::None) {
            self.send_ping(number);
        }
        // A write error is found by the reader, who learns more about it.
        let _ = self.poll_control(cx);
    }

    /// Sends what is complete, unless the writer is blocked and will do so.
    pub(super) fn poll_control(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.writer.is_some() || !self.outbox.is_unflushed() {
            return Poll::Pending;
        }
        self.outbox.poll_flush(&mut self.io, cx)
    }

    pub(super) fn send_ping(&mut self, number: u64) {
        self.ping = None;
        self.outbox.shrink();
        self.outbox.ping(number);
        if let Some(life) = &mut self.life {
            life.sent_ping(number, Instant::now());
        }
    }
}
