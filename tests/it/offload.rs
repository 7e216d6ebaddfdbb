//! Offload: images move to an object store, are served from there, and none is lost on the way.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::{Method, StatusCode};
use image::ImageFormat;
use redis::AsyncTypedCommands;
use serde_json::Value;

use crate::conditional::drawing;
use crate::harness::s3::{BUCKET, Fault, Faulty};
use crate::harness::server::program;
use crate::harness::{
    Answer, Client, Held, Process, Proxy, RedisServer, S3, Server, etag, get, png, record, until,
};
use crate::variants::{encoded, picture};

const PNG: (&str, &str) = ("content-type", "image/png");

async fn server(redis: &RedisServer, s3_port: u16, more: &[(&str, &str)]) -> Server {
    let settings = S3::settings(s3_port);
    let mut all: Vec<_> = settings.iter().map(|(key, value)| (*key, value.as_str())).collect();
    all.extend_from_slice(more);
    Server::on(redis, &all).await.coherent().await
}

/// Settings with which objects are swept as soon as possible, since a write takes at most a second.
fn sweeping(interval: &'static str) -> [(&'static str, &'static str); 4] {
    [
        ("offload.sweep_interval", interval),
        ("offload.grace", "0s"),
        ("offload.timeout", "500ms"),
        ("redis.response_timeout", "500ms"),
    ]
}

async fn put(server: &Server, path: &str, bytes: &[u8]) -> Answer {
    server.send(Method::PUT, path, &[PNG], Bytes::copy_from_slice(bytes)).await
}

/// The record under an id.
async fn stored(redis: &RedisServer, id: &str) -> (String, Value) {
    let value = redis.connect().await.get(format!("image:{id}")).await.unwrap().unwrap();
    let json = serde_json::from_str(&value).unwrap();
    (value, json)
}

async fn is_moved(redis: &RedisServer, id: &str) -> bool {
    stored(redis, id).await.1.get("url").is_some()
}

#[tokio::test]
async fn a_written_image_goes_to_the_object_store_and_is_served_from_there() {
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let first = server(&redis, s3.port, &[]).await;
    let bytes = png(1, 100_000);
    let created = put(&first, "/images/a?ttl=1h", &bytes).await;
    assert_eq!(created.status, StatusCode::CREATED, "{created:?}");
    let (value, json) = stored(&redis, "a").await;
    assert_eq!(created.header("etag"), etag(value.as_bytes()));
    assert!(json.get("base64_data").is_none(), "{json}");
    assert_eq!(json["mime_type"], "image/png");
    let keys = s3.keys().await;
    let [key] = &keys[..] else { panic!("{keys:?}") };
    let version = key.strip_prefix("shown/a/").and_then(|it| it.strip_suffix(".png"));
    // The name has the version and an id of the upload.
    let named = version.and_then(|it| it.split_once('-'));
    assert!(named.is_some_and(|(it, upload)| (it.len(), upload.len()) == (32, 16)), "{key}");
    assert_eq!(json["object"], key.strip_prefix("shown/").unwrap());
    assert_eq!(json["url"], format!("s3://{BUCKET}/{key}"));
    let object = s3.get(key).await;
    assert_eq!(object.body, bytes);
    assert_eq!(object.header("content-type"), "image/png");
    assert_eq!(object.header("cache-control"), "public, max-age=31536000, immutable");

    // The server that wrote the image has it in memory; another one fetches it once for all clients.
    assert_eq!(first.get("/images/a").await.body, bytes);
    assert_eq!(first.metric("afterimage_offload_fetches_total").await, 0);
    let second = server(&redis, s3.port, &[]).await;
    let asking: Vec<_> = (0..50)
        .map(|_| {
            let address = second.address;
            tokio::spawn(async move { get(address, "/images/a", &[]).await })
        })
        .collect();
    for answer in asking {
        let answer = answer.await.unwrap();
        assert_eq!((&answer.body[..], answer.header("etag")), (&bytes[..], created.header("etag")));
    }
    assert_eq!(second.metric("afterimage_offload_fetches_total").await, 1);
    let mut client = Client::connect(second.address).await;
    let hit = client.get("/images/a", &[]).await;
    assert_eq!(hit.header("cache-status"), "afterimage; hit");
    assert_ne!(hit.header("last-modified"), "");
    let head = client.send(Method::HEAD, "/images/a", &[], Bytes::new()).await.unwrap();
    assert_eq!(head.header("content-length"), "100000");
    let known = client.get("/images/a", &[("if-none-match", created.header("etag"))]).await;
    assert_eq!(known.status, StatusCode::NOT_MODIFIED);
    let part = client.get("/images/a", &[("range", "bytes=0-3")]).await;
    assert_eq!((part.status.as_u16(), &part.body[..]), (206, &bytes[..4]));

    // A replaced image has a new object; a removed one has none.
    let newer = png(2, 1000);
    assert_eq!(put(&first, "/images/a", &newer).await.status, StatusCode::OK);
    until("the other server serves the new version", || async {
        second.get("/images/a").await.body == newer
    })
    .await;
    assert_eq!(s3.keys().await.len(), 2);
    let removed = second.send(Method::DELETE, "/images/a", &[], Bytes::new()).await;
    assert_eq!(removed.status, StatusCode::NO_CONTENT);
    until("the object of the removed image is gone", || async { s3.keys().await == keys }).await;
}

