//! A plain TCP client that tells a clean end from a reset.

use std::{
    io::{ErrorKind, Read, Write as _},
    net::{Shutdown, TcpStream},
};

use super::wait::PATIENCE;

/// How a connection ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// A FIN: everything was said.
    Clean,
    /// A RST: something is missing.
    Reset,
}

/// Connects to a forward's listener.
#[track_caller]
pub fn connect(address: &str) -> TcpStream {
    let socket = TcpStream::connect(address).unwrap_or_else(|error| panic!("{address}: {error}"));
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.set_write_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Reads to the end; what came, and how it ended.
#[track_caller]
pub fn read_to_end(socket: &mut TcpStream) -> (Vec<u8>, End) {
    let (mut bytes, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
    loop {
        match socket.read(&mut buffer) {
            Ok(0) => return (bytes, End::Clean),
            Ok(count) => bytes.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return (bytes, End::Reset),
            Err(error) => panic!("after {} bytes: {error}", bytes.len()),
        }
    }
}

/// Sends everything, ends its direction, reads the answer to its end.
#[track_caller]
pub fn exchange(address: &str, request: &[u8]) -> (Vec<u8>, End) {
    let mut socket = connect(address);
    let mut sender = socket.try_clone().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            // A reset shows at the reader.
            let _ = sender.write_all(request).and_then(|()| sender.shutdown(Shutdown::Write));
        });
        read_to_end(&mut socket)
    })
}
