//! Cargo.lock against the versions that fixed known faults.
//!
//! An advisory database knows more, but not all (the yamux panic was never in one), and is not there when a clone is
//! built without a network. This list is: what shared experience with such systems says must not come back.

use std::{collections::BTreeMap, fs, path::Path};

/// The lowest version of each crate that may be locked, and why.
const MINIMUM: [(&str, &str, &str); 17] = [
    ("async-nats", "0.29.0", "RUSTSEC-2023-0027: TLS without a check of the host's name"),
    ("aws-lc-sys", "0.47.0", "RUSTSEC-2026-0044 to -0048 (the newest release when they were read)"),
    ("bytes", "1.11.1", "RUSTSEC-2026-0007"),
    ("h2", "0.4.16", "RUSTSEC-2024-0332 and relatives, RUSTSEC-2026-0258: exhaustion"),
    ("hyper", "0.14.10", "RUSTSEC-2021-0078 and -0079: request smuggling"),
    ("protobuf", "3.7.2", "RUSTSEC-2024-0437: recursion"),
    ("quinn-proto", "0.11.15", "RUSTSEC-2026-0037 and -0185"),
    ("russh", "0.60.3", "RUSTSEC-2026-0154"),
    ("rustls", "0.23.46", "RUSTSEC-2024-0336 and -0399; RUSTSEC-2026-0285 (the newest release when it was read)"),
    ("rustls-webpki", "0.103.13", "RUSTSEC-2026-0049, -0098, -0099 and -0104"),
    ("snow", "0.9.5", "RUSTSEC-2024-0011"),
    ("time", "0.3.47", "RUSTSEC-2026-0009"),
    ("tokio", "1.44.2", "RUSTSEC-2023-0001 and -0005, RUSTSEC-2025-0023"),
    ("tracing-subscriber", "0.3.20", "RUSTSEC-2025-0055: escape sequences in logs"),
    ("tungstenite", "0.20.1", "RUSTSEC-2023-0065: quadratic header parsing"),
    ("yamux", "0.14.1", "GHSA-3999-5ffv-wp2r, GHSA-4w32-2493-32g7, GHSA-vxx9-2994-q338: the last in no database"),
    ("fe2o3-amqp", "0.15.2", "fe2o3-amqp issue 344: let clients in whose password it had rejected"),
];

#[test]
fn no_dependency_is_older_than_the_fix_of_a_known_fault() {
    let lock = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.lock")).unwrap();
    let locked = locked(&lock);
    assert!(locked.len() > 50 && locked.contains_key("tokio"), "the lock file was not understood");
    let old = too_old(&locked);
    assert!(old.is_empty(), "{}", old.join("\n"));
}

#[test]
fn an_old_version_would_be_found() {
    let lock = "[[package]]\nname = \"tokio\"\nversion = \"1.44.1\"\n\n[[package]]\nname = \"bytes\"\nversion = \"1.11.1\"\n\n\
                [[package]]\nname = \"tokio\"\nversion = \"1.100.0\"\n";
    assert_eq!(
        too_old(&locked(lock)),
        ["tokio 1.44.1 is older than 1.44.2: RUSTSEC-2023-0001 and -0005, RUSTSEC-2025-0023"]
    );
    assert!(number("1.9.0-rc.1") < number("1.10.0"));
}

/// Every version of every package: there may be several.
fn locked(lock: &str) -> BTreeMap<String, Vec<String>> {
    let mut locked: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in lock.split("[[package]]").skip(1) {
        let field = |key: &str| {
            let line = package.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(" = "));
            line.map(|value| value.trim_matches('"').to_owned())
        };
        if let (Some(name), Some(version)) = (field("name"), field("version")) {
            locked.entry(name).or_default().push(version);
        }
    }
    locked
}

fn too_old(locked: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut old = Vec::new();
    for (name, minimum, why) in MINIMUM {
        for version in locked.get(name).into_iter().flatten() {
            if number(version) < number(minimum) {
                old.push(format!("{name} {version} is older than {minimum}: {why}"));
            }
        }
    }
    old
}

/// The three numbers of a version; a pre-release counts as its release.
fn number(version: &str) -> Vec<u64> {
    let release = version.split(['-', '+']).next().unwrap_or_default();
    let numbers: Vec<u64> = release.split('.').filter_map(|part| part.parse().ok()).collect();
    assert_eq!(numbers.len(), 3, "{version}");
    numbers
}
