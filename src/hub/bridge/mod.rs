//! Bridges: pairs of legs at the streaming endpoint.
//!
//! Owns every bridge from the moment its two tickets are minted until both legs are gone: who may join, the time
//! limit of the handshake, the end and its reason. Does not know HTTP or what the bytes mean.
//! Invariant: a ticket admits one leg, once; a bridge that stands on an admission that no longer holds ends.

mod fuzz;
mod relay;

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{mpsc, watch},
    time::{Instant, interval_at, sleep, sleep_until},
};
use tokio_util::task::TaskTracker;

pub use self::fuzz::{fuzz_frames, fuzz_relay};
use self::relay::{BufferPool, Counters, Ended, Goodbye, Relay, Relayed};
pub(in crate::hub) use self::relay::{Leg, Side};
use super::{
    metrics::{Counted, HubMetrics},
    record::Admission,
};
use crate::{
    auth::{Ticket, TicketHash},
    base::{Identity, Name, Secret, StreamName},
    config::HubLimits,
    proto::{
        streams::MUX_STREAM,
        websocket::{self, PeerClose},
    },
};

/// The bytes under a leg: TLS on a socket.
pub(in crate::hub) trait LegIo: AsyncRead + AsyncWrite + Send + Unpin + 'static {
    /// True once the other end has ended or reset the connection, even if there is more of it to read.
    fn is_gone(&self) -> bool;
    /// From now on the connection's end is a reset.
    fn end_with_reset(&self);
}

/// A receiver that takes nothing of what a sender has left behind has at least this many times the write stall timeout,
/// a quarter of an hour if that is not changed, which is as long as connections wait by default: people suspend
/// programs. For ever would be a bridge for each program that hangs.
const ABANDONED: u32 = 30;
/// And at most this, whatever the timeout.
const MOST_ABANDONED: Duration = Duration::from_secs(24 * 3600);
/// How long a leg whose admission was withdrawn may take for its last frame: with its answer it still ends within the
/// 5 s that a revocation may take (threats.md, row 21).
const REVOKED_GOODBYE: Duration = Duration::from_secs(4);
/// How often a daemon's leg that waits for the other one is looked after.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// What the survivor of a bridge is told, as the Azure gateway does (wire.md, section d).
const DISCONNECTED: (u16, &str) = (1011, "WS disconnected");
/// What both legs are told when the hub stops: come back later (wire.md, section j).
const RESTARTING: (u16, &str) = (1012, "hub restarting");
/// What both legs are told when an admission was withdrawn.
const REVOKED: (u16, &str) = (1008, "revoked");
/// What the first leg is told when the second does not come.
const TOO_LATE: (u16, &str) = (1011, "the other side did not connect in time");

/// A bridge's ID: 32 hexadecimal digits, the `sid` of its URLs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(in crate::hub) struct Sid(Box<str>);

impl fmt::Display for Sid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a bridge is for, and the service's admission it stands on.
#[derive(Debug, Clone)]
pub(in crate::hub) struct About {
    pub(in crate::hub) identity: Identity,
    pub(in crate::hub) stream: StreamName,
    pub(in crate::hub) policy: Name,
    pub(in crate::hub) policy_key: Secret,
}

/// Why there is no room for another bridge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(in crate::hub) enum Full {
    /// In the hub.
    #[error("the hub has as many device streams as it may have")]
    Hub,
    /// At this device.
    #[error("this device has as many device streams as it may have")]
    Device,
}

/// Why a bridge ends, from outside of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    Revoked,
    DeviceLost,
    Shutdown,
}

/// All bridges of a hub. Cheap to clone; clones share them.
#[derive(Debug, Clone)]
pub(in crate::hub) struct Bridges {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    table: Mutex<Table>,
    tasks: TaskTracker,
    metrics: HubMetrics,
    pool: BufferPool,
    stall: Duration,
}

#[derive(Debug, Default)]
struct Table {
    bridges: HashMap<Sid, Entry>,
    tickets: HashMap<TicketHash, (Sid, Side)>,
    per_device: HashMap<Identity, usize>,
}

/// A bridge as others see it.
#[derive(Debug)]
struct Entry {
    about: About,
    device_admission: Option<Admission>,
    joined: bool,
    tickets: [TicketHash; 2],
    inbox: mpsc::Sender<ToBridge>,
    stop: watch::Sender<Option<Stop>>,
}

enum ToBridge {
    Leg(Side, Box<BoxedLeg>),
    Expires(Instant),
}

