//! What a stream request leads to.
//!
//! Owns the decision to accept or reject, and the data leg of what was accepted. Does not know the control session
//! that carries requests and answers. Invariant: a request is answered once for each time it is asked, and starts at
//! most one leg.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{sync::mpsc, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument as _, debug, info, info_span, warn};

use super::mux_leg::MuxLegs;
use crate::{
    agent::{HubClient, PlainStream},
    base::{Gate, Name, Pass},
    config::DeviceLimits,
    forward::{Dialled, Outlet},
    proto::{
        control::{StreamAnswer, StreamRequest, lost_topic, sid_of_url},
        streams::{MUX_STREAM, RESERVED_PREFIX},
    },
    transport::carrier::CarrierOptions,
};

/// Answers that are remembered in case the hub asks again: it does so for at most 60 s, one in flight per stream.
const REMEMBERED: usize = 64;
/// Mux device streams whose hello is not done, each for at most 40 s: more than the services of a device make when all
/// of them come back at once, and no more than the hub asks for at a time.
const MAX_HELLOS: usize = 64;
const ACCEPTED: u16 = 200;
const REJECTED: u16 = 400;

/// Handles a plain stream that no target serves, if the program that embeds the device has a handler.
pub(super) type PlainHandler = Arc<dyn super::client::Handler>;

/// What legs need.
#[derive(Clone)]
pub(super) struct Legs {
    /// The hub client of the control session in use.
    pub(super) hub: Arc<Mutex<HubClient>>,
    /// Targets.
    pub(super) outlet: Outlet,
    /// Mux device streams.
    pub(super) mux: MuxLegs,
    /// Topics to publish.
    pub(super) outbox: mpsc::Sender<String>,
    /// For programs that embed the device.
    pub(super) handler: Option<PlainHandler>,
    pub(super) plain: Gate,
    /// Mux device streams up to the end of their hello.
    hellos: Gate,
}

impl Legs {
    pub(super) fn new(
        hub: Arc<Mutex<HubClient>>,
        outlet: Outlet,
        mux: MuxLegs,
        outbox: mpsc::Sender<String>,
        limits: &DeviceLimits,
    ) -> Self {
        let (plain, hellos) = (Gate::new(limits.max_plain), Gate::new(MAX_HELLOS));
        Self { hub, outlet, mux, outbox, handler: None, plain, hellos }
    }

    fn hub(&self) -> HubClient {
        self.hub.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn answer(&self, request: &StreamRequest, status: u16, reason: Option<String>) -> StreamAnswer {
        let answer = StreamAnswer { rid: request.rid.clone(), status, reason };
        // It fails only when the daemon stops.
        let _ = self.outbox.send(answer.to_topic()).await;
        answer
    }
}

/// Handles requests until `stop`.
pub(super) async fn handle_requests(legs: Legs, mut requests: mpsc::Receiver<StreamRequest>, stop: CancellationToken) {
    let mut tasks = JoinSet::new();
    let answered: Arc<Answered> = Arc::default();
    loop {
        let request = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = tasks.join_next(), if !tasks.is_empty() => continue,
            request = requests.recv() => match request {
                None => break,
                Some(request) => request,
            },
        };
        if repeat(&legs, &answered, &request).await {
            continue;
        }
        let span = info_span!("request", stream = %request.stream, policy = request.policy.as_ref().map(Name::as_str));
        let (legs, answered, stop) = (legs.clone(), answered.clone(), stop.clone());
        tasks.spawn(serve(legs, request, answered, stop).instrument(span));
    }
    // Each task watches `stop` itself and says its own goodbye.
    while tasks.join_next().await.is_some() {}
}

/// Requests that were asked, by their IDs, with the answer as soon as there is one.
type Answered = Mutex<VecDeque<(String, Option<StreamAnswer>)>>;

/// True if the request was asked before: its answer, if there is one by now, is given again.
async fn repeat(legs: &Legs, answered: &Answered, request: &StreamRequest) -> bool {
    let known = {
        let mut answered = answered.lock().unwrap_or_else(PoisonError::into_inner);
        let known = answered.iter().find(|(rid, _)| *rid == request.rid).map(|(_, answer)| answer.clone());
        if known.is_none() {
            if answered.len() == REMEMBERED {
                answered.pop_front();
            }
            answered.push_back((request.rid.clone(), None));
        }
        known
    };
    match known {
        None => false,
        Some(answer) => {
            if let Some(answer) = answer {
                let _ = legs.outbox.send(answer.to_topic()).await;
            }
            true
        }
    }
}

fn remember(answered: &Answered, answer: StreamAnswer) {
    let mut answered = answered.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(entry) = answered.iter_mut().find(|(rid, _)| *rid == answer.rid) {
        entry.1 = Some(answer);
    }
}

