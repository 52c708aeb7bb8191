//! Mux device streams at the device: one per service daemon.
//!
//! Owns the sessions, their links, and who may resume which. Does not know stream requests. Invariant: a link is
//! resumed only for the policy that created it; operators never evict each other.

use std::{
    collections::HashMap,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc},
    task::JoinSet,
    time::{Instant, timeout},
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
/// What a service daemon hears whose place was taken by another one that says it is the same.
const TWIN: &str = "another service daemon with the same instance ID took its place; was its state_dir copied?";

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
#[derive(Clone, PartialEq)]
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
        };
        drop(registration);
        info!(seconds = begun.elapsed().as_secs_f64(), "device stream ended: {why}");
    }

    /// Enters a session, and ends at once what a restart of the same service daemon left behind.
    fn register(&self, entry: Entry) -> Registration<'_> {
        let mut table = self.lock();
        for old in table.sessions.values() {
            if old.who == entry.who {
                // It restarted, or gave the earlier one up without a way to say so: it keeps one per device.
                debug!("a service daemon begins anew; its earlier device stream ends");
                // Heard only by a daemon that lives, which then has a twin.
                old.link.iter().for_each(|link| link.close(TWIN));
                old.end.cancel();
            }
        }
        let key = table.next;
        table.next += 1;
        table.sessions.insert(key, entry);
        self.metrics.services.set(i64::try_from(table.sessions.len()).unwrap_or(i64::MAX));
        Registration { legs: self, key }
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
            if lost.is_none() {
                end_session(&mux, driver.as_mut(), link.as_ref()).await;
            }
            cut.cancel();
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
            let entry =
                self.lock().sessions.get(&key).map(|entry| {
                    (entry.link.clone(), entry.monitor.clone(), entry.resumed.clone(), entry.sid.is_some())
                });
            let Some((link, monitor, resumed, may_report)) = entry else { return std::future::pending().await };
            tokio::select! {
                // The carrier may have been replaced since.
                () = network.changed() => self.monitor(key).unwrap_or(monitor).probe(),
                () = resumed.notified() => {}
                // What cannot be resumed lives as long as its carrier does.
                () = monitor.suspect(), if may_report && link.is_some() => self.report_lost(key),
                () = gone(link.as_ref()) => {
                    // Of a link that has ended the last word is on its way, and this would overtake it.
                    if link.as_ref().is_some_and(|link| link.end().is_none()) {
                        self.report_lost(key);
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

    fn report_lost(&self, key: u64) {
        let sid = self.lock().sessions.get_mut(&key).and_then(|entry| entry.sid.take());
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
        table.sessions.values().map(row).collect()
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
        // Its own earlier one ends when the new one begins.
        let sessions = table.sessions.values().map(|entry| &entry.who);
        let others = sessions.chain(table.admitted.values()).filter(|who| **who != own).count();
        if others < limit {
            table.admitted.insert(self.key, own);
            return Ok(());
        }
        Err(format!("this device serves {others} services, as many as it may (limits.max_services in device.toml)"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        forward::TargetMetrics,
        transport::{
            carrier::{Carrier, CarrierOptions},
            hello::{BootId, LinkSettings},
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
            registrations.push(legs.register(entry));
        }
        let ended: Vec<_> = ends.iter().map(CancellationToken::is_cancelled).collect();
        assert_eq!(ended, [true, false, false, false], "the same run of the same service holds one");
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