/// A bridge whose device has not answered yet. Dropping it takes the bridge back.
pub(in crate::hub) struct Reservation {
    bridges: Bridges,
    pub(in crate::hub) sid: Sid,
    pub(in crate::hub) service: Ticket,
    pub(in crate::hub) device: Ticket,
    kept: bool,
}

/// One leg's right to join, taken out of the table: the ticket is used up.
pub(in crate::hub) struct Seat {
    side: Side,
    inbox: mpsc::Sender<ToBridge>,
}

impl Seat {
    /// Takes the seat. If the bridge has ended meanwhile, the leg is dropped.
    pub(in crate::hub) async fn join(self, leg: Leg<Box<dyn LegIo>>) {
        // Room for both legs is in the inbox; an error means that the bridge is gone.
        let _ = self.inbox.send(ToBridge::Leg(self.side, Box::new(leg))).await;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.kept {
            self.bridges.forget(&self.sid);
        }
    }
}

impl Reservation {
    /// The device accepted: both legs may still come until `expires`.
    pub(in crate::hub) fn accepted(&self, admission: Admission, expires: Instant) {
        if let Some(entry) = self.bridges.lock().bridges.get_mut(&self.sid) {
            entry.device_admission = Some(admission);
            // The inbox has room for this one message beside both legs.
            let _ = entry.inbox.try_send(ToBridge::Expires(expires));
        }
    }

    /// The bridge lives on by itself.
    pub(in crate::hub) fn keep(mut self) {
        self.kept = true;
    }
}

// === impl Bridges ===

impl Bridges {
    pub(in crate::hub) fn new(metrics: HubMetrics, stall: Duration) -> Self {
        let (table, tasks, pool) = (Mutex::default(), TaskTracker::new(), BufferPool::default());
        Self { inner: Arc::new(Inner { table, tasks, metrics, pool, stall }) }
    }

    /// Mints a bridge's two tickets. It waits for its legs until `expires`, or as `Reservation::accepted` says.
    pub(in crate::hub) fn reserve(
        &self,
        about: About,
        random: [[u8; 32]; 3],
        expires: Instant,
        limits: &HubLimits,
    ) -> Result<Reservation, Full> {
        let [sid, service, device] = random;
        let sid = Sid(hex(&sid[..16]).into());
        let (service, device) = (Ticket::from_random(service), Ticket::from_random(device));
        let (inbox, legs) = mpsc::channel(3);
        let (stop, stopped) = watch::channel(None);
        let tickets = [service.hash(), device.hash()];
        let life = Life { bridges: self.clone(), sid: sid.clone(), about: about.clone(), began: Instant::now() };
        let mut table = self.lock();
        if table.bridges.len() >= limits.max_bridges {
            return Err(Full::Hub);
        }
        let of_device = table.per_device.entry(about.identity.clone()).or_default();
        if *of_device >= limits.max_bridges_per_device {
            return Err(Full::Device);
        }
        *of_device += 1;
        table.tickets.insert(tickets[0], (sid.clone(), Side::Service));
        table.tickets.insert(tickets[1], (sid.clone(), Side::Device));
        table.bridges.insert(sid.clone(), Entry { about, device_admission: None, joined: false, tickets, inbox, stop });
        drop(table);
        self.inner.tasks.spawn(life.run(legs, stopped, expires));
        Ok(Reservation { bridges: self.clone(), sid, service, device, kept: false })
    }

    /// Uses a ticket up. The path must name the same bridge and side that the ticket was minted for.
    pub(in crate::hub) fn redeem(&self, token: &[u8], sid: &str, side: Side) -> Option<Seat> {
        let hash = TicketHash::of_token(token);
        let mut table = self.lock();
        let (ticket_sid, ticket_side) = table.tickets.get(&hash)?;
        if &*ticket_sid.0 != sid || *ticket_side != side {
            return None;
        }
        let (sid, side) = table.tickets.remove(&hash)?;
        let inbox = table.bridges.get(&sid)?.inbox.clone();
        Some(Seat { side, inbox })
    }

    /// True if this ticket would be redeemed.
    pub(in crate::hub) fn knows(&self, token: &[u8], sid: &str, side: Side) -> bool {
        let table = self.lock();
        let ticket = table.tickets.get(&TicketHash::of_token(token));
        ticket.is_some_and(|(ticket_sid, ticket_side)| &*ticket_sid.0 == sid && *ticket_side == side)
    }

