//! When a carrier is alive, suspect or dead: a pure clockwork.
//!
//! Owns the ping schedule and the verdict. Does not know sockets or timers: `now` is handed in. Invariant: a carrier
//! is declared dead only after a ping of ours that the other end could have answered went unanswered.

use std::time::Duration;

use tokio::time::Instant;

/// How a carrier proves that it is alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Liveness {
    /// A ping is sent this long after the last one.
    pub ping_every: Duration,
    /// Nothing heard for this long, one unanswered ping included, is death.
    pub dead_after: Duration,
    /// Data or a ping unanswered for this long makes the carrier suspect.
    pub suspect_after: Duration,
    /// What an unanswered ping proves.
    pub silence: Silence,
}

/// What an unanswered ping proves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    /// Death. For streams with flow control of their own above the carrier: the hub always reads.
    Proves,
    /// Death only if everything sent before the ping was known to be read. For plain streams, whose far end may pause
    /// for ever, so that the hub stops reading and our ping waits unread behind our data. TCP's own time-outs judge
    /// the path meanwhile.
    ProvesWhenSettled,
}

/// 15 s is below every NAT and proxy idle time-out seen in the field (the shortest common one is 30 s).
const PING_EVERY: Duration = Duration::from_secs(15);
/// Two and a half ping intervals.
const DEAD_AFTER: Duration = Duration::from_secs(37);
/// Longer than any round trip on a working path, short enough that a person does not yet give up.
const SUSPECT_AFTER: Duration = Duration::from_secs(5);
/// Unanswered data is followed by a ping after this long: the far application may be silent, the hub never is.
const PROBE_AFTER: Duration = Duration::from_secs(2);
/// A probe that somebody asked for, because the network changed, makes the carrier suspect after this long: paths that
/// are gone often give no error. Longer than the round trip of any path but a satellite's; a wrong guess costs a resume.
const PROBE_ANSWER: Duration = Duration::from_secs(1);

impl Liveness {
    /// For mux streams and control sessions.
    pub const DEFAULT: Self =
        Self { ping_every: PING_EVERY, dead_after: DEAD_AFTER, suspect_after: SUSPECT_AFTER, silence: Silence::Proves };
    /// For plain streams.
    pub const PLAIN: Self = Self { silence: Silence::ProvesWhenSettled, ..Self::DEFAULT };
}

impl Default for Liveness {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// What has to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// Send a ping with this number.
    Ping(u64),
    /// Give up.
    Death,
    /// Nothing before this instant.
    Nothing(Instant),
}

#[derive(Debug)]
pub(super) struct Life {
    options: Liveness,
    /// The last sign of life.
    heard: Instant,
    /// When the first payload or ping since then was sent.
    unanswered: Option<Instant>,
    /// The last ping, answered or not.
    ping: Ping,
    /// Payload was sent that no answered ping followed.
    unsettled: bool,
    /// Somebody asked for a ping.
    probe: bool,
    /// Since when somebody who asked has no answer.
    probed: Option<Instant>,
}

#[derive(Debug)]
struct Ping {
    number: u64,
    wanted: Instant,
    sent: Option<Instant>,
    answered: bool,
    /// What its silence proves, fixed when it was wanted.
    proves: bool,
    /// No payload was sent behind it.
    last: bool,
}

impl Life {
    /// The first ping is due at once: it yields the first round-trip time.
    pub(super) fn new(options: Liveness, now: Instant) -> Self {
        let ping = Ping { number: 0, wanted: now, sent: None, answered: true, proves: false, last: true };
        Self { options, heard: now, unanswered: None, ping, unsettled: false, probe: true, probed: None }
    }

    /// Anything arrived.
    pub(super) fn heard(&mut self, now: Instant) {
        self.moved(now);
        self.probed = None;
    }

    /// A blocked write moved on: somebody acknowledged, so that a slow path full of our data is no silent one. But the
    /// kernel also takes more just after a path has died: no answer to a probe.
    pub(super) fn moved(&mut self, now: Instant) {
        self.heard = now;
        self.unanswered = None;
    }

    /// Payload was handed to the transport.
    pub(super) fn sent_payload(&mut self, now: Instant) {
        self.unanswered.get_or_insert(now);
        self.unsettled = true;
        self.ping.last = false;
    }

    /// The ping was handed to the transport.
    pub(super) fn sent_ping(&mut self, number: u64, now: Instant) {
        if number == self.ping.number {
            self.ping.sent = Some(now);
        }
    }

    /// A pong arrived; yields the round-trip time if it answers the last ping.
    pub(super) fn pong(&mut self, number: u64, now: Instant) -> Option<Duration> {
        if number != self.ping.number || self.ping.answered {
            return None;
        }
        self.ping.answered = true;
        self.unsettled &= !self.ping.last;
        self.ping.sent.map(|sent| now.duration_since(sent))
    }

    /// A ping is wanted now, and an answer to it soon.
    pub(super) fn probe(&mut self, now: Instant) {
        self.probe = true;
        self.probed.get_or_insert(now);
    }

    /// True if something has been unanswered for too long.
    pub(super) fn is_suspect(&self, now: Instant) -> bool {
        self.suspicions().any(|at| now >= at)
    }

    fn suspicions(&self) -> impl Iterator<Item = Instant> {
        let silence = self.unanswered.map(|since| since + self.options.suspect_after);
        silence.into_iter().chain(self.probed.map(|since| since + PROBE_ANSWER))
    }

