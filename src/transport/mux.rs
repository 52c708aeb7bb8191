//! The mux: many [`Channel`]s over one byte stream.
//!
//! Owns the driver of `proto::yamux` and the channels' faces as byte streams. Does not know what is below (a link, a
//! carrier, a pipe) or what the channels carry. Invariant: a channel reads as ended only if the peer ended it; a reset
//! is `ConnectionReset`, a dead tunnel `ConnectionAborted`, both only after everything received has been read.
//!
//! [`start`] makes three things. The [`MuxDriver`] is a future that does all the work: spawn it and await it. [`Mux`]
//! opens channels, [`Incoming`] yields those that the peer opens. There is one lock; nobody holds it across a system
//! call, and the driver is woken only when it sleeps.

mod channel;
mod driver;
#[cfg(test)]
mod interop;
#[cfg(test)]
mod tests;

use std::future::poll_fn;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::proto::yamux::{Core, Event, OpenRefusal};

pub use crate::proto::yamux::{Failure as ChannelFailure, Options as MuxOptions, Role};
pub use channel::Channel;
pub use driver::{MuxDriver, MuxError, Tunnel};

/// How long a mux that closes may take to get its last bytes out, before it ends without them.
const CLOSE_LIMIT: Duration = Duration::from_secs(5);

/// Puts a mux on a byte stream. Nothing happens until the driver is polled.
pub fn start<T>(io: T, options: MuxOptions) -> (Mux, Incoming, MuxDriver<T>)
where
    T: Tunnel + Send + 'static,
{
    let shared = Arc::new(Shared::new(Core::new(options)));
    (Mux { shared: shared.clone() }, Incoming { shared: shared.clone() }, MuxDriver::new(io, shared))
}

/// Opens channels.
#[derive(Clone)]
pub struct Mux {
    shared: Arc<Shared>,
}

/// Why no channel was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// The mux has ended, or one of its ends has announced that it will.
    #[error("the tunnel is closed")]
    Closed,
}

impl Mux {
    /// Opens a channel; waits while as many as allowed are open. Data may be written at once.
    pub async fn open(&self) -> Result<Channel, OpenError> {
        loop {
            let mut room = std::pin::pin!(self.shared.room.notified());
            room.as_mut().enable();
            match self.try_open() {
                Ok(channel) => return Ok(channel),
                Err(OpenRefusal::Closed) => return Err(OpenError::Closed),
                Err(OpenRefusal::Full) => room.await,
            }
        }
    }

    /// Ends the mux: channels still in use are reset, data of finished ones is sent, GoAway follows, and the driver
    /// shuts the stream below down and returns.
    pub fn close(&self) {
        let mut state = self.shared.lock();
        let now = Instant::now();
        state.core.close(now.into_std());
        state.close_by.get_or_insert(now + CLOSE_LIMIT);
        state.must_run = true;
        self.shared.dispatch(state);
    }

    /// True once no channel can be opened any more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.shared.lock().core.is_closed()
    }

    /// Channels that are in use here or have something left to send.
    #[must_use]
    pub fn channels(&self) -> usize {
        self.shared.lock().core.channels()
    }

    /// The shortest round trip seen of late, once data has flowed.
    #[must_use]
    pub fn round_trip(&self) -> Option<Duration> {
        self.shared.lock().core.round_trip()
    }

    /// Waits until the driver has ended.
    pub async fn closed(&self) {
        self.shared.ended.cancelled().await;
    }

    fn try_open(&self) -> Result<Channel, OpenRefusal> {
        let mut state = self.shared.lock();
        let key = state.core.open(Instant::now().into_std())?;
        let id = state.core.id(&key);
        self.shared.dispatch(state);
        Ok(Channel::new(self.shared.clone(), key, id))
    }
}

impl std::fmt::Debug for Mux {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mux").field("channels", &self.channels()).field("closed", &self.is_closed()).finish()
    }
}

