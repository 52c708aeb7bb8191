//! How much may be kept for replay, and how much of it may be on the way.
//!
//! Owns the growth of the replay window and the limit on what the other side has not consumed. Does not know bytes or
//! frames. Invariant: the window never shrinks and never exceeds its ceiling; the limit never exceeds the window.
//!
//! What is on the way is ahead of every keystroke; what is not waits in the mux, where it can be ordered. The window grows
//! to twice what the path holds (its rate times its own round trip): TCP needs that much where losses make answers
//! late. On a slow path so much would be heard in every keystroke, long after a faster moment: there the limit follows
//! the rate down as well as up, and frames are short. The rate is the best of late, so that a slow moment does not make
//! the next one slower. The round trip is measured when nothing of ours is in its way: in an idle moment, and if there
//! is none for a while, the sender makes one.
//!
//! Tried in its place, for fast paths too: one and a quarter of what the path holds, and limits found by trying a little
//! more again and again. Both starve a path of 1 Gbit/s with losses (half of the rate), where what was measured says
//! less about the path than about the last loss.

use std::time::{Duration, Instant};

/// Room for a receiver that is scheduled late: a path of microseconds would get a limit of nothing.
const SCHEDULING_SLACK: Duration = Duration::from_micros(300);

/// A rate is measured over at least this long, or the limit would follow every burst that a scheduler makes.
const SPAN: Duration = Duration::from_millis(5);

/// The best rate is that of the present and the former period of this length, or of ten round trips, of time in which
/// the limit was what limited.
const RATE_PERIOD: Duration = Duration::from_secs(2);

/// The round trip is measured with nothing else on the way this often; if bulk leaves no such moment, it pauses for
/// one.
const SAMPLE_EVERY: Duration = Duration::from_secs(10);

/// Bytes per second, 100 Mbit/s: a slower path has a limit of its own, a faster one the window.
const SLOW: u64 = 12_500_000;

/// The least limit: what a path carries in this time, so that a measurement that is wrong cannot stop it ...
const LEAST_TIME: Duration = Duration::from_millis(20);
/// ... and no less than a few frames.
const LEAST: u64 = 16 * 1024;

/// A frame takes no longer than this to send, because a keystroke may have to wait for it ...
const FRAME_TIME: Duration = Duration::from_millis(2);
/// ... unless its head would be a notable part of it.
const SMALLEST_FRAME: u64 = 4 * 1024;

/// The size of the replay window, and the limit on what is on the way.
#[derive(Debug)]
pub(super) struct Window {
    size: usize,
    ceiling: usize,
    /// The oldest frame of which nothing is known yet.
    oldest: Option<Probe>,
    /// A frame that asked for an answer at once.
    timed: Option<Probe>,
    span: Option<Span>,
    /// Bytes per second.
    rate: Best,
    rate_age: Duration,
    /// Microseconds.
    trip: Best,
    /// The shortest round trip on this carrier.
    shortest: Duration,
    sampled: Option<Instant>,
}

/// A frame whose acknowledgement tells the round trip.
#[derive(Debug)]
struct Probe {
    position: u64,
    sent_at: Instant,
    /// Nothing else was on the way.
    alone: bool,
}

/// What was acknowledged when: the beginning of a measurement of the rate.
#[derive(Debug)]
struct Span {
    since: Instant,
    acknowledged: u64,
    /// The limit kept something back.
    limited: bool,
}

/// The best of a value in the present and the former period.
#[derive(Debug, Default)]
struct Best {
    now: Option<u64>,
    before: Option<u64>,
}

impl Best {
    fn of(&self, better: fn(u64, u64) -> u64) -> Option<u64> {
        match (self.now, self.before) {
            (Some(now), Some(before)) => Some(better(now, before)),
            (one, other) => one.or(other),
        }
    }

    fn note(&mut self, value: u64, better: fn(u64, u64) -> u64) {
        self.now = Some(self.now.map_or(value, |now| better(now, value)));
    }

    fn next_period(&mut self) {
        if self.now.is_some() {
            *self = Self { now: None, before: self.now };
        }
    }
}

