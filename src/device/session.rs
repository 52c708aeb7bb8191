//! One control session: MQTT over a carrier, from CONNECT to its end.
//!
//! Owns the packets of a device's side. Does not know when to open a session, nor what a stream request leads to.
//! Invariant: [`ControlSession::next`] may be cancelled at any await without losing or repeating a byte.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf as _, BytesMut};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use tokio::{
    io::{AsyncRead as _, AsyncWrite as _, AsyncWriteExt as _, ReadBuf},
    time::{Instant, Sleep, sleep, timeout},
};
use tracing::debug;

use crate::{
    agent::{CarrierFailure, Failure, HubCarrier, HubClient},
    proto::{
        control::{REQUEST_FILTER, StreamRequest},
        mqtt::{Connect, ConnectCode, MqttError, Packet, PacketId, Publish, Qos, Subscribe, decode, encode},
    },
    transport::carrier::{CarrierError, CarrierMonitor},
};

/// The path of MQTT over WebSocket (wire.md, b).
const PATH: &str = "/$iothub/websocket?iothub-no-client-cert=true";
/// The same, when the TLS connection proves who we are.
const PATH_X509: &str = "/$iothub/websocket";
/// CONNECT to SUBACK; the C SDK waits 30 s for CONNACK alone.
const OPEN_LIMIT: Duration = Duration::from_secs(30);
/// What we promise the hub: it drops us after 1.5 times this much silence.
const KEEP_ALIVE: Duration = Duration::from_secs(60);
/// PINGREQ this often, well within the promise.
const PING: Duration = Duration::from_secs(45);
/// Packets from the hub: a stream request with its URL and ticket is below 4 KiB.
const MAX_PACKET: usize = 64 * 1024;
/// Packets to the hub that have not been sent yet; answers are below 1 KiB, and 64 streams may be asked for at once.
const MAX_UNSENT: usize = 128 * 1024;
/// A newer session of the same identity has taken over (wire.md, j).
const TAKEN_OVER: u16 = 4001;
/// The version of the service API whose names we use.
const API_VERSION: &str = "2020-09-30";

/// Why there is no control session, or no longer.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    /// No carrier.
    #[error("{0}")]
    Carrier(#[source] Box<CarrierFailure>),
    /// The hub said no.
    #[error("the hub does not accept device {identity}: {}", refusal(*code))]
    Refused { identity: String, code: ConnectCode },
    /// The hub did not answer.
    #[error("the hub did not finish the MQTT handshake within {} s", OPEN_LIMIT.as_secs())]
    Timeout,
    /// Another session took over.
    #[error(
        "another connection with this device's identity took over: is the same connection string in use on two machines?"
    )]
    TakenOver,
    /// The carrier ended.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The hub broke the protocol.
    #[error("the hub sent something else than MQTT 3.1.1: {0}")]
    Mqtt(#[from] MqttError),
    /// The hub left out or mixed up a step.
    #[error("the hub sent an unexpected MQTT packet")]
    Unexpected,
    /// The hub does not grant stream requests.
    #[error("the hub does not grant stream requests to this device")]
    NotGranted,
}

fn refusal(code: ConnectCode) -> &'static str {
    match code {
        ConnectCode::NotAuthorized | ConnectCode::BadCredentials => {
            "not authorized. Is the device registered and enabled, is its key current, is this machine's clock right?"
        }
        ConnectCode::IdentifierRejected => "its ID is not allowed",
        ConnectCode::ServerUnavailable => "the hub is busy",
        ConnectCode::UnacceptableProtocol => "it does not speak MQTT 3.1.1",
        ConnectCode::Accepted => "accepted",
    }
}

impl SessionError {
    /// What it means for the next attempt.
    pub(super) fn failure(&self) -> Failure {
        match self {
            Self::Carrier(error) => error.failure(),
            Self::Timeout | Self::Io(_) => Failure::Path,
            Self::TakenOver => Failure::Answered(Some(Duration::from_secs(30))),
            Self::Refused { .. } | Self::Mqtt(_) | Self::Unexpected | Self::NotGranted => Failure::Answered(None),
        }
    }

    fn of_io(error: io::Error) -> Self {
        match CarrierError::of(&error) {
            Some(CarrierError::Closed { code: TAKEN_OVER, .. }) => Self::TakenOver,
            _ => Self::Io(error),
        }
    }
}

/// An open control session that is subscribed for stream requests.
pub(super) struct ControlSession {
    carrier: HubCarrier,
    inbox: BytesMut,
    outbox: BytesMut,
    unflushed: bool,
    ping: Pin<Box<Sleep>>,
}

impl ControlSession {
    /// Connects, logs in and subscribes. Calls `reached` before it logs in, with which the hub ends an earlier session.
    pub(super) async fn open(hub: &HubClient, reached: impl FnOnce() + Send) -> Result<Self, SessionError> {
        let token = hub.token();
        let path = if token.is_some() { PATH } else { PATH_X509 };
        let carrier = hub.control_carrier(path).await.map_err(|error| SessionError::Carrier(Box::new(error)))?;
        reached();
        let ping = Box::pin(sleep(PING));
        let mut session = Self { carrier, inbox: BytesMut::new(), outbox: BytesMut::new(), unflushed: false, ping };
        timeout(OPEN_LIMIT, session.log_in(hub)).await.map_err(|_| SessionError::Timeout)??;
        Ok(session)
    }

