//! SDK service program to SDK device program through the hub alone; errors; malformed input.

use crate::world::stories;

stories! {
    fn every_pair_of_sdk_programs_talks(world) {
        world.register("device-sdk");
        world.python("hub_alone.py", &["a_device_program_of_each_kind_serves_every_service_program"]);
    }

    fn a_module_has_its_own_channel(world) {
        world.register("module-sdk");
        world.register("module-sdk/m");
        world.python("hub_alone.py", &["a_module_has_its_own_channel"]);
    }

    fn the_streaming_endpoint_has_manners(world) {
        world.register("device-sdk");
        let stories = [
            "bytes_sent_before_the_other_side_came_are_not_lost",
            "each_manner_of_ending_reaches_the_other_side",
            "frames_of_every_kind_pass_as_bytes",
            "small_frames_pass_at_speed",
        ];
        world.python("hub_alone.py", &stories);
    }

    fn a_device_renews_its_token_and_rejects(world) {
        world.register("device-sdk");
        let stories = ["a_c_device_renews_its_token_and_its_streams_survive", "a_rejection_is_an_answer"];
        world.python("hub_alone.py", &stories);
    }

    fn revocation_ends_what_it_admitted(world) {
        world.register("device-sdk");
        world.python("hub_alone.py", &["revocation_ends_what_it_admitted"]);
    }
}