#[tokio::test]
async fn an_image_written_by_a_backend_is_offloaded_in_the_background() {
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let picture = encoded(&picture(1, 400, 200), ImageFormat::Png);
    let mut set = redis::cmd("SET");
    set.arg("image:before").arg(record(&picture)).arg("EX").arg(7200);
    set.exec_async(&mut redis.connect().await).await.unwrap();
    let server = server(&redis, s3.port, &[]).await;
    redis.set("after", &record(&picture)).await;
    redis.set("broken", b"{}").await;
    for id in ["before", "after"] {
        until("the image is offloaded", || is_moved(&redis, id)).await;
        let (value, json) = stored(&redis, id).await;
        // The backend's other fields are kept.
        assert_eq!(json["prompt"], "what stays when the light is gone");
        let answer = server.get(&format!("/images/{id}")).await;
        assert_eq!(answer.body, picture);
        assert_eq!(answer.header("etag"), etag(value.as_bytes()));
    }
    let mut ttl = redis::cmd("TTL");
    let left: i64 = ttl.arg("image:before").query_async(&mut redis.connect().await).await.unwrap();
    assert!((7000..=7200).contains(&left), "{left}");
    assert_eq!(s3.keys().await.len(), 2);
    until("both are counted", || async { server.metric("afterimage_offloaded_total").await == 2 })
        .await;
    server.get("/images/broken").await.problem(502, "corrupt-record");

    // Derived representations of an offloaded image work too.
    let other = self::server(&redis, s3.port, &[]).await;
    let thumbnail = other.get("/images/after/thumbnail").await;
    assert_eq!(thumbnail.header("content-type"), "image/webp");
    let info = other.get("/images/after/info").await;
    let info: Value = serde_json::from_slice(&info.body).unwrap();
    assert_eq!((&info["width"], &info["bytes"]), (&400.into(), &picture.len().into()));
    assert_eq!(other.get("/images/after.jpg?w=64").await.status, StatusCode::OK);
    assert_eq!(other.metric("afterimage_offload_fetches_total").await, 1);
}

#[tokio::test]
async fn originals_redirect_to_the_public_url_and_variants_are_served_directly() {
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let base = format!("http://127.0.0.1:{}/{BUCKET}/shown", s3.port);
    let redirecting = [("offload.public_url", base.as_str()), ("offload.serve", "redirect")];
    let writer = server(&redis, s3.port, &redirecting).await;
    let picture = encoded(&picture(1, 400, 200), ImageFormat::Png);
    let created = put(&writer, "/images/a~b:c", &picture).await;
    assert_eq!(created.status, StatusCode::CREATED, "{created:?}");
    let reader = server(&redis, s3.port, &redirecting).await;
    let mut client = Client::connect(reader.address).await;
    let path = "/images/a~b:c";
    let sent = client.get(path, &[]).await;
    assert_eq!((sent.status.as_u16(), &sent.body[..]), (307, &b""[..]));
    let location = sent.header("location").to_owned();
    assert!(location.starts_with(&format!("{base}/a~b:c/")), "{location}");
    assert_eq!(sent.header("cache-control"), "public, max-age=3600, immutable");
    assert_eq!(sent.header("vary"), "Accept-Encoding");
    let object = s3
        .get(location.strip_prefix(&format!("http://127.0.0.1:{}/{BUCKET}/", s3.port)).unwrap())
        .await;
    assert_eq!(object.body, picture);
    let again = client.get(path, &[]).await;
    assert_eq!(again.header("cache-status"), "afterimage; hit");
    // The redirect has the image's validators. `If-Match` is for what has bytes (RFC 9110 §13.2.1).
    let tag = created.header("etag").to_owned();
    assert_eq!(sent.header("etag"), tag);
    for (name, value, status) in
        [("if-none-match", &*tag, 304), ("if-none-match", "\"0\"", 307), ("if-match", "\"0\"", 307)]
    {
        for method in [Method::GET, Method::HEAD] {
            let answer = client.send(method, path, &[(name, value)], Bytes::new()).await.unwrap();
            assert_eq!(answer.status, status, "{name}: {value}");
            assert_eq!(answer.header("etag"), tag);
            assert_eq!(answer.header("cache-control"), "public, max-age=3600, immutable");
            assert_eq!(answer.header("location").is_empty(), status == 304);
        }
    }
    let head = client.send(Method::HEAD, path, &[], Bytes::new()).await.unwrap();
    assert_eq!((head.status.as_u16(), head.header("location")), (307, location.as_str()));
    // Not immutable, even for a versioned address: the object will be swept some day.
    let version = created.header("etag").trim_matches('"');
    let versioned = client.get(&format!("{path}?v={version}"), &[]).await;
    assert_eq!(versioned.header("cache-control"), "public, max-age=3600, immutable");
    let known = client.get(&format!("{path}?v={version}"), &[("if-none-match", &tag)]).await;
    assert_eq!(known.status, StatusCode::NOT_MODIFIED);
    assert_eq!(known.header("cache-control"), "public, max-age=3600, immutable");
    let outdated = client.get(&format!("{path}?v=0"), &[]).await;
    assert_eq!(outdated.header("cache-control"), "no-cache");
    assert_eq!(reader.metric("afterimage_offload_fetches_total").await, 0);

    for made in ["/thumbnail", ".webp", "?w=64", "/info"] {
        let answer = client.get(&format!("{path}{made}"), &[]).await;
        assert_eq!(answer.status, StatusCode::OK, "{made} {answer:?}");
    }
    assert_eq!(reader.metric("afterimage_offload_fetches_total").await, 1);
    // SVG is served directly, with a sandbox, which an object store doesn't set.
    redis.set("svg", &record(drawing().as_bytes())).await;
    until("the image is offloaded", || is_moved(&redis, "svg")).await;
    let svg = client.get("/images/svg", &[("accept-encoding", "gzip")]).await;
    assert_eq!((svg.status.as_u16(), svg.header("content-encoding")), (200, "gzip"));
    assert!(svg.header("content-security-policy").contains("sandbox"));
}

