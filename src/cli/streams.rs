//! `culvert devicestream show`: the hub's streaming endpoints.
//!
//! Owns the JSON's shape, which is the cloud command line's. Does not know how streams are made.
//! Invariant: what is printed can be read by scripts written for the cloud's.

use http::Method;

use super::{
    api::Api,
    args::{DeviceStreamAction, DeviceStreamArgs},
    exit::{Failure, Outcome},
    say,
};

/// Where the hub tells (wire.md, section f, without the resource manager's path around it).
const PATH: &str = "/deviceStreams";

/// Runs the command.
pub(super) async fn run(args: &DeviceStreamArgs) -> Outcome {
    let DeviceStreamAction::Show = args.action;
    let endpoints = Api::open(&args.hub)?.call(Method::GET, PATH, None, None).await?;
    say::line(serde_json::to_string_pretty(&endpoints).map_err(Failure::software)?)
}
