//! The embedded store: demo images at the first start, durability, and reuse of space.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use afterimage::store::Store;
use bytes::Bytes;
use hyper::{Method, StatusCode};

use crate::harness::server::{load, program};
use crate::harness::{Client, Process, Server, get, png, record, until};

long_tests! {
    #[tokio::test] every_acknowledged_image_survives_kill_9_during_a_thousand_writes
    #[tokio::test] the_space_of_expired_records_is_reused_and_released
}

#[tokio::test]
async fn a_first_start_stores_the_demo_images_and_a_second_one_keeps_them() {
    let dir = tempfile::tempdir().unwrap();
    let mut etags = Vec::new();
    for _ in 0..2 {
        let mut process = Process::embedded(dir.path());
        let mut seen = Vec::new();
        for (id, media_type) in [
            ("hero_abc123", "image/png"),
            ("concept_0", "image/jpeg"),
            ("concept_1", "image/webp"),
            ("concept_2", "image/svg+xml"),
        ] {
            let answer = get(process.address, &format!("/images/{id}"), &[]).await;
            assert_eq!(answer.status, StatusCode::OK);
            assert_eq!(answer.header("content-type"), media_type);
            if id == "hero_abc123" {
                assert!((900_000..1_200_000).contains(&answer.body.len()));
            }
            seen.push(answer.header("etag").to_owned());
        }
        process.kill();
        etags.push(seen);
    }
    assert_eq!(etags[0], etags[1]);
}

async fn every_acknowledged_image_survives_kill_9_during_a_thousand_writes() {
    let dir = tempfile::tempdir().unwrap();
    let acknowledged = Arc::new(AtomicUsize::new(0));
    let image = |number: usize| png(number as u64, 2_000 + number * 37 % 60_000);
    // The process is killed and restarted three times on the way.
    for stop_at in [150, 480, 800, 1000] {
        let mut process = Process::embedded(dir.path());
        let address = process.address;
        let done = Arc::clone(&acknowledged);
        let writer = tokio::spawn(async move {
            let mut client = Client::connect(address).await;
            let json = [("content-type", "application/json")];
            for number in done.load(Ordering::SeqCst)..1000 {
                let value = Bytes::from(record(&image(number)));
                let path = format!("/images/n{number}");
                match client.send(Method::PUT, &path, &json, value).await {
                    Ok(answer) => assert!(answer.status.is_success(), "{answer:?}"),
                    Err(_killed) => return,
                }
                done.store(number + 1, Ordering::SeqCst);
            }
        });
        until("enough images are written", || async {
            acknowledged.load(Ordering::SeqCst) >= stop_at
        })
        .await;
        process.kill();
        writer.await.unwrap();
    }
    assert_eq!(acknowledged.load(Ordering::SeqCst), 1000);
    let process = Process::embedded(dir.path());
    let mut client = Client::connect(process.address).await;
    for number in 0..1000 {
        let answer = client.get(&format!("/images/n{number}"), &[]).await;
        assert_eq!(answer.body, image(number), "n{number}");
    }
}

async fn the_space_of_expired_records_is_reused_and_released() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap().to_owned();
    let settings = [
        ("embedded.dir", path.as_str()),
        ("embedded.sweep_interval", "20ms"),
        ("embedded.demo", "false"),
    ];
    let size = || std::fs::metadata(dir.path().join("records.redb")).unwrap().len();
    let server = Server::start(&settings).await;
    let mut client = Client::connect(server.address).await;
    let value = Bytes::from(record(&png(1, 500_000)));
    let mut largest = 0;
    // 200 records of 0.67 MB, of which few are alive at the same time.
    for number in 0..200 {
        let json = [("content-type", "application/json")];
        let path = format!("/images/n{number}?ttl=50ms");
        client.send(Method::PUT, &path, &json, value.clone()).await.unwrap();
        largest = largest.max(size());
    }
    assert!(largest < 60_000_000, "the file grew to {largest} bytes for 133 MB written");
    until("the last one expires", || async {
        client_status(server.address, "/images/n199").await == StatusCode::NOT_FOUND
    })
    .await;
    drop(client);
    server.stop().await;
    until("the store is closed", || async { Store::open(&load(&settings)).await.is_ok() }).await;
    let server = Server::start(&settings).await;
    assert!(size() < 10_000_000, "the file has {} bytes without a record", size());
    server.get("/images/n0").await.problem(404, "absent");
}

async fn client_status(address: std::net::SocketAddr, path: &str) -> StatusCode {
    get(address, path, &[]).await.status
}

#[tokio::test]
async fn put_writes_with_and_without_a_running_server() {
    let dir = tempfile::tempdir().unwrap();
    let (store, file) = (dir.path().join("store"), dir.path().join("picture"));
    let bytes = png(5, 300_000);
    std::fs::write(&file, &bytes).unwrap();
    let put = |id: &str, port: u16| {
        let output = program()
            .args(["put", id, "--ttl", "90s", "--embedded-dir"])
            .arg(&store)
            .args(["--http-listen", &format!("127.0.0.1:{port}")])
            .arg(&file)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(put("before", 1), "before: image/png of 300000 bytes, for 1m 30s\n");
    let process = Process::embedded(&store);
    put("during", process.address.port());
    for id in ["before", "during"] {
        assert_eq!(get(process.address, &format!("/images/{id}"), &[]).await.body, bytes, "{id}");
    }
    // Another server on the same store fails with a clear message.
    let second = program()
        .arg("--embedded-dir")
        .arg(&store)
        .args(["--http-listen", "127.0.0.1:0"])
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    assert!(!second.status.success());
    assert!(String::from_utf8_lossy(&second.stderr).contains("is in use by another process"));
}
