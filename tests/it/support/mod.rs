//! What every story needs: daemons, targets, and ways to wait.

pub mod bytes;
pub mod client;
pub mod config;
pub mod daemon;
pub mod metrics;
pub mod port;
pub mod process;
pub mod proxy;
pub mod scratch;
pub mod targets;
pub mod wait;
pub mod world;

pub use client::{End, connect};
pub use config::{Forward, Target};
pub use daemon::Daemon;
pub use process::{Process, run};
pub use proxy::Proxy;
pub use scratch::Scratch;
pub use wait::eventually;
pub use world::{Hub, World};
