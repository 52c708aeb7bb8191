//! What a daemon tells its operator: logs, metrics, health, and its state to systemd.
//!
//! Owns the log format, the loopback HTTP server with `/metrics`, `/healthz` and `/readyz`, the process's own
//! metrics and the messages to the service manager. Does not know hubs, devices or forwards: a role hands in
//! its metrics by registering them and its health as a [`Health`].
//! Invariant: nothing here is reachable without credentials except from an address that the operator named.

pub mod health;
pub mod http;
mod journal;
pub mod log;
pub mod metrics;
mod process;
pub mod systemd;

pub use health::{ForwardHealth, Health};
pub use log::{LogFormat, LogHandle, LogOptions};
pub use metrics::DaemonMetrics;
