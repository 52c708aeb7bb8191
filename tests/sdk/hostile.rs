//! Errors as the clients expect them, and input that no client sends.

use serde_json::Value;

use crate::world::{HUB, World, stories};

/// The hub's resident memory.
fn memory(world: &World) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", world.process("hub"))).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

stories! {
    fn errors_have_their_codes_bodies_and_headers(world) {
        world.register("device-sdk");
        world.register("module-sdk");
        world.register("module-sdk/m");
        let stories = [
            "errors_have_their_codes",
            "timeouts_come_from_the_two_headers",
            "every_spelling_of_a_token_is_understood",
            "wrong_tokens_are_refused",
            "tickets_admit_once_and_only_their_side",
        ];
        world.python("errors.py", &stories);
    }

    fn a_device_that_never_connects_ends_the_service(world) {
        world.register("device-sdk");
        world.python("errors.py", &["a_device_that_never_connects_ends_the_service"]);
    }

    fn hostile_input_gets_an_error_or_a_close(world) {
        world.register("device-sdk");
        world.python("hostile.py", &["odd_requests_are_answered"]);
        let before = memory(world);
        let stories = [
            "odd_requests_are_answered",
            "mqtt_before_connect_is_closed",
            "mqtt_after_connect_is_closed_or_ignored",
            "websocket_frames_that_break_the_rules_end_the_leg",
            "a_truncated_anything_is_no_harm",
        ];
        world.python("hostile.py", &stories);
        let grown = memory(world).saturating_sub(before);
        assert!(grown < 32 << 20, "the hub grew by {grown} bytes");
    }

    fn initiations_are_logged_in_the_documented_schema(world) {
        world.register("device-sdk");
        world.python("errors.py", &["one_of_each_result"]);
        let config = world.path("hub.toml");
        let logs = |more: &[&str]| world.succeed(&[&["logs", "--config", config.to_str().unwrap()], more].concat());
        let records: Vec<Value> =
            logs(&["--json", "--device", "device-sdk", "--since", "1h"]).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let results: Vec<&str> = records.iter().map(|record| record["resultType"].as_str().unwrap()).collect();
        assert_eq!(results, ["DeviceNotOnline", "GatewayTimeout", "", ""]);
        for record in &records {
            assert_eq!((&record["category"], &record["operationName"]), (&"DeviceStreams".into(), &"invoke".into()));
            assert!(record["durationMs"].is_string() && record["time"].as_str().unwrap().ends_with('Z'), "{record}");
            let level = if record["resultType"] == "" { "Information" } else { "Error" };
            assert_eq!(record["level"], level);
            let properties: Value = serde_json::from_str(record["properties"].as_str().unwrap()).unwrap();
            assert_eq!((&properties["deviceId"], &properties["direction"]), (&"device-sdk".into(), &"c2d".into()));
            assert_eq!((&properties["requestName"], &properties["sdkVersion"]), (&"Logged".into(), &"2018-10-20-preview".into()));
            assert!(properties["requestSize"].is_string() && properties["responseSize"].is_string());
        }
        let table = logs(&["--device", "device-sdk"]);
        assert_eq!(table.lines().count(), 5, "{table}");
        assert!(table.contains("rejected") && table.contains("accepted"), "{table}");
        assert_eq!(logs(&["--device", "somebody"]).lines().count(), 1);
    }

    fn the_streaming_endpoints_are_shown(world) {
        let shown: Value = serde_json::from_str(&world.succeed(&["devicestream", "show"])).unwrap();
        assert_eq!(shown, serde_json::json!({ "streamingEndpoints": [format!("https://{HUB}:443")] }));
    }
}
