//! Who is woken when a link can go on.
//!
//! Owns the two tasks that may wait, a reader and a writer, which are one task below a mux. Does not know why.
//! Invariant: whatever moves a link (its carrier, its timer, an attach) wakes both.

use std::{
    sync::Arc,
    task::{Wake, Waker},
};

use futures_util::task::AtomicWaker;

#[derive(Debug, Default)]
pub(super) struct Wakers {
    pub(super) reader: AtomicWaker,
    pub(super) writer: AtomicWaker,
}

impl Wakers {
    pub(super) fn wake_both(&self) {
        self.reader.wake();
        self.writer.wake();
    }

    /// The waker under which carriers and timers are polled.
    pub(super) fn waker(self: &Arc<Self>) -> Waker {
        Waker::from(Arc::clone(self))
    }
}

impl Wake for Wakers {
    fn wake(self: Arc<Self>) {
        self.wake_both();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.wake_both();
    }
}
