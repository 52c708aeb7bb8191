//! A device that sends back whatever comes over its device streams, as the SDKs' echo sample does.
//!
//! ```sh
//! CULVERT_CONNECTION_STRING_FILE=device.connection CULVERT_CA_FILE=ca.pem cargo run --example echo_device
//! ```

mod common;

use std::{error::Error, sync::Arc};

use culvert::{
    base::{Name, StreamName},
    device::{Client, DeviceStream, Handler},
};
use futures_util::future::BoxFuture;
use tokio::io::{self, AsyncWriteExt as _};
use tokio_util::sync::CancellationToken;

/// Accepts every device stream.
struct Echo;

impl Handler for Echo {
    fn accepts<'a>(&'a self, stream: &'a StreamName, policy: Option<&'a Name>) -> BoxFuture<'a, Result<(), String>> {
        println!("{stream} is asked for by {}", policy.map_or("an unnamed policy", Name::as_str));
        Box::pin(async { Ok(()) })
    }

    fn serve<'a>(&'a self, stream: &'a StreamName, io: DeviceStream) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let (mut reader, mut writer) = io::split(io);
            match io::copy(&mut reader, &mut writer).await {
                Ok(bytes) => println!("{stream} ended after {bytes} bytes"),
                Err(error) => println!("{stream} broke: {error}"),
            }
            // The other side may have gone already.
            let _ = writer.shutdown().await;
        })
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let ca = common::ca_file();
    let client =
        Client::new(&common::connection_string()?, ca.as_deref(), &common::state_dir(), Arc::new(Echo)).await?;
    println!("waiting for device streams; Ctrl-C ends");
    let shutdown = CancellationToken::new();
    let interrupted = async {
        let _ = tokio::signal::ctrl_c().await;
        shutdown.cancel();
    };
    tokio::join!(client.run(shutdown.clone()), interrupted);
    Ok(())
}
