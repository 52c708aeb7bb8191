//! How much may be on the way, and when to acknowledge.
//!
//! Owns the growth of the replay window and the timing of acknowledgements. Does not know bytes or frames.
//! Invariant: the window never shrinks while a carrier is attached and never exceeds its ceiling; an acknowledgement
//! that is owed has a deadline.

use std::time::{Duration, Instant};

/// Room for a receiver that is scheduled late: without it, a path of microseconds would get a window of nothing. Not
/// more: what is on the way here is ahead of every keystroke, and what is not waits above, where it can be ordered.
const SCHEDULING_SLACK: Duration = Duration::from_micros(500);

/// An acknowledgement without data to ride on waits this long for some: longer than an echo takes on most paths, far
/// shorter than the 5 s after which unanswered data make a carrier suspect.
const ACK_DELAY: Duration = Duration::from_millis(100);

/// This much consumed is worth a frame of its own...
const ACK_AFTER: u64 = 64 * 1024;

/// ... but not more often than this, unless ...
const ACK_INTERVAL: Duration = Duration::from_millis(1);

/// ... so much is consumed (half of the ceiling's smallest common value would already be late).
const ACK_SURELY_AFTER: u64 = 512 * 1024;

/// The size of the replay window: it starts small and grows with what the path carries, delivery rate times the
/// smallest round trip (not the one that our own queue has lengthened), twice.
#[derive(Debug)]
pub(super) struct Window {
    size: usize,
    ceiling: usize,
    probe: Option<Probe>,
    min_round_trip: Duration,
}

#[derive(Debug)]
struct Probe {
    position: u64,
    sent_at: Instant,
    acknowledged: u64,
}

impl Window {
    pub(super) fn new(initial: usize, ceiling: usize) -> Self {
        Self { size: initial.min(ceiling), ceiling, probe: None, min_round_trip: Duration::MAX }
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// A new carrier is a new path.
    pub(super) fn attached(&mut self) {
        self.probe = None;
        self.min_round_trip = Duration::MAX;
    }

    /// A frame that ends at `position` was sent.
    pub(super) fn sent(&mut self, now: Instant, position: u64, acknowledged: u64) {
        self.probe.get_or_insert(Probe { position, sent_at: now, acknowledged });
    }

    /// The other side has consumed up to `position`.
    pub(super) fn acknowledged(&mut self, now: Instant, position: u64) {
        let Some(probe) = self.probe.take_if(|probe| probe.position <= position) else { return };
        let round_trip = now.saturating_duration_since(probe.sent_at).max(Duration::from_micros(1));
        self.min_round_trip = self.min_round_trip.min(round_trip);
        let delivered = u128::from(position.saturating_sub(probe.acknowledged));
        let horizon = (self.min_round_trip + SCHEDULING_SLACK).as_micros();
        let wanted = 2 * delivered * horizon / round_trip.as_micros();
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX).min(self.size.saturating_mul(4));
        self.size = self.size.max(wanted.min(self.ceiling));
    }

    /// How long the oldest probe has waited.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        self.probe.as_ref().map(|probe| probe.sent_at)
    }
}

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

    const KIB: usize = 1024;

    /// A path of `rate` bytes per second and `round_trip`, filled as far as the window allows.
    fn settle(rate: f64, round_trip: Duration) -> usize {
        let mut window = Window::new(256 * KIB, 32 * 1024 * KIB);
        let (mut now, mut position) = (Instant::now(), 1);
        window.sent(now, position, 0);
        now += round_trip;
        window.acknowledged(now, position);
        for _ in 0..100 {
            window.sent(now, position + 1, position);
            let takes = round_trip.max(Duration::from_secs_f64(window.size() as f64 / rate));
            now += takes;
            position += window.size() as u64;
            window.acknowledged(now, position);
        }
        window.size()
    }

    #[test]
    fn a_fast_long_path_gets_what_it_needs() {
        let needed = 125_000_000.0 * 0.1;
        assert!(settle(125_000_000.0, Duration::from_millis(100)) as f64 >= 1.5 * needed);
        assert_eq!(settle(1e9, Duration::from_millis(100)), 32 * 1024 * KIB);
    }

    #[test]
    fn a_slow_path_does_not_fill_memory_with_its_own_queue() {
        assert!(settle(2_500_000.0, Duration::from_millis(50)) <= 280_000);
        assert_eq!(settle(100_000.0, Duration::from_millis(300)), 256 * KIB);
    }

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
