//! A Python backend writes with redis-py, and curl reads.

use std::path::Path;
use std::process::Command;

use crate::harness::{RedisServer, Server};

#[tokio::test(flavor = "multi_thread")]
async fn curl_gets_the_images_that_a_python_backend_writes() {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/python/bin/python");
    assert!(
        python.exists(),
        "redis-py is needed in target/python: run tests/run.sh, which installs it"
    );
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/backend.py");
    let output = tokio::task::spawn_blocking({
        let (url, base) = (redis.url(), format!("http://{}", server.address));
        move || Command::new(python).arg(script).args([url, base]).output().unwrap()
    })
    .await
    .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