impl Window {
    pub(super) fn new(initial: usize, ceiling: usize) -> Self {
        Self {
            size: initial.min(ceiling),
            ceiling,
            oldest: None,
            timed: None,
            span: None,
            rate: Best::default(),
            rate_age: Duration::ZERO,
            trip: Best::default(),
            shortest: Duration::MAX,
            sampled: None,
        }
    }

    /// Bytes that may be kept for replay.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// A new carrier is a new path.
    pub(super) fn attached(&mut self) {
        *self = Self::new(self.size, self.ceiling);
    }

    /// Bytes that may be on the way: sent and not known to be consumed.
    pub(super) fn limit(&self, now: Instant) -> u64 {
        let Some((rate, trip)) = self.slow_path() else { return self.size as u64 };
        let holds = carried(rate, trip);
        let least = carried(rate, micros(LEAST_TIME)).max(LEAST);
        let wanted = if self.wants_pause(now) { holds / 2 } else { (2 * holds).max(least) };
        wanted.min(self.size as u64)
    }

    /// Rate and round trip, in microseconds, of a path that has a limit of its own.
    fn slow_path(&self) -> Option<(u64, u64)> {
        let rate = self.rate.of(u64::max).filter(|rate| *rate < SLOW)?;
        Some((rate, self.trip.of(u64::midpoint)? + micros(SCHEDULING_SLACK)))
    }

    /// The longest payload of a frame.
    pub(super) fn frame(&self) -> u64 {
        self.rate.of(u64::max).map_or(u64::MAX, |rate| carried(rate, micros(FRAME_TIME)).max(SMALLEST_FRAME))
    }

    /// Something waits to be sent, and the limit does not let it.
    pub(super) fn limits(&mut self) {
        if let Some(span) = &mut self.span {
            span.limited = true;
        }
    }

    /// A frame is about to be sent with nothing in its way: whether it shall ask for an answer at once.
    pub(super) fn samples(&mut self, now: Instant) -> bool {
        let due = self.sampled.is_none_or(|at| now.saturating_duration_since(at) >= SAMPLE_EVERY);
        if due {
            self.sampled = Some(now);
        }
        due
    }

    /// A frame was sent that ends at `position`; it asked for an answer at once, or was the only one on the way.
    pub(super) fn sent(&mut self, now: Instant, position: u64, acknowledged: u64, asking: bool, alone: bool) {
        let probe = || Probe { position, sent_at: now, alone };
        self.oldest.get_or_insert_with(probe);
        if asking {
            self.timed.get_or_insert_with(probe);
        }
        self.span.get_or_insert(Span { since: now, acknowledged, limited: false });
    }

    /// The other side has consumed up to `position`; `all` that was sent, if so.
    pub(super) fn acknowledged(&mut self, now: Instant, position: u64, all: bool) {
        self.oldest.take_if(|probe| probe.position <= position);
        if let Some(probe) = self.timed.take_if(|probe| probe.position <= position) {
            self.time(now.saturating_duration_since(probe.sent_at), probe.alone);
        }
        let least = SPAN.max(self.shortest);
        let measured = self.span.take_if(|span| now.saturating_duration_since(span.since) >= least);
        if let Some(span) = measured {
            let time = now.saturating_duration_since(span.since);
            self.follow(position.saturating_sub(span.acknowledged), time, span.limited);
            self.span = Some(Span { since: now, acknowledged: position, limited: false });
        }
        if all {
            // What comes next may come much later.
            self.span = None;
        }
    }

