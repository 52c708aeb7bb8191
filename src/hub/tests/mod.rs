//! Stories of the whole hub over real sockets.

mod api;
mod endpoint;
mod ids;
mod registry_api;
mod support;
