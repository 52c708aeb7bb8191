//! Third-party clients and fixtures of the preview SDKs against culvert's hub and daemons (issue 3).
//!
//! Owns the stories; each runs in network, mount and process namespaces of its own, so that the ports are 443 and 8883
//! and the hub has its name, as clients with fixed ports need it. The clients are Node and Python programs in `node/`
//! and `python/`, installed by `tests/sdk/install`. Invariant: no client here uses culvert's own code.

#![allow(clippy::unwrap_used, reason = "a helper of a test fails the test")]

mod conformance;
mod examples;
mod gateway;
mod hostile;
mod hub_alone;
mod mixed;
mod released;
mod world;
