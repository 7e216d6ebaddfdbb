//! Responses to reads and writes of an image: statuses, headers and problem details.

use bytes::Bytes;
use hyper::{Method, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{Client, RedisServer, Server, etag, get, png, record};

#[tokio::test]
async fn an_image_is_sent_with_its_type_length_validator_and_freshness() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let bytes = png(1, 100_000);
    let value = record(&bytes);
    redis.set("a", &value).await;

    let answer = server.get("/images/a").await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.body, bytes);
    for (name, value) in [
        ("content-type", "image/png"),
        ("content-length", "100000"),
        ("cache-control", "public, max-age=3600, immutable"),
        ("etag", &etag(&value)),
        ("vary", "Accept-Encoding"),
        ("x-content-type-options", "nosniff"),
    ] {
        assert_eq!(answer.header(name), value, "{name}");
    }
    assert!(!answer.header("date").is_empty());
}

#[tokio::test]
async fn head_is_get_without_the_body() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    redis.set("a", &record(&png(1, 5000))).await;

    let mut client = Client::connect(server.address).await;
    crate::harness::until("the image is known", || async {
        server.get("/images/a").await.header("cache-status") == "afterimage; hit"
    })
    .await;
    for path in ["/images/a", "/images/missing", "/images/-bad"] {
        let mut full = client.get(path, &[]).await;
        let mut head = client.send(Method::HEAD, path, &[], Bytes::new()).await.unwrap();
        assert!(head.body.is_empty() && !full.body.is_empty());
        for own in ["date", "x-request-id", "cache-status", "server-timing"] {
            full.headers.remove(own);
            head.headers.remove(own);
        }
        assert_eq!((head.status, head.headers), (full.status, full.headers), "{path}");
    }
}

#[tokio::test]
async fn a_client_with_the_current_version_gets_304_with_the_required_headers() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let value = record(&png(1, 5000));
    redis.set("a", &value).await;
    let etag = etag(&value);

    let mut client = Client::connect(server.address).await;
    for known in [etag.clone(), format!("W/{etag}"), format!("\"x,y\", {etag}"), "*".into()] {
        for method in [Method::GET, Method::HEAD] {
            let answer = client
                .send(method, "/images/a", &[("if-none-match", &known)], Bytes::new())
                .await
                .unwrap();
            assert_eq!(answer.status, StatusCode::NOT_MODIFIED, "{known}");
            assert!(answer.body.is_empty());
            assert_eq!(answer.header("etag"), etag);
            assert_eq!(answer.header("cache-control"), "public, max-age=3600, immutable");
            assert_eq!(answer.header("vary"), "Accept-Encoding");
            assert!(!answer.header("date").is_empty());
            // RFC 9110 §8.6: the length of the 200, or none.
            assert_ne!(answer.header("content-length"), "0");
            assert_eq!(answer.header("content-type"), "");
        }
    }
    for unknown in ["\"x\"", etag.trim_matches('"'), ""] {
        let answer = client.get("/images/a", &[("if-none-match", unknown)]).await;
        assert_eq!(answer.status, StatusCode::OK, "{unknown}");
    }
}

#[tokio::test]
async fn without_tracking_the_very_next_request_sees_a_replaced_image() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("redis.tracking", "false")]).await;
    let mut client = Client::connect(server.address).await;
    for round in 0..50 {
        let bytes = png(round, 3000);
        let value = record(&bytes);
        redis.set("a", &value).await;
        let answer = client.get("/images/a", &[]).await;
        assert_eq!(answer.body, bytes);
        assert_eq!(answer.header("etag"), etag(&value));
    }
}

#[tokio::test]
async fn a_bad_id_is_400_without_a_store_request() {
    // Nothing listens on this port: a request to the store would give 503.
    let server = Server::start(&[("redis.url", "redis://127.0.0.1:1")]).await;
    server.get("/images/good").await.problem(503, "store-unavailable");
    let long = format!("/images/{}", "x".repeat(10_240));
    for path in [
        "/images/",
        "/images/.",
        "/images/..",
        "/images/../../etc/passwd",
        "/images/..%2f..%2fetc%2fpasswd",
        "/images/%2e%2e",
        "/images/a%00b",
        "/images/a%0d%0ax:y",
        "/images/%252e",
        "/images/%ff%fe",
        "/images/%c3%a4",
        "/images/a%20b",
        "/images/a/b",
        "/images/a%",
        "/images/a%zz",
        "/images/-a",
        "/images/a.webp.png",
        "/images/.webp",
        &long,
    ] {
        let members = server.get(path).await.problem(400, "bad-id");
        assert!(members["detail"].as_str().unwrap().contains("id"), "{members}");
    }
    // A percent-encoded character that is valid in an id is accepted.
    server.get("/images/a%3ab").await.problem(503, "store-unavailable");
}

#[tokio::test]
async fn an_unknown_parameter_is_400_instead_of_the_original_image() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    redis.set("a", &record(&png(1, 100))).await;
    server.get("/images/a?width=64").await.problem(400, "bad-parameter");
    assert_eq!(server.get("/images/a?").await.status, StatusCode::OK);
}

