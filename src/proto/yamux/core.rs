//! The core: all channels of one mux, and the verbs of the application.
//!
//! Owns the table of channels, their life from open to settled, and the totals that bound memory. Does not know
//! sockets, clocks, tasks or wakers. Invariant: a slot is reused only after the application has released its channel
//! and nothing of it is on the wire.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use super::channel::{Channel, Failure, Fin, INITIAL_WINDOW};
use super::chunks::{Chunks, Pool};
use super::input::Parser;
use super::round_trip::RoundTrip;
use super::schedule::Schedule;

/// Unsent bytes per channel: one turn of the driver. More would only be copied out of the cache and back, and a flow
/// that fills it would keep its thread from others for longer.
const MAX_UNSENT: usize = 64 * 1024;

/// Unsent bytes every channel may have however many others there are, so that none is shut out.
const MIN_UNSENT: usize = 1024;

/// How long the mux may stand still because too much data is unread, before the channel that holds most of it is
/// reset. Readers that are merely busy have their turn well within it.
const UNREAD_PATIENCE: Duration = Duration::from_secs(1);

/// How long a mux that closes waits for finished channels to send what is left of them.
const CLOSE_PATIENCE: Duration = Duration::from_secs(3);

/// How long the bytes in front of a reset wait for the peer's window. A live reader takes a channel's share of unsent
/// bytes sooner on any path; one that does not read must still learn of the reset while it writes.
const RESET_PATIENCE: Duration = Duration::from_secs(30);

/// Which end opened the tunnel: clients open channels with odd IDs, servers with even ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Odd IDs.
    Client,
    /// Even IDs.
    Server,
}

/// The limits of a mux.
#[derive(Debug, Clone)]
pub struct Options {
    /// Which end this is.
    pub role: Role,
    /// Channels open at a time, in each direction. Opening waits for room; what the peer opens beyond it is reset.
    pub max_channels: u32,
    /// Received bytes that nobody has read, over all channels; as much again may be unsent.
    pub max_buffered: usize,
    /// The largest window of one channel.
    pub max_window: u32,
}

impl Options {
    /// The defaults: 4096 channels, 8 MiB buffered, windows up to 16 MiB.
    #[must_use]
    pub fn new(role: Role) -> Self {
        Self { role, max_channels: 4096, max_buffered: 8 * 1024 * 1024, max_window: 16 * 1024 * 1024 }
    }
}

/// A channel of one [`Core`], until it is released.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Key(pub(super) u32);

impl Key {
    /// The number of the channel's slot: small, dense, and unique among the channels not yet released.
    #[must_use]
    pub fn slot(&self) -> usize {
        self.0 as usize
    }
}

/// What the driver must pass on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The peer opened a channel: [`Core::accept`].
    Incoming,
    /// The channel in this slot, whose reader was told to wait, has news.
    Readable(usize),
    /// The channel in this slot, whose writer was told to wait, has room.
    Writable(usize),
    /// There is room to open a channel, or there will never be.
    Room,
}

/// Why a channel cannot be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenRefusal {
    /// As many as allowed are open: an [`Event::Room`] follows.
    Full,
    /// The mux ends.
    Closed,
}

/// What there is to read.
#[derive(Debug, PartialEq, Eq)]
pub enum Reading<'a> {
    /// These bytes come next; never empty.
    Data(&'a [u8]),
    /// The peer ended its direction and everything was read.
    End,
    /// The channel failed; everything received before was read.
    Failed(Failure),
    /// Nothing yet: an [`Event::Readable`] follows.
    Wait,
}

/// What became of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writing {
    /// This many bytes were taken.
    Taken(usize),
    /// No room: an [`Event::Writable`] follows.
    Wait,
    /// Nothing can be written any more.
    Failed(Failure),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Running,
    /// Channels are gone or finishing; then GoAway.
    Closing {
        until: Instant,
    },
    /// Our GoAway is in the output, or the tunnel is gone: nothing more happens.
    Ended,
}