    /// The device says that its leg of this bridge is gone: the service need not wait for a time-out.
    pub(in crate::hub) fn device_lost(&self, identity: &Identity, sid: &str) {
        let table = self.lock();
        if let Some(entry) = table.bridges.get(&Sid(sid.into())).filter(|entry| entry.about.identity == *identity) {
            entry.stop.send_replace(Some(Stop::DeviceLost));
        }
    }

    /// Ends the bridges that `holds` no longer vouches for.
    pub(in crate::hub) fn end_unless(&self, holds: impl Fn(&About, Option<&Admission>) -> bool) {
        for entry in self.lock().bridges.values() {
            if !holds(&entry.about, entry.device_admission.as_ref()) {
                entry.stop.send_replace(Some(Stop::Revoked));
            }
        }
    }

    /// Ends mux bridges, which resume elsewhere or later, and unfinished ones; plain ones too if asked.
    pub(in crate::hub) fn shut_down(&self, plain: Plain) {
        for entry in self.lock().bridges.values() {
            if entry.about.is_mux() || !entry.joined || plain == Plain::End {
                entry.stop.send_replace(Some(Stop::Shutdown));
            }
        }
    }

    /// How many bridges exist, unfinished ones included.
    pub(in crate::hub) fn count(&self) -> usize {
        self.lock().bridges.len()
    }

    /// Waits until the last bridge has ended. Call after the last `reserve`.
    pub(in crate::hub) async fn ended(&self) {
        self.inner.tasks.close();
        self.inner.tasks.wait().await;
    }

