//! What a TCP connection means through the tunnel: bytes, half-close, resets, limits.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, TcpStream},
};

use crate::support::{
    End, Forward, Target, World,
    bytes::Pattern,
    client::{exchange, read_to_end},
    connect,
    port::free_port,
    process::run,
    targets::{self, Server, read_line},
    world::DEVICE,
};

#[test]
fn bytes_arrive_as_they_were_sent() {
    let echo = targets::echo();
    let world = World::plan().target("echo", echo.address()).start();
    let sent = Pattern::take_bytes(1, 8 << 20);
    let (received, end) = exchange(world.forward("echo"), &sent);
    assert_eq!(end, End::Clean);
    assert!(received == sent, "{} of {} bytes, or others", received.len(), sent.len());
    world.service.wait_for_metric("culvert_forward_flows_ended_total", &[("reason", "done")], |ended| ended == 1.0);
    world.device.wait_for_metric("culvert_target_flows_ended_total", &[("reason", "done")], |ended| ended == 1.0);
    let carried = world.service.metric("culvert_forward_bytes_total", &[("direction", "sent")]);
    assert_eq!(carried, sent.len() as f64);
}

#[test]
fn a_client_may_end_its_direction_first() {
    let counter = targets::counter();
    let world = World::plan().target("counter", counter.address()).start();
    // The answer is written only after the client's end was seen at the far side.
    let (answer, end) = exchange(world.forward("counter"), &Pattern::take_bytes(2, 3_000_000));
    assert_eq!((String::from_utf8_lossy(&answer).as_ref(), end), ("3000000", End::Clean));
}

#[test]
fn a_server_may_end_its_direction_first() {
    let (told, hears) = std::sync::mpsc::channel();
    let told = std::sync::Mutex::new(told);
    let server = Server::start(move |mut socket| {
        socket.write_all(b"that is all").unwrap();
        socket.shutdown(Shutdown::Write).unwrap();
        told.lock().unwrap().send(read_to_end(&mut socket)).unwrap();
    });
    let world = World::plan().target("brief", server.address()).start();
    let mut client = connect(world.forward("brief"));
    assert_eq!(read_to_end(&mut client), (b"that is all".to_vec(), End::Clean));
    let sent = Pattern::take_bytes(3, 2 << 20);
    client.write_all(&sent).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    let (received, end) = hears.recv().unwrap();
    assert_eq!(end, End::Clean);
    assert!(received == sent, "{} of {} bytes, or others", received.len(), sent.len());
}

#[test]
fn a_refused_target_is_a_reset_with_a_reason() {
    let world = World::plan().target("gone", targets::nobody()).start();
    assert_eq!(read_to_end(&mut connect(world.forward("gone"))), (Vec::new(), End::Reset));
    world.service.wait_for_line(&["WARN", "forward=gone", "reason=\"refused\""]);
    world.device.wait_for_line(&["WARN", "target gone at", "refused"]);
    world.service.wait_for_metric("culvert_forward_flows_ended_total", &[("reason", "refused")], |ended| ended == 1.0);
}

#[test]
fn a_reset_of_the_target_is_a_reset_at_the_client() {
    let server = Server::start(|mut socket| {
        socket.write_all(b"half a sen").unwrap();
        read_line(&mut socket);
        socket2::SockRef::from(&socket).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    });
    let world = World::plan().target("rude", server.address()).start();
    let mut client = connect(world.forward("rude"));
    client.read_exact(&mut [0; 10]).unwrap();
    client.write_all(b"\n").unwrap();
    assert_eq!(read_to_end(&mut client), (Vec::new(), End::Reset));
    world
        .service
        .wait_for_metric("culvert_forward_flows_ended_total", &[("reason", "peer_reset")], |ended| ended == 1.0);
}

#[test]
fn a_reset_of_the_client_is_a_reset_at_the_target() {
    let (told, hears) = std::sync::mpsc::channel();
    let told = std::sync::Mutex::new(told);
    let server = Server::start(move |mut socket| told.lock().unwrap().send(read_to_end(&mut socket)).unwrap());
    let world = World::plan().target("sink", server.address()).start();
    let mut client = connect(world.forward("sink"));
    client.write_all(b"half a sen").unwrap();
    world.device.wait_for_metric("culvert_target_bytes_total", &[], |bytes| bytes == 10.0);
    socket2::SockRef::from(&client).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    drop(client);
    assert_eq!(hears.recv().unwrap().1, End::Reset);
}

