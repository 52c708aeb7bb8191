//! `culvert connect`: standard input and output joined to a target, as ssh's ProxyCommand wants it.
//!
//! Owns the choice between the running service daemon and a device stream of its own. Does not know how either
//! reaches the device. Invariant: nothing but the target's bytes is written to standard output, and a cut ends with
//! a code that is not zero.

use std::{
    fs, io,
    path::PathBuf,
    pin::Pin,
    task::{Context, Poll, ready},
};

use anyhow::{Context as _, anyhow};
use prometheus::Registry;
use tokio::{
    io::{AsyncWrite, AsyncWriteExt as _},
    signal::unix::{SignalKind, signal},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

use super::{
    args::{ConnectArgs, Role},
    daemon::Daemon,
    exit::{Failure, Outcome},
    places,
};
use crate::{
    agent::control_socket::{Answer, CallError, ControlHandler as _, JoinIo, Reply, Request, call},
    config::{Environment, Load as _, ServiceConfig, load_service},
    service::Service,
};

/// Runs the command.
pub(super) async fn run(args: &ConnectArgs) -> Outcome {
    let request = Request::Connect { device: args.device.clone(), target: args.target.clone() };
    let mut forbidden = None;
    for socket in sockets(args) {
        match call(&socket, &request).await {
            Ok(Answer::Joined(joined)) => {
                let ran = joined.run(tokio::io::stdin(), Output::new()).await;
                return judge(args, ran);
            }
            Ok(Answer::Json(_)) => return Err(not_joined()),
            Err(CallError::NotRunning { .. }) => {}
            // Somebody else's daemon is no reason not to go another way.
            Err(error @ CallError::Forbidden { .. }) => forbidden = Some(error),
            Err(error) => return Err(Failure::unavailable(error)),
        }
    }
    match (own_config(args), forbidden) {
        (Ok(config), _) => alone(args, config, request).await,
        (Err(_), Some(forbidden)) => Err(Failure::unavailable(forbidden)),
        (Err(problem), None) => Err(problem),
    }
}

/// The sockets of service daemons that may run, the likeliest first.
fn sockets(args: &ConnectArgs) -> Vec<PathBuf> {
    let configured = args.config.as_deref().and_then(|file| ServiceConfig::load(file, &places::environment(file)).ok());
    match configured {
        Some(loaded) => loaded.config.control_socket.into_iter().collect(),
        None => Environment::of_process().control_sockets(Role::Service.name()),
    }
}

/// What a service daemon would be started with.
fn own_config(args: &ConnectArgs) -> Outcome<ServiceConfig> {
    let file = places::config_file(args.config.as_deref(), Role::Service);
    let loaded = load_service(&file).map_err(|error| {
        let hint = "no culvert service is running here, and its configuration cannot be used for a stream of our own";
        Failure::config(anyhow!("{hint}:\n{error}"))
    })?;
    Ok(loaded.config)
}

/// Opens a device stream of its own, as a service daemon without forwards would.
async fn alone(args: &ConnectArgs, config: ServiceConfig, request: Request) -> Outcome {
    let state = StateDir::new().map_err(Failure::unavailable)?;
    let config = ServiceConfig { forwards: Vec::new(), state_dir: state.0.clone(), control_socket: None, ..config };
    let service = <Service as Daemon>::bind(config, &Registry::new()).await?;
    let handle = service.handle();
    let shutdown = CancellationToken::new();
    let mut running = JoinSet::new();
    running.spawn(service.run(shutdown.clone()));
    let ended = tokio::select! {
        reply = handle.handle(request) => match reply {
            Reply::Join(target) => tokio::select! {
                ran = async {
                    join(target).await?;
                    handle.delivered().await;
                    Ok(())
                } => judge(args, ran),
                stopped = stopped() => stopped,
            },
            Reply::Refused(reason) => Err(Failure::unavailable(anyhow!(reason))),
            Reply::Json(_) => Err(not_joined()),
        },
        stopped = stopped() => stopped,
    };
    // The device is told that the link has ended; otherwise it would keep it for a resume.
    shutdown.cancel();
    while running.join_next().await.is_some() {}
    ended
}

fn not_joined() -> Failure {
    Failure::software(anyhow!("the service did not join"))
}

fn judge(args: &ConnectArgs, ran: io::Result<()>) -> Outcome {
    let what = || format!("the connection to {} at {} was cut", args.target, args.device);
    ran.with_context(what).map_err(Failure::unavailable)
}

/// Both directions, each to its own end; the first cut ends both.
async fn join(target: Box<dyn JoinIo>) -> io::Result<()> {
    let (mut from_target, mut to_target) = tokio::io::split(target);
    let up = async {
        tokio::io::copy(&mut tokio::io::stdin(), &mut to_target).await?;
        to_target.shutdown().await
    };
    let down = async {
        let mut output = Output::new();
        tokio::io::copy(&mut from_target, &mut output).await?;
        output.shutdown().await
    };
    tokio::try_join!(up, down).map(|_| ())
}

/// Standard output, whose end reaches whoever reads it. Rust's own stays open until the process ends, which would wait for
/// standard input: ssh, whose ProxyCommand this is, waited for the end of a connection that the target had closed.
struct Output(tokio::io::Stdout);

impl Output {
    fn new() -> Self {
        Self(tokio::io::stdout())
    }

    fn close() -> io::Result<()> {
        // Where both are one socket, as under inetd, the input is to go on.
        let _ = socket2::SockRef::from(&io::stdout()).shutdown(std::net::Shutdown::Write);
        let nowhere = fs::OpenOptions::new().write(true).open("/dev/null")?;
        Ok(rustix::stdio::dup2_stdout(nowhere)?)
    }
}

impl AsyncWrite for Output {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(Pin::new(&mut self.0).poll_flush(cx))?;
        Poll::Ready(Self::close())
    }
}

/// ssh ends its ProxyCommand by SIGHUP; that is no mistake of anybody's.
async fn stopped() -> Outcome {
    let on = |kind| signal(kind).map_err(Failure::unavailable);
    let mut signals = [on(SignalKind::hangup())?, on(SignalKind::terminate())?, on(SignalKind::interrupt())?];
    let [hangup, terminate, interrupt] = &mut signals;
    tokio::select! {
        _ = hangup.recv() => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

/// Holds an instance ID of this process alone: one that was shared would end a daemon's links.
struct StateDir(PathBuf);

impl StateDir {
    fn new() -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt as _;
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        let path = std::env::temp_dir().join(format!("culvert-connect-{:016x}", u64::from_be_bytes(random)));
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        // What cannot be removed is a small file in the temporary folder.
        let _ = fs::remove_dir_all(&self.0);
    }
}
