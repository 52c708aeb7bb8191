//! Real files in real folders.

use std::{fs, os::unix::fs::PermissionsExt, time::Duration};

use super::*;
use crate::config::{
    ConnectMode, ForwardMode, ProxyRule,
    scratch::{CANARY, Scratch, device_files, hub_files, service_files},
};

fn environment() -> Environment {
    Environment { user: None, ..Environment::default() }
}

/// Loads and expects problems, which it returns as they are printed, without the folder.
fn problems<T: Load + std::fmt::Debug>(scratch: &Scratch, file: &str) -> Vec<String> {
    let error = T::load(&scratch.path(file), &environment()).unwrap_err();
    let folder = format!("{}/", scratch.path("").display());
    let lines: Vec<String> =
        error.to_string().lines().map(|line| line.replace(folder.replace("//", "/").as_str(), "")).collect();
    assert_eq!(lines.len(), error.problems.len());
    assert!(!error.to_string().contains(CANARY) && !format!("{error:?}").contains("canary"));
    lines
}

const SERVICE: &str = "connection_string_file = \"service.connection\"\n";

fn service(text: &str) -> (Scratch, Result<Loaded<ServiceConfig>, LoadError>) {
    let scratch = Scratch::new();
    service_files(&scratch);
    let path = scratch.write("service.toml", format!("{SERVICE}{text}"));
    let loaded = ServiceConfig::load(&path, &environment());
    (scratch, loaded)
}

fn service_problems(text: &str) -> Vec<String> {
    let (scratch, loaded) = service(text);
    assert!(loaded.is_err(), "{text}");
    problems::<ServiceConfig>(&scratch, "service.toml")
}

fn device_problems(text: &str) -> Vec<String> {
    let scratch = Scratch::new();
    device_files(&scratch);
    scratch.write("device.toml", format!("connection_string_file = \"device.connection\"\n{text}"));
    problems::<DeviceConfig>(&scratch, "device.toml")
}

#[test]
fn all_problems_of_all_files_come_at_once_with_their_lines() {
    let scratch = Scratch::new();
    scratch.write(
        "service.toml",
        r#"conection_string_file = "x"
resume_for = 15

[[forward]]
name = "a b"
listen = "127.0.0.1"
device = "pump-17"
color = "red"

[limits]
max_connections = 0

[log]
level = "loud"
"#,
    );
    scratch.write("forwards.d/10-more.toml", "\n[[forward]]\nname = \"x\"\nlisten = \"127.0.0.1:1\"\n");
    scratch.write("forwards.d/20-broken.toml", "[[forward]\n");
    let found = problems::<ServiceConfig>(&scratch, "service.toml");
    let expected = [
        "forwards.d/10-more.toml:2: forward.device: is missing",
        "forwards.d/10-more.toml:2: forward.target: is missing",
        "forwards.d/20-broken.toml:1: TOML: ",
        "service.toml:1: conection_string_file: unknown key; did you mean connection_string_file?",
        "service.toml:1: connection_string_file: is missing",
        "service.toml:2: resume_for: must be a time span in quotes, like \"15s\", \"500ms\" or \"1h30m\"",
        "service.toml:4: forward.target: is missing",
        "service.toml:5: forward.name: name contains ' '",
        "service.toml:6: forward.listen: \"127.0.0.1\" is not an address",
        "service.toml:8: forward.color: unknown key; known here are connect, connect_timeout, device",
        "service.toml:11: limits.max_connections: must be at least 1",
        "service.toml:14: log.level: \"loud\" is not a level",
    ];
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.starts_with(expected), "{found}\nshould start with\n{expected}");
    }
    assert_eq!(found.len(), expected.len(), "{found:#?}");
}

