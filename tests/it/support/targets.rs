//! Programs at the far end: what a story's device offers.

use std::{
    io::{Read as _, Write as _},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

/// A TCP server on loopback; each connection is served by a function on a thread of its own.
pub struct Server {
    address: SocketAddr,
    accepted: Arc<AtomicU64>,
}

impl Server {
    pub fn start(serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        Self::start_at("127.0.0.1:0", serve)
    }

    pub fn start_at(address: &str, serve: impl Fn(TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind(address).unwrap();
        let address = listener.local_addr().unwrap();
        let accepted = Arc::new(AtomicU64::new(0));
        let (serve, count) = (Arc::new(serve), accepted.clone());
        // Ends with the test's process.
        thread::spawn(move || {
            for socket in listener.incoming().map_while(Result::ok) {
                count.fetch_add(1, Ordering::Relaxed);
                let serve = serve.clone();
                thread::spawn(move || serve(socket));
            }
        });
        Self { address, accepted }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections accepted so far.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }
}

/// Sends back what it receives, and ends its direction when the other has ended.
pub fn echo() -> Server {
    Server::start(echo_tcp)
}

pub fn echo_tcp(mut socket: TcpStream) {
    let mut reader = socket.try_clone().unwrap();
    copy(&mut reader, &mut socket);
    let _ = socket.shutdown(Shutdown::Write);
}

/// The same on a Unix socket.
pub fn echo_unix(path: &Path) {
    let listener = UnixListener::bind(path).unwrap();
    thread::spawn(move || {
        for mut socket in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                let mut reader: UnixStream = socket.try_clone().unwrap();
                copy(&mut reader, &mut socket);
                let _ = socket.shutdown(Shutdown::Write);
            });
        }
    });
}

/// Says its name at once, then echoes: tells which target a rule leads to.
pub fn named(name: &'static str) -> Server {
    Server::start(move |mut socket| {
        if writeln!(socket, "{name}").is_ok() {
            echo_tcp(socket);
        }
    })
}

fn copy(from: &mut impl std::io::Read, to: &mut impl std::io::Write) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).is_err() {
            return;
        }
    }
}

/// Reads to the end, then answers with the number of bytes and ends.
pub fn counter() -> Server {
    Server::start(|mut socket| {
        let (count, end) = super::bytes::drain(&mut socket);
        if end.is_ok() {
            let _ = write!(socket, "{count}");
        }
    })
}

/// An address at which nobody listens.
pub fn nobody() -> SocketAddr {
    ([127, 0, 0, 1], super::port::free_port()).into()
}

/// Reads one byte at a time until the line ends.
pub fn read_line(socket: &mut TcpStream) -> String {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while socket.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}
