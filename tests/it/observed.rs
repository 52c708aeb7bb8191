//! What monitoring sees: Prometheus, promtool, the health pages, the resource log.

use std::process::Command;

use crate::support::{
    End, Forward, Process, World, client::exchange, daemon::culvert, eventually, port::free_address, process::output,
    run, targets, world::DEVICE,
};

#[test]
fn prometheus_scrapes_all_three() {
    let echo = targets::echo();
    let world = World::plan().target("echo", echo.address()).start();
    let jobs = [("hub", &world.hub.daemon), ("device", &world.device), ("service", &world.service)];
    let job = |(name, daemon): &(&str, &crate::support::Daemon)| {
        format!("- job_name: {name}\n  static_configs: [{{targets: ['{}']}}]\n", daemon.metrics_address())
    };
    let jobs: String = jobs.iter().map(job).collect();
    let scratch = world.hub.scratch();
    let config = scratch.write("prometheus.yml", format!("global:\n  scrape_interval: 1s\nscrape_configs:\n{jobs}"));
    let listen = free_address();
    let mut command = Command::new("prometheus");
    command.arg(format!("--config.file={}", config.display())).arg(format!("--web.listen-address={listen}"));
    command.arg(format!("--storage.tsdb.path={}", scratch.join("tsdb").display()));
    let _prometheus = Process::start("prometheus", &mut command);
    assert_eq!(exchange(world.forward("echo"), b"hello").1, End::Clean);
    let answer = |query: &str| {
        let url = format!("http://{listen}/api/v1/query");
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--noproxy", "*", "--get", "--data-urlencode", &format!("query={query}"), &url]);
        String::from_utf8(output(&mut curl).stdout).unwrap()
    };
    let is = |query: &str, wanted: &str| {
        eventually(&format!("{query} to be {wanted}"), || {
            answer(query).contains(&format!("\"{wanted}\"]")).then_some(())
        });
    };
    is("sum(up)", "3");
    is("culvert_hub_bridges_open", "1");
    is("sum(culvert_target_flows_ended_total{reason=\"done\"})", "1");
    is("sum(culvert_forward_flows_ended_total{reason=\"done\"})", "1");
}

#[test]
fn promtool_has_no_complaint() {
    let echo = targets::echo();
    let world = World::plan().target("echo", echo.address()).target("gone", targets::nobody()).start();
    // Metrics with labels appear with their first value.
    assert_eq!(exchange(world.forward("echo"), b"hello").1, End::Clean);
    assert_eq!(exchange(world.forward("gone"), b"").1, End::Reset);
    for daemon in [&world.hub.daemon, &world.device, &world.service] {
        let page = world.hub.scratch().write("page", daemon.page("/metrics").body);
        let line = format!("promtool check metrics < {}", page.display());
        let told = output(Command::new("sh").args(["-c", &line]));
        let words = String::from_utf8_lossy(&told.stdout).into_owned() + &String::from_utf8_lossy(&told.stderr);
        assert!(told.status.success() && words.trim().is_empty(), "{words}");
        assert_eq!(daemon.metric("culvert_task_panics_total", &[]), 0.0);
    }
}

#[test]
fn readiness_tells_a_bad_forward_from_an_offline_device() {
    let echo = targets::echo();
    let offline = Forward::new("offline", free_address(), "pump-18", "echo");
    let world = World::plan().target("echo", echo.address()).forward(offline).start();
    world.hub.registry(&["add", "pump-18"]);
    let page = |path: &str| world.service.page(path);
    assert_eq!(page("/healthz").status, 200);
    eventually("the forward to be usable", || (page("/readyz?forward=echo").status == 200).then_some(()));
    let sick = page("/readyz?forward=offline");
    assert_eq!(sick.status, 503);
    assert!(sick.body.contains("pump-18"), "{}", sick.body);
    assert_eq!(page("/readyz?forward=nonsense").status, 404);
    assert_eq!(page("/readyz").status, 200, "one offline device never makes a service unready");
    world.service.wait_for_metric("culvert_forward_usable", &[("forward", "echo")], |value| value == 1.0);
    assert_eq!(world.service.metric("culvert_forward_usable", &[("forward", "offline")]), 0.0);
}

#[test]
fn the_hub_keeps_a_record_of_each_device_stream() {
    let echo = targets::echo();
    let world = World::plan().target("echo", echo.address()).start();
    let mut logs = culvert();
    logs.args(["logs", "--json", "--config"]).arg(world.hub.daemon.config());
    let record =
        eventually("a record", || run(&mut logs).lines().find(|line| line.contains(DEVICE)).map(str::to_owned));
    assert!(record.contains("\"category\":\"DeviceStreams\"") && record.contains("culvert-mux-1"), "{record}");
}
