//! A hub, a device and a service, set up as the README tells a person to.

use std::{collections::BTreeMap, fs, path::PathBuf};

use super::{
    config::{Forward, Target, device_toml, service_toml},
    daemon::{Daemon, culvert},
    port::{free_address, free_port},
    process::run,
    scratch::Scratch,
};

/// The device that most stories have.
pub const DEVICE: &str = "pump-17";

/// What a story wants before it begins.
#[derive(Default)]
pub struct Plan {
    targets: Vec<Target>,
    forwards: Vec<Forward>,
    device_settings: String,
    service_settings: String,
}

impl Plan {
    /// A target of the device, and a forward of the same name to it.
    pub fn target(self, name: &str, address: impl ToString) -> Self {
        self.target_as(Target::new(name, address))
    }

    /// The same, with more settings of the target.
    pub fn target_as(mut self, target: Target) -> Self {
        let forward = Forward::new(&target.name, free_address(), DEVICE, &target.name);
        self.targets.push(target);
        self.forward(forward)
    }

    /// One more forward.
    pub fn forward(mut self, forward: Forward) -> Self {
        self.forwards.retain(|other| other.name != forward.name);
        self.forwards.push(forward);
        self
    }

    pub fn device_settings(mut self, lines: &str) -> Self {
        self.device_settings += lines;
        self
    }

    pub fn service_settings(mut self, lines: &str) -> Self {
        self.service_settings += lines;
        self
    }

    /// Everything runs, and every forward is usable.
    #[track_caller]
    pub fn start(self) -> World {
        let world = self.start_without_waiting();
        world.wait_until_usable();
        world
    }

    /// Everything runs; whether it reaches each other is the story's matter.
    #[track_caller]
    pub fn start_without_waiting(self) -> World {
        let hub = Hub::start();
        let device = hub.device_files(DEVICE, &self.device_settings, &self.targets);
        let service = hub.service_files("service", &self.service_settings, &self.forwards);
        let device = Daemon::start("device", &device);
        let service = Daemon::start("service", &service);
        World { device, service, forwards: listeners(&self.forwards), hub }
    }
}

/// Three daemons, each a process of its own. The fields end in this order: the hub and its folder last.
pub struct World {
    pub service: Daemon,
    pub device: Daemon,
    pub hub: Hub,
    forwards: BTreeMap<String, String>,
}

impl World {
    pub fn plan() -> Plan {
        Plan::default()
    }

    /// Where a forward listens.
    #[track_caller]
    pub fn forward(&self, name: &str) -> &str {
        self.forwards.get(name).unwrap_or_else(|| panic!("no forward {name}"))
    }

    /// A forward's port, for programs that want it apart.
    #[track_caller]
    pub fn port(&self, name: &str) -> String {
        self.forward(name).rsplit(':').next().unwrap().to_owned()
    }

    /// Waits until the service and its device stream are there; on-demand and plain forwards are taken on trust.
    #[track_caller]
    pub fn wait_until_usable(&self) {
        self.device.wait_until_ready();
        self.service.wait_until_ready();
        let text = fs::read_to_string(self.service.config()).unwrap();
        if self.forwards.is_empty() || text.contains("on-demand") || text.contains("mode = \"plain\"") {
            return;
        }
        self.service.wait_for_metric("culvert_service_device_streams", &[], |open| open > 0.0);
    }
}

fn listeners(forwards: &[Forward]) -> BTreeMap<String, String> {
    forwards.iter().map(|forward| (forward.name.clone(), forward.listen.clone())).collect()
}

/// A hub with its folder.
pub struct Hub {
    pub daemon: Daemon,
    pub port: u16,
    scratch: Scratch,
}

impl Hub {
    /// `culvert hub init`, then `culvert hub`.
    #[track_caller]
    pub fn start() -> Self {
        let scratch = Scratch::new();
        let (port, mqtt_port) = (free_port(), free_port());
        run(culvert().args(["hub", "init", "--hostname", "localhost", "--dir"]).arg(scratch.join("hub")).args([
            "--listen",
            &format!("127.0.0.1:{port}"),
            "--mqtt-listen",
            &format!("127.0.0.1:{mqtt_port}"),
        ]));
        let config = scratch.join("hub/hub.toml");
        let made = fs::read_to_string(&config).unwrap();
        let tables = "\n[metrics]\nlisten = \"127.0.0.1:0\"\n\n[log]\nformat = \"text\"\n";
        fs::write(&config, format!("{made}{tables}")).unwrap();
        let daemon = Daemon::start("hub", &config);
        daemon.wait_until_ready();
        Self { daemon, port, scratch }
    }

    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    pub fn ca(&self) -> PathBuf {
        self.scratch.join("hub/ca.pem")
    }

    /// `culvert registry ...` as the hub's owner.
    #[track_caller]
    pub fn registry(&self, arguments: &[&str]) -> String {
        let owner = self.scratch.join("hub/owner.connection");
        run(culvert().arg("registry").args(arguments).arg("--connection-string-file").arg(owner))
    }

    /// The service policy's connection string.
    pub fn service_connection(&self) -> String {
        self.policy_connection("service")
    }

    /// A policy's connection string, put together from the hub's own key file.
    pub fn policy_connection(&self, policy: &str) -> String {
        let key = fs::read_to_string(self.scratch.join(format!("hub/keys/{policy}.primary"))).unwrap();
        format!("HostName=localhost:{};SharedAccessKeyName={policy};SharedAccessKey={}", self.port, key.trim())
    }

    /// Registers a device and writes what it needs; the path of its device.toml.
    #[track_caller]
    pub fn device_files(&self, device: &str, settings: &str, targets: &[Target]) -> PathBuf {
        let connection = self.registry(&["add", device]);
        self.scratch.write_secret(format!("{device}/device.connection"), connection);
        let text = device_toml(&self.scratch.join(device), &self.ca(), settings, targets);
        self.scratch.write(format!("{device}/device.toml"), text)
    }

    /// Writes what a service needs into a folder of this name; the path of its service.toml.
    #[track_caller]
    pub fn service_files(&self, folder: &str, settings: &str, forwards: &[Forward]) -> PathBuf {
        self.scratch.write_secret(format!("{folder}/service.connection"), self.service_connection());
        let text = service_toml(&self.scratch.join(folder), &self.ca(), settings, forwards);
        self.scratch.write(format!("{folder}/service.toml"), text)
    }
}
