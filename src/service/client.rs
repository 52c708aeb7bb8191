//! Device streams for programs: what an SDK's service client does.
//!
//! Owns the public face of a service that opens plain device streams by device ID. Does not know forwards or muxes.
//! Invariant: a [`DeviceStream`] that reads zero bytes was closed by the far side on purpose.

use std::{path::Path, time::Duration};

use super::initiator::{self, InitiateError, Patience};
use crate::{
    agent::{HubClient, HubSetupError, PlainStream},
    auth::{ConnectionString, connstr::ConnectionStringError},
    base::{Identity, StreamName},
    config::{FileContents, ProxyRule},
    proto::streams::HANDSHAKE_LIMIT,
    transport::carrier::CarrierOptions,
};

/// A plain device stream: `AsyncRead + AsyncWrite`. There is no half-close: `shutdown` ends both directions.
pub type DeviceStream = PlainStream;

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
    /// Trust or proxy.
    #[error("{0}")]
    Setup(#[from] HubSetupError),
    /// A device's connection string, where a policy's is needed.
    #[error("this is a device's connection string; a service needs a policy's (SharedAccessKeyName=...)")]
    NotAPolicy,
}

/// Opens plain device streams under a policy.
#[derive(Clone)]
pub struct Client {
    hub: HubClient,
    patience: Patience,
}

impl Client {
    /// A client for a policy's connection string, which trusts the CA in `ca_file`, or the machine's.
    pub fn new(connection_string: &str, ca_file: Option<&Path>) -> Result<Self, ClientError> {
        let connection: ConnectionString = connection_string.parse()?;
        let ca = ca_file.map(read_ca).transpose()?;
        let hub = HubClient::new(&connection, ca.as_ref(), None, &ProxyRule::Environment)?;
        if hub.policy().is_none() {
            return Err(ClientError::NotAPolicy);
        }
        Ok(Self { hub, patience: Patience { connect: HANDSHAKE_LIMIT, response: HANDSHAKE_LIMIT } })
    }

    /// The same client with other timeouts: for an offline device to appear, and for its answer. 60 s each otherwise.
    #[must_use]
    pub fn with_timeouts(mut self, connect: Duration, response: Duration) -> Self {
        self.patience = Patience { connect, response };
        self
    }

    /// Opens a device stream to a device or module (`device` or `device/module`).
    pub async fn open(&self, device: &Identity, stream: &StreamName) -> Result<DeviceStream, InitiateError> {
        let opened = initiator::open(&self.hub, device, stream, self.patience, CarrierOptions::PLAIN, || {}).await?;
        Ok(PlainStream::new(opened, false))
    }
}

fn read_ca(path: &Path) -> Result<FileContents, ClientError> {
    let contents = std::fs::read(path).map_err(|source| ClientError::Ca { path: path.into(), source })?;
    Ok(FileContents { path: path.into(), contents })
}
