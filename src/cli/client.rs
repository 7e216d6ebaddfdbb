//! One request to a running server, for the commands `health` and `put`.

use std::time::Duration;

use anyhow::Context;
use axum::http::{Method, StatusCode};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper_util::rt::TokioIo;

use crate::server::listener::{self, reachable};
use crate::settings::{ListenOn, Settings, Token};

const TIMEOUT: Duration = Duration::from_secs(10);

/// Sends a request to the server at an address, with a bearer token if one is given, and reads the whole answer.
pub(super) async fn send(
    listen: &ListenOn,
    method: Method,
    path: &str,
    json: Bytes,
    token: Option<&Token>,
) -> anyhow::Result<(StatusCode, Bytes)> {
    let host = match listen {
        ListenOn::Tcp(address) => reachable(*address).to_string(),
        ListenOn::Unix(_) => "localhost".to_owned(),
    };
    let exchange = async {
        let stream = listener::connect(listen).await?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, host)
            .header(CONTENT_TYPE, "application/json");
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, format!("Bearer {}", token.reveal()));
        }
        let request = request.body(Full::new(json))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        connection.abort();
        anyhow::Ok((status, body))
    };
    tokio::time::timeout(TIMEOUT, exchange)
        .await
        .with_context(|| format!("the server at {listen} didn't answer within {TIMEOUT:?}"))?
        .with_context(|| format!("no answer from a server at {listen}"))
}

/// The public listener, unless it speaks TLS: this client trusts no certificate authority.
pub(super) fn plain_listener(settings: &Settings) -> anyhow::Result<&ListenOn> {
    let tls = !settings.http.tls_cert_file.as_os_str().is_empty();
    anyhow::ensure!(!tls, "the server at {} speaks only TLS", settings.http.listen);
    Ok(&settings.http.listen)
}
