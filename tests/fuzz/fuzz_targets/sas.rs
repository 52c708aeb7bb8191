#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::auth::sas::fuzz_sas(data));