/// The multiplexer, without a socket.
#[derive(Debug)]
pub struct Core {
    pub(super) options: Options,
    pub(super) phase: Phase,
    /// The peer said it will go: nothing new is opened.
    pub(super) peer_leaves: bool,
    /// Nobody accepts any more.
    pub(super) refuses: bool,
    pub(super) parser: Parser,

    // A box per channel: an unused slot is a word, and moving the table moves words.
    pub(super) slots: Vec<Option<Box<Channel>>>,
    pub(super) free: Vec<u32>,
    /// Channels that are on the wire.
    pub(super) by_id: HashMap<u32, u32>,
    pub(super) next_id: u32,
    /// Opened by the peer, not yet accepted.
    pub(super) arrivals: VecDeque<u32>,
    /// Channels not settled, by who opened them.
    pub(super) outbound: u32,
    pub(super) inbound: u32,
    /// Slots taken by channels that the peer opened.
    pub(super) inbound_slots: u32,

    pub(super) schedule: Schedule,
    pub(super) control: VecDeque<u32>,
    pub(super) pongs: VecDeque<u32>,
    pub(super) refusals: VecDeque<u32>,
    pub(super) go_away: Option<u32>,
    pub(super) round_trip: RoundTrip,

    pub(super) pool: Pool,
    pub(super) unread: usize,
    pub(super) unsent: usize,
    /// Sum of what windows are above the initial one.
    pub(super) grown: usize,
    /// Channels that could use more than the initial window.
    pub(super) want_growth: usize,
    pub(super) over_since: Option<Instant>,
    /// Channels whose reset waits behind their bytes, and until when; those that are done with are dropped at times.
    pub(super) parting: VecDeque<(Instant, u32)>,
    pub(super) events: VecDeque<Event>,
}

impl Core {
    /// A mux at the start of its tunnel.
    #[must_use]
    pub fn new(mut options: Options) -> Self {
        options.max_channels = options.max_channels.max(1);
        options.max_buffered = options.max_buffered.max(INITIAL_WINDOW as usize);
        options.max_window = options.max_window.max(INITIAL_WINDOW);
        let next_id = if options.role == Role::Client { 1 } else { 2 };
        Self {
            options,
            phase: Phase::Running,
            peer_leaves: false,
            refuses: false,
            parser: Parser::default(),
            slots: Vec::new(),
            free: Vec::new(),
            by_id: HashMap::new(),
            next_id,
            arrivals: VecDeque::new(),
            outbound: 0,
            inbound: 0,
            inbound_slots: 0,
            schedule: Schedule::default(),
            control: VecDeque::new(),
            pongs: VecDeque::new(),
            refusals: VecDeque::new(),
            go_away: None,
            round_trip: RoundTrip::default(),
            pool: Pool::default(),
            unread: 0,
            unsent: 0,
            grown: 0,
            want_growth: 0,
            over_since: None,
            parting: VecDeque::new(),
            events: VecDeque::new(),
        }
    }

    // --- the application's verbs -------------------------------------------------------------------------------

    /// Opens a channel. Nothing waits for the peer: data may follow at once.
    pub fn open(&mut self, now: Instant) -> Result<Key, OpenRefusal> {
        if self.phase != Phase::Running || self.peer_leaves {
            return Err(OpenRefusal::Closed);
        }
        if self.outbound >= self.options.max_channels {
            return Err(OpenRefusal::Full);
        }
        // IDs start again after 2^31 channels, which a busy tunnel reaches within a month; those in use are skipped.
        while self.by_id.contains_key(&self.next_id) || self.next_id == 0 {
            self.next_id = self.next_id.wrapping_add(2);
        }
        let slot = self.insert(Channel::new(self.next_id, true));
        self.next_id = self.next_id.wrapping_add(2);
        self.enqueue_control(slot);
        self.round_trip.want(now);
        Ok(Key(slot))
    }

    /// The next channel that the peer opened.
    pub fn accept(&mut self) -> Option<Key> {
        self.arrivals.pop_front().map(Key)
    }

