//! A view of a carrier for those who watch over it.
//!
//! Owns the few figures that cross from the task that moves the bytes to others. Does not know how they come about.
//! Invariant: nothing here blocks the carrier.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    task::Waker,
    time::Duration,
};

use futures_util::task::AtomicWaker;
use tokio::{sync::watch, time::Instant};

use crate::transport::net::is_own_address;

/// A reason of a Close is cut here: a control frame holds 125 bytes, two of them the code.
const MAX_REASON: usize = 123;
/// "No figure yet".
const NONE: u64 = u64::MAX;

/// A view of a carrier: its round-trip time, its silence, and means to probe and close it.
#[derive(Clone, Debug)]
pub struct CarrierMonitor(Arc<Shared>);

impl CarrierMonitor {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    /// The last measured time from ping to pong: to the hub and back.
    pub fn rtt(&self) -> Option<Duration> {
        let micros = self.0.rtt.load(Relaxed);
        (micros != NONE).then(|| Duration::from_micros(micros))
    }

    /// How long nothing has been heard.
    pub fn silent_for(&self) -> Duration {
        self.0.silent_for(Instant::now())
    }

    /// True if data or a ping has been unanswered for too long.
    pub fn is_suspect(&self) -> bool {
        self.0.suspected.load(Relaxed)
    }

    /// Waits until data or a ping has been unanswered for too long (5 s by default). Waits for ever if that never
    /// happens: combine it with the carrier's end.
    pub async fn suspect(&self) {
        let mut suspect = self.0.suspect.subscribe();
        // The sender lives as long as `self`.
        let _ = suspect.wait_for(|suspect| *suspect).await;
    }

    /// Waits until something is heard again after a suspicion.
    pub async fn recovered(&self) {
        let mut suspect = self.0.suspect.subscribe();
        let _ = suspect.wait_for(|suspect| !*suspect).await;
    }

    /// Sends a ping now: the network has changed, or somebody doubts. Without an answer the carrier is suspect after a
    /// second; and if this host no longer has the address that the connection comes from, the carrier ends at once.
    pub fn probe(&self) {
        self.0.probe.store(true, Relaxed);
        self.0.prober.wake();
    }

    /// The next shutdown of the carrier sends this code and reason instead of 1000.
    pub fn close_as(&self, code: u16, reason: &str) {
        let mut end = reason.len().min(MAX_REASON);
        while !reason.is_char_boundary(end) {
            end -= 1;
        }
        *self.0.close.lock().unwrap_or_else(PoisonError::into_inner) = Some((code, reason[..end].to_owned()));
    }
}

/// What the carrier and its monitors share.
#[derive(Debug)]
pub(super) struct Shared {
    born: Instant,
    /// Microseconds.
    rtt: AtomicU64,
    /// Milliseconds after `born`.
    heard: AtomicU64,
    /// Where the connection below comes from, if it is one of this host's own addresses.
    address: OnceLock<SocketAddr>,
    suspect: watch::Sender<bool>,
    /// What `suspect` holds, without its lock.
    suspected: AtomicBool,
    probe: AtomicBool,
    prober: AtomicWaker,
    close: Mutex<Option<(u16, String)>>,
}

impl Shared {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            born: now,
            rtt: AtomicU64::new(NONE),
            heard: AtomicU64::new(0),
            address: OnceLock::new(),
            suspect: watch::Sender::new(false),
            suspected: AtomicBool::new(false),
            probe: AtomicBool::new(false),
            prober: AtomicWaker::new(),
            close: Mutex::new(None),
        }
    }

    pub(super) fn set_rtt(&self, rtt: Duration) {
        self.rtt.store(u64::try_from(rtt.as_micros()).unwrap_or(NONE - 1), Relaxed);
    }

    pub(super) fn set_heard(&self, now: Instant) {
        let after = now.duration_since(self.born).as_millis();
        self.heard.store(u64::try_from(after).unwrap_or(u64::MAX), Relaxed);
        self.set_suspect(false);
    }

    pub(super) fn silent_for(&self, now: Instant) -> Duration {
        now.duration_since(self.born).saturating_sub(Duration::from_millis(self.heard.load(Relaxed)))
    }

    pub(super) fn set_suspect(&self, suspect: bool) {
        if self.suspected.swap(suspect, Relaxed) != suspect {
            self.suspect.send_replace(suspect);
        }
    }

    /// Notes where the connection below comes from.
    pub(super) fn set_address(&self, address: SocketAddr) {
        // It comes from one address as long as it lives.
        let _ = self.address.set(address);
    }

    /// The address that the connection below comes from, if this host no longer has it.
    pub(super) fn lost_address(&self) -> Option<IpAddr> {
        self.address.get().filter(|address| !is_own_address(**address)).map(SocketAddr::ip)
    }

    pub(super) fn on_probe(&self, waker: &Waker) {
        self.prober.register(waker);
    }

    pub(super) fn take_probe(&self) -> bool {
        self.probe.swap(false, Relaxed)
    }

    /// The code and reason for our Close.
    pub(super) fn take_close(&self) -> (u16, String) {
        self.close.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or((1000, String::new()))
    }
}
