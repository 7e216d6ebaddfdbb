//! `health`: asks a running server for its health, for container runtimes.

use anyhow::Context;
use hyper::Method;
use serde_json::Value;

use super::client::{self, Call, ServerAddress};
use super::say;
use crate::settings::Settings;

/// Fails unless the server answers, and tells whether it is ready.
pub(super) async fn run(settings: &Settings, server: Option<ServerAddress>) -> anyhow::Result<()> {
    let server = match (server, &settings.admin.listen) {
        (Some(server), _) => server,
        (None, Some(listen)) => ServerAddress::of(listen.clone()),
        (None, None) => client::plain_listener(settings)
            .context("set [admin] listen: its plain HTTP answers health checks")?,
    };
    let (status, body) = server.ask(Call::new(Method::GET, "/healthz"), None).await?;
    anyhow::ensure!(status.is_success(), "unhealthy: {status} {}", String::from_utf8_lossy(&body));
    let (status, body) = server.ask(Call::new(Method::GET, "/readyz"), None).await?;
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let why = ["reason", "detail"].iter().find_map(|name| body[name].as_str()).unwrap_or_default();
    let url = server.url();
    let state = match (status.is_success(), why) {
        (true, "") => format!("{url} is alive and ready"),
        (true, why) => format!("{url} is alive and ready, but {why}"),
        (false, why) => format!("{url} is alive, but not ready: {why}"),
    };
    say(&state)
}
