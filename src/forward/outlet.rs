//! The device's end of a flow: from a target's name to a joined socket.
//!
//! Owns the rules about who may reach which target, the dialling, and the life of a flow at the device. Does not know
//! device streams or the hub. Invariant: nothing is dialled that no target of the configuration names, and the
//! address that is checked is the address that is connected.

use std::{
    future::poll_fn,
    io,
    net::IpAddr,
    sync::{Arc, RwLock},
    time::Duration,
};

use bytes::BytesMut;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::{Instant, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    endpoint_of,
    flow::{Abort, DropIsReset, FlowEnd, Reason, join},
    metrics::TargetMetrics,
};
use crate::{
    base::{Gate, Name, Pass},
    config::TargetRule,
    proto::open::{MAX_HEADER, OpenRequest, Verdict},
    transport::{
        mux::Channel,
        net::{self, ConnectError, Socket},
    },
};

/// How long a service may take to send the header of a channel that it has opened. It sends both at once.
const HEADER_LIMIT: Duration = Duration::from_secs(10);
/// How long a verdict may wait for room; a service that does not read it is gone.
const VERDICT_LIMIT: Duration = Duration::from_secs(30);

/// Why a target was not joined. Display names the target and what to do.
#[derive(Debug, thiserror::Error)]
pub enum OutletError {
    /// No target of that name.
    #[error("this device has no target {0:?}; its device.toml names the targets it has")]
    Unknown(Name),
    /// The policy is not among the target's.
    #[error(
        "target {target} is not allowed for {}; see `policies` of the target in device.toml",
        policy.as_ref().map_or_else(|| "a service without a policy".into(), |policy| format!("policy {policy}"))
    )]
    NotAllowed {
        /// The target.
        target: Name,
        /// The policy that asked, as the hub told it.
        policy: Option<Name>,
    },
    /// As many connections as there may be.
    #[error("target {target} has {limit} connections, as many as it may")]
    Limit {
        /// The target.
        target: Name,
        /// The limit.
        limit: usize,
    },
    /// The dial failed.
    #[error("target {target} at {address}: {source}")]
    Dial {
        /// The target.
        target: Name,
        /// Its address in the configuration.
        address: String,
        /// What happened.
        source: ConnectError,
    },
}

impl OutletError {
    /// The error as the service learns it.
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Unknown(_) => Verdict::UnknownTarget,
            Self::NotAllowed { .. } => Verdict::NotAllowed,
            Self::Limit { .. } => Verdict::Limit,
            Self::Dial { source, .. } => dial_verdict(source),
        }
    }
}

fn dial_verdict(error: &ConnectError) -> Verdict {
    match error {
        ConnectError::Timeout { .. } => Verdict::Timeout,
        ConnectError::Resolve { .. } | ConnectError::NoAddress(_) => Verdict::Unresolved,
        ConnectError::NotAllowed { .. } => Verdict::NotAllowed,
        ConnectError::Failed { source, .. } | ConnectError::Unix { source, .. } => match source.kind() {
            io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => Verdict::Refused,
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable | io::ErrorKind::AddrNotAvailable => {
                Verdict::Unreachable
            }
            io::ErrorKind::TimedOut => Verdict::Timeout,
            _ => Verdict::Failed,
        },
    }
}

/// The targets of a device, and the connections to them. Clones share everything.
#[derive(Clone)]
pub struct Outlet {
    targets: Arc<RwLock<Arc<Vec<Target>>>>,
    connections: Gate,
    metrics: TargetMetrics,
}

#[derive(Clone)]
struct Target {
    rule: TargetRule,
    connections: Gate,
}

/// A dialled target: the socket, and what counts it until it is dropped.
pub struct Dialled {
    /// The connection.
    pub socket: Socket,
    /// The rule it follows.
    pub rule: TargetRule,
    _passes: [Pass; 2],
}

impl Outlet {
    /// An outlet with these targets, at most `limit` connections over all of them.
    pub fn new(targets: &[TargetRule], limit: usize, metrics: TargetMetrics) -> Self {
        let outlet = Self { targets: Arc::default(), connections: Gate::new(limit), metrics };
        outlet.set_targets(targets, limit);
        outlet
    }