#[test]
fn a_forward_says_only_what_differs_from_the_defaults() {
    let (_scratch, loaded) = service(
        r#"
[[forward]]
name = "ssh"
listen = "127.0.0.1:2222"
device = "pump-17"
target = "ssh"
[[forward]]
name = "sdk"
listen = "unix:/run/x.sock"
device = "kiosk"
module = "cam"
target = "TestStream"
mode = "plain"
plain_eof = true
connect_timeout = "5s"
"#,
    );
    let config = loaded.unwrap().config;
    assert_eq!((config.forwards[0].mode, config.forwards[0].connect), (ForwardMode::Mux, ConnectMode::Start));
    let sdk = &config.forwards[1];
    assert_eq!((sdk.mode, sdk.plain_eof, sdk.connect_timeout), (ForwardMode::Plain, true, Duration::from_secs(5)));
    assert_eq!(sdk.identity().to_string(), "kiosk/cam");
}

#[test]
fn rules_in_the_folder_are_rules_like_others_and_leavings_of_editors_are_not() {
    let (scratch, loaded) = service("");
    assert!(loaded.unwrap().config.forwards.is_empty());
    let rule = |name: &str, port: u16| {
        format!("[[forward]]\nname = \"{name}\"\nlisten = \"127.0.0.1:{port}\"\ndevice = \"d\"\ntarget = \"t\"\n")
    };
    scratch.write("forwards.d/b.toml", rule("b", 2));
    scratch.write("forwards.d/a.toml", rule("a", 1));
    for leaving in [".a.toml.swp", "a.toml~", "4913", ".#a.toml", ".hidden.toml", "a.toml.rpmsave"] {
        scratch.write(&format!("forwards.d/{leaving}"), "not toml [");
    }
    let loaded = ServiceConfig::load(&scratch.path("service.toml"), &environment()).unwrap();
    let names: Vec<&str> = loaded.config.forwards.iter().map(|rule| rule.name.as_str()).collect();
    assert_eq!(names, ["a", "b"]);
    for file in ["service.toml", "service.connection", "forwards.d", "forwards.d/a.toml"] {
        assert!(loaded.files.contains(&scratch.path(file)), "{file}");
    }
    scratch.write("forwards.d/c.toml", format!("resume_for = \"1s\"\n{}", rule("a", 2)));
    let found = problems::<ServiceConfig>(&scratch, "service.toml");
    assert_eq!(found.len(), 3, "{found:#?}");
    assert_eq!(found[0], "forwards.d/c.toml:1: resume_for: unknown key; known here are forward");
    assert!(
        found[1].starts_with("forwards.d/c.toml:3: forward.listen: ") || found[1].contains("is taken already by b")
    );
    assert!(found[2].contains("\"a\" is taken already, at"), "{found:#?}");
}

#[test]
fn forwards_that_contradict_themselves_or_each_other_are_refused() {
    let rule = |rest: &str| format!("[[forward]]\nname = \"a\"\ndevice = \"d\"\ntarget = \"t\"\n{rest}\n");
    for (text, reason) in [
        (rule("listen = \"[::1]:1\"\nmode = \"plain\"\nconnect = \"start\""), "belongs to mode = \"mux\""),
        (rule("listen = \"[::1]:1\"\nplain_eof = true"), "belongs to mode = \"plain\""),
        (rule("listen = \"[::1]:1\"\nmode = \"fast\""), "is not a mode"),
        (rule("listen = \"[::1]:1\"\nconnect = \"later\""), "write start or on-demand"),
        (rule("listen = \"[::1]:1\"\nconnect_timeout = \"0s\""), "longer than 0s"),
        (rule("listen = \"[::1]:1\"").replace("\"a\"", "\"culvert-x\""), "culvert's own"),
        ("[forward]\nname = \"a\"\n".into(), "write [[forward]] with two brackets"),
        ("forward = [1]\n".into(), "must be a list of sections"),
        ("limits = 3\n".into(), "write [limits] on a line of its own"),
        ("[limits]\nmax_replay = \"1KiB\"\n".into(), "at least 256KiB"),
        ("[limits]\nmax_replay_total = \"1MiB\"\n".into(), "smaller than max_replay"),
        ("[limits]\nmax_channels = 70000\n".into(), "between 1 and 65536"),
        ("[metrics]\nlisten = \"localhost\"\n".into(), "or \"off\""),
        ("proxy = \"http://u:p@h:1\"\n".into(), "proxy_password_file"),
        ("proxy_password_file = \"service.connection\"\n".into(), "no proxy to belong to"),
        ("proxy = \"http://h:1\"\nproxy_password_file = \"service.connection\"\n".into(), "names no user"),
        ("ca_file = \"service.connection\"\n".into(), "no certificate in PEM form"),
        ("connection_string = \"x\"\n".into(), "use connection_string_file"),
        ("resume_for = \"1s\"\nresume_for = \"2s\"\n".into(), "duplicate key"),
    ] {
        let found = service_problems(&text);
        assert!(found.len() == 1 && found[0].contains(reason), "{text}\n{found:#?}");
    }
}