    /// Nobody will accept any more: what the peer opens is reset from now on.
    pub fn refuse(&mut self) {
        self.refuses = true;
        while let Some(key) = self.accept() {
            self.release(&key);
        }
    }

    /// The channel's ID on the wire.
    #[must_use]
    pub fn id(&self, key: &Key) -> u32 {
        self.channel(key.0).map_or(0, |channel| channel.id)
    }

    /// What there is to read; remove it with [`Core::consume`].
    pub fn read(&mut self, key: &Key) -> Reading<'_> {
        let Some(channel) = self.slots.get_mut(key.slot()).and_then(Option::as_deref_mut) else {
            return Reading::Failed(Failure::Aborted);
        };
        if !channel.received.is_empty() {
            return Reading::Data(channel.received.front());
        }
        match channel.failure {
            // An end that came before the tunnel broke is an end.
            Some(Failure::Aborted) if channel.fin_received => Reading::End,
            Some(failure) => Reading::Failed(failure),
            None if channel.fin_received => Reading::End,
            None => {
                channel.reader_waits = true;
                Reading::Wait
            }
        }
    }

    /// The application took the first `n` bytes.
    pub fn consume(&mut self, key: &Key, n: usize) {
        let Some(channel) = self.slots.get_mut(key.slot()).and_then(Option::as_deref_mut) else { return };
        let before = channel.received.len();
        channel.received.consume(n, &mut self.pool);
        let taken = before - channel.received.len();
        self.taken(key.0, taken);
    }

    /// Takes the next received chunk (at most 16 KiB) without copying; after [`Reading::Data`].
    pub fn take(&mut self, key: &Key) -> Option<bytes::Bytes> {
        let channel = self.slots.get_mut(key.slot()).and_then(Option::as_deref_mut)?;
        let bytes = channel.received.pop()?;
        self.taken(key.0, bytes.len());
        Some(bytes)
    }

    /// Takes as much of `data` as there is room for.
    pub fn write(&mut self, key: &Key, data: &[u8]) -> Writing {
        let limit = self.unsent_limit();
        let Some(channel) = self.slots.get_mut(key.slot()).and_then(Option::as_deref_mut) else {
            return Writing::Failed(Failure::Aborted);
        };
        if let Some(failure) = channel.failure {
            return Writing::Failed(failure);
        }
        if channel.fin != Fin::Open {
            return Writing::Failed(Failure::Finished);
        }
        let room = limit.saturating_sub(channel.unsent.len());
        if room == 0 && !data.is_empty() {
            channel.writer_waits = true;
            return Writing::Wait;
        }
        let n = room.min(data.len());
        channel.unsent.push(&data[..n], &mut self.pool);
        self.unsent += n;
        if channel.sendable() {
            self.schedule.activate(key.0, &mut channel.turn);
        }
        Writing::Taken(n)
    }

    /// Ends our direction behind what was written. Doing it twice is doing it once.
    pub fn finish(&mut self, key: &Key) -> Result<(), Failure> {
        let Some(channel) = self.slots.get_mut(key.slot()).and_then(Option::as_deref_mut) else {
            return Err(Failure::Aborted);
        };
        if channel.fin == Fin::Open {
            if let Some(failure) = channel.failure {
                return Err(failure);
            }
            channel.fin = Fin::Queued;
            if channel.sendable() {
                self.schedule.activate(key.0, &mut channel.turn);
            }
        }
        Ok(())
    }

    /// Ends the channel at once: what is unsent and unread is gone, and the peer is told with a reset.
    pub fn reset(&mut self, key: &Key) {
        self.fail_channel(key.0, Failure::Reset);
        self.discard_received(key.0);
    }

    /// Ends the channel behind what was written, which is still sent, for 30 s at most. What is unread is gone.
    pub fn reset_behind(&mut self, now: Instant, key: &Key) {
        let Some(channel) = self.slots.get_mut(key.slot()).and_then(Option::as_deref_mut) else { return };
        if channel.failure.is_some() || channel.unsent.is_empty() {
            return self.reset(key);
        }
        channel.fin = Fin::Reset;
        let id = channel.id;
        self.discard_received(key.0);
        if self.parting.len() > 2 * self.by_id.len() {
            let mut parting = std::mem::take(&mut self.parting);
            parting.retain(|(_, id)| self.is_parting(*id).is_some());
            self.parting = parting;
        }
        self.parting.push_back((now + RESET_PATIENCE, id));
    }

    /// Why the channel carries nothing any more, also behind an end that was read; if nothing is wrong, an
    /// [`Event::Readable`] follows when that changes.
    pub fn failure(&mut self, key: &Key) -> Option<Failure> {
        let Some(channel) = self.channel_mut(key.0) else { return Some(Failure::Aborted) };
        channel.reader_waits |= channel.failure.is_none();
        channel.failure
    }

    /// The application lets go. Unless both directions have ended and everything was read, the peer sees a reset.
    pub fn release(&mut self, key: &Key) {
        let Some(channel) = self.channel(key.0) else { return };
        if !channel.is_complete() && channel.fin != Fin::Reset {
            self.fail_channel(key.0, Failure::Reset);
        }
        self.discard_received(key.0);
        if let Some(channel) = self.channel_mut(key.0) {
            channel.released = true;
        }
        self.settle(key.0);
    }

    /// Ends the mux: channels in use are reset, finished ones send what is left, then GoAway.
    pub fn close(&mut self, now: Instant) {
        if self.phase != Phase::Running {
            return;
        }
        self.phase = Phase::Closing { until: now + CLOSE_PATIENCE };
        for slot in self.taken_slots() {
            if self.channel(slot).is_some_and(|channel| !(channel.released || channel.is_complete())) {
                self.fail_channel(slot, Failure::Aborted);
            }
        }
        self.end_waiting();
    }

    /// The tunnel is gone: everything not received is lost, and every channel says so.
    pub fn abort(&mut self) {
        self.phase = Phase::Ended;
        self.go_away = None;
        self.control.clear();
        self.pongs.clear();
        self.refusals.clear();
        self.parting.clear();
        self.schedule = Schedule::default();
        for slot in self.taken_slots() {
            if let Some(channel) = self.channel_mut(slot) {
                (channel.owes, channel.queued) = (super::channel::Owes::default(), false);
                channel.turn = super::schedule::Turn::default();
            }
            self.fail_channel(slot, Failure::Aborted);
            self.settle(slot);
        }
        self.end_waiting();
    }

    // --- what the driver asks ----------------------------------------------------------------------------------

    /// The next thing to pass on.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Core::handle_timeout`] is due.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Instant> {
        let unread = self.over_since.map(|since| since + UNREAD_PATIENCE);
        let parting = self.parting.front().map(|(until, _)| *until);
        let closing = match self.phase {
            Phase::Closing { until } => Some(until),
            Phase::Running => None,
            Phase::Ended => return None,
        };
        unread.into_iter().chain(parting).chain(closing).min()
    }

    /// The deadline passed.
    pub fn handle_timeout(&mut self, now: Instant) {
        if self.over_since.is_some_and(|since| now >= since + UNREAD_PATIENCE) {
            self.reset_hoarders();
        }
        while let Some((_, id)) = self.parting.pop_front_if(|(until, _)| *until <= now) {
            if let Some(slot) = self.is_parting(id) {
                self.fail_channel(slot, Failure::Reset);
            }
        }
        if matches!(self.phase, Phase::Closing { until } if now >= until) {
            self.go_away_now(0);
        }
    }

    /// The slot of a channel whose reset still waits behind its bytes.
    fn is_parting(&self, id: u32) -> Option<u32> {
        let slot = *self.by_id.get(&id)?;
        self.channel(slot).filter(|channel| channel.fin == Fin::Reset && channel.failure.is_none()).map(|_| slot)
    }

    /// False while too much is unread: the driver leaves the peer's bytes where they are until readers have caught
    /// up or the deadline is past.
    #[must_use]
    pub fn wants_input(&self) -> bool {
        self.unread < self.options.max_buffered
    }

    /// True if [`Core::poll_transmit`] would append something.
    #[must_use]
    pub fn wants_transmit(&self) -> bool {
        !self.control.is_empty()
            || !self.schedule.is_empty()
            || !self.pongs.is_empty()
            || !self.refusals.is_empty()
            || self.go_away.is_some()
            || (self.round_trip.is_wanted() && self.phase == Phase::Running)
            || (matches!(self.phase, Phase::Closing { .. }) && self.outbound + self.inbound == 0)
    }

    /// True once the GoAway is in the output, or the tunnel is gone.
    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.phase == Phase::Ended && self.go_away.is_none()
    }

    /// True if channels can be opened no more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.phase != Phase::Running || self.peer_leaves
    }

    /// True if the peer announced that it goes: an end of the tunnel is then no accident.
    #[must_use]
    pub fn peer_leaves(&self) -> bool {
        self.peer_leaves
    }

    /// Channels that the application holds or that still have something on the wire.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Received bytes that nobody has read.
    #[must_use]
    pub fn unread(&self) -> usize {
        self.unread
    }

    /// Written bytes that were not sent.
    #[must_use]
    pub fn unsent(&self) -> usize {
        self.unsent
    }

    /// The shortest round trip of late.
    #[must_use]
    pub fn round_trip(&self) -> Option<Duration> {
        self.round_trip.minimum()
    }

    // --- the life of a channel ---------------------------------------------------------------------------------

    pub(super) fn channel(&self, slot: u32) -> Option<&Channel> {
        self.slots.get(slot as usize)?.as_deref()
    }

    pub(super) fn channel_mut(&mut self, slot: u32) -> Option<&mut Channel> {
        self.slots.get_mut(slot as usize)?.as_deref_mut()
    }

    pub(super) fn insert(&mut self, channel: Channel) -> u32 {
        let slot = self.free.pop().unwrap_or(u32::try_from(self.slots.len()).unwrap_or(u32::MAX));
        self.by_id.insert(channel.id, slot);
        if channel.outbound {
            self.outbound += 1;
        } else {
            self.inbound += 1;
            self.inbound_slots += 1;
        }
        let channel = Some(Box::new(channel));
        match self.slots.get_mut(slot as usize) {
            Some(free) => *free = channel,
            None => self.slots.push(channel),
        }
        slot
    }

    pub(super) fn enqueue_control(&mut self, slot: u32) {
        if let Some(channel) = self.channel_mut(slot)
            && !std::mem::replace(&mut channel.queued, true)
        {
            self.control.push_back(slot);
        }
    }

    /// Ends a channel before its time: nothing more is sent but the reset, if there is someone to tell.
    pub(super) fn fail_channel(&mut self, slot: u32, failure: Failure) {
        let Some(channel) = self.slots.get_mut(slot as usize).and_then(Option::as_deref_mut) else { return };
        if channel.failure.is_some() || (channel.settled && failure != Failure::Aborted) {
            return;
        }
        let never_seen = std::mem::take(&mut channel.owes.syn);
        let telling = failure != Failure::ResetByPeer && self.phase != Phase::Ended;
        channel.owes.reset = telling && !never_seen && !channel.is_over();
        channel.failure = Some(failure);
        self.schedule.remove(slot, &mut channel.turn);
        self.unsent -= channel.unsent.len();
        channel.unsent.clear();
        let owed = channel.owes.reset;
        self.notify_reader(slot);
        self.notify_writer(slot);
        if owed {
            self.enqueue_control(slot);
        }
        self.settle(slot);
    }

    /// Takes note of a channel that left the wire, and of one that is no one's.
    pub(super) fn settle(&mut self, slot: u32) {
        let Some(channel) = self.channel_mut(slot) else { return };
        if !channel.is_over() {
            return;
        }
        let (id, outbound, released) = (channel.id, channel.outbound, channel.released);
        if !std::mem::replace(&mut channel.settled, true) {
            self.by_id.remove(&id);
            if outbound {
                self.outbound -= 1;
                self.events.push_back(Event::Room);
            } else {
                self.inbound -= 1;
            }
            self.return_window(slot);
        }
        if released {
            self.forget(slot);
        }
    }

    pub(super) fn notify_reader(&mut self, slot: u32) {
        if let Some(channel) = self.channel_mut(slot)
            && std::mem::take(&mut channel.reader_waits)
        {
            self.events.push_back(Event::Readable(slot as usize));
        }
    }

    pub(super) fn notify_writer(&mut self, slot: u32) {
        if let Some(channel) = self.channel_mut(slot)
            && std::mem::take(&mut channel.writer_waits)
        {
            self.events.push_back(Event::Writable(slot as usize));
        }
    }

    /// Ends everything with this code as the last frame.
    pub(super) fn go_away_now(&mut self, code: u32) {
        self.abort();
        self.go_away = Some(code);
    }

    /// How much of one channel may be unsent: half of what is free over all, so that stalled channels can fill the
    /// memory only asymptotically and others always find room.
    pub(super) fn unsent_limit(&self) -> usize {
        (self.options.max_buffered.saturating_sub(self.unsent) / 2).clamp(MIN_UNSENT, MAX_UNSENT)
    }

    fn taken(&mut self, slot: u32, bytes: usize) {
        self.unread -= bytes;
        if self.wants_input() {
            self.over_since = None;
        }
        let Some(channel) = self.channel_mut(slot) else { return };
        channel.growth.consumed(bytes);
        if channel.update_due() {
            self.enqueue_control(slot);
        }
    }

    fn discard_received(&mut self, slot: u32) {
        let Some(channel) = self.slots.get_mut(slot as usize).and_then(Option::as_deref_mut) else { return };
        self.unread -= channel.received.len();
        channel.received = Chunks::default();
        if self.wants_input() {
            self.over_since = None;
        }
    }

    /// What the channel's window had grown by is there for others.
    fn return_window(&mut self, slot: u32) {
        let Some(channel) = self.slots.get_mut(slot as usize).and_then(Option::as_deref_mut) else { return };
        self.grown -= (channel.window - INITIAL_WINDOW) as usize;
        channel.window = INITIAL_WINDOW;
        self.want_growth -= usize::from(std::mem::take(&mut channel.wants_growth));
    }

    fn forget(&mut self, slot: u32) {
        let Some(mut channel) = self.slots.get_mut(slot as usize).and_then(Option::take) else { return };
        self.schedule.remove(slot, &mut channel.turn);
        if channel.queued {
            self.control.retain(|other| *other != slot);
        }
        self.unread -= channel.received.len();
        self.unsent -= channel.unsent.len();
        self.inbound_slots -= u32::from(!channel.outbound);
        self.free.push(slot);
        if self.free.len() == self.slots.len() {
            (self.slots, self.free) = (Vec::new(), Vec::new());
            self.pool.clear();
        }
    }

    /// Resets the channels that hold most of the unread data, until there is room again.
    fn reset_hoarders(&mut self) {
        self.over_since = None;
        while !self.wants_input() {
            let held = |slot: &Option<Box<Channel>>| slot.as_deref().map_or(0, |channel| channel.received.len());
            let Some(slot) = (0..self.slots.len()).max_by_key(|slot| held(&self.slots[*slot])) else { return };
            let slot = u32::try_from(slot).unwrap_or(u32::MAX);
            self.fail_channel(slot, Failure::Unread);
            // A channel that had failed or ended before keeps its verdict unless that would hide the loss.
            if let Some(channel) = self.channel_mut(slot) {
                channel.failure = Some(Failure::Unread);
            }
            self.discard_received(slot);
        }
    }

    fn taken_slots(&self) -> Vec<u32> {
        let taken = |(slot, channel): (usize, &Option<Box<Channel>>)| channel.as_ref().map(|_| slot as u32);
        self.slots.iter().enumerate().filter_map(taken).collect()
    }

    /// Nobody needs to wait any more for channels to come or to become possible.
    fn end_waiting(&mut self) {
        self.events.push_back(Event::Incoming);
        self.events.push_back(Event::Room);
    }
}
