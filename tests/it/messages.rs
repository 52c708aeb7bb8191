//! What goes wrong, and what people are told about it: at the place where they look, with the right exit code or
//! status, a metric, and nothing else disturbed.

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use culvert::{
    auth::{key::decode_key, sas},
    base::Secret,
};

use crate::support::{
    Daemon, Forward, Scratch, Target, World,
    client::read_to_end,
    connect,
    daemon::culvert,
    process::{output, run},
    targets,
    world::{DEVICE, Hub},
};

/// Unix time, for tokens.
fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

/// A token of the service policy that ends at `expiry`.
fn service_token(hub: &Hub, expiry: u64) -> String {
    let connection = hub.service_connection();
    let key = decode_key(connection.split("SharedAccessKey=").nth(1).unwrap()).unwrap();
    let token: Secret = sas::sign("localhost", &key, expiry, Some(&"service".parse().unwrap()));
    token.expose_str().unwrap().to_owned()
}

/// An HTTP request by curl: status, and head and body together.
fn curl(hub: &Hub, arguments: &[&str], path: &str) -> (u16, String) {
    let answer = run(Command::new("curl")
        .args(["--silent", "--include", "--max-time", "20", "--write-out", "\n%{http_code}", "--cacert"])
        .arg(hub.ca())
        .args(arguments)
        .arg(format!("https://localhost:{}{path}", hub.port)));
    let (text, status) = answer.rsplit_once('\n').unwrap();
    (status.parse().unwrap(), text.to_owned())
}

fn post_stream(hub: &Hub, device: &str, stream: &str, token: &str, more: &[&str]) -> (u16, String) {
    let authorization = format!("Authorization: {token}");
    let mut arguments = vec!["--request", "POST", "--header", &authorization, "--header", "Content-Length: 0"];
    arguments.extend(more);
    curl(hub, &arguments, &format!("/twins/{device}/streams/{stream}?api-version=2018-10-20-preview"))
}

/// The value of a header in what curl printed.
fn header<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let line = text.lines().find(|line| line.to_ascii_lowercase().starts_with(&format!("{name}:")))?;
    Some(line.split_once(':').unwrap().1.trim())
}

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn hub_alone() -> Hub {
    Hub::init(Scratch::new(), "")
}

/// Replaces the key in a connection string by another valid one.
fn with_wrong_key(connection: &str) -> String {
    let (head, _) = connection.split_once("SharedAccessKey=").unwrap();
    format!("{head}SharedAccessKey=QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE=")
}

#[test]
fn a_wrong_key_is_named_where_people_look() {
    let hub = hub_alone();
    let service = hub.service_files("service", "", &[]);
    hub.scratch().write_secret("service/service.connection", with_wrong_key(&hub.service_connection()));
    let service = Daemon::start("service", &service);
    let ready = crate::support::eventually("the service to say what is wrong", || {
        Some(service.page("/readyz")).filter(|page| page.body.contains("credential"))
    });
    assert_eq!(ready.status, 503);
    assert!(ready.body.contains("does not accept our credential for policy service"), "{}", ready.body);
    service.wait_for_metric("culvert_service_hub_usable", &[], |usable| usable == 0.0);

    let device = hub.device_files(DEVICE, "", &[]);
    let connection = fs::read_to_string(hub.scratch().join(format!("{DEVICE}/device.connection"))).unwrap();
    hub.scratch().write_secret(format!("{DEVICE}/device.connection"), with_wrong_key(&connection));
    let device = Daemon::start("device", &device);
    device.wait_for_line(&["WARN", "does not accept device pump-17", "not authorized", "clock"]);
    device.wait_for_metric("culvert_device_hub_connected", &[], |connected| connected == 0.0);

    let owner = fs::read_to_string(hub.scratch().join("hub/owner.connection")).unwrap();
    let wrong = hub.scratch().write_secret("wrong.connection", with_wrong_key(&owner));
    let listed = output(
        culvert().args(["registry", "list", "--connection-string-file"]).arg(wrong).arg("--ca-file").arg(hub.ca()),
    );
    assert_eq!(listed.status.code(), Some(69), "{}", said(&listed));
    assert!(said(&listed).contains("nauthorized"), "{}", said(&listed));
}

