//! The state of one side of a link.
//!
//! Owns both directions, the attached carrier's number, and the end. Does not know bytes on carriers before their hello
//! is done. Invariant: `consumed <= received`, each received position was delivered once; after the end nothing changes
//! but that received bytes can be read.

use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes, BytesMut};

use super::{
    EndReason, INITIAL_WINDOW, Violation,
    frame::{ANSWER_AT_ONCE, Frame, HEAD, Head, Kind, MAX_PAYLOAD, MAX_REASON},
    inbox::Inbox,
    outbox::{CHUNK_COST, Outbox},
    pace::{Acks, Window},
};

/// Unsent bytes that are accepted from the application: one frame being filled. The rest waits in the mux, where it can
/// be ordered.
const MAX_UNSENT: u64 = MAX_PAYLOAD as u64;

/// A link from whose other side no frame ever came lives this long without a carrier: the answer to its first hello may
/// have been lost, and then nobody will ever resume it.
const UNCONFIRMED_GRACE: Duration = Duration::from_secs(60);

/// Memory kept for speed is given back after this time without traffic.
const IDLE_AFTER: Duration = Duration::from_secs(1);

/// What the hello settled, and the bounds of this side.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Bytes that this side takes ahead of their consumption.
    pub receive_window: u32,
    /// Bytes that the other side takes.
    pub peer_window: u32,
    /// What the replay window starts with.
    pub initial_window: usize,
    /// What it never exceeds.
    pub max_window: usize,
    /// How long the link lives without a carrier.
    pub resume_for: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            receive_window: 1024 * 1024,
            peer_window: 1024 * 1024,
            initial_window: INITIAL_WINDOW,
            max_window: 32 * 1024 * 1024,
            resume_for: Duration::from_secs(15 * 60),
        }
    }
}

/// How far one side has come with what the other one sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Positions {
    /// All before it was received.
    pub received: u64,
    /// All before it was read by the application.
    pub consumed: u64,
}

/// What a read gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Read {
    /// So many bytes.
    Bytes(usize),
    /// Nothing at present.
    Nothing,
    /// The other side ended the stream, all of which was read.
    End,
    /// The link ended before the stream did: see [`Core::ended`].
    Lost,
}

/// Why a carrier was not attached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AttachError {
    /// The link has ended, perhaps just now by impossible positions.
    #[error("the link has ended: {0}")]
    Ended(EndReason),
    /// A newer carrier came first.
    #[error("a newer carrier came first")]
    Stale,
}

/// What the driver must learn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The link has ended.
    Ended(EndReason),
}

/// One side of a link.
#[derive(Debug)]
pub struct Core {
    options: Options,
    attached: bool,
    epoch: u64,
    since: Instant,
    heard_at: Instant,
    confirmed: bool,

    outbox: Outbox,
    window: Window,
    flush_to: u64,
    peer_consumed: u64,
    asked_at: u64,
    fin: Fin,
    shrink_at: Option<Instant>,

    expect: Expect,
    inbox: Inbox,
    received: u64,
    consumed: u64,
    end_at: Option<u64>,
    hurry_at: Option<u64>,
    acks: Acks,

    ended: Option<EndReason>,
    announced: bool,
    parting: Option<Frame>,
    #[cfg(test)]
    pub(crate) fault: Option<super::Fault>,
}

/// Where our own end of the stream stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Fin {
    written: bool,
    /// On the present carrier.
    sent: bool,
    /// On any carrier.
    ever_sent: bool,
    acknowledged: bool,
}

/// What the next bytes from the carrier are.
#[derive(Debug)]
enum Expect {
    Head { bytes: [u8; HEAD], have: usize },
    Data { skip: usize, left: usize },
    Reason { code: u8, text: Vec<u8>, left: usize },
}

impl Expect {
    const fn head() -> Self {
        Self::Head { bytes: [0; HEAD], have: 0 }
    }
}

impl Core {
    /// A link without a carrier. The first carrier is attached with number 1 and positions of zero.
    pub fn new(now: Instant, options: Options) -> Self {
        Self {
            options,
            attached: false,
            epoch: 0,
            since: now,
            heard_at: now,
            confirmed: false,
            outbox: Outbox::new(),
            window: Window::new(options.initial_window, options.max_window),
            flush_to: 0,
            peer_consumed: 0,
            asked_at: 0,
            fin: Fin { written: false, sent: false, ever_sent: false, acknowledged: false },
            shrink_at: None,
            expect: Expect::head(),
            inbox: Inbox::default(),
            received: 0,
            consumed: 0,
            end_at: None,
            hurry_at: None,
            acks: Acks::new(now),
            ended: None,
            announced: false,
            parting: None,
            #[cfg(test)]
            fault: None,
        }
    }

