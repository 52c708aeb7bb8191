//! A folder for one test, removed when the test ends.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

/// The folder.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("culvert-config-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file (and its folder) that only its owner may read.
    pub(crate) fn write(&self, name: &str, text: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A base64 key that is valid and easy to find in any output.
pub(crate) const CANARY: &str = "Y2FuYXJ5LWNhbmFyeS1jYW5hcnktY2FuYXJ5LTEyMzQ=";

/// A self-signed certificate and its key, PEM.
pub(crate) fn certificate() -> (String, String) {
    let made = rcgen::generate_simple_self_signed(["hub.example.com".to_owned()]).unwrap();
    (made.cert.pem(), made.signing_key.serialize_pem())
}

/// Everything that the shipped `hub.toml` names.
pub(crate) fn hub_files(scratch: &Scratch) {
    let (certificate, key) = certificate();
    scratch.write("tls/hub.crt", certificate);
    scratch.write("tls/hub.key", key);
    for policy in ["service", "iothubowner"] {
        scratch.write(&format!("keys/{policy}.key"), format!("{CANARY}\n"));
    }
}

/// A device's connection string.
pub(crate) fn device_files(scratch: &Scratch) {
    let text = format!("HostName=hub.example.com;DeviceId=pump-17;SharedAccessKey={CANARY}\n");
    scratch.write("device.connection", text);
}

/// A policy's connection string.
pub(crate) fn service_files(scratch: &Scratch) {
    let text = format!("HostName=hub.example.com;SharedAccessKeyName=service;SharedAccessKey={CANARY}\n");
    scratch.write("service.connection", text);
}
