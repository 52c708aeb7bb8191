#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::transport::carrier::fuzz_upgrade(data));
