#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::hub::fuzz_session(data));
