//! Writes over HTTP: records, authorisation, preconditions and limits.

use std::fmt::Write;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hyper::{Method, StatusCode};
use image::ImageFormat;
use redis::AsyncTypedCommands;
use serde_json::json;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::conditional::drawing;
use crate::harness::server::program;
use crate::harness::{
    Answer, Client, Process, Protocol, RedisServer, Server, etag, png, record, until,
};
use crate::strangers::connect_from;
use crate::variants::{encoded, picture};

long_tests! {
    #[tokio::test(flavor = "multi_thread")] of_two_writers_with_the_same_etag_exactly_one_wins_in_redis
    #[tokio::test(flavor = "multi_thread")] of_two_writers_with_the_same_etag_exactly_one_wins_in_the_embedded_store
    #[tokio::test(flavor = "multi_thread")] a_conditional_write_never_overwrites_a_concurrent_backend_write
}

const TOKEN: &str = "a-token-of-some-length";
const BEARER: (&str, &str) = ("authorization", "Bearer a-token-of-some-length");
const TOKENS: (&str, &str) = ("writes.tokens", r#"["another-one-1234", "a-token-of-some-length"]"#);
const PNG: (&str, &str) = ("content-type", "image/png");
const JSON: (&str, &str) = ("content-type", "application/json");

async fn put(server: &Server, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
    server.send(Method::PUT, path, headers, Bytes::copy_from_slice(body)).await
}

async fn delete(server: &Server, path: &str, headers: &[(&str, &str)]) -> Answer {
    server.send(Method::DELETE, path, headers, Bytes::new()).await
}

#[tokio::test]
async fn an_image_is_served_as_it_was_put_with_the_etag_of_the_put_response() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let picture = picture(1, 40, 20);
    let (png, jpeg) = (encoded(&picture, ImageFormat::Png), encoded(&picture, ImageFormat::Jpeg));
    let (gif, svg) = (encoded(&picture, ImageFormat::Gif), drawing().into_bytes());
    for (content_type, bytes, served) in [
        (Some("image/png"), &png, "image/png"),
        (Some("IMAGE/JPG"), &jpeg, "image/jpeg"),
        (Some("image/gif; a=b"), &gif, "image/gif"),
        (Some("image/svg+xml;charset=utf-8"), &svg, "image/svg+xml"),
        // Without a specific type, as from curl, the type is sniffed from the bytes.
        (None, &png, "image/png"),
        (Some("application/octet-stream"), &jpeg, "image/jpeg"),
    ] {
        let headers: Vec<_> = content_type.iter().map(|it| ("content-type", *it)).collect();
        let created = put(&server, "/images/a", &headers, bytes).await;
        assert_eq!(created.status, StatusCode::CREATED, "{content_type:?} {created:?}");
        let answer = server.get("/images/a").await;
        assert_eq!(&answer.body[..], &bytes[..]);
        assert_eq!(answer.header("content-type"), served);
        assert_eq!(answer.header("etag"), created.header("etag"));
        assert_ne!(answer.header("last-modified"), "");
        // The record has the same form as a backend's.
        let value = redis.connect().await.get("image:a").await.unwrap().unwrap();
        assert_eq!(created.header("etag"), etag(value.as_bytes()));
        let value: serde_json::Value = serde_json::from_str(&value).unwrap();
        assert_eq!(value["mime_type"], served);
        assert_eq!(STANDARD.decode(value["base64_data"].as_str().unwrap()).unwrap(), **bytes);
        let replaced = put(&server, "/images/a", &headers, bytes).await;
        for (answer, status) in [(&created, StatusCode::CREATED), (&replaced, StatusCode::OK)] {
            assert_eq!(answer.status, status);
            assert_eq!(answer.header("location"), "/images/a");
            assert_eq!(answer.header("cache-control"), "no-store");
            let told: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
            let version = answer.header("etag").trim_matches('"');
            let expected = json!({
                "id": "a",
                "type": served,
                "bytes": bytes.len(),
                "etag": answer.header("etag"),
                "url": format!("/images/a?v={version}"),
            });
            assert_eq!(told, expected);
        }
        let deleted = delete(&server, "/images/a", &[]).await;
        assert_eq!(deleted.status, StatusCode::NO_CONTENT);
        // RFC 9110 §8.6.
        assert_eq!(deleted.headers.get("content-length"), None);
        server.get("/images/a").await.problem(404, "absent");
        delete(&server, "/images/a", &[]).await.problem(404, "absent");
    }
}

