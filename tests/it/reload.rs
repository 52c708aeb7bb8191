//! Configuration that changes while connections run.

use std::{
    fs,
    io::{ErrorKind, Read as _, Write as _},
    net::TcpStream,
    os::unix::fs::symlink,
    path::Path,
    process::Command,
    time::Instant,
};

use crate::{
    programs::{
        nginx::Nginx,
        sshd::{Session, Sshd},
    },
    support::{
        Daemon, End, Forward, Process, Proxy, Target, World, bytes, client::exchange, config::service_toml, connect,
        daemon::culvert, eventually, port::free_address, process::output, run, targets, world::DEVICE,
    },
};

const RELOADED: &str = "culvert_config_last_reload_successful";

/// How a person or a program replaces a file.
#[derive(Debug, Clone, Copy)]
enum Way {
    InPlace,
    Rename,
    HangUp,
}

impl Way {
    fn write(self, daemon: &Daemon, text: &str) {
        let path = daemon.config();
        match self {
            Self::InPlace => fs::write(path, text).unwrap(),
            Self::Rename => {
                let beside = path.with_extension("toml.new");
                fs::write(&beside, text).unwrap();
                fs::rename(beside, path).unwrap();
            }
            Self::HangUp => {
                fs::write(path, text).unwrap();
                daemon.hang_up();
            }
        }
    }
}

/// Waits until the forward at `address` works; prints how long it took.
#[track_caller]
fn wait_for_echo(what: &str, address: &str) {
    let begun = Instant::now();
    eventually(what, || {
        let mut socket = TcpStream::connect(address).ok()?;
        socket.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
        socket.write_all(b"x").ok()?;
        socket.read_exact(&mut [0; 1]).ok()
    });
    println!("{what}: after {} ms", begun.elapsed().as_millis());
}

#[track_caller]
fn wait_until_closed(what: &str, address: &str) {
    let begun = Instant::now();
    eventually(what, || TcpStream::connect(address).err().filter(|error| error.kind() == ErrorKind::ConnectionRefused));
    println!("{what}: after {} ms", begun.elapsed().as_millis());
}

#[track_caller]
fn greet(client: &mut TcpStream) {
    client.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello");
}

#[test]
fn rules_come_and_go_in_every_way_and_nobody_else_notices() {
    let (sshd, nginx, echo) = (Sshd::start(), Nginx::start(), targets::echo());
    bytes::write_file(&nginx.file("large"), 3, 192 << 20);
    let plan = World::plan().target("ssh", sshd.address()).target("web", nginx.address());
    let world = plan.target("echo", echo.address()).start();
    let mut session = Session::open(&sshd, &world.port("ssh"));
    assert_eq!(session.ask("expr 1 + 1"), "2");
    let (url, near) = (format!("http://{}/large", world.forward("web")), world.hub.scratch().join("near"));
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--fail", "--noproxy", "*", "--limit-rate", "24M", "--output"]);
    let mut download = Process::start("curl", command.arg(&near).arg(url));
    let before = fs::read_to_string(world.service.config()).unwrap();
    for way in [Way::InPlace, Way::Rename, Way::HangUp] {
        let listen = free_address();
        let added = Forward::new("added", &listen, DEVICE, "echo").text();
        way.write(&world.service, &format!("{before}{added}"));
        wait_for_echo(&format!("a rule added by {way:?} works"), &listen);
        let mut held = connect(&listen);
        greet(&mut held);
        way.write(&world.service, &before);
        wait_until_closed(&format!("a rule removed by {way:?} is closed"), &listen);
        greet(&mut held);
        assert_eq!(session.ask("expr 6 '*' 7"), "42");
    }
    let beside = world.hub.scratch().join("service/forwards.d/more.toml");
    let listen = free_address();
    fs::create_dir_all(beside.parent().unwrap()).unwrap();
    fs::write(&beside, Forward::new("more", &listen, DEVICE, "echo").text()).unwrap();
    wait_for_echo("a rule in forwards.d works", &listen);
    fs::remove_file(&beside).unwrap();
    wait_until_closed("a rule removed from forwards.d is closed", &listen);
    assert_eq!(session.exit(0), Some(0));
    assert_eq!(download.wait(), Some(0));
    assert_eq!(bytes::sha256_of(&near), bytes::sha256_of(&nginx.file("large")));
    assert_eq!(world.service.metric("culvert_service_device_streams_opened_total", &[]), 1.0);
}

