//! Floor 4: what device and service share.
//!
//! Owns the hub as a daemon sees it, the installation's identity, notice of network changes, the mux session above a
//! device stream, and the control socket. Does not know which role it serves. Invariant: whether an attempt is
//! repeated, and when, is decided in one place, [`Retry`].

pub mod control_socket;
mod hub;
mod identity;
mod network;
mod plain;
mod retry;
mod session;

pub use hub::{CarrierFailure, HubCarrier, HubClient, HubSetupError, TOKEN_LIFETIME, is_unauthorized, now, skew_hint};
pub use identity::{InstanceError, load_instance, new_boot};
pub use network::NetworkChanges;
pub use plain::PlainStream;
pub use retry::{Next, Retry, calm};
pub use session::{MuxSession, end_session, follow_link_settings, receive_window};

/// What an attempt that failed means for the next one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The path failed: no answer, or the connection broke. Trying again soon may succeed.
    Path,
    /// Nothing listens at the hub's address: it is down, or restarting.
    Refused,
    /// The hub answered, and said no. It may name the seconds to stay away.
    Answered(Option<std::time::Duration>),
}

/// Uniform random bits, for jitter and identifiers. The operating system's source does not fail once it has been
/// seeded at boot.
pub fn random_u64() -> u64 {
    getrandom::u64().unwrap_or_else(|error| panic!("the operating system has no random source: {error}"))
}

/// Random bytes for identifiers.
pub fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).unwrap_or_else(|error| panic!("the operating system has no random source: {error}"));
    bytes
}