#[tokio::test]
async fn a_posted_image_is_stored_once_under_the_hash_of_its_content() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let bytes = png(7, 50_000);
    let post = async |headers: &[(&str, &str)], body: Vec<u8>| {
        server.send(Method::POST, "/images?ttl=1h", headers, body.into()).await
    };
    let created = post(&[PNG], bytes.clone()).await;
    assert_eq!(created.status, StatusCode::CREATED, "{created:?}");
    let told: serde_json::Value = serde_json::from_slice(&created.body).unwrap();
    let mut id = String::new();
    for byte in Sha256::digest(&bytes) {
        write!(id, "{byte:02x}").unwrap();
    }
    assert_eq!(told["id"], id);
    assert_eq!(created.header("location"), format!("/images/{id}"));
    assert_eq!(told["etag"], created.header("etag"));
    let image = server.get(created.header("location")).await;
    assert_eq!((&image.body[..], image.header("etag")), (&bytes[..], created.header("etag")));
    let versioned = server.get(told["url"].as_str().unwrap()).await;
    assert!(versioned.header("cache-control").contains("31536000"), "{versioned:?}");

    let again = post(&[PNG], bytes.clone()).await;
    assert_eq!(again.status, StatusCode::OK);
    assert_eq!(again.header("etag"), created.header("etag"));
    post(&[PNG, ("if-none-match", "*")], bytes.clone()).await.problem(412, "precondition-failed");
    // The same image in a record with further fields.
    let recorded = post(&[JSON], record(&bytes)).await;
    assert_eq!(recorded.status, StatusCode::OK);
    assert_eq!(recorded.header("location"), created.header("location"));
    post(&[PNG], b"no image".to_vec()).await.problem(400, "not-an-image");
    let get = server.get("/images").await;
    get.problem(405, "method-not-allowed");
    assert_eq!(get.header("allow"), "POST");
}

#[tokio::test]
async fn a_write_honours_its_preconditions_and_changes_nothing_if_they_fail() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let (first, second) = (png(1, 1000), png(2, 1000));
    let created = put(&server, "/images/a", &[PNG, ("if-none-match", "*")], &first).await;
    assert_eq!(created.status, StatusCode::CREATED);
    let tag = created.header("etag").to_owned();
    let other = "\"00000000000000000000000000000000\"".to_owned();
    let (weak, list) = (format!("W/{tag}"), format!("{other}, {tag}"));
    let coded = format!("\"{}-br1\"", tag.trim_matches('"'));
    let past = "Thu, 01 Jan 1998 00:00:00 GMT".to_owned();
    for (name, value) in [
        ("if-none-match", &"*".to_owned()),
        ("if-none-match", &tag),
        ("if-none-match", &weak),
        ("if-match", &other),
        ("if-match", &weak),
        ("if-match", &"rubbish".to_owned()),
        ("if-unmodified-since", &past),
    ] {
        let answer = put(&server, "/images/a", &[PNG, (name, value)], &second).await;
        answer.problem(412, "precondition-failed");
        let answer = delete(&server, "/images/a", &[(name, value)]).await;
        answer.problem(412, "precondition-failed");
        assert_eq!(server.get("/images/a").await.body, first, "{name}: {value}");
    }
    for (name, value) in [
        ("if-match", "*"),
        ("if-match", &tag),
        ("if-match", &list),
        ("if-match", &coded),
        ("if-none-match", &other),
        ("if-unmodified-since", "Thu, 01 Jan 2099 00:00:00 GMT"),
    ] {
        let answer = put(&server, "/images/a", &[JSON, (name, value)], &record(&second)).await;
        assert_eq!(answer.status, StatusCode::OK, "{name}: {value} {answer:?}");
        assert_eq!(server.get("/images/a").await.body, second);
        // Restores the first image for the next case.
        let value = redis.connect().await.get("image:b").await.unwrap();
        assert_eq!(value, None);
        put(&server, "/images/a", &[PNG], &first).await;
        let now = server.get("/images/a").await.header("etag").to_owned();
        if now != tag {
            // `created_at` in the record has changed with the second, and so has the entity-tag.
            return;
        }
    }
    for (name, value) in [("if-match", "*"), ("if-match", tag.as_str())] {
        put(&server, "/images/b", &[PNG, (name, value)], &first)
            .await
            .problem(412, "precondition-failed");
    }
    assert_eq!(delete(&server, "/images/a", &[("if-match", &tag)]).await.status, 204);
    server.get("/images/a").await.problem(404, "absent");
}

