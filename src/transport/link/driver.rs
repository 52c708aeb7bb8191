//! What moves bytes between a link's core and its carrier.
//!
//! Owns the carrier, the frame on its way out, the timer, and the link's share of the replay budget. Does not know who
//! polls: everything happens inside the application's reads and writes. Invariant: after each poll that returns
//! `Pending`, whatever can make progress possible (carrier, timer, budget, attach) will wake the application.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    sync::watch,
    time::Sleep,
};

use super::{BoxedCarrier, DetachReason, EndReason, LinkId, LinkSettings, Status, budget::Reservation, wakers::Wakers};
use crate::proto::link::{AttachError, Core, Event, Frame, Positions, Read};

/// Steps in one poll before others get their turn: a peer that sends nothing but heads cannot keep a thread.
const TURN: usize = 64;

/// Bytes taken at once when they do not go straight to the reader: enough for heads, and for skipping at speed.
const SCRATCH: usize = 2048;

/// What the book-keeping of one write may cost beside its bytes.
const WRITE_COST: usize = 256;

/// Bytes taken at once while a writer waits for room and nobody reads.
const PUMP: usize = 16 * 1024;

pub(super) struct Driver {
    pub(super) core: Core,
    id: LinkId,
    carrier: Option<BoxedCarrier>,
    sending: Option<Sending>,
    /// Something was written to the carrier since its last flush.
    dirty: bool,
    timer: Option<Pin<Box<Sleep>>>,
    armed: Option<Instant>,
    /// A writer, a flush or a shutdown waits for the other side.
    blocked: bool,
    /// A reader waits: input is its business, not a writer's.
    reading: bool,
    wakers: Arc<Wakers>,
    status: watch::Sender<Status>,
    settings: LinkSettings,
    reservation: Reservation,
    counted: i64,
}

/// A frame of which so many bytes are out.
struct Sending {
    frame: Frame,
    done: usize,
}

impl Driver {
    pub(super) fn new(
        core: Core,
        id: LinkId,
        settings: LinkSettings,
        wakers: Arc<Wakers>,
        status: watch::Sender<Status>,
    ) -> Self {
        settings.metrics.links.inc();
        let reservation = settings.budget.reservation();
        Self {
            core,
            id,
            carrier: None,
            sending: None,
            dirty: false,
            timer: None,
            armed: None,
            blocked: false,
            reading: false,
            wakers,
            status,
            settings,
            reservation,
            counted: 0,
        }
    }

