//! A hostile peer, for fuzzing.
//!
//! Owns one plain function that any fuzzer or test can feed. Does not know the fuzzer. Invariant: whatever the
//! bytes, the core neither panics nor holds more than its limits allow.

use std::time::{Duration, Instant};

use bytes::BytesMut;

use super::{Core, Key, Options, Reading, Role};

/// Feeds `data` to a core as a peer's bytes, in pieces, while an application does what the bytes say; checks limits.
///
/// # Panics
/// If the core breaks one of its limits: that is what the fuzzer looks for.
pub fn fuzz_yamux(data: &[u8]) {
    let Some((&first, data)) = data.split_first() else { return };
    let role = if first & 1 == 0 { Role::Client } else { Role::Server };
    let options = Options { max_channels: 4, max_buffered: 256 * 1024, ..Options::new(role) };
    let mut core = Core::new(options);
    let mut keys = Vec::new();
    let mut now = Instant::now();
    for piece in data.chunks(usize::from(first >> 1).max(1)) {
        now += Duration::from_millis(u64::from(piece[0]));
        let failed = core.handle_input(now, piece).is_err();
        while let Some(key) = core.accept() {
            keys.push(key);
        }
        application(&mut core, &mut keys, piece[piece.len() - 1], now);
        let mut out = BytesMut::new();
        if first & 2 == 0 || failed {
            while core.poll_transmit(now, &mut out) {
                assert!(out.len() <= super::TURN);
                out.clear();
            }
        }
        while core.poll_event().is_some() {}
        if core.poll_timeout().is_some_and(|at| at <= now) || !core.wants_input() {
            core.handle_timeout(now + Duration::from_secs(2));
        }
        assert!(core.unread() < 256 * 1024 + piece.len(), "unread data is bounded");
        assert!(core.unsent() <= 256 * 1024 + 1024 * core.channels(), "unsent data is bounded");
        assert!(core.channels() <= keys.len() + 12, "channels are bounded");
    }
    for key in keys {
        core.release(&key);
    }
    core.abort();
    core.refuse();
    assert_eq!((core.channels(), core.unread(), core.unsent()), (0, 0, 0), "nothing is left");
}

/// One step of an application that does what it is told.
fn application(core: &mut Core, keys: &mut Vec<Key>, step: u8, now: Instant) {
    if step & 0x0f == 1 {
        keys.extend(core.open(now));
    }
    let Some(at) = keys.len().checked_sub(1).map(|last| usize::from(step >> 5).min(last)) else { return };
    match step & 0x0f {
        2 => drop(core.write(&keys[at], &[step; 3000])),
        3 => drop(core.finish(&keys[at])),
        4 => core.reset(&keys[at]),
        5 => core.release(&keys.swap_remove(at)),
        6 => drop(core.take(&keys[at])),
        7 if step >> 4 == 15 => core.close(now),
        _ => {
            if let Reading::Data(data) = core.read(&keys[at]) {
                let n = data.len();
                core.consume(&keys[at], n);
            }
        }
    }
}
