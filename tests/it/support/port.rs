//! Ports that no other story takes.

use std::{
    fs::File,
    net::{Ipv4Addr, Ipv6Addr, TcpListener},
    sync::Mutex,
};

/// Below the kernel's range for outgoing connections, so that no client of another story happens to sit on one.
const RANGE: std::ops::Range<u16> = 20_000..32_000;

/// A port that is free on loopback and stays this process's until it ends: some daemons must be told their port before
/// they run, and come back to it after a restart.
pub fn free_port() -> u16 {
    static HELD: Mutex<Vec<File>> = Mutex::new(Vec::new());
    let folder = std::env::temp_dir().join("culvert-it-ports");
    std::fs::create_dir_all(&folder).unwrap();
    let start = RANGE.start + (std::process::id() as u16).wrapping_mul(131) % (RANGE.end - RANGE.start);
    for port in (start..RANGE.end).chain(RANGE.start..start) {
        let claim = File::create(folder.join(port.to_string())).unwrap();
        let is_free = || {
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
                && TcpListener::bind((Ipv6Addr::LOCALHOST, port))
                    .map_or_else(|e| e.raw_os_error() == Some(99), |_| true)
        };
        if claim.try_lock().is_ok() && is_free() {
            HELD.lock().unwrap().push(claim);
            return port;
        }
    }
    panic!("no free port");
}

/// An address on loopback with a port of its own.
pub fn free_address() -> String {
    format!("127.0.0.1:{}", free_port())
}