    fn forget(&self, sid: &Sid) {
        let mut table = self.lock();
        let Some(entry) = table.bridges.remove(sid) else { return };
        for ticket in &entry.tickets {
            table.tickets.remove(ticket);
        }
        if let Some(count) = table.per_device.get_mut(&entry.about.identity) {
            *count -= 1;
            if *count == 0 {
                table.per_device.remove(&entry.about.identity);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Every change is complete when its statement is: a panic elsewhere cannot have torn the table.
        self.inner.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What happens to plain bridges at shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::hub) enum Plain {
    /// They may end by themselves.
    Drain,
    /// They end now.
    End,
}

impl About {
    fn is_mux(&self) -> bool {
        self.stream.as_str() == MUX_STREAM
    }
}

// === The life of one bridge ===

struct Life {
    bridges: Bridges,
    sid: Sid,
    about: About,
    began: Instant,
}

/// How a bridge ended: the metric's label, and what each leg still gets.
struct Verdict {
    reason: &'static str,
    stop: Option<Stop>,
    to_service: Goodbye,
    to_device: Goodbye,
}

type BoxedLeg = Leg<Box<dyn LegIo>>;
type BoxedRelay = Relay<Box<dyn LegIo>, Box<dyn LegIo>>;

impl Life {
    async fn run(self, legs: mpsc::Receiver<ToBridge>, stop: watch::Receiver<Option<Stop>>, expires: Instant) {
        let _forget = Forget { bridges: self.bridges.clone(), sid: self.sid.clone() };
        let mut stop = stop;
        match self.pair(legs, &mut stop, expires).await {
            Ok((service, device)) => self.relay(service, device, stop).await,
            Err((reason, waiting)) => self.abandon(reason, waiting).await,
        }
    }

    /// Waits for both legs, in either order.
    async fn pair(
        &self,
        mut legs: mpsc::Receiver<ToBridge>,
        stop: &mut watch::Receiver<Option<Stop>>,
        mut expires: Instant,
    ) -> Result<(BoxedLeg, BoxedLeg), (Unpaired, Vec<BoxedLeg>)> {
        let (mut service, mut device) = (None, None);
        let reason = loop {
            let alone = if service.is_some() { Side::Service } else { Side::Device };
            tokio::select! {
                message = legs.recv() => match message {
                    Some(ToBridge::Leg(Side::Service, leg)) => service = Some(*leg),
                    Some(ToBridge::Leg(Side::Device, leg)) => device = Some(*leg),
                    Some(ToBridge::Expires(later)) => expires = later,
                    None => break Unpaired::Withdrawn,
                },
                stop = stopped(stop) => break Unpaired::Stopped(stop),
                () = sleep_until(expires) => break Unpaired::TooLate,
                () = self.wait(service.as_mut().or(device.as_mut())) => break Unpaired::Left(alone),
            }
            match (service.take(), device.take()) {
                (Some(service), Some(device)) => return Ok((service, device)),
                (one, other) => (service, device) = (one, other),
            }
        };
        Err((reason, service.into_iter().chain(device).collect()))
    }

    /// The life of a leg that is alone. What an SDK's program has sent is delivered even if it has left meanwhile; a
    /// daemon that has left has given its hello up, so the bridge goes with it.
    async fn wait(&self, alone: Option<&mut BoxedLeg>) {
        let Some(leg) = alone else { return std::future::pending().await };
        let pool = &self.bridges.inner.pool;
        if !self.about.is_mux() {
            match leg.wait(pool).await {}
        }
        while !leg.has_left() {
            tokio::select! {
                never = leg.wait(pool) => match never {},
                () = sleep(LOOK_EVERY) => {}
            }
        }
    }

    async fn relay(&self, service: BoxedLeg, device: BoxedLeg, mut stop: watch::Receiver<Option<Stop>>) {
        let inner = &self.bridges.inner;
        let _open = Counted::new(&inner.metrics.bridges_open);
        if let Some(entry) = self.bridges.lock().bridges.get_mut(&self.sid) {
            entry.joined = true;
        }
        tracing::debug!(sid = %self.sid, device = %self.about.identity, stream = %self.about.stream, "bridge joined");
        let counters = Counters {
            to_device: inner.metrics.relayed_bytes.with_label_values(&["to_device"]),
            to_service: inner.metrics.relayed_bytes.with_label_values(&["to_service"]),
            this: Relayed::default(),
        };
        let mut relay = Relay::new(service, device, inner.pool.clone(), counters);
        let pause = inner.stall.saturating_mul(ABANDONED).min(MOST_ABANDONED);
        let mut looks = interval_at(Instant::now() + pause, pause);
        // A mux reads whatever its applications do, and what it lacks its link sends again: one that takes nothing is gone.
        let rest = if self.about.is_mux() { inner.stall } else { pause };
        let verdict = loop {
            tokio::select! {
                biased;
                stopped = stopped(&mut stop) => break Verdict::of_stop(stopped, inner.stall),
                side = relay.run() => break Verdict::of_end(side, &relay, [inner.stall, rest]),
                // Its receiver has had this pause.
                _ = looks.tick() => if let Some(side) = relay.abandoned() {
                    break Verdict::of_end(side, &relay, [inner.stall; 2]);
                },
            }
        };
        self.log(verdict.reason, relay.relayed());
        self.finish(relay, verdict, stop).await;
    }

    /// Gives each leg its rest. One that does not take it, or not before the hub must end it, ends with a reset: it must
    /// not take a part for the whole.
    async fn finish(&self, mut relay: BoxedRelay, verdict: Verdict, mut stop: watch::Receiver<Option<Stop>>) {
        let revoked = verdict.stop == Some(Stop::Revoked);
        if revoked {
            relay.forget_rest();
        }
        tokio::select! {
            () = relay.finish(verdict.to_service, verdict.to_device) => {}
            () = sleep(REVOKED_GOODBYE), if revoked => {}
            () = stopped_again(&mut stop), if !revoked => {}
        }
        for side in relay.cut_off() {
            tracing::info!(sid = %self.sid, device = %self.about.identity, stream = %self.about.stream, ?side,
                "a leg did not take the end of its device stream: reset");
        }
    }

    /// Not both legs came.
    async fn abandon(&self, reason: Unpaired, waiting: Vec<BoxedLeg>) {
        let ended = waiting.first().and_then(Leg::ended);
        let goodbye = |(code, text)| close(code, text);
        let (label, goodbye) = match reason {
            Unpaired::Withdrawn => ("withdrawn", goodbye(DISCONNECTED)),
            Unpaired::TooLate => ("handshake_timeout", goodbye(TOO_LATE)),
            Unpaired::Stopped(stop) => (stop.label(), goodbye(stop.close())),
            Unpaired::Left(side) => (label(side, ended), last_frame(ended).1),
        };
        if reason != Unpaired::Withdrawn {
            self.log(label, Relayed::default());
        }
        for leg in waiting {
            leg.dismiss(Goodbye { frame: goodbye.clone(), patience: self.bridges.inner.stall }).await;
        }
    }

    /// The one closing line of a device stream.
    fn log(&self, reason: &'static str, relayed: Relayed) {
        self.bridges.inner.metrics.bridges.with_label_values(&[reason]).inc();
        tracing::info!(sid = %self.sid, device = %self.about.identity, stream = %self.about.stream,
            policy = %self.about.policy, reason, to_device = relayed.to_device, to_service = relayed.to_service,
            seconds = self.began.elapsed().as_secs(), "device stream ended");
    }
}

/// Why a bridge was never joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unpaired {
    /// The device rejected or did not answer.
    Withdrawn,
    /// A leg did not come.
    TooLate,
    /// The leg that had come has left.
    Left(Side),
    Stopped(Stop),
}

async fn stopped(stop: &mut watch::Receiver<Option<Stop>>) -> Stop {
    let stopped = stop.wait_for(Option::is_some).await.ok().and_then(|stop| *stop);
    match stopped {
        Some(stop) => stop,
        // The entry is gone without a word: the reservation was withdrawn, which the inbox tells.
        None => std::future::pending().await,
    }
}

/// A bridge that is saying goodbye must end at once.
async fn stopped_again(stop: &mut watch::Receiver<Option<Stop>>) {
    while stop.changed().await.is_ok() {
        if matches!(*stop.borrow_and_update(), Some(Stop::Revoked | Stop::Shutdown)) {
            return;
        }
    }
    // The entry is in the table until this bridge's task ends.
    std::future::pending().await
}

impl Stop {
    fn label(self) -> &'static str {
        match self {
            Self::Revoked => "revoked",
            Self::DeviceLost => "device_lost",
            Self::Shutdown => "shutdown",
        }
    }

    fn close(self) -> (u16, &'static str) {
        match self {
            Self::Revoked => REVOKED,
            Self::DeviceLost => DISCONNECTED,
            Self::Shutdown => RESTARTING,
        }
    }
}

impl Verdict {
    fn of_stop(stop: Stop, patience: Duration) -> Self {
        let (code, text) = stop.close();
        let [to_service, to_device] = [(); 2].map(|()| Goodbye { frame: close(code, text), patience });
        Self { reason: stop.label(), stop: Some(stop), to_service, to_device }
    }