#[tokio::test]
async fn a_url_outside_the_configured_store_is_neither_fetched_nor_redirected_to() {
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let stranger = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = stranger.local_addr().unwrap().port();
    let base = "https://cdn.example/shown";
    for serve in ["stream", "redirect"] {
        let more = [("offload.public_url", base), ("offload.serve", serve)];
        let server = server(&redis, s3.port, &more).await;
        for url in [
            format!("http://127.0.0.1:{port}/a.png"),
            "s3://other/shown/a/0.png".to_owned(),
            format!("s3://{BUCKET}/shown/../secret/0.png"),
            format!("s3://{BUCKET}/shown/%2e%2e/secret.png"),
            format!("s3://{BUCKET}/shown/.swept/a/0.png"),
            format!("s3://{BUCKET}/shownother/a.png"),
            format!("s3://{BUCKET}/shown/"),
            format!("s3://{BUCKET}/shown/a?b"),
            format!("{base}.evil.example/a.png"),
            format!("{base}/a//b.png"),
            "/etc/passwd".to_owned(),
            String::new(),
        ] {
            let value = serde_json::json!({"url": url, "mime_type": "image/png"}).to_string();
            redis.set("a", value.as_bytes()).await;
            let tag = server.metric("afterimage_corrupt_records_total").await;
            until("it is refused", || async {
                let answer = server.get("/images/a").await;
                answer.status == StatusCode::BAD_GATEWAY
            })
            .await;
            let answer = server.get("/images/a").await;
            let problem = answer.problem(502, "corrupt-record");
            assert!(problem["detail"].as_str().unwrap().contains("[offload]"), "{url} {problem}");
            assert!(server.metric("afterimage_corrupt_records_total").await > tag);
        }
    }
    let asked = tokio::time::timeout(Duration::from_millis(200), stranger.accept()).await;
    assert!(asked.is_err(), "the foreign server got a connection");
    // Without an object store every such address is refused.
    let without = Server::on(&redis, &[]).await.coherent().await;
    let value = format!("{{\"url\": \"s3://{BUCKET}/shown/a/0.png\"}}");
    redis.set("b", value.as_bytes()).await;
    without.get("/images/b").await.problem(502, "corrupt-record");
}

#[tokio::test]
async fn an_object_store_outage_loses_nothing_and_serves_no_wrong_image() {
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let proxy = Proxy::to(s3.port).await;
    let port = proxy.address.port();
    let more = [("offload.timeout", "500ms")];
    let server = server(&redis, port, &more).await;
    let (before, during) = (png(1, 50_000), png(2, 50_000));
    put(&server, "/images/before", &before).await;
    let fresh = self::server(&redis, port, &more).await;

    proxy.hold(Held::All);
    // Images in memory are served, other offloaded ones are 502, and new images stay in Redis.
    assert_eq!(server.get("/images/before").await.body, before);
    let answer = fresh.get("/images/before").await;
    answer.problem(502, "origin-failed");
    assert_eq!(answer.header("cache-control"), "no-store");
    let created = put(&server, "/images/during", &during).await;
    assert_eq!(created.status, StatusCode::CREATED);
    assert!(!is_moved(&redis, "during").await);
    assert_eq!(fresh.get("/images/during").await.body, during);
    let newer = png(3, 50_000);
    redis.set("during", &record(&newer)).await;
    until("the newer one is served", || async { fresh.get("/images/during").await.body == newer })
        .await;

    proxy.hold(Held::None);
    until("the image is offloaded", || is_moved(&redis, "during")).await;
    until("all images are served", || async {
        fresh.get("/images/before").await.body == before
            && fresh.get("/images/during").await.body == newer
    })
    .await;
    assert!(server.metric("afterimage_offload_errors_total").await > 0);
    let third = self::server(&redis, s3.port, &more).await;
    assert_eq!(third.get("/images/during").await.body, newer);
}

#[tokio::test]
async fn images_that_cannot_be_moved_delay_no_others() {
    for fault in [Fault::Refused, Fault::Hangs] {
        let (redis, s3) = (RedisServer::start().await, S3::start().await);
        let s3 = Faulty::before(&s3, move |_, target| target.contains("/bad").then_some(fault));
        let s3 = s3.await;
        let server = server(&redis, s3.port, &[("offload.timeout", "1s")]).await;
        // As many as are moved at the same time, and each is tried twice.
        for number in 0..4 {
            redis.set(&format!("bad{number}"), &record(&png(number, 1000))).await;
        }
        until("none of them can be moved", || async {
            server.metric("afterimage_offload_errors_total").await >= 8
        })
        .await;
        let began = Instant::now();
        for number in 0..60 {
            redis.set(&format!("good{number}"), &record(&png(number, 1000))).await;
        }
        until("all others are moved", || async {
            server.metric("afterimage_offloaded_total").await == 60
        })
        .await;
        println!("{fault:?}: 60 images were moved in {:?}", began.elapsed());
        // And the object store isn't thought to be away because of some images.
        let bytes = png(1, 1000);
        let created = put(&server, "/images/c", &bytes).await;
        assert_eq!(created.status, StatusCode::CREATED);
        until("a written one is moved", || is_moved(&redis, "c")).await;
    }
}