#[test]
fn a_config_map_changes_by_a_swapped_link() {
    let echo = targets::echo();
    let world = World::plan().target("echo", echo.address()).start();
    let (first, second) = (free_address(), free_address());
    let folder = world.hub.scratch().join("mounted");
    let text = |listen: &str| {
        let forward = Forward::new("echo", listen, DEVICE, "echo");
        service_toml(&folder, &world.hub.ca(), "", &[forward])
    };
    let version = |name: &str, text: String| {
        world.hub.scratch().write(folder.join(name).join("service.toml"), text);
        world.hub.scratch().write_secret(folder.join(name).join("service.connection"), world.hub.service_connection());
    };
    version("..first", text(&first));
    symlink("..first", folder.join("..data")).unwrap();
    for file in ["service.toml", "service.connection"] {
        symlink(Path::new("..data").join(file), folder.join(file)).unwrap();
    }
    let service = Daemon::start("service", &folder.join("service.toml"));
    wait_for_echo("the first version works", &first);
    version("..second", text(&second));
    symlink("..second", folder.join("..data_tmp")).unwrap();
    fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
    fs::remove_dir_all(folder.join("..first")).unwrap();
    wait_for_echo("the second version works", &second);
    wait_until_closed("the first version is gone", &first);
    assert_eq!(service.metric(RELOADED, &[]), 1.0);
}

#[test]
fn a_file_with_a_mistake_changes_nothing() {
    let echo = targets::echo();
    let world = World::plan().target("echo", echo.address()).start();
    let mut held = connect(world.forward("echo"));
    greet(&mut held);
    for daemon in [&world.hub.daemon, &world.device, &world.service] {
        let good = fs::read_to_string(daemon.config()).unwrap();
        let name = daemon.config().file_name().unwrap().to_str().unwrap();
        let said = daemon.said();
        let bad = good.replacen("[log]", "[log]\nlevle = \"info\"", 1);
        let line = bad.lines().position(|line| line.starts_with("levle")).unwrap() + 1;
        fs::write(daemon.config(), bad).unwrap();
        daemon.wait_for_metric(RELOADED, &[], |value| value == 0.0);
        daemon.wait_for_line_after(said, &["ERROR", &format!("{name}:{line}: log.levle")]);
        greet(&mut held);
        fs::write(daemon.config(), good).unwrap();
        daemon.wait_for_metric(RELOADED, &[], |value| value == 1.0);
    }
    greet(&mut held);
    assert_eq!(exchange(world.forward("echo"), b"hello"), (b"hello".to_vec(), End::Clean));
}

#[test]
fn a_devices_targets_come_and_go() {
    let (echo, other) = (targets::echo(), targets::named("other"));
    let world = World::plan().target("echo", echo.address()).start();
    let mut held = connect(world.forward("echo"));
    greet(&mut held);
    // The service's rule may be there before the device's: its clients are told no, and then yes.
    let listen = free_address();
    let rule = Forward::new("later", &listen, DEVICE, "later").text();
    let text = fs::read_to_string(world.service.config()).unwrap();
    fs::write(world.service.config(), text + &rule).unwrap();
    world.service.wait_for_line(&["listening on", "forward=later"]);
    assert_eq!(exchange(&listen, b"x").1, End::Reset);
    world
        .service
        .wait_for_metric("culvert_forward_flows_ended_total", &[("reason", "unknown_target")], |ended| ended >= 1.0);
    let file = world.hub.scratch().join("pump-17/targets.d/later.toml");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, Target::new("later", echo.address()).text()).unwrap();
    wait_for_echo("an added target works", &listen);
    fs::write(&file, Target::new("later", other.address()).text()).unwrap();
    eventually("a changed target leads elsewhere", || exchange(&listen, b"").0.starts_with(b"other").then_some(()));
    fs::remove_file(&file).unwrap();
    eventually("a removed target is refused", || (exchange(&listen, b"x").1 == End::Reset).then_some(()));
    greet(&mut held);
}

