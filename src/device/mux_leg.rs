//! Mux device streams at the device: one per service daemon.
//!
//! Owns the sessions, their links, and who may resume which. Does not know stream requests. Invariant: a link is
//! resumed only for the policy that created it; what an operator does never ends the connections of another one.

use std::{
    collections::{HashMap, HashSet},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug, info, warn};

use super::metrics::DeviceMetrics;
use crate::{
    agent::{HubCarrier, MuxSession, NetworkChanges, end_session},
    base::{Name, Pass},
    config::LinkLimits,
    forward::{Outlet, serve_channel},
    proto::control::lost_topic,
    transport::{
        carrier::CarrierMonitor,
        hello::{
            HelloError, InstanceId, LinkControl, LinkId, LinkTable, LocalHello, PeerHello, Received, Session, receive,
        },
        mux::{Mux, MuxError, Role},
    },
};

/// How long channels have to notice that their mux is gone; they only have to close their sockets.
const CHANNELS_END: Duration = Duration::from_secs(5);
/// The same while the mux waits for them with its goodbye: one that hangs learns it from the mux.
const CHANNELS_STOP: Duration = Duration::from_secs(1);
/// What a service daemon hears whose place was taken by another one that says it is the same.
const TWIN: &str = "another service daemon with the same instance ID took its place; was its state_dir copied?";
/// A new link that hears nothing of its service for so long ends, and has taken nobody's place: the service gave its
/// hello up. The 10 s of a hello and the 60 s that such a link lives without a carrier.
const UNHEARD: Duration = Duration::from_secs(70);
/// How often a new link is asked whether it has heard its service; it does so a round trip after the hello.
const HEARD_LOOK: Duration = Duration::from_millis(50);
/// New links of one service that have not heard it. It makes one attempt at a time, so all but one are left over from
/// attempts that it gave up after 10 s each; when more come the oldest ends.
const MAX_UNHEARD: usize = 8;

/// All mux legs of a device. Clones share them.
#[derive(Clone)]
pub(super) struct MuxLegs {
    settings: Arc<Mutex<Settings>>,
    outlet: Outlet,
    outbox: mpsc::Sender<String>,
    network: NetworkChanges,
    metrics: DeviceMetrics,
    open: Arc<Mutex<Table>>,
}

/// What a reload may change: it holds for the device streams to come.
#[derive(Clone)]
pub(super) struct Settings {
    /// What we say of ourselves.
    pub(super) hello: LocalHello,
    /// Bounds of the mux.
    pub(super) limits: LinkLimits,
    /// Service daemons at once.
    pub(super) max_services: usize,
}

#[derive(Default)]
struct Table {
    next: u64,
    sessions: HashMap<u64, Entry>,
    /// Who was admitted and is not a session yet: the hello is not done.
    admitted: HashMap<u64, Who>,
}

/// Whom a session belongs to: an installation, under a policy.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Who(InstanceId, Option<Name>);

/// A session that runs.
struct Entry {
    who: Who,
    link: Option<LinkControl>,
    /// The bridge of the present carrier, and a view of it.
    sid: Option<String>,
    monitor: CarrierMonitor,
    /// Rings when the link has another carrier.
    resumed: Arc<Notify>,
    /// The mux, once it runs.
    mux: Option<Mux>,
    /// Ends the session.
    end: CancellationToken,
}

impl MuxLegs {
    pub(super) fn new(
        settings: Settings,
        outlet: Outlet,
        outbox: mpsc::Sender<String>,
        network: NetworkChanges,
        metrics: DeviceMetrics,
    ) -> Self {
        let settings = Arc::new(Mutex::new(settings));
        Self { settings, outlet, outbox, network, metrics, open: Arc::default() }
    }