#[test]
fn an_expired_or_missing_token_is_a_401_with_a_code() {
    let hub = hub_alone();
    hub.registry(&["add", DEVICE]);
    let (status, text) = post_stream(&hub, DEVICE, "ssh", &service_token(&hub, now() - 3600), &[]);
    assert_eq!(status, 401, "{text}");
    assert!(text.contains("401002") || text.contains("401003"), "{text}");
    let (status, stranger) = curl(&hub, &["--request", "POST"], &format!("/twins/{DEVICE}/streams/ssh"));
    assert_eq!(status, 401, "{stranger}");
    let (status, _) = curl(&hub, &[], "/metrics");
    assert_eq!(status, 401, "strangers learn nothing, not even which paths there are");
}

#[test]
fn an_unknown_device_and_an_absent_one_are_told_apart() {
    let world = World::plan().target("echo", targets::echo().address()).start();
    let token = service_token(&world.hub, now() + 600);
    let (status, text) = post_stream(&world.hub, "nobody", "echo", &token, &[]);
    assert!(status == 404 && text.contains("404001"), "{text}");
    assert_eq!(header(&text, "iothub-errorcode"), Some("DeviceNotFound"));
    world.hub.registry(&["add", "absent"]);
    let at_once = ["--header", "iothub-streaming-connect-timeout-in-seconds: 0"];
    let (status, text) = post_stream(&world.hub, "absent", "echo", &token, &at_once);
    assert!(status == 404 && text.contains("404103") && text.contains("00:00:00"), "{text}");

    let joined = output(culvert().args(["connect", "nobody", "ssh", "--config"]).arg(world.service.config()));
    assert_eq!(joined.status.code(), Some(69));
    assert!(said(&joined).contains("the hub knows no device nobody"), "{}", said(&joined));
    let unknown = output(culvert().args(["connect", DEVICE, "nothing", "--config"]).arg(world.service.config()));
    assert_eq!(unknown.status.code(), Some(69));
    assert!(said(&unknown).contains("this device has no target \"nothing\""), "{}", said(&unknown));
    let logged = run(culvert().args(["logs", "--json", "--config"]).arg(world.hub.daemon.config()));
    assert!(logged.contains("nobody") && logged.contains("404"), "{logged}");
}

#[test]
fn a_device_that_rejects_says_why() {
    let world = World::plan().target("echo", targets::echo().address()).start();
    let token = service_token(&world.hub, now() + 600);
    let (status, text) = post_stream(&world.hub, DEVICE, "nothing", &token, &["--user-agent", "culvert-service/0"]);
    assert_eq!((status, header(&text, "iothub-streaming-is-accepted")), (200, Some("False")), "{text}");
    assert!(header(&text, "culvert-reason").is_some_and(|reason| reason.contains("no%20target")), "{text}");
    assert_eq!(header(&text, "iothub-streaming-url"), None);
    let (_, sdk) = post_stream(&world.hub, DEVICE, "nothing", &token, &["--user-agent", "azure-iothub/1.10.0"]);
    assert_eq!(header(&sdk, "culvert-reason"), None, "SDK programs get no headers of ours");
    world.device.wait_for_line(&["WARN", "device stream rejected", "no target"]);
    world.hub.daemon.wait_for_metric("culvert_hub_initiations_total", &[], |initiations| initiations >= 3.0);
}

