//! The architecture, as a test: a module imports only from floors strictly below its own (see the crate's docs).

#![allow(clippy::unwrap_used, reason = "a helper of a test fails the test")]

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Each top-level module and its floor. A module that is not here fails the test.
const FLOORS: [(&str, u8); 14] = [
    ("base", 0),
    ("proto", 1),
    ("auth", 1),
    ("transport", 2),
    ("config", 2),
    ("telemetry", 2),
    ("forward", 3),
    ("agent", 4),
    ("hub", 5),
    ("device", 5),
    ("service", 5),
    ("cli", 6),
    ("main", 7),
    ("lib", 7),
];

/// Crates that the pure floors (0 and 1) may not name: no tasks, no sockets, no clock, no randomness.
const IMPURE: [&str; 7] =
    ["tokio::", "std::net::Tcp", "std::fs", "Instant::now(", "SystemTime::now(", "getrandom::", "std::thread"];

#[test]
fn modules_import_only_from_floors_below() {
    let mut violations = Vec::new();
    for (file, module) in sources() {
        let text = without_tests(&fs::read_to_string(&file).unwrap());
        let own = floor_of(&module).unwrap_or_else(|| panic!("{module} has no floor: add it to FLOORS"));
        for imported in imported_modules(&text) {
            let below = imported == module || floor_of(&imported).is_none_or(|floor| floor < own);
            if !below {
                violations.push(format!("{}: floor {own} imports crate::{imported}", file.display()));
            }
        }
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

#[test]
fn the_pure_floors_name_no_runtime_clock_or_socket() {
    let mut violations = Vec::new();
    for (file, module) in sources().into_iter().filter(|(_, module)| floor_of(module).is_some_and(|floor| floor < 2)) {
        // A simulation and a fuzz entry begin their virtual clock somewhere.
        if file.ends_with("sim.rs") || file.ends_with("fuzz.rs") {
            continue;
        }
        let text = without_tests(&fs::read_to_string(&file).unwrap());
        for word in IMPURE.iter().filter(|word| text.contains(**word)) {
            violations.push(format!("{}: {module} is pure, but names {word}", file.display()));
        }
    }
    assert!(violations.is_empty(), "{}", violations.join("\n"));
}

fn floor_of(module: &str) -> Option<u8> {
    FLOORS.iter().find(|(name, _)| *name == module).map(|(_, floor)| *floor)
}

/// Every source file with the top-level module it belongs to. Files that hold nothing but tests are left out.
fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                if stem != "tests" {
                    folders.push(path);
                }
            } else if stem != "tests" && path.extension().is_some_and(|extension| extension == "rs") {
                let relative = path.strip_prefix(&root).unwrap();
                let first = relative.components().next().unwrap().as_os_str().to_str().unwrap();
                let module = first.strip_suffix(".rs").unwrap_or(first).to_owned();
                found.push((path, module));
            }
        }
    }
    assert!(found.len() > 20, "the walk found next to nothing");
    found
}

/// Everything before the tests at the foot of a file, without comments.
fn without_tests(text: &str) -> String {
    let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
    let kept = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    kept.collect::<Vec<_>>().join("\n")
}

/// `x` of every `crate::x`, and of every `crate::{x, y::z}`.
fn imported_modules(text: &str) -> Vec<String> {
    let word = |text: &str| text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect::<String>();
    let mut found = Vec::new();
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        match rest.strip_prefix('{') {
            None => found.push(word(rest)),
            Some(group) => found.extend(first_words_of_group(group).iter().map(|item| word(item))),
        }
    }
    found
}

/// The items of a `{...}` group at its own depth.
fn first_words_of_group(group: &str) -> Vec<String> {
    let (mut depth, mut items, mut item) = (0, Vec::new(), String::new());
    for c in group.chars() {
        match c {
            '}' if depth == 0 => break,
            ',' if depth == 0 => items.push(std::mem::take(&mut item)),
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if c != ',' || depth > 0 {
            item.push(c);
        }
    }
    items.push(item);
    items.iter().map(|item| item.trim().to_owned()).filter(|item| !item.is_empty()).collect()
}

#[test]
fn the_walk_sees_what_it_should() {
    let text = "use crate::{\n    base::{A, B},\n    transport::mux,\n};\nuse crate::config::X;";
    assert_eq!(imported_modules(text), ["base", "transport", "config"]);
}
