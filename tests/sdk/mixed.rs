//! SDK programs at one end and culvert's daemons at the other; and culvert at both, beside them.

use std::{
    io::{Read as _, Write as _},
    net::TcpListener,
    thread,
};

use socket2::SockRef;

use crate::world::{World, echo_server, echoed, stories};

/// A device daemon `pump` with targets of every temper.
fn pump(world: &mut World, identity: &str) {
    echo_server("127.0.0.1:7000");
    thread::spawn(goodbye_server("127.0.0.1:7001", false));
    thread::spawn(goodbye_server("127.0.0.1:7002", true));
    world.register(identity);
    let targets = [
        "name = \"echo\"\naddress = \"127.0.0.1:7000\"",
        "name = \"goodbye\"\naddress = \"127.0.0.1:7001\"",
        "name = \"broken\"\naddress = \"127.0.0.1:7002\"",
        "name = \"watched\"\naddress = \"127.0.0.1:7003\"",
        "name = \"nobody-listens\"\naddress = \"127.0.0.1:7009\"",
    ];
    world.device(identity, &targets);
}

/// Says goodbye and ends; or waits for a word and breaks off.
fn goodbye_server(address: &str, breaks: bool) -> impl FnOnce() + use<> {
    let listener = TcpListener::bind(address).unwrap();
    move || {
        for mut socket in listener.incoming().map_while(Result::ok) {
            if breaks {
                // The word that it waits for; what it was does not matter.
                let _ = socket.read(&mut [0; 3]);
                SockRef::from(&socket).set_linger(Some(std::time::Duration::ZERO)).unwrap();
            } else {
                socket.write_all(&b"goodbye".repeat(1000)).unwrap();
            }
        }
    }
}

/// A service daemon whose plain forwards lead to an SDK device.
fn plain_service(world: &mut World) {
    world.register("device-sdk");
    world.register("device-sdk/m");
    let forward = |port: u16, target: &str, more: &str| {
        format!(
            "name = \"f{port}\"\nlisten = \"127.0.0.1:{port}\"\ndevice = \"device-sdk\"\ntarget = \"{target}\"\n\
             mode = \"plain\"\n{more}"
        )
    };
    let forwards = [
        forward(7100, "TestStream", ""),
        forward(7101, "Polite", ""),
        forward(7102, "Abrupt", ""),
        forward(7103, "Abrupt", "plain_eof = true"),
        forward(7104, "Empty", ""),
        forward(7105, "TestStream", "module = \"m\""),
    ];
    world.service(&forwards.each_ref().map(String::as_str));
}

stories! {
    fn sdk_services_reach_targets_of_culvert(world) {
        pump(world, "pump");
        let stories = [
            "sdk_services_reach_targets_by_stream_name",
            "refusals_are_answers",
            "an_abrupt_service_resets_the_target",
        ];
        world.python("mixed.py", &stories);
        let logged = world.succeed(&["logs", "--config", world.path("hub.toml").to_str().unwrap(), "--device", "pump"]);
        assert!(logged.contains("no-such-target") && logged.contains("rejected"), "{logged}");
    }

    fn the_targets_end_is_the_services(world) {
        pump(world, "pump");
        world.python("mixed.py", &["the_targets_end_is_the_services"]);
    }

    fn a_module_of_culvert_serves_targets(world) {
        world.register("pump");
        pump(world, "pump/side");
        world.python("mixed.py", &["a_module_of_culvert_serves_targets"]);
    }

    fn sdk_devices_serve_plain_forwards(world) {
        plain_service(world);
        let stories = [
            "sdk_devices_serve_plain_forwards",
            "sdk_modules_serve_plain_forwards",
            "the_abrupt_end_of_c_is_a_reset_unless_the_rule_says_otherwise",
            "empty_messages_are_swallowed",
            "a_device_that_says_no_resets_the_connection",
        ];
        world.python("mixed.py", &stories);
    }

    fn mux_works_as_before_beside_sdk_programs(world) {
        pump(world, "pump");
        let forward = "name = \"echo\"\nlisten = \"127.0.0.1:7200\"\ndevice = \"pump\"\ntarget = \"echo\"";
        world.service(&[forward]);
        let data: Vec<u8> = (0..3_000_000_u32).map(|number| (number * 7) as u8).collect();
        assert_eq!(echoed("127.0.0.1:7200", &data), data);
        world.python("mixed.py", &["sdk_services_reach_targets_by_stream_name"]);
        assert_eq!(echoed("127.0.0.1:7200", &data), data);
    }

    fn an_sdk_device_at_the_end_of_a_mux_forward_is_named(world) {
        world.register("device-sdk");
        let forward = "name = \"echo\"\nlisten = \"127.0.0.1:7300\"\ndevice = \"device-sdk\"\ntarget = \"echo\"";
        world.service(&[forward]);
        world.python("mixed.py", &["an_sdk_device_speaks_first_in_a_mux_stream"]);
        world.until("service", "mode = \\\"plain\\\"");
    }
}
