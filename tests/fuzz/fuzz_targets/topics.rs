#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::proto::control::fuzz_topics(data));
