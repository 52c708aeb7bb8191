//! Who may hold a connection before having said who they are.
//!
//! Owns the count of connections that have not authenticated yet, in all and per address. Does not know protocols.
//! Invariant: a [`Newcomer`] is counted exactly as long as it lives; connections that have authenticated are never
//! counted, so that strangers cannot keep them out.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::config::HubLimits;

/// Counts newcomers. Clones share the count.
#[derive(Debug, Clone, Default)]
pub struct Newcomers {
    counts: Arc<Mutex<Counts>>,
}

#[derive(Debug, Default)]
struct Counts {
    total: usize,
    per_address: HashMap<IpAddr, usize>,
}

/// A connection that has not authenticated yet. Drop it when it has, or ends.
#[derive(Debug)]
pub struct Newcomer {
    newcomers: Newcomers,
    address: IpAddr,
}

/// Why a connection is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// Too many newcomers in all.
    #[error("too many connections that have not authenticated")]
    Unauthenticated,
    /// Too many from this address.
    #[error("too many connections from one address that have not authenticated")]
    UnauthenticatedPerAddress,
}

impl Refused {
    /// The value of the metric's label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Unauthenticated => "max_unauthenticated",
            Self::UnauthenticatedPerAddress => "max_unauthenticated_per_address",
        }
    }
}

impl Newcomers {
    /// Counts one more, unless that is too many.
    pub fn admit(&self, address: IpAddr, limits: &HubLimits) -> Result<Newcomer, Refused> {
        let address = subscriber(address);
        let mut counts = self.lock();
        if counts.total >= limits.max_unauthenticated {
            return Err(Refused::Unauthenticated);
        }
        let of_address = counts.per_address.entry(address).or_default();
        if *of_address >= limits.max_unauthenticated_per_address {
            return Err(Refused::UnauthenticatedPerAddress);
        }
        *of_address += 1;
        counts.total += 1;
        Ok(Newcomer { newcomers: self.clone(), address })
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        // Two counters that are changed together without a panic in between.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Newcomer {
    fn drop(&mut self) {
        let mut counts = self.newcomers.lock();
        counts.total -= 1;
        if let Some(count) = counts.per_address.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.per_address.remove(&self.address);
            }
        }
    }
}

/// One customer of a provider: an IPv4 address, or an IPv6 /64, which is the least that anyone is given.
fn subscriber(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(v4) => v4.into(),
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            IpAddr::from([a, b, c, d, 0, 0, 0, 0])
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_fills_its_share_and_nobody_elses() {
        let limits = HubLimits { max_unauthenticated: 3, max_unauthenticated_per_address: 2, ..HubLimits::default() };
        let newcomers = Newcomers::default();
        let admit = |text: &str| newcomers.admit(text.parse().unwrap(), &limits);
        let first = admit("2001:db8::1").unwrap();
        let _second = admit("2001:db8::2").unwrap();
        assert_eq!(admit("2001:db8::3").unwrap_err(), Refused::UnauthenticatedPerAddress);
        let _third = admit("192.0.2.1").unwrap();
        assert_eq!(admit("192.0.2.2").unwrap_err(), Refused::Unauthenticated);
        drop(first);
        let _fourth = admit("2001:db8::3").unwrap();
        drop((_second, _third, _fourth));
        assert!(newcomers.lock().per_address.is_empty());
    }
}