    /// Device streams to come follow these settings.
    pub(super) fn reconfigure(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.settings.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn settings(&self) -> Settings {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a leg: a new session until its end, or a carrier for a link that waits for one. Gives the pass back when
    /// the hello is done.
    pub(super) async fn serve(
        &self,
        carrier: HubCarrier,
        policy: Option<Name>,
        sid: Option<String>,
        pass: Pass,
        stop: CancellationToken,
    ) {
        let (monitor, hello) = (carrier.monitor(), self.settings().hello);
        let admission = Admission::new(self, policy.clone());
        let received = tokio::select! {
            received = receive(Box::new(carrier), &hello, &admission) => received,
            () = stop.cancelled() => return,
        };
        // Up to here a leg costs without being counted among the services.
        drop(pass);
        match received {
            Ok(Received::New(session)) => self.serve_new(session, admission, (sid, monitor), stop).await,
            Ok(Received::Resumed(link)) => self.resumed(&link, sid, monitor),
            Err(error @ HelloError::Refused(_)) => info!("a mux device stream was not taken: {error}"),
            // The service has another carrier by now, or tries again.
            Err(error @ HelloError::Io(_)) => debug!("a mux device stream ended at its hello: {error}"),
            Err(error) => warn!("a mux device stream failed at its hello: {error}"),
        }
    }

    fn resumed(&self, link: &LinkControl, sid: Option<String>, monitor: CarrierMonitor) {
        let id = link.id();
        let mut table = self.lock();
        let entry = table.sessions.values_mut().find(|entry| entry.link.as_ref().is_some_and(|link| link.id() == id));
        if let Some(entry) = entry {
            entry.sid = sid;
            entry.monitor = monitor;
            entry.resumed.notify_one();
        }
    }

    /// The life of a session at the device.
    async fn serve_new(
        &self,
        session: Session,
        admission: Admission<'_>,
        (sid, monitor): (Option<String>, CarrierMonitor),
        stop: CancellationToken,
    ) {
        let begun = Instant::now();
        let policy = admission.policy.clone();
        let end = stop.child_token();
        let link = session.link.clone();
        let entry = Entry {
            who: Who(session.peer.instance, policy.clone()),
            link: link.clone(),
            sid,
            monitor,
            resumed: Arc::default(),
            mux: None,
            end: end.clone(),
        };
        let registration = self.register(entry);
        drop(admission);
        info!(resumable = link.is_some(), "device stream open");
        let why = tokio::select! {
            why = self.run(registration.key, session, policy, end) => why,
            () = self.watch(registration.key) => unreachable!("the watch has no end"),
            () = self.settle(registration.key, link.as_ref()) => unreachable!("what is settled stays so"),
        };
        drop(registration);
        info!(seconds = begun.elapsed().as_secs_f64(), "device stream ended: {why}");
    }

    /// Enters a session. It takes nobody's place before it is [settled](Self::settle).
    fn register(&self, entry: Entry) -> Registration<'_> {
        let mut table = self.lock();
        table.bound_unheard(&entry.who);
        let key = table.next;
        table.next += 1;
        table.sessions.insert(key, entry);
        self.metrics.services.set(i64::try_from(table.sessions.len()).unwrap_or(i64::MAX));
        Registration { legs: self, key }
    }

    /// Waits until the service is known to have a session, and ends then what it left behind. A hello alone says nothing:
    /// the hub may have kept it longer than the service waited, which has another session by now. No end.
    async fn settle(&self, key: u64, link: Option<&LinkControl>) {
        let is_heard = match link {
            Some(link) => timeout(UNHEARD, heard(link)).await.is_ok(),
            // The carrier itself is all there is.
            None => true,
        };
        self.lock().settle(key, is_heard);
        std::future::pending().await
    }

    /// Runs the mux and its channels until it ends, and says why it ended.
    async fn run(&self, key: u64, session: Session, policy: Option<Name>, end: CancellationToken) -> String {
        let MuxSession { mux, mut incoming, driver, link, peer: _ } =
            MuxSession::begin(session, Role::Server, &self.settings().limits);
        if let Some(entry) = self.lock().sessions.get_mut(&key) {
            entry.mux = Some(mux.clone());
        }
        let mut driver = pin!(driver);
        let mut channels = JoinSet::new();
        let cut = end.child_token();
        let ended = loop {
            tokio::select! {
                ended = &mut driver => break Some(ended),
                () = end.cancelled() => break None,
                Some(channel) = incoming.accept() => {
                    channels.spawn(serve_channel(channel, self.outlet.clone(), policy.clone(), cut.clone()).in_current_span());
                }
                Some(_) = channels.join_next(), if !channels.is_empty() => {}
            }
        };
        let lost = link.as_ref().and_then(LinkControl::end).map(|end| end.to_string());
        if matches!(ended, Some(Err(MuxError::Io(_)))) && lost.is_none() {
            // The hub may hold the other end of a carrier that broke here. Where the link or the mux ended for a reason of
            // its own, the last words are on their way, and this would overtake them.
            self.report_lost(key);
        }
        if ended.is_none() {
            cut.cancel();
            if lost.is_none() {
                // First, so that they end as what they are: stopped, not lost with their session.
                let _ = timeout(CHANNELS_STOP, async { while channels.join_next().await.is_some() {} }).await;
                end_session(&mux, driver.as_mut(), link.as_ref()).await;
            }
        }
        if let Some(link) = &link {
            link.say_goodbye("the device ends the device stream").await;
        }
        // If the mux broke, each channel has failed by itself, and its flow tells so; cut is who has not noticed.
        for _ in 0..2 {
            let _ = timeout(CHANNELS_END, async { while channels.join_next().await.is_some() {} }).await;
            cut.cancel();
        }
        match ended {
            Some(Ok(())) => "ended by the service".into(),
            Some(Err(error)) => lost.unwrap_or_else(|| error.to_string()),
            None => lost.unwrap_or_else(|| "ended here".into()),
        }
    }

    /// Tells the hub at once when the carrier of a session is lost or does not answer, and probes it when the network
    /// changes. Only the service can bring another carrier, and it cannot see what happens to ours. No end.
    async fn watch(&self, key: u64) {
        let mut network = self.network.from_now();
        loop {
            let entry = self
                .lock()
                .sessions
                .get(&key)
                .map(|entry| (entry.link.clone(), entry.monitor.clone(), entry.resumed.clone(), entry.sid.clone()));
            let Some((link, monitor, resumed, sid)) = entry else { return std::future::pending().await };
            tokio::select! {
                // The carrier may have been replaced since.
                () = network.changed() => self.monitor(key).unwrap_or(monitor).probe(),
                () = resumed.notified() => {}
                // What cannot be resumed lives as long as its carrier does.
                () = monitor.suspect(), if sid.is_some() && link.is_some() => self.report_leg(key, sid.as_deref()),
                () = gone(link.as_ref()) => {
                    // Of a link that has ended the last word is on its way, and this would overtake it.
                    if link.as_ref().is_some_and(|link| link.end().is_none()) {
                        self.report_leg(key, sid.as_deref());
                    }
                    match &link {
                        Some(link) if link.wait_attached().await => {}
                        _ => return std::future::pending().await,
                    }
                }
            }
        }
    }

    fn monitor(&self, key: u64) -> Option<CarrierMonitor> {
        self.lock().sessions.get(&key).map(|entry| entry.monitor.clone())
    }

    /// Reports the leg of that bridge, unless the session has another one by now: that one is good.
    fn report_leg(&self, key: u64, sid: Option<&str>) {
        let is_that = |present: &mut String| Some(present.as_str()) == sid;
        let sid = self.lock().sessions.get_mut(&key).and_then(|entry| entry.sid.take_if(is_that));
        self.report(sid);
    }

    fn report_lost(&self, key: u64) {
        let sid = self.lock().sessions.get_mut(&key).and_then(|entry| entry.sid.take());
        self.report(sid);
    }

    fn report(&self, sid: Option<String>) {
        if let Some(sid) = sid {
            // A full outbox means no control session either; then the hub finds out by itself.
            let _ = self.outbox.try_send(lost_topic(&sid));
        }
    }

    /// True if connections are open on some device stream: somebody waits if the hub is not reached.
    pub(super) fn has_flows(&self) -> bool {
        self.lock().sessions.values().any(|entry| entry.mux.as_ref().is_some_and(|mux| mux.channels() > 0))
    }

    /// True if connections wait for a carrier that only a stream request can bring.
    pub(super) fn awaits_request(&self) -> bool {
        let waits = |entry: &Entry| entry.sid.is_none() && entry.mux.as_ref().is_some_and(|mux| mux.channels() > 0);
        self.lock().sessions.values().any(waits)
    }

    /// One entry per session, for `culvert status`.
    pub(super) fn status(&self) -> serde_json::Value {
        let table = self.lock();
        let row = |entry: &Entry| {
            serde_json::json!({
                "policy": entry.who.1.as_ref().map(Name::as_str),
                "state": if entry.link.as_ref().is_none_or(LinkControl::attached) { "up" } else { "detached" },
                "rtt_seconds": entry.monitor.rtt().map(|rtt| rtt.as_secs_f64()),
            })
        };
        // What a service gave up is nothing that people need to see.
        table.sessions.values().filter(|entry| entry.is_heard()).map(row).collect()
    }
}

impl Table {
    fn settle(&self, key: u64, is_heard: bool) {
        match self.sessions.get(&key) {
            Some(_) if is_heard => self.succeed(key),
            Some(unheard) => unheard.close("nothing was heard from the service"),
            None => {}
        }
    }

