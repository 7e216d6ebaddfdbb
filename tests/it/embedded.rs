//! The embedded store: demo images at the first start, durability, reuse of space, full disks and damaged files.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use afterimage::store::Store;
use bytes::Bytes;
use hyper::{Method, StatusCode};

use crate::events::Events;
use crate::harness::server::{load, program, program_below};
use crate::harness::{Client, Process, Server, etag, get, png, record, until};

long_tests! {
    #[tokio::test] every_acknowledged_image_survives_kill_9_during_a_thousand_writes
    #[tokio::test] the_space_of_expired_records_is_reused_and_released
    #[tokio::test] writes_fail_while_the_disk_is_full_and_resume_without_a_restart
    #[tokio::test] a_store_starts_and_is_read_while_nothing_can_be_written
    #[tokio::test] a_store_with_zeros_in_its_file_is_named_with_what_to_do_and_serves_what_it_can
}

const JSON: [(&str, &str); 1] = [("content-type", "application/json")];

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
    let put = |id: &str| {
        let output = program()
            .args(["put", id, "--ttl", "90s", "--embedded-dir"])
            .arg(&store)
            .arg(&file)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let place = store.join("records.redb");
    let told = format!("before: image/png, 300000 bytes, for 1m 30s, in {}\n", place.display());
    assert!(put("before").starts_with(&told));
    let process = Process::embedded(&store);
    let place = format!("in the server at http://{}\n", process.address);
    assert!(put("during").contains(&place));
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

/// Starts the program on a store, without demo images and with little memory, so that most reads reach the store.
fn without_demo(dir: &Path) -> Process {
    let mut command = program();
    command.arg("--embedded-dir").arg(dir).args(["--embedded-demo", "false"]);
    command.args(["--cache-images", "1"]);
    Process::start(command)
}

/// Lets no file of a process grow beyond this, as a full disk does: nothing is written where the limit is 0.
fn limit_file_size(process: &Process, bytes: &str) {
    let limited = Command::new("prlimit")
        .args(["--pid", &process.child.id().to_string(), &format!("--fsize={bytes}:")])
        .status()
        .expect("prlimit is needed: apt-get install util-linux");
    assert!(limited.success());
}

async fn writes_fail_while_the_disk_is_full_and_resume_without_a_restart() {
    let image = |seed| Bytes::from(record(&png(seed, 30_000)));
    let large = Bytes::from(record(&png(9, 3_000_000)));
    // The file can't grow, or nothing can be written at all.
    for grows in [true, false] {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("records.redb");
        let mut process = without_demo(dir.path());
        let mut client = Client::connect(process.address).await;
        for (id, seed) in [("a", 1), ("b", 2)] {
            let path = format!("/images/{id}");
            let answer = client.send(Method::PUT, &path, &JSON, image(seed)).await.unwrap();
            assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
        }
        let mut events = Events::of(process.address, "ids=a,large&inline=none").await;
        for _ in 0..2 {
            events.next().await;
        }

        let size = fs::metadata(&file).unwrap().len();
        limit_file_size(&process, &if grows { size } else { 0 }.to_string());
        for _ in 0..3 {
            let answer =
                client.send(Method::PUT, "/images/large", &JSON, large.clone()).await.unwrap();
            let problem = answer.problem(507, "disk-full");
            let detail = problem["detail"].as_str().unwrap();
            assert!(detail.starts_with("the disk of the store is full: "), "{detail}");
            // What was there is read from the store, which is coherent.
            for (id, seed) in [("a", 1), ("b", 2), ("a", 1)] {
                let answer = client.get(&format!("/images/{id}"), &[]).await;
                assert_eq!(answer.body, png(seed, 30_000), "{id}: {answer:?}");
            }
            client.get("/images/large", &[]).await.problem(404, "absent");
            let ready = client.get("/readyz", &[]).await;
            let ready: serde_json::Value = serde_json::from_slice(&ready.body).unwrap();
            assert_eq!(ready["coherence"], "coherent");
            assert!(ready["write_failure"].is_string(), "{ready}");
        }

        limit_file_size(&process, "unlimited");
        let answer = client.send(Method::PUT, "/images/large", &JSON, large.clone()).await.unwrap();
        assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
        assert_eq!(events.next().await.id, etag(&large).trim_matches('"'));
        assert_eq!(client.get("/images/large", &[]).await.body, png(9, 3_000_000));
        let answer = client.send(Method::PUT, "/images/a", &JSON, image(3)).await.unwrap();
        assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
        assert_eq!(client.get("/images/a", &[]).await.body, png(3, 30_000));
        assert_eq!(events.next().await.id, etag(&image(3)).trim_matches('"'));

        process.kill();
        let process = without_demo(dir.path());
        for (id, bytes) in
            [("a", png(3, 30_000)), ("b", png(2, 30_000)), ("large", png(9, 3_000_000))]
        {
            let answer = get(process.address, &format!("/images/{id}"), &[]).await;
            assert_eq!(answer.body, bytes, "{id}");
        }
    }
}

async fn a_store_starts_and_is_read_while_nothing_can_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let mut process = without_demo(dir.path());
    let image = Bytes::from(record(&png(1, 30_000)));
    let mut client = Client::connect(process.address).await;
    client.send(Method::PUT, "/images/a", &JSON, image.clone()).await.unwrap();
    process.kill();

    let mut command = program_below(&["prlimit", "--fsize=0:"]);
    command.arg("--embedded-dir").arg(dir.path()).args(["--embedded-demo", "false"]);
    let process = Process::start(command);
    let mut client = Client::connect(process.address).await;
    assert_eq!(client.get("/images/a", &[]).await.body, png(1, 30_000));
    let answer = client.send(Method::PUT, "/images/b", &JSON, image.clone()).await.unwrap();
    answer.problem(507, "disk-full");
    limit_file_size(&process, "unlimited");
    let answer = client.send(Method::PUT, "/images/b", &JSON, image).await.unwrap();
    assert_eq!(answer.status, StatusCode::CREATED, "{answer:?}");
}