/// Races two writers with the same entity-tag a thousand times.
async fn of_two_writers_one_wins_each_time(server: &Server) {
    let first = put(server, "/images/a", &[JSON], &record(&png(0, 500))).await;
    let mut tag = first.header("etag").to_owned();
    let mut clients =
        [Client::connect(server.address).await, Client::connect(server.address).await];
    for round in 0..1000_u64 {
        let values = [2 * round + 1, 2 * round + 2].map(|seed| record(&png(seed, 500)));
        let headers = [JSON, ("if-match", tag.as_str())];
        let [one, other] = &mut clients;
        let (one, other) = tokio::join!(
            one.send(Method::PUT, "/images/a", &headers, values[0].clone().into()),
            other.send(Method::PUT, "/images/a", &headers, values[1].clone().into()),
        );
        let (one, other) = (one.unwrap(), other.unwrap());
        let (won, lost, value) = if one.status == StatusCode::OK {
            (one, other, &values[0])
        } else {
            (other, one, &values[1])
        };
        assert_eq!(won.status, StatusCode::OK, "round {round}: {won:?} {lost:?}");
        lost.problem(412, "precondition-failed");
        assert_eq!(won.header("etag"), etag(value));
        won.header("etag").clone_into(&mut tag);
        assert_eq!(server.get("/images/a").await.header("etag"), tag, "round {round}");
    }
}

async fn of_two_writers_with_the_same_etag_exactly_one_wins_in_redis() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    of_two_writers_one_wins_each_time(&server).await;
}

async fn of_two_writers_with_the_same_etag_exactly_one_wins_in_the_embedded_store() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(&[("embedded.dir", dir.path().to_str().unwrap())]).await;
    of_two_writers_one_wins_each_time(&server).await;
}

async fn a_conditional_write_never_overwrites_a_concurrent_backend_write() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let mut backend = redis.connect().await;
    let mut won = 0;
    for round in 0..500_u64 {
        let [before, by_http, by_backend] =
            [3 * round, 3 * round + 1, 3 * round + 2].map(|seed| record(&png(seed, 20_000)));
        backend.set("image:a", &before).await.unwrap();
        let tag = etag(&before);
        let headers = [JSON, ("if-match", tag.as_str())];
        let writing = put(&server, "/images/a", &headers, &by_http);
        let (answer, ()) = tokio::join!(writing, async {
            // The pause moves the backend's write through the other one, round by round.
            tokio::time::sleep(Duration::from_micros(round * 7 % 3000)).await;
            backend.set("image:a", &by_backend).await.unwrap();
        });
        won += usize::from(answer.status == StatusCode::OK);
        // Either the HTTP write came first, and the backend overwrote it; or it came second, and its condition failed.
        let now = backend.get("image:a").await.unwrap().unwrap();
        assert_eq!(now.as_bytes(), by_backend, "round {round}: {answer:?}");
    }
    println!("{won} of 500 HTTP writes came before the backend's");
    assert!((1..500).contains(&won), "{won} of 500 HTTP writes came first: nothing raced");
}