    /// New connections follow these targets and this limit over all of them. Connections that are open stay, and
    /// still count.
    pub fn set_targets(&self, rules: &[TargetRule], limit: usize) {
        self.connections.set_limit(limit);
        let old = self.targets();
        let gate = |rule: &TargetRule| {
            let known = old.iter().find(|target| target.rule.name == rule.name);
            let gate = known.map_or_else(|| Gate::new(rule.max_connections), |target| target.connections.clone());
            gate.set_limit(rule.max_connections);
            gate
        };
        let target = |rule: &TargetRule| Target { rule: rule.clone(), connections: gate(rule) };
        let targets = Arc::new(rules.iter().map(target).collect());
        *self.targets.write().unwrap_or_else(std::sync::PoisonError::into_inner) = targets;
    }

    /// The metrics that count the targets' flows.
    pub fn metrics(&self) -> &TargetMetrics {
        &self.metrics
    }

    fn targets(&self) -> Arc<Vec<Target>> {
        self.targets.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Checks the rules without dialling.
    pub fn check(&self, name: &Name, policy: Option<&Name>) -> Result<TargetRule, OutletError> {
        self.find(name, policy).map(|target| target.rule)
    }

    fn find(&self, name: &Name, policy: Option<&Name>) -> Result<Target, OutletError> {
        let targets = self.targets();
        let target = targets
            .iter()
            .find(|target| target.rule.name == *name)
            .ok_or_else(|| OutletError::Unknown(name.clone()))?;
        if !target.rule.allows(policy) {
            return Err(OutletError::NotAllowed { target: name.clone(), policy: policy.cloned() });
        }
        Ok(target.clone())
    }

    /// Dials a target on behalf of a policy.
    pub async fn dial(&self, name: &Name, policy: Option<&Name>) -> Result<Dialled, OutletError> {
        let target = self.find(name, policy)?;
        let rule = target.rule;
        let limited = |limit| OutletError::Limit { target: name.clone(), limit };
        let own = target.connections.enter().ok_or_else(|| limited(rule.max_connections))?;
        let all = self.connections.enter().ok_or_else(|| limited(self.connections.limit()))?;
        let socket = dial_address(&rule).await.map_err(|source| OutletError::Dial {
            target: name.clone(),
            address: rule.address.to_string(),
            source,
        })?;
        // Until the flow is done: a target that was dialled in vain must not take that for an empty connection.
        socket.arm(DropIsReset::Yes);
        Ok(Dialled { socket, rule, _passes: [own, all] })
    }

    /// Joins a dialled target with the far side until the flow has ended, and says so in one line.
    pub async fn join<F: Abort>(&self, dialled: Dialled, far: F, half_close: bool, stop: CancellationToken) {
        let begun = Instant::now();
        let name = dialled.rule.name.clone();
        let open = self.metrics.begin(&name);
        let options = self.metrics.options(&name, half_close);
        let end = join(dialled.socket, far, options, stop.cancelled()).await;
        drop(open);
        self.metrics.ended(name.as_str(), end.reason);
        let seconds = begun.elapsed().as_secs_f64();
        let FlowEnd { reason, detail, sent, received } = end;
        let (reason, detail, target) = (reason.as_str(), detail.unwrap_or_default(), &name);
        match reason {
            "done" | "stopped" => info!(%target, reason, sent, received, seconds, "connection ended"),
            _ => info!(%target, reason, detail, sent, received, seconds, "connection ended by a reset"),
        }
    }

    /// Notes and logs a connection whose client left before the target had answered.
    fn forsaken(&self, name: &Name, policy: Option<&Name>) {
        // Names that peers make up do not become labels.
        if self.find(name, policy).is_ok() {
            self.metrics.ended(name.as_str(), Reason::PeerReset);
        }
        info!(target = %name, reason = Reason::PeerReset.as_str(), "the client left before the target had answered");
    }

    /// Notes and logs a connection that did not come to be.
    pub fn refuse(&self, error: &OutletError, policy: Option<&Name>) {
        let label = match error {
            // Names that peers make up do not become labels.
            OutletError::Unknown(_) => "",
            OutletError::NotAllowed { target, .. }
            | OutletError::Limit { target, .. }
            | OutletError::Dial { target, .. } => target.as_str(),
        };
        self.metrics.ended(label, Reason::Refused(error.verdict()));
        let policy = policy.map_or("(none)", Name::as_str);
        warn!(policy, reason = error.verdict().as_str(), "{error}");
    }
}

/// Dials the rule's address. Host names are resolved now; link-local addresses, where clouds keep their metadata
/// services, are refused unless the rule permits them or names one literally.
async fn dial_address(rule: &TargetRule) -> Result<Socket, ConnectError> {
    let endpoint = endpoint_of(&rule.address);
    let literal = rule.address.host().is_some_and(|host| host.parse::<IpAddr>().is_ok());
    let may_link_local = rule.allow_link_local || literal;
    let allowed = move |address: IpAddr| may_link_local || !is_link_local(address);
    net::connect(&endpoint, rule.connect_timeout, &allowed).await
}

/// 169.254.0.0/16, fe80::/10, and the first spelled as an IPv6 address.
fn is_link_local(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}

/// The life of a channel at the device: read its header, check, dial, answer, join.
pub async fn serve_channel(channel: Channel, outlet: Outlet, policy: Option<Name>, stop: CancellationToken) {
    let mut channel = channel;
    let request = tokio::select! {
        request = timeout(HEADER_LIMIT, read_header(&mut channel)) => request,
        () = stop.cancelled() => return,
    };
    match request {
        Ok(Ok(OpenRequest::Target(name))) => serve_target(channel, outlet, &name, policy.as_ref(), stop).await,
        Ok(Ok(OpenRequest::Echo)) => {
            // A health check that fails half-way has said what it had to say.
            let _ = tokio::select! {
                done = echo(channel) => done,
                () = stop.cancelled() => Ok(()),
            };
        }
        Ok(Err(error)) => info!(%error, "a channel ended before its header"),
        Err(_) => info!("a channel sent no header within {} s", HEADER_LIMIT.as_secs()),
    }
}

async fn serve_target(
    mut channel: Channel,
    outlet: Outlet,
    name: &Name,
    policy: Option<&Name>,
    stop: CancellationToken,
) {
    let dialled = tokio::select! {
        // A client that has gone while the link was detached is not dialled for.
        biased;
        _ = poll_fn(|cx| channel.poll_failed(cx)) => return outlet.forsaken(name, policy),
        dialled = outlet.dial(name, policy) => dialled,
        () = stop.cancelled() => return,
    };
    match dialled {
        Ok(dialled) => match answer(&mut channel, Verdict::Ok, "").await {
            Ok(()) => outlet.join(dialled, channel, true, stop).await,
            Err(_) => outlet.forsaken(name, policy),
        },
        Err(error) => {
            outlet.refuse(&error, policy);
            // The service resets its side on this; if it is gone already there is nobody to tell.
            if answer(&mut channel, error.verdict(), &error.to_string()).await.is_ok() {
                let _ = timeout(VERDICT_LIMIT, farewell(channel)).await;
            }
        }
    }
}

/// Ends our direction and waits for the service to end the channel: a drop would reset it under the verdict.
async fn farewell(mut channel: Channel) -> io::Result<()> {
    channel.shutdown().await?;
    let mut rest = [0; 4096];
    while channel.read(&mut rest).await? > 0 {}
    Ok(())
}

async fn answer(channel: &mut Channel, verdict: Verdict, text: &str) -> io::Result<()> {
    let mut bytes = BytesMut::new();
    verdict.encode(text, &mut bytes);
    let write = async {
        channel.write_all(&bytes).await?;
        channel.flush().await
    };
    timeout(VERDICT_LIMIT, write).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Reads exactly the header: three bytes tell its length.
async fn read_header(channel: &mut Channel) -> io::Result<OpenRequest> {
    let mut bytes = [0; MAX_HEADER];
    let mut filled = 0;
    let mut wanted = 3;
    loop {
        channel.read_exact(&mut bytes[filled..wanted]).await?;
        filled = wanted;
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        if let Some((request, _)) = OpenRequest::decode(&bytes[..filled]).map_err(invalid)? {
            return Ok(request);
        }
        wanted = (3 + usize::from(bytes[2])).min(MAX_HEADER);
    }
}

/// Sends everything back until the service ends the channel.
async fn echo(mut channel: Channel) -> io::Result<()> {
    answer(&mut channel, Verdict::Ok, "").await?;
    let mut bytes = [0; 4096];
    loop {
        match channel.read(&mut bytes).await? {
            0 => return channel.shutdown().await,
            n => {
                channel.write_all(&bytes[..n]).await?;
                channel.flush().await?;
            }
        }
    }
}
