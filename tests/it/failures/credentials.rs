//! Wrong keys, expired tokens, tickets used twice, identities that nobody or two machines have.

use std::{fs, process::Command, time::SystemTime};

use culvert::{
    auth::{key::decode_key, sas::sign},
    base::Name,
};

use crate::support::{
    Daemon, End, Forward, Hub, Process, Target, World, client::exchange, config::device_toml, daemon::culvert,
    eventually, port::free_address, process::output, run, targets, world::DEVICE,
};

/// A service token of the hub's `service` policy that expires so many seconds from now.
pub fn service_token(hub: &Hub, expires_in: i64) -> String {
    let text = fs::read_to_string(hub.scratch().join("hub/keys/service.primary")).unwrap();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let policy: Name = "service".parse().unwrap();
    let token =
        sign("localhost", &decode_key(text.trim()).unwrap(), now.saturating_add_signed(expires_in), Some(&policy));
    token.expose_str().unwrap().to_owned()
}

/// `curl` to the hub as a program that speaks the service API.
pub fn curl(hub: &Hub, token: &str) -> Command {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--include", "--noproxy", "*", "--http1.1"]);
    command.arg("--cacert").arg(hub.ca()).args(["--header", &format!("Authorization: {token}")]);
    command
}

fn initiate(hub: &Hub, token: &str, device: &str, stream: &str) -> String {
    let url = format!("https://localhost:{}/twins/{device}/streams/{stream}?api-version=2018-10-20-preview", hub.port);
    let mut command = curl(hub, token);
    command.args(["--request", "POST", "--header", "Content-Length: 0"]);
    command.args(["--header", "iothub-streaming-connect-timeout-in-seconds: 1", &url]);
    run(&mut command)
}

fn header<'a>(answer: &'a str, name: &str) -> &'a str {
    let line = answer.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    });
    line.unwrap_or_else(|| panic!("no {name} in {answer}"))
}

fn with_wrong_key(connection: &str) -> String {
    let (head, key) = connection.trim().rsplit_once("SharedAccessKey=").unwrap();
    let other = if key.starts_with('A') { 'B' } else { 'A' };
    format!("{head}SharedAccessKey={other}{}", &key[1..])
}

#[test]
fn a_device_with_a_wrong_key() {
    let hub = Hub::start();
    let config = hub.device_files(DEVICE, "", &[]);
    let file = config.with_file_name("device.connection");
    fs::write(&file, with_wrong_key(&fs::read_to_string(&file).unwrap())).unwrap();
    let mut device = Daemon::start("device", &config);
    device.wait_for_line(&["WARN", "no control session with the hub", "not accept"]);
    assert_eq!(device.page("/readyz").status, 503);
    hub.daemon.wait_for_line(&["WARN", "device refused", "the token of pump-17 is not accepted"]);
    hub.daemon
        .wait_for_metric("culvert_hub_control_sessions_total", &[("result", "unauthorized")], |count| count >= 1.0);
    assert_eq!(device.metric("culvert_device_hub_connected", &[]), 0.0);
    assert!(device.process().is_running(), "a daemon does not end for what its operator can mend at the hub");
}

#[test]
fn a_service_with_a_wrong_key() {
    let hub = Hub::start();
    let forward = Forward::new("echo", free_address(), DEVICE, "echo");
    let config = hub.service_files("service", "", &[forward]);
    let file = config.with_file_name("service.connection");
    fs::write(&file, with_wrong_key(&hub.service_connection())).unwrap();
    let service = Daemon::start("service", &config);
    service.wait_for_line(&["WARN", "no device stream", "the hub does not accept our credential for policy service"]);
    eventually("the reason on /readyz", || {
        let page = service.page("/readyz");
        (page.status == 503 && page.body.contains("credential for policy service")).then_some(())
    });
    assert_eq!(service.metric("culvert_service_hub_usable", &[]), 0.0);
    hub.daemon.wait_for_metric("culvert_hub_http_requests_total", &[("code", "401")], |count| count >= 1.0);
    let mut show = culvert();
    show.args(["registry", "list", "--connection-string-file"]).arg(&file).arg("--ca-file").arg(hub.ca());
    let told = output(&mut show);
    assert_eq!(told.status.code(), Some(69));
    assert!(String::from_utf8_lossy(&told.stderr).contains("401"), "{told:?}");
}

#[test]
fn an_expired_token() {
    let echo = targets::echo();
    let world = World::plan().target("echo", echo.address()).start();
    assert!(initiate(&world.hub, &service_token(&world.hub, 60), DEVICE, "echo").starts_with("HTTP/1.1 200"));
    let answer = initiate(&world.hub, &service_token(&world.hub, -3600), DEVICE, "echo");
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    assert_eq!(header(&answer, "iothub-errorcode"), "IotHubUnauthorizedAccess");
    assert!(answer.contains("expired"), "{answer}");
    world.hub.daemon.wait_for_metric("culvert_hub_http_requests_total", &[("code", "401")], |count| count == 1.0);
}