#[tokio::test]
async fn an_absent_image_is_404_and_an_unsupported_method_is_405_with_allow() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    server.get("/images/missing").await.problem(404, "absent");
    server.get("/nothing/here").await.problem(404, "unknown-address");
    for method in [Method::POST, Method::PATCH, Method::OPTIONS] {
        let answer = server.send(method, "/images/a", &[], Bytes::new()).await;
        answer.problem(405, "method-not-allowed");
        assert_eq!(answer.header("allow"), "GET,HEAD,PUT,DELETE");
    }
}

#[tokio::test]
async fn a_store_timeout_is_504() {
    let redis = RedisServer::start().await;
    let settings = [("redis.response_timeout", "300ms"), ("redis.connections", "1")];
    let server = Server::on(&redis, &settings).await;
    redis.set("a", &record(&png(1, 100))).await;
    server.get("/images/b").await.problem(404, "absent");
    redis.signal("STOP");
    server.get("/images/a").await.problem(504, "store-timeout");
    redis.signal("CONT");
    crate::harness::until("Redis answers again", || async {
        server.get("/images/a").await.status == StatusCode::OK
    })
    .await;
}

#[tokio::test]
async fn without_tokens_a_put_is_accepted_from_this_machine_only() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let value = Bytes::from(record(&png(1, 2000)));
    let json = ("content-type", "application/json");
    let put = |headers: Vec<(&'static str, &'static str)>, path: &'static str, body: Bytes| {
        let server = &server;
        async move { server.send(Method::PUT, path, &headers, body).await }
    };

    let created = put(vec![json], "/images/a?ttl=90s", value.clone()).await;
    assert_eq!(created.status, StatusCode::CREATED);
    assert_eq!(created.header("etag"), etag(&value));
    let replaced = put(vec![json], "/images/a", value.clone()).await;
    assert_eq!(replaced.status, StatusCode::OK);
    assert_eq!(server.get("/images/a").await.header("etag"), etag(&value));

    for foreign in [
        ("host", "evil.example"),
        ("origin", "https://evil.example"),
        ("x-forwarded-for", "192.0.2.1"),
        ("via", "1.1 proxy"),
    ] {
        put(vec![json, foreign], "/images/b", value.clone()).await.problem(403, "not-from-here");
    }
    let mixed_case = ("content-type", "Application/JSON; charset=utf-8");
    assert_eq!(put(vec![mixed_case], "/images/c", value.clone()).await.status, StatusCode::CREATED);
    put(vec![json], "/images/b", Bytes::from("{}")).await.problem(400, "not-an-image");
    put(vec![json], "/images/-b", value.clone()).await.problem(400, "bad-id");
    server.get("/images/b").await.problem(404, "absent");
}

#[tokio::test]
async fn a_put_over_the_limit_is_413() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("records.max_value", "64KiB")]).await;
    let value = Bytes::from(record(&png(1, 64 * 1024)));
    let json = [("content-type", "application/json")];
    let answer = server.send(Method::PUT, "/images/a", &json, value).await;
    let members = answer.problem(413, "body-too-large");
    assert!(members["detail"].as_str().unwrap().contains("65536"));
    // A body whose declared length is too large is refused before it is sent.
    let mut stream = tokio::net::TcpStream::connect(server.address).await.unwrap();
    let head = "PUT /images/a HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
        Content-Length: 99999999999\r\nExpect: 100-continue\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut status = [0; 12];
    stream.read_exact(&mut status).await.unwrap();
    assert_eq!(&status, b"HTTP/1.1 413");
}

#[tokio::test]
async fn healthz_reports_liveness_and_readyz_reports_readiness() {
    let mut redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    assert_eq!(server.get("/healthz").await.body, "ok\n");
    assert_eq!(server.get("/readyz").await.status, StatusCode::OK);
    redis.kill();
    assert_eq!(server.get("/healthz").await.status, StatusCode::OK);
    crate::harness::until("the outage is noticed", || async {
        server.get("/readyz").await.status == StatusCode::SERVICE_UNAVAILABLE
    })
    .await;
    // Extension members of the problem name the state of coherence (RFC 9457 §3.2).
    let members = server.get("/readyz").await.problem(503, "store-unavailable");
    assert!(["unverified", "unreachable"].contains(&members["coherence"].as_str().unwrap()));
    assert!(members["reason"].is_string());
}

#[tokio::test]
async fn a_stop_lets_requests_in_progress_finish() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    redis.set("a", &record(&png(1, 3000))).await;
    redis.signal("STOP");
    let address = server.address;
    let waiting = tokio::spawn(async move { get(address, "/images/a", &[]).await });
    crate::harness::until("the request has reached the server", || async {
        server.metric("afterimage_fetches_total").await == 1
    })
    .await;
    let stopping = tokio::spawn(server.stop());
    redis.signal("CONT");
    assert_eq!(waiting.await.unwrap().status, StatusCode::OK);
    stopping.await.unwrap();
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}