    /// A session is its service's one from now on: it restarted, or gave the earlier ones up without a way to say so.
    fn succeed(&self, key: u64) {
        let Some(new) = self.sessions.get(&key) else { return };
        for (_, old) in self.sessions.iter().filter(|(earlier, old)| **earlier < key && old.who == new.who) {
            debug!("a service daemon begins anew; its earlier device stream ends");
            // Heard only by a daemon that lives, which then has a twin.
            old.close(TWIN);
        }
    }

    /// Makes room for another session of that service that it has not been heard on.
    fn bound_unheard(&self, who: &Who) {
        let unheard = |entry: &Entry| entry.who == *who && entry.is_live() && !entry.is_heard();
        let keys = || self.sessions.iter().filter(|(_, entry)| unheard(entry)).map(|(key, _)| *key);
        if keys().count() >= MAX_UNHEARD
            && let Some(oldest) = keys().min().and_then(|key| self.sessions.get(&key))
        {
            oldest.close("nothing was heard from the service, which began anew");
        }
    }

    /// How many others have a session or were admitted. A service counts once: it keeps one session, and what it left
    /// behind soon ends.
    fn others(&self, own: &Who) -> usize {
        let live = self.sessions.values().filter(|entry| entry.is_live()).map(|entry| &entry.who);
        live.chain(self.admitted.values()).filter(|who| *who != own).collect::<HashSet<_>>().len()
    }

