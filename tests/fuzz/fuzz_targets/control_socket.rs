#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| culvert::agent::control_socket::fuzz_control_socket(data));