#[test]
fn what_deserves_attention_is_a_warning() {
    let (scratch, loaded) =
        service("proxy = \"off\"\n[[forward]]\nname = \"a\"\nlisten = \"0.0.0.0:1\"\ndevice = \"d\"\ntarget = \"t\"\n");
    let loaded = loaded.unwrap();
    assert_eq!(loaded.config.proxy, ProxyRule::Off);
    assert_eq!(loaded.warnings.len(), 1);
    assert!(loaded.warnings[0].to_string().contains("service.toml:5: forward.listen: is reachable"));
    fs::set_permissions(scratch.path("service.connection"), fs::Permissions::from_mode(0o644)).unwrap();
    let loaded = ServiceConfig::load(&scratch.path("service.toml"), &environment()).unwrap();
    assert!(loaded.warnings.iter().any(|warning| warning.reason.contains("readable by everyone")));
}

#[test]
fn a_device_exposes_only_what_is_safe_and_unambiguous() {
    let target = |rest: &str| format!("[[target]]\nname = \"a\"\n{rest}\n");
    for (text, reason) in [
        (target("address = \"169.254.169.254:80\""), "link-local"),
        (target("address = \"[fe80::1%eth0]:80\""), "link-local"),
        (target("address = \"[::ffff:169.254.169.254]:80\""), "link-local"),
        (target("address = \"127.0.0.1:0\""), "port 0"),
        (target("address = \"h:1\"\npolicies = []"), "nobody could use"),
        (target("address = \"h:1\"").replace("\"a\"", "\"culvert-mux-1\""), "culvert's own"),
        (target("address = \"h:1\"").repeat(2), "is taken already"),
        ("certificate_file = \"c\"\n".into(), "is missing"),
        ("[limits]\nmax_services = -1\n".into(), "not negative"),
    ] {
        let found = device_problems(&text);
        assert!(found.iter().any(|line| line.contains(reason)), "{text}\n{found:#?}");
    }
    let scratch = Scratch::new();
    device_files(&scratch);
    let text = format!(
        "connection_string_file = \"device.connection\"\n{}",
        target("address = \"169.254.1.1:80\"\nallow_link_local = true")
    );
    assert!(DeviceConfig::load(&scratch.write("device.toml", text), &environment()).is_ok());
}

#[test]
fn a_credential_of_the_wrong_kind_is_named_as_such() {
    let scratch = Scratch::new();
    device_files(&scratch);
    scratch.write("service.toml", "connection_string_file = \"device.connection\"\n");
    let found = problems::<ServiceConfig>(&scratch, "service.toml");
    assert!(found[0].contains("needs a policy's"), "{found:?}");
    scratch.write("service.toml", format!("connection_string_file = \"HostName=h;SharedAccessKey={CANARY}\"\n"));
    assert!(problems::<ServiceConfig>(&scratch, "service.toml")[0].contains("put it into a file"));
    scratch.write("service.toml", format!("connection_string_file = \"{CANARY}\"\n"));
    assert!(problems::<ServiceConfig>(&scratch, "service.toml")[0].contains("if this is the key itself"));
    scratch.write("device.connection", format!("HostName=h;DeviceId=d;SharedAccessKey={CANARY}x"));
    scratch.write("device.toml", "connection_string_file = \"device.connection\"\n");
    assert!(problems::<DeviceConfig>(&scratch, "device.toml")[0].contains("not valid base64"));
}

