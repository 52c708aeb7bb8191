#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::transport::http::fuzz_url(data));