#[test]
fn a_ticket_that_is_used_twice() {
    let echo = targets::echo();
    let world = World::plan().target("echo", echo.address()).start();
    let answer = initiate(&world.hub, &service_token(&world.hub, 60), DEVICE, "echo");
    assert_eq!(header(&answer, "iothub-streaming-is-accepted"), "True");
    let url = header(&answer, "iothub-streaming-url").replacen("wss:", "https:", 1);
    let upgrade = || {
        let mut command = curl(&world.hub, &format!("Bearer {}", header(&answer, "iothub-streaming-auth-token")));
        command.args(["--no-buffer", "--header", "Connection: Upgrade", "--header", "Upgrade: websocket"]);
        command.args([
            "--header",
            "Sec-WebSocket-Version: 13",
            "--header",
            "Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==",
            &url,
        ]);
        command
    };
    let _first = Process::start("the first use", &mut upgrade());
    world.hub.daemon.wait_for_metric("culvert_hub_bridges_open", &[], |open| open == 2.0);
    let second = run(&mut upgrade());
    assert!(second.starts_with("HTTP/1.1 401"), "{second}");
    // Whoever was there first is not disturbed.
    assert_eq!(world.hub.daemon.metric("culvert_hub_bridges_open", &[]), 2.0);
}

#[test]
fn a_device_that_rejects() {
    let world = World::plan().target("echo", targets::nobody()).start();
    let answer = initiate(&world.hub, &service_token(&world.hub, 60), DEVICE, "nonsense");
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(header(&answer, "iothub-streaming-is-accepted"), "False");
    world.device.wait_for_line(&["WARN", "device stream rejected", "nonsense"]);
    world.hub.daemon.wait_for_metric("culvert_hub_initiations_total", &[("result", "rejected")], |count| count == 1.0);
}

#[test]
fn a_device_that_nobody_registered_and_one_that_is_offline() {
    let (unknown, offline) = (free_address(), free_address());
    let echo = targets::echo();
    let plan = World::plan().target("echo", echo.address());
    let plan = plan.forward(Forward::new("unknown", &unknown, "pump-99", "echo"));
    let plan = plan.forward(Forward::new("offline", &offline, "pump-18", "echo").with("connect_timeout = \"2s\""));
    let world = plan.start_without_waiting();
    world.hub.registry(&["add", "pump-18"]);
    world.service.wait_for_line(&["WARN", "device=pump-99", "the hub knows no device pump-99"]);
    assert_eq!(exchange(&unknown, b"x").1, End::Reset);
    assert_eq!(exchange(&offline, b"x").1, End::Reset);
    for forward in ["unknown", "offline"] {
        let labels = [("forward", forward), ("reason", "unavailable")];
        world.service.wait_for_metric("culvert_forward_flows_ended_total", &labels, |ended| ended >= 1.0);
    }
    let unknown = initiate(&world.hub, &service_token(&world.hub, 60), "pump-99", "echo");
    assert!(unknown.starts_with("HTTP/1.1 404") && unknown.contains("404001"), "{unknown}");
    let offline = initiate(&world.hub, &service_token(&world.hub, 60), "pump-18", "echo");
    assert!(offline.starts_with("HTTP/1.1 404") && offline.contains("404103"), "{offline}");
    let mut connect = culvert();
    connect.args(["connect", "pump-99", "echo", "--config"]).arg(world.service.config());
    let told = output(&mut connect);
    assert_eq!(told.status.code(), Some(69));
    assert!(String::from_utf8_lossy(&told.stderr).contains("pump-99"), "{told:?}");
    // Nobody else is bothered.
    world.wait_until_usable();
    eventually("the good forward", || (exchange(world.forward("echo"), b"hello").0 == b"hello").then_some(()));
}

#[test]
fn two_machines_with_one_identity() {
    let echo = targets::echo();
    let world = World::plan().target("echo", echo.address()).start();
    let twin = world.hub.scratch().join("twin");
    let connection = world.hub.registry(&["show", DEVICE, "--connection-string"]);
    world.hub.scratch().write_secret(twin.join("device.connection"), connection);
    let text = device_toml(&twin, &world.hub.ca(), "", &[Target::new("echo", echo.address())]);
    let second = Daemon::start("device", &world.hub.scratch().write(twin.join("device.toml"), text));
    second.wait_until_ready();
    world.device.wait_for_line(&["WARN", "another connection with this device's identity took over"]);
    world.hub.daemon.wait_for_line(&["control session ended", "taken over"]);
    world
        .hub
        .daemon
        .wait_for_metric("culvert_hub_control_sessions_total", &[("result", "taken_over")], |count| count == 1.0);
    // The device stream was admitted before; it is not touched.
    assert_eq!(exchange(world.forward("echo"), b"hello"), (b"hello".to_vec(), End::Clean));
    assert_eq!(world.hub.daemon.metric("culvert_hub_device_sessions", &[]), 1.0);
}