#[test]
fn the_hub_takes_up_a_renewed_certificate_and_another_policy() {
    let echo = targets::echo();
    let world = World::plan().target("echo", echo.address()).start();
    let mut held = connect(world.forward("echo"));
    greet(&mut held);
    let serial = || {
        let line = format!(
            "openssl s_client -connect 127.0.0.1:{} -servername localhost </dev/null 2>/dev/null | openssl x509 -noout -serial",
            world.hub.port
        );
        run(Command::new("sh").args(["-c", &line]))
    };
    let old = serial();
    run(culvert().args(["hub", "init", "--renew", "--dir"]).arg(world.hub.scratch().join("hub")));
    eventually("the hub to show its new certificate", || (serial() != old).then_some(()));
    greet(&mut held);
    let hub = world.hub.scratch().join("hub");
    let key = fs::read(hub.join("keys/service.secondary")).unwrap();
    world.hub.scratch().write_secret("hub/keys/guest.primary", key);
    let text = fs::read_to_string(world.hub.daemon.config()).unwrap();
    let policy =
        "\n[[policy]]\nname = \"guest\"\nrights = [\"ServiceConnect\"]\nprimary_key_file = \"keys/guest.primary\"\n";
    let connection = world.hub.scratch().write_secret("guest.connection", world.hub.policy_connection("guest"));
    let mut show = culvert();
    show.args(["devicestream", "show", "--connection-string-file"])
        .arg(connection)
        .arg("--ca-file")
        .arg(world.hub.ca());
    assert_eq!(output(&mut show).status.code(), Some(69));
    fs::write(world.hub.daemon.config(), text.clone() + policy).unwrap();
    eventually("the new policy to be accepted", || output(&mut show).status.success().then_some(()));
    fs::write(world.hub.daemon.config(), text).unwrap();
    eventually("the removed policy to be refused", || (!output(&mut show).status.success()).then_some(()));
    greet(&mut held);
}

#[test]
fn a_device_stream_that_is_there_follows_the_changed_way_to_the_hub() {
    let (echo, proxy) = (targets::echo(), Proxy::start());
    let world = World::plan().target("echo", echo.address()).start();
    let mut held = connect(world.forward("echo"));
    greet(&mut held);
    let text = fs::read_to_string(world.service.config()).unwrap();
    fs::write(world.service.config(), format!("proxy = \"http://{}\"\n{text}", proxy.address())).unwrap();
    world.service.wait_for_metric("culvert_link_resumes_total", &[("reason", "replaced")], |count| count == 1.0);
    greet(&mut held);
    assert!(proxy.served() >= 2, "the trial, and the device stream");
    // Nothing runs over the former way any more.
    proxy.cut();
    greet(&mut held);
    assert!(world.service.metric("culvert_link_resumes_total", &[]) >= 2.0);
}

#[test]
fn a_device_takes_up_a_new_key_beside_the_old_one() {
    let echo = targets::echo();
    let world = World::plan().target("echo", echo.address()).start();
    let mut held = connect(world.forward("echo"));
    greet(&mut held);
    let file = world.hub.scratch().join("pump-17/device.connection");
    let good = world.hub.registry(&["rotate", DEVICE]);
    // First a wrong one: it is tried beside the session in use, which stays.
    let said = world.device.said();
    let wrong = good.replace("SharedAccessKey=", "SharedAccessKey=AAAA");
    fs::write(&file, wrong).unwrap();
    world.device.wait_for_line_after(said, &["WARN", "so the first stays in use"]);
    greet(&mut held);
    let (said, heard) = (world.hub.daemon.said(), world.device.said());
    fs::write(&file, good).unwrap();
    world.hub.daemon.wait_for_line_after(said, &["control session opened"]);
    world.device.wait_for_line_after(heard, &["the changed hub or credential works and is in use"]);
    greet(&mut held);
    assert_eq!(exchange(world.forward("echo"), b"hello"), (b"hello".to_vec(), End::Clean));
}
