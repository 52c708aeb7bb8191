//! Opens the far side of a flow: a channel of the device's tunnel, or a plain device stream of its own.
//!
//! Owns the limits over all forwards and per device. Does not know listeners. Invariant: a far side holds its passes
//! for as long as it lives.

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use bytes::BytesMut;
use futures_util::future::BoxFuture;
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    sync::watch,
    time::{Instant, timeout_at},
};
use tracing::warn;

use super::{
    initiator::{self, InitiateError, Patience},
    joined::Joined,
    tunnels::Tunnels,
};
use crate::{
    agent::{HubClient, PlainStream, control_socket::Reply},
    base::{Gate, Identity, Name, Pass, StreamName},
    config::{ForwardMode, ForwardRule, ServiceLimits},
    forward::{Abort, Connector, OpenFailure, Opened, Reason, RefusedByDevice, Unanswered, Verdicted},
    proto::open::OpenRequest,
    transport::{carrier::CarrierOptions, mux::Channel},
};

/// How long `culvert connect` waits for the device and its target.
const CONNECT_LIMIT: Duration = Duration::from_secs(30);

/// The service's connector. Clones share limits.
#[derive(Clone)]
pub(crate) struct ServiceConnector {
    hub: watch::Receiver<HubClient>,
    tunnels: Tunnels,
    all: Gate,
    /// The limit per device, and the gates of the devices that have connections.
    devices: Arc<Mutex<(usize, HashMap<Identity, Gate>)>>,
}

impl ServiceConnector {
    pub(super) fn new(hub: watch::Receiver<HubClient>, tunnels: Tunnels, limits: &ServiceLimits) -> Self {
        let devices = Arc::new(Mutex::new((limits.max_connections_per_device, HashMap::new())));
        Self { hub, tunnels, all: Gate::new(limits.max_connections), devices }
    }

    /// New connections follow these limits.
    pub(super) fn set_limits(&self, limits: &ServiceLimits) {
        self.all.set_limit(limits.max_connections);
        self.devices.lock().unwrap_or_else(PoisonError::into_inner).0 = limits.max_connections_per_device;
    }

    fn passes(&self, device: &Identity) -> Result<Passes, OpenFailure> {
        let refuse = |what: &str| OpenFailure {
            reason: Reason::Limit,
            detail: format!("as many connections as there may be {what} (see [limits] in service.toml)"),
        };
        let own = {
            let mut devices = self.devices.lock().unwrap_or_else(PoisonError::into_inner);
            let (limit, gates) = &mut *devices;
            // Devices without connections take no memory.
            gates.retain(|_, gate| gate.inside() > 0);
            let gate = gates.entry(device.clone()).or_insert_with(|| Gate::new(*limit));
            gate.set_limit(*limit);
            gate.enter()
        };
        let own = own.ok_or_else(|| refuse("to this device"))?;
        let all = self.all.enter().ok_or_else(|| refuse("over all forwards"))?;
        Ok([own, all])
    }

    /// Opens a channel to a target of a device and writes its header. Device stream and verdict together are waited for
    /// as long as `limit`: a channel can be opened on a link that is detached for the moment, too.
    async fn open_channel(
        &self,
        device: &Identity,
        target: &Name,
        limit: Duration,
    ) -> Result<Verdicted<Channel>, OpenFailure> {
        let deadline = Instant::now() + limit;
        let tunnel = self.tunnels.to(device);
        let mut header = BytesMut::new();
        OpenRequest::Target(target.clone()).encode(&mut header);
        let unavailable = |why: &str| OpenFailure {
            reason: Reason::Unavailable,
            detail: format!("no device stream to {device}: {why}"),
        };
        let open = async {
            loop {
                let mux = tunnel.mux().await.map_err(|why| unavailable(&why))?;
                // A mux that ended in this moment is replaced; the wait for that is bounded by the deadline.
                let Ok(mut channel) = mux.open().await else {
                    tokio::task::yield_now().await;
                    continue;
                };
                if channel.write_all(&header).await.is_ok() && channel.flush().await.is_ok() {
                    return Ok(channel);
                }
            }
        };
        let opened = timeout_at(deadline, open).await;
        let channel = opened.unwrap_or_else(|_| Err(unavailable(&tunnel.why())))?;
        let device = device.clone();
        let why =
            move || format!("no answer from {device} within {} s (device stream: {})", limit.as_secs(), tunnel.why());
        Ok(Verdicted::new(channel).until(deadline, why))
    }

