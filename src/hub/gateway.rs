//! The WebSocket faces of the public listener: the streaming endpoint, and MQTT over WebSocket.
//!
//! Owns admission to a bridge by ticket and the hand-over of a connection that has switched protocols. Does not know
//! how bytes are relayed or what MQTT says. Invariant: without a valid ticket nobody learns whether a bridge exists.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode, header};
use hyper::{body::Incoming, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;

use super::{
    answer::{self, Answer},
    bridge::{Leg, LegIo, Side},
    control,
    heads::Guarded,
    server::Connection,
    upgrade::Offer,
};
use crate::transport::{
    carrier::{Carrier, CarrierOptions},
    net::CarrierSocket,
    tls::ServerStream,
};

/// The sub-protocol of control sessions. The SDKs for C offer it at the streaming endpoint too.
const SUBPROTOCOL: &str = "mqtt";

/// How long a control session's Close may take; the same as on the MQTT listener.
const GOODBYE: Duration = Duration::from_secs(5);

/// Under every WebSocket of the hub.
pub(in crate::hub) type Io = ServerStream<CarrierSocket>;

impl LegIo for Io {
    fn is_gone(&self) -> bool {
        self.get_ref().0.get_ref().is_ended()
    }

    fn end_with_reset(&self) {
        self.get_ref().0.get_ref().end_with_reset();
    }
}

/// Admits one leg to its bridge. `gaps` are the path's: hub, device, perhaps module, sid, side.
pub(in crate::hub) fn join(connection: &Arc<Connection>, gaps: &[String], request: &mut Request<Incoming>) -> Answer {
    let hub = &connection.hub;
    let refused = || {
        let mut answer = answer::refusal(StatusCode::UNAUTHORIZED, "The token is not valid, or was used before.\n");
        answer::challenge(&mut answer, "Bearer");
        answer
    };
    let (Some(token), Some((sid, side))) = (bearer(request.headers()), bridge_of(gaps)) else { return refused() };
    if !hub.bridges.knows(token, sid, side) {
        return refused();
    }
    let offer = match Offer::read(request.headers(), SUBPROTOCOL) {
        Ok(offer) => offer,
        Err(error) => return error.answer(),
    };
    let Some(seat) = hub.bridges.redeem(token, sid, side) else { return refused() };
    connection.authenticated();
    let upgrade = hyper::upgrade::on(request);
    let connection = connection.clone();
    hub.spawn(async move {
        if let Some((mut io, early)) = switched(upgrade).await {
            io.get_mut().0.get_mut().limit_unsent();
            let io: Box<dyn LegIo> = Box::new(io);
            seat.join(Leg::new(io, early).with(connection)).await;
        }
    });
    offer.answer()
}

/// Hands a connection to a control session.
pub(in crate::hub) fn control(connection: &Arc<Connection>, request: &mut Request<Incoming>) -> Answer {
    let offer = match Offer::read(request.headers(), SUBPROTOCOL) {
        Ok(offer) => offer,
        Err(error) => return error.answer(),
    };
    if offer.protocol.as_deref().is_some_and(|protocol| !protocol.eq_ignore_ascii_case(SUBPROTOCOL)) {
        return answer::refusal(StatusCode::BAD_REQUEST, "The sub-protocol spoken here is mqtt.\n");
    }
    let upgrade = hyper::upgrade::on(request);
    let connection = connection.clone();
    connection.hub.clone().spawn(async move {
        let Some((io, early)) = switched(upgrade).await else { return };
        let mut carrier = Carrier::server(io, early, CarrierOptions::HUB_CONTROL);
        let end = control::serve(&mut carrier, &connection.peer, &connection.hub, || connection.authenticated()).await;
        let (code, reason) = end.close();
        // The peer may be gone; what matters to it has been sent. One that does not read is not waited for: what was
        // written before the Close has no limit of its own.
        let _ = tokio::time::timeout(GOODBYE, carrier.close(code, reason)).await;
    });
    offer.answer()
}

/// The connection after the 101 answer, and what came behind the request.
async fn switched(upgrade: OnUpgrade) -> Option<(Io, Bytes)> {
    let upgraded = upgrade.await.ok()?;
    // Every connection is served over this type, in `server`.
    let parts = upgraded.downcast::<TokioIo<Guarded<Io>>>().ok()?;
    let (io, held) = parts.io.into_inner().into_parts();
    Some((io, if held.is_empty() { parts.read_buf } else { [parts.read_buf, held].concat().into() }))
}

fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (value, None) = (values.next()?, values.next()) else { return None };
    let (scheme, token) = value.as_bytes().split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then_some(token).filter(|token| !token.is_empty())
}

/// The bridge and side that a path names.
fn bridge_of(gaps: &[String]) -> Option<(&str, Side)> {
    let [.., sid, side] = gaps else { return None };
    match side.as_str() {
        "service" => Some((sid, Side::Service)),
        "device" => Some((sid, Side::Device)),
        _ => None,
    }
}
