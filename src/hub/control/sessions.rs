//! What a client that did not ask for a clean session finds again: its subscriptions (MQTT 3.1.1, section 3.1.2.4).
//! Today's Node SDK relies on it: it subscribes once, and reconnects whenever its token is renewed.
//!
//! Owns the subscriptions of absent clients, in memory: a restarted hub says that it knows no session. Does not know
//! packets. Invariant: there is at most one entry per identity that logged in.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::filters::Filters;
use crate::base::{DeviceId, Identity};

/// The sessions that outlive their connections.
#[derive(Debug, Default)]
pub(in crate::hub) struct Sessions(Mutex<HashMap<Identity, Filters>>);

impl Sessions {
    /// The subscriptions that a client finds again, if there are any. A clean session forgets them.
    pub(super) fn resume(&self, identity: &Identity, clean: bool) -> Option<Filters> {
        if clean { self.lock().remove(identity) } else { self.lock().get(identity).copied() }.filter(|_| !clean)
    }

    /// Keeps the subscriptions of a session that is not clean.
    pub(super) fn keep(&self, identity: &Identity, filters: Filters) {
        self.lock().insert(identity.clone(), filters);
    }

    /// Forgets an identity, whose credential is gone, or which is gone itself.
    pub(in crate::hub) fn forget(&self, identity: &Identity) {
        self.lock().remove(identity);
    }

    /// Forgets a device and its modules.
    pub(in crate::hub) fn forget_family(&self, device: &DeviceId) {
        self.lock().retain(|identity, _| identity.device != *device);
    }

    /// A panic between two statements cannot leave the map half changed.
    fn lock(&self) -> MutexGuard<'_, HashMap<Identity, Filters>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
