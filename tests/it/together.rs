//! Many forwards over one device stream, and many services at one device.

use std::{
    fs,
    io::{Read as _, Write as _},
    process::Command,
};

use crate::{
    programs::{
        nginx::Nginx,
        sshd::{Session, Sshd},
        xrdp::{Desktop, User, Xrdp, can_log_in},
    },
    support::{
        Daemon, End, Forward, World, client::exchange, connect, port::free_address, run, targets, world::DEVICE,
    },
};

/// The connections that a process holds to a port, as `ss` shows them.
fn connections(process: u32, port: u16) -> usize {
    let filter = ["-Htnp", "state", "established", "dport", "=", &format!(":{port}")];
    let table = run(Command::new("ss").args(filter));
    table.lines().filter(|line| line.contains(&format!("pid={process},"))).count()
}

#[test]
fn ssh_rdp_and_http_share_one_device_stream() {
    if !can_log_in() {
        return;
    }
    let (sshd, nginx, xrdp, user) = (Sshd::start(), Nginx::start(), Xrdp::start(), User::add());
    let plan = World::plan().target("ssh", sshd.address()).target("web", nginx.address());
    let world = plan.target("rdp", xrdp.address()).start();
    let mut session = Session::open(&sshd, &world.port("ssh"));
    assert_eq!(session.ask("expr 6 '*' 7"), "42");
    let mut desktop = Desktop::log_in(world.forward("rdp"), &user);
    desktop.wait_for_session(&user);
    let url = format!("http://{}/hello.txt", world.forward("web"));
    for _ in 0..10 {
        run(Command::new("curl").args(["--silent", "--fail", "--noproxy", "*", &url]));
    }
    assert_eq!(session.ask("expr 6 '*' 8"), "48");
    assert!(desktop.is_open());
    assert_eq!(world.hub.daemon.metric("culvert_hub_bridges_open", &[]), 1.0);
    assert_eq!(world.device.metric("culvert_device_mux_streams", &[]), 1.0);
    // The control session and one data connection.
    assert_eq!(connections(world.device.id(), world.hub.port), 2);
    assert_eq!(session.exit(0), Some(0));
}

#[test]
fn three_services_reach_one_device_and_nobody_is_evicted() {
    let echo = targets::echo();
    let mut world = World::plan().target("echo", echo.address()).start();
    let mut more: Vec<(Daemon, String)> = ["second", "third"]
        .map(|name| {
            let listen = free_address();
            let forward = Forward::new("echo", &listen, DEVICE, "echo");
            (Daemon::start("service", &world.hub.service_files(name, "", &[forward])), listen)
        })
        .into();
    world.hub.daemon.wait_for_metric("culvert_hub_bridges_open", &[], |open| open == 3.0);
    assert_eq!(connections(world.device.id(), world.hub.port), 4);
    let mut held = [world.forward("echo"), &more[0].1, &more[1].1].map(connect);
    let mut greet = |index: usize| -> std::io::Result<bool> {
        let mut answer = [0; 5];
        held[index].write_all(b"hello")?;
        held[index].read_exact(&mut answer).map(|()| answer == *b"hello")
    };
    assert!((0..3).all(|index| greet(index).unwrap()));
    let instance = |folder: &str| fs::read_dir(world.hub.scratch().join(folder).join("state")).unwrap().count();
    assert!(instance("second") > 0, "the service keeps its instance ID");
    more[0].0.kill();
    assert!(greet(1).is_err(), "its client is cut off");
    more[0].0.start_again();
    more[0].0.wait_for_metric("culvert_service_device_streams", &[], |open| open == 1.0);
    // The dead daemon's link ends with its successor's arrival, not after `resume_for`.
    world.device.wait_for_metric("culvert_device_mux_streams", &[], |open| open == 3.0);
    world.hub.daemon.wait_for_metric("culvert_hub_bridges_open", &[], |open| open == 3.0);
    assert!(greet(0).unwrap() && greet(2).unwrap());
    assert_eq!(exchange(&more[0].1, b"again"), (b"again".to_vec(), End::Clean));
    assert_eq!(world.service.metric("culvert_service_device_streams_opened_total", &[]), 1.0);
    assert_eq!(more[1].0.metric("culvert_service_device_streams_opened_total", &[]), 1.0);
    world.service.stop();
}
