//! A count with a limit that can change while it is in use.
//!
//! Owns the counting. Does not know what is counted. Invariant: every pass is given back exactly once, by its drop;
//! lowering the limit takes nothing away, it only lets nobody else in.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

/// Lets at most so many in at once. Clones are the same gate.
#[derive(Debug, Clone)]
pub struct Gate(Arc<Counts>);

#[derive(Debug)]
struct Counts {
    inside: AtomicUsize,
    limit: AtomicUsize,
}

/// Leave to be inside, given back when dropped.
#[derive(Debug)]
pub struct Pass(Arc<Counts>);

impl Gate {
    /// A gate for at most `limit` at once.
    pub fn new(limit: usize) -> Self {
        Self(Arc::new(Counts { inside: AtomicUsize::new(0), limit: AtomicUsize::new(limit) }))
    }

    /// A pass, or none if as many are inside as may be.
    pub fn enter(&self) -> Option<Pass> {
        let limit = self.limit();
        let entered = self.0.inside.fetch_update(Relaxed, Relaxed, |inside| (inside < limit).then_some(inside + 1));
        entered.is_ok().then(|| Pass(self.0.clone()))
    }

    /// Changes the limit for those to come.
    pub fn set_limit(&self, limit: usize) {
        self.0.limit.store(limit, Relaxed);
    }

    /// The limit in force.
    pub fn limit(&self) -> usize {
        self.0.limit.load(Relaxed)
    }

    /// How many are inside.
    pub fn inside(&self) -> usize {
        self.0.inside.load(Relaxed)
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lowered_limit_takes_nothing_away() {
        let gate = Gate::new(2);
        let (first, second) = (gate.enter().unwrap(), gate.enter().unwrap());
        assert!(gate.enter().is_none());
        gate.set_limit(1);
        drop(first);
        assert!(gate.enter().is_none() && gate.inside() == 1);
        drop(second);
        assert!(gate.enter().is_some());
    }
}
