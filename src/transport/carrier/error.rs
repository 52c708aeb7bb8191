//! How a carrier ends badly.
//!
//! Owns the words and their place in I/O errors. Does not decide that a carrier has ended. Invariant: a reader can
//! always tell a Close from a broken connection from silence.

use std::{io, net::IpAddr, time::Duration};

/// How a carrier ended, if not by a Close that the other end meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CarrierError {
    /// The other end sent a Close with a code that is not 1000.
    #[error("closed by the other end with {code}{}{reason}", if reason.is_empty() { "" } else { ": " })]
    Closed {
        /// The WebSocket close code.
        code: u16,
        /// Its reason, as sent.
        reason: String,
    },
    /// The connection broke, or ended without a Close.
    #[error("connection lost: {0}")]
    Lost(String),
    /// Pings went unanswered.
    #[error("no sign of life for {} s", .0.as_secs())]
    Silent(Duration),
    /// The host's network changed: what the hub answers would not arrive.
    #[error("this host no longer has the address {0} that the connection came from")]
    AddressGone(IpAddr),
    /// The other end does not speak WebSocket as it should.
    #[error("protocol violation: {0}")]
    Protocol(String),
}

impl CarrierError {
    /// The carrier's error inside an I/O error, if it is one.
    pub fn of(error: &io::Error) -> Option<&Self> {
        error.get_ref()?.downcast_ref()
    }

    pub(super) fn into_io(self) -> io::Error {
        let kind = match &self {
            Self::Closed { .. } => io::ErrorKind::ConnectionAborted,
            Self::Lost(_) => io::ErrorKind::ConnectionReset,
            Self::Silent(_) => io::ErrorKind::TimedOut,
            Self::AddressGone(_) => io::ErrorKind::AddrNotAvailable,
            Self::Protocol(_) => io::ErrorKind::InvalidData,
        };
        io::Error::new(kind, self)
    }
}

/// A read that failed.
pub(super) fn read_error(error: &io::Error) -> CarrierError {
    // rustls' words for this one are a paragraph with a link.
    if error.kind() == io::ErrorKind::UnexpectedEof {
        return CarrierError::Lost("the other end went away without a word".into());
    }
    CarrierError::Lost(error.to_string())
}

/// A write that failed. Its kind is always that of a broken pipe: what really happened, the reader finds out.
pub(super) fn write_error(error: io::Error) -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, read_error(&error))
}
