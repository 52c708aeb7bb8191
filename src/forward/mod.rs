//! Floor 3: rules, and the flows that follow them.
//!
//! Owns the comparison of running with wanted forwards, the listeners at the service, the dialling at the device,
//! and the joining of a socket with a channel. Does not know the hub, or how a device stream comes to be.
//! Invariant: a flow ends in one place, with one reason; an end that was not meant is a reset on both sides.

mod flow;
mod inlet;
mod metrics;
mod outlet;
mod plan;
mod verdict;

pub use flow::{Abort, DropIsReset, FlowEnd, FlowOptions, Reason, join};
pub use inlet::{Connector, FarSide, Inlet, InletDeps, OpenFailure, Opened};
pub use metrics::{ForwardMetrics, TargetMetrics};
pub use outlet::{Dialled, Outlet, OutletError, serve_channel};
pub use plan::{Running, Step, plan};
pub use verdict::{RefusedByDevice, Unanswered, Verdicted};

use crate::{config::ListenAddress, transport::net::Endpoint};

/// An address of the configuration as the sockets know it: both were parsed strictly, by the same rules.
fn endpoint_of(address: &ListenAddress) -> Endpoint {
    match address {
        ListenAddress::Unix(path) => Endpoint::Unix(path.clone()),
        ListenAddress::Tcp(_) => Endpoint::Tcp {
            host: address.host().unwrap_or_default().to_owned(),
            port: address.port().unwrap_or_default(),
        },
    }
}
