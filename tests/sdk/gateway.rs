//! Connection strings beside the usual ones, and the resource log beside its file.

use serde_json::Value;

use crate::world::{GATEWAY, World, echo_server, stories};

/// A device's connection string by way of a gateway.
fn by_gateway(world: &World, name: &str) {
    let text = std::fs::read_to_string(world.path(&format!("{name}.connection"))).unwrap();
    world.write(&format!("{name}-gateway.connection"), &format!("{};GatewayHostName={GATEWAY}", text.trim()));
}

/// A device's connection string with a token in place of the key.
fn by_token(world: &World, name: &str) {
    let text = std::fs::read_to_string(world.path(&format!("{name}.connection"))).unwrap();
    let names = text.trim().split_once(";SharedAccessKey=").unwrap().0.to_owned();
    let token = world.python("sas_token.py", &[&format!("{name}.connection")]);
    world.write(&format!("{name}-token.connection"), &format!("{names};SharedAccessSignature={}", token.trim()));
}

stories! {
    fn devices_come_by_a_gateways_name(world) {
        world.register("device-sdk");
        world.register("module-sdk");
        world.register("module-sdk/m");
        by_gateway(world, "device-sdk");
        by_gateway(world, "module-sdk-m");
        world.node("device.js", &["by_way_of_a_gateway"]);
        world.python("hub_alone.py", &["a_device_comes_by_way_of_a_gateway"]);
    }

    fn devices_come_with_a_ready_made_token(world) {
        world.register("device-sdk");
        by_token(world, "device-sdk");
        world.node("device.js", &["with_a_ready_made_token"]);
        world.python("hub_alone.py", &["a_device_comes_with_a_ready_made_token"]);
    }

    fn a_culvert_device_comes_by_gateway_and_token(world) {
        echo_server("127.0.0.1:7000");
        world.register("pump");
        by_token(world, "pump");
        let text = std::fs::read_to_string(world.path("pump-token.connection")).unwrap();
        world.write("pump.connection", &format!("{text};GatewayHostName={GATEWAY}"));
        world.device("pump", &["name = \"echo\"\naddress = \"127.0.0.1:7000\""]);
        world.python("mixed.py", &["a_culvert_device_serves"]);
    }

    fn the_resource_log_is_on_stdout_if_chosen(world) {
        world.restart("hub", |config| config + "\n[resource_log]\nstdout = true\n");
        world.register("device-sdk");
        world.python("errors.py", &["one_of_each_result"]);
        // The hub's own messages are no objects with a category.
        let said = world.said("hub");
        let records = said.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let records: Vec<Value> = records.filter(|record| record["category"] == "DeviceStreams").collect();
        let results: Vec<&str> = records.iter().map(|record| record["resultType"].as_str().unwrap()).collect();
        assert_eq!(results, ["DeviceNotOnline", "GatewayTimeout", "", ""]);
        let config = world.path("hub.toml");
        let logged = world.succeed(&["logs", "--config", config.to_str().unwrap(), "--json"]);
        let logged: Vec<Value> = logged.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(logged, records, "the file has the same");
    }
}