#[tokio::test]
async fn readiness_is_told_without_a_write_to_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let process = without_demo(dir.path());
    let file = dir.path().join("records.redb");
    let written = || fs::metadata(&file).unwrap().modified().unwrap();
    let before = written();
    let mut client = Client::connect(process.address).await;
    for _ in 0..100 {
        assert_eq!(client.get("/readyz", &[]).await.status, StatusCode::OK);
    }
    assert_eq!(written(), before);
}

/// Runs the program on a store, and returns its error text; `None` if it starts.
fn start_error(dir: &Path, picture: &Path) -> Option<String> {
    let output =
        program().args(["put", "new", "--embedded-dir"]).arg(dir).arg(picture).output().unwrap();
    if output.status.success() {
        return None;
    }
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    Some(String::from_utf8(output.stderr).unwrap())
}

async fn a_store_with_zeros_in_its_file_is_named_with_what_to_do_and_serves_what_it_can() {
    const ZEROS: usize = 64 * 1024;
    let dir = tempfile::tempdir().unwrap();
    let (file, picture) = (dir.path().join("records.redb"), dir.path().join("picture"));
    fs::write(&picture, png(1, 1000)).unwrap();
    let mut process = without_demo(dir.path());
    let mut client = Client::connect(process.address).await;
    for number in 0..20 {
        let image = Bytes::from(record(&png(number, 60_000)));
        client.send(Method::PUT, &format!("/images/n{number}"), &JSON, image).await.unwrap();
    }
    process.kill();
    let sound = fs::read(&file).unwrap();
    let mut refused = 0;
    // The first have the header and the roots; the others are a sample.
    for start in (0..4).chain((4..sound.len() / ZEROS).step_by(5)).map(|window| window * ZEROS) {
        let mut damaged = sound.clone();
        let end = damaged.len().min(start + ZEROS);
        damaged[start..end].fill(0);
        fs::write(&file, &damaged).unwrap();
        if let Some(error) = start_error(dir.path(), &picture) {
            refused += 1;
            let last = error.lines().last().unwrap();
            assert!(last.contains(&file.display().to_string()), "{start}: {error}");
            assert!(last.contains("restore it from a backup, or move it away"), "{start}: {error}");
            continue;
        }
        // Damage that opening doesn't meet is an error of the images that it met.
        fs::write(&file, &damaged).unwrap();
        let process = without_demo(dir.path());
        for number in 0..20 {
            let path = format!("/images/n{number}");
            let answer = get(process.address, &path, &[]).await;
            let sound = answer.body == png(number, 60_000);
            assert!(sound || answer.status != StatusCode::OK, "{start} {path} {answer:?}");
        }
        assert_eq!(get(process.address, "/healthz", &[]).await.status, StatusCode::OK);
    }
    assert!(refused >= 2, "{refused}");
    // A server says the same.
    fs::write(&file, vec![0; ZEROS]).unwrap();
    let output = program()
        .arg("--embedded-dir")
        .arg(dir.path())
        .args(["--http-listen", "127.0.0.1:0"])
        .output()
        .unwrap();
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success() && error.contains("move it away"), "{error}");
}

#[tokio::test]
async fn an_empty_file_is_said_to_be_a_new_store() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("records.redb"), b"").unwrap();
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut command = program();
    command.arg("--embedded-dir").arg(dir.path()).stderr(log.reopen().unwrap());
    let process = Process::start(command);
    assert_eq!(get(process.address, "/images/concept_0", &[]).await.status, StatusCode::OK);
    until("the log says so", || async {
        let text = fs::read_to_string(log.path()).unwrap();
        text.contains("the store's file is empty: a new store begins in it")
    })
    .await;
}
