//! Makes what runs follow what is wanted.
//!
//! Owns the inlets and the draining ones. Does not know where configurations come from. Invariant: every pass compares
//! what runs with the configuration in force, so a lost event or a taken port costs one pass.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::Shared;
use crate::{
    agent::HubClient,
    base::Name,
    config::{ConnectMode, ForwardMode, ForwardRule, ServiceConfig},
    forward::{Inlet, InletDeps, Running, Step, plan},
};

/// How often what runs is compared with what is wanted: a taken port is tried again this soon.
const PASS: Duration = Duration::from_secs(5);
/// When the daemon stops, flows have this long to end by themselves. A service manager's default patience is 90 s.
const STOP_DRAIN: Duration = Duration::from_secs(5);
/// A new hub address or credential that does not work is tried again this often, beside the old one.
const HUB_RETRY: Duration = Duration::from_secs(30);

/// The supervisor of a service.
pub(super) struct Supervisor {
    shared: Arc<Shared>,
    desired: watch::Receiver<ServiceConfig>,
    inlets: InletDeps,
    running: BTreeMap<Name, Entry>,
    draining: JoinSet<()>,
    /// The configuration whose hub and credential are in use.
    hub_of: ServiceConfig,
    hub_tried: Option<Instant>,
}

struct Entry {
    rule: ForwardRule,
    inlet: Option<Inlet>,
    /// The last failure to listen that was logged.
    problem: Option<String>,
}

impl Supervisor {
    /// Tries every listener once.
    pub(super) async fn new(shared: Arc<Shared>, inlets: InletDeps) -> Self {
        let mut desired = shared.desired.subscribe();
        let hub_of = desired.borrow_and_update().clone();
        let (running, draining) = (BTreeMap::new(), JoinSet::new());
        let mut supervisor = Self { shared, desired, inlets, running, draining, hub_of, hub_tried: None };
        supervisor.pass().await;
        supervisor
    }

    /// Follows the configuration until `shutdown`.
    pub(super) async fn run(mut self, shutdown: CancellationToken) {
        let mut passes = interval(PASS);
        passes.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                _ = passes.tick() => {}
                changed = self.desired.changed() => if changed.is_err() { break },
                Some(_) = self.draining.join_next() => continue,
            }
            self.pass().await;
            self.follow_hub().await;
        }
        self.stop().await;
    }

    async fn pass(&mut self) {
        let desired = self.desired.borrow_and_update().clone();
        let running: BTreeMap<Name, Running> = self
            .running
            .iter()
            .map(|(name, entry)| {
                let is_listening = entry.inlet.is_some();
                (name.clone(), Running { rule: entry.rule.clone(), is_listening })
            })
            .collect();
        for step in plan(&running, &desired.forwards) {
            match step {
                Step::Close(name) => self.close(&name, &desired).await,
                Step::Open(rule) => self.open(rule).await,
                Step::Retarget(rule) => self.retarget(rule),
            }
        }
        self.want_tunnels(&desired);
        self.publish();
    }

    async fn open(&mut self, rule: ForwardRule) {
        let before = self.running.remove(&rule.name).and_then(|entry| entry.problem);
        let entry = match Inlet::open(rule.clone(), self.inlets.clone()).await {
            Ok(inlet) => {
                info!(forward = %rule.name, device = %rule.identity(), target = %rule.target, "listening on {}", inlet.endpoint());
                Entry { rule, inlet: Some(inlet), problem: None }
            }
            Err(error) => {
                let problem = error.to_string();
                // Once per cause, not once per pass.
                if before.as_ref() != Some(&problem) {
                    warn!(forward = %rule.name, "{problem}; it will be tried again");
                }
                Entry { rule, inlet: None, problem: Some(problem) }
            }
        };
        self.running.insert(entry.rule.name.clone(), entry);
    }

    async fn close(&mut self, name: &Name, desired: &ServiceConfig) {
        let Some(entry) = self.running.get_mut(name) else { return };
        let gone = !desired.forwards.iter().any(|rule| rule.name == *name);
        if let Some(inlet) = entry.inlet.take() {
            let flows = inlet.flows();
            let drained = inlet.close(entry.rule.drain_timeout).await;
            self.draining.spawn(drained);
            info!(forward = %name, flows, "listener closed; its connections drain");
        }
        if gone {
            self.running.remove(name);
            self.shared.metrics.forget_forward(name.as_str());
        }
    }

    fn retarget(&mut self, rule: ForwardRule) {
        let Some(entry) = self.running.get_mut(&rule.name) else { return };
        if let Some(inlet) = &entry.inlet {
            info!(forward = %rule.name, device = %rule.identity(), target = %rule.target, "new connections follow the changed rule");
            inlet.retarget(rule.clone());
        }
        entry.rule = rule;
    }

    fn want_tunnels(&self, desired: &ServiceConfig) {
        let mux = || desired.forwards.iter().filter(|rule| rule.mode == ForwardMode::Mux);
        let needed: BTreeSet<_> = mux().map(ForwardRule::identity).collect();
        for rule in mux().filter(|rule| rule.connect == ConnectMode::Start) {
            self.shared.tunnels.to(&rule.identity()).want();
        }
        self.shared.tunnels.prune(&needed);
    }

    fn publish(&self) {
        let listeners = self.running.iter().map(|(name, entry)| {
            let listens = entry.inlet.as_ref().map(|inlet| (inlet.endpoint().to_string(), inlet.flows()));
            (name.clone(), entry.rule.clone(), listens, entry.problem.clone())
        });
        self.shared.board.set_listeners(listeners.collect());
    }

    /// A changed hub or credential is tried beside the one in use, which is kept until the new one works.
    async fn follow_hub(&mut self) {
        let wanted = self.desired.borrow().clone();
        let differs = wanted.connection_string != self.hub_of.connection_string
            || wanted.ca != self.hub_of.ca
            || wanted.proxy != self.hub_of.proxy;
        if !differs {
            self.hub_tried = None;
            return;
        }
        let changed_since = self.hub_tried.is_none_or(|tried| tried.elapsed() >= HUB_RETRY);
        if !changed_since {
            return;
        }
        self.hub_tried = Some(Instant::now());
        match self.try_hub(&wanted).await {
            Ok(hub) => {
                info!(hub = hub.name(), "the changed hub or credential works and is in use");
                self.shared.hub.send_replace(hub);
                self.hub_of = wanted;
                self.hub_tried = None;
            }
            Err(why) => warn!("the changed hub or credential does not work, so the old one stays in use: {why}"),
        }
    }

    async fn try_hub(&self, wanted: &ServiceConfig) -> Result<HubClient, String> {
        let hub = HubClient::new(&wanted.connection_string, wanted.ca.as_ref(), None, &wanted.proxy);
        let hub = hub.map_err(|error| error.to_string())?;
        super::health::ask_hub(&hub).await?;
        Ok(hub)
    }

    /// Closes the listeners, then gives flows a moment.
    async fn stop(mut self) {
        for (_, entry) in std::mem::take(&mut self.running) {
            if let Some(inlet) = entry.inlet {
                let drained = inlet.close(STOP_DRAIN).await;
                self.draining.spawn(drained);
            }
        }
        // Rules that were removed earlier may drain for an hour; a stop does not wait for them.
        let all = async { while self.draining.join_next().await.is_some() {} };
        let _ = timeout(STOP_DRAIN + Duration::from_secs(3), all).await;
    }
}
