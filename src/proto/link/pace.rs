//! How much may be on the way, and when to acknowledge.
//!
//! Owns the growth of the replay window and the timing of acknowledgements. Does not know bytes or frames.
//! Invariant: the window never shrinks while a carrier is attached and never exceeds its ceiling, and the limit never
//! exceeds the window; an acknowledgement that is owed has a deadline.

use std::time::{Duration, Instant};

/// Room for a receiver that is scheduled late: without it, a path of microseconds would get a window of nothing. Not
/// more: what is on the way here is ahead of every keystroke, and what is not waits above, where it can be ordered.
const SCHEDULING_SLACK: Duration = Duration::from_micros(300);

/// The rate is measured over at least this long, or the window would follow every burst that a scheduler makes: it can
/// only grow.
const SPAN: Duration = Duration::from_millis(5);

/// From this round trip on a queue is felt, and lasts.
const LONG: Duration = Duration::from_millis(5);

/// On a long path never less than this is on the way: what TCP begins with, and what the daemons hold.
const LEAST: usize = 32 * 1024;

/// On a long path, no more is on the way than is delivered in this time and two round trips. Less would be felt less,
/// but a path whose round trip varies, as a mobile one does, would be kept from its rate by it.
const LONGEST_QUEUE: Duration = Duration::from_millis(150);

/// Bytes per second from which on a long path gets four times what it holds: what waits there waits for milliseconds,
/// and behind a lost segment one round trip's worth has arrived out of order while the next is on its way.
const FAST: usize = 12_500_000;

const ONE_SECOND: Duration = Duration::from_secs(1);

/// The present rate is measured over at least so long, and four round trips: behind a lost segment, two round trips'
/// worth arrives at once.
const SAMPLE: Duration = Duration::from_millis(200);

/// For so long a rate is remembered, and up to twice as long.
const REMEMBERED: Duration = Duration::from_secs(2);

/// How long a turn may take to be sent, on a long path.
const TURN_TIME: Duration = Duration::from_millis(4);

/// Less than this is not worth its headers.
const MIN_TURN: usize = 8 * 1024;

/// With nothing else on the way, a frame asks for an answer at once this often: the round trip of the path itself is
/// seen only then.
const SAMPLE_EVERY: Duration = Duration::from_secs(10);

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
/// smallest round trip (not the one that our own queue has lengthened), twice, or on a long fast path four times. And how
/// much of it may be on the way now.
#[derive(Debug)]
pub(super) struct Window {
    size: usize,
    ceiling: usize,
    /// See [`limit`](Self::limit) and [`turn`](Self::turn).
    limit: usize,
    turn: usize,
    /// The best rates of the present and of the last time, bytes per second.
    rates: [usize; 2],
    rates_since: Option<Instant>,
    /// What was delivered, in what time, since the last of them.
    sample: (u64, Duration),
    probe: Option<Probe>,
    span: Option<Span>,
    min_round_trip: Duration,
    sampled: Option<Instant>,
}

/// A frame whose acknowledgement tells the round trip.
#[derive(Debug)]
struct Probe {
    position: u64,
    sent_at: Instant,
}

/// What was acknowledged when: the beginning of a measurement of the rate.
#[derive(Debug)]
struct Span {
    since: Instant,
    acknowledged: u64,
}

impl Window {
    pub(super) fn new(initial: usize, ceiling: usize) -> Self {
        let size = initial.min(ceiling);
        Self {
            size,
            ceiling,
            limit: size,
            turn: usize::MAX,
            rates: [0; 2],
            rates_since: None,
            sample: (0, Duration::ZERO),
            probe: None,
            span: None,
            min_round_trip: Duration::MAX,
            sampled: None,
        }
    }

    /// What replay may hold.
    pub(super) fn size(&self) -> usize {
        self.size
    }

    /// What may be on the way. On a long path it follows the present rate down, too: where little gets through, what the
    /// window held at better times would wait in the daemons' and the network's queues, before every keystroke.
    pub(super) fn limit(&self) -> usize {
        self.limit
    }

    /// How many bytes should be sent at once, at most `most`: they are ahead of what comes while they are sent.
    pub(super) fn turn(&self, most: usize) -> usize {
        self.turn.min(most)
    }