#[tokio::test]
async fn a_write_needs_a_token_once_tokens_are_configured() {
    let redis = RedisServer::start().await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "\none-from-a-file-1234\n").unwrap();
    let path = file.path().to_str().unwrap();
    let server = Server::on(&redis, &[TOKENS, ("writes.tokens_file", path)]).await;
    let bytes = png(1, 1000);
    for wrong in [
        None,
        Some("Bearer"),
        Some("Bearer "),
        Some("Bearer wrong-token-of-some-length"),
        Some("Bearer a-token-of-some-lengt"),
        Some("Bearer a-token-of-some-length2"),
        Some("Basic YTphLXRva2VuLW9mLXNvbWUtbGVuZ3Ro"),
        Some("a-token-of-some-length"),
    ] {
        let headers: Vec<_> =
            [PNG].into_iter().chain(wrong.map(|it| ("authorization", it))).collect();
        for answer in [
            put(&server, "/images/a", &headers, &bytes).await,
            server.send(Method::POST, "/images", &headers, bytes.clone().into()).await,
            delete(&server, "/images/a", &headers).await,
        ] {
            let shown = wrong.is_some_and(|it| it.starts_with("Bearer ") && it.len() > 7);
            let problem = answer.problem(401, if shown { "invalid-token" } else { "unauthorised" });
            let challenge = answer.header("www-authenticate");
            assert!(challenge.starts_with("Bearer realm=\"afterimage\""));
            assert_eq!(challenge.contains("error=\"invalid_token\""), shown, "{wrong:?}");
            assert!(!problem.to_string().contains(TOKEN));
        }
    }
    let twice = [PNG, BEARER, BEARER];
    put(&server, "/images/a", &twice, &bytes).await.problem(401, "unauthorised");
    server.get("/images/a").await.problem(404, "absent");
    for right in ["Bearer a-token-of-some-length", "bearer one-from-a-file-1234"] {
        // A token suffices from any origin and through a proxy.
        let headers =
            [PNG, ("authorization", right), ("origin", "https://app.example"), ("via", "1.1 a")];
        let answer = put(&server, "/images/a", &headers, &bytes).await;
        assert!(answer.status.is_success(), "{right}: {answer:?}");
    }
    assert_eq!(delete(&server, "/images/a", &[BEARER]).await.status, StatusCode::NO_CONTENT);

    let off = Server::on(&redis, &[TOKENS, ("writes.enabled", "false")]).await;
    put(&off, "/images/a", &[PNG, BEARER], &bytes).await.problem(403, "read-only");
}

/// Returns an address of this machine that isn't a loopback one. Adds one if there is none and the user may.
fn address_of_this_machine() -> IpAddr {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // Connecting a UDP socket sends nothing, but selects the local address.
    if socket.connect("192.0.2.1:9").is_ok() && !socket.local_addr().unwrap().ip().is_loopback() {
        return socket.local_addr().unwrap().ip();
    }
    let added = Command::new("ip").args(["address", "add", "192.0.2.77/32", "dev", "lo"]).status();
    assert!(
        added.is_ok(),
        "an address that isn't a loopback one is needed: connect this machine to a network or install `ip` (iproute2)"
    );
    [192, 0, 2, 77].into()
}

#[tokio::test]
async fn a_write_from_another_machine_needs_a_token() {
    let redis = RedisServer::start().await;
    let elsewhere = address_of_this_machine();
    let bytes = Bytes::from(png(1, 1000));
    for (settings, headers, status) in [
        (vec![], vec![PNG], 403),
        // A local Host doesn't help.
        (vec![], vec![PNG, ("host", "localhost")], 403),
        (vec![], vec![PNG, BEARER], 403),
        (vec![TOKENS], vec![PNG], 401),
        (vec![TOKENS], vec![PNG, BEARER], 201),
    ] {
        let settings: Vec<_> = settings.into_iter().chain([("http.listen", "0.0.0.0:0")]).collect();
        let server = Server::on(&redis, &settings).await;
        let address = SocketAddr::new(elsewhere, server.address.port());
        let mut client = Client::connect(address).await;
        let answer = client.send(Method::PUT, "/images/a", &headers, bytes.clone()).await.unwrap();
        assert_eq!(answer.status, status, "{headers:?} {answer:?}");
        if status == 403 {
            answer.problem(403, "not-from-here");
            let answer = client.send(Method::DELETE, "/images/a", &headers, Bytes::new()).await;
            answer.unwrap().problem(403, "not-from-here");
        }
        assert_eq!(client.get("/images/a", &[]).await.status.is_success(), status == 201);
    }
}

