//! When to try again.
//!
//! Owns the two schedules: a short fixed one for paths that fail under live flows, and exponential full jitter for
//! everything else. Does not try anything itself. Invariant: a hub that answers is never asked again sooner than it
//! said.

use std::time::Duration;

use super::{Failure, random_u64};
use crate::base::Backoff;

/// First step of the exponential schedule.
const BASE: Duration = Duration::from_secs(1);
/// Its ceiling: a fleet behind a restarted hub spreads itself over a minute (issue 4).
const CEILING: Duration = Duration::from_secs(60);
/// Between attempts on a failing path while flows wait (issue 4): short, because a person is waiting. A third more or
/// less, so that daemons that lost one hub in the same instant do not come back in step for ever.
const PATH_RETRY: Duration = Duration::from_millis(1500);
const PATH_RETRY_SPREAD_MICROS: u64 = 1_000_000;
/// The first attempts after a loss that fail are made again sooner: what broke the connection may not be quite over.
const QUICK_RETRY: Duration = Duration::from_millis(250);
const QUICK_RETRIES: u32 = 2;
/// The longest delay while connections wait and nothing listens at the hub's address, as while it restarts: a person
/// is waiting. Such an attempt costs the hub's host one refused SYN; only daemons with open connections make it.
const REFUSED_CEILING: Duration = Duration::from_millis(1500);
/// So many of these in a row, about 20 s; a hub that is down for longer is left alone like any other.
const REFUSED_ATTEMPTS: u32 = 30;
/// What nobody waits for follows news of the network within this time: a whole site may have had the same news, and its
/// hub would be asked by all in one instant.
const CALM: Duration = Duration::from_secs(2);
/// A session that lived this long was healthy: the schedule begins again.
const HEALTHY: Duration = Duration::from_secs(30);

/// The delay before the next attempt, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Next {
    /// How long to wait.
    pub delay: Duration,
    /// How long to wait even if there is news: the hub asked for it.
    pub at_least: Duration,
}

/// The schedule of one tunnel or control session.
#[derive(Debug)]
pub struct Retry {
    backoff: Backoff,
    /// Quick attempts since the last success.
    quick: u32,
    /// Refused ones under live flows since then.
    refused: u32,
}

impl Default for Retry {
    fn default() -> Self {
        Self { backoff: Backoff::new(BASE, CEILING), quick: 0, refused: 0 }
    }
}

impl Retry {
    /// The delay after a failure. `is_urgent`: flows wait for this.
    pub fn after(&mut self, failure: Failure, is_urgent: bool) -> Next {
        let delay = match failure {
            Failure::Path if is_urgent && self.quick < QUICK_RETRIES => {
                self.quick += 1;
                QUICK_RETRY + jittered(QUICK_RETRY)
            }
            Failure::Path if is_urgent => {
                let spread = random_u64() % PATH_RETRY_SPREAD_MICROS;
                PATH_RETRY + Duration::from_micros(spread) - Duration::from_micros(PATH_RETRY_SPREAD_MICROS / 2)
            }
            Failure::Refused if is_urgent && self.refused < REFUSED_ATTEMPTS => {
                self.refused += 1;
                self.backoff.next_delay(random_u64()).min(jittered(REFUSED_CEILING))
            }
            Failure::Path | Failure::Refused | Failure::Answered(None) => self.backoff.next_delay(random_u64()),
            Failure::Answered(Some(at_least)) => {
                at_least.min(CEILING) + self.backoff.next_delay(random_u64()).min(at_least.max(BASE))
            }
        };
        let at_least = match failure {
            Failure::Answered(Some(at_least)) => at_least.min(CEILING),
            Failure::Path | Failure::Refused | Failure::Answered(None) => Duration::ZERO,
        };
        Next { delay, at_least }
    }

    /// Notes that an attempt succeeded.
    pub fn succeeded(&mut self) {
        (self.quick, self.refused) = (0, 0);
    }

