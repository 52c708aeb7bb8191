//! Joins every device stream to one local address, as the SDKs' device-local proxy sample does; `culvert device` does
//! the same with rules, and more.
//!
//! ```sh
//! CULVERT_CONNECTION_STRING_FILE=device.connection CULVERT_CA_FILE=ca.pem cargo run --example proxy_device 127.0.0.1:22
//! ```

mod common;

use std::{error::Error, sync::Arc};

use culvert::{
    base::{Name, StreamName},
    device::{Client, DeviceStream, Handler},
};
use futures_util::future::BoxFuture;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

/// Where every device stream leads.
struct Proxy {
    address: String,
}

impl Handler for Proxy {
    /// A target that does not listen is a rejection, not a stream that ends at once.
    fn accepts<'a>(&'a self, _stream: &'a StreamName, _policy: Option<&'a Name>) -> BoxFuture<'a, Result<(), String>> {
        Box::pin(async {
            let reached = TcpStream::connect(&self.address).await;
            reached.map(drop).map_err(|error| format!("{}: {error}", self.address))
        })
    }

    fn serve<'a>(&'a self, stream: &'a StreamName, io: DeviceStream) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let joined = async { common::join(TcpStream::connect(&self.address).await?, io).await };
            match joined.await {
                Ok(()) => println!("{stream} ended"),
                Err(error) => println!("{stream} broke: {error}"),
            }
        })
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let proxy = Arc::new(Proxy { address: common::argument(1, "the address to connect to")? });
    let ca = common::ca_file();
    let client = Client::new(&common::connection_string()?, ca.as_deref(), &common::state_dir(), proxy).await?;
    println!("waiting for device streams; Ctrl-C ends");
    let shutdown = CancellationToken::new();
    let interrupted = async {
        let _ = tokio::signal::ctrl_c().await;
        shutdown.cancel();
    };
    tokio::join!(client.run(shutdown.clone()), interrupted);
    Ok(())
}
