//! What is in the way between two ends: targets, ports, certificates.

use std::net::TcpListener;

use crate::support::{
    Daemon, End, Hub, Process, Target, World, client::exchange, daemon::culvert, eventually, port::free_address,
    targets, world::DEVICE,
};

#[test]
fn a_target_that_this_policy_may_not_use() {
    let (echo, open) = (targets::echo(), targets::echo());
    let target = Target::new("echo", echo.address()).with("policies = [\"iothubowner\"]");
    let world = World::plan().target_as(target).target("open", open.address()).start();
    assert_eq!(exchange(world.forward("echo"), b"x"), (Vec::new(), End::Reset));
    let labels = [("forward", "echo"), ("reason", "not_allowed")];
    world.service.wait_for_metric("culvert_forward_flows_ended_total", &labels, |ended| ended == 1.0);
    world
        .device
        .wait_for_metric("culvert_target_flows_ended_total", &[("reason", "not_allowed")], |ended| ended == 1.0);
    world.service.wait_for_line(&["WARN", "forward=echo", "not_allowed"]);
    assert_eq!(echo.accepted(), 0, "the target is not even dialled");
    assert_eq!(exchange(world.forward("open"), b"x"), (b"x".to_vec(), End::Clean));
}

#[test]
fn a_forward_whose_port_is_taken() {
    let (echo, listen) = (targets::echo(), free_address());
    let squatter = TcpListener::bind(&listen).unwrap();
    let plan = World::plan().target("echo", echo.address());
    let plan = plan.forward(crate::support::Forward::new("taken", &listen, DEVICE, "echo"));
    let world = plan.start_without_waiting();
    world.service.wait_for_line(&["WARN", "forward=taken", &listen, "it will be tried again"]);
    eventually("the reason on /readyz", || {
        let page = world.service.page("/readyz");
        (page.status == 503 && page.body.contains("forward taken") && page.body.contains(&listen)).then_some(())
    });
    world.service.wait_for_metric("culvert_forward_listening", &[("forward", "taken")], |value| value == 0.0);
    // The others work, and this one will as soon as it can.
    eventually("the other forward", || (exchange(world.forward("echo"), b"x").0 == b"x").then_some(()));
    drop(squatter);
    world.service.wait_for_metric("culvert_forward_listening", &[("forward", "taken")], |value| value == 1.0);
    assert_eq!(exchange(&listen, b"x"), (b"x".to_vec(), End::Clean));
    world.service.wait_until_ready();
}

#[test]
fn a_hub_whose_port_is_taken() {
    let mut hub = Hub::start();
    hub.daemon.stop();
    let _squatter = TcpListener::bind(("127.0.0.1", hub.port)).unwrap();
    let mut process = Process::start("hub", culvert().args(["hub", "--config"]).arg(hub.daemon.config()));
    assert_eq!(process.wait(), Some(69));
    process.wait_for_line(&["127.0.0.1", &hub.port.to_string()]);
}

#[test]
fn a_second_daemon_with_the_same_control_socket() {
    let world = World::plan().target("echo", targets::nobody()).start();
    let mut process = Process::start("service", culvert().args(["service", "--config"]).arg(world.service.config()));
    assert_eq!(process.wait(), Some(69));
    process.wait_for_line(&["another daemon is running", "service.sock"]);
}

#[test]
fn a_hub_certificate_that_is_not_trusted() {
    let (hub, other) = (Hub::start(), Hub::start());
    let config = hub.device_files(DEVICE, "", &[]);
    std::fs::copy(other.ca(), hub.scratch().join("hub/ca.pem")).unwrap();
    let device = Daemon::start("device", &config);
    device.wait_for_line(&["WARN", "no control session with the hub", "certificate of localhost", "ca_file"]);
    let page = device.page("/readyz");
    assert_eq!(page.status, 503);
    assert!(page.body.contains("certificate"), "{}", page.body);
    hub.daemon.wait_for_metric("culvert_hub_tls_failures_total", &[], |count| count >= 1.0);
}

#[test]
fn a_hub_that_is_not_there() {
    let mut hub = Hub::start();
    let config = hub.device_files(DEVICE, "", &[]);
    hub.daemon.stop();
    let device = Daemon::start("device", &config);
    device.wait_for_line(&["WARN", "no control session with the hub", "refused"]);
    assert_eq!(device.page("/readyz").status, 503);
    assert_eq!(device.page("/healthz").status, 200);
    hub.daemon.start_again();
    device.wait_until_ready();
}