    /// True if a queue on this path is felt.
    pub(super) fn is_long(&self) -> bool {
        self.min_round_trip >= LONG && self.min_round_trip < Duration::MAX
    }

    /// A new carrier is a new path.
    pub(super) fn attached(&mut self) {
        (self.probe, self.span, self.sampled) = (None, None, None);
        self.forget_rate();
        self.min_round_trip = Duration::MAX;
    }

    /// A frame is about to be sent with nothing else on the way: whether it shall ask for an answer at once.
    pub(super) fn samples(&mut self, now: Instant) -> bool {
        let due = self.sampled.is_none_or(|at| now.saturating_duration_since(at) >= SAMPLE_EVERY);
        if due {
            self.sampled = Some(now);
        }
        due
    }

    /// A frame was sent that ends at `position`.
    pub(super) fn sent(&mut self, now: Instant, position: u64, acknowledged: u64) {
        self.probe.get_or_insert(Probe { position, sent_at: now });
        self.span.get_or_insert(Span { since: now, acknowledged });
    }

    /// The other side has consumed up to `position`; `all` that was sent, if so.
    pub(super) fn acknowledged(&mut self, now: Instant, position: u64, all: bool) {
        if let Some(probe) = self.probe.take_if(|probe| probe.position <= position) {
            let round_trip = now.saturating_duration_since(probe.sent_at).max(Duration::from_micros(1));
            self.min_round_trip = self.min_round_trip.min(round_trip);
        }
        let least = self.min_round_trip.max(SPAN);
        let measured = self.span.take_if(|span| now.saturating_duration_since(span.since) >= least);
        if let Some(span) = measured {
            self.follow(now, position.saturating_sub(span.acknowledged), now.saturating_duration_since(span.since));
            self.span = Some(Span { since: now, acknowledged: position });
        }
        if all {
            // What comes next may come much later, and there is no queue.
            self.span = None;
            if self.turn < usize::MAX {
                self.forget_rate();
            }
        }
    }

    /// The present rate is not known: the window is the only limit.
    fn forget_rate(&mut self) {
        (self.limit, self.turn) = (self.size, usize::MAX);
        (self.rates, self.rates_since, self.sample) = ([0; 2], None, (0, Duration::ZERO));
    }

    /// So much was delivered in this time.
    fn follow(&mut self, now: Instant, delivered: u64, time: Duration) {
        let held = product(delivered, time, self.min_round_trip.saturating_add(SCHEDULING_SLACK));
        let is_long = self.is_long();
        let times = if is_long && product(delivered, time, ONE_SECOND) > FAST { 4 } else { 2 };
        let wanted = held.saturating_mul(times).min(self.size.saturating_mul(4));
        self.size = self.size.max(wanted.min(self.ceiling));
        if is_long {
            self.follow_down(now, delivered, time);
        } else {
            (self.limit, self.turn) = (self.size, usize::MAX);
        }
    }

    /// So much was delivered in this time, on a long path: the latest rate counts, and the best of the last seconds.
    fn follow_down(&mut self, now: Instant, delivered: u64, time: Duration) {
        self.sample = (self.sample.0 + delivered, self.sample.1 + time);
        if self.sample.1 >= SAMPLE.max(self.min_round_trip.saturating_mul(4)) {
            if self.rates_since.is_none_or(|since| now.saturating_duration_since(since) >= REMEMBERED) {
                self.rates = [0, self.rates[0]];
                self.rates_since = Some(now);
            }
            let (delivered, time) = std::mem::take(&mut self.sample);
            self.rates[0] = self.rates[0].max(product(delivered, time, ONE_SECOND));
        }
        let rate = self.rates[0].max(self.rates[1]).max(product(delivered, time, ONE_SECOND)) as u64;
        let horizon = self.min_round_trip.saturating_mul(2).saturating_add(LONGEST_QUEUE);
        self.limit = product(rate, ONE_SECOND, horizon).max(LEAST).min(self.size);
        self.turn = product(rate, ONE_SECOND, TURN_TIME).max(MIN_TURN);
    }

    /// How long the oldest probe has waited.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        self.probe.as_ref().map(|probe| probe.sent_at)
    }
}