#[tokio::test]
async fn nobody_waits_for_an_object_store_that_is_known_to_be_away() {
    // A fraction of the default time-out of 30 seconds, and plenty for a slow machine.
    const SOON: Duration = Duration::from_secs(4);
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let proxy = Proxy::to(s3.port).await;
    let port = proxy.address.port();
    let writer = server(&redis, port, &[]).await;
    let bytes = png(1, 50_000);
    for id in ["a", "b", "c"] {
        put(&writer, &format!("/images/{id}"), &bytes).await;
    }
    assert_eq!(s3.keys().await.len(), 3);
    let server = self::server(&redis, port, &[]).await;
    assert_eq!(ready(server.address).await["object_store"], Value::Null);

    proxy.hold(Held::All);
    // A reader finds out, sooner than a writer would, who waits at the same time and is told.
    let began = Instant::now();
    let during = png(2, 50_000);
    let (read, written) =
        tokio::join!(server.get("/images/a"), put(&server, "/images/during", &during));
    println!("the first read and the first write took {:?}", began.elapsed());
    assert!(began.elapsed() < Duration::from_secs(15));
    read.problem(502, "origin-failed");
    assert!(read.header("retry-after").parse::<u64>().unwrap() >= 1, "{read:?}");
    assert_eq!(written.status, StatusCode::CREATED);

    // Everybody else is answered at once.
    let began = Instant::now();
    server.get("/images/b").await.problem(502, "origin-failed");
    assert_eq!(put(&server, "/images/later", &during).await.status, StatusCode::CREATED);
    let removed = server.send(Method::DELETE, "/images/c", &[], Bytes::new()).await;
    assert_eq!(removed.status, StatusCode::NO_CONTENT);
    println!("another read, another write and a removal took {:?}", began.elapsed());
    assert!(began.elapsed() < SOON);
    let reason = ready(server.address).await["object_store"].as_str().unwrap().to_owned();
    assert!(reason.contains("didn't answer within 5s"), "{reason}");

    proxy.hold(Held::None);
    for id in ["during", "later"] {
        until("the image is moved", || is_moved(&redis, id)).await;
    }
    until("the image is read", || async { server.get("/images/a").await.body == bytes }).await;
    until("the object of the removed image is gone", || async {
        !s3.keys().await.iter().any(|key| key.starts_with("shown/c/"))
    })
    .await;
    assert_eq!(ready(server.address).await["object_store"], Value::Null);
}

#[tokio::test]
async fn no_writer_waits_again_for_an_object_store_that_answers_and_takes_nothing() {
    const TIMEOUT: Duration = Duration::from_secs(3);
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let hangs = Arc::new(AtomicBool::new(true));
    let s3 = Faulty::before(&s3, {
        let hangs = Arc::clone(&hangs);
        move |method, _| {
            (method == Method::PUT && hangs.load(Ordering::Relaxed)).then_some(Fault::Hangs)
        }
    });
    let s3 = s3.await;
    let server = server(&redis, s3.port, &[("offload.timeout", "3s")]).await;
    put(&server, "/images/first", &png(0, 1000)).await;
    let began = Instant::now();
    for number in 0..5 {
        let created = put(&server, &format!("/images/{number}"), &png(number, 1000)).await;
        assert_eq!(created.status, StatusCode::CREATED);
    }
    println!("five writes took {:?}", began.elapsed());
    assert!(began.elapsed() < TIMEOUT);
    hangs.store(false, Ordering::Relaxed);
    until("all are moved", || async { server.metric("afterimage_offloaded_total").await == 6 })
        .await;
}

/// The body of `/readyz`.
async fn ready(address: std::net::SocketAddr) -> Value {
    let ready = get(address, "/readyz", &[]).await;
    assert_eq!(ready.status, StatusCode::OK);
    serde_json::from_slice(&ready.body).unwrap()
}

#[tokio::test]
async fn wrong_credentials_and_a_missing_bucket_show_in_readyz_and_in_one_line_at_the_start() {
    const SECRET: &str = "secret-that-nobody-may-read";
    let s3 = S3::start().await;
    for (bucket, are_checked, says) in [
        (BUCKET, true, "the credentials are refused (403 Forbidden, InvalidAccessKeyId)"),
        ("missing", false, "there is no such bucket (404 Not Found, NoSuchBucket)"),
    ] {
        s3.check_credentials(are_checked).await;
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut command = program();
        for (key, value) in S3::settings(s3.port) {
            let value =
                value.replace("secret_access_key=b", &format!("secret_access_key={SECRET}"));
            let value = value.replace(&format!("s3://{BUCKET}"), &format!("s3://{bucket}"));
            command.arg(format!("--{}", key.replace(['.', '_'], "-"))).arg(value);
        }
        let redis = RedisServer::start().await;
        command.arg("--redis-url").arg(redis.url());
        command.stderr(std::fs::File::create(&log).unwrap());
        let process = Process::start(command);
        until("it shows", || async {
            let ready = ready(process.address).await;
            ready["object_store"].as_str().is_some_and(|reason| reason.starts_with(says))
        })
        .await;
        // An image is written all the same.
        let mut client = Client::connect(process.address).await;
        let bytes = Bytes::from(png(1, 1000));
        let created = client.send(Method::PUT, "/images/a", &[PNG], bytes).await.unwrap();
        assert_eq!(created.status, StatusCode::CREATED);
        // Once it is put right, the image is moved.
        s3.check_credentials(false).await;
        if bucket != BUCKET {
            s3.make_bucket(bucket).await;
        }
        until("the object store can be used", || async {
            ready(process.address).await["object_store"] == Value::Null
        })
        .await;
        until("the image is moved", || is_moved(&redis, "a")).await;
        let text = || std::fs::read_to_string(&log).unwrap();
        until("that is logged", || async { text().contains("can be used again") }).await;
        let text = text();
        let warnings: Vec<_> = text.lines().filter(|line| line.contains("WARN")).collect();
        let [line] = &warnings[..] else { panic!("{text}") };
        assert!(line.contains(says) && line.contains(&format!("s3://{bucket}/shown")), "{line}");
        assert!(!text.contains(SECRET), "{text}");
    }
}

