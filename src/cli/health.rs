//! `health`: asks a running server for its health, for container runtimes.

use anyhow::Context;
use hyper::Method;

use super::client::{self, Call, ServerAddress};
use crate::settings::Settings;

pub(super) async fn run(settings: &Settings) -> anyhow::Result<()> {
    let server = match &settings.admin.listen {
        Some(listen) => ServerAddress::of(listen.clone()),
        None => client::plain_listener(settings)
            .context("set [admin] listen: its plain HTTP answers health checks")?,
    };
    let (status, body) = server.ask(Call::new(Method::GET, "/healthz"), None).await?;
    anyhow::ensure!(status.is_success(), "unhealthy: {status} {}", String::from_utf8_lossy(&body));
    Ok(())
}
