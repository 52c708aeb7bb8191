//! Configuration that cannot be used: the place in the file, the reason, and exit code 78.

use std::fs;

use crate::support::{Hub, daemon::culvert, process::output, world::DEVICE};

/// Both say the same: the check beforehand, and the daemon that will not start.
#[track_caller]
fn is_refused(role: &str, config: &std::path::Path, words: &[&str]) {
    let started = output(culvert().arg(role).arg("--config").arg(config));
    let checked = output(culvert().args(["check", "--role", role]).arg(config));
    for (what, told) in [("start", started), ("check", checked)] {
        let text = String::from_utf8_lossy(&told.stdout).into_owned() + &String::from_utf8_lossy(&told.stderr);
        assert_eq!(told.status.code(), Some(78), "{role} {what}: {text}");
        for word in words {
            assert!(text.contains(word), "{role} {what}: no {word:?} in {text}");
        }
    }
}

#[test]
fn each_daemon_points_at_the_mistake_in_its_file() {
    let hub = Hub::start();
    let device = hub.device_files(DEVICE, "", &[]);
    let service = hub.service_files("service", "", &[]);
    for (role, config) in [("hub", hub.daemon.config()), ("device", &device), ("service", &service)] {
        let good = fs::read_to_string(config).unwrap();
        let name = config.file_name().unwrap().to_str().unwrap();
        // Before the first table, where a top-level key stands.
        let unknown = format!("{name}:2: colour");
        fs::write(config, format!("# a comment\ncolour = \"red\"\n{good}")).unwrap();
        is_refused(role, config, &[&unknown]);
        let broken = format!("{name}:1: ");
        fs::write(config, format!("listen = [\n{good}")).unwrap();
        is_refused(role, config, &[name]);
        fs::write(config, format!("= 1\n{good}")).unwrap();
        is_refused(role, config, &[&broken]);
        fs::write(config, &good).unwrap();
    }
}

#[test]
fn a_file_that_is_missing_is_named() {
    let hub = Hub::start();
    let device = hub.device_files(DEVICE, "", &[]);
    let service = hub.service_files("service", "", &[]);
    fs::remove_file(hub.scratch().join("hub/keys/service.primary")).unwrap();
    is_refused("hub", hub.daemon.config(), &["hub.toml:", "primary_key_file", "keys/service.primary"]);
    fs::remove_file(device.with_file_name("device.connection")).unwrap();
    is_refused("device", &device, &["device.toml:1: connection_string_file", "device.connection"]);
    fs::write(service.with_file_name("service.connection"), "nonsense").unwrap();
    is_refused("service", &service, &["service.toml:1: connection_string_file"]);
    fs::remove_file(&service).unwrap();
    is_refused("service", &service, &["service.toml"]);
}

#[test]
fn wrong_usage_is_told_with_64() {
    for words in [vec!["device", "--colour", "red"], vec!["connect", "pump-17"], vec!["nonsense"]] {
        let told = output(culvert().args(&words));
        assert_eq!(told.status.code(), Some(64), "{words:?}");
        assert!(!told.stderr.is_empty());
    }
}
