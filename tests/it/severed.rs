//! A carrier that is lost in the middle of something: connections go on where they stopped, or are reset.

use std::io::{Read as _, Write as _};

use crate::support::{
    End, Forward, Proxy, World,
    bytes::Pattern,
    client::{exchange, read_to_end},
    connect,
    port::free_address,
    targets,
    world::DEVICE,
};

fn settings(proxy: &Proxy, more: &str) -> String {
    format!("proxy = \"http://{}\"\n{more}", proxy.address())
}

#[test]
fn a_daemon_goes_through_a_proxy_with_credentials() {
    let (echo, proxy) = (targets::echo(), Proxy::with_credentials("cGF1bDpwYXNz"));
    let folder = crate::support::Scratch::new();
    let password = folder.write_secret("proxy.password", "pass\n");
    let line =
        format!("proxy = \"http://paul@{}\"\nproxy_password_file = \"{}\"\n", proxy.address(), password.display());
    let world = World::plan().target("echo", echo.address()).device_settings(&line).start();
    assert_eq!(exchange(world.forward("echo"), b"hello"), (b"hello".to_vec(), End::Clean));
    assert!(proxy.served() >= 2, "control session and device stream");
}

#[test]
fn a_lost_device_stream_is_a_reset_if_nothing_may_be_resumed() {
    let (echo, proxy) = (targets::echo(), Proxy::start());
    let plan =
        World::plan().target("echo", echo.address()).service_settings(&settings(&proxy, "resume_for = \"0s\"\n"));
    let world = plan.start();
    let mut client = connect(world.forward("echo"));
    client.write_all(b"hello").unwrap();
    client.read_exact(&mut [0; 5]).unwrap();
    proxy.cut();
    assert_eq!(read_to_end(&mut client), (Vec::new(), End::Reset));
    let lost = [("reason", "session_lost")];
    world.service.wait_for_metric("culvert_forward_flows_ended_total", &lost, |ended| ended == 1.0);
    world.device.wait_for_metric("culvert_target_flows_ended_total", &lost, |ended| ended == 1.0);
    // The next device stream comes by itself.
    world.service.wait_for_metric("culvert_service_device_streams_opened_total", &[], |opened| opened >= 2.0);
    assert_eq!(exchange(world.forward("echo"), b"again"), (b"again".to_vec(), End::Clean));
}

#[test]
fn connections_outlive_lost_carriers_with_every_byte() {
    let (echo, near, far) = (targets::echo(), Proxy::start(), Proxy::start());
    let plan = World::plan().target("echo", echo.address());
    let plan = plan.service_settings(&settings(&near, "")).device_settings(&settings(&far, ""));
    let world = plan.start();
    let sent = Pattern::take_bytes(5, 24 << 20);
    let mut client = connect(world.forward("echo"));
    let mut sender = client.try_clone().unwrap();
    let copy = sent.clone();
    let sending = std::thread::spawn(move || sender.write_all(&copy).unwrap());
    let mut received = vec![0; sent.len()];
    // A cut at each quarter, in turn at either end; each has to heal before the next, or it would be one cut.
    for (round, part) in received.chunks_mut(sent.len() / 4).enumerate() {
        client.read_exact(part).unwrap();
        if round < 3 {
            let resumes = world.service.metric("culvert_link_resumes_total", &[]);
            [&near, &far][round % 2].cut();
            world.service.wait_for_metric("culvert_link_resumes_total", &[], |count| count > resumes);
        }
    }
    sending.join().unwrap();
    assert!(received == sent, "bytes were lost, doubled or changed");
    assert_eq!(world.service.metric("culvert_forward_flows_ended_total", &[("reason", "session_lost")]), 0.0);
}

#[test]
fn connections_wait_for_a_hub_that_is_stopped_and_started_again() {
    let echo = targets::echo();
    let mut world = World::plan().target("echo", echo.address()).start();
    let mut client = connect(world.forward("echo"));
    let mut greet = |word: &[u8; 5]| {
        client.write_all(word).unwrap();
        let mut answer = [0; 5];
        client.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, word);
    };
    greet(b"one..");
    assert_eq!(world.hub.daemon.stop(), Some(0));
    world.service.wait_for_metric("culvert_links_attached", &[], |attached| attached == 0.0);
    world.hub.daemon.start_again();
    greet(b"two..");
    world.wait_until_usable();
    // And one that did not say goodbye.
    world.hub.daemon.kill();
    world.hub.daemon.start_again();
    greet(b"three");
    assert_eq!(world.service.metric("culvert_link_sessions_lost_total", &[]), 0.0);
}

#[test]
fn a_new_connection_waits_for_a_lost_link_only_as_long_as_it_may() {
    let (echo, proxy) = (targets::echo(), Proxy::start());
    let impatient = Forward::new("impatient", free_address(), DEVICE, "echo").with("connect_timeout = \"2s\"");
    let plan = World::plan().target("echo", echo.address()).forward(impatient);
    let world = plan.service_settings(&settings(&proxy, "")).start();
    let mut old = connect(world.forward("echo"));
    let mut greet = |word: &[u8; 5]| {
        old.write_all(word).unwrap();
        let mut answer = [0; 5];
        old.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, word);
    };
    greet(b"one..");
    proxy.refuse(true);
    world.service.wait_for_metric("culvert_links_attached", &[], |attached| attached == 0.0);
    assert_eq!(read_to_end(&mut connect(world.forward("impatient"))), (Vec::new(), End::Reset));
    let why = "no answer from pump-17 within 2 s (device stream: detached; ";
    world.service.wait_for_line(&["WARN", "impatient", "unavailable", why]);
    proxy.refuse(false);
    greet(b"two..");
}

#[test]
fn a_link_that_nobody_resumes_ends_with_a_reset() {
    let (echo, proxy) = (targets::echo(), Proxy::start());
    let plan =
        World::plan().target("echo", echo.address()).service_settings(&settings(&proxy, "resume_for = \"2s\"\n"));
    let world = plan.start();
    let mut client = connect(world.forward("echo"));
    client.write_all(b"hello").unwrap();
    client.read_exact(&mut [0; 5]).unwrap();
    proxy.refuse(true);
    assert_eq!(read_to_end(&mut client), (Vec::new(), End::Reset));
    world.service.wait_for_line(&["INFO", "cannot resume yet: "]);
    world.service.wait_for_line(&["WARN", "link ended: its flows are reset"]);
    world
        .service
        .wait_for_metric("culvert_forward_flows_ended_total", &[("reason", "session_lost")], |ended| ended == 1.0);
    proxy.refuse(false);
    world.service.wait_for_metric("culvert_service_device_streams_opened_total", &[], |opened| opened >= 2.0);
    assert_eq!(exchange(world.forward("echo"), b"again"), (b"again".to_vec(), End::Clean));
}