    /// The delay before the next session after one that ended by itself: none after a healthy one. Who evicts or ends us
    /// right after the hello is not asked again without a pause.
    pub fn after_session(&mut self, lifetime: Duration) -> Option<Next> {
        self.lived(lifetime);
        let pause = || Next { delay: self.backoff.next_delay(random_u64()), at_least: Duration::ZERO };
        (lifetime < HEALTHY).then(pause)
    }

    /// Notes that a session ended after this long; a healthy one starts the schedule anew.
    pub fn lived(&mut self, lifetime: Duration) {
        if lifetime >= HEALTHY {
            self.backoff.reset();
        }
    }
}

/// How long after news of the network an attempt begins that nobody waits for.
pub fn calm() -> Duration {
    jittered(CALM)
}

/// A uniform time up to `ceiling`.
fn jittered(ceiling: Duration) -> Duration {
    Backoff::new(ceiling, ceiling).next_delay(random_u64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hub_that_names_a_time_is_left_alone_that_long() {
        let mut retry = Retry::default();
        let asked = Duration::from_secs(7);
        for _ in 0..20 {
            let next = retry.after(Failure::Answered(Some(asked)), true);
            assert!((asked..=2 * asked).contains(&next.delay), "{next:?}");
            assert_eq!(next.at_least, asked);
        }
    }

    #[test]
    fn a_failing_path_is_tried_soon_but_not_in_step() {
        let mut retry = Retry::default();
        for _ in 0..QUICK_RETRIES {
            assert!(retry.after(Failure::Path, true).delay <= 2 * QUICK_RETRY);
        }
        let delays: Vec<_> = (0..20).map(|_| retry.after(Failure::Path, true).delay).collect();
        assert!(delays.iter().all(|delay| (1000..2000).contains(&delay.as_millis())), "{delays:?}");
        assert!(delays.iter().any(|delay| *delay != delays[0]), "{delays:?}");
        retry.succeeded();
        assert!(retry.after(Failure::Path, true).delay <= 2 * QUICK_RETRY);
    }

    #[test]
    fn a_hub_that_restarts_under_live_connections_is_soon_tried_again() {
        let mut retry = Retry::default();
        for _ in 0..REFUSED_ATTEMPTS {
            assert!(retry.after(Failure::Refused, true).delay <= REFUSED_CEILING);
        }
        let after_that: Vec<_> = (0..50).map(|_| retry.after(Failure::Refused, true).delay).collect();
        assert!(after_that.iter().any(|delay| *delay > REFUSED_CEILING));
        // A line that never holds for long does not make the next restart of the hub a long one.
        retry.succeeded();
        retry.lived(Duration::from_secs(2));
        assert!((0..REFUSED_ATTEMPTS).all(|_| retry.after(Failure::Refused, true).delay <= REFUSED_CEILING));
    }

    #[test]
    fn sessions_that_do_not_live_are_made_ever_less_often() {
        let mut retry = Retry::default();
        let mut paused = Duration::ZERO;
        for _ in 0..40 {
            retry.succeeded();
            paused += retry.after_session(Duration::from_millis(5)).unwrap().delay;
        }
        // Full jitter below 60 s most of the time: half of the mean, five standard deviations below it.
        assert!(paused > Duration::from_secs(500), "{paused:?}");
        assert_eq!(retry.after_session(HEALTHY), None);
        assert!(retry.after_session(Duration::ZERO).unwrap().delay <= BASE);
    }

    #[test]
    fn delays_stay_below_the_ceiling_and_begin_again_after_a_healthy_session() {
        let mut retry = Retry::default();
        for _ in 0..50 {
            assert!(retry.after(Failure::Path, false).delay <= CEILING);
        }
        retry.lived(Duration::from_secs(29));
        assert!((0..50).any(|_| retry.after(Failure::Path, false).delay > BASE));
        retry.lived(HEALTHY);
        assert!(retry.after(Failure::Path, false).delay <= BASE);
    }
}
