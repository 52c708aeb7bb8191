//! Ten thousand short connections, and then everything as it was.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::Shutdown,
};

use crate::support::{Daemon, World, connect, eventually, targets};

const CONNECTIONS: usize = 10_000;
const AT_ONCE: usize = 100;
/// Resident memory that may stay after 20,000 connections: the allocator's arenas, which the warm-up has not filled.
/// A leak of a connection's smallest object (a few hundred bytes in each of two tasks) would be more.
const SLACK_KIB: u64 = 8 << 10;

/// What a process holds.
#[derive(Debug, Clone, Copy)]
struct Holdings {
    descriptors: usize,
    threads: u64,
    resident_kib: u64,
}

impl Holdings {
    fn of(daemon: &Daemon) -> Self {
        let folder = format!("/proc/{}", daemon.id());
        let status = fs::read_to_string(format!("{folder}/status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.split_whitespace().next().unwrap().parse().unwrap()
        };
        Self {
            descriptors: fs::read_dir(format!("{folder}/fd")).unwrap().count(),
            threads: field("Threads:"),
            resident_kib: field("VmRSS:"),
        }
    }
}

fn short_connection(address: &str) {
    let mut client = connect(address);
    client.write_all(b"hello").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"hello");
}

fn many_at_once(address: &str, count: usize) {
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| (0..count / AT_ONCE).for_each(|_| short_connection(address)));
        }
    });
}

#[test]
fn heavy_ten_thousand_connections_leak_nothing() {
    let echo = targets::echo();
    let world = World::plan().target("echo", echo.address()).start();
    let address = world.forward("echo");
    let daemons = [&world.hub.daemon, &world.device, &world.service];
    let all_ended = |expected: usize| {
        let done = [("reason", "done")];
        world.service.wait_for_metric("culvert_forward_flows_ended_total", &done, |ended| ended == expected as f64);
        world.device.wait_for_metric("culvert_target_flows_ended_total", &done, |ended| ended == expected as f64);
        world.service.wait_for_metric("culvert_forward_flows", &[], |open| open == 0.0);
        world.device.wait_for_metric("culvert_target_flows", &[], |open| open == 0.0);
    };
    // Threads, buffers and the allocator's arenas reach their size.
    many_at_once(address, 3000);
    all_ended(3000);
    let before = daemons.map(Holdings::of);
    (0..CONNECTIONS).for_each(|_| short_connection(address));
    all_ended(3000 + CONNECTIONS);
    let between = daemons.map(Holdings::of);
    many_at_once(address, CONNECTIONS);
    all_ended(3000 + 2 * CONNECTIONS);
    for (index, daemon) in daemons.into_iter().enumerate() {
        let after = eventually("descriptors to be closed", || {
            Some(Holdings::of(daemon)).filter(|now| now.descriptors <= before[index].descriptors)
        });
        println!("before {:?}\none after another {:?}\n100 at a time {after:?}\n", before[index], between[index]);
        assert!(after.threads <= before[index].threads, "threads");
        assert!(after.resident_kib <= before[index].resident_kib + SLACK_KIB, "memory");
        assert_eq!(daemon.metric("culvert_task_panics_total", &[]), 0.0);
    }
    assert_eq!(world.hub.daemon.metric("culvert_hub_bridges_open", &[]), 1.0);
}
