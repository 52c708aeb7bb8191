//! One control session: a device's MQTT connection, from CONNECT to its end.
//!
//! Owns the order of a session's life, what each packet means, and which topics exist (wire.md, sections b and j).
//! Does not know how the bytes arrived (TLS on 8883 or a WebSocket), what an invitation is for, or SQL.
//! Invariant: nothing a device sends before it is authenticated is kept, and afterwards at most
//! `wire::MAX_PACKET` bytes of input and `wire::MAX_OUTPUT` bytes of answers wait for it.

mod filters;
mod login;
mod sessions;
#[cfg(test)]
pub(in crate::hub) mod testing;
#[cfg(test)]
mod tests;
mod wire;

use std::{net::SocketAddr, time::Duration};

use rustls_pki_types::CertificateDer;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, sleep_until, timeout},
};

use self::{
    filters::Filters,
    login::{Login, LoginError},
    wire::{Wire, WireError},
};
use super::{
    courier::{self, Answer, Attachment, Invitation, ToDevice},
    metrics::Counted,
    shared::HubShared,
};
use crate::proto::{
    control::{DeviceTopic, StreamRequest},
    mqtt::{ConnectCode, MqttError, Packet, PacketId, Publish, Subscribe},
};

pub use login::{fuzz_certificate, fuzz_login};
pub(in crate::hub) use sessions::Sessions;

/// CONNECT must have arrived within this time (threats.md, row 13).
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
/// How long a refusal may take to reach the peer.
const REFUSAL_LIMIT: Duration = Duration::from_secs(5);
/// A session whose peer sends nothing for this long is dead, whatever keepalive it asked for: IoT Hub's documented
/// maximum (1,177 s x 1.5).
const MAX_SILENCE: Duration = Duration::from_secs(1767);

/// Who is at the other end of a connection, as far as the connection tells.
#[derive(Debug, Clone)]
pub struct PeerInfo {
    /// Its address.
    pub addr: SocketAddr,
    /// Its certificate chain, leaf first, if it showed one. The handshake proved that it holds the leaf's key.
    pub certificates: Vec<CertificateDer<'static>>,
}

/// Why a control session is over. Display is for the log.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The device sent DISCONNECT.
    #[error("the device disconnected")]
    Left,
    /// The connection ended without DISCONNECT.
    #[error("the connection was lost")]
    Lost(#[source] Option<std::io::Error>),
    /// No CONNECT came in time.
    #[error("no CONNECT within {} s", CONNECT_LIMIT.as_secs())]
    NoConnect,
    /// The device was silent for longer than it promised.
    #[error("the device was silent for 1.5 times its keepalive")]
    Silent,
    /// The device took no byte of what was sent for too long.
    #[error("the device does not read")]
    Stalled,
    /// It broke the protocol.
    #[error("protocol violation")]
    Malformed(#[source] MqttError),
    /// It sent a packet that has no place there.
    #[error("unexpected packet: {0}")]
    Unexpected(&'static str),
    /// It was not let in.
    #[error("login refused")]
    Refused(#[source] LoginError),
    /// The hub has as many sessions as it may have.
    #[error("the hub is full")]
    Full,
    /// The time of its token or certificate is over.
    #[error("the token or certificate expired")]
    Expired,
    /// It was disabled, removed, or lost the credential it came with.
    #[error("the credential was revoked")]
    Revoked,
    /// A newer session of the same identity took its place.
    #[error("taken over by a newer session")]
    TakenOver,
    /// The hub ends.
    #[error("the hub is shutting down")]
    Shutdown,
}

impl End {
    /// The metric's label.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Lost(_) => "lost",
            Self::NoConnect | Self::Silent => "timeout",
            Self::Stalled => "stalled",
            Self::Malformed(_) | Self::Unexpected(_) => "protocol_error",
            Self::Refused(_) => "unauthorized",
            Self::Full => "full",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
            Self::TakenOver => "taken_over",
            Self::Shutdown => "shutdown",
        }
    }

    /// The WebSocket close code and reason that tell the device, where there is a WebSocket.
    pub fn close(&self) -> (u16, &'static str) {
        match self {
            Self::Left | Self::Lost(_) => (1000, ""),
            Self::NoConnect | Self::Silent | Self::Stalled => (1002, "timeout"),
            Self::Malformed(_) | Self::Unexpected(_) => (1002, "protocol violation"),
            Self::Refused(_) => (1008, "unauthorized"),
            Self::Full => (1013, "try again later"),
            Self::Expired => (1008, "token expired"),
            Self::Revoked => (1008, "credential revoked"),
            Self::TakenOver => (4001, "taken over"),
            Self::Shutdown => (1012, "service restart"),
        }
    }
}

impl From<WireError> for End {
    fn from(error: WireError) -> Self {
        match error {
            WireError::Eof => Self::Lost(None),
            WireError::Io(error) => Self::Lost(Some(error)),
            WireError::Mqtt(error) => Self::Malformed(error),
            WireError::Silent => Self::Silent,
            WireError::Stalled => Self::Stalled,
        }
    }
}

/// Serves one control session on `io` until it ends, and says why it did. The caller closes `io`, over a WebSocket
/// with [`End::close`]. `authenticated` is called once, as soon as the peer is no stranger any more.
pub async fn serve<IO>(io: &mut IO, peer: &PeerInfo, hub: &HubShared, authenticated: impl FnOnce()) -> End
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let mut wire = Wire::new(io, hub.config().limits.write_stall_timeout);
    let opened = tokio::select! {
        opened = timeout(CONNECT_LIMIT, open(&mut wire, peer, hub)) => opened.unwrap_or(Err(End::NoConnect)),
        () = hub.shutdown.cancelled() => Err(End::Shutdown),
    };
    let login = match opened {
        Ok(login) => login,
        Err(end) => {
            hub.metrics.control_sessions.with_label_values(&[end.label()]).inc();
            log_refusal(&end, peer);
            return end;
        }
    };
    authenticated();
    let began = Instant::now();
    hub.metrics.control_sessions.with_label_values(&["accepted"]).inc();
    let _counted = Counted::new(&hub.metrics.device_sessions);
    tracing::info!(device = %login.identity, peer = %peer.addr, culvert = login.is_culvert, "control session opened");
    let end = attached(&mut wire, peer, hub, &login).await;
    hub.metrics.control_sessions.with_label_values(&[end.label()]).inc();
    let seconds = began.elapsed().as_secs();
    tracing::info!(device = %login.identity, peer = %peer.addr, seconds, reason = %Chain(&end), "control session ended");
    end
}