    async fn open_plain(&self, rule: &ForwardRule) -> Result<PlainStream, OpenFailure> {
        let hub = self.hub.borrow().clone();
        let patience = Patience { connect: rule.connect_timeout, response: rule.connect_timeout };
        let stream = StreamName::from(&rule.target);
        let opened = initiator::open(&hub, &rule.identity(), &stream, patience, CarrierOptions::PLAIN, || {}).await;
        let carrier = opened.map_err(|error| plain_failure(&error))?;
        Ok(PlainStream::new(carrier, rule.plain_eof))
    }

    /// Joins a `culvert connect` with a target.
    pub(super) async fn join(&self, device: Identity, target: Name) -> Reply {
        match self.connect(&device, &target).await {
            Ok(far) => Reply::Join(Box::new(Joined::new(far, device, target))),
            Err(failure) => {
                warn!(%device, %target, reason = failure.reason.as_str(), "culvert connect failed: {failure}");
                Reply::Refused(failure.to_string())
            }
        }
    }

    /// Opens a far side and waits for the device's verdict, so that a refusal can still be told in words.
    async fn connect(&self, device: &Identity, target: &Name) -> Result<Held<Verdicted<Channel>>, OpenFailure> {
        let passes = self.passes(device)?;
        let mut channel = self.open_channel(device, target, CONNECT_LIMIT).await?;
        match channel.verdict().await {
            Ok(()) => Ok(Held { far: channel, _passes: passes }),
            Err(error) => {
                let inner = error.get_ref();
                let refused = inner.and_then(|inner| inner.downcast_ref::<RefusedByDevice>());
                let unanswered = inner.is_some_and(|inner| inner.is::<Unanswered>());
                let broken = if unanswered { Reason::Unavailable } else { Reason::PeerReset };
                let reason = refused.map_or(broken, |refused| Reason::Refused(refused.verdict));
                Err(OpenFailure { reason, detail: error.to_string() })
            }
        }
    }
}

impl Connector for ServiceConnector {
    fn open<'a>(&'a self, rule: &'a ForwardRule) -> BoxFuture<'a, Result<Opened, OpenFailure>> {
        Box::pin(async move {
            let device = rule.identity();
            let passes = self.passes(&device)?;
            Ok(match rule.mode {
                ForwardMode::Mux => {
                    let far = self.open_channel(&device, &rule.target, rule.connect_timeout).await?;
                    Box::new(Held { far, _passes: passes }) as Opened
                }
                ForwardMode::Plain => Box::new(Held { far: self.open_plain(rule).await?, _passes: passes }),
            })
        })
    }
}

fn plain_failure(error: &InitiateError) -> OpenFailure {
    let reason = match error {
        InitiateError::Rejected { .. } => Reason::Rejected,
        _ => Reason::Unavailable,
    };
    OpenFailure { reason, detail: error.to_string() }
}

type Passes = [Pass; 2];

/// A far side that holds its passes.
struct Held<F> {
    far: F,
    _passes: Passes,
}

impl<F: AsyncRead + Unpin> AsyncRead for Held<F> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.far).poll_read(cx, buf)
    }
}

impl<F: AsyncWrite + Unpin> AsyncWrite for Held<F> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.far).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.far).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.far).poll_shutdown(cx)
    }
}

impl<F: Abort> Abort for Held<F> {
    fn abort(self) {
        self.far.abort();
    }

    fn abort_behind(self) {
        self.far.abort_behind();
    }

    fn poll_failed(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        self.far.poll_failed(cx)
    }
}
