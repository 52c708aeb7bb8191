#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::transport::dial::fuzz_proxy_answer(data));