    /// Makes room: of the other services that have no carrier and no connection here, the one that left first loses its
    /// place. False if there is none.
    fn end_longest_idle(&self, own: &Who) -> bool {
        let others = self.sessions.values().filter(|entry| entry.is_live() && entry.who != *own);
        let idle = others.filter_map(|entry| Some((self.idle_since(&entry.who)?, &entry.who)));
        let Some((since, who)) = idle.min_by_key(|(since, _)| *since) else { return false };
        info!(
            policy = who.1.as_ref().map(Name::as_str),
            seconds = since.elapsed().as_secs(),
            "limits.max_services is reached: a service that is away and has no connections makes room for another"
        );
        for entry in self.sessions.values().filter(|entry| entry.who == *who) {
            entry.close("made room for another service");
        }
        true
    }

    /// Since when a service is away with all that it has here.
    fn idle_since(&self, who: &Who) -> Option<Instant> {
        if self.admitted.values().any(|admitted| admitted == who) {
            return None;
        }
        let own = self.sessions.values().filter(|entry| entry.is_live() && entry.who == *who);
        own.map(Entry::idle_since).collect::<Option<Vec<_>>>()?.into_iter().max()
    }
}

impl Entry {
    /// False if it was told to end.
    fn is_live(&self) -> bool {
        !self.end.is_cancelled()
    }

