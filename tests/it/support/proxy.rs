//! An HTTP CONNECT proxy that cuts: between a daemon and its hub, where a firewall or a Wi-Fi would be.

use std::{
    io::{Read, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use super::targets::Server;

/// A running proxy.
pub struct Proxy {
    server: Server,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    /// Both sockets of each tunnel that is up.
    tunnels: Mutex<Vec<[TcpStream; 2]>>,
    is_refusing: AtomicBool,
    /// Bytes per second in each direction of each tunnel; 0 is as fast as it goes.
    pace: AtomicU64,
    served: AtomicU64,
    /// The value of Proxy-Authorization that is asked for.
    wanted: Option<String>,
}

impl Proxy {
    pub fn start() -> Self {
        Self::with(State::default())
    }

    /// A proxy that asks for `Basic` credentials, already encoded.
    pub fn with_credentials(encoded: &str) -> Self {
        Self::with(State { wanted: Some(format!("Basic {encoded}")), ..State::default() })
    }

    fn with(state: State) -> Self {
        let state = Arc::new(state);
        let serving = state.clone();
        Self { server: Server::start(move |socket| serving.serve(socket)), state }
    }

    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// Tunnels opened so far.
    pub fn served(&self) -> u64 {
        self.state.served.load(Ordering::Relaxed)
    }

    /// Ends every tunnel at once, in the middle of whatever it carries.
    pub fn cut(&self) {
        for tunnel in self.state.tunnels.lock().unwrap().drain(..) {
            for socket in tunnel {
                let _ = socket.shutdown(Shutdown::Both);
            }
        }
    }

    /// From now on each direction of each tunnel carries so many bytes per second.
    pub fn pace(&self, bytes_per_second: u64) {
        self.state.pace.store(bytes_per_second, Ordering::Relaxed);
    }

    /// From now on nobody gets through, or everybody again.
    pub fn refuse(&self, is_refusing: bool) {
        self.state.is_refusing.store(is_refusing, Ordering::SeqCst);
        if is_refusing {
            self.cut();
        }
    }
}

impl State {
    fn serve(&self, mut client: TcpStream) {
        let Some(head) = read_head(&mut client) else { return };
        let is_welcome = self.wanted.as_ref().is_none_or(|wanted| head.contains(wanted.as_str()));
        if !is_welcome {
            let _ = client.write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n");
            return;
        }
        let address = head.strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next()).unwrap_or_default();
        let hub = TcpStream::connect(address).ok().filter(|_| !self.is_refusing.load(Ordering::SeqCst));
        let Some(hub) = hub else {
            let _ = client.write_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n");
            return;
        };
        self.served.fetch_add(1, Ordering::Relaxed);
        if client.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").is_err() {
            return;
        }
        self.tunnels.lock().unwrap().push([client.try_clone().unwrap(), hub.try_clone().unwrap()]);
        std::thread::scope(|scope| {
            scope.spawn(|| self.pump(&client, &hub));
            self.pump(&hub, &client);
        });
    }

    /// One direction, to its end.
    fn pump(&self, mut from: &TcpStream, mut to: &TcpStream) {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let pace = self.pace.load(Ordering::Relaxed);
            // A slow line takes little at a time.
            let most = if pace == 0 { buffer.len() } else { 4096 };
            let Ok(count @ 1..) = from.read(&mut buffer[..most]) else { break };
            if pace > 0 {
                std::thread::sleep(Duration::from_secs(1).mul_f64(count as f64 / pace as f64));
            }
            if to.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    }
}

fn read_head(client: &mut TcpStream) -> Option<String> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && head.len() < 16 << 10 {
        if client.read(&mut byte).ok()? == 0 {
            return None;
        }
        head.push(byte[0]);
    }
    String::from_utf8(head).ok()
}