/// What `bytes` in `time` are in `horizon`.
fn product(bytes: u64, time: Duration, horizon: Duration) -> usize {
    usize::try_from(u128::from(bytes) * horizon.as_micros() / time.as_micros().max(1)).unwrap_or(usize::MAX)
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
        window.acknowledged(now, position, true);
        for _ in 0..1000 {
            window.sent(now, position + 1, position);
            let takes = round_trip.max(Duration::from_secs_f64(window.size() as f64 / rate));
            now += takes;
            position += window.size() as u64;
            window.acknowledged(now, position, false);
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
    fn a_path_of_microseconds_gets_what_it_needs_and_no_queue() {
        assert!(settle(450_000_000.0, Duration::from_micros(150)) <= 400 * KIB);
        assert!(settle(2_000_000_000.0, Duration::from_micros(150)) >= 600 * KIB);
    }

    /// A path of 50 ms that carried `rate` bytes per second for a while.
    fn long_path(rate: u64, window: &mut Window, start: Instant) -> Instant {
        let round_trip = Duration::from_millis(50);
        let mut position = 0;
        for round in 1..=100 {
            let now = start + round_trip * round;
            window.sent(now - round_trip, position + rate / 20, position);
            position += rate / 20;
            window.acknowledged(now, position, false);
        }
        start + round_trip * 100
    }

    #[test]
    fn where_little_gets_through_little_is_on_the_way() {
        let (mut window, start) = (Window::new(256 * KIB, 32 * 1024 * KIB), Instant::now());
        let now = long_path(10_000_000, &mut window, start);
        assert_eq!((window.size(), window.limit()), (1_006_000, 1_006_000));
        // The line gets worse. Five seconds later the better times are forgotten, but the window is kept.
        let now = long_path(400_000, &mut window, now);
        assert_eq!((window.size(), window.limit()), (1_006_000, 100_000), "a quarter of a second");
        let now = long_path(20_000, &mut window, now);
        assert_eq!(window.limit(), LEAST);
        // A direction that rested has no queue, and begins with all of its window.
        let mut rested = Window { limit: window.limit, turn: window.turn, ..Window::new(1_006_000, 32 * 1024 * KIB) };
        rested.acknowledged(now, 0, true);
        assert_eq!(rested.limit(), rested.size());
        // And better: what is allowed grows with each round trip.
        long_path(10_000_000, &mut window, now);
        assert_eq!(window.limit(), 1_006_000);
    }

    #[test]
    fn a_long_fast_path_gets_four_times_what_it_holds_and_a_slow_one_short_turns() {
        let start = Instant::now();
        let mut fast = Window::new(256 * KIB, 32 * 1024 * KIB);
        long_path(100_000_000, &mut fast, start);
        assert_eq!(fast.limit(), 4 * 5_030_000);
        assert_eq!(fast.turn(64 * KIB), 64 * KIB);
        let mut slow = Window::new(256 * KIB, 32 * 1024 * KIB);
        long_path(2_500_000, &mut slow, start);
        assert_eq!((slow.limit(), slow.turn(64 * KIB)), (256 * KIB, 10_000));
        assert_eq!(Window::new(256 * KIB, 32 * 1024 * KIB).turn(64 * KIB), 64 * KIB, "a path that is not known");
    }

    #[test]
    fn a_burst_does_not_widen_the_window() {
        let mut window = Window::new(256 * KIB, 32 * 1024 * KIB);
        let start = Instant::now();
        window.sent(start, 1, 0);
        window.acknowledged(start + Duration::from_micros(100), 1, false);
        // A quarter of a mebibyte in 50 us, and then nothing for long: 50 MB/s.
        for turn in 1..100 {
            let now = start + Duration::from_millis(5 * turn);
            window.sent(now, turn * 256 * 1024, 0);
            window.acknowledged(now + Duration::from_micros(50), turn * 256 * 1024, false);
        }
        assert_eq!(window.size(), 256 * KIB);
    }

    #[test]
    fn the_round_trip_is_asked_for_when_nothing_else_is_on_the_way() {
        let (mut window, start) = (Window::new(1, 1), Instant::now());
        assert!(window.samples(start) && !window.samples(start + Duration::from_secs(9)));
        assert!(window.samples(start + SAMPLE_EVERY));
        window.attached();
        assert!(window.samples(start + SAMPLE_EVERY), "another path");
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