    /// `patience` is for the leg that ended, and for the other, which must get what the first one left behind.
    fn of_end(side: Side, relay: &BoxedRelay, patience: [Duration; 2]) -> Self {
        let ended = match side {
            Side::Service => relay.service.ended(),
            Side::Device => relay.device.ended(),
        };
        if let Some(ended) = ended {
            tracing::debug!(?side, how = %ended, "a leg ended");
        }
        let (clean, to_ended) = last_frame(ended);
        let survivor = if clean { close(1000, "") } else { close(DISCONNECTED.0, DISCONNECTED.1) };
        let to_ended = Goodbye { frame: to_ended, patience: patience[0] };
        let survivor = Goodbye { frame: survivor, patience: patience[1] };
        let (to_service, to_device) = match side {
            Side::Service => (to_ended, survivor),
            Side::Device => (survivor, to_ended),
        };
        Self { reason: label(side, ended), stop: None, to_service, to_device }
    }
}

/// The hub's Close frame.
fn close(code: u16, reason: &str) -> Vec<u8> {
    websocket::close(Some(code), reason, None)
}

/// Whether a leg ended cleanly, and what it is still told.
fn last_frame(ended: Option<&Ended>) -> (bool, Vec<u8>) {
    match ended {
        Some(Ended::Closed(PeerClose { code: None, .. })) => (true, websocket::close(None, "", None)),
        Some(Ended::Closed(PeerClose { code: Some(code), .. })) => (*code == 1000, close(*code, "")),
        Some(Ended::Violated(violation)) => (false, close(violation.close_code(), &violation.to_string())),
        Some(Ended::Lost(_)) | None => (false, Vec::new()),
    }
}

fn label(side: Side, ended: Option<&Ended>) -> &'static str {
    match (side, ended) {
        (Side::Service, Some(Ended::Closed(_))) => "service_closed",
        (Side::Device, Some(Ended::Closed(_))) => "device_closed",
        (Side::Service, Some(Ended::Violated(_))) => "service_violation",
        (Side::Device, Some(Ended::Violated(_))) => "device_violation",
        (Side::Service, Some(Ended::Lost(_)) | None) => "service_lost",
        (Side::Device, Some(Ended::Lost(_)) | None) => "device_lost",
    }
}

/// Takes the bridge out of the table when its task ends, however it ends.
struct Forget {
    bridges: Bridges,
    sid: Sid,
}

