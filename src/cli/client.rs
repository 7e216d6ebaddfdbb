//! Requests to a running server.

use std::net::{Ipv4Addr, ToSocketAddrs};
use std::time::Duration;

use anyhow::Context;
use axum::http::{Method, StatusCode};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST, HeaderName};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;

use crate::server::listener::{self, reachable};
use crate::settings::{ListenOn, Settings, Token};

/// Longest time to connect.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest time for a request and its answer, or the head of a longer one: an image may be on its way for long.
const TIMEOUT: Duration = Duration::from_mins(10);

/// The address of a running server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ServerAddress {
    listen: ListenOn,
    /// Its name in the requests, with the port.
    host: String,
}

/// A request to a running server.
pub(super) struct Call<'a> {
    pub(super) method: Method,
    pub(super) path: &'a str,
    /// Further fields, with their values.
    pub(super) fields: &'a [(HeaderName, &'a str)],
    /// A record, or nothing.
    pub(super) json: Bytes,
}

impl<'a> Call<'a> {
    /// A request without a body.
    pub(super) fn new(method: Method, path: &'a str) -> Call<'a> {
        Call { method, path, fields: &[], json: Bytes::new() }
    }
}

impl ServerAddress {
    /// Parses `http://host:port`, `host:port` and `unix:/path`.
    pub(super) fn parse(text: &str) -> Result<ServerAddress, String> {
        if text.starts_with("https://") {
            return Err(format!(
                "`{text}` is spoken to over TLS, which this command doesn't; name the operators' address ([admin] listen), or use curl"
            ));
        }
        let host = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
        if let Ok(port) = host.parse::<u16>() {
            return Ok(ServerAddress::of(ListenOn::Tcp((Ipv4Addr::LOCALHOST, port).into())));
        }
        if let Ok(listen) = host.parse() {
            return Ok(ServerAddress::of(listen));
        }
        let with_port = if host.contains(':') { host.to_owned() } else { format!("{host}:80") };
        match with_port.to_socket_addrs().map(|mut found| found.next()) {
            Ok(Some(address)) => {
                Ok(ServerAddress { listen: ListenOn::Tcp(address), host: host.to_owned() })
            }
            _ => Err(format!(
                "`{text}` is not the address of a server; write it as http://127.0.0.1:8000"
            )),
        }
    }

    /// The address of a server that listens there.
    pub(super) fn of(listen: ListenOn) -> ServerAddress {
        let host = match &listen {
            ListenOn::Tcp(address) => reachable(*address).to_string(),
            ListenOn::Unix(_) => "localhost".to_owned(),
        };
        ServerAddress { listen, host }
    }

    pub(super) fn listen(&self) -> &ListenOn {
        &self.listen
    }

    /// Returns whether the server is certainly one of this machine.
    pub(super) fn is_on_this_machine(&self) -> bool {
        match &self.listen {
            ListenOn::Tcp(address) => reachable(*address).ip().is_loopback(),
            ListenOn::Unix(_) => true,
        }
    }

    /// The address for people: that of its pages, or of its socket.
    pub(super) fn url(&self) -> String {
        match &self.listen {
            ListenOn::Tcp(_) => format!("http://{}", self.host),
            ListenOn::Unix(_) => self.listen.to_string(),
        }
    }

    /// Sends a request, with a bearer token if one is given. The body of the answer is still to be read.
    pub(super) async fn send(
        &self,
        call: Call<'_>,
        token: Option<&Token>,
    ) -> anyhow::Result<Response<Incoming>> {
        let exchange = async {
            let connected = tokio::time::timeout(CONNECT_TIMEOUT, listener::connect(&self.listen));
            let stream = connected.await.context("timed out")??;
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            // It ends with the answer, since the sender does.
            tokio::spawn(connection);
            let mut request = Request::builder()
                .method(call.method)
                .uri(call.path)
                .header(HOST, &self.host)
                .header(CONTENT_TYPE, "application/json");
            for (name, value) in call.fields {
                request = request.header(name, *value);
            }
            if let Some(token) = token {
                request = request.header(AUTHORIZATION, format!("Bearer {}", token.reveal()));
            }
            let request = request.body(Full::new(call.json))?;
            anyhow::Ok(sender.send_request(request).await?)
        };
        tokio::time::timeout(TIMEOUT, exchange)
            .await
            .with_context(|| {
                format!("the server at {} didn't answer within {TIMEOUT:?}", self.url())
            })?
            .with_context(|| format!("no answer from a server at {}", self.listen))
    }

    /// Sends a request and reads the whole answer.
    pub(super) async fn ask(
        &self,
        call: Call<'_>,
        token: Option<&Token>,
    ) -> anyhow::Result<(StatusCode, Bytes)> {
        let response = self.send(call, token).await?;
        let status = response.status();
        let body = tokio::time::timeout(TIMEOUT, response.into_body().collect())
            .await
            .with_context(|| format!("the server at {} stopped sending", self.url()))?
            .with_context(|| format!("the answer of {} was cut off", self.url()))?;
        Ok((status, body.to_bytes()))
    }
}

/// The public listener, unless it speaks TLS: this client trusts no certificate authority.
pub(super) fn plain_listener(settings: &Settings) -> anyhow::Result<ServerAddress> {
    let tls = !settings.http.tls_cert_file.as_os_str().is_empty();
    anyhow::ensure!(!tls, "the server at {} speaks only TLS", settings.http.listen);
    Ok(ServerAddress::of(settings.http.listen.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_read_as_a_url_a_host_or_a_socket() {
        for text in ["http://127.0.0.1:8000/", "http://127.0.0.1:8000", "127.0.0.1:8000"] {
            assert_eq!(ServerAddress::parse(text).unwrap().url(), "http://127.0.0.1:8000");
        }
        assert_eq!(ServerAddress::parse("8000").unwrap().url(), "http://127.0.0.1:8000");
        assert!(ServerAddress::parse("localhost:1").unwrap().is_on_this_machine());
        assert!(!ServerAddress::parse("192.0.2.2:8000").unwrap().is_on_this_machine());
        assert_eq!(ServerAddress::parse("unix:/run/a.sock").unwrap().url(), "unix:/run/a.sock");
        assert!(ServerAddress::parse("https://images.example").unwrap_err().contains("TLS"));
        assert!(ServerAddress::parse("http://").unwrap_err().contains("write it as"));
    }
}
