//! Whose frame is next.
//!
//! Owns the order of channels that have something to send: deficit round robin with a list of its own for channels
//! that have just become active, as fq_codel does for packets. Does not know what they send.
//! Invariant: a channel is in at most one of the two lists, and its [`Place`] says in which.

use std::collections::VecDeque;

/// Bytes a channel may send per round where turns are whole: two full frames, so that the other end gets half a turn's
/// worth for one wake-up of a flow, and a round over 16 bulk flows is 512 KiB. A channel that sends less than this per
/// round always goes first.
pub(super) const QUANTUM: i32 = 32 * 1024;
/// At least this, however short turns are: a round must get somewhere.
const MIN_QUANTUM: i32 = 2 * 1024;

/// Where a channel waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Place {
    #[default]
    Nowhere,
    Fresh,
    Old,
}

/// A channel's share of the schedule.
#[derive(Debug, Default)]
pub(super) struct Turn {
    place: Place,
    deficit: i32,
    /// Among the old ones only to wait out the round: it had nothing more to send.
    parked: bool,
}

/// The two lists, of slots.
#[derive(Debug)]
pub(super) struct Schedule {
    fresh: VecDeque<u32>,
    old: VecDeque<u32>,
    /// Bytes a channel may send per round.
    quantum: i32,
}

impl Default for Schedule {
    fn default() -> Self {
        Self { fresh: VecDeque::new(), old: VecDeque::new(), quantum: QUANTUM }
    }
}

impl Schedule {
    /// A turn is of so many bytes now. Where that is little because the path is slow, a channel that has just become
    /// active goes first with no more than one: several of them are ahead of a keystroke.
    pub(super) fn follow_turn(&mut self, bytes: usize) {
        self.quantum = i32::try_from(bytes).unwrap_or(QUANTUM).clamp(MIN_QUANTUM, QUANTUM);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.fresh.is_empty() && self.old.is_empty()
    }

    /// The channel has something new to send.
    pub(super) fn activate(&mut self, slot: u32, turn: &mut Turn) {
        if turn.place == Place::Nowhere {
            *turn = Turn { place: Place::Fresh, deficit: self.quantum, parked: false };
            self.fresh.push_back(slot);
        } else if turn.parked && turn.deficit > 0 {
            // What is left of its share of this round it may have at once: a keystroke does not wait for bulk only
            // because there was another one a moment ago.
            self.remove(slot, turn);
            (turn.place, turn.parked) = (Place::Fresh, false);
            self.fresh.push_back(slot);
        }
    }

    /// The channel has credit again for what it had to send: not new, so behind the others.
    pub(super) fn resume(&mut self, slot: u32, turn: &mut Turn) {
        if turn.place == Place::Nowhere {
            turn.place = Place::Old;
            self.old.push_back(slot);
        }
    }

    /// The slot at the head, not yet judged.
    pub(super) fn head(&self) -> Option<u32> {
        self.fresh.front().or_else(|| self.old.front()).copied()
    }

    /// Judges the head: true if it may send now. Otherwise it went elsewhere, and there is another head.
    pub(super) fn may_send(&mut self, slot: u32, turn: &mut Turn, sendable: bool) -> bool {
        // Turns may have become shorter since it got its share.
        turn.deficit = turn.deficit.min(self.quantum);
        if turn.deficit > 0 && sendable {
            return true;
        }
        self.pop(turn.place);
        turn.parked = false;
        if turn.deficit <= 0 {
            turn.deficit += self.quantum;
            turn.place = Place::Old;
            self.old.push_back(slot);
        } else if turn.place == Place::Fresh && !self.old.is_empty() {
            // One round among the old ones before it has a full share again: else two that take turns starve the rest.
            (turn.place, turn.parked) = (Place::Old, true);
            self.old.push_back(slot);
        } else {
            turn.place = Place::Nowhere;
        }
        false
    }

    /// The head sent this many bytes.
    pub(super) fn sent(turn: &mut Turn, bytes: usize) {
        turn.deficit -= i32::try_from(bytes).unwrap_or(i32::MAX / 2);
    }

    pub(super) fn remove(&mut self, slot: u32, turn: &mut Turn) {
        match turn.place {
            Place::Nowhere => {}
            Place::Fresh => self.fresh.retain(|other| *other != slot),
            Place::Old => self.old.retain(|other| *other != slot),
        }
        turn.place = Place::Nowhere;
    }

    fn pop(&mut self, place: Place) {
        match place {
            Place::Nowhere => {}
            Place::Fresh => drop(self.fresh.pop_front()),
            Place::Old => drop(self.old.pop_front()),
        }
    }
}
