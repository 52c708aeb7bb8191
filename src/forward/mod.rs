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

pub use flow::{Abort, FlowEnd, FlowOptions, Reason, join};
pub use inlet::{Connector, FarSide, Inlet, InletDeps, OpenFailure, Opened};
pub use metrics::{ForwardMetrics, TargetMetrics};
pub use outlet::{Dialled, Outlet, OutletError, serve_channel};
pub use plan::{Running, Step, plan};
pub use verdict::{RefusedByDevice, Verdicted};
