//! Floor 5: the hub. It registers devices, brokers device streams and relays their bytes.
//!
//! Owns the public listeners, the registry and the bridges. Does not know what the bytes of a device stream mean.
//! Invariant: nothing but the two MQTT upgrades is served to a caller who has not been authenticated first.

mod bridge;
pub mod control;
pub mod courier;
mod guard;
mod initiate;
pub mod limits;
pub mod metrics;
pub mod mqtt_listener;
mod random;
pub mod record;
pub mod registry;
pub mod shared;
