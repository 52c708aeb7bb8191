//! The hello of a mux stream, on a carrier.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

pub use super::link::{BoxedCarrier, CarrierIo, Link, LinkControl, LinkSettings};
pub use crate::proto::hello::{BootId, InstanceId, LinkId};

/// What this daemon says of itself.
#[derive(Clone, Debug)]
pub struct LocalHello {
    /// This installation.
    pub instance: InstanceId,
    /// This run.
    pub boot: BootId,
    /// How many channels this side allows on the mux, both directions together.
    pub max_channels: u32,
    /// How many bytes of a link this side takes ahead of their consumption.
    pub receive_window: u32,
    /// How long a detached link lives; zero turns the link off.
    pub resume_for: Duration,
    /// What all links of the process share.
    pub links: LinkSettings,
}

/// What the other daemon said of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerHello {
    /// Its installation.
    pub instance: InstanceId,
    /// Its run.
    pub boot: BootId,
    /// How many channels it allows.
    pub max_channels: u32,
    /// How many bytes of a link it takes ahead of their consumption.
    pub receive_window: u32,
}

/// A mux stream whose hello is done.
#[derive(Debug)]
pub struct Session {
    /// What the mux runs over.
    pub io: SessionIo,
    /// The link below the mux, if both sides have the feature.
    pub link: Option<LinkControl>,
    /// The other side.
    pub peer: PeerHello,
}

/// What the mux runs over: a link, or the bare carrier if the link was not agreed.
pub enum SessionIo {
    /// A resumable link.
    Link(Link),
    /// A carrier whose end is the session's end.
    Bare(BoxedCarrier),
}

/// What a device got on a carrier.
#[derive(Debug)]
pub enum Received {
    /// A new session.
    New(Session),
    /// A link of the table took the carrier.
    Resumed(LinkControl),
}

/// What a device knows about links and admission.
pub trait LinkTable: Send + Sync {
    /// The link of that name, if it exists and the asking policy created it.
    fn find(&self, id: &LinkId) -> Option<LinkControl>;

    /// Whether a new session may begin; the text of a refusal is sent to the service.
    fn admit(&self, _peer: &PeerHello) -> Result<(), String> {
        Ok(())
    }
}

impl<F: Fn(&LinkId) -> Option<LinkControl> + Send + Sync> LinkTable for F {
    fn find(&self, id: &LinkId) -> Option<LinkControl> {
        self(id)
    }
}

/// Why the other side said no.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It does not know the link: it restarted, or the link expired, or another policy created it.
    #[error("session lost: the other side does not know the link")]
    UnknownLink,
    /// A newer attach of the same link came first.
    #[error("a newer carrier of the link came first")]
    Stale,
    /// The proof, the positions or the epoch of a resume were wrong; the link has ended.
    #[error("session lost: {0}")]
    SessionLost(String),
    /// It takes no more sessions, for the stated reason.
    #[error("refused: {0}")]
    NotAdmitted(String),
    /// Our required features or version are not supported there.
    #[error("not supported by the other side: {0}")]
    Unsupported(String),
}

/// Why a hello failed.
#[derive(Debug, thiserror::Error)]
pub enum HelloError {
    /// The first bytes are no hello.
    #[error("the other end is not a culvert daemon but an SDK program: set mode = \"plain\" for this forward")]
    WrongMagic,
    /// Nothing complete in time.
    #[error("no hello from the other side within {} s", .0.as_secs())]
    Timeout(Duration),
    /// Another major version.
    #[error("the other side speaks version {0} of the mux stream, this one speaks version 1")]
    Version(u8),
    /// A hello that breaks the format.
    #[error("malformed hello: {0}")]
    Malformed(&'static str),
    /// The other side said no.
    #[error("{0}")]
    Refused(Refusal),
    /// The other side failed to prove that it has the link's secret; the link has ended.
    #[error("session lost: wrong proof of the link's secret")]
    WrongProof,
    /// The link had ended before the carrier was attached.
    #[error("the link has ended")]
    Ended,
    /// The carrier broke.
    #[error("the carrier broke during the hello")]
    Io(#[from] io::Error),
}

/// Service side: begins a new session on a carrier.
pub async fn offer_new(carrier: BoxedCarrier, local: &LocalHello) -> Result<Session, HelloError> {
    let peer = PeerHello {
        instance: local.instance,
        boot: local.boot,
        max_channels: local.max_channels,
        receive_window: local.receive_window,
    };
    Ok(Session { io: SessionIo::Bare(carrier), link: None, peer })
}

/// Service side: gives a link its next carrier. A refusal that means "session lost" has ended the link.
pub async fn offer_resume(_carrier: BoxedCarrier, _link: &LinkControl, _local: &LocalHello) -> Result<(), HelloError> {
    Err(HelloError::Ended)
}

/// Device side: answers the hello of a service.
pub async fn receive(
    carrier: BoxedCarrier,
    local: &LocalHello,
    _links: &dyn LinkTable,
) -> Result<Received, HelloError> {
    offer_new(carrier, local).await.map(Received::New)
}

impl std::fmt::Debug for SessionIo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Link(_) => "SessionIo::Link",
            Self::Bare(_) => "SessionIo::Bare",
        })
    }
}

impl AsyncRead for SessionIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Link(link) => Pin::new(link).poll_read(cx, buf),
            Self::Bare(carrier) => Pin::new(carrier).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for SessionIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Link(link) => Pin::new(link).poll_write(cx, bytes),
            Self::Bare(carrier) => Pin::new(carrier).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Link(link) => Pin::new(link).poll_flush(cx),
            Self::Bare(carrier) => Pin::new(carrier).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Link(link) => Pin::new(link).poll_shutdown(cx),
            Self::Bare(carrier) => Pin::new(carrier).poll_shutdown(cx),
        }
    }
}
