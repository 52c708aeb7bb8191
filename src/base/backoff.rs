//! The delay before the next attempt: exponential, with full jitter.
//!
//! Owns the schedule. Does not know the clock or a random source: the caller hands randomness in.
//! Invariant: a delay never exceeds the ceiling.

use std::time::Duration;

/// Exponential backoff with full jitter: attempt *n* waits a uniform time in `0..=min(ceiling, base * 2^n)`.
/// A fleet that lost its hub at one instant comes back spread out. Source: "Exponential Backoff And Jitter",
/// AWS Architecture Blog, 2015.
#[derive(Debug, Clone)]
pub struct Backoff {
    base: Duration,
    ceiling: Duration,
    attempts: u32,
}

impl Backoff {
    /// A schedule that starts at `base` and is capped at `ceiling`.
    pub const fn new(base: Duration, ceiling: Duration) -> Self {
        Self { base, ceiling, attempts: 0 }
    }

    /// The delay before the next attempt, drawn with `random` (uniform over all of `u64`).
    pub fn next_delay(&mut self, random: u64) -> Duration {
        let doublings = self.attempts.min(31);
        self.attempts = self.attempts.saturating_add(1);
        let cap = self.base.saturating_mul(1 << doublings).min(self.ceiling);
        let micros = u64::try_from(cap.as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros((u128::from(random) * u128::from(micros) / u128::from(u64::MAX)) as u64)
    }

    /// Begins again: call it only after a session has been healthy for a while, not when it connects.
    pub fn reset(&mut self) {
        self.attempts = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_the_ceiling_and_no_further() {
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
        let longest: Vec<u64> = (0..9).map(|_| backoff.next_delay(u64::MAX).as_secs()).collect();
        assert_eq!(longest, [1, 2, 4, 8, 16, 32, 60, 60, 60]);
        backoff.reset();
        assert_eq!(backoff.next_delay(0), Duration::ZERO);
        assert_eq!(backoff.next_delay(u64::MAX), Duration::from_secs(2));
    }
}
