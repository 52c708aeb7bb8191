//! culvert: reach devices behind NAT and firewalls over TCP, by device ID.

pub mod agent;
pub mod auth;
pub mod base;
pub mod cli;
pub mod config;
pub mod device;
pub mod forward;
pub mod hub;
pub mod proto;
pub mod service;
pub mod telemetry;
pub mod transport;
