//! Device streams for programs: what an SDK's device client does.
//!
//! Owns the public face of a device that accepts or rejects plain device streams itself. Does not know targets or
//! muxes. Invariant: a stream that was not accepted never reaches the handler.

use std::{path::Path, sync::Arc};

use futures_util::future::BoxFuture;
use prometheus::Registry;
use tokio_util::sync::CancellationToken;

use super::{BindError, Device};
use crate::{
    agent::PlainStream,
    auth::connstr::ConnectionStringError,
    base::{Name, StreamName},
    config::{DeviceConfig, FileContents},
};

/// A plain device stream: `AsyncRead + AsyncWrite`. There is no half-close: `shutdown` ends both directions.
pub type DeviceStream = PlainStream;

/// Decides about device streams, and serves them.
pub trait Handler: Send + Sync + 'static {
    /// Accepts, or rejects with a reason. `policy` is who asks, if the hub says so.
    fn accepts<'a>(&'a self, stream: &'a StreamName, policy: Option<&'a Name>) -> BoxFuture<'a, Result<(), String>>;

    /// Serves an accepted stream until it is done. Several may run at once.
    fn serve<'a>(&'a self, stream: &'a StreamName, io: DeviceStream) -> BoxFuture<'a, ()>;
}

/// Why a client could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The connection string.
    #[error("{0}")]
    ConnectionString(#[from] ConnectionStringError),
    /// The CA file.
    #[error("cannot read {path}: {source}")]
    Ca {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The rest.
    #[error("{0}")]
    Bind(#[from] BindError),
}

/// A device that hands its device streams to a [`Handler`]. It keeps its control session with the hub for ever.
pub struct Client {
    device: Device,
}

impl Client {
    /// A client for a device's or module's connection string, which trusts the CA in `ca_file`, or the machine's.
    /// `state_dir` keeps the installation's ID.
    pub async fn new(
        connection_string: &str,
        ca_file: Option<&Path>,
        state_dir: &Path,
        handler: Arc<dyn Handler>,
    ) -> Result<Self, ClientError> {
        let mut config = DeviceConfig::new(connection_string.parse()?, state_dir);
        config.ca = ca_file.map(read_ca).transpose()?;
        let device = Device::bind(config, &Registry::new()).await?.with_handler(handler);
        Ok(Self { device })
    }

    /// Waits for device streams until `shutdown`.
    pub async fn run(self, shutdown: CancellationToken) {
        self.device.run(shutdown).await;
    }
}

fn read_ca(path: &Path) -> Result<FileContents, ClientError> {
    let contents = std::fs::read(path).map_err(|source| ClientError::Ca { path: path.into(), source })?;
    Ok(FileContents { path: path.into(), contents })
}
