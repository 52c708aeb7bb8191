//! The library's examples, which mirror the SDKs' samples, against programs of the SDKs.

use std::{path::PathBuf, process::Command};

use crate::world::{World, echo_server, echoed, stories};

/// An example with its credentials. Cargo puts examples beside the binary, in `examples/`.
fn example(world: &World, name: &str, strings: &str) -> Command {
    let program = PathBuf::from(env!("CARGO_BIN_EXE_culvert")).with_file_name("examples").join(name);
    assert!(program.exists(), "{} is missing: cargo build --examples", program.display());
    let mut command = Command::new(program);
    command
        .env("CULVERT_CONNECTION_STRING_FILE", world.path(strings))
        .env("CULVERT_CA_FILE", world.path("ca.pem"))
        .env("CULVERT_STATE_DIR", world.path(""));
    command
}

stories! {
    fn the_echo_service_talks_to_an_sdk_device(world) {
        world.register("device-sdk");
        world.background("echo_device.py", &["device-sdk.connection"]);
        let output = example(world, "echo_service", "service.connection").arg("device-sdk").output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(said.contains("received: Streaming data over a stream..."), "{output:?}");
    }

    fn the_echo_device_serves_sdk_services(world) {
        world.register("device-sdk");
        let mut device = example(world, "echo_device", "device-sdk.connection");
        world.spawn_and_wait(&mut device, "echo_device");
        world.node("service.js", &["websocket_stream_5_as_the_preview_used_it", "ws_8_as_it_is_today"]);
        let output = example(world, "echo_service", "service.connection").arg("device-sdk").output().unwrap();
        assert!(String::from_utf8_lossy(&output.stdout).contains("received:"), "{output:?}");
    }

    fn the_proxies_join_local_ports(world) {
        echo_server("127.0.0.1:7000");
        world.register("device-sdk");
        let mut device = example(world, "proxy_device", "device-sdk.connection");
        world.spawn_and_wait(device.arg("127.0.0.1:7000"), "proxy_device");
        world.node("service.js", &["websocket_stream_5_as_the_preview_used_it"]);
        let mut service = example(world, "proxy_service", "service.connection");
        world.spawn_and_wait(service.args(["device-sdk", "127.0.0.1:7400"]), "proxy_service");
        let data: Vec<u8> = (0..1_000_000_u32).map(|number| (number * 13) as u8).collect();
        assert_eq!(echoed("127.0.0.1:7400", &data), data);
    }

    fn the_proxy_service_reaches_an_sdk_device(world) {
        world.register("device-sdk");
        world.background("echo_device.py", &["device-sdk.connection"]);
        let mut service = example(world, "proxy_service", "service.connection");
        world.spawn_and_wait(service.args(["device-sdk", "127.0.0.1:7400"]), "proxy_service");
        for _ in 0..3 {
            assert_eq!(echoed("127.0.0.1:7400", b"through culvert's library"), b"through culvert's library");
        }
    }
}
