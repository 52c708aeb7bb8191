//! Listens on a local port and opens one device stream per connection, as the SDKs' service-local proxy sample does;
//! `culvert service` with `mode = "plain"` does the same, and more.
//!
//! ```sh
//! CULVERT_CONNECTION_STRING_FILE=service.connection CULVERT_CA_FILE=ca.pem \
//!     cargo run --example proxy_service pump-17 127.0.0.1:2222
//! ```

mod common;

use std::error::Error;

use culvert::service::Client;
use tokio::{net::TcpListener, task::JoinSet};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let client = Client::new(&common::connection_string()?, common::ca_file().as_deref())?;
    let device: culvert::base::Identity = common::argument(1, "the device, or DEVICE/MODULE")?.parse()?;
    let listener = TcpListener::bind(common::argument(2, "the address to listen on")?).await?;
    println!("listening on {}", listener.local_addr()?);
    let mut connections = JoinSet::new();
    loop {
        let (socket, peer) = tokio::select! {
            accepted = listener.accept() => accepted?,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
        };
        let (client, device) = (client.clone(), device.clone());
        connections.spawn(async move {
            let stream = "TestStream".parse()?;
            let joined = async {
                Ok::<_, Box<dyn Error + Send + Sync>>(common::join(socket, client.open(&device, &stream).await?).await?)
            };
            match joined.await {
                Ok(()) => println!("{peer} ended"),
                Err(error) => println!("{peer} broke: {error}"),
            }
            Ok::<_, culvert::base::IdError>(())
        });
    }
}
