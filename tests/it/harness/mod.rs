//! Servers for the tests (Redis, Afterimage in this process or in its own, an S3 API, a proxy that can hang) and an HTTP
//! client that returns responses unchanged.

pub(crate) mod client;
pub(crate) mod proxy;
pub(crate) mod redis;
pub(crate) mod s3;
pub(crate) mod server;

use std::future::Future;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

pub(crate) use self::client::{Answer, Client, Protocol, get};
pub(crate) use self::proxy::{Held, Proxy};
pub(crate) use self::redis::{Flavour, RedisServer};
pub(crate) use self::s3::S3;
pub(crate) use self::server::{Process, Server};

/// Longest time that a test waits for an expected event before it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Polls until the answer is yes, and fails after [`PATIENCE`].
pub(crate) async fn until<F: Future<Output = bool>>(what: &str, mut ask: impl FnMut() -> F) {
    let start = Instant::now();
    while !ask().await {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain until {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// `Cache-Status` of a known image while its store can't be reached.
pub(crate) const STALE: &str = "afterimage; fwd=stale; detail=store-unreachable";

/// Waits until a server serves this version of `a` from memory, as current: the push of it has been processed.
pub(crate) async fn until_hit(server: SocketAddr, value: &[u8]) {
    let etag = etag(value);
    until("the version is served from memory as current", || async {
        let answer = get(server, "/images/a", &[]).await;
        answer.header("etag") == etag && answer.header("cache-status") == "afterimage; hit"
    })
    .await;
}

/// Bytes with a PNG signature and the given length, different for each seed.
pub(crate) fn png(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// The record that a backend stores for an image.
pub(crate) fn record(bytes: &[u8]) -> Vec<u8> {
    use base64::Engine;
    let base64_data = base64::engine::general_purpose::STANDARD.encode(bytes);
    serde_json::to_vec(&serde_json::json!({
        "mime_type": "image/png",
        "prompt": "what stays when the light is gone",
        "base64_data": base64_data,
    }))
    .unwrap()
}

/// Expected entity-tag of a stored value: its MD5.
pub(crate) fn etag(value: &[u8]) -> String {
    use md5::Digest;
    format!("\"{:032x}\"", u128::from_be_bytes(md5::Md5::digest(value).into()))
}

/// Creates a folder with a certificate authority and with certificates that it signed for `localhost` and for a client.
pub(crate) fn certificates() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let made = std::process::Command::new("bash")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/harness/certificates.sh"))
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    dir
}
