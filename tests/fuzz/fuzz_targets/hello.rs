#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::proto::hello::fuzz_hello(data));
