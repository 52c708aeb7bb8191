#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::hub::control::fuzz_certificate(data));
