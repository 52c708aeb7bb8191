//! Loads a configuration with everything it names.
//!
//! Owns the order: read, parse, check, and only then a value. Does not know which keys there are.
//! Invariant: a configuration with a single problem is not returned at all.

use std::path::Path;

use super::{
    device::DeviceConfig,
    environment::Environment,
    files::Sources,
    footprint::Footprint,
    hub::HubConfig,
    problem::{LoadError, Problem},
    read,
    section::{Document, Section},
    service::ServiceConfig,
};

/// A configuration that passed every check.
#[derive(Debug, Clone, PartialEq)]
pub struct Loaded<T> {
    /// The configuration.
    pub config: T,
    /// What deserves attention but is no mistake.
    pub warnings: Vec<Problem>,
    /// Every file and folder it came from or could have come from, as they looked: what to watch.
    pub files: Footprint,
}

/// A configuration that can be loaded from a file.
pub trait Load: Sized + Clone + PartialEq + Send + 'static {
    /// Loads the file, its folder of rules and every file it names. Blocks on the file system.
    fn load(path: &Path, environment: &Environment) -> Result<Loaded<Self>, LoadError>;
}

impl Load for HubConfig {
    fn load(path: &Path, environment: &Environment) -> Result<Loaded<Self>, LoadError> {
        load(path, environment, read::hub)
    }
}

impl Load for DeviceConfig {
    fn load(path: &Path, environment: &Environment) -> Result<Loaded<Self>, LoadError> {
        load(path, environment, read::device)
    }
}

impl Load for ServiceConfig {
    fn load(path: &Path, environment: &Environment) -> Result<Loaded<Self>, LoadError> {
        load(path, environment, read::service)
    }
}

/// Loads `hub.toml` in this process's environment.
pub fn load_hub(path: &Path) -> Result<Loaded<HubConfig>, LoadError> {
    HubConfig::load(path, &Environment::of_process())
}

/// Loads `device.toml` and `targets.d/*.toml` beside it in this process's environment.
pub fn load_device(path: &Path) -> Result<Loaded<DeviceConfig>, LoadError> {
    DeviceConfig::load(path, &Environment::of_process())
}

/// Loads `service.toml` and `forwards.d/*.toml` beside it in this process's environment.
pub fn load_service(path: &Path) -> Result<Loaded<ServiceConfig>, LoadError> {
    ServiceConfig::load(path, &Environment::of_process())
}

fn load<T>(
    path: &Path,
    environment: &Environment,
    read: impl FnOnce(Section<'_>) -> Option<T>,
) -> Result<Loaded<T>, LoadError> {
    let sources = Sources::new(environment);
    let config = sources.config_text(path).and_then(|text| {
        let document = Document::parse(path.into(), &text, &sources);
        if document.broken { None } else { read(document.root(&sources)) }
    });
    let (mut problems, warnings, files) = sources.into_parts();
    match config {
        Some(config) if problems.is_empty() => Ok(Loaded { config, warnings, files }),
        _ => {
            problems.sort();
            problems.dedup();
            Err(LoadError { problems, files })
        }
    }
}

#[cfg(test)]
mod tests;