/// CONNECT, and the answer if it is a refusal.
async fn open<IO>(wire: &mut Wire<'_, IO>, peer: &PeerInfo, hub: &HubShared) -> Result<Login, End>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let (code, end) = match wire.packet().await {
        Ok(Packet::Connect(connect)) => match login::log_in(&connect, peer, hub) {
            Ok(login) if has_room(hub, &login) => return Ok(login),
            Ok(_) => {
                hub.metrics.limited.with_label_values(&["max_sessions"]).inc();
                (ConnectCode::ServerUnavailable, End::Full)
            }
            Err(error) => (error.code(), End::Refused(error)),
        },
        Ok(_) => return Err(End::Unexpected("the first packet is not CONNECT")),
        Err(WireError::Mqtt(error @ MqttError::Level(_))) => (ConnectCode::UnacceptableProtocol, End::Malformed(error)),
        Err(error) => return Err(error.into()),
    };
    wire.send(&Packet::ConnAck { session_present: false, code });
    // The session ends for the reason already known, whether or not the peer reads it.
    let _ = timeout(REFUSAL_LIMIT, wire.flush()).await;
    Err(end)
}

/// A device that replaces its own session needs no room: it would be locked out by what it came to end.
fn has_room(hub: &HubShared, login: &Login) -> bool {
    let allowed = i64::try_from(hub.config().limits.max_sessions).unwrap_or(i64::MAX);
    hub.metrics.device_sessions.get() < allowed || hub.courier.is_attached(&login.identity)
}

/// The session proper: everything between CONNACK and the end.
async fn attached<IO>(wire: &mut Wire<'_, IO>, peer: &PeerInfo, hub: &HubShared, login: &Login) -> End
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let (sender, mut inbox) = courier::inbox_for(hub.config().limits.max_pending_per_device);
    let attachment = hub.courier.attach(&login.identity, &login.admission, peer.addr, sender);
    let known = hub.sessions.resume(&login.identity, login.clean_session);
    let filters = known.unwrap_or_default();
    let mut session = Session { hub, login, attachment: &attachment, filters, twin_version: 1 };
    wire.admit(login.silence_limit().min(MAX_SILENCE));
    wire.send(&Packet::ConnAck { session_present: known.is_some(), code: ConnectCode::Accepted });
    if filters.stream_requests() {
        attachment.subscribed();
    }
    let mut revoked = std::pin::pin!(hub.revoked(&login.identity, &login.admission));
    loop {
        let event = tokio::select! {
            biased;
            () = hub.shutdown.cancelled() => Event::End(End::Shutdown),
            () = attachment.taken_over() => Event::End(End::TakenOver),
            () = &mut revoked => Event::End(End::Revoked),
            () = expiry(login.expires) => Event::End(End::Expired),
            Some(ToDevice::Invite(invitation)) = inbox.recv(), if wire.has_room() => Event::Invite(invitation),
            packet = wire.packet() => packet.map_or_else(|error| Event::End(error.into()), Event::Packet),
        };
        if let Err(end) = session.apply(event, wire) {
            if matches!(end, End::Revoked) {
                hub.sessions.forget(&login.identity);
            }
            return end;
        }
    }
}

async fn expiry(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

/// What a session waits for.
enum Event {
    Packet(Packet),
    Invite(Invitation),
    End(End),
}

/// What changes while a session lasts.
struct Session<'a> {
    hub: &'a HubShared,
    login: &'a Login,
    attachment: &'a Attachment,
    filters: Filters,
    /// Twins are not stored; the version lets SDKs see that their report arrived.
    twin_version: u64,
}

