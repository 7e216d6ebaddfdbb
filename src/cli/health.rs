//! `health`: asks a running server for its health, for container runtimes.

use anyhow::Context;
use bytes::Bytes;
use hyper::Method;

use super::client;
use crate::settings::Settings;

pub(super) async fn run(settings: &Settings) -> anyhow::Result<()> {
    let listen = match &settings.admin.listen {
        Some(listen) => listen,
        None => client::plain_listener(settings)
            .context("set [admin] listen: its plain HTTP answers health checks")?,
    };
    let (status, body) = client::send(listen, Method::GET, "/healthz", Bytes::new(), None).await?;
    anyhow::ensure!(status.is_success(), "unhealthy: {status} {}", String::from_utf8_lossy(&body));
    Ok(())
}
