//! HTTP through the tunnel: nginx at the far side, curl and wrk at this one.

use std::process::Command;

use crate::{
    programs::nginx::Nginx,
    support::{World, bytes, run},
};

const GIBIBYTE: u64 = 1 << 30;

fn curl() -> Command {
    let mut command = Command::new("curl");
    command.args(["--silent", "--show-error", "--fail", "--noproxy", "*"]);
    command
}

#[test]
fn curl_keeps_a_connection_alive() {
    let nginx = Nginx::start();
    let world = World::plan().target("web", nginx.address()).start();
    let url = format!("http://{}/hello.txt", world.forward("web"));
    let told = run(curl().args(["--write-out", "connects=%{num_connects}\n", &url, &url, &url]));
    assert_eq!(told.matches("hello from the far side").count(), 3, "{told}");
    assert_eq!(told.matches("connects=1").count(), 1, "{told}");
    assert_eq!(told.matches("connects=0").count(), 2, "{told}");
}

#[test]
fn heavy_a_gibibyte_down_and_up() {
    let nginx = Nginx::start();
    let world = World::plan().target("web", nginx.address()).start();
    bytes::write_file(&nginx.file("large"), 2, GIBIBYTE);
    let wanted = bytes::sha256_of(&nginx.file("large"));
    let (near, url) = (world.hub.scratch().join("near"), format!("http://{}", world.forward("web")));
    run(curl().arg("--output").arg(&near).arg(format!("{url}/large")));
    assert_eq!(bytes::sha256_of(&near), wanted, "downloaded");
    run(curl().arg("--upload-file").arg(&near).arg(format!("{url}/stored")));
    assert_eq!(bytes::sha256_of(&nginx.file("stored")), wanted, "uploaded");
}

#[test]
fn heavy_two_hundred_connections_without_a_failed_request() {
    let nginx = Nginx::start();
    let world = World::plan().target("web", nginx.address()).start();
    let url = format!("http://{}/hello.txt", world.forward("web"));
    let report =
        run(Command::new("wrk").args(["--connections", "200", "--threads", "2", "--duration", "10s"]).arg(url));
    println!("{report}");
    assert!(!report.contains("Socket errors") && !report.contains("Non-2xx"), "{report}");
    let requests = report.split(" requests in").next().and_then(|text| text.rsplit(' ').next()?.parse::<u64>().ok());
    assert!(requests.is_some_and(|count| count > 200), "{report}");
    assert_eq!(world.hub.daemon.metric("culvert_hub_bridges_open", &[]), 1.0);
}
