//! The hello of a mux stream, on a carrier.
//!
//! Owns the exchange of messages, its time limit, and the birth of a link. Does not know the format (see
//! [`crate::proto::hello`]), the mux, or how carriers are made. Invariant: when an exchange has succeeded, not a byte
//! behind its last message was read.

use std::{
    fmt, io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

use super::mux::Tunnel;

pub use super::link::{BoxedCarrier, CarrierIo, Link, LinkControl, LinkSettings};
pub use crate::proto::hello::{BootId, InstanceId, LinkId, Refusal};
use crate::{
    base::Secret,
    proto::{
        hello::{
            Features, HelloFault, Message, NewLink, PREFIX, Resume, ResumeAnswer, ResumeError, ResumeOffer, Side,
            VERSION, message_length,
        },
        link::{AttachError, EndReason, Options, Violation},
    },
};

/// For the whole exchange: two round trips over the slowest path that is of any use, several times.
const TIMEOUT: Duration = Duration::from_secs(10);

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
    #[error("the other side speaks version {0} of the mux stream, this one speaks version {VERSION}")]
    Version(u8),
    /// A hello that breaks the format.
    #[error("malformed hello")]
    Malformed(#[source] HelloFault),
    /// A message that has no place here.
    #[error("unexpected message in the hello")]
    Unexpected,
    /// The other side said no.
    #[error("{0}")]
    Refused(Refusal),
    /// This side said no, and told the other one.
    #[error("turned away: {0}")]
    Turned(Refusal),
    /// The other side failed to prove that it has the link's secret; the link has ended.
    #[error("session lost: wrong proof of the link's secret")]
    WrongProof,
    /// A newer carrier of the link came first.
    #[error("a newer carrier of the link came first")]
    Stale,
    /// The link had ended before the carrier was attached.
    #[error("the link has ended")]
    Ended(#[source] EndReason),
    /// The carrier broke.
    #[error("the carrier broke during the hello")]
    Io(#[from] io::Error),
}

/// Service side: begins a new session on a carrier.
pub async fn offer_new(mut carrier: BoxedCarrier, local: &LocalHello) -> Result<Session, HelloError> {
    in_time(async {
        let link = local.new_link()?;
        let optional = if link.is_some() { Features::LINK } else { Features::NONE };
        let hello = Message::New { required: Features::NONE, optional, side: local.side(), link: link.clone() };
        send(&mut carrier, &hello.encode()).await?;
        let (agreed, side, theirs) = match Message::decode(&read_message(&mut carrier).await?)? {
            Message::Accept { agreed, side, resume_for } => (agreed, side, resume_for),
            Message::Refuse(refusal) => return Err(HelloError::Refused(refusal)),
            _ => return Err(HelloError::Unexpected),
        };
        let link = link.filter(|_| agreed.contain(Features::LINK));
        Ok(local.session(carrier, &side, link, theirs))
    })
    .await
}

/// Service side: gives a link its next carrier. An error that says "session lost" has ended the link.
pub async fn offer_resume(mut carrier: BoxedCarrier, link: &LinkControl, local: &LocalHello) -> Result<(), HelloError> {
    in_time(async {
        let resume = Resume {
            required: Features::LINK,
            instance: local.instance,
            boot: local.boot,
            link: link.id(),
            nonce: random()?,
            epoch: link.next_epoch(),
            positions: link.positions(),
        };
        let offer = ResumeOffer::new(&resume, link.secret().clone());
        send(&mut carrier, offer.hello()).await?;
        let answer = read_message(&mut carrier).await?;
        let (positions, confirm) = offer.answered(&answer).map_err(|error| failed_resume(link, error))?;
        send(&mut carrier, &confirm).await?;
        Ok(link.attach(carrier, resume.epoch, positions)?)
    })
    .await
}

/// Device side: answers the hello of a service.
pub async fn receive(
    mut carrier: BoxedCarrier,
    local: &LocalHello,
    links: &dyn LinkTable,
) -> Result<Received, HelloError> {
    in_time(async {
        let hello = read_message(&mut carrier).await?;
        match Message::decode(&hello) {
            Ok(Message::New { required, optional, side, link }) => {
                let admitted = check_required(required)
                    .and_then(|()| links.admit(&PeerHello::of(&side)).map_err(Refusal::NotAdmitted));
                match admitted {
                    Ok(()) => accept(carrier, local, &side, optional, link).await.map(Received::New),
                    Err(refusal) => Err(refuse(&mut carrier, refusal).await),
                }
            }
            Ok(Message::Resume(resume)) => resume_link(carrier, &hello, resume, links).await.map(Received::Resumed),
            Ok(_) => Err(HelloError::Unexpected),
            Err(HelloFault::Version(version)) => {
                let refusal = Refusal::Unsupported(format!("version {version}; this side speaks version {VERSION}"));
                refuse(&mut carrier, refusal).await;
                Err(HelloError::Version(version))
            }
            Err(fault) => Err(fault.into()),
        }
    })
    .await
}

async fn accept(
    mut carrier: BoxedCarrier,
    local: &LocalHello,
    side: &Side,
    offered: Features,
    link: Option<NewLink>,
) -> Result<Session, HelloError> {
    let wanted = if local.resume_for.is_zero() { Features::NONE } else { Features::LINK };
    let link = link.filter(|_| offered.and(wanted).contain(Features::LINK));
    let agreed = if link.is_some() { Features::LINK } else { Features::NONE };
    let accept = Message::Accept { agreed, side: local.side(), resume_for: local.resume_for };
    send(&mut carrier, &accept.encode()).await?;
    let theirs = link.as_ref().map_or(Duration::ZERO, |link| link.resume_for);
    Ok(local.session(carrier, side, link, theirs))
}

async fn resume_link(
    mut carrier: BoxedCarrier,
    hello: &[u8],
    resume: Resume,
    links: &dyn LinkTable,
) -> Result<LinkControl, HelloError> {
    if let Err(refusal) = check_required(resume.required) {
        return Err(refuse(&mut carrier, refusal).await);
    }
    let Some(link) = links.find(&resume.link) else {
        return Err(refuse(&mut carrier, Refusal::UnknownLink).await);
    };
    let positions = match link.asked(resume.epoch) {
        Ok(positions) => positions,
        Err(AttachError::Stale) => return Err(refuse(&mut carrier, Refusal::Stale).await),
        Err(AttachError::Ended(reason)) => {
            return Err(refuse(&mut carrier, Refusal::SessionLost(reason.to_string())).await);
        }
    };
    let answer = ResumeAnswer::new(hello, resume, link.secret().clone(), random()?, positions);
    send(&mut carrier, answer.answer()).await?;
    let confirm = read_message(&mut carrier).await?;
    let proven = answer.confirmed(&confirm).map_err(|error| failed_resume(&link, error))?;
    link.attach(carrier, proven.epoch, proven.positions)?;
    Ok(link)
}

/// A resume that proves the session lost ends the link; any other failure costs only the carrier.
fn failed_resume(link: &LinkControl, error: ResumeError) -> HelloError {
    match error {
        ResumeError::Malformed(fault) => fault.into(),
        ResumeError::Unexpected => HelloError::Unexpected,
        ResumeError::WrongProof => {
            link.fail(EndReason::Violation(Violation::WrongProof));
            HelloError::WrongProof
        }
        ResumeError::Refused(refusal) => {
            match &refusal {
                Refusal::UnknownLink => {
                    link.fail(EndReason::SessionLost("the other side does not know the link any more".to_owned()));
                }
                Refusal::SessionLost(text) => link.fail(EndReason::SessionLost(text.clone())),
                Refusal::Stale | Refusal::NotAdmitted(_) | Refusal::Unsupported(_) => {}
            }
            HelloError::Refused(refusal)
        }
    }
}

fn check_required(required: Features) -> Result<(), Refusal> {
    if Features::KNOWN.contain(required) {
        return Ok(());
    }
    Err(Refusal::Unsupported(format!("required features {:#x}", required.0 & !Features::KNOWN.0)))
}

/// Says no. The answer is the error to return; that the refusal could not be sent changes nothing.
async fn refuse(carrier: &mut BoxedCarrier, refusal: Refusal) -> HelloError {
    let sent = send(carrier, &Message::Refuse(refusal.clone()).encode()).await;
    if sent.is_ok() {
        let _ = carrier.shutdown().await;
    }
    HelloError::Turned(refusal)
}

async fn in_time<T>(hello: impl Future<Output = Result<T, HelloError>>) -> Result<T, HelloError> {
    tokio::time::timeout(TIMEOUT, hello).await.unwrap_or(Err(HelloError::Timeout(TIMEOUT)))
}

async fn send(carrier: &mut BoxedCarrier, message: &[u8]) -> io::Result<()> {
    carrier.write_all(message).await?;
    carrier.flush().await
}

/// Reads one message and not a byte more: what follows belongs to the link or the mux.
async fn read_message(carrier: &mut BoxedCarrier) -> Result<Vec<u8>, HelloError> {
    let mut message = vec![0; PREFIX];
    let mut have = 0;
    while have < message.len() {
        match carrier.read(&mut message[have..]).await? {
            0 => return Err(HelloError::Io(io::ErrorKind::UnexpectedEof.into())),
            count => have += count,
        }
        if let Some(length) = message_length(&message[..have])? {
            message.resize(length, 0);
        }
    }
    Ok(message)
}

fn random<const N: usize>() -> Result<[u8; N], HelloError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| HelloError::Io(io::Error::other(error)))?;
    Ok(bytes)
}

impl LocalHello {
    fn side(&self) -> Side {
        Side {
            instance: self.instance,
            boot: self.boot,
            max_channels: self.max_channels,
            receive_window: self.receive_window,
        }
    }

    fn new_link(&self) -> Result<Option<NewLink>, HelloError> {
        if self.resume_for.is_zero() {
            return Ok(None);
        }
        let secret = Secret::new(random::<32>()?);
        Ok(Some(NewLink { id: LinkId(random()?), secret, resume_for: self.resume_for }))
    }

    fn session(&self, carrier: BoxedCarrier, side: &Side, link: Option<NewLink>, theirs: Duration) -> Session {
        let peer = PeerHello::of(side);
        let Some(link) = link else { return Session { io: SessionIo::Bare(carrier), link: None, peer } };
        let options = Options {
            receive_window: self.receive_window,
            peer_window: side.receive_window,
            initial_window: self.links.initial_window,
            max_window: self.links.budget.per_link(),
            resume_for: self.resume_for.min(theirs),
        };
        let (io, control) = Link::begin(link.id, link.secret, options, self.links.clone(), carrier);
        Session { io: SessionIo::Link(io), link: Some(control), peer }
    }
}

impl PeerHello {
    fn of(side: &Side) -> Self {
        Self {
            instance: side.instance,
            boot: side.boot,
            max_channels: side.max_channels,
            receive_window: side.receive_window,
        }
    }
}

impl HelloError {
    /// Whether the link that was to be resumed is over: only a new session helps.
    pub fn is_session_lost(&self) -> bool {
        match self {
            Self::Refused(Refusal::UnknownLink | Refusal::SessionLost(_)) | Self::WrongProof | Self::Ended(_) => true,
            Self::WrongMagic
            | Self::Timeout(_)
            | Self::Version(_)
            | Self::Malformed(_)
            | Self::Unexpected
            | Self::Refused(_)
            | Self::Turned(_)
            | Self::Stale
            | Self::Io(_) => false,
        }
    }
}

impl From<HelloFault> for HelloError {
    fn from(fault: HelloFault) -> Self {
        match fault {
            HelloFault::Magic => Self::WrongMagic,
            HelloFault::Version(version) => Self::Version(version),
            HelloFault::Length | HelloFault::Kind(_) | HelloFault::Field(_) => Self::Malformed(fault),
        }
    }
}

impl From<AttachError> for HelloError {
    fn from(error: AttachError) -> Self {
        match error {
            AttachError::Stale => Self::Stale,
            AttachError::Ended(reason) => Self::Ended(reason),
        }
    }
}

impl fmt::Debug for SessionIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
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

impl Tunnel for BoxedCarrier {}

impl Tunnel for SessionIo {
    fn poll_turn(self: Pin<&mut Self>, cx: &mut Context<'_>, most: usize) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Link(link) => Pin::new(link).poll_turn(cx, most),
            Self::Bare(carrier) => Pin::new(carrier).poll_turn(cx, most),
        }
    }

    fn poll_write_turn(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &mut BytesMut) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Link(link) => Pin::new(link).poll_write_turn(cx, bytes),
            Self::Bare(carrier) => Pin::new(carrier).poll_write_turn(cx, bytes),
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

#[cfg(test)]
mod tests;