impl Session<'_> {
    fn apply<IO>(&mut self, event: Event, wire: &mut Wire<'_, IO>) -> Result<(), End> {
        match event {
            Event::End(end) => return Err(end),
            Event::Invite(invitation) => wire.send(&self.invite(invitation)),
            Event::Packet(packet) => return self.packet(packet, wire),
        }
        Ok(())
    }

    fn packet<IO>(&mut self, packet: Packet, wire: &mut Wire<'_, IO>) -> Result<(), End> {
        match packet {
            Packet::Publish(publish) => self.publish(&publish, wire),
            Packet::Subscribe(subscribe) => self.subscribe(subscribe, wire),
            Packet::Unsubscribe { id, filters } => self.unsubscribe(id, &filters, wire),
            Packet::PingReq => wire.send(&Packet::PingResp),
            // Nothing of ours is published with QoS 1; an answer to nothing is harmless.
            Packet::PubAck(_) => {}
            Packet::Disconnect => return Err(End::Left),
            Packet::Connect(_) => return Err(End::Unexpected("a second CONNECT")),
            Packet::ConnAck { .. } | Packet::SubAck { .. } | Packet::UnsubAck(_) | Packet::PingResp => {
                return Err(End::Unexpected("a packet that only servers send"));
            }
        }
        Ok(())
    }

    fn invite(&self, invitation: Invitation) -> Packet {
        let Invitation { stream, url, ticket, policy, rid } = invitation;
        let request = StreamRequest { stream, rid, url, ticket, policy: Some(policy) };
        Packet::Publish(Publish::at_most_once(request.to_topic(self.login.is_culvert), ""))
    }

    fn publish<IO>(&mut self, publish: &Publish, wire: &mut Wire<'_, IO>) {
        match DeviceTopic::parse(&publish.topic) {
            DeviceTopic::Answer(answer) => {
                let accepted = answer.is_accepted();
                self.attachment.answer(&answer.rid, Answer { accepted, reason: answer.reason });
            }
            DeviceTopic::Telemetry(of) if of == self.login.identity => self.hub.metrics.telemetry.inc(),
            DeviceTopic::TwinGet { rid } => {
                let version = self.twin_version;
                let twin = format!("{{\"desired\":{{\"$version\":1}},\"reported\":{{\"$version\":{version}}}}}");
                self.answer_twin(format!("$iothub/twin/res/200/?$rid={rid}"), twin, wire);
            }
            DeviceTopic::TwinPatch { rid } => {
                self.twin_version += 1;
                let topic = format!("$iothub/twin/res/204/?$rid={rid}&$version={}", self.twin_version);
                self.answer_twin(topic, String::new(), wire);
            }
            DeviceTopic::Lost(sid) => self.hub.device_lost_leg(&self.login.identity, sid),
            DeviceTopic::Telemetry(_) | DeviceTopic::MethodResponse | DeviceTopic::Other => {
                tracing::debug!(device = %self.login.identity, ?publish, "dropped a message on a topic of no use here");
            }
        }
        // Without its PUBACK an SDK sends the message again after 60 s, and reconnects in the end (wire.md, b).
        if let Some(id) = publish.id {
            wire.send(&Packet::PubAck(id));
        }
    }

    fn answer_twin<IO>(&self, topic: String, payload: String, wire: &mut Wire<'_, IO>) {
        if self.filters.twin_answers() {
            wire.send(&Packet::Publish(Publish::at_most_once(topic, payload)));
        }
    }

    fn subscribe<IO>(&mut self, subscribe: Subscribe, wire: &mut Wire<'_, IO>) {
        let id = subscribe.id;
        let asked = subscribe.filters.iter();
        let granted = asked.map(|(filter, qos)| self.filters.add(filter, *qos, &self.login.identity)).collect();
        self.keep();
        wire.send(&Packet::SubAck { id, granted });
        // After SUBACK, so that the first request is not ahead of it.
        if self.filters.stream_requests() {
            self.attachment.subscribed();
        }
    }

    fn unsubscribe<IO>(&mut self, id: PacketId, filters: &[String], wire: &mut Wire<'_, IO>) {
        filters.iter().for_each(|filter| self.filters.remove(filter));
        self.keep();
        if !self.filters.stream_requests() {
            self.attachment.unsubscribed();
        }
        wire.send(&Packet::UnsubAck(id));
    }

    fn keep(&self) {
        if !self.login.clean_session {
            self.hub.sessions.keep(&self.login.identity, self.filters);
        }
    }
}

fn log_refusal(end: &End, peer: &PeerInfo) {
    match end {
        End::Refused(error) => {
            tracing::warn!(device = error.identity().map(tracing::field::display), peer = %peer.addr,
                reason = %Chain(error), "device refused");
        }
        other => tracing::debug!(peer = %peer.addr, reason = %Chain(other), "no control session"),
    }
}

/// An error and its causes on one line.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}
