//! An HTTP client that returns responses unchanged: it decodes nothing, caches nothing and follows no redirect.

use std::net::SocketAddr;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::{http1, http2};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// One connection to a server.
pub(crate) struct Client {
    sender: Sender,
    host: String,
}

enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

/// Protocol of a connection, chosen without negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

/// A response with its complete body.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Client {
    pub(crate) async fn connect(address: SocketAddr) -> Client {
        Client::speaking(Protocol::Http1, address).await
    }

    pub(crate) async fn speaking(protocol: Protocol, address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Client::over(protocol, stream, &address.to_string()).await
    }

    pub(crate) async fn over(
        protocol: Protocol,
        wire: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
        host: &str,
    ) -> Client {
        let wire = TokioIo::new(wire);
        let sender = match protocol {
            Protocol::Http1 => {
                let (sender, connection) = http1::handshake(wire).await.unwrap();
                tokio::spawn(connection);
                Sender::Http1(sender)
            }
            Protocol::Http2 => {
                let executor = TokioExecutor::new();
                let (sender, connection) = http2::handshake(executor, wire).await.unwrap();
                tokio::spawn(connection);
                Sender::Http2(sender)
            }
        };
        Client { sender, host: host.to_owned() }
    }

    pub(crate) async fn send(
        &mut self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> hyper::Result<Answer> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        match self.sender {
            Sender::Http1(_) => {
                *request.uri_mut() = path.parse().unwrap();
                let host = HeaderValue::from_str(&self.host).unwrap();
                request.headers_mut().insert("host", host);
            }
            Sender::Http2(_) => {
                *request.uri_mut() = format!("http://{}{path}", self.host).parse().unwrap();
            }
        }
        for (name, value) in headers {
            let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
            let value = HeaderValue::from_str(value).unwrap();
            if name == "host" {
                request.headers_mut().insert(name, value);
            } else {
                request.headers_mut().append(name, value);
            }
        }
        let response = match &mut self.sender {
            Sender::Http1(sender) => {
                sender.ready().await?;
                sender.send_request(request).await?
            }
            Sender::Http2(sender) => {
                sender.ready().await?;
                sender.send_request(request).await?
            }
        };
        let (parts, body) = response.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(Answer { status: parts.status, headers: parts.headers, body })
    }

    pub(crate) async fn get(&mut self, path: &str, headers: &[(&str, &str)]) -> Answer {
        self.send(Method::GET, path, headers, Bytes::new()).await.unwrap()
    }
}

impl Answer {
    /// Returns a header's value, or an empty string without that header.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    /// Asserts that this is an error response with problem details (RFC 9457 §3), and returns their members.
    pub(crate) fn problem(&self, status: u16, kind: &str) -> serde_json::Value {
        assert_eq!(self.status, status, "{self:?}");
        assert_eq!(self.header(CONTENT_TYPE.as_str()), "application/problem+json");
        assert_eq!(self.header("cache-control"), "no-store");
        // And by Accept, where the address leaves the format to the server.
        assert!(matches!(self.header("vary"), "Accept-Encoding" | "Accept-Encoding, Accept"));
        assert_eq!(self.header("x-content-type-options"), "nosniff");
        let members: serde_json::Value = serde_json::from_slice(&self.body).unwrap();
        assert_eq!(members["type"], format!("urn:problem:afterimage:{kind}"), "{members}");
        assert_eq!(members["status"], status);
        assert!(members["title"].is_string());
        members
    }
}

/// Sends a GET on a new connection.
pub(crate) async fn get(address: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Answer {
    Client::connect(address).await.get(path, headers).await
}
