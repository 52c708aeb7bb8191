//! Opens a device stream to a device that echoes, says something and prints what comes back, as the SDKs' echo sample
//! does.
//!
//! ```sh
//! CULVERT_CONNECTION_STRING_FILE=service.connection CULVERT_CA_FILE=ca.pem cargo run --example echo_service pump-17
//! ```

mod common;

use std::error::Error;

use culvert::service::Client;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const MESSAGE: &[u8] = b"Streaming data over a stream...";

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let client = Client::new(&common::connection_string()?, common::ca_file().as_deref())?;
    let device = common::argument(1, "the device, or DEVICE/MODULE")?.parse()?;
    let mut io = client.open(&device, &"TestStream".parse()?).await?;
    io.write_all(MESSAGE).await?;
    io.flush().await?;
    let mut back = vec![0; MESSAGE.len()];
    io.read_exact(&mut back).await?;
    println!("received: {}", String::from_utf8_lossy(&back));
    io.shutdown().await?;
    Ok(())
}
