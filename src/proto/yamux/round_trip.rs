//! How far away the peer is, and how much a window should be.
//!
//! Owns the pings that measure the round trip, its minimum (a loaded path looks longer than it is), and the rule by
//! which windows grow. Does not know channels. Invariant: at most one ping of ours is unanswered.

use std::time::{Duration, Instant};

/// The first measurements come at this interval, so that a lucky one is soon among them.
const FIRST_INTERVAL: Duration = Duration::from_secs(1);
/// How many those are.
const FIRST_SAMPLES: u32 = 5;
/// Later ones.
const INTERVAL: Duration = Duration::from_secs(10);
/// The minimum is that of the current and the previous period: long enough that hours of bulk in pieces keep a
/// measurement of the idle path, short enough that a path that became longer is believed.
const PERIOD: Duration = Duration::from_secs(300);

/// Shorter round trips count as this one: below it, what a window must cover is the time until tasks get their turn.
const SHORTEST: Duration = Duration::from_micros(500);

/// A window that its reader empties in so many of the shortest round trips is what holds it back: the present one is
/// longer by the queue of others. A reader slower than that is slow by itself.
const BUSY_ROUND_TRIPS: f64 = 8.0;

/// Measures the round trip.
#[derive(Debug, Default)]
pub(super) struct RoundTrip {
    wanted: bool,
    unanswered: Option<(u32, Instant)>,
    next_ping: u32,
    samples: u32,
    last: Option<Instant>,
    period_start: Option<Instant>,
    current: Option<Duration>,
    previous: Option<Duration>,
}

impl RoundTrip {
    /// Data flows: a measurement would be of use.
    pub(super) fn want(&mut self, now: Instant) {
        let interval = if self.samples < FIRST_SAMPLES { FIRST_INTERVAL } else { INTERVAL };
        let due = self.last.is_none_or(|last| now.saturating_duration_since(last) >= interval);
        self.wanted |= due && self.unanswered.is_none();
    }

    pub(super) fn is_wanted(&self) -> bool {
        self.wanted
    }

    /// The ping to send now, if one is wanted.
    pub(super) fn ping(&mut self, now: Instant) -> Option<u32> {
        if !std::mem::take(&mut self.wanted) {
            return None;
        }
        let id = self.next_ping;
        self.next_ping = self.next_ping.wrapping_add(1);
        self.unanswered = Some((id, now));
        self.last = Some(now);
        Some(id)
    }

    /// An answer came. One to no question of ours is ignored.
    pub(super) fn answer(&mut self, now: Instant, id: u32) {
        let Some((_, sent)) = self.unanswered.take_if(|(asked, _)| *asked == id) else { return };
        let sample = now.saturating_duration_since(sent);
        let start = *self.period_start.get_or_insert(now);
        if now.saturating_duration_since(start) >= PERIOD {
            self.previous = self.current.take();
            self.period_start = Some(now);
        }
        self.samples = self.samples.saturating_add(1);
        self.current = Some(self.current.map_or(sample, |other| other.min(sample)));
    }

    /// The shortest round trip of late.
    pub(super) fn minimum(&self) -> Option<Duration> {
        match (self.current, self.previous) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (one, other) => one.or(other),
        }
    }
}

/// What a channel's window should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Desire {
    /// Twice what its reader takes in a round trip.
    pub(super) window: u64,
    /// The window holds the reader back: what others have is due to it, too.
    pub(super) busy: bool,
}

/// Decides a channel's window from the rate at which its reader takes bytes.
#[derive(Debug, Default)]
pub(super) struct Growth {
    since: Option<Instant>,
    consumed: u64,
}

impl Growth {
    /// The reader took bytes.
    pub(super) fn consumed(&mut self, bytes: usize) {
        self.consumed += bytes as u64;
    }

    /// The window this channel should have, which is `window` now: twice what it takes in a round trip.
    ///
    /// A flow held back by its window takes one window per *present* round trip; so the window doubles while that is
    /// near the minimum, and stands still once queues have made it twice as long. It cannot chase its own queue.
    /// None until a whole round trip was observed.
    pub(super) fn desired(&mut self, now: Instant, minimum: Option<Duration>, window: u32) -> Option<Desire> {
        let round_trip = minimum?.max(SHORTEST);
        let Some(since) = self.since else {
            *self = Self { since: Some(now), consumed: 0 };
            return None;
        };
        let elapsed = now.saturating_duration_since(since);
        if elapsed < round_trip {
            return None;
        }
        let per_round_trip = self.consumed as f64 * round_trip.as_secs_f64() / elapsed.as_secs_f64();
        *self = Self { since: Some(now), consumed: 0 };
        let busy = per_round_trip * BUSY_ROUND_TRIPS >= f64::from(window);
        Some(Desire { window: (2.0 * per_round_trip) as u64, busy })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn the_minimum_survives_a_loaded_hour_in_pieces_but_not_for_ever() {
        let start = Instant::now();
        let mut trip = RoundTrip::default();
        let sample = |trip: &mut RoundTrip, at: Duration, took: Duration| {
            trip.want(start + at);
            let id = trip.ping(start + at).expect("due");
            trip.want(start + at);
            assert!(!trip.is_wanted(), "one at a time");
            trip.answer(start + at + took, id);
        };
        sample(&mut trip, ms(0), ms(50));
        sample(&mut trip, ms(2_000), ms(300));
        assert_eq!(trip.minimum(), Some(ms(50)));
        for n in 1..=60 {
            sample(&mut trip, ms(n * 10_000), ms(90));
        }
        assert_eq!(trip.minimum(), Some(ms(90)));
    }

    #[test]
    fn answers_to_questions_never_asked_change_nothing() {
        let now = Instant::now();
        let mut trip = RoundTrip::default();
        trip.answer(now, 0);
        trip.want(now);
        let id = trip.ping(now).unwrap();
        trip.answer(now, id.wrapping_add(1));
        assert_eq!(trip.minimum(), None);
        trip.answer(now + ms(3), id);
        trip.answer(now + ms(1), id);
        assert_eq!(trip.minimum(), Some(ms(3)));
    }

    #[test]
    fn a_window_doubles_on_an_empty_path_and_stands_on_a_queued_one() {
        let start = Instant::now();
        let mut growth = Growth::default();
        let mut after = |bytes, at, window| {
            growth.consumed(bytes);
            growth.desired(start + ms(at), Some(ms(50)), window)
        };
        assert_eq!(after(0, 0, 256 * 1024), None);
        assert_eq!(after(256 * 1024, 50, 256 * 1024), Some(Desire { window: 512 * 1024, busy: true }));
        assert_eq!(after(512 * 1024, 150, 512 * 1024), Some(Desire { window: 512 * 1024, busy: true }));
        let queued = after(512 * 1024, 350, 512 * 1024).unwrap();
        assert!(queued.window < 512 * 1024 && queued.busy);
        assert!(!after(512 * 1024, 800, 512 * 1024).unwrap().busy, "slow by itself");
        assert!(!after(1000, 850, 512 * 1024).unwrap().busy, "takes little");
    }
}
