//! An S3 API: moto's server, which keeps its objects in memory, and a proxy before it that breaks some requests.

use std::convert::Infallible;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::redis::free_port;
use super::{Answer, Client, until};

pub(crate) const BUCKET: &str = "images";

pub(crate) struct S3 {
    child: Child,
    pub(crate) port: u16,
}

impl S3 {
    pub(crate) async fn start() -> S3 {
        let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/python/bin/python");
        let port = free_port();
        let child = Command::new(python)
            .args(["-m", "moto.server", "-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("moto is needed in target/python: run tests/run.sh, which installs it");
        let s3 = S3 { child, port };
        until("the S3 API answers", || async {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await;
        s3.make_bucket(BUCKET).await;
        s3
    }

    pub(crate) async fn make_bucket(&self, name: &str) {
        let made = self.request(Method::PUT, &format!("/{name}"), b"").await;
        assert!(made.status.is_success(), "{made:?}");
    }

    /// Refuses unknown credentials from now on, which are all, or accepts any.
    pub(crate) async fn check_credentials(&self, are_checked: bool) {
        let unchecked: &[u8] = if are_checked { b"0" } else { b"inf" };
        let reset = self.request(Method::POST, "/moto-api/reset-auth", unchecked).await;
        assert!(reset.status.is_success(), "{reset:?}");
    }

    /// Settings that offload images to the S3 API on a port, which may be a proxy's.
    pub(crate) fn settings(port: u16) -> Vec<(&'static str, String)> {
        let options = [
            format!("endpoint=http://127.0.0.1:{port}"),
            "allow_http=true".into(),
            "region=us-east-1".into(),
            "access_key_id=a".into(),
            "secret_access_key=b".into(),
        ];
        vec![
            ("offload.url", format!("s3://{BUCKET}/shown")),
            ("offload.options", format!("{options:?}")),
        ]
    }

    /// Sends a request for an object, by its key in the bucket.
    pub(crate) async fn send(&self, method: Method, key: &str, body: &[u8]) -> Answer {
        self.request(method, &format!("/{BUCKET}/{key}"), body).await
    }

    async fn request(&self, method: Method, path: &str, body: &[u8]) -> Answer {
        let address = ([127, 0, 0, 1], self.port).into();
        let mut client = Client::connect(address).await;
        // moto requires a signature, but does not verify it.
        let authorization = "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request";
        let headers = [("authorization", authorization)];
        client.send(method, path, &headers, Bytes::copy_from_slice(body)).await.unwrap()
    }

    pub(crate) async fn get(&self, key: &str) -> Answer {
        self.send(Method::GET, key, b"").await
    }

    /// Keys of all objects, sorted.
    pub(crate) async fn keys(&self) -> Vec<String> {
        let listing = self.get("?list-type=2").await;
        let text = String::from_utf8(listing.body.to_vec()).unwrap();
        let after = text.split("<Key>").skip(1);
        after.map(|rest| rest.split_once("</Key>").unwrap().0.to_owned()).collect()
    }
}

impl Drop for S3 {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Treatment of a request that doesn't reach the S3 API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// It is refused: 403.
    Refused,
    /// It is never answered.
    Hangs,
}

/// A proxy before an S3 API that breaks some requests, by their method and target.
pub(crate) struct Faulty {
    pub(crate) port: u16,
    accepting: JoinHandle<()>,
}

impl Faulty {
    pub(crate) async fn before(
        s3: &S3,
        fault: impl Fn(&Method, &str) -> Option<Fault> + Send + Sync + 'static,
    ) -> Faulty {
        Faulty::judging(s3, move |request| {
            fault(request.method(), request.uri().path_and_query().unwrap().as_str())
        })
        .await
    }

    /// The same, by the whole head of a request.
    pub(crate) async fn judging(
        s3: &S3,
        fault: impl Fn(&Request<Incoming>) -> Option<Fault> + Send + Sync + 'static,
    ) -> Faulty {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (fault, s3_port) = (Arc::new(fault), s3.port);
        let accepting = tokio::spawn(async move {
            while let Ok((wire, _)) = listener.accept().await {
                let fault = Arc::clone(&fault);
                let service = service_fn(move |request: Request<Incoming>| {
                    let fault = fault(&request);
                    async move { Ok::<_, Infallible>(answer(s3_port, request, fault).await) }
                });
                let server = hyper::server::conn::http1::Builder::new();
                tokio::spawn(server.serve_connection(TokioIo::new(wire), service));
            }
        });
        Faulty { port, accepting }
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn answer(
    s3_port: u16,
    request: Request<Incoming>,
    fault: Option<Fault>,
) -> Response<Full<Bytes>> {
    let (parts, body) = request.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    match fault {
        Some(Fault::Hangs) => std::future::pending().await,
        Some(Fault::Refused) => {
            let mut refused = Response::new(Full::default());
            *refused.status_mut() = StatusCode::FORBIDDEN;
            return refused;
        }
        None => {}
    }
    let headers: Vec<_> =
        parts.headers.iter().map(|(name, it)| (name.as_str(), it.to_str().unwrap())).collect();
    let mut client = Client::connect(([127, 0, 0, 1], s3_port).into()).await;
    let target = parts.uri.path_and_query().unwrap().as_str();
    let answer = client.send(parts.method, target, &headers, body).await.unwrap();
    let mut response = Response::new(Full::new(answer.body));
    *response.status_mut() = answer.status;
    *response.headers_mut() = answer.headers;
    response.headers_mut().remove("transfer-encoding");
    response.headers_mut().remove("connection");
    response
}
