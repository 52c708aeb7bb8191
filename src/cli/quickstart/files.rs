//! The folder of a quickstart: the same files that a real set-up has.
//!
//! Owns their contents and the ports in them. Does not run anything.
//! Invariant: a second run in the same folder finds the same addresses, and changes only where the demo listens.

use std::{
    fs, io,
    io::Write as _,
    net::{SocketAddr, TcpListener},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use crate::{
    base::Identity,
    cli::{
        api::Api,
        args::HubAccess,
        exit::{Failure, Outcome},
        init::{self, CA_FILE, OWNER_FILE},
        registry,
    },
    config::ServiceConfig,
};

/// The device's ID.
pub(super) const DEVICE: &str = "quickstart-device";
/// The target and forward that always exist.
pub(super) const WEB: &str = "web";
/// The target and forward that exist if there is an sshd.
const SSH: &str = "ssh";
/// Ports that are nice to remember; others are taken if they are in use.
const NICE_PORTS: [(&str, u16); 6] = [
    ("hub", 8443),
    ("web", 8080),
    ("ssh", 2222),
    ("hub-metrics", 9464),
    ("device-metrics", 9465),
    ("service-metrics", 9466),
];

pub(super) struct Files<'a> {
    pub(super) dir: &'a Path,
    pub(super) demo: SocketAddr,
    pub(super) sshd: bool,
}

impl Files<'_> {
    /// `hub.toml` with everything that `culvert hub init` makes.
    pub(super) fn hub(&self) -> Outcome<PathBuf> {
        let file = self.dir.join("hub.toml");
        if !file.exists() {
            let plan = init::Plan {
                dir: self.dir.into(),
                // The C SDK wants a dot in the name.
                hostname: "127.0.0.1".into(),
                also: vec!["localhost".into(), "::1".into()],
                listen: free("hub").map_err(Failure::unavailable)?,
                mqtt_listen: None,
                given: None,
            };
            init::init(&plan)?;
            let metrics = metrics("hub").map_err(Failure::unavailable)?;
            append(&file, &metrics).map_err(Failure::unavailable)?;
        }
        Ok(file)
    }

    /// Registers the device at the running hub and writes `device.toml`.
    pub(super) async fn device(&self) -> Outcome {
        let access = HubAccess {
            connection_string_file: Some(self.dir.join(OWNER_FILE)),
            ca_file: Some(self.dir.join(CA_FILE)),
        };
        let connection = self.dir.join("device.connection");
        if !connection.exists() {
            let device: Identity = DEVICE.parse().map_err(Failure::software)?;
            let string = registry::register(&Api::open(&access)?, &device, None).await?;
            let text = string.expose();
            write_new(&connection, text.expose(), 0o600).map_err(Failure::unavailable)?;
        }
        let mut text = self.common("device").map_err(Failure::unavailable)?;
        text.push_str(&target(WEB, self.demo));
        if self.sshd {
            text.push_str(&target(SSH, SocketAddr::from(([127, 0, 0, 1], 22))));
        }
        let file = self.dir.join("device.toml");
        // The demo listens elsewhere in every run; a person's own targets belong into targets.d.
        fs::write(&file, text).with_context(|| file.display().to_string()).map_err(Failure::unavailable)
    }

    /// `service.toml` with a forward for each target.
    pub(super) fn service(&self) -> Outcome<PathBuf> {
        let file = self.dir.join("service.toml");
        let make = || {
            let mut text = self.common("service")?;
            text.push_str(&forward(WEB)?);
            if self.sshd {
                text.push_str(&forward(SSH)?);
            }
            write_new(&file, text.as_bytes(), 0o644)
        };
        if !file.exists() {
            let service = self.dir.join("keys/service.primary");
            self.service_connection(&service).map_err(Failure::unavailable)?;
            make().map_err(Failure::unavailable)?;
        }
        Ok(file)
    }

    fn service_connection(&self, key: &Path) -> anyhow::Result<()> {
        let owner = fs::read_to_string(self.dir.join(OWNER_FILE))?;
        let mut string: crate::auth::ConnectionString = owner.parse()?;
        string.owner = crate::auth::Owner::Policy("service".parse()?);
        string.credential = crate::auth::Credential::Key(crate::auth::key::decode_key(&fs::read_to_string(key)?)?);
        write_new(&self.dir.join("service.connection"), string.expose().expose(), 0o600)
    }

    fn common(&self, role: &str) -> anyhow::Result<String> {
        let inside = |name: &str| toml::Value::from(self.dir.join(name).display().to_string()).to_string();
        Ok(format!(
            "connection_string_file = \"{role}.connection\"\nca_file = \"{CA_FILE}\"\nstate_dir = {}\n\
             control_socket = {}\n{}",
            inside(&format!("{role}-state")),
            inside(&format!("{role}.sock")),
            metrics(role)?,
        ))
    }
}