#[tokio::test]
async fn a_body_that_contradicts_its_headers_is_refused_and_not_stored() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let bytes = png(1, 100_000);
    let sha_256 = |bytes: &[u8]| format!("sha-256=:{}:", STANDARD.encode(Sha256::digest(bytes)));
    let (lie, truth) = (sha_256(b"something else"), sha_256(&bytes));
    for name in ["content-digest", "repr-digest"] {
        let answer = put(&server, "/images/a", &[PNG, (name, &lie)], &bytes).await;
        let problem = answer.problem(400, "digest-mismatch");
        assert!(problem["detail"].as_str().unwrap().contains("sha-256"));
        let answer = put(&server, "/images/a", &[PNG, (name, "sha-256=:x:")], &bytes).await;
        answer.problem(400, "bad-digest");
    }
    let jpeg = ("content-type", "image/jpeg");
    let problem = put(&server, "/images/a", &[jpeg], &bytes).await.problem(415, "media-type");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("the body is image/png, but Content-Type says image/jpeg"), "{detail}");
    for (headers, body, status, kind) in [
        (vec![PNG], &b"no image"[..], 400, "not-an-image"),
        (vec![PNG], b"", 400, "not-an-image"),
        (vec![JSON], &bytes[..], 400, "not-an-image"),
        (vec![JSON], br#"{"url": "https://cdn.example/a.png"}"#, 400, "not-an-image"),
        (vec![("content-type", "text/html")], &bytes[..], 415, "media-type"),
        (vec![("content-type", "multipart/form-data; boundary=x")], &bytes[..], 415, "media-type"),
        (vec![PNG, ("content-encoding", "gzip")], &bytes[..], 415, "media-type"),
        (vec![PNG, ("content-range", "bytes 0-1/2")], &bytes[..], 400, "partial-put"),
    ] {
        put(&server, "/images/a", &headers, body).await.problem(status, kind);
    }
    server.get("/images/a").await.problem(404, "absent");
    let answer = put(&server, "/images/a", &[PNG, ("content-digest", &truth)], &bytes).await;
    assert_eq!(answer.status, StatusCode::CREATED);
}

#[tokio::test]
async fn the_writer_sets_the_ttl_within_the_limit() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("records.max_ttl", "1day")]).await;
    let bytes = png(1, 1000);
    let mut connection = redis.connect().await;
    for (path, headers, seconds) in [
        ("/images/a", vec![PNG], 7200),
        ("/images/a?ttl=90s", vec![PNG], 90),
        ("/images/a", vec![PNG, ("ttl", "600")], 600),
        ("/images/a?ttl=1day", vec![PNG], 86_400),
    ] {
        assert!(put(&server, path, &headers, &bytes).await.status.is_success());
        let mut ttl = redis::cmd("TTL");
        let left: i64 = ttl.arg("image:a").query_async(&mut connection).await.unwrap();
        assert!((seconds - 10..=seconds).contains(&left), "{path}: {left}");
    }
    for (path, headers, says) in [
        ("/images/b?ttl=25h", vec![PNG], "at most 1day ([records] max_ttl)"),
        ("/images/b", vec![PNG, ("ttl", "86401")], "at most 1day ([records] max_ttl)"),
        ("/images/b?ttl=0s", vec![PNG], "ttl is not a duration"),
        ("/images/b?ttl=soon", vec![PNG], "ttl is not a duration"),
        ("/images/b", vec![PNG, ("ttl", "0")], "TTL is a whole number of seconds"),
        ("/images/b", vec![PNG, ("ttl", "-1")], "TTL is a whole number of seconds"),
        ("/images/b", vec![PNG, ("ttl", "99999999999999999999999")], "TTL is a whole number"),
        ("/images/b?ttl=1h", vec![PNG, ("ttl", "3600")], "twice"),
        ("/images/b?life=1h", vec![PNG], "this address takes ttl"),
    ] {
        let problem = put(&server, path, &headers, &bytes).await.problem(400, "bad-parameter");
        assert!(problem["detail"].as_str().unwrap().contains(says), "{path}: {problem}");
    }
    delete(&server, "/images/a?ttl=1h", &[]).await.problem(400, "bad-parameter");
    server.get("/images/b").await.problem(404, "absent");
}

