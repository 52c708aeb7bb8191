//! What conformance suites check of WebSocket, MQTT over it and HTTP, by raw clients.

use crate::world::stories;

stories! {
    fn the_streaming_endpoint_conforms(world) {
        world.register("device-sdk");
        let stories = [
            "sizes_in_every_manner",
            "pings_are_answered",
            "fragments",
            "text_is_utf8",
        ];
        world.python("conformance.py", &stories);
    }

    fn the_streaming_endpoint_ends_as_it_should(world) {
        world.register("device-sdk");
        world.python("conformance.py", &["reserved_bits_and_opcodes_fail", "closes"]);
    }

    fn upgrades_and_mqtt_over_websocket_conform(world) {
        world.register("device-sdk");
        world.python("conformance.py", &["upgrades_that_are_none", "mqtt_over_websocket_is_a_byte_stream"]);
    }

    fn requests_conform(world) {
        world.register("device-sdk");
        world.python("conformance.py", &["keep_alive_and_pipelines", "names_in_every_encoding"]);
    }

    fn no_timeouts_means_a_minute(world) {
        world.register("device-sdk");
        world.python("conformance.py", &["no_timeouts_named"]);
    }
}
