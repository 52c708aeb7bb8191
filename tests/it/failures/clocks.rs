//! Machines whose clocks are wrong (Debian package `libfaketime`).

use crate::support::{Daemon, Hub, daemon::culvert, world::DEVICE};

/// Not the `faketime` program, which would stand between us and the daemon; the loader puts the machine's own folder
/// in the place of `$LIB`.
const LIBRARY: &str = "/usr/$LIB/faketime/libfaketimeMT.so.1";

/// A device whose wall clock is off; the monotonic one is nobody's to turn.
fn device_with_clock(hub: &Hub, offset: &str) -> Daemon {
    let config = hub.device_files(DEVICE, "", &[]);
    let mut command = culvert();
    command.env("LD_PRELOAD", LIBRARY).env("FAKETIME", offset).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
    Daemon::start_with(command, "device", &config)
}

#[test]
fn a_clock_that_is_too_slow_is_named_as_the_reason() {
    let hub = Hub::start();
    let device = device_with_clock(&hub, "-2h");
    device.wait_for_line(&["WARN", "no control session with the hub", "clock"]);
    let page = device.page("/readyz");
    assert_eq!(page.status, 503);
    assert!(page.body.contains("clock"), "{}", page.body);
    hub.daemon
        .wait_for_metric("culvert_hub_control_sessions_total", &[("result", "unauthorized")], |count| count >= 1.0);
}

#[test]
fn a_clock_that_is_an_hour_fast_is_no_obstacle() {
    let hub = Hub::start();
    let device = device_with_clock(&hub, "+1h");
    device.wait_until_ready();
    hub.daemon.wait_for_metric("culvert_hub_device_sessions", &[], |count| count == 1.0);
}
