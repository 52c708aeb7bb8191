//! Who leaves takes nothing with him: what was said before an end, a reset or a stop arrives, and the other side learns of
//! it at once.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpStream},
    process::{Command, Stdio},
    sync::{Mutex, mpsc},
};

use crate::support::{
    End, Forward, Proxy, World,
    bytes::{Pattern, drain},
    client::read_to_end,
    connect,
    daemon::culvert,
    port::free_address,
    targets::Server,
    world::DEVICE,
};

/// Half of what a DSL line has: a mux and a link that have something to say have it for a while.
const SLOW: u64 = 400_000;

fn behind(proxy: &Proxy) -> String {
    format!("proxy = \"http://{}\"\n", proxy.address())
}

/// Ends its direction at once, and tells how many bytes came and how that ended.
fn terse() -> (Server, mpsc::Receiver<(u64, bool)>) {
    let (told, hears) = mpsc::channel();
    let told = Mutex::new(told);
    let server = Server::start(move |mut socket| {
        socket.shutdown(Shutdown::Write).unwrap();
        let (count, end) = drain(&mut socket);
        told.lock().unwrap().send((count, end.is_ok())).unwrap();
    });
    (server, hears)
}

#[test]
fn an_answer_that_comes_before_a_reset_is_read() {
    // What an HTTP server does with a body that is too large: the kernel sends a reset for what was not read.
    let target = Server::start(|mut socket| {
        socket.read_exact(&mut [0]).unwrap();
        let _ = socket.write_all(b"413 too large");
    });
    let world = World::plan().target("strict", target.address()).start();
    for round in 0..20 {
        let mut client = connect(world.forward("strict"));
        let mut sender = client.try_clone().unwrap();
        let sending = std::thread::spawn(move || sender.write_all(&Pattern::take_bytes(7, 1 << 20)));
        let (answer, _) = read_to_end(&mut client);
        assert_eq!(String::from_utf8_lossy(&answer), "413 too large", "round {round}");
        let _ = sending.join().unwrap();
    }
}

#[test]
fn a_stopping_service_delivers_what_ended_connections_have_left() {
    let ((target, hears), proxy) = (terse(), Proxy::start());
    let mut world = World::plan().target("terse", target.address()).service_settings(&behind(&proxy)).start();
    proxy.pace(SLOW);
    let mut client = connect(world.forward("terse"));
    client.write_all(&Pattern::take_bytes(8, 900_000)).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_to_end(&mut client), (Vec::new(), End::Clean));
    world.service.wait_for_metric("culvert_forward_flows_ended_total", &[("reason", "done")], |ended| ended == 1.0);
    assert_eq!(world.service.stop(), Some(0));
    assert_eq!(hears.recv().unwrap(), (900_000, true));
    world.device.wait_for_line(&["device stream ended: ended by the service"]);
    world.device.wait_for_metric("culvert_links", &[], |links| links == 0.0);
}

#[test]
fn a_device_that_stops_is_heard_through_a_stream_that_is_full() {
    let endless = Server::start(|mut socket| while socket.write_all(&[7; 64 << 10]).is_ok() {});
    let proxy = Proxy::start();
    let plan = World::plan().target("endless", endless.address());
    let mut world = plan.service_settings(&behind(&proxy)).device_settings("").start();
    proxy.pace(SLOW);
    for _ in 0..3 {
        let mut client = connect(world.forward("endless"));
        client.read_exact(&mut [0; 300_000]).unwrap();
        assert_eq!(world.device.stop(), Some(0));
        assert_eq!(read_to_end(&mut client).1, End::Reset);
        world.device.wait_for_line(&["connection ended", "reason=\"stopped\""]);
        world.device.start_again();
        world.wait_until_usable();
    }
    let said = world.service.wait_for_line(&["device stream ended: "]);
    assert!(said.contains("ended by the device"), "{said}");
    assert_eq!(world.service.metric("culvert_link_sessions_lost_total", &[]), 0.0);
}

#[test]
fn a_connection_that_the_target_has_ended_notices_that_the_device_is_gone() {
    let (target, _hears) = terse();
    let mut world = World::plan().target("terse", target.address()).start();
    let mut client = connect(world.forward("terse"));
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    assert_eq!(world.device.stop(), Some(0));
    world.service.wait_for_metric("culvert_forward_flows", &[], |open| open == 0.0);
}

#[test]
fn a_client_that_leaves_before_the_device_is_there_leaves_its_place() {
    let absent = Forward::new("absent", free_address(), "nobody-home", "ssh");
    let world = World::plan().forward(absent).start_without_waiting();
    world.hub.registry(&["add", "nobody-home"]);
    world.service.wait_until_ready();
    let clients: Vec<TcpStream> = (0..20).map(|_| connect(world.forward("absent"))).collect();
    let open = [("forward", "absent")];
    world.service.wait_for_metric("culvert_forward_flows", &open, |open| open == 20.0);
    // A socket that is closed with something unread in it resets its peer; this one says it itself.
    clients
        .iter()
        .for_each(|client| socket2::SockRef::from(client).set_linger(Some(std::time::Duration::ZERO)).unwrap());
    drop(clients);
    world.service.wait_for_metric("culvert_forward_flows", &open, |open| open == 0.0);
    let left = [("forward", "absent"), ("reason", "local_reset")];
    assert_eq!(world.service.metric("culvert_forward_flows_ended_total", &left), 20.0);
}

/// `culvert connect pump-17 TARGET` with both ends in hand.
fn connect_command(config: &std::path::Path, target: &str) -> Command {
    let mut command = culvert();
    command.args(["connect", DEVICE, target, "--config"]).arg(config);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

#[test]
fn the_targets_end_is_seen_by_whoever_reads_connects_output() {
    let brief = Server::start(|mut socket| socket.write_all(b"too many, come back later").unwrap());
    let mut world = World::plan().target("brief", brief.address()).start();
    let config = world.service.config().to_owned();
    for alone in [false, true] {
        if alone {
            world.service.stop();
        }
        let mut connect = connect_command(&config, "brief").spawn().unwrap();
        let input = connect.stdin.take().unwrap();
        let mut said = String::new();
        connect.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        assert_eq!(said, "too many, come back later", "alone: {alone}");
        drop(input);
        assert_eq!(connect.wait().unwrap().code(), Some(0), "alone: {alone}");
    }
}

#[test]
fn connect_ends_well_only_when_the_device_has_every_byte() {
    let ((target, hears), proxy) = (terse(), Proxy::start());
    let mut world = World::plan().target("terse", target.address()).service_settings(&behind(&proxy)).start();
    world.service.stop();
    proxy.pace(SLOW);
    let mut connect = connect_command(world.service.config(), "terse").spawn().unwrap();
    connect.stdin.take().unwrap().write_all(&Pattern::take_bytes(9, 2_000_000)).unwrap();
    assert_eq!(connect.wait().unwrap().code(), Some(0));
    assert_eq!(hears.recv().unwrap(), (2_000_000, true));

    // One that is interrupted in the middle says so at once, however full the line is.
    let mut connect = connect_command(world.service.config(), "terse").spawn().unwrap();
    let mut input = connect.stdin.take().unwrap();
    input.write_all(&Pattern::take_bytes(9, 400_000)).unwrap();
    assert!(Command::new("kill").args(["-INT", &connect.id().to_string()]).status().unwrap().success());
    connect.wait().unwrap();
    assert!(!hears.recv().unwrap().1, "cut, not ended");
    world.device.wait_for_metric("culvert_links", &[], |links| links == 0.0);
}
