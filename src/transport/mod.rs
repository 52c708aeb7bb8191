//! Floor 2: bytes on sockets.
//!
//! Owns TCP, TLS, proxies, WebSocket carriers, the link's and the mux's drivers. Does not know rules, roles or
//! configuration files. Invariant: a read that returns zero bytes is a clean end that the peer meant; every other
//! end is an error.

pub mod carrier;
pub mod dial;
pub mod hello;
pub mod http;
pub mod link;
pub mod mux;
pub mod net;
pub mod tls;