    async fn log_in(&mut self, hub: &HubClient) -> Result<(), SessionError> {
        let identity = hub.identity().map(ToString::to_string).unwrap_or_default();
        let product = utf8_percent_encode(hub.user_agent(), NON_ALPHANUMERIC);
        let host = &hub.connection().host;
        self.send(&Packet::Connect(Box::new(Connect {
            clean_session: true,
            keep_alive: KEEP_ALIVE.as_secs() as u16,
            client_id: identity.clone(),
            will: None,
            username: Some(format!("{host}/{identity}/?api-version={API_VERSION}&DeviceClientType={product}")),
            password: hub.token(),
        })))?;
        match self.packet().await? {
            Packet::ConnAck { code: ConnectCode::Accepted, .. } => {}
            Packet::ConnAck { code, .. } => return Err(SessionError::Refused { identity, code }),
            _ => return Err(SessionError::Unexpected),
        }
        let filters = vec![(REQUEST_FILTER.to_owned(), Qos::AtMostOnce)];
        self.send(&Packet::Subscribe(Subscribe { id: PacketId::MIN, filters }))?;
        loop {
            match self.packet().await? {
                Packet::SubAck { granted, .. } if granted.iter().all(Option::is_some) => return Ok(()),
                Packet::SubAck { .. } => return Err(SessionError::NotGranted),
                // The hub may answer the subscription with a request before its SUBACK: asked again by the hub.
                _ => {}
            }
        }
    }

    /// The next stream request. Moves outgoing packets meanwhile.
    pub(super) async fn next(&mut self) -> Result<StreamRequest, SessionError> {
        loop {
            match self.packet().await? {
                Packet::Publish(publish) => {
                    if let Some(id) = publish.id {
                        self.send(&Packet::PubAck(id))?;
                    }
                    match StreamRequest::parse(&publish.topic) {
                        Ok(request) => return Ok(request),
                        Err(error) => debug!("a message that is no stream request: {error}"),
                    }
                }
                Packet::PingResp | Packet::SubAck { .. } | Packet::PubAck(_) | Packet::UnsubAck(_) => {}
                _ => return Err(SessionError::Unexpected),
            }
        }
    }

    /// Publishes on a topic, without payload; sent while [`next`](Self::next) is awaited.
    pub(super) fn publish(&mut self, topic: &str) -> Result<(), SessionError> {
        self.send(&Packet::Publish(Publish::at_most_once(topic, bytes::Bytes::new())))
    }

    /// A view of the carrier.
    pub(super) fn monitor(&self) -> CarrierMonitor {
        self.carrier.monitor()
    }

    /// Leaves in an orderly way: what was published goes out first.
    pub(super) async fn leave(mut self) {
        let goodbye = async {
            self.send(&Packet::Disconnect)?;
            self.carrier.write_all(&self.outbox).await?;
            self.carrier.flush().await?;
            self.carrier.shutdown().await?;
            Ok::<(), SessionError>(())
        };
        // A hub that does not take our leave is left all the same.
        let _ = timeout(Duration::from_secs(2), goodbye).await;
    }

    fn send(&mut self, packet: &Packet) -> Result<(), SessionError> {
        if self.outbox.len() > MAX_UNSENT {
            return Err(SessionError::Io(io::Error::other("the hub does not read its control connection")));
        }
        Ok(encode(packet, &mut self.outbox)?)
    }

    async fn packet(&mut self) -> Result<Packet, SessionError> {
        loop {
            if let Some(packet) = decode(&mut self.inbox, MAX_PACKET)? {
                return Ok(packet);
            }
            std::future::poll_fn(|cx| self.poll_io(cx)).await.map_err(SessionError::of_io)?;
        }
    }

    /// Ready when bytes have come in.
    fn poll_io(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.ping.as_mut().poll(cx).is_ready() {
            self.ping.as_mut().reset(Instant::now() + PING);
            // It waits for the next poll if the timer is not armed again now.
            let _ = self.ping.as_mut().poll(cx);
            encode(&Packet::PingReq, &mut self.outbox).map_err(io::Error::other)?;
        }
        if let Poll::Ready(Err(error)) = self.poll_send(cx) {
            return Poll::Ready(Err(error));
        }
        let mut chunk = [0; 4096];
        let mut buffer = ReadBuf::new(&mut chunk);
        ready!(Pin::new(&mut self.carrier).poll_read(cx, &mut buffer))?;
        if buffer.filled().is_empty() {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the hub closed the session")));
        }
        self.inbox.extend_from_slice(buffer.filled());
        Poll::Ready(Ok(()))
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.outbox.is_empty() {
            let sent = ready!(Pin::new(&mut self.carrier).poll_write(cx, &self.outbox))?;
            self.outbox.advance(sent);
            self.unflushed = true;
        }
        if self.unflushed {
            ready!(Pin::new(&mut self.carrier).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }
}