#[test]
fn a_ticket_is_good_once() {
    let world = World::plan().target("echo", targets::echo().address()).start();
    let (status, text) = post_stream(&world.hub, DEVICE, "echo", &service_token(&world.hub, now() + 600), &[]);
    assert_eq!((status, header(&text, "iothub-streaming-is-accepted")), (200, Some("True")), "{text}");
    let url = header(&text, "iothub-streaming-url").unwrap().replace("wss://", "https://");
    let bearer = format!("Authorization: Bearer {}", header(&text, "iothub-streaming-auth-token").unwrap());
    let upgrade = || {
        let answer = output(
            Command::new("curl")
                .args(["--silent", "--http1.1", "--include", "--no-buffer", "--max-time", "2", "--cacert"])
                .arg(world.hub.ca())
                .args(["--header", "Connection: Upgrade", "--header", "Upgrade: websocket"])
                .args([
                    "--header",
                    "Sec-WebSocket-Version: 13",
                    "--header",
                    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
                ])
                .args(["--header", &bearer, &url]),
        );
        said(&answer)
    };
    let first = upgrade();
    assert!(first.starts_with("HTTP/1.1 101"), "{first}");
    let second = upgrade();
    assert!(second.starts_with("HTTP/1.1 401"), "{second}");
}

#[test]
fn a_target_that_is_not_allowed_is_a_reset_with_the_rules_name() {
    let echo = targets::echo();
    let only = Target::new("private", echo.address()).with("policies = [\"iothubowner\"]");
    let world = World::plan().target_as(only).target("open", echo.address()).start();
    let (bytes, end) = read_to_end(&mut connect(world.forward("private")));
    assert_eq!((bytes.len(), end), (0, crate::support::End::Reset));
    world.service.wait_for_line(&["WARN", "forward=private", "not_allowed"]);
    world.device.wait_for_line(&["WARN", "private", "not allowed for policy", "device.toml"]);
    world.device.wait_for_metric("culvert_target_flows_ended_total", &[("reason", "not_allowed")], |n| n == 1.0);
    assert_eq!(crate::support::client::exchange(world.forward("open"), b"still here").0, b"still here");
}

#[test]
fn a_taken_port_is_told_and_tried_again() {
    let echo = targets::echo();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let world = World::plan()
        .target("echo", echo.address())
        .forward(Forward::new("late", address, DEVICE, "echo"))
        .start_without_waiting();
    world.service.wait_for_line(&["WARN", "forward=late", "another program already does"]);
    let ready = world.service.page("/readyz");
    assert!(ready.status == 503 && ready.body.contains("forward late"), "{}", ready.body);
    assert_eq!(crate::support::client::exchange(world.forward("echo"), b"others run").0, b"others run");
    drop(taken);
    world.service.wait_for_metric("culvert_forward_listening", &[("forward", "late")], |listening| listening == 1.0);
    assert_eq!(crate::support::client::exchange(world.forward("late"), b"now").0, b"now");
}

/// `check` and the daemon itself refuse the file with 78, and name the line.
fn is_refused(config: &Path, words: &[&str]) {
    let config = config.to_str().unwrap();
    for arguments in [&["check", config][..], &["service", "--config", config]] {
        let refused = output(culvert().args(arguments));
        assert_eq!(refused.status.code(), Some(78), "{arguments:?}: {}", said(&refused));
        for word in words {
            assert!(said(&refused).contains(word), "{arguments:?} did not say {word:?}: {}", said(&refused));
        }
    }
}

#[test]
fn mistakes_in_a_file_are_named_by_file_and_line() {
    let hub = hub_alone();
    let file: PathBuf = hub.service_files("service", "", &[Forward::new("a", "127.0.0.1:1", DEVICE, "ssh")]);
    let good = fs::read_to_string(&file).unwrap();
    let broken = |text: String, words: &[&str]| {
        fs::write(&file, text).unwrap();
        is_refused(&file, words);
    };
    broken(format!("colour = \"red\"\n{good}"), &["service.toml:1:", "colour"]);
    broken(format!("{good}\n[[forward]\n"), &["service.toml:"]);
    broken(good.replace("service.connection", "missing.connection"), &["missing.connection"]);
    broken(good.replace("target = \"ssh\"", "target = \"culvert-x\""), &["service.toml:", "culvert-"]);
    fs::write(&file, &good).unwrap();
    run(culvert().arg("check").arg(&file));
    let usage = output(culvert().args(["connect"]));
    assert_eq!(usage.status.code(), Some(64));
}

