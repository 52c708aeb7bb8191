//! Ten thousand short connections leave nothing behind.

use std::{
    fs,
    io::{Read as _, Write as _},
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use crate::support::{Daemon, World, connect, eventually, targets};

/// Half of the connections one after another, half of them by this many at a time.
const AT_ONCE: u32 = 100;
const EACH: u32 = 5_000;
/// What an allocator keeps of a burst of a hundred connections is not a leak; a kilobyte kept of each of ten thousand
/// would be ten times this.
const SLACK_KIB: u64 = 8 << 10;

fn open_files(daemon: &Daemon) -> usize {
    fs::read_dir(format!("/proc/{}/fd", daemon.id())).unwrap().count()
}

fn resident_kib(daemon: &Daemon) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.id())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn one_connection(address: &str) {
    let mut socket = connect(address);
    socket.write_all(b"ping").unwrap();
    let mut answer = [0; 4];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"ping");
}

fn burst(address: &str, count: u32) {
    let left = AtomicU32::new(count);
    let take = |left: u32| left.checked_sub(1);
    thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
                    one_connection(address);
                }
            });
        }
    });
}

#[test]
fn ten_thousand_short_connections_leave_nothing_behind() {
    let echo = targets::echo();
    let world = World::plan().target("echo", echo.address()).start();
    let address = world.forward("echo");
    // What a first burst makes the allocator and the runtime keep is the baseline.
    burst(address, 4 * AT_ONCE);
    let daemons = [&world.hub.daemon, &world.device, &world.service];
    settle(&world);
    let before = daemons.map(|daemon| (open_files(daemon), resident_kib(daemon)));
    for _ in 0..EACH {
        one_connection(address);
    }
    burst(address, EACH);
    settle(&world);
    for (daemon, (files, kib)) in daemons.into_iter().zip(before) {
        let what = format!("{} to close its files again", daemon.config().display());
        eventually(&what, || (open_files(daemon) <= files).then_some(()));
        let grown = resident_kib(daemon).saturating_sub(kib);
        assert!(grown < SLACK_KIB, "{} grew by {grown} KiB", daemon.config().display());
        assert_eq!(daemon.metric("culvert_task_panics_total", &[]), 0.0);
    }
}

/// Waits until no connection is open any more.
fn settle(world: &World) {
    world.service.wait_for_metric("culvert_forward_flows", &[], |flows| flows == 0.0);
    world.device.wait_for_metric("culvert_target_flows", &[], |flows| flows == 0.0);
}
