//! `culvert connect`: standard input and output joined to a target, as ssh's ProxyCommand wants it.
//!
//! Owns the choice between the running service daemon and a device stream of its own. Does not know how either
//! reaches the device. Invariant: nothing but the target's bytes is written to standard output, and a cut ends with
//! a code that is not zero.

use std::path::PathBuf;

use anyhow::Context as _;

use super::{
    args::{ConnectArgs, Role},
    exit::{Failure, Outcome},
    places,
};
use crate::{
    agent::control_socket::{Answer, CallError, Request, call},
    config::{Environment, load_service},
};

/// Runs the command.
pub(super) async fn run(args: &ConnectArgs) -> Outcome {
    let request = Request::Connect { device: args.device.clone(), target: args.target.clone() };
    for socket in sockets(args) {
        match call(&socket, &request).await {
            Ok(Answer::Joined(joined)) => {
                let ran = joined.run(tokio::io::stdin(), tokio::io::stdout()).await;
                let what = || format!("the connection to {} at {} was cut", args.target, args.device);
                return ran.with_context(what).map_err(Failure::unavailable);
            }
            Ok(Answer::Json(_)) => return Err(Failure::software(anyhow::anyhow!("the daemon did not join"))),
            Err(CallError::NotRunning { .. }) => {}
            Err(error) => return Err(Failure::unavailable(error)),
        }
    }
    Err(Failure::unavailable(anyhow::anyhow!("no culvert service is running here")))
}

/// The sockets of service daemons that may run, the likeliest first.
fn sockets(args: &ConnectArgs) -> Vec<PathBuf> {
    let configured = args.config.as_deref().and_then(|file| load_service(file).ok());
    match configured {
        Some(loaded) => loaded.config.control_socket.into_iter().collect(),
        None => Environment::of_process().control_sockets(Role::Service.name()),
    }
}
