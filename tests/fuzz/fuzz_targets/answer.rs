#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::service::fuzz_answer(data));
