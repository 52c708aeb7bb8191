#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::proto::mqtt::fuzz_mqtt(data));