impl Drop for Forget {
    fn drop(&mut self) {
        self.bridges.forget(&self.sid);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        pin::Pin,
        sync::atomic::{AtomicBool, Ordering::Relaxed},
        task::{Context, Poll},
    };

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, ReadBuf};

    use super::*;

    /// The hub's end of a pipe, and whether it was reset.
    struct End(DuplexStream, Arc<AtomicBool>);

    impl LegIo for End {
        fn is_gone(&self) -> bool {
            false
        }

        fn end_with_reset(&self) {
            self.1.store(true, Relaxed);
        }
    }

    impl AsyncRead for End {
        fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.get_mut().0).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for End {
        fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.get_mut().0).poll_write(cx, buf)
        }

        fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.get_mut().0).poll_flush(cx)
        }

        fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.get_mut().0).poll_shutdown(cx)
        }
    }

    /// A bridge whose service has said 200 bytes and a Close, which the hub has read; the pipe to its device holds 64.
    struct Left {
        bridges: Bridges,
        service: DuplexStream,
        device: DuplexStream,
        reset: Arc<AtomicBool>,
    }

    impl Left {
        async fn new() -> Self {
            let bridges = Bridges::new(HubMetrics::default(), Duration::from_secs(30));
            let about = About {
                identity: "pump".parse().unwrap(),
                stream: "ssh".parse().unwrap(),
                policy: "service".parse().unwrap(),
                policy_key: Secret::new([1; 32]),
            };
            let random = [[1; 32], [2; 32], [3; 32]];
            let expires = Instant::now() + Duration::from_secs(60);
            let reservation = bridges.reserve(about, random, expires, &HubLimits::default()).unwrap();
            let mut far = Vec::new();
            let mut resets = Vec::new();
            for (side, ticket, size) in
                [(Side::Service, &reservation.service, 4096), (Side::Device, &reservation.device, 64)]
            {
                let (io, end) = tokio::io::duplex(size);
                let (reset, token) = (Arc::new(AtomicBool::new(false)), ticket.token().expose());
                let seat = bridges.redeem(token, &reservation.sid.0, side).unwrap();
                seat.join(Leg::new(Box::new(End(io, reset.clone())), bytes::Bytes::new())).await;
                far.push(end);
                resets.push(reset);
            }
            reservation.keep();
            let (device, mut service) = (far.pop().unwrap(), far.pop().unwrap());
            // Masked with zeros: as it is.
            service.write_all(&[&[0x82, 0x80 | 126, 0, 200, 0, 0, 0, 0], &[7; 200][..]].concat()).await.unwrap();
            service.write_all(&[0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8]).await.unwrap();
            Self { bridges, service, device, reset: resets.pop().unwrap() }
        }

        /// What the device gets in the end.
        async fn read(&mut self) -> Vec<u8> {
            let mut got = Vec::new();
            self.device.read_to_end(&mut got).await.unwrap();
            got
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_sender_leaves_behind_waits_for_a_receiver_that_pauses() {
        let mut left = Left::new().await;
        tokio::time::sleep(Duration::from_secs(14 * 60)).await;
        assert_eq!(left.bridges.count(), 1);
        assert_eq!(left.read().await, [&[0x82, 126, 0, 200], &[7; 200][..], &[0x88, 2, 0x03, 0xe8]].concat());
        assert!(!left.reset.load(Relaxed));
        drop(left.service);
        left.bridges.ended().await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_receiver_that_reads_only_after_it_has_spoken_gets_its_rest_too() {
        let mut left = Left::new().await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let message = [&[0x82, 0x80 | 126, 0x40, 0, 0, 0, 0, 0], &[8; 0x4000][..]].concat();
        tokio::time::timeout(Duration::from_secs(1), left.device.write_all(&message)).await.unwrap().unwrap();
        assert!(left.read().await.ends_with(&[7, 0x88, 2, 0x03, 0xe8]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_receiver_that_pauses_for_too_long_is_reset() {
        let mut left = Left::new().await;
        tokio::time::sleep(Duration::from_secs(16 * 60)).await;
        assert!(left.reset.load(Relaxed) && left.bridges.count() == 0);
        assert_eq!(left.read().await.len(), 64);
    }

    #[tokio::test(start_paused = true)]
    async fn a_revocation_does_not_wait_for_a_receiver_that_pauses() {
        let left = Left::new().await;
        tokio::time::sleep(Duration::from_secs(60)).await;
        left.bridges.end_unless(|_, _| false);
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert!(left.reset.load(Relaxed) && left.bridges.count() == 0);
    }
}
