//! One of culvert's daemons as a process.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use super::{
    metrics::{Page, fetch, value},
    process::Process,
    wait::eventually,
};

/// The binary under test.
pub const CULVERT: &str = env!("CARGO_BIN_EXE_culvert");

/// The command, without what this machine's environment would add.
pub fn culvert() -> Command {
    let mut command = Command::new(CULVERT);
    for variable in ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy", "NOTIFY_SOCKET"] {
        command.env_remove(variable);
    }
    command
}

/// A running daemon.
pub struct Daemon {
    role: &'static str,
    config: PathBuf,
    process: Process,
    metrics: SocketAddr,
}

impl Daemon {
    /// Starts the role and waits until it serves its metrics.
    #[track_caller]
    pub fn start(role: &'static str, config: &Path) -> Self {
        Self::start_with(culvert(), role, config)
    }

    /// The same by another command, which the role and its file are appended to.
    #[track_caller]
    pub fn start_with(mut command: Command, role: &'static str, config: &Path) -> Self {
        let process = Process::start(name_of(role, config), command.arg(role).arg("--config").arg(config));
        let metrics = metrics_address(&process);
        Self { role, config: config.into(), process, metrics }
    }

    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    pub fn config(&self) -> &Path {
        &self.config
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    pub fn metrics_address(&self) -> SocketAddr {
        self.metrics
    }

    /// One page of its loopback listener.
    #[track_caller]
    pub fn page(&self, path: &str) -> Page {
        eventually(&format!("{} to answer {path}", self.role), || fetch(self.metrics, path))
    }

    /// The sum of a metric's samples with these labels.
    #[track_caller]
    pub fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        value(&self.page("/metrics").body, name, labels)
    }

    /// Waits until the metric is as wanted.
    #[track_caller]
    pub fn wait_for_metric(&self, name: &str, labels: &[(&str, &str)], wanted: impl Fn(f64) -> bool) -> f64 {
        let what = format!("{}'s {name}{labels:?}", self.role);
        eventually(&what, || Some(self.metric(name, labels)).filter(|value| wanted(*value)))
    }

    /// Waits until `/readyz` says yes.
    #[track_caller]
    pub fn wait_until_ready(&self) {
        eventually(&format!("{} to be ready", self.role), || (self.page("/readyz").status == 200).then_some(()));
    }

    #[track_caller]
    pub fn wait_for_line(&self, words: &[&str]) -> String {
        self.process.wait_for_line(words)
    }

    #[track_caller]
    pub fn wait_for_line_after(&self, said: usize, words: &[&str]) -> String {
        self.process.wait_for_line_after(said, words)
    }

    /// How many lines it has said so far.
    pub fn said(&self) -> usize {
        self.process.said()
    }

    /// SIGHUP: read the configuration again.
    pub fn hang_up(&self) {
        self.process.signal("HUP");
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// SIGTERM, and its exit code.
    #[track_caller]
    pub fn stop(&mut self) -> Option<i32> {
        self.process.signal("TERM");
        self.process.wait()
    }

    /// Runs it again with the same file.
    #[track_caller]
    pub fn start_again(&mut self) {
        let command = &mut culvert();
        self.process =
            Process::start(name_of(self.role, &self.config), command.arg(self.role).arg("--config").arg(&self.config));
        self.metrics = metrics_address(&self.process);
    }
}

fn name_of(role: &str, config: &Path) -> String {
    format!("culvert {role} --config {}", config.display())
}

/// The daemons of a story listen on ports of the kernel's choice for their metrics, and say which.
#[track_caller]
fn metrics_address(process: &Process) -> SocketAddr {
    let line = process.wait_for_line(&["serving /metrics"]);
    let address =
        line.split("address=").nth(1).and_then(|rest| rest.split([' ', '"', '}']).find(|word| !word.is_empty()));
    address.and_then(|text| text.parse().ok()).unwrap_or_else(|| panic!("no address in {line:?}"))
}