#[test]
fn a_hub_without_credentials_or_with_a_foreign_key_is_refused() {
    let scratch = Scratch::new();
    hub_files(&scratch);
    let tls = "hostname = \"hub.example.com\"\n[tls]\ncertificate_file = \"tls/hub.crt\"\nprivate_key_file = \"tls/hub.key\"\n";
    let policy =
        "[[policy]]\nname = \"service\"\nrights = [\"ServiceConnect\"]\nprimary_key_file = \"keys/service.key\"\n";
    let check = |text: String, reason: &str| {
        scratch.write("hub.toml", &text);
        let found = problems::<HubConfig>(&scratch, "hub.toml");
        assert!(found.len() == 1 && found[0].contains(reason), "{text}\n{found:#?}");
    };
    check(tls.into(), "there is no [[policy]]");
    check(format!("{tls}{policy}{policy}"), "is taken already");
    check(format!("{tls}{}", policy.replace("ServiceConnect", "Everything")), "is not a right");
    check(format!("{tls}{}", policy.replace("[\"ServiceConnect\"]", "[]")), "permit nothing");
    check(format!("{tls}{}", policy.replace("service.key", "absent.key")), "No such file");
    check(format!("{tls}{policy}devices = []\n"), "would reach no device");
    check(format!("listen = []\n{tls}{policy}"), "unreachable");
    check(format!("listen = [\"0.0.0.0:443\", \"0.0.0.0:443\"]\n{tls}{policy}"), "used twice");
    check(format!("public_url = \"http://h\"\n{tls}{policy}"), "not a URL");
    check(format!("{tls}{policy}[resource_log]\nkeep = 4294967295\n"), "at most 1000");
    check(format!("{tls}{policy}").replace("hub.example.com", "https://hub"), "not a host name");
    let (_, other) = crate::config::scratch::certificate();
    scratch.write("tls/hub.key", other);
    check(format!("{tls}{policy}"), "is not the key of");
    scratch.write("tls/hub.key", "nothing");
    check(format!("{tls}{policy}"), "no unencrypted private key");
}

#[test]
fn systemd_credentials_stand_in_for_files() {
    let scratch = Scratch::new();
    service_files(&Scratch::new());
    let credentials = Scratch::new();
    service_files(&credentials);
    let path = scratch.write("service.toml", "connection_string_file = \"/root/secret/service.connection\"\n");
    let environment = Environment { credentials: Some(credentials.path("")), ..environment() };
    let loaded = ServiceConfig::load(&path, &environment).unwrap();
    assert_eq!(loaded.config.connection_string.host, "hub.example.com");
    assert!(loaded.files.contains(&credentials.path("service.connection")));
}

#[test]
fn what_is_not_a_small_text_file_is_refused_not_read() {
    let scratch = Scratch::new();
    let folder = scratch.path("");
    assert!(ServiceConfig::load(&folder, &environment()).unwrap_err().to_string().contains("not a regular file"));
    let path = scratch.write("big.toml", vec![b'#'; (1 << 20) + 1]);
    assert!(ServiceConfig::load(&path, &environment()).unwrap_err().to_string().contains("larger than"));
    let path = scratch.write("binary.toml", [0xff, 0xfe]);
    assert!(ServiceConfig::load(&path, &environment()).unwrap_err().to_string().contains("not UTF-8"));
    let path = scratch.path("absent.toml");
    let error = ServiceConfig::load(&path, &environment()).unwrap_err();
    assert!(error.to_string().contains("absent.toml: cannot be read: No such file"), "{error}");
    assert!(error.files.paths().eq([path.as_path()]));
}

#[test]
fn a_loaded_configuration_prints_no_secret() {
    let (_scratch, loaded) = service("");
    assert!(!format!("{:?}", loaded.unwrap()).contains(CANARY));
}
