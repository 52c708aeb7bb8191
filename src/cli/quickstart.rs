//! `culvert quickstart`: everything in one process, to try it.
//!
//! Owns the folder's files, the demo target and what is printed. Does not know how a role works: each runs as the
//! daemon it always is. Invariant: nothing listens beyond loopback, and files that exist are used, not replaced.

mod demo;
mod files;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::anyhow;
use tokio::{net::TcpStream, task::JoinSet, time::Instant};
use tokio_util::sync::CancellationToken;

use self::files::Files;
use super::{
    args::QuickstartArgs,
    daemon::{self, Running},
    exit::{Failure, Outcome},
    say,
};
use crate::{
    config::{Load, Loaded, ServiceConfig, load_device, load_hub, load_service},
    device::Device,
    hub::Hub,
    service::Service,
    telemetry::{ForwardHealth, LogFormat, LogHandle, LogOptions, log, metrics},
};

/// From the start of hub and device until the first echo came through, on a slow machine.
const USABLE_WITHIN: Duration = Duration::from_secs(20);
/// Between looks.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Is there an sshd? It is on loopback.
const SSHD_TIMEOUT: Duration = Duration::from_millis(500);

/// Runs the command.
pub(super) fn run(args: &QuickstartArgs) -> Outcome {
    let folder = Folder::open(args.dir.as_deref())?;
    // For a person at a terminal, also if it is a pipe.
    let options = LogOptions { format: LogFormat::Text, ..LogOptions::default() };
    let log = log::init(&options).map_err(Failure::software)?;
    metrics::count_panics();
    daemon::run_to_end(play(&folder.path, log))
}

async fn play(dir: &Path, log: LogHandle) -> Outcome {
    let demo = demo::Demo::bind().await.map_err(Failure::unavailable)?;
    let files = Files { dir, demo: demo.addr(), sshd: has_sshd().await };
    let hub_file = files.hub()?;
    let hub = daemon::start::<Hub>(&hub_file, loaded(load_hub(&hub_file))?, log.clone()).await?;
    let mut running = JoinSet::new();
    let stop = CancellationToken::new();
    running.spawn(demo.run(stop.clone()));
    let mut daemons = JoinSet::new();
    daemons.spawn(hub.run());

    files.device().await?;
    let device_file = dir.join("device.toml");
    let device = daemon::start::<Device>(&device_file, loaded(load_device(&device_file))?, log.clone()).await?;
    daemons.spawn(device.run());
    let service_file = files.service()?;
    let config = loaded(load_service(&service_file))?;
    let forwards = config.config.clone();
    let service = daemon::start::<Service>(&service_file, config, log).await?;
    let usable = usable(service.handle());
    daemons.spawn(service.run());
    match usable.await {
        // It runs, whether or not somebody reads this.
        Ok(()) => say::line(files::what_to_try(dir, &forwards)).unwrap_or_default(),
        Err(reason) => tracing::error!("the demo is not usable yet: {reason}"),
    }
    let ended = all(daemons).await;
    stop.cancel();
    while running.join_next().await.is_some() {}
    ended
}

fn loaded<T: Load>(result: Result<Loaded<T>, crate::config::LoadError>) -> Outcome<Loaded<T>> {
    result.map_err(Failure::config)
}

/// Waits until an echo came back through the device stream.
async fn usable(service: Arc<dyn Running<ServiceConfig>>) -> Result<(), String> {
    let deadline = Instant::now() + USABLE_WITHIN;
    loop {
        match service.forward(files::WEB).await {
            ForwardHealth::Usable => return Ok(()),
            other if Instant::now() > deadline => return Err(format!("{other:?}")),
            _ => tokio::time::sleep(LOOK_EVERY).await,
        }
    }
}

/// A signal ends all three; a failure of one is the failure of all.
async fn all(mut daemons: JoinSet<Outcome>) -> Outcome {
    while let Some(ended) = daemons.join_next().await {
        ended.map_err(Failure::software)??;
    }
    Ok(())
}

async fn has_sshd() -> bool {
    let connect = TcpStream::connect(("127.0.0.1", 22));
    matches!(tokio::time::timeout(SSHD_TIMEOUT, connect).await, Ok(Ok(_)))
}

/// The folder; removed again unless the person named it.
struct Folder {
    path: PathBuf,
    temporary: bool,
}

impl Folder {
    fn open(given: Option<&Path>) -> Outcome<Self> {
        let path = match given {
            Some(dir) => std::path::absolute(dir).map_err(Failure::usage)?,
            None => std::env::temp_dir().join(format!("culvert-quickstart-{}", std::process::id())),
        };
        use std::os::unix::fs::DirBuilderExt as _;
        let made = std::fs::DirBuilder::new().recursive(given.is_some()).mode(0o700).create(&path);
        made.map_err(|error| Failure::unavailable(anyhow!("{}: {error}", path.display())))?;
        Ok(Self { path, temporary: given.is_none() })
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if self.temporary {
            // What cannot be removed is in the temporary folder.
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}
