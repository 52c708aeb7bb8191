//! The three daemons of a lab, each the real program on its own host.
//!
//! Owns their files and processes. Does not know the sessions that run through them. Invariant: a daemon's log goes on
//! in the same file over its restarts.

use std::{
    fs::{self, File},
    io::Write as _,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use super::lab::{HUB, Host, Lab, run};

/// Another build of the daemons than the one beside the tests, in the environment: an optimised one.
const PROGRAM: &str = "CULVERT_BIN";
/// For anything that takes no time on an idle machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// What is logged: enough to see why a resume took long.
const LOG: &str = "[log]\nlevel = \"info,culvert::service=debug,culvert::device=debug,culvert::transport::link=debug\"\nformat = \"text\"\n";

/// A forward and its target, both at this port of their host's loopback.
pub(crate) type Route = (&'static str, u16);

fn program() -> String {
    std::env::var(PROGRAM).unwrap_or_else(|_| env!("CARGO_BIN_EXE_culvert").into())
}

/// The running daemons.
pub(crate) struct Daemons {
    dir: PathBuf,
    hub: Child,
    device: Child,
    service: Child,
}

impl Daemons {
    /// Sets everything up and starts it.
    pub(crate) fn start(lab: &Lab, routes: &[Route], resume_for: &str) -> Self {
        let dir = lab.dir.clone();
        let init = run(Command::new(program())
            .args(["hub", "init", "--hostname", HUB, "--listen", "0.0.0.0:443", "--mqtt-listen", "off", "--dir"])
            .arg(dir.join("hub")));
        assert!(init.status.success(), "{}", String::from_utf8_lossy(&init.stderr));
        let service = String::from_utf8(init.stdout).unwrap();
        let service = service.lines().find(|line| line.starts_with("HostName=")).expect("a connection string").trim();
        fs::write(dir.join("service.connection"), service).unwrap();
        let hub_file = dir.join("hub/hub.toml");
        let text = fs::read_to_string(&hub_file).unwrap();
        fs::write(&hub_file, format!("{}\n{LOG}", own_places(&dir, "hub", &text))).unwrap();
        let hub = spawn(lab, &dir, Host::Hub, "hub");

        let add = run(lab
            .on(Host::Hub, &program())
            .args(["registry", "add", "pump", "--connection-string-file"])
            .arg(dir.join("hub/owner.connection")));
        assert!(add.status.success(), "{}", String::from_utf8_lossy(&add.stderr));
        fs::write(dir.join("device.connection"), add.stdout).unwrap();
        for role in ["device", "service"] {
            let ca = "ca_file = \"hub/ca.pem\"\n";
            let mut text =
                format!("connection_string_file = \"{role}.connection\"\n{ca}resume_for = \"{resume_for}\"\n");
            for (name, port) in routes {
                text += &if role == "device" {
                    format!("[[target]]\nname = \"{name}\"\naddress = \"127.0.0.1:{port}\"\n")
                } else {
                    let to = format!("device = \"pump\"\ntarget = \"{name}\"\nconnect_timeout = \"90s\"\n");
                    format!("[[forward]]\nname = \"{name}\"\nlisten = \"127.0.0.1:{port}\"\n{to}")
                };
            }
            fs::write(dir.join(format!("{role}.toml")), own_places(&dir, role, &text) + LOG).unwrap();
        }
        let device = spawn(lab, &dir, Host::Device, "device");
        let service = spawn(lab, &dir, Host::Service, "service");
        Self { dir, hub, device, service }
    }

    /// Ends a daemon without a chance to say goodbye, and starts it again.
    pub(crate) fn crash(&mut self, lab: &Lab, host: Host) {
        self.child(host).kill().unwrap();
        self.child(host).wait().unwrap();
        self.begin_again(lab, host);
    }

    /// Ends a daemon as systemd does, and starts it again.
    pub(crate) fn restart(&mut self, lab: &Lab, host: Host) {
        self.terminate(host);
        self.begin_again(lab, host);
    }

    /// Ends a daemon as systemd does.
    pub(crate) fn terminate(&mut self, host: Host) {
        let child = self.child(host);
        let killed = run(Command::new("kill").args(["-TERM", &child.id().to_string()]));
        assert!(killed.status.success());
        assert!(child.wait().unwrap().success(), "the {host:?} daemon did not end in order");
    }

    /// Starts a daemon that has ended; it is ready when this returns.
    pub(crate) fn begin_again(&mut self, lab: &Lab, host: Host) {
        *self.child(host) = spawn(lab, &self.dir, host, role(host));
    }

    fn child(&mut self, host: Host) -> &mut Child {
        match host {
            Host::Hub => &mut self.hub,
            Host::Device => &mut self.device,
            Host::Service => &mut self.service,
            Host::Router => panic!("no daemon runs on the router"),
        }
    }

    /// Everything a daemon has said.
    pub(crate) fn log(&self, host: Host) -> String {
        fs::read_to_string(self.dir.join(format!("{}.log", role(host)))).unwrap()
    }

    /// Writes a line into all logs, to find the place again.
    pub(crate) fn note(&self, words: &str) {
        for host in [Host::Hub, Host::Device, Host::Service] {
            let _ = writeln!(log_file(&self.dir, role(host)), "######## {words}");
        }
    }
}

impl Drop for Daemons {
    fn drop(&mut self) {
        for child in [&mut self.service, &mut self.device, &mut self.hub] {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn role(host: Host) -> &'static str {
    match host {
        Host::Hub => "hub",
        Host::Device => "device",
        Host::Service | Host::Router => "service",
    }
}

/// Puts a role's state, socket and metrics where they are in nobody's way.
fn own_places(dir: &Path, role: &str, text: &str) -> String {
    let kept = text.lines().filter(|line| !line.starts_with("state_dir") && !line.starts_with("control_socket"));
    let kept: String = kept.map(|line| format!("{line}\n")).collect();
    let places = format!(
        "state_dir = {:?}\ncontrol_socket = {:?}\n",
        dir.join(format!("{role}-state")),
        dir.join(format!("{role}.sock"))
    );
    format!("{places}{kept}")
}

fn log_file(dir: &Path, role: &str) -> File {
    File::options().append(true).create(true).open(dir.join(format!("{role}.log"))).unwrap()
}

/// Starts a daemon and waits until it says READY=1, as systemd does.
#[allow(clippy::zombie_processes, reason = "the caller waits, and the lab ends what a failed test leaves")]
fn spawn(lab: &Lab, dir: &Path, host: Host, role: &str) -> Child {
    let notify = dir.join(format!("{role}.notify"));
    let _ = fs::remove_file(&notify);
    let socket = UnixDatagram::bind(&notify).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let config = if role == "hub" { dir.join("hub/hub.toml") } else { dir.join(format!("{role}.toml")) };
    let (out, err) = (log_file(dir, role), log_file(dir, role));
    let mut command = lab.on(host, &program());
    command.args([role, "--config"]).arg(config).env("NOTIFY_SOCKET", &notify);
    let child = command.stdin(Stdio::null()).stdout(out).stderr(err).spawn().unwrap();
    let mut message = [0; 4096];
    loop {
        let length =
            socket.recv(&mut message).unwrap_or_else(|error| panic!("the {role} daemon is not ready: {error}"));
        if message[..length].split(|byte| *byte == b'\n').any(|line| line == b"READY=1") {
            return child;
        }
    }
}
