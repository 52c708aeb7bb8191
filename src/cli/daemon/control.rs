//! The control socket's requests, as far as they are the same for every role.
//!
//! Owns the answer to "what would a reload change?". Does not know status or connections, which the role answers.
//! Invariant: a request changes nothing in the daemon's configuration.

use std::{
    path::PathBuf,
    sync::{Arc, PoisonError},
};

use futures_util::future::BoxFuture;
use serde_json::json;

use super::{Running, apply::InForce};
use crate::{
    agent::control_socket::{ControlHandler, Reply, Request},
    config::{Changes, Environment, Load},
};

/// A daemon's control handler.
pub(super) struct Control<C> {
    pub(super) file: PathBuf,
    pub(super) in_force: InForce<C>,
    pub(super) role: Arc<dyn Running<C>>,
}

impl<C: Load + Changes + Sync> ControlHandler for Control<C> {
    fn handle(&self, request: Request) -> BoxFuture<'_, Reply> {
        match request {
            Request::Plan => Box::pin(self.plan()),
            Request::Connect { .. } | Request::Status => self.role.handle(request),
        }
    }
}

impl<C: Load + Changes + Sync> Control<C> {
    /// The daemon reads its own file itself, so that the answer is what a reload would do, secrets included.
    async fn plan(&self) -> Reply {
        let file = self.file.clone();
        let load = move || C::load(&file, &Environment::of_process());
        let loaded = match tokio::task::spawn_blocking(load).await {
            Ok(Ok(loaded)) => loaded,
            Ok(Err(error)) => return Reply::Refused(error.to_string()),
            Err(error) => return Reply::Refused(error.to_string()),
        };
        let running = self.in_force.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let changes: Vec<String> = running.changes(&loaded.config).iter().map(ToString::to_string).collect();
        Reply::Json(json!({ "config": self.file, "changes": changes }))
    }
}