    // === the application's calls ===

    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let now = self.begin(cx);
        self.pump_out(cx, now, true);
        let polled = self.read_some(cx, now, buf);
        self.reading = polled.is_pending();
        self.pump_out(cx, now, true);
        self.rest(cx);
        polled
    }

    pub(super) fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let now = self.begin(cx);
        let polled = self.write_some(cx, now, bytes.len(), |core| core.write(bytes));
        self.rest(cx);
        polled
    }

    /// Waits until a turn would be taken at once, or as much of it as this link ever takes; says of how many bytes.
    pub(super) fn poll_turn(&mut self, cx: &mut Context<'_>, most: usize) -> Poll<io::Result<usize>> {
        let now = self.begin(cx);
        let turn = self.core.turn(most);
        let mut polled = self.check_room(turn);
        if polled.is_pending() {
            self.core.flush();
            self.pump_both(cx, now);
            polled = self.check_room(turn);
            self.blocked |= polled.is_pending();
            self.rest(cx);
        }
        polled.map_ok(|()| turn)
    }

    pub(super) fn poll_write_turn(&mut self, cx: &mut Context<'_>, bytes: &mut BytesMut) -> Poll<io::Result<()>> {
        let now = self.begin(cx);
        // A block that is kept counts with its memory.
        let polled = self.write_some(cx, now, bytes.capacity(), |core| core.write_block(bytes));
        self.rest(cx);
        polled.map_ok(drop)
    }

    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let now = self.begin(cx);
        self.core.flush();
        self.pump_both(cx, now);
        let polled = self.check_sent();
        self.blocked |= polled.is_pending();
        self.rest(cx);
        polled
    }

    pub(super) fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let now = self.begin(cx);
        self.core.finish();
        self.pump_both(cx, now);
        let polled = self.check_finished(cx);
        self.blocked |= polled.is_pending();
        self.rest(cx);
        polled
    }

    // === the control's calls ===

    pub(super) fn attach(
        &mut self,
        carrier: BoxedCarrier,
        epoch: u64,
        positions: Positions,
    ) -> Result<Option<BoxedCarrier>, AttachError> {
        let now = now();
        let first = self.core.epoch() == 0;
        let (was_attached, held) = (self.core.is_attached(), self.core.replay_bytes());
        // A carrier that is replaced may have been silent for a while.
        let waited_since = if was_attached { self.core.unanswered_since() } else { Some(self.core.since()) };
        let attached = self.core.attach(now, epoch, positions);
        self.announce_end();
        let again = attached?;
        let former = self.carrier.replace(carrier);
        (self.sending, self.dirty) = (None, false);
        if !first {
            let stall = waited_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
            let reason = if was_attached { "replaced" } else { self.detach_label() };
            self.settings.metrics.resumed(reason, stall, again);
            tracing::info!(link = %self.id.short(), epoch, held, "link resumed after {:.1} s, {again} bytes sent again",
                stall.as_secs_f64());
        }
        if !was_attached {
            self.settings.metrics.attached.inc();
        }
        self.status.send_modify(|status| status.attached = true);
        Ok(former)
    }

    /// Ends the link; what can be told to the other side without waiting is told.
    pub(super) fn fail(&mut self, cx: &mut Context<'_>, reason: EndReason) {
        self.core.fail(reason);
        self.say_farewell(cx);
    }

    /// A hello of that number arrived.
    pub(super) fn asked(&mut self, epoch: u64) -> Result<Positions, AttachError> {
        let answer = self.core.asked(epoch);
        self.announce_end();
        answer
    }

    // === reading ===

    fn read_some(&mut self, cx: &mut Context<'_>, now: Instant, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        for _ in 0..TURN {
            if let Poll::Ready(read) = self.read_inbox(now, buf) {
                return Poll::Ready(read);
            }
            let room = self.core.direct_room();
            if room > 0 {
                let delivered = ready!(self.read_direct(cx, now, buf, room));
                if delivered {
                    return Poll::Ready(Ok(()));
                }
            } else if !ready!(self.read_frame::<SCRATCH>(cx, now)) {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// What the core has for the reader.
    fn read_inbox(&mut self, now: Instant, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let wanted = self.core.unread_bytes().min(buf.remaining());
        let read = self.core.read(now, buf.initialize_unfilled_to(wanted));
        self.announce_end();
        match read {
            Read::Bytes(count) => {
                buf.advance(count);
                Poll::Ready(Ok(()))
            }
            Read::End => Poll::Ready(Ok(())),
            Read::Lost => Poll::Ready(Err(self.end_error())),
            Read::Nothing => Poll::Pending,
        }
    }

    /// The payload of a frame goes from the carrier to the reader without a stop. False: the carrier broke.
    fn read_direct(&mut self, cx: &mut Context<'_>, now: Instant, buf: &mut ReadBuf<'_>, room: usize) -> Poll<bool> {
        let Some(carrier) = &mut self.carrier else { return Poll::Pending };
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut carrier.take(room as u64)).poll_read(cx, buf));
        let count = buf.filled().len() - before;
        if count == 0 || read.is_err() {
            self.lose(now, read.err());
            return Poll::Ready(false);
        }
        self.core.direct(now, count);
        Poll::Ready(true)
    }

    /// Bytes of at most one frame go from the carrier to the core. False: there is no carrier.
    fn read_frame<const N: usize>(&mut self, cx: &mut Context<'_>, now: Instant) -> Poll<bool> {
        let Some(carrier) = &mut self.carrier else { return Poll::Ready(false) };
        let mut scratch = [0; N];
        let mut buf = ReadBuf::new(&mut scratch[..self.core.wanted().min(N)]);
        let read = ready!(Pin::new(carrier).poll_read(cx, &mut buf));
        if buf.filled().is_empty() || read.is_err() {
            self.lose(now, read.err());
            return Poll::Ready(true);
        }
        // An error has ended the link, which is announced below.
        let _ = self.core.handle_input(now, self.core.epoch(), buf.filled());
        self.announce_end();
        if self.blocked {
            self.blocked = false;
            self.wakers.writer.wake();
        }
        Poll::Ready(true)
    }

    // === writing ===

    /// `write` gives the core some bytes, which take no more than `length`, and says how many.
    fn write_some(
        &mut self,
        cx: &mut Context<'_>,
        now: Instant,
        length: usize,
        write: impl FnOnce(&mut Core) -> usize,
    ) -> Poll<io::Result<usize>> {
        for attempt in 0..2 {
            if self.core.ended().is_some() {
                return Poll::Ready(Err(self.end_error()));
            }
            if self.core.is_finishing() {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            let room = if self.sending.is_some() { 0 } else { self.core.writable().min(length) };
            let covered = self.reservation.cover(self.core.replay_bytes() + room + WRITE_COST, &self.wakers);
            if length == 0 || (room > 0 && covered) {
                let taken = write(&mut self.core);
                self.pump_out(cx, now, false);
                return Poll::Ready(Ok(taken));
            }
            if !covered {
                self.core.flush();
            }
            if attempt == 0 {
                self.pump_both(cx, now);
            }
        }
        self.blocked = true;
        Poll::Pending
    }

    /// Whether there is room for a turn. An empty link has room for what it can have: a window smaller than a turn would
    /// be waited for without end.
    fn check_room(&self, turn: usize) -> Poll<io::Result<()>> {
        if self.core.ended().is_some() {
            return Poll::Ready(Err(self.end_error()));
        }
        let is_room = self.core.writable() >= turn || self.core.replay_bytes() == 0;
        if self.sending.is_none() && is_room { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    fn pump_both(&mut self, cx: &mut Context<'_>, now: Instant) {
        self.pump_out(cx, now, true);
        // A reader that waits is woken by the carrier, too, and takes payload with one copy less. But if it does not
        // come back (its future was dropped), the writer shall not wait for it twice.
        if !std::mem::take(&mut self.reading) {
            self.pump_in(cx, now);
            self.pump_out(cx, now, true);
        }
    }

    /// A writer waits: take acknowledgements even if nobody reads. Payload goes to the core, bounded by the credit.
    fn pump_in(&mut self, cx: &mut Context<'_>, now: Instant) {
        let unread = self.core.unread_bytes();
        for turn in 0.. {
            if self.core.ended().is_some() || self.read_frame::<PUMP>(cx, now) != Poll::Ready(true) {
                break;
            }
            if turn == TURN {
                cx.waker().wake_by_ref();
                break;
            }
        }
        if self.core.unread_bytes() > unread || self.core.ended().is_some() {
            self.wakers.reader.wake();
        }
    }

    /// Sends what is due; flushes the carrier only behind the last frame.
    fn pump_out(&mut self, cx: &mut Context<'_>, now: Instant, flush: bool) {
        if let Poll::Ready(Err(error)) = self.try_pump_out(cx, now, flush) {
            // The other side may have said why before it left. The credit bounds how much there is.
            while self.core.ended().is_none() && self.read_frame::<PUMP>(cx, now) == Poll::Ready(true) {}
            self.wakers.reader.wake();
            self.lose(now, Some(error));
        }
        self.announce_end();
    }

    fn try_pump_out(&mut self, cx: &mut Context<'_>, now: Instant, flush: bool) -> Poll<io::Result<()>> {
        let Some(carrier) = &mut self.carrier else { return Poll::Ready(Ok(())) };
        loop {
            if self.sending.is_none() {
                self.sending = self.core.poll_transmit(now).map(|frame| Sending { frame, done: 0 });
            }
            let Some(sending) = &mut self.sending else { break };
            self.dirty = true;
            ready!(sending.poll_send(carrier, cx))?;
            self.sending = None;
        }
        if flush && self.dirty {
            ready!(Pin::new(carrier).poll_flush(cx))?;
            self.dirty = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Whether all that was written is on its way.
    fn check_sent(&mut self) -> Poll<io::Result<()>> {
        if self.core.ended().is_some() {
            return Poll::Ready(Err(self.end_error()));
        }
        if self.core.all_sent() && self.sending.is_none() && !self.dirty {
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    }

    /// Whether the other side has consumed everything; then the carrier of a finished link is closed in order.
    fn check_finished(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.core.ended() {
            Some(EndReason::Finished) => {
                if let Some(carrier) = &mut self.carrier {
                    // The streams have ended; how the carrier ends changes nothing.
                    let _ = ready!(Pin::new(carrier).poll_shutdown(cx));
                    self.carrier = None;
                }
                Poll::Ready(Ok(()))
            }
            _ if self.core.finished() => Poll::Ready(Ok(())),
            Some(_) => Poll::Ready(Err(self.end_error())),
            None => Poll::Pending,
        }
    }

    // === turns ===

    fn begin(&mut self, cx: &mut Context<'_>) -> Instant {
        let now = now();
        if self.armed.is_some_and(|armed| armed <= now) {
            self.armed = None;
            self.core.handle_timeout(now);
            self.announce_end();
        }
        if self.core.ended().is_some() {
            self.pump_out(cx, now, true);
        }
        now
    }

    /// Before the application waits: arm the timer, settle the accounts.
    fn rest(&mut self, cx: &mut Context<'_>) {
        let held = self.core.replay_bytes();
        self.reservation.trim(held);
        if held as i64 != self.counted {
            self.settings.metrics.replay_bytes.add(held as i64 - self.counted);
            self.counted = held as i64;
        }
        // While a frame waits for the carrier nothing else can be sent: no deadline of the attached core matters.
        let deadline = if self.sending.is_some() { None } else { self.core.poll_timeout() };
        let Some(deadline) = deadline.filter(|deadline| self.armed.is_none_or(|armed| *deadline < armed)) else {
            return;
        };
        self.armed = Some(deadline);
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline.into())));
        timer.as_mut().reset(deadline.into());
        if timer.as_mut().poll(cx).is_ready() {
            cx.waker().wake_by_ref();
        }
    }

    /// The carrier is gone; the link waits for the next one.
    pub(super) fn lose(&mut self, now: Instant, error: Option<io::Error>) {
        self.carrier = None;
        (self.sending, self.dirty) = (None, false);
        if !self.core.is_attached() {
            return;
        }
        let held = self.core.replay_bytes();
        self.core.detach(now, self.core.epoch());
        let reason = DetachReason::from_io(error.as_ref());
        tracing::info!(link = %self.id.short(), reason = %reason, held, "link lost its carrier: its flows wait");
        self.settings.metrics.attached.dec();
        self.status.send_modify(|status| {
            status.attached = false;
            status.detached = Some(reason);
        });
    }

    /// Tells everyone how the link ended, once.
    fn announce_end(&mut self) {
        let Some(Event::Ended(reason)) = self.core.poll_event() else { return };
        if let Some(label) = lost_label(&reason) {
            self.settings.metrics.lost.with_label_values(&[label]).inc();
            tracing::warn!(link = %self.id.short(), reason = %reason, "link ended: its flows are reset");
        } else {
            tracing::info!(link = %self.id.short(), reason = %reason, "link ended");
        }
        self.settings.metrics.links.dec();
        self.status.send_modify(|status| {
            if std::mem::take(&mut status.attached) {
                self.settings.metrics.attached.dec();
            }
            status.ended = Some(reason);
        });
        self.reservation.trim(0);
        self.settings.metrics.replay_bytes.sub(std::mem::take(&mut self.counted));
        self.wakers.wake_both();
    }

    /// Sends the last frame and closes the carrier, as far as that goes without waiting.
    fn say_farewell(&mut self, cx: &mut Context<'_>) {
        self.announce_end();
        self.pump_out(cx, now(), true);
        if let (Some(carrier), None) = (&mut self.carrier, &self.sending) {
            let _ = Pin::new(carrier).poll_shutdown(cx);
        }
    }

    /// The last word of a link that has ended, behind the frame that was on its way, and the end of its carrier. What still
    /// comes is of no interest, but a connection that is closed in front of it takes the last word with it.
    pub(super) fn poll_farewell(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.announce_end();
        let sent = self.try_pump_out(cx, now(), true);
        let Some(carrier) = self.carrier.as_mut().filter(|_| self.core.ended().is_some()) else {
            return Poll::Ready(());
        };
        let over = match sent {
            Poll::Ready(Ok(())) => Pin::new(&mut *carrier).poll_shutdown(cx).is_ready(),
            Poll::Ready(Err(_)) => true,
            Poll::Pending => false,
        };
        if over {
            self.carrier = None;
            return Poll::Ready(());
        }
        for _ in 0..TURN {
            let mut scratch = [0; SCRATCH];
            let mut buf = ReadBuf::new(&mut scratch);
            match Pin::new(&mut *carrier).poll_read(cx, &mut buf) {
                // How the carrier ends shows above.
                Poll::Pending | Poll::Ready(Err(_)) => return Poll::Pending,
                Poll::Ready(Ok(())) if buf.filled().is_empty() => return Poll::Pending,
                Poll::Ready(Ok(())) => {}
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// The application is gone: so is the link.
    pub(super) fn abandon(&mut self, cx: &mut Context<'_>) -> Option<BoxedCarrier> {
        if self.core.ended().is_none() {
            self.core.close("its mux has ended");
        }
        self.say_farewell(cx);
        self.timer = None;
        self.carrier.take()
    }

    fn end_error(&self) -> io::Error {
        let reason = self.core.ended().cloned().unwrap_or(EndReason::Finished);
        io::Error::new(io::ErrorKind::ConnectionAborted, reason)
    }

    fn detach_label(&self) -> &'static str {
        self.status.borrow().detached.as_ref().map_or("other", DetachReason::label)
    }
}

impl Sending {
    fn poll_send(&mut self, carrier: &mut BoxedCarrier, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (head, payload) = (&self.frame.head, &self.frame.payload);
        while self.done < head.len() + payload.len() {
            let carrier = Pin::new(&mut *carrier);
            let written = if self.done < head.len() {
                let parts = [IoSlice::new(&head[self.done..]), IoSlice::new(payload)];
                let parts = if payload.is_empty() { &parts[..1] } else { &parts[..] };
                ready!(carrier.poll_write_vectored(cx, parts))?
            } else {
                ready!(carrier.poll_write(cx, &payload[self.done - head.len()..]))?
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.done += written;
        }
        Poll::Ready(Ok(()))
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// The word in metrics for a lost session; `None` for an end that someone meant.
fn lost_label(reason: &EndReason) -> Option<&'static str> {
    match reason {
        EndReason::Finished | EndReason::ClosedHere(_) | EndReason::ClosedByPeer(_) => None,
        EndReason::Expired(_) => Some("expired"),
        EndReason::SessionLost(_) => Some("unknown"),
        EndReason::Violation(_) => Some("violation"),
    }
}