    // === the application's side ===

    /// How many bytes a write would take now.
    pub fn writable(&self) -> usize {
        if self.ended.is_some() || self.fin.written {
            return 0;
        }
        let unsent = MAX_UNSENT.saturating_sub(self.outbox.end() - self.outbox.next()) as usize;
        #[cfg(test)]
        if self.fault == Some(super::Fault::UnboundedReplay) {
            return unsent;
        }
        unsent.min(self.window.limit().saturating_sub(self.outbox.held() + 2 * CHUNK_COST))
    }

    /// How many bytes should be written at once: what they hold up, nobody can overtake.
    pub fn turn(&self, most: usize) -> usize {
        self.window.turn(most)
    }

    /// Takes bytes to send, as many as there is room for. They may wait for a full frame until [`flush`](Self::flush).
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.writable());
        self.outbox.push(&bytes[..taken]);
        taken
    }

    /// Like [`write`](Self::write), from the front of `bytes`; a block that can be sent as one frame is kept as it is, and
    /// empty memory is left in its place.
    pub fn write_block(&mut self, bytes: &mut BytesMut) -> usize {
        let (length, room) = (bytes.len(), self.writable());
        if Outbox::keeps(bytes) && bytes.capacity() <= room {
            self.outbox.push_block(bytes);
            return length;
        }
        let taken = self.write(&bytes[..length.min(room)]);
        bytes.advance(taken);
        taken
    }

    /// All that was written shall be sent without waiting for more.
    pub fn flush(&mut self) {
        self.flush_to = self.outbox.end();
    }

    /// Ends the outgoing stream behind what was written.
    pub fn finish(&mut self) {
        self.fin.written = true;
        self.flush();
    }

    /// True when no more can be written, because the end was.
    pub fn is_finishing(&self) -> bool {
        self.fin.written
    }

    /// True when the other side has consumed everything, the end included.
    pub fn finished(&self) -> bool {
        self.fin.acknowledged
    }

    /// True if a frame is worth sending: bytes were flushed, or fill a frame, or fill the window so that no more come.
    pub fn unsent(&self) -> bool {
        let unsent = self.outbox.end() - self.outbox.next();
        let full = self.outbox.has_frame() || self.window.limit() <= self.outbox.held() + 2 * CHUNK_COST;
        unsent > 0 && (full || self.outbox.next() < self.flush_to)
    }

    /// True if nothing waits for a carrier: all that was written, and the end if there is one, was sent on this one.
    pub fn all_sent(&self) -> bool {
        self.attached && self.outbox.next() == self.outbox.end() && self.fin.sent == self.fin.written
    }

    /// Moves received bytes out.
    pub fn read(&mut self, now: Instant, out: &mut [u8]) -> Read {
        if !self.inbox.is_empty() {
            let taken = self.inbox.take(out);
            self.advance_consumed(now, taken as u64);
            return Read::Bytes(taken);
        }
        match self.end_at {
            Some(end) if end < self.consumed => return Read::End,
            Some(end) if end == self.consumed && self.ended.is_none() => {
                self.advance_consumed(now, 1);
                self.acks.hurry();
                return Read::End;
            }
            Some(end) if end == self.consumed => {
                self.consumed += 1;
                return Read::End;
            }
            _ => {}
        }
        #[cfg(test)]
        if self.fault == Some(super::Fault::ResetReadsAsEof) && self.ended.is_some() {
            return Read::End;
        }
        if self.ended.is_some() { Read::Lost } else { Read::Nothing }
    }

    /// Bytes of the present frame that the application may read from the carrier without a stop here.
    pub fn direct_room(&self) -> usize {
        match self.expect {
            Expect::Data { skip: 0, left } if self.attached && self.ended.is_none() && self.inbox.is_empty() => left,
            _ => 0,
        }
    }

    /// The application read so many bytes from the carrier, at most [`direct_room`](Self::direct_room).
    pub fn direct(&mut self, now: Instant, count: usize) {
        if let Expect::Data { left, .. } = &mut self.expect {
            *left -= count;
            if *left == 0 {
                self.expect = Expect::head();
            }
            // On a slow path a frame takes longer than silence may last.
            self.heard_at = now;
            self.received += count as u64;
            self.advance_consumed(now, count as u64);
        }
    }

    /// How many bytes from the carrier complete what is expected next: never more than belong to the present frame.
    pub fn wanted(&self) -> usize {
        match &self.expect {
            Expect::Head { have, .. } => HEAD - have,
            Expect::Data { left, .. } | Expect::Reason { left, .. } => *left,
        }
    }

    /// Closes the link and says so to the other side, if a carrier is attached.
    pub fn close(&mut self, reason: &str) {
        self.end(EndReason::ClosedHere(reason.to_owned()));
    }

    /// Ends the link for a reason found outside the stream: a refused resume, a wrong proof.
    pub fn fail(&mut self, reason: EndReason) {
        self.end(reason);
    }

    // === the carrier's side ===

    /// A hello asks to attach the carrier of that number: what to answer. A number that was used before ends the link.
    pub fn asked(&mut self, epoch: u64) -> Result<Positions, AttachError> {
        if epoch == self.epoch {
            self.end(EndReason::Violation(Violation::ReplayedHello));
        }
        match &self.ended {
            Some(reason) => Err(AttachError::Ended(reason.clone())),
            None if epoch < self.epoch => Err(AttachError::Stale),
            None => Ok(self.positions()),
        }
    }

    /// Gives the link its next carrier; the former one is fenced. Returns how many bytes are sent again.
    pub fn attach(&mut self, now: Instant, epoch: u64, peer: Positions) -> Result<u64, AttachError> {
        if let Some(reason) = &self.ended {
            return Err(AttachError::Ended(reason.clone()));
        }
        if epoch <= self.epoch {
            return Err(AttachError::Stale);
        }
        let sent = self.outbox.sent() + u64::from(self.fin.ever_sent);
        if peer.received > sent || peer.consumed > peer.received {
            self.end(EndReason::Violation(Violation::ImpossiblePositions));
            return Err(AttachError::Ended(EndReason::Violation(Violation::ImpossiblePositions)));
        }
        (self.attached, self.epoch, self.since) = (true, epoch, now);
        self.expect = Expect::head();
        self.heard_at = now;
        self.window.attached();
        self.acks.hurry();
        self.acknowledge(now, peer.consumed.max(self.peer_consumed));
        self.fin.sent = peer.received > self.outbox.end();
        self.outbox.rewind(peer.received.min(self.outbox.end()));
        let again = self.outbox.sent() - self.outbox.next();
        #[cfg(test)]
        if self.fault == Some(super::Fault::ReplaySkipsAFrame) && again > 0 {
            let _ = self.outbox.next_frame(MAX_PAYLOAD);
        }
        self.flush_to = self.flush_to.max(self.outbox.sent());
        self.asked_at = self.outbox.next();
        Ok(again)
    }

    /// The carrier of that number is gone.
    pub fn detach(&mut self, now: Instant, epoch: u64) {
        if self.attached && epoch == self.epoch {
            (self.attached, self.since) = (false, now);
            self.window.attached();
        }
    }

    /// Bytes came from the carrier of that number. An error has ended the link.
    pub fn handle_input(&mut self, now: Instant, epoch: u64, mut bytes: &[u8]) -> Result<(), Violation> {
        let fenced = epoch != self.epoch;
        #[cfg(test)]
        let fenced = fenced && self.fault != Some(super::Fault::NotFenced);
        if fenced {
            return Ok(());
        }
        if self.attached && !bytes.is_empty() {
            self.heard_at = now;
        }
        while !bytes.is_empty() && self.attached && self.ended.is_none() {
            let used = self.take_input(now, bytes).inspect_err(|violation| {
                self.end(EndReason::Violation(*violation));
            })?;
            bytes = &bytes[used..];
        }
        Ok(())
    }

    /// A deadline may have passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.shrink_at.is_some_and(|at| at <= now) {
            self.shrink_at = None;
            self.outbox.shrink();
        }
        if !self.attached && self.ended.is_none() && self.since + self.grace() <= now {
            self.end(EndReason::Expired(self.grace()));
        }
    }

    /// The next frame to send on the attached carrier.
    pub fn poll_transmit(&mut self, now: Instant) -> Option<Frame> {
        if self.ended.is_some() {
            return self.parting.take();
        }
        if !self.attached {
            return None;
        }
        let frame = self.data_frame(now).or_else(|| self.fin_frame(now)).or_else(|| self.ack_frame(now));
        self.finish_if_done();
        frame
    }

    /// What the driver must learn.
    pub fn poll_event(&mut self) -> Option<Event> {
        let reason = self.ended.as_ref().filter(|_| !self.announced)?;
        self.announced = true;
        Some(Event::Ended(reason.clone()))
    }

    /// When [`handle_timeout`](Self::handle_timeout) or [`poll_transmit`](Self::poll_transmit) wants to be called again.
    pub fn poll_timeout(&self) -> Option<Instant> {
        if self.ended.is_some() {
            return None;
        }
        let carrier = if self.attached { self.acks.due(self.acknowledged()) } else { Some(self.since + self.grace()) };
        [carrier, self.shrink_at].into_iter().flatten().min()
    }

    // === what can be seen ===

    /// How far this side has come; what a hello tells the other one.
    pub fn positions(&self) -> Positions {
        Positions { received: self.received, consumed: self.consumed }
    }

    /// Whether a carrier is attached.
    pub fn is_attached(&self) -> bool {
        self.attached && self.ended.is_none()
    }

    /// Since when it is or is not.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// The number of the newest carrier.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// How the link ended, if it has.
    pub fn ended(&self) -> Option<&EndReason> {
        self.ended.as_ref()
    }

    /// Memory held for replay.
    pub fn replay_bytes(&self) -> usize {
        self.outbox.held()
    }

    /// The present bound of [`replay_bytes`](Self::replay_bytes).
    pub fn window(&self) -> usize {
        self.window.size()
    }

    /// The bound of [`unread_bytes`](Self::unread_bytes).
    pub fn receive_window(&self) -> usize {
        self.options.receive_window as usize
    }

    /// Memory held for reading.
    pub fn unread_bytes(&self) -> usize {
        self.inbox.len()
    }

    /// How long the link has lived without a carrier before it ends.
    pub fn resume_for(&self) -> Duration {
        self.options.resume_for
    }

    /// Whether the other side is known to have the link: a frame of it came, or it proved at a resume that it knows the
    /// secret. The hello of a new link proves nothing: it may have been under way for longer than its sender waited.
    pub fn is_confirmed(&self) -> bool {
        self.confirmed || self.epoch > 1
    }

    /// Since when something sent on this carrier waits while nothing at all is heard.
    pub fn unanswered_since(&self) -> Option<Instant> {
        self.window.waiting_since().map(|sent| sent.max(self.heard_at))
    }

    // === helpers ===

    fn take_input(&mut self, now: Instant, bytes: &[u8]) -> Result<usize, Violation> {
        match &mut self.expect {
            Expect::Head { bytes: head, have } => {
                let used = bytes.len().min(HEAD - *have);
                head[*have..*have + used].copy_from_slice(&bytes[..used]);
                *have += used;
                if *have == HEAD {
                    let head = Head::decode(head)?;
                    self.handle_head(now, &head)?;
                }
                Ok(used)
            }
            Expect::Data { skip, left } => {
                let used = bytes.len().min(*left);
                let skipped = used.min(*skip);
                (*skip, *left) = (*skip - skipped, *left - used);
                if *left == 0 {
                    self.expect = Expect::head();
                }
                self.inbox.push(&bytes[skipped..used]);
                self.received += (used - skipped) as u64;
                Ok(used)
            }
            Expect::Reason { text, left, .. } => {
                let used = bytes.len().min(*left);
                text.extend_from_slice(&bytes[..used]);
                *left -= used;
                self.close_if_complete();
                Ok(used)
            }
        }
    }

    fn handle_head(&mut self, now: Instant, head: &Head) -> Result<(), Violation> {
        self.confirmed = true;
        if head.consumed < self.peer_consumed {
            return Err(Violation::AckRewound);
        }
        if head.consumed > self.outbox.sent() + u64::from(self.fin.ever_sent) {
            return Err(Violation::AckOfUnsent);
        }
        self.acknowledge(now, head.consumed);
        self.expect = match head.kind {
            Kind::Data => self.expect_data(head)?,
            Kind::Ack => Expect::head(),
            Kind::Fin => self.handle_fin(head.position)?,
            Kind::Close => Expect::Reason { code: head.flags, text: Vec::new(), left: head.length },
        };
        self.close_if_complete();
        self.finish_if_done();
        Ok(())
    }

    fn expect_data(&mut self, head: &Head) -> Result<Expect, Violation> {
        self.check_no_gap(head.position)?;
        let end = head.position.checked_add(head.length as u64).ok_or(Violation::Overrun)?;
        if self.end_at.is_some_and(|at| end > at) {
            return Err(Violation::BehindEnd);
        }
        if end > self.consumed + u64::from(self.options.receive_window) {
            return Err(Violation::Overrun);
        }
        if head.flags & ANSWER_AT_ONCE != 0 {
            self.hurry_at = Some(end);
            self.hurry_if_reached();
        }
        let skip = usize::try_from(self.received - head.position).unwrap_or(usize::MAX).min(head.length);
        Ok(Expect::Data { skip, left: head.length })
    }

    fn handle_fin(&mut self, position: u64) -> Result<Expect, Violation> {
        self.check_no_gap(position)?;
        match self.end_at {
            Some(end) if end == position => {}
            None if position == self.received => {
                self.end_at = Some(position);
                self.received += 1;
            }
            _ => return Err(Violation::BehindEnd),
        }
        Ok(Expect::head())
    }

    fn check_no_gap(&self, position: u64) -> Result<(), Violation> {
        if position > self.received {
            return Err(Violation::Gap { position, expected: self.received });
        }
        Ok(())
    }

    /// The other side has consumed up to `position`, which was sent.
    fn acknowledge(&mut self, now: Instant, position: u64) {
        let all = position >= self.outbox.sent();
        if all || position > self.peer_consumed {
            self.window.acknowledged(now, position.min(self.outbox.sent()), all);
        }
        self.peer_consumed = position;
        self.outbox.acknowledge(position.min(self.outbox.end()));
        self.fin.acknowledged |= self.fin.ever_sent && position > self.outbox.end();
        if self.outbox.has_spare() && self.outbox.start() == self.outbox.end() {
            self.shrink_at = Some(now + IDLE_AFTER);
        }
    }

    fn advance_consumed(&mut self, now: Instant, count: u64) {
        self.consumed += count;
        self.acks.consumed(now, self.consumed);
        self.hurry_if_reached();
    }

    fn hurry_if_reached(&mut self) {
        if self.hurry_at.is_some_and(|at| at <= self.consumed) {
            self.hurry_at = None;
            self.acks.hurry();
        }
    }

    /// What the next frame acknowledges.
    fn acknowledged(&self) -> u64 {
        #[cfg(test)]
        if let (Some(super::Fault::AckTooEarly), Expect::Data { left, skip }) = (self.fault, &self.expect) {
            return self.received + (left - skip) as u64;
        }
        self.consumed
    }

    fn data_frame(&mut self, now: Instant) -> Option<Frame> {
        if !self.unsent() {
            return None;
        }
        let credit = (self.peer_consumed + u64::from(self.options.peer_window)).saturating_sub(self.outbox.next());
        let limit = usize::try_from(credit).unwrap_or(usize::MAX);
        let alone = self.outbox.next() == self.peer_consumed;
        let (position, payload) = self.outbox.next_frame(limit.min(MAX_PAYLOAD))?;
        let cramped = self.outbox.held() + MAX_PAYLOAD > self.window.limit() || limit - payload.len() < MAX_PAYLOAD;
        let due = (cramped || self.window.is_long())
            && self.outbox.next() - self.asked_at.min(self.outbox.next()) >= self.answer_after();
        let asking = due || (alone && self.window.samples(now));
        if asking {
            self.asked_at = self.outbox.next();
        }
        self.window.sent(now, self.outbox.next(), self.peer_consumed);
        let flags = if asking { ANSWER_AT_ONCE } else { 0 };
        Some(self.frame(now, Kind::Data, flags, position, payload))
    }

    /// How much is sent between two requests for an immediate answer. The window is twice what a short path holds, so
    /// that an answer for half of it comes before it is full, and each answer is a message through three daemons. On a long
    /// path that would let bytes go in bursts of half a window, which a network's queue may not hold.
    fn answer_after(&self) -> u64 {
        let answers = if self.window.is_long() { 16 } else { 2 };
        (self.window.limit() as u64).min(u64::from(self.options.peer_window)) / answers
    }

    fn fin_frame(&mut self, now: Instant) -> Option<Frame> {
        if !self.fin.written || self.fin.sent || self.outbox.next() != self.outbox.end() {
            return None;
        }
        (self.fin.sent, self.fin.ever_sent) = (true, true);
        Some(self.frame(now, Kind::Fin, 0, self.outbox.end(), Bytes::new()))
    }

    fn ack_frame(&mut self, now: Instant) -> Option<Frame> {
        self.acks.due(self.acknowledged()).filter(|due| *due <= now)?;
        Some(self.frame(now, Kind::Ack, 0, 0, Bytes::new()))
    }

    fn frame(&mut self, now: Instant, kind: Kind, flags: u8, position: u64, payload: Bytes) -> Frame {
        let consumed = self.acknowledged();
        self.acks.told(now, consumed);
        Frame { head: Head { kind, flags, length: payload.len(), position, consumed }.encode(), payload }
    }

    fn close_if_complete(&mut self) {
        if let Expect::Reason { code, text, left: 0 } = &self.expect {
            let text: String = String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).collect();
            let reason = if *code == 0 { EndReason::ClosedByPeer(text) } else { EndReason::SessionLost(text) };
            self.end(reason);
        }
    }

    /// Both directions are over and both sides know.
    fn finish_if_done(&mut self) {
        let end_read = self.end_at.is_some_and(|end| end < self.consumed);
        if end_read && self.fin.acknowledged && self.acks.due(self.consumed).is_none() && self.ended.is_none() {
            self.end(EndReason::Finished);
        }
    }

    fn end(&mut self, reason: EndReason) {
        if self.ended.is_some() {
            return;
        }
        let code = match &reason {
            EndReason::Finished | EndReason::ClosedByPeer(_) => None,
            EndReason::ClosedHere(_) => Some(0),
            EndReason::Violation(_) => Some(1),
            EndReason::Expired(_) | EndReason::SessionLost(_) => Some(2),
        };
        if let (Some(code), true) = (code, self.attached) {
            self.parting = Some(self.close_frame(code, &reason));
        }
        (self.outbox, self.shrink_at) = (Outbox::new(), None);
        self.ended = Some(reason);
    }

    fn close_frame(&self, code: u8, reason: &EndReason) -> Frame {
        let text = match reason {
            EndReason::ClosedHere(text) => text.clone(),
            EndReason::Violation(violation) => violation.to_string(),
            other => other.to_string(),
        };
        let text = Bytes::copy_from_slice(&text.as_bytes()[..text.floor_char_boundary(MAX_REASON)]);
        let head = Head { kind: Kind::Close, flags: code, length: text.len(), position: 0, consumed: self.consumed };
        Frame { head: head.encode(), payload: text }
    }

    fn grace(&self) -> Duration {
        let confirmed = self.options.resume_for;
        if self.confirmed { confirmed } else { confirmed.min(UNCONFIRMED_GRACE) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_that_takes_long_is_no_silence() {
        let start = Instant::now();
        let [mut here, mut there] = [(); 2].map(|()| Core::new(start, Options::default()));
        here.attach(start, 1, Positions::default()).unwrap();
        there.attach(start, 1, Positions::default()).unwrap();
        there.write(&[7; MAX_PAYLOAD]);
        let mut frame = BytesMut::new();
        there.poll_transmit(start).unwrap().append_to(&mut frame);
        here.write(b"x");
        here.flush();
        while here.poll_transmit(start).is_some() {}
        for (second, bytes) in (1..).zip(frame.chunks(8_000)) {
            let now = start + Duration::from_secs(second);
            if second % 2 == 0 {
                assert!(here.direct_room() >= bytes.len());
                here.direct(now, bytes.len());
            } else {
                here.handle_input(now, 1, bytes).unwrap();
                while let Read::Bytes(_) = here.read(now, &mut [0; 8_000]) {}
            }
            assert_eq!(here.unanswered_since(), Some(now));
        }
        assert_eq!(here.positions().consumed, MAX_PAYLOAD as u64);
    }
}
