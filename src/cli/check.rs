//! `culvert check`: is a file right, and what would it change?
//!
//! Owns which file belongs to which role, and the question to the running daemon. Does not know the keys.
//! Invariant: a check changes nothing.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::anyhow;

use super::{
    args::{CheckArgs, Role},
    exit::{Failure, Outcome},
    places, say,
};
use crate::{
    agent::control_socket::{Answer, Request, call},
    config::{DeviceConfig, HubConfig, Load as _, LoadError, Loaded, Problem, ServiceConfig},
    transport::tls::ServerTls,
};

/// Runs the command. Which file is whose is settled first; then every file is checked, also behind one that is wrong.
pub(super) async fn run(args: &CheckArgs) -> Outcome {
    let files = args.files.iter().map(|given| with_role(given, args.role)).collect::<Outcome<Vec<_>>>()?;
    let mut broken: Option<LoadError> = None;
    for (file, role) in files {
        match check(&file, role) {
            Ok(checked) => report(&file, role, checked).await?,
            Err(error) => match &mut broken {
                None => broken = Some(error),
                Some(all) => all.problems.extend(error.problems),
            },
        }
    }
    broken.map_or(Ok(()), |error| Err(Failure::config(error)))
}

fn with_role(given: &Path, role: Option<Role>) -> Outcome<(PathBuf, Role)> {
    let file = main_file(given);
    if let Some(role) = role.or_else(|| role_of(&file)) {
        return Ok((file, role));
    }
    if let Err(error) = fs::metadata(&file) {
        return Err(Failure::config(anyhow!("{}: {error}", file.display())));
    }
    Err(Failure::usage(anyhow!("{}: whose file is it? Say --role hub, device or service", given.display())))
}

struct Checked {
    /// About a certificate.
    complaint: Option<String>,
    warnings: Vec<Problem>,
    socket: Option<PathBuf>,
}

fn check(file: &Path, role: Role) -> Result<Checked, LoadError> {
    fn checked<T>(loaded: Loaded<T>, socket: impl FnOnce(T) -> Option<PathBuf>) -> Checked {
        Checked { complaint: None, warnings: loaded.warnings, socket: socket(loaded.config) }
    }
    let environment = places::environment(file);
    Ok(match role {
        Role::Hub => {
            let loaded = HubConfig::load(file, &environment)?;
            let complaint = complaint(&loaded.config);
            Checked { complaint, ..checked(loaded, |config| config.control_socket) }
        }
        Role::Device => checked(DeviceConfig::load(file, &environment)?, |config| config.control_socket),
        Role::Service => checked(ServiceConfig::load(file, &environment)?, |config| config.control_socket),
    })
}

/// What clients will say of a hub's certificate. One that cannot be read by who asks is another matter.
fn complaint(config: &HubConfig) -> Option<String> {
    let files = &config.tls;
    let tls = ServerTls::load(&files.certificate.path, &files.private_key.path);
    tls.ok()?.complaint(&config.hostname)
}

async fn report(file: &Path, role: Role, checked: Checked) -> Outcome {
    let warnings = checked.warnings.iter().map(ToString::to_string);
    for warning in checked.complaint.into_iter().chain(warnings) {
        say::line(format_args!("{warning} (warning)"))?;
    }
    say::line(format_args!("{}: good, for the {}", file.display(), role.name()))?;
    let Some(socket) = checked.socket else { return Ok(()) };
    // A daemon that cannot be asked is no fault of the file.
    match call(&socket, &Request::Plan).await {
        Ok(Answer::Json(plan)) => print_plan(file, &plan),
        _ => Ok(()),
    }
}

/// The plan is that of the daemon's own file; it says nothing about another.
fn print_plan(file: &Path, plan: &serde_json::Value) -> Outcome {
    let daemons = plan["config"].as_str().map(Path::new).and_then(|path| fs::canonicalize(path).ok());
    if daemons.is_none() || daemons != fs::canonicalize(file).ok() {
        return Ok(());
    }
    let changes = plan["changes"].as_array().map(Vec::as_slice).unwrap_or_default();
    if changes.is_empty() {
        say::line("    the running daemon has just this configuration")?;
    }
    for change in changes.iter().filter_map(serde_json::Value::as_str) {
        say::line(format_args!("    a reload: {change}"))?;
    }
    Ok(())
}

/// `forwards.d/x.toml` is part of the `service.toml` beside its folder.
fn main_file(given: &Path) -> PathBuf {
    let folder = given.parent().filter(|folder| !folder.as_os_str().is_empty());
    let main = match folder.and_then(Path::file_name).and_then(|name| name.to_str()) {
        Some("forwards.d") => "service.toml",
        Some("targets.d") => "device.toml",
        _ => return given.into(),
    };
    folder.map_or_else(|| given.into(), |folder| folder.with_file_name(main))
}

/// By a word of the file's name, else by a key that only one role has.
fn role_of(file: &Path) -> Option<Role> {
    let stem = file.file_stem()?.to_str()?;
    let is_named = |role: &Role| {
        stem.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word.eq_ignore_ascii_case(role.name()))
    };
    let named: Vec<Role> = [Role::Hub, Role::Device, Role::Service].into_iter().filter(is_named).collect();
    if let [role] = named[..] {
        return Some(role);
    }
    let table: toml::Table = fs::read_to_string(file).ok()?.parse().ok()?;
    [("hostname", Role::Hub), ("policy", Role::Hub), ("target", Role::Device), ("forward", Role::Service)]
        .into_iter()
        .find(|(key, _)| table.contains_key(*key))
        .map(|(_, role)| role)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_tell_whose_they_are() {
        assert_eq!(role_of(Path::new("/etc/culvert/hub.toml")), Some(Role::Hub));
        assert_eq!(role_of(Path::new("my-device.toml")), Some(Role::Device));
        assert_eq!(role_of(Path::new("github-device.toml")), Some(Role::Device));
        assert_eq!(role_of(Path::new("hub-device.toml")), None, "its keys tell");
        assert_eq!(main_file(Path::new("/etc/culvert/forwards.d/a.toml")), Path::new("/etc/culvert/service.toml"));
        assert_eq!(main_file(Path::new("targets.d/a.toml")), Path::new("device.toml"));
        assert_eq!(main_file(Path::new("x.toml")), Path::new("x.toml"));
        let file = std::env::temp_dir().join(format!("culvert-check-{}.toml", std::process::id()));
        fs::write(&file, "[[forward]]\nname = \"a\"\n").unwrap();
        assert_eq!(role_of(&file), Some(Role::Service));
        fs::remove_file(&file).unwrap();
    }
}
