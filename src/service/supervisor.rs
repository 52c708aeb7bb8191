//! Makes what runs follow what is wanted.
//!
//! Owns the inlets and the draining ones. Does not know where configurations come from. Invariant: every pass compares
//! what runs with the configuration in force, so a lost event or a taken port costs one pass.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use futures_util::{StreamExt as _, future::BoxFuture, stream};
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
    transport::net::BindError,
};

/// How often what runs is compared with what is wanted: a taken port is tried again this soon.
const PASS: Duration = Duration::from_secs(5);
/// When the daemon stops, flows have this long to end by themselves. A service manager's default patience is 90 s.
const STOP_DRAIN: Duration = Duration::from_secs(5);
/// Listeners that are opened side by side. A look-up that was given up keeps one of tokio's 512 threads for blocking calls
/// until the resolver gives up, too: with 30 s for that and 3 s for us, these are 160 at most.
const OPENS: usize = 16;
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
    /// The trial of another configuration's hub and credential.
    trial: Option<Trial>,
    /// The configuration whose hub or credential did not work, and when it was found out.
    refused: Option<(ServiceConfig, Instant)>,
}

/// A trial beside what is in use. Its own future, so that neither a reload nor a stop waits for it.
struct Trial {
    config: ServiceConfig,
    outcome: BoxFuture<'static, Result<HubClient, String>>,
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
        let mut supervisor = Self { shared, desired, inlets, running, draining, hub_of, trial: None, refused: None };
        let rules = supervisor.pass().await;
        supervisor.open_all(rules).await;
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
                outcome = outcome(&mut self.trial) => {
                    self.tried(outcome);
                    continue;
                }
            }
            let rules = self.pass().await;
            tokio::select! {
                // A listener that is still being opened has no connections to lose.
                () = shutdown.cancelled() => break,
                () = self.open_all(rules) => {}
            }
            self.follow_hub();
        }
        self.stop().await;
    }

    /// Does what takes no time, and yields the rules that lack a listener.
    async fn pass(&mut self) -> Vec<ForwardRule> {
        let desired = self.desired.borrow_and_update().clone();
        let running: BTreeMap<Name, Running> = self
            .running
            .iter()
            .map(|(name, entry)| {
                let is_listening = entry.inlet.is_some();
                (name.clone(), Running { rule: entry.rule.clone(), is_listening })
            })
            .collect();
        let mut closed = Vec::new();
        for step in plan(&running, &desired.forwards) {
            match step {
                Step::Close(name) => self.close(&name, &desired).await,
                Step::Open(rule) => closed.push(rule),
                Step::Retarget(rule) => self.retarget(rule),
            }
        }
        self.want_tunnels(&desired);
        self.publish();
        closed
    }

    /// Opens listeners side by side: a name that nobody resolves keeps no other rule waiting.
    async fn open_all(&mut self, rules: Vec<ForwardRule>) {
        let deps = &self.inlets.clone();
        let open = |rule: ForwardRule| async { (Inlet::open(rule.clone(), deps.clone()).await, rule) };
        let mut opening = stream::iter(rules).map(open).buffer_unordered(OPENS).ready_chunks(OPENS);
        while let Some(opened) = opening.next().await {
            opened.into_iter().for_each(|(inlet, rule)| self.opened(rule, inlet));
            self.publish();
        }
    }

    fn opened(&mut self, rule: ForwardRule, inlet: Result<Inlet, BindError>) {
        let before = self.running.remove(&rule.name).and_then(|entry| entry.problem);
        let entry = match inlet {
            Ok(inlet) => {
                info!(forward = %rule.name, device = %rule.identity(), target = %rule.target, "listening on {}", inlet.endpoint());
                Entry { rule, inlet: Some(inlet), problem: None }
            }
            Err(error) => {
                let problem = error.to_string();
                self.inlets.metrics.set_listening(&rule.name, false);
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
            self.inlets.metrics.forget(name);
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
        self.shared.metrics.set_named(&needed);
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
    fn follow_hub(&mut self) {
        let wanted = self.desired.borrow().clone();
        if is_same_hub(&wanted, &self.hub_of) {
            (self.trial, self.refused) = (None, None);
            return;
        }
        // What was found out about another configuration says nothing about this one.
        let waits =
            self.refused.as_ref().is_some_and(|(config, at)| is_same_hub(config, &wanted) && at.elapsed() < HUB_RETRY);
        let runs = self.trial.as_ref().is_some_and(|trial| is_same_hub(&trial.config, &wanted));
        if !waits && !runs {
            self.trial = Some(Trial { outcome: Box::pin(try_hub(wanted.clone())), config: wanted });
        }
    }

    fn tried(&mut self, outcome: Result<HubClient, String>) {
        let Some(Trial { config, .. }) = self.trial.take() else { return };
        match outcome {
            Ok(hub) => {
                info!(hub = hub.name(), "the changed hub or credential works and is in use");
                self.shared.hub.send_replace(hub);
                (self.hub_of, self.refused) = (config, None);
            }
            Err(why) => {
                warn!("the changed hub or credential does not work, so the old one stays in use: {why}");
                self.refused = Some((config, Instant::now()));
            }
        }
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

fn is_same_hub(one: &ServiceConfig, other: &ServiceConfig) -> bool {
    one.connection_string == other.connection_string && one.ca == other.ca && one.proxy == other.proxy
}

async fn try_hub(wanted: ServiceConfig) -> Result<HubClient, String> {
    let hub = HubClient::new(&wanted.connection_string, wanted.ca.as_ref(), None, &wanted.proxy);
    let hub = hub.map_err(|error| error.to_string())?;
    super::health::ask_hub(&hub).await?;
    Ok(hub)
}

/// The outcome of the trial, if there is one. May be dropped and called again.
async fn outcome(trial: &mut Option<Trial>) -> Result<HubClient, String> {
    match trial {
        Some(trial) => (&mut trial.outcome).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use prometheus::Registry;
    use tokio::net::TcpListener;

    use super::*;
    use crate::{
        config::{FileContents, ProxyRule},
        service::Service,
        transport::tls::testing::Authority,
    };

    /// Much more than anything here takes, and less than the times that nothing here may wait for.
    const SOON: Duration = Duration::from_secs(8);

    /// A hub that takes connections and says nothing.
    async fn silent_hub() -> (TcpListener, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let key = "SharedAccessKeyName=service;SharedAccessKey=MDEyMzQ1Njc4OWFiY2RlZg==";
        (listener, format!("HostName={address};{key}"))
    }

    #[tokio::test]
    async fn a_hub_that_is_slow_to_try_holds_up_neither_rules_nor_corrections_nor_a_stop() {
        let authority = Authority::new();
        let state = authority.file().parent().unwrap().join("state");
        let (_first, first) = silent_hub().await;
        let (wrong, wrong_string) = silent_hub().await;
        let (corrected, corrected_string) = silent_hub().await;
        let mut config = ServiceConfig::new(first.parse().unwrap(), state);
        config.ca = Some(FileContents { path: "ca.pem".into(), contents: authority.pem().into() });
        config.proxy = ProxyRule::Off;
        let service = Service::bind(config.clone(), &Registry::new()).await.unwrap();
        let handle = service.handle();
        let shutdown = CancellationToken::new();
        let edits = async {
            config.connection_string = wrong_string.parse().unwrap();
            handle.reconfigure(config.clone());
            let _trial = wrong.accept().await.unwrap();
            let listen = ("web".parse().unwrap(), "127.0.0.1:0".parse().unwrap());
            let mut rule = ForwardRule::new(listen.0, listen.1, "pump-17".parse().unwrap(), "web".parse().unwrap());
            rule.connect = ConnectMode::OnDemand;
            config.forwards.push(rule);
            handle.reconfigure(config.clone());
            while handle.listens_at("web").is_none() {
                tokio::task::yield_now().await;
            }
            config.connection_string = corrected_string.parse().unwrap();
            handle.reconfigure(config);
            let _trial = corrected.accept().await.unwrap();
            shutdown.cancel();
        };
        let all = async { tokio::join!(service.run(shutdown.clone()), edits) };
        timeout(SOON, all).await.expect("it waited for a hub that does not answer");
    }
}
