//! The configuration files that a story's people write.

use std::path::Path;

/// A rule of a device.
#[derive(Clone)]
pub struct Target {
    pub name: String,
    pub address: String,
    pub more: String,
}

impl Target {
    pub fn new(name: &str, address: impl ToString) -> Self {
        Self { name: name.into(), address: address.to_string(), more: String::new() }
    }

    /// Adds a line, such as `policies = ["owner"]`.
    pub fn with(mut self, line: &str) -> Self {
        self.more += line;
        self.more.push('\n');
        self
    }

    pub fn text(&self) -> String {
        format!("[[target]]\nname = \"{}\"\naddress = \"{}\"\n{}\n", self.name, self.address, self.more)
    }
}

/// A rule of a service.
#[derive(Clone)]
pub struct Forward {
    pub name: String,
    pub listen: String,
    pub device: String,
    pub target: String,
    pub more: String,
}

impl Forward {
    pub fn new(name: &str, listen: impl ToString, device: &str, target: &str) -> Self {
        Self {
            name: name.into(),
            listen: listen.to_string(),
            device: device.into(),
            target: target.into(),
            more: String::new(),
        }
    }

    /// Adds a line, such as `connect = "on-demand"`.
    pub fn with(mut self, line: &str) -> Self {
        self.more += line;
        self.more.push('\n');
        self
    }

    pub fn text(&self) -> String {
        format!(
            "[[forward]]\nname = \"{}\"\nlisten = \"{}\"\ndevice = \"{}\"\ntarget = \"{}\"\n{}\n",
            self.name, self.listen, self.device, self.target, self.more
        )
    }
}

/// What device.toml and service.toml have in common; `settings` are more top-level lines.
fn head(folder: &Path, role: &str, ca: &Path, settings: &str) -> String {
    format!(
        "connection_string_file = \"{role}.connection\"\nca_file = \"{ca}\"\nstate_dir = \"{folder}/state\"\n\
         control_socket = \"{folder}/{role}.sock\"\n{settings}\n\n\
         [metrics]\nlisten = \"127.0.0.1:0\"\n\n[log]\nformat = \"text\"\n\n",
        ca = ca.display(),
        folder = folder.display(),
    )
}

pub fn device_toml(folder: &Path, ca: &Path, settings: &str, targets: &[Target]) -> String {
    targets.iter().fold(head(folder, "device", ca, settings), |text, target| text + &target.text())
}

pub fn service_toml(folder: &Path, ca: &Path, settings: &str, forwards: &[Forward]) -> String {
    forwards.iter().fold(head(folder, "service", ca, settings), |text, forward| text + &forward.text())
}
