//! An S3 API: moto's server, which keeps its objects in memory.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use bytes::Bytes;
use hyper::Method;

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
        let made = s3.send(Method::PUT, "", b"").await;
        assert!(made.status.is_success(), "{made:?}");
        s3
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
        let address = ([127, 0, 0, 1], self.port).into();
        let path = format!("/{BUCKET}/{key}");
        let mut client = Client::connect(address).await;
        // moto requires a signature, but does not verify it.
        let authorization = "AWS4-HMAC-SHA256 Credential=a/20260101/us-east-1/s3/aws4_request";
        let headers = [("authorization", authorization)];
        client.send(method, &path, &headers, Bytes::copy_from_slice(body)).await.unwrap()
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