    /// Whether the service is known to have this session. Without a link nobody can tell.
    fn is_heard(&self) -> bool {
        self.link.as_ref().is_none_or(|link| link.state().confirmed)
    }

    /// Since when it has no carrier, if it has no connections either.
    fn idle_since(&self) -> Option<Instant> {
        let state = self.link.as_ref()?.state();
        let is_idle = !state.attached && self.mux.as_ref().is_none_or(|mux| mux.channels() == 0);
        is_idle.then_some(state.since)
    }

    /// Tells the session to end, and the service why, if it listens.
    fn close(&self, why: &str) {
        self.link.iter().for_each(|link| link.close(why));
        self.end.cancel();
    }
}

async fn heard(link: &LinkControl) {
    while !link.state().confirmed {
        sleep(HEARD_LOOK).await;
    }
}

async fn gone(link: Option<&LinkControl>) {
    match link {
        Some(link) => {
            let why = link.wait_detached().await;
            debug!("carrier lost: {why}");
        }
        None => std::future::pending().await,
    }
}

/// Removes its session when dropped.
struct Registration<'a> {
    legs: &'a MuxLegs,
    key: u64,
}

impl Drop for Registration<'_> {
    fn drop(&mut self) {
        let mut table = self.legs.lock();
        table.sessions.remove(&self.key);
        self.legs.metrics.services.set(i64::try_from(table.sessions.len()).unwrap_or(i64::MAX));
    }
}

/// Who may begin, and who may resume what: for one leg, from its hello until it is a session. Whom it admits has a place
/// among the sessions from then on, so that hellos at the same time cannot share the last one.
struct Admission<'a> {
    legs: &'a MuxLegs,
    key: u64,
    policy: Option<Name>,
}

impl<'a> Admission<'a> {
    fn new(legs: &'a MuxLegs, policy: Option<Name>) -> Self {
        let mut table = legs.lock();
        table.next += 1;
        Self { legs, key: table.next, policy }
    }
}

impl Drop for Admission<'_> {
    fn drop(&mut self) {
        self.legs.lock().admitted.remove(&self.key);
    }
}

