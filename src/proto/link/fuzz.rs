//! A hostile peer on a carrier, for fuzzing.
//!
//! Owns one plain function that any fuzzer or test can feed. Does not know the fuzzer. Invariant: whatever the bytes,
//! the core neither panics nor holds more than its windows allow.

use std::time::{Duration, Instant};

use super::{Core, Event, Options, Positions, Read};

/// Small, so that few bytes reach it.
const WINDOW: u32 = 4096;

/// Feeds `data` to a link as its peer's frames, in pieces, while an application reads, writes and ends as told.
///
/// # Panics
/// If the core breaks one of its limits: that is what the fuzzer looks for.
pub fn fuzz_link(data: &[u8]) {
    let Some((&first, data)) = data.split_first() else { return };
    let mut now = Instant::now();
    let options = Options {
        receive_window: WINDOW,
        peer_window: WINDOW,
        initial_window: 1024,
        max_window: 8192,
        resume_for: Duration::from_secs(1),
    };
    let mut core = Core::new(now, options);
    let attached = core.attach(now, 1, Positions::default());
    assert!(attached.is_ok(), "a new link takes its first carrier");
    let mut ends = 0;
    for piece in data.chunks(usize::from(first >> 1).max(1)) {
        now += Duration::from_millis(u64::from(piece[0]));
        // An error has ended the link; that it says so is checked below.
        let failed = core.handle_input(now, 1, piece).is_err();
        application(&mut core, piece[piece.len() - 1], now);
        while core.poll_transmit(now).is_some() {}
        if core.poll_timeout().is_some_and(|at| at <= now) {
            core.handle_timeout(now);
        }
        while let Some(Event::Ended(_)) = core.poll_event() {
            ends += 1;
        }
        assert!(!failed || core.ended().is_some(), "a violation is the end");
        assert!(core.unread_bytes() <= WINDOW as usize, "unread data is bounded");
        assert!(core.replay_bytes() <= 8192 + 65_536, "kept data is bounded");
        let Positions { received, consumed } = core.positions();
        assert!(consumed <= received, "nothing is read that did not come");
    }
    assert!(ends <= 1, "a link ends once");
}

/// One step of an application that does what it is told.
fn application(core: &mut Core, step: u8, now: Instant) {
    let mut room = [0; 700];
    match step & 0x0f {
        1 => core.close("told to"),
        2 => core.finish(),
        3 => core.detach(now, 1),
        4 => drop(core.attach(now, core.epoch() + 1, core.positions())),
        5..=8 => {
            core.write(&room[..usize::from(step)]);
            core.flush();
        }
        _ => while let Read::Bytes(_) = core.read(now, &mut room) {},
    }
}
