//! The demo target: a web page that says how it was reached.
//!
//! Owns one loopback listener. Does not know culvert. Invariant: it serves the same page to everyone.

use std::{convert::Infallible, io, net::SocketAddr};

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

/// Connections at once: a person with a browser and a curious load test.
const MAX_CONNECTIONS: usize = 256;

const PAGE: &str = "Hello from a web server behind the device!\n\
    This answer came through: listener, service, hub, device, target.\n";

pub(super) struct Demo {
    listener: TcpListener,
    addr: SocketAddr,
}

impl Demo {
    pub(super) async fn bind() -> io::Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
        let addr = listener.local_addr()?;
        Ok(Self { listener, addr })
    }

    pub(super) fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub(super) async fn run(self, shutdown: CancellationToken) {
        let mut connections = JoinSet::new();
        loop {
            let full = connections.len() >= MAX_CONNECTIONS;
            tokio::select! {
                () = shutdown.cancelled() => break,
                Some(_) = connections.join_next() => {}
                accepted = self.listener.accept(), if !full => match accepted {
                    Ok((socket, _)) => {
                        connections.spawn(serve(socket));
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the demo stopped");
                        break;
                    }
                },
            }
        }
        connections.shutdown().await;
    }
}

async fn serve(socket: TcpStream) {
    let page = |_| async { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(PAGE.as_bytes())))) };
    let served = http1::Builder::new()
        // A client that says no more may still listen: `culvert connect` at the end of a pipe.
        .half_close(true)
        .serve_connection(TokioIo::new(socket), hyper::service::service_fn(page))
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a connection to the demo ended");
    }
}
