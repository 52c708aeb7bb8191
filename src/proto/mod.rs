//! Floor 1, pure: bytes and `now` in; bytes, events and deadlines out.
//!
//! Owns every format that crosses the network. Knows no tokio, clock, randomness, sockets or files.
//! Invariant: every length is checked against a named limit before anything is allocated for it.

pub mod control;
pub mod hello;
pub mod link;
pub mod mqtt;
pub mod open;
pub mod streams;
pub mod websocket;
pub mod yamux;
