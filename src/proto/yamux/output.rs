//! What goes to the peer, and in which order.
//!
//! Owns the composition of a turn of output: control frames, then data in the schedule's order. Does not know when
//! the driver will come for more. Invariant: a turn is at most as long as was asked, decided at the last moment.

use std::time::Instant;

use bytes::BytesMut;

use super::channel::{Channel, Failure, Fin, INITIAL_WINDOW};
use super::chunks::CHUNK;
use super::core::{Core, Phase};
use super::frame::{ACK, FIN, HEADER, Header, Kind, RST, SYN};
use super::schedule::Schedule;

/// The most output per turn. With the headers of link, WebSocket and TLS it is one segment of the loopback interface
/// (65,483 bytes), which a full message of 65,536 bytes would exceed by a small second one.
pub const TURN: usize = 65_536 - 256;

/// A data frame shorter than this is not begun at the end of a turn only to fill it.
const WORTH_A_FRAME: usize = 2048;

impl Core {
    /// Appends what should be sent, at most [`TURN`] bytes; false when there is nothing.
    pub fn poll_transmit(&mut self, now: Instant, out: &mut BytesMut) -> bool {
        self.poll_turn(now, out, TURN)
    }

    /// Appends what should be sent, at most `most` bytes; false when there is nothing. A path on which a [`TURN`] takes
    /// long wants shorter ones.
    pub fn poll_turn(&mut self, now: Instant, out: &mut BytesMut, most: usize) -> bool {
        self.schedule.follow_turn(most);
        let start = out.len();
        let room = |out: &BytesMut| most.saturating_sub(out.len() - start);
        while room(out) >= HEADER && self.transmit_control(now, out) {}
        while self.transmit_data(room(out), out) {}
        // What the data completed may be all that a closing mux waited for.
        if matches!(self.phase, Phase::Closing { .. }) && self.outbound + self.inbound == 0 && self.control.is_empty() {
            self.go_away_now(0);
        }
        if room(out) >= HEADER
            && let Some(length) = self.go_away.take()
        {
            Header { kind: Kind::GoAway, flags: 0, id: 0, length }.encode(out);
        }
        out.len() > start
    }

    /// Appends one control frame.
    fn transmit_control(&mut self, now: Instant, out: &mut BytesMut) -> bool {
        if let Some(length) = self.pongs.pop_front() {
            Header { kind: Kind::Ping, flags: ACK, id: 0, length }.encode(out);
        } else if let Some(length) = self.ping(now) {
            Header { kind: Kind::Ping, flags: SYN, id: 0, length }.encode(out);
        } else if let Some(id) = self.refusals.pop_front() {
            Header { kind: Kind::WindowUpdate, flags: RST, id, length: 0 }.encode(out);
        } else if let Some(slot) = self.control.pop_front() {
            self.transmit_owed(now, slot, out);
        } else {
            return false;
        }
        true
    }

    fn ping(&mut self, now: Instant) -> Option<u32> {
        if self.phase == Phase::Running { self.round_trip.ping(now) } else { None }
    }

    /// Appends what the channel owes: its opening, its acknowledgement, its credit, or its reset; in one frame.
    fn transmit_owed(&mut self, now: Instant, slot: u32, out: &mut BytesMut) {
        self.grow_window(now, slot);
        let Some(channel) = self.channel_mut(slot) else { return };
        channel.queued = false;
        let id = channel.id;
        let syn = std::mem::take(&mut channel.owes.syn);
        let ack = std::mem::take(&mut channel.owes.ack);
        if std::mem::take(&mut channel.owes.reset) {
            Header { kind: Kind::WindowUpdate, flags: RST, id, length: 0 }.encode(out);
            return self.settle(slot);
        }
        let length = channel.returnable();
        if !channel.is_over() && (syn || ack || length > 0) {
            channel.credit += length;
            let flags = if syn { SYN } else { 0 } | if ack { ACK } else { 0 };
            Header { kind: Kind::WindowUpdate, flags, id, length }.encode(out);
        }
    }

    /// Lets the window follow the rate of its reader, within what all windows together may have grown by.
    ///
    /// A window is a promise that cannot be taken back, so its growth is counted against the memory for received
    /// data. Channels that could use more share it: what one has above its share it does not get again, and one that
    /// came later, when the queue of the others had made the path look long, gets as much as they have on average.
    fn grow_window(&mut self, now: Instant, slot: u32) {
        let minimum = self.round_trip.minimum();
        let budget = self.options.max_buffered / 4 * 3;
        let (grown, others) = (self.grown, self.want_growth);
        let max_window = self.options.max_window;
        let Some(channel) = self.channel_mut(slot).filter(|channel| !channel.settled) else { return };
        let Some(desired) = channel.growth.desired(now, minimum, channel.window) else {
            return self.round_trip.want(now);
        };
        let wants = desired.busy || desired.window > u64::from(INITIAL_WINDOW);
        let others = others - usize::from(channel.wants_growth);
        let average = if desired.busy { grown / (others + 1) } else { 0 } as u64;
        let desired = desired.window.max(u64::from(INITIAL_WINDOW) + average);
        channel.wants_growth = wants;
        let share = budget / (others + 1);
        let above = (channel.window - INITIAL_WINDOW) as usize;
        let possible = above + budget.saturating_sub(grown);
        let target = (desired.min(u64::from(max_window)) as usize).saturating_sub(INITIAL_WINDOW as usize);
        // At most doubled, so that one lucky measurement does not decide.
        let stepped = target.min(above + channel.window as usize).max(above);
        let next = stepped.min(possible).min(share);
        channel.window = INITIAL_WINDOW + next as u32;
        self.grown = grown - above + next;
        self.want_growth = others + usize::from(wants);
        self.round_trip.want(now);
    }

    /// Appends one data frame or one end, of the channel whose turn it is.
    fn transmit_data(&mut self, room: usize, out: &mut BytesMut) -> bool {
        if room < WORTH_A_FRAME {
            return false;
        }
        while let Some(slot) = self.schedule.head() {
            let Some(channel) = self.slots.get_mut(slot as usize).and_then(Option::as_deref_mut) else { return false };
            let sendable = channel.sendable();
            if !self.schedule.may_send(slot, &mut channel.turn, sendable) {
                continue;
            }
            if channel.unsent.is_empty() && channel.fin == Fin::Reset {
                self.fail_channel(slot, Failure::Reset);
            } else if channel.unsent.is_empty() {
                Header { kind: Kind::Data, flags: FIN, id: channel.id, length: 0 }.encode(out);
                channel.fin = Fin::Sent;
                Schedule::sent(&mut channel.turn, HEADER);
                self.settle(slot);
            } else {
                self.transmit_body(slot, room - HEADER, out);
            }
            return true;
        }
        false
    }

    fn transmit_body(&mut self, slot: u32, room: usize, out: &mut BytesMut) {
        let Some(channel) = self.slots.get_mut(slot as usize).and_then(Option::as_deref_mut) else { return };
        let Channel { id, unsent, send_credit, turn, .. } = channel;
        let length = unsent.len().min(CHUNK).min(room).min(*send_credit as usize);
        // Never together with FIN: implementations are known that take the end before the data of the same frame.
        Header { kind: Kind::Data, flags: 0, id: *id, length: length as u32 }.encode(out);
        unsent.drain_into(length, out, &mut self.pool);
        *send_credit -= length as u32;
        Schedule::sent(turn, HEADER + length);
        let left = unsent.len();
        self.unsent -= length;
        // Half empty, so that the writer is not woken for every frame.
        if left <= self.unsent_limit() / 2 {
            self.notify_writer(slot);
        }
    }
}