/// The channels that the peer opens. When it is dropped, what the peer opens is reset.
pub struct Incoming {
    shared: Arc<Shared>,
}

impl Incoming {
    /// The next channel; none once the mux has ended. Cancel safe.
    pub async fn accept(&mut self) -> Option<Channel> {
        poll_fn(|cx| {
            let mut state = self.shared.lock();
            if state.core.is_ended() {
                return Poll::Ready(None);
            }
            let Some(key) = state.core.accept() else {
                state.incoming = Some(cx.waker().clone());
                return Poll::Pending;
            };
            let id = state.core.id(&key);
            Poll::Ready(Some(Channel::new(self.shared.clone(), key, id)))
        })
        .await
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.core.refuse();
        self.shared.dispatch(state);
    }
}

impl std::fmt::Debug for Incoming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incoming").finish_non_exhaustive()
    }
}

/// What the driver and all the handles share.
struct Shared {
    state: Mutex<State>,
    room: Notify,
    ended: CancellationToken,
}

struct State {
    core: Core,
    /// By slot.
    waiting: Vec<Waiting>,
    incoming: Option<Waker>,
    driver: Option<Waker>,
    /// The driver sleeps and would send if there were something to send.
    idle: bool,
    /// The driver does not read because too much is unread.
    paused: bool,
    /// Something happened that the driver must look at even if it cannot send.
    must_run: bool,
    /// When a close that was asked for must be over.
    close_by: Option<Instant>,
}

#[derive(Default)]
struct Waiting {
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Shared {
    fn new(core: Core) -> Self {
        let state = State {
            core,
            waiting: Vec::new(),
            incoming: None,
            driver: None,
            idle: false,
            paused: false,
            must_run: false,
            close_by: None,
        };
        Self { state: Mutex::new(state), room: Notify::new(), ended: CancellationToken::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The core keeps its invariants between statements; a panic of another holder does not make it useless.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes the core's events on, and wakes the driver if there is work for it. To be called after every change.
    fn dispatch(&self, mut state: MutexGuard<'_, State>) {
        let mut wake = Vec::new();
        let mut rooms = 0;
        while let Some(event) = state.core.poll_event() {
            match event {
                Event::Incoming => wake.extend(state.incoming.take()),
                Event::Readable(slot) => wake.extend(state.waiting.get_mut(slot).and_then(|slot| slot.reader.take())),
                Event::Writable(slot) => wake.extend(state.waiting.get_mut(slot).and_then(|slot| slot.writer.take())),
                Event::Room => rooms += 1,
            }
        }
        let resumes = state.paused && state.core.wants_input();
        if state.must_run || resumes || (state.idle && state.core.wants_transmit()) {
            (state.idle, state.paused) = (false, state.paused && !resumes);
            wake.extend(state.driver.take());
        }
        let closed = state.core.is_closed();
        drop(state);
        if closed {
            self.room.notify_waiters();
        } else {
            (0..rooms).for_each(|_| self.room.notify_one());
        }
        wake.into_iter().for_each(Waker::wake);
    }
}

impl State {
    fn waiting(&mut self, slot: usize) -> &mut Waiting {
        if self.waiting.len() <= slot {
            self.waiting.resize_with(slot + 1, Waiting::default);
        }
        &mut self.waiting[slot]
    }
}

/// What a channel's failure looks like to whoever reads or writes it; the failure itself is the error's source.
fn channel_error(failure: ChannelFailure) -> io::Error {
    let kind = match failure {
        ChannelFailure::ResetByPeer | ChannelFailure::Reset | ChannelFailure::Unread | ChannelFailure::DataAfterEnd => {
            io::ErrorKind::ConnectionReset
        }
        ChannelFailure::Aborted => io::ErrorKind::ConnectionAborted,
        ChannelFailure::Finished => io::ErrorKind::BrokenPipe,
    };
    io::Error::new(kind, failure)
}