impl LinkTable for Admission<'_> {
    fn find(&self, id: &LinkId) -> Option<LinkControl> {
        let table = self.legs.lock();
        let mut own = table.sessions.values().filter(|entry| entry.who.1 == self.policy);
        own.find_map(|entry| entry.link.clone().filter(|link| link.id() == *id))
    }

    fn admit(&self, peer: &PeerHello) -> Result<(), String> {
        let limit = self.legs.settings().max_services;
        let mut table = self.legs.lock();
        let own = Who(peer.instance, self.policy.clone());
        while table.others(&own) >= limit {
            let others = table.others(&own);
            if !table.end_longest_idle(&own) {
                return Err(format!(
                    "this device serves {others} services, as many as it may (limits.max_services in device.toml)"
                ));
            }
        }
        table.admitted.insert(self.key, own);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;
    use crate::{
        forward::TargetMetrics,
        transport::{
            carrier::{Carrier, CarrierOptions},
            hello::{BootId, LinkSettings, offer_new},
        },
    };

    fn legs(max_services: usize) -> MuxLegs {
        let hello = LocalHello {
            instance: InstanceId([0; 16]),
            boot: BootId([0; 16]),
            max_channels: 16,
            receive_window: 65_536,
            resume_for: Duration::ZERO,
            links: LinkSettings::default(),
        };
        let settings = Settings { hello, limits: LinkLimits::default(), max_services };
        let outlet = Outlet::new(&[], 1, TargetMetrics::default());
        let network = NetworkChanges::start(CancellationToken::new()).0;
        MuxLegs::new(settings, outlet, mpsc::channel(1).0, network, DeviceMetrics::default())
    }

    fn peer(instance: u8) -> PeerHello {
        let (instance, boot) = (InstanceId([instance; 16]), BootId([0; 16]));
        PeerHello { instance, boot, max_channels: 16, receive_window: 65_536 }
    }

    async fn entry(instance: u8, policy: &str) -> Entry {
        let carrier = Carrier::server(tokio::io::duplex(64).0, bytes::Bytes::new(), CarrierOptions::DATA);
        Entry {
            who: Who(InstanceId([instance; 16]), Some(policy.parse().unwrap())),
            link: None,
            sid: None,
            monitor: carrier.monitor(),
            resumed: Arc::default(),
            mux: None,
            end: CancellationToken::new(),
        }
    }

    #[tokio::test]
    async fn a_service_that_begins_anew_replaces_its_own_session_and_nobody_elses() {
        let legs = legs(16);
        let mut ends = Vec::new();
        let mut registrations = Vec::new();
        for (instance, policy) in [(1, "service"), (2, "service"), (1, "other"), (1, "service")] {
            let entry = entry(instance, policy).await;
            ends.push(entry.end.clone());
            let registration = legs.register(entry);
            legs.lock().settle(registration.key, true);
            registrations.push(registration);
        }
        let ended: Vec<_> = ends.iter().map(CancellationToken::is_cancelled).collect();
        assert_eq!(ended, [true, false, false, false], "the same run of the same service holds one");
    }

    /// Both ends of a hello of a new session, as far as the device's answer.
    async fn answered(legs: &MuxLegs, instance: u8) -> (Session, Session) {
        let links = |_: &LinkId| None;
        let hello = |instance| LocalHello {
            instance: InstanceId([instance; 16]),
            resume_for: Duration::from_secs(900),
            ..legs.settings().hello
        };
        let (near, far) = tokio::io::duplex(65_536);
        let (service, device) = (hello(instance), hello(0));
        let device = receive(Box::new(far), &device, &links);
        let (near, far) = tokio::join!(offer_new(Box::new(near), &service), device);
        let Ok(Received::New(far)) = far else { panic!("{far:?}") };
        (near.unwrap(), far)
    }

    async fn serve(legs: MuxLegs, session: Session) {
        let admission = Admission::new(&legs, Some("service".parse().unwrap()));
        let monitor = entry(0, "service").await.monitor;
        legs.serve_new(session, admission, (None, monitor), CancellationToken::new()).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_hello_that_its_service_gave_up_takes_nobodys_place() {
        let (legs, limits) = (legs(1), LinkLimits::default());
        let (service, device) = answered(&legs, 1).await;
        let service = MuxSession::begin(service, Role::Client, &limits);
        let (mut near, mut tasks) = (JoinSet::new(), JoinSet::new());
        near.spawn(service.driver);
        tasks.spawn(serve(legs.clone(), device));
        // The answer to this one is never read.
        let (deaf, stale) = answered(&legs, 1).await;
        tasks.spawn(serve(legs.clone(), stale));
        sleep(Duration::from_secs(5)).await;
        assert_eq!(legs.lock().sessions.len(), 2);
        assert!(service.link.as_ref().unwrap().attached(), "{:?}", service.link.unwrap().end());
        let another = Admission::new(&legs, Some("service".parse().unwrap()));
        assert!(legs.lock().admitted.is_empty() && another.admit(&peer(1)).is_ok());
        drop(another);

        sleep(UNHEARD).await;
        assert_eq!(legs.lock().sessions.len(), 1, "what hears nothing ends");
        assert!(service.link.as_ref().unwrap().attached());
        drop(deaf);

        // A service that began anew and says so takes its place.
        let (next, device) = answered(&legs, 1).await;
        let next = MuxSession::begin(next, Role::Client, &limits);
        near.spawn(next.driver);
        tasks.spawn(serve(legs.clone(), device));
        service.link.unwrap().ended().await;
        sleep(UNHEARD).await;
        assert_eq!(legs.lock().sessions.len(), 1);
        assert!(next.link.unwrap().attached());
    }

    #[tokio::test(start_paused = true)]
    async fn hellos_that_were_given_up_are_few_at_a_time() {
        let legs = legs(1);
        let (mut tasks, mut deaf) = (JoinSet::new(), Vec::new());
        for _ in 0..3 * MAX_UNHEARD {
            let (service, device) = answered(&legs, 1).await;
            deaf.push(service);
            tasks.spawn(serve(legs.clone(), device));
            sleep(Duration::from_secs(1)).await;
        }
        let live = legs.lock().sessions.values().filter(|entry| entry.is_live()).count();
        assert_eq!(live, MAX_UNHEARD);
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_away_without_connections_makes_room() {
        let (legs, limits) = (legs(3), LinkLimits::default());
        let (mut tasks, mut near, mut services) = (JoinSet::new(), JoinSet::new(), Vec::new());
        for instance in 1..=3 {
            let (service, device) = answered(&legs, instance).await;
            let service = MuxSession::begin(service, Role::Client, &limits);
            tasks.spawn(serve(legs.clone(), device));
            near.spawn(service.driver);
            services.push((service.link.unwrap(), service.incoming));
            sleep(Duration::from_secs(1)).await;
        }
        let begin = || Admission::new(&legs, Some("service".parse().unwrap()));
        assert!(begin().admit(&peer(4)).is_err(), "all are there");
        // The first has a connection, the second leaves after the third.
        let of = |who| {
            let table = legs.lock();
            let entry = table.sessions.values().find(|entry| entry.who.0 == InstanceId([who; 16])).unwrap();
            (entry.mux.clone().unwrap(), entry.link.clone().unwrap())
        };
        let mut channel = of(1).0.open().await.unwrap();
        channel.write_all(b"x").await.unwrap();
        for who in [1, 3, 2] {
            of(who).1.lose_carrier("away");
            services[usize::from(who) - 1].0.lose_carrier("away");
            sleep(Duration::from_secs(10)).await;
        }
        let left = || legs.lock().sessions.values().map(|entry| entry.who.0.0[0]).collect::<HashSet<_>>();
        let fourth = begin();
        assert!(fourth.admit(&peer(4)).is_ok());
        sleep(Duration::from_secs(10)).await;
        assert_eq!(left(), [1, 2].into(), "the third was away longest");
        assert!(begin().admit(&peer(5)).is_ok());
        sleep(Duration::from_secs(10)).await;
        assert_eq!(left(), [1].into());
        let sixth = begin();
        assert!(sixth.admit(&peer(6)).is_ok());
        assert!(begin().admit(&peer(7)).is_err(), "who has connections stays");
    }

    #[tokio::test]
    async fn a_leg_that_was_replaced_is_lost_alone() {
        let (outbox, mut published) = mpsc::channel(2);
        let legs = MuxLegs { outbox, ..legs(1) };
        let registration = legs.register(Entry { sid: Some("new".into()), ..entry(1, "service").await });
        legs.report_leg(registration.key, Some("old"));
        assert!(published.try_recv().is_err(), "the new one is good");
        legs.report_leg(registration.key, Some("new"));
        assert_eq!(published.try_recv().unwrap(), lost_topic("new"));
        legs.report_leg(registration.key, Some("new"));
        assert!(published.try_recv().is_err(), "once");
    }

    #[tokio::test]
    async fn a_service_cannot_hide_behind_anothers_instance() {
        let legs = legs(1);
        let _first = legs.register(entry(1, "service").await);
        let admitted = |policy: &str| Admission::new(&legs, Some(policy.parse().unwrap())).admit(&peer(1));
        assert!(admitted("service").is_ok(), "its own earlier session ends");
        assert!(admitted("other").is_err());
    }

    #[tokio::test]
    async fn hellos_at_the_same_time_do_not_share_the_last_place() {
        let legs = legs(2);
        let _first = legs.register(entry(1, "service").await);
        let begin = || Admission::new(&legs, Some("service".parse().unwrap()));
        let (second, third) = (begin(), begin());
        assert!(second.admit(&peer(2)).is_ok());
        assert!(third.admit(&peer(3)).is_err());
        assert!(begin().admit(&peer(2)).is_ok(), "the same service begins once more");
        drop(second);
        assert!(third.admit(&peer(3)).is_ok(), "a hello that failed gives its place back");
    }
}
