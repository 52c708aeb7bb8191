//! The shipped files say what is true: they load, their commented defaults are the defaults, and no key is missing.

use std::fmt::Debug;

use super::{
    DeviceConfig, Environment, HubConfig, Load, Loaded, ServiceConfig,
    scratch::{Scratch, device_files, hub_files, service_files},
};

/// Loads a text as the file of a role; warnings count as failure.
fn load<T: Load + Debug>(scratch: &Scratch, text: &str) -> T {
    let path = scratch.write("shipped.toml", text);
    let Loaded { config, warnings, .. } = T::load(&path, &Environment::default()).unwrap();
    assert_eq!(warnings, []);
    config
}

/// The file with every line of the form `#key = value` switched on.
fn with_defaults_switched_on(text: &str) -> String {
    let lines = text.lines().map(|line| if is_default(line) { &line[1..] } else { line });
    lines.collect::<Vec<_>>().join("\n")
}

/// Every key that the reader knows, in whatever section, is in the file.
fn assert_every_key_is_shown<T: Load + Debug>(scratch: &Scratch, text: &str) {
    let strange = "zzzzzzzzzzzzzzzzzzzz = 1";
    let sections = text.lines().filter(|line| line.starts_with('[')).count();
    let text_with_strangers: String = text
        .lines()
        .map(|line| if line.starts_with('[') { format!("{line}\n{strange}\n") } else { format!("{line}\n") })
        .collect();
    let path = scratch.write("shipped.toml", format!("{strange}\n{text_with_strangers}"));
    let problems = T::load(&path, &Environment::default()).unwrap_err().problems;
    assert_eq!(problems.len(), sections + 1, "{problems:#?}");
    for problem in problems {
        let (_, known) = problem.reason.split_once("known here are ").unwrap();
        for key in known.split(", ") {
            let shown = text.lines().any(|line| {
                let line = line.trim_start_matches(['#', ' ', '[']);
                line.strip_prefix(key).is_some_and(|rest| rest.starts_with([' ', ']']))
            });
            assert!(shown, "{}: {key} is not in the shipped file", problem.key);
        }
    }
}

/// Every default in the file, replaced by something else, makes another configuration: no key is without effect.
fn assert_every_key_has_an_effect<T: Load + Debug>(scratch: &Scratch, text: &str, config: &T) {
    let lines: Vec<&str> = text.lines().collect();
    for (index, line) in lines.iter().enumerate().filter(|(_, line)| is_default(line)) {
        let mut changed: Vec<String> = lines.iter().map(|line| (*line).to_owned()).collect();
        changed[index] = something_else(&line[1..]);
        let path = scratch.write("shipped.toml", changed.join("\n"));
        let loaded = T::load(&path, &Environment::default());
        let loaded = loaded.unwrap_or_else(|error| panic!("{}: {error}", changed[index]));
        assert_ne!(loaded.config, *config, "{} has no effect", changed[index]);
    }
}

/// Another value that is valid too.
fn something_else(line: &str) -> String {
    let (key, value) = line.split_once(" = ").unwrap();
    let value = value.split(" #").next().unwrap().trim();
    let other = match (key, value) {
        ("level", _) => "\"info,culvert::hub=debug\"",
        ("format", _) => "\"json\"",
        ("mode", _) => "\"plain\"",
        ("connect", _) => "\"on-demand\"",
        ("max_replay_total", _) => "\"1GiB\"",
        ("max_channels", _) => "17",
        ("mqtt_listen", _) => "[]",
        ("listen", list) if list.starts_with('[') => "[\"127.0.0.1:1\", \"[::1]:1\"]",
        ("listen", _) => "\"off\"",
        (_, "true") => "false",
        (_, "false") => "true",
        (_, "[]") => "[\"other.example.com\"]",
        (_, text) if text.starts_with("\"/") => "\"/elsewhere\"",
        (_, text) if text.ends_with("B\"") => "\"1MiB\"",
        (_, text) if text.starts_with('"') => "\"17s\"",
        _ => "17",
    };
    format!("{key} = {other}")
}

fn is_default(line: &str) -> bool {
    line.strip_prefix('#').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_lowercase()))
}

fn check<T: Load + Debug>(text: &str, files: fn(&Scratch)) -> T {
    let scratch = Scratch::new();
    files(&scratch);
    let config: T = load(&scratch, text);
    assert_eq!(load::<T>(&scratch, &with_defaults_switched_on(text)), config);
    assert_every_key_is_shown::<T>(&scratch, text);
    assert_every_key_has_an_effect(&scratch, text, &config);
    for (index, line) in text.lines().enumerate() {
        assert!(line.chars().count() <= 120, "line {} is too long", index + 1);
    }
    config
}

#[test]
fn the_hubs_file_is_true() {
    let config: HubConfig = check(include_str!("../../config/hub.toml"), hub_files);
    let mut expected = HubConfig::new("hub.example.com", config.tls.clone(), "/var/lib/culvert/hub");
    expected.policies.clone_from(&config.policies);
    expected.control_socket = Some("/run/culvert/hub.sock".into());
    assert_eq!(config, expected);
    let rights: Vec<String> = config.policies.iter().map(|policy| policy.rights.to_string()).collect();
    assert_eq!(rights, ["ServiceConnect", "RegistryRead, RegistryWrite, ServiceConnect, DeviceConnect"]);
}

#[test]
fn the_devices_file_is_true() {
    let config: DeviceConfig = check(include_str!("../../config/device.toml"), device_files);
    let mut expected = DeviceConfig::new(config.connection_string.clone(), "/var/lib/culvert/device");
    expected.targets = vec![super::TargetRule::new("ssh".parse().unwrap(), "127.0.0.1:22".parse().unwrap())];
    expected.control_socket = Some("/run/culvert/device.sock".into());
    assert_eq!(config, expected);
}

#[test]
fn the_services_file_is_true() {
    let config: ServiceConfig = check(include_str!("../../config/service.toml"), service_files);
    let mut expected = ServiceConfig::new(config.connection_string.clone(), "/var/lib/culvert/service");
    expected.forwards = vec![super::ForwardRule::new(
        "pump-17-ssh".parse().unwrap(),
        "127.0.0.1:2222".parse().unwrap(),
        "pump-17".parse().unwrap(),
        "ssh".parse().unwrap(),
    )];
    expected.control_socket = Some("/run/culvert/service.sock".into());
    assert_eq!(config, expected);
}

proptest::proptest! {
    /// Whatever a file holds: no panic, and every problem is one line with a place.
    #[test]
    fn a_damaged_file_is_refused_in_words(at in 0usize..4000, cut in 0usize..40, put in ".{0,8}") {
        let scratch = Scratch::new();
        device_files(&scratch);
        service_files(&scratch);
        damage::<DeviceConfig>(&scratch, include_str!("../../config/device.toml"), at, cut, &put);
        damage::<ServiceConfig>(&scratch, include_str!("../../config/service.toml"), at, cut, &put);
    }
}

fn damage<T: Load + Debug>(scratch: &Scratch, text: &str, at: usize, cut: usize, put: &str) {
    let switched_on = with_defaults_switched_on(text);
    let (at, cut) = (at % switched_on.len(), cut.min(switched_on.len() - at % switched_on.len()));
    let mut damaged = switched_on.into_bytes();
    damaged.splice(at..at + cut, put.bytes());
    let path = scratch.write("shipped.toml", damaged);
    if let Err(error) = T::load(&path, &Environment::default()) {
        assert!(!error.problems.is_empty());
        assert_eq!(error.to_string().lines().count(), error.problems.len());
    }
}
