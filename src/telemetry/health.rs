//! The question that load balancers and people ask: can it be used, and if not, why?
//!
//! Owns the shape of the answer. Does not know how a role finds it out.
//! Invariant: "not ready" always comes with at least one reason.

use futures_util::future::BoxFuture;

/// A role's health, as `/readyz` and `/healthz` show it.
pub trait Health: Send + Sync {
    /// Ready, or every reason why not, one line each. Answers at once, from what is known.
    fn ready(&self) -> Result<(), Vec<String>>;

    /// Whether one forward can be used: an echo through its device stream, cached by the role. Never opens an
    /// on-demand device stream.
    fn forward(&self, name: &str) -> BoxFuture<'_, ForwardHealth>;
}

/// What `/readyz?forward=NAME` answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ForwardHealth {
    /// An echo came back through its device stream.
    Usable,
    /// It opens its device stream on first use, and none is open: nothing is known to be wrong.
    Idle,
    /// It cannot be used, for this reason.
    Unusable(String),
    /// There is no forward of that name here.
    Unknown,
}

/// A role with nothing to wait for: always ready, no forwards.
#[derive(Debug, Clone, Copy, Default)]
pub struct AlwaysReady;

impl Health for AlwaysReady {
    fn ready(&self) -> Result<(), Vec<String>> {
        Ok(())
    }

    fn forward(&self, _name: &str) -> BoxFuture<'_, ForwardHealth> {
        Box::pin(async { ForwardHealth::Unknown })
    }
}