    /// What has to be done at `now`.
    pub(super) fn due(&mut self, now: Instant) -> Due {
        if self.death().is_some_and(|at| now >= at) {
            return Due::Death;
        }
        if self.probe || self.next_ping().is_some_and(|at| now >= at) {
            return self.want_ping(now).map_or_else(|| Due::Nothing(self.deadline(now)), Due::Ping);
        }
        Due::Nothing(self.deadline(now))
    }

    /// A new ping, unless one is on its way and nothing was heard since.
    fn want_ping(&mut self, now: Instant) -> Option<u64> {
        self.probe = false;
        if self.is_waiting() {
            return None;
        }
        let proves = self.options.silence == Silence::Proves || !self.unsettled;
        let number = self.ping.number + 1;
        self.ping = Ping { number, wanted: now, sent: None, answered: false, proves, last: true };
        self.unanswered.get_or_insert(now);
        Some(number)
    }

    /// A ping is out and nothing has been heard since.
    fn is_waiting(&self) -> bool {
        !self.ping.answered && self.heard <= self.ping.wanted
    }

    fn next_ping(&self) -> Option<Instant> {
        if self.is_waiting() {
            return None;
        }
        let scheduled = self.ping.wanted + self.options.ping_every;
        let probe = self.unanswered.map(|since| since + PROBE_AFTER);
        Some(probe.map_or(scheduled, |probe| probe.min(scheduled)))
    }

    fn death(&self) -> Option<Instant> {
        let grace = self.options.dead_after.saturating_sub(self.options.ping_every);
        (self.is_waiting() && self.ping.proves).then(|| self.ping.wanted + grace)
    }

    /// When [`Self::due`] or [`Self::is_suspect`] changes its answer.
    pub(super) fn deadline(&self, now: Instant) -> Instant {
        let suspect = self.suspicions().filter(|at| *at > now).min();
        let all = [self.next_ping(), self.death(), suspect];
        all.into_iter().flatten().min().unwrap_or(now + self.options.ping_every)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    fn started(options: Liveness) -> (Life, Instant) {
        let zero = Instant::now();
        let mut life = Life::new(options, zero);
        assert_eq!(life.due(zero), Due::Ping(1));
        life.sent_ping(1, zero);
        life.heard(zero + Duration::from_millis(80));
        assert_eq!(life.pong(1, zero + Duration::from_millis(80)), Some(Duration::from_millis(80)));
        (life, zero)
    }

    #[test]
    fn an_idle_carrier_pings_every_15_s_and_dies_22_s_after_the_first_silent_one() {
        let (mut life, zero) = started(Liveness::DEFAULT);
        assert_eq!(life.due(zero + S(1)), Due::Nothing(zero + S(15)));
        assert_eq!(life.due(zero + S(15)), Due::Ping(2));
        assert_eq!(life.due(zero + S(16)), Due::Nothing(zero + S(20)), "the next change is suspicion");
        assert!(!life.is_suspect(zero + S(19)) && life.is_suspect(zero + S(20)));
        assert_eq!(life.due(zero + S(36)), Due::Nothing(zero + S(37)));
        assert_eq!(life.due(zero + S(37)), Due::Death);
    }

    #[test]
    fn traffic_counts_as_life() {
        let (mut life, zero) = started(Liveness::DEFAULT);
        assert_eq!(life.due(zero + S(15)), Due::Ping(2));
        life.heard(zero + S(36));
        assert!(!life.is_suspect(zero + S(36)));
        assert_eq!(life.due(zero + S(37)), Due::Ping(3), "another ping, no death");
        assert_eq!(life.pong(2, zero + S(38)), None, "a late pong measures nothing");
    }

    #[test]
    fn unanswered_data_is_probed_after_2_s_and_suspect_after_5() {
        let (mut life, zero) = started(Liveness::DEFAULT);
        life.sent_payload(zero + S(3));
        life.sent_payload(zero + S(4));
        assert_eq!(life.due(zero + S(4)), Due::Nothing(zero + S(5)));
        assert_eq!(life.due(zero + S(5)), Due::Ping(2));
        assert!(life.is_suspect(zero + S(8)));
        life.heard(zero + S(9));
        assert!(!life.is_suspect(zero + S(9)));
    }

    #[test]
    fn a_probe_without_an_answer_makes_suspect_after_1_s_even_if_the_kernel_takes_more() {
        let (mut life, zero) = started(Liveness::DEFAULT);
        life.probe(zero + S(2));
        assert_eq!(life.due(zero + S(2)), Due::Ping(2));
        life.moved(zero + S(2) + Duration::from_millis(300));
        assert!(!life.is_suspect(zero + S(2)) && life.is_suspect(zero + S(3)));
        life.heard(zero + S(4));
        assert!(!life.is_suspect(zero + S(4)));
        life.probe(zero + S(5));
        assert_eq!(life.due(zero + S(5)), Due::Ping(3));
        life.heard(zero + S(5) + Duration::from_millis(50));
        assert!(!life.is_suspect(zero + S(7)), "anything heard is an answer");
    }

    #[test]
    fn a_plain_stream_whose_far_end_pauses_is_not_dead() {
        let (mut life, zero) = started(Liveness::PLAIN);
        life.sent_payload(zero + S(1));
        assert_eq!(life.due(zero + S(3)), Due::Ping(2));
        assert!(matches!(life.due(zero + S(3600)), Due::Nothing(_)), "it may wait behind unread data");
        life.heard(zero + S(3601));
        assert!(life.pong(2, zero + S(3601)).is_none(), "it was never handed to the transport");
        assert_eq!(life.due(zero + S(3602)), Due::Ping(3));
        assert_eq!(life.due(zero + S(3624)), Due::Death, "everything had been read: now silence proves");
    }
}
