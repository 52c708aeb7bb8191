//! When to acknowledge.
//!
//! Owns the timing of acknowledgements. Does not know bytes or frames. Invariant: an acknowledgement that is owed has a
//! deadline.

use std::time::{Duration, Instant};

/// An acknowledgement without data to ride on waits this long for some: longer than an echo takes on most paths, far
/// shorter than the 5 s after which unanswered data make a carrier suspect.
const ACK_DELAY: Duration = Duration::from_millis(100);

/// This much consumed is worth a frame of its own...
const ACK_AFTER: u64 = 64 * 1024;

/// ... but not more often than this, unless ...
const ACK_INTERVAL: Duration = Duration::from_millis(1);

/// ... so much is consumed (half of the ceiling's smallest common value would already be late).
const ACK_SURELY_AFTER: u64 = 512 * 1024;

/// When to acknowledge.
#[derive(Debug)]
pub(super) struct Acks {
    told: u64,
    told_at: Instant,
    owed_since: Option<Instant>,
    at_once: bool,
}

impl Acks {
    pub(super) fn new(now: Instant) -> Self {
        Self { told: 0, told_at: now, owed_since: None, at_once: false }
    }

    /// The next acknowledgement is due now: a new carrier, the end of the stream, a full window at the other side.
    pub(super) fn hurry(&mut self) {
        self.at_once = true;
    }

    /// The application consumed up to `position`.
    pub(super) fn consumed(&mut self, now: Instant, position: u64) {
        if position > self.told {
            self.owed_since.get_or_insert(now);
        }
    }

    /// A frame told the other side.
    pub(super) fn told(&mut self, now: Instant, position: u64) {
        *self = Self { told: position, told_at: now, owed_since: None, at_once: false };
    }

    /// When a frame of its own is due.
    pub(super) fn due(&self, consumed: u64) -> Option<Instant> {
        let owed = consumed.saturating_sub(self.told);
        if self.at_once || owed >= ACK_SURELY_AFTER {
            return Some(self.told_at);
        }
        let patient = self.owed_since? + ACK_DELAY;
        Some(if owed >= ACK_AFTER { patient.min(self.told_at + ACK_INTERVAL) } else { patient })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acknowledgements_ride_or_wait_a_little() {
        let start = Instant::now();
        let mut acks = Acks::new(start);
        assert_eq!(acks.due(0), None);
        acks.consumed(start, 10);
        assert_eq!(acks.due(10), Some(start + ACK_DELAY));
        acks.consumed(start, ACK_AFTER);
        assert_eq!(acks.due(ACK_AFTER), Some(start + ACK_INTERVAL));
        assert_eq!(acks.due(ACK_SURELY_AFTER), Some(start));
        acks.told(start, ACK_AFTER);
        assert_eq!(acks.due(ACK_AFTER), None);
        acks.hurry();
        assert_eq!(acks.due(ACK_AFTER), Some(start));
    }
}