#[tokio::test]
async fn a_body_of_unknown_length_is_cut_at_the_limit() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("records.max_value", "64KiB")]).await;
    let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let head = "PUT /images/a HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n\
        Transfer-Encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let chunk = [b"4000\r\n".as_slice(), &vec![b'x'; 0x4000], b"\r\n"].concat();
    for _ in 0..5 {
        stream.write_all(&chunk).await.unwrap();
    }
    let mut status = [0; 12];
    stream.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 413");
    // The image fits the limit, its record doesn't.
    let bytes = png(1, 60 * 1024);
    let problem = put(&server, "/images/a", &[PNG], &bytes).await.problem(413, "body-too-large");
    assert!(problem["detail"].as_str().unwrap().contains("the limit is 65536"), "{problem}");
    server.get("/images/a").await.problem(404, "absent");
    until("the refused bodies have released their bytes", || async {
        put(&server, "/images/a", &[PNG], &png(1, 40_000)).await.status == StatusCode::CREATED
    })
    .await;
}

#[tokio::test]
async fn posting_an_image_again_never_shortens_its_ttl() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let mut connection = redis.connect().await;
    let bytes = Bytes::from(png(1, 1000));
    for (ttl, seconds) in [("1h", 3600), ("1s", 3600), ("2h", 7200), ("90s", 7200)] {
        let path = format!("/images?ttl={ttl}");
        let answer = server.send(Method::POST, &path, &[PNG], bytes.clone()).await;
        let id = answer.header("location").strip_prefix("/images/").unwrap().to_owned();
        let mut left = redis::cmd("TTL");
        let left = left.arg(format!("image:{id}")).query_async(&mut connection).await;
        let left: i64 = left.unwrap();
        assert!((seconds - 10..=seconds).contains(&left), "{ttl}: {left}");
    }
}