    /// How long the oldest frame has waited.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        self.oldest.as_ref().map(|probe| probe.sent_at)
    }

    /// A round trip; `alone` if nothing of ours was in its way.
    fn time(&mut self, trip: Duration, alone: bool) {
        self.shortest = self.shortest.min(trip.max(Duration::from_micros(1)));
        if alone {
            self.trip.next_period();
        }
        if alone || self.trip.now.is_none() {
            self.trip.note(micros(trip).max(1), u64::min);
        }
    }

    /// So much was delivered in this time.
    fn follow(&mut self, delivered: u64, time: Duration, limited: bool) {
        let rate = delivered.saturating_mul(1_000_000) / micros(time).max(1);
        let best = self.rate.of(u64::max).unwrap_or(0);
        // If others than the limit limited, that says nothing about the path unless it is good.
        if limited || (rate > best && best > 0) {
            self.rate.note(rate, u64::max);
        }
        let trip = self.trip.of(u64::midpoint).unwrap_or(0);
        if limited {
            self.rate_age += time;
            if self.rate_age >= RATE_PERIOD.max(Duration::from_micros(trip.saturating_mul(10))) {
                self.rate_age = Duration::ZERO;
                self.rate.next_period();
            }
        }
        // The shortest, so that the window does not chase its own queue.
        let horizon = micros(self.shortest.saturating_add(SCHEDULING_SLACK));
        let wanted = carried(rate, horizon).saturating_mul(2);
        let wanted = usize::try_from(wanted).unwrap_or(usize::MAX).min(self.size.saturating_mul(4));
        self.size = self.size.max(wanted.min(self.ceiling));
    }

    /// True if bulk has left no moment to see the round trip of the path for too long: a frame that may be sent now has
    /// no queue in its way.
    pub(super) fn wants_pause(&self, now: Instant) -> bool {
        let due = self.sampled.is_some_and(|at| now.saturating_duration_since(at) >= SAMPLE_EVERY);
        due && self.rate.of(u64::max).is_some_and(|rate| rate < SLOW)
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Bytes at so many per second in so many microseconds.
fn carried(rate: u64, micros: u64) -> u64 {
    (rate / 1000).saturating_mul(micros) / 1000
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIB: u64 = 1024;
    const MS: Duration = Duration::from_millis(1);

    /// A path with one queue: it carries `rate` bytes per second, and answers come a round trip after a frame has left
    /// the queue.
    struct Path {
        window: Window,
        now: Instant,
        rate: f64,
        round_trip: Duration,
        /// Until when the path is busy with what was sent.
        busy: Instant,
        sent: u64,
        asked: u64,
        answered: u64,
        /// Positions that will be acknowledged, and when.
        coming: std::collections::VecDeque<(Instant, u64)>,
        /// How long each frame of the last run waited in the queue.
        queue: Vec<Duration>,
    }

    impl Path {
        fn new(rate: f64, round_trip: Duration) -> Self {
            let (window, now) = (Window::new(256 * 1024, 32 << 20), Instant::now());
            let coming = std::collections::VecDeque::new();
            let queue = Vec::new();
            Self { window, now, rate, round_trip, busy: now, sent: 0, asked: 0, answered: 0, coming, queue }
        }

        /// Sends as much as the limit allows for so long; returns the rate. `late` delays the answers of a frame.
        fn run(&mut self, time: Duration, mut late: impl FnMut() -> Duration) -> f64 {
            let (end, before) = (self.now + time, self.answered);
            self.queue.clear();
            while self.now < end {
                while self.send(late()) {}
                // What was not asked for comes after a while.
                let (at, position) = self.coming.pop_front().unwrap_or((self.now + 100 * MS, self.sent));
                self.now = self.now.max(at);
                self.answered = position;
                self.window.acknowledged(self.now, position, position == self.sent);
            }
            (self.answered - before) as f64 / time.as_secs_f64()
        }

        /// Half of the frames waited this long at most.
        fn queue(&mut self) -> Duration {
            self.queue.sort_unstable();
            self.queue[self.queue.len() / 2]
        }

        fn send(&mut self, late: Duration) -> bool {
            let (limit, on_the_way) = (self.window.limit(self.now), self.sent - self.answered);
            if on_the_way > 0 && on_the_way >= limit {
                self.window.limits();
                return false;
            }
            let clear = on_the_way == 0 || self.window.wants_pause(self.now);
            let frame = self.window.frame().min(64 * KIB);
            self.sent += frame;
            let alone = clear && self.window.samples(self.now);
            let asking = alone || self.sent - self.asked >= limit / 2;
            self.window.sent(self.now, self.sent, self.answered, asking, alone);
            self.queue.push(self.busy.saturating_duration_since(self.now));
            self.busy = self.busy.max(self.now) + Duration::from_secs_f64(frame as f64 / self.rate);
            self.asked = if asking { self.sent } else { self.asked };
            let arrives = self.busy + self.round_trip + late;
            let (last, told) = self.coming.back().copied().unwrap_or((self.now, self.answered));
            if asking || (self.sent - told >= 64 * KIB && arrives >= last + MS) {
                self.coming.push_back((arrives.max(last), self.sent));
            }
            true
        }
    }

    #[test]
    fn a_path_is_filled_and_a_slow_one_has_little_queue() {
        let fast = [(119e6, 50 * MS), (119e6, 100 * MS), (60e6, 300 * MS)];
        let slow = [(2.4e6, 50 * MS), (0.6e6, 50 * MS), (10e6, 20 * MS), (0.1e6, 100 * MS), (1e6, 300 * MS)];
        for (rate, round_trip) in fast.into_iter().chain(slow) {
            let mut path = Path::new(rate, round_trip);
            path.run(round_trip * 40 + 30_000 * MS, || Duration::ZERO);
            // Hours of bulk change nothing.
            for _ in 0..20 {
                let carried = path.run(3000 * MS, || Duration::ZERO);
                assert!(carried >= 0.93 * rate, "{carried} of {rate}, {round_trip:?}");
                let most = if rate > 12e6 { 2 * round_trip } else { round_trip * 3 / 2 + 150 * MS };
                let queue = path.queue();
                assert!(queue <= most, "{queue:?} in the queue, {rate}, {round_trip:?}");
            }
        }
    }

    #[test]
    fn late_answers_do_not_slow_it_down() {
        let mut number = 1_u64;
        let mut late = || {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            MS * ((number >> 33) % 60) as u32
        };
        let mut path = Path::new(10e6, 40 * MS);
        path.run(8000 * MS, &mut late);
        for _ in 0..10 {
            let carried = path.run(5000 * MS, &mut late);
            assert!(carried >= 0.8 * 10e6, "{carried}");
        }
    }

    #[test]
    fn it_follows_a_path_that_changes() {
        let mut path = Path::new(100e6, 20 * MS);
        path.run(3000 * MS, || Duration::ZERO);
        path.rate = 2.5e6;
        path.run(15_000 * MS, || Duration::ZERO);
        path.run(1000 * MS, || Duration::ZERO);
        assert!(path.queue() <= 40 * MS, "slower: {:?}", path.queue());
        (path.rate, path.round_trip) = (50e6, 80 * MS);
        path.run(45_000 * MS, || Duration::ZERO);
        let carried = path.run(5000 * MS, || Duration::ZERO);
        assert!(carried >= 45e6, "faster, and longer: {carried}");
    }

    #[test]
    fn a_path_of_microseconds_gets_what_it_needs_and_little_queue() {
        let mut path = Path::new(450e6, Duration::from_micros(120));
        path.run(1000 * MS, || Duration::ZERO);
        let carried = path.run(1000 * MS, || Duration::ZERO);
        assert!(carried >= 440e6, "{carried}");
        assert!(path.queue() <= MS, "{:?}", path.queue());
        assert!(path.window.size() <= 1 << 20, "{}", path.window.size());
    }

    #[test]
    fn slow_moments_of_the_application_say_nothing_about_the_path() {
        let mut path = Path::new(10e6, 50 * MS);
        path.run(4000 * MS, || Duration::ZERO);
        let before = path.window.limit(path.now);
        // A keystroke a second, for a minute.
        for _ in 0..60 {
            path.now += 1000 * MS;
            let (now, position) = (path.now, path.sent + 10);
            let alone = path.window.samples(now);
            path.window.sent(now, position, path.sent, alone, alone);
            path.window.acknowledged(now + 50 * MS, position, true);
            (path.sent, path.answered) = (position, position);
        }
        assert!(path.window.limit(path.now) >= before / 2, "{} after {before}", path.window.limit(path.now));
    }

    #[test]
    fn the_round_trip_is_asked_for_when_nothing_else_is_on_the_way() {
        let (mut window, start) = (Window::new(1, 1), Instant::now());
        assert!(window.samples(start) && !window.samples(start + Duration::from_secs(9)));
        assert!(window.samples(start + SAMPLE_EVERY));
        window.attached();
        assert!(window.samples(start + SAMPLE_EVERY), "another path");
    }
}
