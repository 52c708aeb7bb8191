//! A forward's listener at the service, and the flows that came in through it.
//!
//! Owns accepting, the rule's own limit, the life of each flow and its closing line. Does not know devices' streams:
//! a [`Connector`] opens the far side. Invariant: every accepted connection ends in [`Shared::close_flow`], once.

use std::{
    io,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::{
    sync::watch,
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{info, warn};

use super::{
    endpoint_of,
    flow::{Abort, DropIsReset, FlowEnd, Reason, join},
    metrics::ForwardMetrics,
};
use crate::{
    config::{ForwardMode, ForwardRule},
    transport::net::{BindError, Endpoint, Listener, Socket},
};

/// How long flows that were cut have to notice; they only have to close their sockets.
const CUT_GRACE: Duration = Duration::from_secs(2);

/// A forward's Unix socket is for the daemon's own user.
const UNIX_MODE: u32 = 0o600;

/// The far side of a flow, ready to carry data.
pub type Opened = Box<dyn FarSide>;

/// What [`Abort`] needs, for a side whose type only its connector knows.
pub trait FarSide: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send {
    /// [`Abort::abort`], boxed.
    fn abort_boxed(self: Box<Self>);
    /// [`Abort::abort_behind`], boxed.
    fn abort_behind_boxed(self: Box<Self>);
    /// [`Abort::poll_failed`].
    fn poll_failed_boxed(&mut self, cx: &mut Context<'_>) -> Poll<io::Error>;
}

impl<T: Abort + Send> FarSide for T {
    fn abort_boxed(self: Box<Self>) {
        self.abort();
    }

    fn abort_behind_boxed(self: Box<Self>) {
        self.abort_behind();
    }

    fn poll_failed_boxed(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        self.poll_failed(cx)
    }
}

impl Abort for Box<dyn FarSide> {
    fn abort(self) {
        self.abort_boxed();
    }

    fn abort_behind(self) {
        self.abort_behind_boxed();
    }

    fn poll_failed(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        (**self).poll_failed_boxed(cx)
    }
}

/// Why the far side of a flow could not be opened. Display is for the closing line.
#[derive(Debug, thiserror::Error)]
#[error("{detail}")]
pub struct OpenFailure {
    /// The reason to count it under.
    pub reason: Reason,
    /// What happened and what to try.
    pub detail: String,
}

/// Opens far sides. The one implementation that matters is the service's.
pub trait Connector: Send + Sync + 'static {
    /// Opens the far side of one flow of this rule, within the rule's connect timeout.
    fn open<'a>(&'a self, rule: &'a ForwardRule) -> BoxFuture<'a, Result<Opened, OpenFailure>>;
}

/// What every inlet of a daemon shares.
#[derive(Clone)]
pub struct InletDeps {
    /// Opens the far sides.
    pub connector: Arc<dyn Connector>,
    /// Counts flows and bytes.
    pub metrics: ForwardMetrics,
}

/// An open listener with its flows. [`close`](Self::close) or drop it.
pub struct Inlet {
    rule: watch::Sender<Arc<ForwardRule>>,
    endpoint: Endpoint,
    accepting: CancellationToken,
    cut: CancellationToken,
    flows: TaskTracker,
    accept_task: JoinHandle<()>,
    metrics: ForwardMetrics,
}

impl Inlet {
    /// Opens the listener and begins to accept.
    pub async fn open(rule: ForwardRule, deps: InletDeps) -> Result<Self, BindError> {
        let wanted = endpoint_of(&rule.listen);
        let listener = Listener::bind(&wanted, UNIX_MODE).await?;
        // The port is known now, even if the rule says 0.
        let endpoint = listener.endpoint().unwrap_or(wanted);
        deps.metrics.set_listening(&rule.name, true);
        let (sender, receiver) = watch::channel(Arc::new(rule));
        let (accepting, cut) = (CancellationToken::new(), CancellationToken::new());
        let flows = TaskTracker::new();
        let metrics = deps.metrics.clone();
        let shared = Shared { deps, rule: receiver, flows: flows.clone(), cut: cut.clone() };
        let stop = accepting.clone();
        // Awaited in `close`, aborted by `drop`.
        let accept_task = TaskTracker::new().spawn(async move {
            tokio::select! {
                () = stop.cancelled() => {}
                () = shared.accept(listener) => {}
            }
        });
        Ok(Self { rule: sender, endpoint, accepting, cut, flows, accept_task, metrics })
    }

    /// Where it listens: the port is known even if the rule says 0.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The rule in force.
    pub fn rule(&self) -> Arc<ForwardRule> {
        self.rule.borrow().clone()
    }

    /// New connections follow this rule; the listener and its flows stay.
    pub fn retarget(&self, rule: ForwardRule) {
        self.rule.send_replace(Arc::new(rule));
    }

    /// Connections open now.
    pub fn flows(&self) -> usize {
        self.flows.len()
    }

    /// Closes the listener, and returns once it is closed. The returned future waits for the flows: they have
    /// `drain` to end by themselves, unless `hurry` resolves first, and are reset after that.
    pub async fn close(mut self, drain: Duration) -> impl Future<Output = ()> + Send + 'static {
        self.accepting.cancel();
        // An error means that it panicked, which the panic hook has counted.
        let _ = (&mut self.accept_task).await;
        self.metrics.forget(&self.rule.borrow().name);
        let (flows, cut) = (self.flows.clone(), self.cut.clone());
        // `drop` must not cut what is to drain.
        self.cut = CancellationToken::new();
        async move {
            flows.close();
            let guard = cut.drop_guard();
            let _ = timeout(drain, flows.wait()).await;
            drop(guard);
            let _ = timeout(CUT_GRACE, flows.wait()).await;
        }
    }
}

impl Drop for Inlet {
    fn drop(&mut self) {
        self.accepting.cancel();
        self.cut.cancel();
    }
}

/// What the accept loop and the flows need.
#[derive(Clone)]
struct Shared {
    deps: InletDeps,
    rule: watch::Receiver<Arc<ForwardRule>>,
    flows: TaskTracker,
    cut: CancellationToken,
}

impl Shared {
    async fn accept(&self, listener: Listener) {
        loop {
            // The listener itself waits out a lack of file descriptors.
            let (socket, _) = listener.accept().await;
            let rule = self.rule.borrow().clone();
            if self.flows.len() >= rule.max_connections {
                socket.reset();
                let detail = format!("the forward has {} connections, as many as it may", rule.max_connections);
                let end = FlowEnd { reason: Reason::Limit, detail: Some(detail), sent: 0, received: 0 };
                self.close_flow(&rule, Instant::now(), end);
                continue;
            }
            let shared = self.clone();
            self.flows.spawn(async move { shared.flow(rule, socket).await });
        }
    }

    /// The life of a flow: open the far side, join, say goodbye.
    async fn flow(&self, rule: Arc<ForwardRule>, socket: Socket) {
        let begun = Instant::now();
        // Whatever ends the wait for the far side: the client must not take it for an empty answer.
        socket.arm(DropIsReset::Yes);
        let open = self.deps.metrics.begin(&rule.name);
        let end = tokio::select! {
            far = self.deps.connector.open(&rule) => match far {
                Ok(far) => {
                    let options = self.deps.metrics.options(&rule.name, rule.mode == ForwardMode::Mux);
                    join(socket, far, options, self.cut.cancelled()).await
                }
                Err(failure) => {
                    socket.reset();
                    FlowEnd { reason: failure.reason, detail: Some(failure.detail), sent: 0, received: 0 }
                }
            },
            () = socket.failed() => {
                // It would take a place for as long as the device is waited for.
                let detail = Some("the client left before the device had answered".into());
                FlowEnd { reason: Reason::LocalReset, detail, sent: 0, received: 0 }
            }
            () = self.cut.cancelled() => FlowEnd { reason: Reason::Stopped, detail: None, sent: 0, received: 0 },
        };
        drop(open);
        self.close_flow(&rule, begun, end);
    }

    /// The one place where a flow ends: one line, one count.
    fn close_flow(&self, rule: &ForwardRule, begun: Instant, end: FlowEnd) {
        self.deps.metrics.ended(&rule.name, end.reason);
        let seconds = begun.elapsed().as_secs_f64();
        let FlowEnd { reason, detail, sent, received } = end;
        let (reason, detail) = (reason.as_str(), detail.unwrap_or_default());
        let (forward, device, target) = (&rule.name, rule.identity(), &rule.target);
        match reason {
            "done" | "stopped" => {
                info!(%forward, %device, %target, reason, sent, received, seconds, "connection ended");
            }
            _ => {
                warn!(%forward, %device, %target, reason, detail, sent, received, seconds, "connection ended by a reset");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt as _, net::TcpStream};

    use super::*;

    /// A device that never answers.
    struct Absent;

    impl Connector for Absent {
        fn open<'a>(&'a self, _: &'a ForwardRule) -> BoxFuture<'a, Result<Opened, OpenFailure>> {
            Box::pin(std::future::pending())
        }
    }

    #[tokio::test]
    async fn a_client_that_waits_for_its_device_is_reset_and_not_ended_when_the_forward_closes() {
        let parsed = ("ssh".parse().unwrap(), "127.0.0.1:0".parse().unwrap());
        let rule = ForwardRule::new(parsed.0, parsed.1, "pump-17".parse().unwrap(), "ssh".parse().unwrap());
        let deps = InletDeps { connector: Arc::new(Absent), metrics: ForwardMetrics::default() };
        let inlet = Inlet::open(rule, deps).await.unwrap();
        let mut client = TcpStream::connect(inlet.endpoint().to_string()).await.unwrap();
        while inlet.flows() == 0 {
            tokio::task::yield_now().await;
        }
        let drained = inlet.close(Duration::ZERO).await;
        let (read, ()) = tokio::join!(client.read_u8(), drained);
        assert_eq!(read.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    }
}
