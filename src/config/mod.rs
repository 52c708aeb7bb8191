//! Floor 2: what a person wants the daemons to do, read from files.
//!
//! Owns the three configuration files, their `.d` folders, the secrets they name, and the watch over all of them.
//! Does not know what runs: comparing wanted with running is the business of whoever runs it. Invariant: a value
//! of [`HubConfig`], [`DeviceConfig`] or [`ServiceConfig`] that was loaded passed every check, and printing it
//! shows no secret.
//!
//! To add a key: a field with its reason in `hub.rs`, `device.rs` or `service.rs` and its default in `new` or
//! `Default`; a line in `read/`; a class in `change.rs`; a line in the shipped file. The compiler asks for the
//! class, the tests hold the shipped file and the reader to each other.

mod change;
mod device;
mod environment;
mod files;
mod footprint;
mod hub;
mod load;
mod parts;
mod problem;
mod read;
mod reload;
#[cfg(test)]
mod scratch;
mod section;
mod service;
#[cfg(test)]
mod shipped;
mod value;
pub mod watch;

pub use change::{Change, ChangeClass, ChangeKind, Changes};
pub use device::{DeviceConfig, DeviceLimits, TargetRule};
pub use environment::{Environment, UserPlaces};
pub use footprint::Footprint;
pub use hub::{DevicePattern, HubConfig, HubLimits, PolicyRule, PublicUrl, ResourceLogConfig};
pub use load::{Load, Loaded, load_device, load_hub, load_service};
pub(crate) use parts::host_is_valid;
pub use parts::{
    AddressError, Certificate, FileContents, LinkLimits, ListenAddress, LogConfig, LogFormat, MetricsConfig, Proxy,
    ProxyRule, SecretFile, TargetAddress,
};
pub use problem::{LoadError, Problem};
pub use reload::{Outcome, Reload, Reloader};
pub use service::{ConnectMode, ForwardMode, ForwardRule, ServiceConfig, ServiceLimits};