fn metrics(role: &str) -> anyhow::Result<String> {
    Ok(format!("\n[metrics]\nlisten = \"{}\"\n", free(&format!("{role}-metrics"))?))
}

fn target(name: &str, address: SocketAddr) -> String {
    format!("\n[[target]]\nname = \"{name}\"\naddress = \"{address}\"\n")
}

fn forward(name: &str) -> anyhow::Result<String> {
    let listen = free(name)?;
    Ok(format!("\n[[forward]]\nname = \"{name}\"\nlisten = \"{listen}\"\ndevice = \"{DEVICE}\"\ntarget = \"{name}\"\n"))
}

/// The nice port of that purpose, or one that the kernel picks.
fn free(purpose: &str) -> io::Result<SocketAddr> {
    let nice = NICE_PORTS.iter().find(|(name, _)| *name == purpose).map_or(0, |(_, port)| *port);
    let listener = TcpListener::bind(("127.0.0.1", nice)).or_else(|_| TcpListener::bind(("127.0.0.1", 0)))?;
    listener.local_addr()
}

fn write_new(path: &Path, contents: &[u8], mode: u32) -> anyhow::Result<()> {
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    file.and_then(|mut file| file.write_all(contents)).with_context(|| path.display().to_string())
}

fn append(path: &Path, text: &str) -> anyhow::Result<()> {
    let file = fs::OpenOptions::new().append(true).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes())).with_context(|| path.display().to_string())
}

/// What a person can do now.
pub(super) fn what_to_try(dir: &Path, config: &ServiceConfig) -> String {
    let dir = dir.display();
    let listen = |name: &str| {
        let rule = config.forwards.iter().find(|rule| rule.name.as_str() == name)?;
        Some((rule.listen.host()?.to_owned(), rule.listen.port()?))
    };
    let mut lines =
        vec!["\nHub, device and service are running, on loopback only. Try, in another terminal:\n".to_owned()];
    if let Some((host, port)) = listen(WEB) {
        lines.push(format!("    curl http://{host}:{port}/"));
    }
    if let Some((host, port)) = listen(SSH) {
        lines.push(format!("    ssh -p {port} {host}"));
        lines.push(format!("    ssh -o ProxyCommand='culvert connect --config {dir}/service.toml %n ssh' {DEVICE}"));
    }
    lines.push(format!(
        "    culvert connect --config {dir}/service.toml {DEVICE} web      # type: GET / HTTP/1.0 and two returns"
    ));
    lines.push(format!("    culvert registry --connection-string-file {dir}/{OWNER_FILE} list"));
    lines.push(format!("    culvert logs --config {dir}/hub.toml"));
    if let Some(metrics) = config.metrics.listen {
        lines.push(format!("    curl http://{metrics}/metrics"));
    }
    lines.push(format!(
        "\nThe files are in {dir}; edit service.toml while it runs, and see what changes. Ctrl-C ends it.\n"
    ));
    lines.join("\n")
}