#[tokio::test]
async fn slow_uploads_take_nothing_from_the_budget_of_readers() {
    let redis = RedisServer::start().await;
    let settings = [("limits.write_bytes", "1MiB"), ("redis.response_timeout", "1s")];
    let server = Server::on(&redis, &settings).await;
    redis.set("a", &record(&png(1, 500_000))).await;
    let mut stalled = Vec::new();
    for length in ["Content-Length: 250000", "Content-Length: 250000"] {
        let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
        let head = format!(
            "PUT /images/b HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n{length}\r\n\r\nx"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stalled.push(stream);
    }
    until("the write budget is exhausted", || async {
        let answer = put(&server, "/images/c", &[PNG], &png(2, 100_000)).await;
        answer.status == StatusCode::SERVICE_UNAVAILABLE
    })
    .await;
    assert!(server.metric("afterimage_shed_total{limit=\"write_bytes\"}").await > 0);
    assert_eq!(server.get("/images/a").await.status, StatusCode::OK);
    drop(stalled);
    until("the write budget is free again", || async {
        put(&server, "/images/c", &[PNG], &png(2, 100_000)).await.status.is_success()
    })
    .await;
}

#[tokio::test]
async fn a_writer_that_takes_its_share_of_the_budget_leaves_room_for_others() {
    let redis = RedisServer::start().await;
    let settings = [("limits.write_bytes", "1MiB"), ("redis.response_timeout", "1s")];
    let server = Server::on(&redis, &settings).await;
    let from_elsewhere = || connect_from([127, 0, 0, 2], server.address);
    let mut stalled = Vec::new();
    // Each is counted three times, and those without a length by what has come.
    for length in ["Content-Length: 90000", "Content-Length: 90000", "Transfer-Encoding: chunked"] {
        let mut stream = from_elsewhere().await;
        let head = format!(
            "PUT /images/b HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n{length}\r\n\r\n1\r\nx"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        stalled.push(stream);
    }
    let greedy = async || {
        let mut client = Client::over(Protocol::Http1, from_elsewhere().await, "localhost").await;
        let body = Bytes::from(png(2, 100_000));
        client.send(Method::PUT, "/images/c", &[PNG], body).await.unwrap()
    };
    until("the writer has its share", || async {
        greedy().await.status == StatusCode::SERVICE_UNAVAILABLE
    })
    .await;
    let refused = greedy().await.problem(503, "busy");
    let detail = refused["detail"].as_str().unwrap();
    assert!(detail.contains("this client") && detail.contains("[limits] write_bytes"), "{detail}");
    for number in 0..3 {
        let path = format!("/images/d{number}");
        let written = put(&server, &path, &[PNG], &png(number, 100_000)).await;
        assert_eq!(written.status, StatusCode::CREATED, "{written:?}");
    }
    drop(stalled);
    until("its share is free again", || async { greedy().await.status.is_success() }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conditional_write_ends_with_the_redis_timeout() {
    let redis = RedisServer::start().await;
    let settings = [("redis.response_timeout", "1s")];
    let server = Server::on(&redis, &settings).await.coherent().await;
    put(&server, "/images/a", &[PNG], &png(1, 1000)).await;
    redis.signal("STOP");
    let began = std::time::Instant::now();
    let writing: Vec<_> = (0..30)
        .map(|seed| {
            let address = server.address;
            tokio::spawn(async move {
                let headers = [PNG, ("if-match", "\"x\"")];
                let mut client = Client::connect(address).await;
                let body = Bytes::from(png(seed, 1000));
                client.send(Method::PUT, "/images/a", &headers, body).await.unwrap()
            })
        })
        .collect();
    for answer in writing {
        let answer = answer.await.unwrap();
        assert!(answer.status.is_server_error(), "{answer:?}");
    }
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    redis.signal("CONT");
    until("Redis answers again", || async {
        put(&server, "/images/a", &[PNG], &png(2, 1000)).await.status.is_success()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_writes_to_a_running_server_with_its_token() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = program();
    command.arg("--embedded-dir").arg(dir.path());
    command.env("AFTERIMAGE_WRITES_TOKENS", format!("[\"{TOKEN}\"]"));
    let process = Process::start(command);
    let file = dir.path().join("a.png");
    std::fs::write(&file, png(1, 1000)).unwrap();
    let write = |token: Option<&str>| {
        let mut command = program();
        command.args(["put", "a"]).arg(&file).arg("--embedded-dir").arg(dir.path());
        command.args(["--http-listen", &process.address.to_string()]);
        if let Some(token) = token {
            command.env("AFTERIMAGE_WRITES_TOKENS", format!("[\"{token}\"]"));
        }
        let output = command.output().unwrap();
        (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (done, message) = write(None);
    assert!(!done && message.contains("401"), "{message}");
    let (done, message) = write(Some(TOKEN));
    assert!(done, "{message}");
    let answer = crate::harness::get(process.address, "/images/a", &[]).await;
    assert_eq!(answer.body, png(1, 1000));
}

#[tokio::test]
async fn a_broken_picture_is_refused_and_what_is_not_decoded_is_stored_as_it_is() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("writes.verify", "true"), ("pictures.max_pixels", "5000")]);
    let server = server.await.coherent().await;
    let whole = encoded(&picture(1, 60, 60), ImageFormat::Png);
    let large = encoded(&picture(1, 100, 60), ImageFormat::Png);
    let cut = whole[..whole.len() * 2 / 3].to_vec();
    for (body, content_type) in [(cut.clone(), "image/png"), (record(&cut), "application/json")] {
        let headers = [("content-type", content_type)];
        let answer = put(&server, "/images/a", &headers, &body).await;
        let problem = answer.problem(400, "not-an-image");
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains("broken") && detail.contains("[writes] verify"), "{detail}");
        server.get("/images/a").await.problem(404, "absent");
    }
    let heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic".to_vec();
    for (id, body) in [("whole", whole), ("large", large), ("heic", heic)] {
        let path = format!("/images/{id}");
        let answer = put(&server, &path, &[], &body).await;
        assert_eq!(answer.status, StatusCode::CREATED, "{id}: {answer:?}");
        assert_eq!(server.get(&path).await.body, body, "{id}");
    }
}
