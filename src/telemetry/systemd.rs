//! What systemd is told: ready, reloading, stopping, a status line, and that the loops still turn.
//!
//! Owns the messages and the watchdog's rule. Does not know whether a hub is reachable: the watchdog is about
//! loops that turn, never about network success. Invariant: without `$NOTIFY_SOCKET` everything here is a no-op.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use sd_notify::NotifyState;
use tokio_util::sync::CancellationToken;

/// Checks per watchdog period: systemd's manual advises half the period; a third leaves room for one late turn.
const CHECKS_PER_PERIOD: u32 = 3;
/// Turns of an idle loop per watchdog period: more than checks, so that none finds it between two turns.
const TURNS_PER_PERIOD: u32 = 4;
/// How often an idle loop turns when no watchdog asks for more.
const TURN_EVERY: Duration = Duration::from_secs(2);
/// What a stop may take beyond the drain that was configured: everything else has limits of seconds.
const STOP_MARGIN: Duration = Duration::from_secs(15);

/// Start-up is done: the configuration is valid, listeners were tried, loops run.
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// A reload begins. Always followed by [`ready`], also when the reload failed.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => send(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "the monotonic clock cannot be read; systemd is not told of the reload"),
    }
}

/// What `systemctl status` shows, such as what is waited for.
pub fn status(status: &str) {
    send(&[NotifyState::Status(status)]);
}

/// The daemon winds down, and may take as long as its connections may: the unit's `TimeoutStopSec=` holds for what is
/// shorter.
pub fn stopping(drain: Duration) {
    let limit = drain.saturating_add(STOP_MARGIN).as_micros();
    let extended = format!("EXTEND_TIMEOUT_USEC={limit}");
    send(&[NotifyState::Stopping, NotifyState::Status("stopping"), NotifyState::Custom(&extended)]);
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "systemd could not be notified");
    }
}

/// The loops whose turning proves that the daemon lives. Clone it freely; it is one set.
#[derive(Debug, Clone, Default)]
pub struct Loops(Arc<Mutex<Vec<Arc<AtomicU64>>>>);

/// One loop's mark: each turn of the loop calls [`turned`](Self::turned). Dropped when the loop has ended on
/// purpose, which is not a hang.
#[derive(Debug)]
pub struct Beat(Arc<AtomicU64>);

impl Loops {
    /// Adds a loop. It must turn at least once per [`turn_every`](Self::turn_every), idle or not.
    pub fn enter(&self) -> Beat {
        let turns = Arc::new(AtomicU64::new(1));
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(turns.clone());
        Beat(turns)
    }

    /// How often an idle loop turns.
    pub fn turn_every() -> Duration {
        turn_every(sd_notify::watchdog_enabled())
    }

    /// True if each loop has turned since the last call; marks them for the next.
    fn all_turned(&self) -> bool {
        let mut loops = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        loops.retain(|turns| Arc::strong_count(turns) > 1);
        // Every mark is taken, so that one stuck loop does not hide another.
        loops.iter().filter(|turns| turns.swap(0, Ordering::Relaxed) == 0).count() == 0
    }
}

impl Beat {
    /// The loop came round once more.
    pub fn turned(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn turn_every(watchdog: Option<Duration>) -> Duration {
    let asked = watchdog.map_or(TURN_EVERY, |period| period / TURNS_PER_PERIOD);
    asked.clamp(Duration::from_millis(1), TURN_EVERY)
}

/// Feeds the service manager's watchdog, if it asked for one, for as long as all the loops turn.
pub async fn feed_watchdog(loops: Loops, shutdown: CancellationToken) {
    let Some(period) = sd_notify::watchdog_enabled() else { return };
    let mut checks = tokio::time::interval((period / CHECKS_PER_PERIOD).max(Duration::from_millis(1)));
    checks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = checks.tick() => {}
        }
        if loops.all_turned() {
            send(&[NotifyState::Watchdog]);
        } else {
            tracing::warn!("a loop of this daemon does not turn; systemd's watchdog is not fed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_turn_more_often_than_they_are_looked_at() {
        assert_eq!(turn_every(None), TURN_EVERY);
        assert_eq!(turn_every(Some(Duration::from_secs(30))), TURN_EVERY);
        let period = Duration::from_secs(2);
        assert!(turn_every(Some(period)) < period / CHECKS_PER_PERIOD);
        assert!(!turn_every(Some(Duration::ZERO)).is_zero());
    }

    #[test]
    fn one_stuck_loop_starves_the_watchdog_until_it_turns_or_ends() {
        let loops = Loops::default();
        let (turning, stuck) = (loops.enter(), loops.enter());
        assert!(loops.all_turned(), "a loop that has just begun has turned");
        turning.turned();
        assert!(!loops.all_turned());
        turning.turned();
        stuck.turned();
        assert!(loops.all_turned());
        turning.turned();
        drop(stuck);
        assert!(loops.all_turned());
    }
}