/// The life of a request.
async fn serve(legs: Legs, request: StreamRequest, answered: Arc<Answered>, stop: CancellationToken) {
    if request.stream.as_str() == MUX_STREAM {
        let pass = legs.hellos.enter();
        let refusal = || format!("{MAX_HELLOS} device streams are being opened at once, as many as may be");
        let (status, reason) = if pass.is_some() { (ACCEPTED, None) } else { (REJECTED, Some(refusal())) };
        let answer = legs.answer(&request, status, reason).await;
        remember(&answered, answer);
        return match pass {
            Some(pass) => serve_mux(&legs, &request, pass, stop).await,
            None => warn!("device stream rejected: {}", refusal()),
        };
    }
    let admitted = tokio::select! {
        admitted = admit(&legs, &request) => admitted,
        () = stop.cancelled() => return,
    };
    match admitted {
        Ok(admitted) => {
            let answer = legs.answer(&request, ACCEPTED, None).await;
            remember(&answered, answer);
            serve_plain(&legs, &request, admitted, stop).await;
        }
        Err(reason) => {
            warn!("device stream rejected: {reason}");
            let answer = legs.answer(&request, REJECTED, Some(reason)).await;
            remember(&answered, answer);
        }
    }
}

async fn serve_mux(legs: &Legs, request: &StreamRequest, pass: Pass, stop: CancellationToken) {
    let (hub, sid) = (legs.hub(), sid_of_url(&request.url).map(str::to_owned));
    let dialled = tokio::select! {
        dialled = hub.carrier(&request.url, &request.ticket, CarrierOptions::DATA) => dialled,
        () = stop.cancelled() => return,
    };
    match dialled {
        Ok(carrier) => legs.mux.serve(carrier, request.policy.clone(), sid, pass, stop).await,
        Err(error) => warn!("the leg of an accepted device stream could not be opened: {error}"),
    }
}

/// A plain stream that may begin: what it is joined to, and its place among the plain streams.
struct Admitted {
    far: Far,
    _pass: Pass,
}

enum Far {
    Target(Dialled),
    Handler(PlainHandler),
}

/// Decides on a plain stream. The target is dialled first, so that a refusal is a refusal.
async fn admit(legs: &Legs, request: &StreamRequest) -> Result<Admitted, String> {
    let name = request.stream.as_str();
    if name.starts_with(RESERVED_PREFIX) {
        return Err(format!("stream names that begin with {RESERVED_PREFIX:?} are reserved"));
    }
    let full = || format!("this device has {} plain device streams, as many as it may", legs.plain.limit());
    let pass = legs.plain.enter().ok_or_else(full)?;
    if let Some(handler) = &legs.handler {
        return match handler.accepts(&request.stream, request.policy.as_ref()).await {
            Ok(()) => Ok(Admitted { far: Far::Handler(handler.clone()), _pass: pass }),
            Err(reason) => Err(reason),
        };
    }
    let target: Name = name.parse().map_err(|_| format!("this device has no target {name:?}"))?;
    match legs.outlet.dial(&target, request.policy.as_ref()).await {
        Ok(dialled) => Ok(Admitted { far: Far::Target(dialled), _pass: pass }),
        Err(error) => {
            legs.outlet.refuse(&error, request.policy.as_ref());
            Err(error.to_string())
        }
    }
}

async fn serve_plain(legs: &Legs, request: &StreamRequest, admitted: Admitted, stop: CancellationToken) {
    let hub = legs.hub();
    let dialled = tokio::select! {
        dialled = hub.carrier(&request.url, &request.ticket, CarrierOptions::PLAIN) => dialled,
        () = stop.cancelled() => return,
    };
    let carrier = match dialled {
        Ok(carrier) => carrier,
        Err(error) => return warn!("the leg of an accepted device stream could not be opened: {error}"),
    };
    debug!("plain device stream open");
    let monitor = carrier.monitor();
    match admitted.far {
        Far::Target(dialled) => {
            let far = PlainStream::new(carrier, dialled.rule.plain_eof);
            legs.outlet.join(dialled, far, false, stop).await;
        }
        Far::Handler(handler) => {
            info!("device stream handed to the program");
            tokio::select! {
                () = handler.serve(&request.stream, PlainStream::new(carrier, false)) => {}
                () = stop.cancelled() => {}
            }
        }
    }
    // A leg that died silently is still open at the hub: say so, that the service need not wait for a time-out.
    if monitor.is_suspect()
        && let Some(sid) = sid_of_url(&request.url)
    {
        let _ = legs.outbox.try_send(lost_topic(sid));
    }
}