#[test]
fn a_wrong_clock_is_named() {
    let hub = hub_alone();
    let service = hub.service_files("service", "", &[]);
    // Two hours behind: each token has expired an hour before it is signed.
    let mut faked = Command::new("faketime");
    faked.args(["-f", "-2h", crate::support::daemon::CULVERT, "service", "--config"]).arg(&service);
    let process = crate::support::Process::start("a service two hours behind", &mut faked);
    let line = process.wait_for_line(&["serving /metrics"]);
    let address = line.split("address=").nth(1).unwrap().split([' ', '"']).find(|word| !word.is_empty()).unwrap();
    let address = address.parse().unwrap();
    let ready = crate::support::eventually("the service to name the clock", || {
        crate::support::metrics::fetch(address, "/readyz").filter(|page| page.body.contains("clock"))
    });
    assert!(ready.body.contains("behind"), "{}", ready.body);
}

#[test]
fn a_certificate_that_is_not_trusted_is_explained() {
    let (hub, other) = (hub_alone(), hub_alone());
    let service = hub.service_files("service", "", &[]);
    fs::write(
        &service,
        fs::read_to_string(&service).unwrap().replace(hub.ca().to_str().unwrap(), other.ca().to_str().unwrap()),
    )
    .unwrap();
    let service = Daemon::start("service", &service);
    let ready = crate::support::eventually("the service to explain", || {
        Some(service.page("/readyz")).filter(|page| page.body.contains("ca_file") || page.body.contains("issuer"))
    });
    assert_eq!(ready.status, 503, "{}", ready.body);
}

#[test]
fn a_hub_that_stops_and_comes_back_costs_waiting_and_nothing_else() {
    let echo = targets::echo();
    let mut world = World::plan().target("echo", echo.address()).start();
    let mut open = connect(world.forward("echo"));
    std::io::Write::write_all(&mut open, b"before ").unwrap();
    assert_eq!(world.hub.daemon.stop(), Some(0));
    world.device.wait_for_metric("culvert_device_hub_connected", &[], |connected| connected == 0.0);
    assert_eq!(world.device.page("/readyz").status, 503);
    world.service.wait_for_metric("culvert_links_attached", &[], |attached| attached == 0.0);
    world.hub.daemon.start_again();
    std::io::Write::write_all(&mut open, b"after").unwrap();
    open.shutdown(std::net::Shutdown::Write).unwrap();
    let (bytes, end) = read_to_end(&mut open);
    assert_eq!((String::from_utf8_lossy(&bytes).as_ref(), end), ("before after", crate::support::End::Clean));
    world.device.wait_until_ready();
    world.service.wait_for_metric("culvert_link_resumes_total", &[], |resumes| resumes >= 1.0);
}

#[test]
fn two_machines_with_one_identity_are_named() {
    let world = World::plan().target("echo", targets::echo().address()).start();
    let folder = world.hub.scratch().join("twin");
    fs::create_dir_all(&folder).unwrap();
    let original = world.hub.scratch().join(DEVICE);
    fs::copy(original.join("device.connection"), folder.join("device.connection")).unwrap();
    let text = fs::read_to_string(world.device.config()).unwrap();
    let text = text.replace(original.to_str().unwrap(), folder.to_str().unwrap());
    let twin = world.hub.scratch().write("twin/device.toml", text);
    let twin = Daemon::start("device", &twin);
    twin.wait_until_ready();
    world.device.wait_for_line(&["WARN", "took over", "same connection string"]);
    world.hub.daemon.wait_for_line(&["WARN", DEVICE, "older=127.0.0.1:", "newer=127.0.0.1:", "share one identity"]);
}
