#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::auth::connstr::fuzz_connection_string(data));