#[test]
fn unix_sockets_and_ipv6_at_both_ends() {
    let folder = crate::support::Scratch::new();
    let (far, near) = (folder.join("far.sock"), folder.join("near.sock"));
    targets::echo_unix(&far);
    let six = Server::start_at("[::1]:0", targets::echo_tcp);
    let listen = format!("[::1]:{}", free_port());
    let world = World::plan()
        .target_as(Target::new("unix", format!("unix:{}", far.display())))
        .target("six", six.address())
        .forward(Forward::new("unix-to-six", format!("unix:{}", near.display()), DEVICE, "six"))
        .forward(Forward::new("six-to-unix", &listen, DEVICE, "unix"))
        .start();
    assert_eq!(exchange(&listen, b"hello"), (b"hello".to_vec(), End::Clean));
    let mut socket = std::os::unix::net::UnixStream::connect(&near).unwrap();
    socket.write_all(b"hello").unwrap();
    socket.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "hello");
    drop(world);
}

#[test]
fn a_plain_forward_needs_no_mux() {
    let echo = targets::echo();
    let forward = Forward::new("echo", crate::support::port::free_address(), DEVICE, "echo").with("mode = \"plain\"");
    let world = World::plan().target("echo", echo.address()).forward(forward).start();
    let mut client = connect(world.forward("echo"));
    let sent = Pattern::take_bytes(4, 1 << 20);
    let mut sender = client.try_clone().unwrap();
    let copy = sent.clone();
    let sending = std::thread::spawn(move || sender.write_all(&copy).unwrap());
    let mut received = vec![0; sent.len()];
    client.read_exact(&mut received).unwrap();
    sending.join().unwrap();
    assert!(received == sent);
    assert_eq!(world.service.metric("culvert_service_device_streams", &[]), 0.0);
    assert_eq!(world.hub.daemon.metric("culvert_hub_bridges_open", &[]), 1.0);
}

#[test]
fn an_on_demand_device_stream_opens_with_the_first_connection() {
    let echo = targets::echo();
    let forward =
        Forward::new("echo", crate::support::port::free_address(), DEVICE, "echo").with("connect = \"on-demand\"");
    let world = World::plan().target("echo", echo.address()).forward(forward).start();
    assert_eq!(world.hub.daemon.metric("culvert_hub_bridges_open", &[]), 0.0);
    assert_eq!(exchange(world.forward("echo"), b"hello"), (b"hello".to_vec(), End::Clean));
    assert_eq!(world.hub.daemon.metric("culvert_hub_bridges_open", &[]), 1.0);
}

#[test]
fn a_forward_carries_only_as_many_connections_as_it_may() {
    let echo = targets::echo();
    let forward =
        Forward::new("echo", crate::support::port::free_address(), DEVICE, "echo").with("max_connections = 2");
    let world = World::plan().target("echo", echo.address()).forward(forward).start();
    let greet = || {
        let mut client = connect(world.forward("echo"));
        client.write_all(b"x").unwrap();
        client.read_exact(&mut [0; 1]).unwrap();
        client
    };
    let two: [TcpStream; 2] = [greet(), greet()];
    assert_eq!(read_to_end(&mut connect(world.forward("echo"))).1, End::Reset);
    world.service.wait_for_metric("culvert_forward_flows_ended_total", &[("reason", "limit")], |ended| ended == 1.0);
    drop(two);
    world.service.wait_for_metric("culvert_forward_flows", &[("forward", "echo")], |open| open == 0.0);
    greet();
}

#[test]
fn connect_joins_standard_input_and_output() {
    let counter = targets::counter();
    let world = World::plan().target("counter", counter.address()).start();
    let config = world.service.config().to_owned();
    let through_daemon = piped(&config, "12345");
    assert_eq!(through_daemon, "5");
    world.service.wait_for_line(&["culvert connect joined"]);
    world.service.wait_for_line(&["culvert connect ended", "sent=5", "received=1"]);
    // Without the daemon: a device stream of its own.
    let mut world = world;
    world.service.stop();
    assert_eq!(piped(&config, "1234567"), "7");
}

/// `printf TEXT | culvert connect pump-17 counter`
fn piped(config: &std::path::Path, text: &str) -> String {
    let line = format!(
        "printf {text} | {} connect {DEVICE} counter --config {}",
        crate::support::daemon::CULVERT,
        config.display()
    );
    run(std::process::Command::new("sh").args(["-c", &line]))
}