#[tokio::test]
async fn a_cold_head_of_an_offloaded_image_fetches_nothing() {
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let writer = server(&redis, s3.port, &[]).await;
    let bytes = png(1, 100_000);
    let created = put(&writer, "/images/a", &bytes).await;
    let tag = created.header("etag");
    let server = self::server(&redis, s3.port, &[]).await;
    let mut client = Client::connect(server.address).await;
    let head = client.send(Method::HEAD, "/images/a", &[], Bytes::new()).await.unwrap();
    assert_eq!((head.status, head.header("content-length")), (StatusCode::OK, "100000"));
    for (name, value, status) in [
        ("if-none-match", tag, 304),
        ("if-match", "\"0\"", 412),
        ("if-modified-since", head.header("last-modified"), 304),
    ] {
        let answer = client.get("/images/a", &[(name, value)]).await;
        assert_eq!((answer.status.as_u16(), answer.header("etag")), (status, tag), "{name}");
    }
    assert_eq!(server.metric("afterimage_offload_fetches_total").await, 0);
    let body = client.get("/images/a", &[]).await;
    assert_eq!(body.body, bytes);
    for name in ["etag", "last-modified", "content-type", "content-length", "cache-control"] {
        assert_eq!(head.header(name), body.header(name), "{name}");
        assert_ne!(head.header(name), "", "{name}");
    }
    // Only the bytes tell the rest: a drawing is sent compressed, and other programs' records say less.
    redis.set("svg", &record(drawing().as_bytes())).await;
    until("the image is offloaded", || is_moved(&redis, "svg")).await;
    let (_, json) = stored(&redis, "a").await;
    redis.set("b", serde_json::json!({"url": json["url"]}).to_string().as_bytes()).await;
    let other = self::server(&redis, s3.port, &[]).await;
    for (id, coding, fetches) in [("svg", "br", 1), ("b", "", 2)] {
        let path = format!("/images/{id}");
        let accepts = [("accept-encoding", "br")];
        let address = other.address;
        let mut client = Client::connect(address).await;
        let head = client.send(Method::HEAD, &path, &accepts, Bytes::new()).await.unwrap();
        assert_eq!((head.status, head.header("content-encoding")), (StatusCode::OK, coding));
        assert_eq!(other.metric("afterimage_offload_fetches_total").await, fetches);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_during_the_offload_of_the_previous_version_wins() {
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let server = server(&redis, s3.port, &[]).await;
    let mut backend = redis.connect().await;
    let mut last = Vec::new();
    for round in 0..300_u64 {
        last = png(round, 2000);
        backend.set("image:a", record(&last)).await.unwrap();
        // The pause is the race's subject: about as long as an offload takes.
        tokio::time::sleep(Duration::from_micros(round * 997 % 25_000)).await;
        let now = server.get("/images/a").await;
        assert_eq!(now.body, last, "round {round}");
    }
    until("the last one is moved", || is_moved(&redis, "a")).await;
    assert_eq!(server.get("/images/a").await.body, last);
    let fresh = self::server(&redis, s3.port, &[]).await;
    assert_eq!(fresh.get("/images/a").await.body, last);
    let moved = server.metric("afterimage_offloaded_total").await;
    println!(
        "{moved} of 300 were offloaded before they were replaced, {} objects",
        s3.keys().await.len()
    );
    assert!((1..300).contains(&moved), "{moved} of 300 were offloaded in time: nothing raced");
}

#[tokio::test]
async fn an_object_that_does_not_match_its_record_is_not_served() {
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let writer = server(&redis, s3.port, &[]).await;
    let bytes = png(1, 5000);
    put(&writer, "/images/a", &bytes).await;
    let key = s3.keys().await.remove(0);
    let server = server(&redis, s3.port, &[("records.max_value", "64KiB")]).await;
    for (damaged, status) in [(png(2, 5000), 502), (png(1, 4999), 502), (png(1, 70_000), 502)] {
        s3.send(Method::PUT, &key, &damaged).await;
        server.get("/images/a").await.problem(status, "origin-failed");
    }
    // No length is told of it that its bytes don't have.
    let head = server.send(Method::HEAD, "/images/a", &[], Bytes::new()).await;
    assert_eq!(head.status, 502);
    s3.send(Method::DELETE, &key, b"").await;
    server.get("/images/a").await.problem(502, "origin-failed");
    s3.send(Method::PUT, &key, &bytes).await;
    assert_eq!(server.get("/images/a").await.body, bytes);
    let head = server.send(Method::HEAD, "/images/a", &[], Bytes::new()).await;
    assert_eq!((head.status.as_u16(), head.header("content-length")), (200, "5000"));
    // A record whose length is wrong.
    let (_, json) = stored(&redis, "a").await;
    let mut json = json;
    json["size_bytes"] = 4000.into();
    redis.set("a", json.to_string().as_bytes()).await;
    let fresh = self::server(&redis, s3.port, &[]).await;
    fresh.get("/images/a").await.problem(502, "origin-failed");
    assert_eq!(fresh.send(Method::HEAD, "/images/a", &[], Bytes::new()).await.status, 502);
    // A record by another program may lack type, length and version, as long as the object is an image.
    let value = format!("{{\"url\": \"s3://{BUCKET}/{key}\"}}");
    redis.set("b", value.as_bytes()).await;
    let other = server.get("/images/b").await;
    assert_eq!((&other.body[..], other.header("content-type")), (&bytes[..], "image/png"));
    s3.send(Method::PUT, "shown/c/0.png", b"no image").await;
    let value = format!("{{\"url\": \"s3://{BUCKET}/shown/c/0.png\"}}");
    redis.set("c", value.as_bytes()).await;
    server.get("/images/c").await.problem(502, "origin-failed");
}

#[tokio::test]
async fn objects_without_a_record_are_swept_and_others_stay() {
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let sweeping = sweeping("300ms");
    let server = server(&redis, s3.port, &sweeping).await;
    let keep = png(1, 1000);
    put(&server, "/images/keep", &keep).await;
    // Objects of a replaced image, of an expired one, and of an unfinished offload.
    put(&server, "/images/keep2", &png(2, 1000)).await;
    put(&server, "/images/keep2", &png(3, 1000)).await;
    put(&server, "/images/gone?ttl=200ms", &png(4, 1000)).await;
    let name = "0123456789abcdef0123456789abcdef-0123456789abcdef.png";
    s3.send(Method::PUT, &format!("shown/lost/{name}"), &png(5, 1000)).await;
    // Objects with other names belong to other programs.
    let others = [
        "elsewhere/a/1.png".to_owned(),
        "shown/README".to_owned(),
        "shown/assets/0123456789abcdef0123456789abcdef.png".to_owned(),
        "shown/assets/app.js".to_owned(),
        format!("shown/assets/deeper/{name}"),
    ];
    for key in &others {
        s3.send(Method::PUT, key, b"of somebody else").await;
    }
    until("only referenced objects are left", || async {
        let (own, foreign): (Vec<_>, Vec<_>) =
            s3.keys().await.into_iter().partition(|key| !others.contains(key));
        let beginnings = ["shown/keep/", "shown/keep2/"];
        assert_eq!(foreign.len(), others.len(), "{foreign:?}");
        own.len() == 2 && own.iter().zip(beginnings).all(|(key, it)| key.starts_with(it))
    })
    .await;
    assert_eq!(server.get("/images/keep").await.body, keep);
    assert_eq!(server.get("/images/keep2").await.body, png(3, 1000));
}

#[tokio::test]
async fn a_referenced_object_is_kept_after_the_public_url_changed() {
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let sweeping = sweeping("100ms");
    let bytes = encoded(&picture(1, 96, 64), ImageFormat::Png);
    {
        let more = [("offload.public_url", "https://one.example/shown")];
        let server = server(&redis, s3.port, &more).await;
        put(&server, "/images/a", &bytes).await;
        let (_, json) = stored(&redis, "a").await;
        assert!(json["url"].as_str().unwrap().starts_with("https://one.example/shown/a/"));
        // A record by another program, with nothing but a former public address.
        let url = format!("https://two.example/shown/{}", json["object"].as_str().unwrap());
        let value = serde_json::json!({"url": url}).to_string();
        redis.set("b", value.as_bytes()).await;
    }
    let key = s3.keys().await.remove(0);
    s3.send(Method::PUT, &key.replace("/a/", "/b/"), &bytes).await;
    let more =
        [("offload.public_url", "https://three.example/shown"), ("offload.serve", "redirect")];
    let more: Vec<_> = more.into_iter().chain(sweeping).collect();
    let server = server(&redis, s3.port, &more).await;
    // The record names the object itself, so a changed public address doesn't matter.
    let sent = server.get("/images/a").await;
    assert!(sent.header("location").starts_with("https://three.example/shown/a/"), "{sent:?}");
    assert_eq!(server.get("/images/a/thumbnail").await.status, StatusCode::OK);
    put(&server, "/images/c?ttl=100ms", &bytes).await;
    until("a sweep has removed an object", || async {
        server.metric("afterimage_swept_total").await > 0
    })
    .await;
    assert_eq!(s3.keys().await.len(), 2);
}

#[tokio::test]
async fn deleting_a_copied_record_keeps_the_object_of_the_original() {
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let server = server(&redis, s3.port, &[]).await;
    let bytes = png(1, 1000);
    put(&server, "/images/a", &bytes).await;
    let mut copy = redis::cmd("COPY");
    copy.arg("image:a").arg("image:b").exec_async(&mut redis.connect().await).await.unwrap();
    until("it is there", || async { server.get("/images/b").await.body == bytes }).await;
    let removed = server.send(Method::DELETE, "/images/b", &[], Bytes::new()).await;
    assert_eq!(removed.status, StatusCode::NO_CONTENT);
    let fresh = self::server(&redis, s3.port, &[]).await;
    assert_eq!(fresh.get("/images/a").await.body, bytes);
}

#[tokio::test]
async fn a_copied_or_renamed_record_keeps_its_object() {
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let server = server(&redis, s3.port, &sweeping("100ms")).await;
    let mut connection = redis.connect().await;
    // The original is deleted, replaced, deleted by a backend, and renamed.
    for (number, id) in ["deleted", "replaced", "removed", "renamed"].into_iter().enumerate() {
        put(&server, &format!("/images/{id}"), &png(number as u64, 1000)).await;
        let (from, to) = (format!("image:{id}"), format!("image:copy-of-{id}"));
        let command = if id == "renamed" { "RENAME" } else { "COPY" };
        redis::cmd(command).arg(from).arg(to).exec_async(&mut connection).await.unwrap();
    }
    let delete = async |id: &str| {
        let path = format!("/images/{id}");
        let removed = server.send(Method::DELETE, &path, &[], Bytes::new()).await;
        assert_eq!(removed.status, StatusCode::NO_CONTENT);
    };
    delete("deleted").await;
    put(&server, "/images/replaced", &png(9, 1000)).await;
    connection.del("image:removed").await.unwrap();
    // Behind them an object is swept, and one is removed because its image was deleted.
    put(&server, "/images/swept?ttl=1ms", &png(10, 1000)).await;
    put(&server, "/images/last", &png(11, 1000)).await;
    delete("last").await;
    until("both are gone", || async {
        let keys = s3.keys().await;
        !keys.iter().any(|it| it.starts_with("shown/swept/") || it.starts_with("shown/last/"))
    })
    .await;
    let fresh = self::server(&redis, s3.port, &[]).await;
    for (number, id) in ["deleted", "replaced", "removed", "renamed"].into_iter().enumerate() {
        let copy = fresh.get(&format!("/images/copy-of-{id}")).await;
        assert_eq!(copy.body, png(number as u64, 1000), "{id}");
    }
    assert_eq!(s3.keys().await.len(), 5);
    // An object goes with the last record that refers to it.
    delete("copy-of-deleted").await;
    until("the object is gone", || async {
        !s3.keys().await.iter().any(|it| it.starts_with("shown/deleted/"))
    })
    .await;
}

#[tokio::test]
async fn a_sweep_that_would_remove_most_objects_removes_none() {
    let (redis, other, s3) =
        (RedisServer::start().await, RedisServer::start().await, S3::start().await);
    let settings = sweeping("100ms");
    let server = server(&redis, s3.port, &settings).await;
    for number in 0..10 {
        put(&server, &format!("/images/{number}"), &png(number, 1000)).await;
    }
    put(&server, "/images/swept?ttl=1ms", &png(10, 1000)).await;
    until("an object is swept, so that the others are old enough", || async {
        server.metric("afterimage_swept_total").await == 1
    })
    .await;
    // Another server has the same folder with the wrong database.
    let listings = Arc::new(AtomicU32::new(0));
    let counting = Faulty::before(&s3, {
        let listings = Arc::clone(&listings);
        move |_, target| {
            listings.fetch_add(u32::from(target.contains("list-type")), Ordering::Relaxed);
            None
        }
    });
    let counting = counting.await;
    let _wrong = self::server(&other, counting.port, &settings).await;
    let before = listings.load(Ordering::Relaxed);
    until("the other server has swept since", || async {
        listings.load(Ordering::Relaxed) >= before + 3
    })
    .await;
    assert_eq!(s3.keys().await.len(), 10);
    // An emptied database is the same.
    redis::cmd("FLUSHALL").exec_async(&mut redis.connect().await).await.unwrap();
    let before = listings.load(Ordering::Relaxed);
    until("both servers have swept since", || async {
        listings.load(Ordering::Relaxed) >= before + 10
    })
    .await;
    assert_eq!(s3.keys().await.len(), 10);
}

#[tokio::test]
async fn a_record_that_would_exceed_the_limit_is_not_offloaded() {
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let server = server(&redis, s3.port, &[("records.max_value", "1KiB")]).await;
    let bytes = png(1, 100);
    let long = serde_json::json!({
        "base64_data": serde_json::from_slice::<Value>(&record(&bytes)).unwrap()["base64_data"],
        "prompt": "x".repeat(820),
    });
    let long = long.to_string();
    assert!(long.len() <= 1024);
    let json = [("content-type", "application/json")];
    for id in ["a", "b"] {
        if id == "a" {
            let path = "/images/a";
            let created = server.send(Method::PUT, path, &json, long.clone().into()).await;
            assert_eq!(created.status, StatusCode::CREATED);
        } else {
            redis.set(id, long.as_bytes()).await;
        }
        // Behind it something is moved.
        put(&server, &format!("/images/{id}2"), &bytes).await;
        assert_eq!(server.get(&format!("/images/{id}")).await.body, bytes);
        assert!(!is_moved(&redis, id).await);
    }
}

#[tokio::test]
async fn an_unreadable_record_can_be_deleted_and_replaced() {
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let server = server(&redis, s3.port, &[("records.max_value", "4KiB")]).await;
    let bytes = png(1, 1000);
    for list in [false, true] {
        let mut connection = redis.connect().await;
        if list {
            connection.rpush("image:a", "x").await.unwrap();
        } else {
            connection.set("image:a", vec![b'x'; 5000]).await.unwrap();
        }
        let matching = [PNG, ("if-match", "\"0123\"")];
        let answer = server.send(Method::PUT, "/images/a", &matching, bytes.clone().into()).await;
        answer.problem(412, "precondition-failed");
        let removed = server.send(Method::DELETE, "/images/a", &[], Bytes::new()).await;
        assert_eq!(removed.status, StatusCode::NO_CONTENT, "{removed:?}");
        assert_eq!(put(&server, "/images/a", &bytes).await.status, StatusCode::CREATED);
        server.send(Method::DELETE, "/images/a", &[], Bytes::new()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rewrite_during_the_sweep_of_its_object_never_loses_the_image() {
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let sweeping = sweeping("5ms");
    let server = server(&redis, s3.port, &sweeping).await;
    // Without others the sweep would refuse to remove all that there is.
    for number in 0..20 {
        put(&server, &format!("/images/other{number}"), &png(number, 1000)).await;
    }
    let bytes = png(1, 1000);
    let value = record(&bytes);
    let json = [("content-type", "application/json")];
    // The same record, and so the same object, is written and removed again and again.
    for round in 0..200 {
        let created = server.send(Method::PUT, "/images/a", &json, value.clone().into()).await;
        assert!(created.status.is_success(), "{created:?}");
        redis.connect().await.del("image:a").await.unwrap();
        // The pause moves the second write through the sweep, round by round.
        tokio::time::sleep(Duration::from_millis(round % 20)).await;
        let created = server.send(Method::PUT, "/images/a", &json, value.clone().into()).await;
        assert!(created.status.is_success(), "{created:?}");
        let (_, stored) = stored(&redis, "a").await;
        if let Some(object) = stored["object"].as_str() {
            let object = s3.get(&format!("shown/{object}")).await;
            assert_eq!(object.body, bytes, "round {round}");
        }
        redis.connect().await.del("image:a").await.unwrap();
    }
    println!("{} objects were swept meanwhile", server.metric("afterimage_swept_total").await);
    until("objects are swept", || async { server.metric("afterimage_swept_total").await > 0 })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_acknowledged_image_is_lost_by_kill_9_at_random_points() {
    let kills = std::env::var("AFTERIMAGE_TEST_KILLS").ok();
    let kills: u64 = kills.map_or(100, |it| it.parse().expect("a number of kills"));
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let mut settings = S3::settings(s3.port);
    settings.push(("redis.url", redis.url()));
    settings.push(("offload.sweep_interval", "100ms".into()));
    settings.push(("offload.grace", "0s".into()));
    settings.push(("offload.timeout", "2s".into()));
    settings.push(("log.filter", "error".into()));
    let start = || {
        let mut command = program();
        for (key, value) in &settings {
            command.arg(format!("--{}", key.replace(['.', '_'], "-"))).arg(value);
        }
        Process::start(command)
    };
    let mut acknowledged: HashMap<String, Vec<u8>> = HashMap::new();
    let mut chance = fastrand::Rng::with_seed(9);
    let mut cut = 0_u64;
    // On a busy machine a write takes longer; killed as soon as elsewhere, the process would acknowledge few.
    let mut process = start();
    let mut client = Client::connect(process.address).await;
    let began = Instant::now();
    let timed = client.send(Method::PUT, "/images/timed", &[PNG], png(0, 20_000).into()).await;
    assert_eq!(timed.unwrap().status, StatusCode::CREATED);
    process.kill();
    let most = Duration::from_millis(60).max(4 * began.elapsed());
    for cycle in 0..kills {
        let mut process = start();
        // Writes over HTTP, and by a backend whose records are offloaded.
        let writing: Vec<_> = (0..3)
            .map(|number| {
                let (address, seed) = (process.address, 10 * cycle + number);
                tokio::spawn(async move {
                    let stream = tokio::net::TcpStream::connect(address).await.ok()?;
                    let mut client =
                        Client::over(crate::harness::Protocol::Http1, stream, "localhost").await;
                    let (path, bytes) = (format!("/images/h{seed}"), png(seed, 20_000));
                    let answer =
                        client.send(Method::PUT, &path, &[PNG], bytes.clone().into()).await;
                    answer
                        .is_ok_and(|it| it.status.is_success())
                        .then(|| (format!("h{seed}"), bytes))
                })
            })
            .collect();
        let (id, bytes) = (format!("b{cycle}"), png(cycle, 20_000));
        redis.set(&id, &record(&bytes)).await;
        acknowledged.insert(id, bytes);
        // The process is killed at a random moment.
        tokio::time::sleep(most.mul_f64(chance.f64())).await;
        process.kill();
        for written in writing {
            match written.await.unwrap() {
                Some((id, bytes)) => drop(acknowledged.insert(id, bytes)),
                None => cut += 1,
            }
        }
    }
    let process = start();
    let mut client = Client::connect(process.address).await;
    for (id, bytes) in &acknowledged {
        let answer = client.get(&format!("/images/{id}"), &[]).await;
        assert_eq!(answer.status, StatusCode::OK, "{id}: {answer:?}");
        assert_eq!(answer.body, bytes, "{id}");
    }
    println!("{} images acknowledged, {cut} writes cut off", acknowledged.len());
    assert!(
        cut > kills / 10 && acknowledged.len() as u64 > kills * 5 / 4,
        "{cut} cut off, {} acknowledged",
        acknowledged.len()
    );
    // Interrupted offloads are finished.
    until("every record is offloaded", || async {
        for id in acknowledged.keys() {
            if !is_moved(&redis, id).await {
                return false;
            }
        }
        true
    })
    .await;
    // Sweeping takes several requests to moto for each object, so the deadline is longer than `PATIENCE`.
    let began = Instant::now();
    let mut connection = redis.connect().await;
    loop {
        let mut over = Vec::new();
        for key in s3.keys().await {
            let id = key.split('/').nth(1).unwrap();
            let value = connection.get(format!("image:{id}")).await.unwrap();
            if !value.is_some_and(|value| value.contains(&key)) {
                over.push(key);
            }
        }
        if over.is_empty() {
            break;
        }
        let left = over.len();
        assert!(
            began.elapsed() < Duration::from_mins(3),
            "{left} unreferenced objects are left: {over:?}"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    println!("no unreferenced object is left after {:?}", began.elapsed());
}

#[tokio::test]
async fn images_can_be_offloaded_to_a_folder() {
    let (redis, folder) = (RedisServer::start().await, tempfile::tempdir().unwrap());
    let url = format!("file://{}", folder.path().join("shown").display());
    let server = Server::on(&redis, &[("offload.url", &url)]).await.coherent().await;
    let bytes = png(1, 5000);
    let created = put(&server, "/images/a", &bytes).await;
    assert_eq!(created.status, StatusCode::CREATED, "{created:?}");
    let (_, json) = stored(&redis, "a").await;
    let path = json["url"].as_str().unwrap().strip_prefix("file://").unwrap().to_owned();
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
    let other = Server::on(&redis, &[("offload.url", &url)]).await.coherent().await;
    assert_eq!(other.get("/images/a").await.body, bytes);
    // An address outside the folder is refused.
    redis.set("b", br#"{"url": "file:///etc/passwd"}"#).await;
    other.get("/images/b").await.problem(502, "corrupt-record");
}

#[tokio::test]
async fn images_of_the_embedded_store_are_offloaded_too() {
    let (dir, folder) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let url = format!("file://{}", folder.path().display());
    let start = |offload: bool| {
        let mut settings = vec![("embedded.dir", dir.path().to_str().unwrap())];
        if offload {
            settings.push(("offload.url", &url));
        }
        let settings: Vec<(String, String)> =
            settings.into_iter().map(|(key, it)| (key.into(), it.into())).collect();
        async move {
            let settings: Vec<_> = settings.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
            Server::start(&settings).await
        }
    };
    let bytes = png(1, 5000);
    let server = start(false).await;
    put(&server, "/images/a", &bytes).await;
    server.stop().await;
    let server = start(true).await;
    until("the image is offloaded", || async {
        server.metric("afterimage_offloaded_total").await == 1
    })
    .await;
    assert_eq!(server.get("/images/a").await.body, bytes);
    assert!(folder.path().join("a").is_dir());
}

#[test]
fn a_misconfigured_object_store_stops_the_start() {
    let dir = tempfile::tempdir().unwrap();
    for (arguments, says) in [
        (vec!["--offload-url", "ftp://a/b"], "expected s3://, gs://, az:// or file:///"),
        (vec!["--offload-url", "nowhere"], "[offload] url"),
        (vec!["--offload-url", "s3://a/b?c"], "[offload] url"),
        (vec!["--offload-url", "s3://a/b", "--offload-serve", "redirect"], "public_url"),
        (
            vec!["--offload-url", "s3://a/b", "--offload-options", "[\"sped=5\"]"],
            "has no option `sped`",
        ),
        (vec!["--offload-options", "[\"sped\"]"], "a name and a value"),
        (vec!["--offload-serve", "sideways"], "unknown variant `sideways`"),
    ] {
        let output =
            program().args(&arguments).arg("--embedded-dir").arg(dir.path()).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && message.contains(says), "{arguments:?}: {message}");
    }
}
