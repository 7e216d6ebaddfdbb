//! Freshness (RFC 9111 §5.2, RFC 8246, RFC 5861), `Cache-Status` (RFC 9211), CORS, and content coding (RFC 9110 §12.5).

use std::io::Read;

use bytes::Bytes;
use hyper::{Method, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::conditional::drawing;
use crate::harness::{Answer, Client, RedisServer, Server, etag, get, png, record, until};
use crate::variants::{encoded, picture};

const HOUR: &str = "public, max-age=3600, immutable";

#[tokio::test]
async fn a_url_with_the_current_version_is_immutable_and_with_another_is_no_cache() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let (old, new) = (record(&png(1, 3000)), record(&png(2, 3000)));
    let version = |value: &[u8]| etag(value).trim_matches('"').to_owned();
    redis.set("a", &old).await;

    let versioned = format!("/images/a?v={}", version(&old));
    for _ in 0..2 {
        let answer = server.get(&versioned).await;
        assert_eq!(answer.header("cache-control"), "public, max-age=31536000, immutable");
        assert_eq!(answer.header("etag"), etag(&old));
    }
    let quoted = format!("/images/a?v=%22{}%22", version(&old));
    assert!(server.get(&quoted).await.header("cache-control").contains("31536000"));
    let known = [("if-none-match", etag(&old))];
    let known = known.each_ref().map(|(name, value)| (*name, value.as_str()));
    let same = get(server.address, &versioned, &known).await;
    assert_eq!(same.status, StatusCode::NOT_MODIFIED);
    assert_eq!(same.header("cache-control"), "public, max-age=31536000, immutable");

    redis.set("a", &new).await;
    until("the old address gives the new image with no-cache", || async {
        let answer = server.get(&versioned).await;
        answer.header("etag") == etag(&new) && answer.header("cache-control") == "no-cache"
    })
    .await;
    for other in ["v=", "v=1", "v=00000000000000000000000000000000"] {
        let answer = server.get(&format!("/images/a?{other}")).await;
        assert_eq!((answer.status.as_u16(), answer.header("cache-control")), (200, "no-cache"));
    }
    server.get("/images/a?v=1&v=2").await.problem(400, "bad-parameter");
    server.get("/images/a?v=1&x=2").await.problem(400, "bad-parameter");
}

#[tokio::test]
async fn only_entity_tags_that_exist_make_an_address_immutable() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let picture = record(&encoded(&picture(1, 100, 50), image::ImageFormat::Png));
    redis.set("a", &picture).await;
    redis.set("svg", &record(drawing().as_bytes())).await;
    let version = |id: &'static str| async {
        server.get(id).await.header("etag").trim_matches('"').to_owned()
    };
    let (a, svg) = (version("/images/a").await, version("/images/svg").await);
    let (w64, thumbnail) = (version("/images/a?w=64").await, version("/images/a/thumbnail").await);
    let escaped = format!("%{:x}{}", a.as_bytes()[0], &a[1..]);
    for (immutable, addresses) in [
        (
            true,
            vec![
                format!("/images/a?v={a}"),
                format!("/images/a?v=%22{a}%22"),
                format!("/images/a?w=64&v={a}"),
                format!("/images/a?v={a}&w=64"),
                format!("/images/a?w=64&v={w64}"),
                format!("/images/a/thumbnail?v={a}"),
                format!("/images/a/thumbnail?v={thumbnail}"),
                format!("/images/svg?v={svg}-br1"),
                format!("/images/svg?v={svg}-gzip1"),
            ],
        ),
        (
            false,
            vec![
                format!("/images/a?v={a}-anything"),
                format!("/images/a?v={a}-"),
                format!("/images/a?v={a}-br1"),
                format!("/images/a?v={w64}"),
                format!("/images/a?v={a}-x&w=64"),
                format!("/images/a?w=64&v={thumbnail}"),
                format!("/images/a/thumbnail?v={a}-x"),
                format!("/images/svg?v={svg}-br2"),
                // One version, in endlessly many ways.
                format!("/images/a?v=%22%22{a}%22%22"),
                format!("/images/a?v={escaped}"),
                format!("/images/a?%76={a}"),
                format!("/images/a?v={a}&"),
                format!("/images/a?&&v={a}"),
                format!("/images/a?v={a}&&w=64"),
            ],
        ),
    ] {
        let expected = if immutable { "public, max-age=31536000, immutable" } else { "no-cache" };
        for address in addresses {
            // Cold, from memory, and from a cached head.
            for _ in 0..3 {
                let answer = server.get(&address).await;
                assert_eq!(answer.status, StatusCode::OK, "{address}");
                assert_eq!(answer.header("cache-control"), expected, "{address}");
            }
        }
    }
}

async fn read_head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

#[tokio::test]
async fn quotes_in_an_address_that_are_not_escaped_work_as_if_they_were() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let value = record(&png(1, 300));
    redis.set("a", &value).await;
    let tag = etag(&value);
    let exchange = async |request: &str| {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        read_head(&mut stream).await
    };
    let answer =
        async |target: String| exchange(&format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n")).await;
    for _ in 0..2 {
        let head = answer(format!("/images/a?v={tag}")).await;
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        assert!(head.contains("max-age=31536000, immutable"), "{head}");
    }
    // The HTTP library answers the same, to the request with which it gets the connection.
    for more in ["", "\r\nConnection: close"] {
        for version in ["1.1", "1.2"] {
            let request = format!("GET /images/a?v={tag} HTTP/{version}\r\nHost: a{more}\r\n\r\n");
            let head = exchange(&request).await;
            assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{request}{head}");
            assert!(head.contains("max-age=31536000, immutable"), "{request}{head}");
        }
    }
    let put = "PUT /images/\"b\" HTTP/1.3\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n";
    let head = exchange(put).await;
    assert!(head.starts_with("HTTP/1.1 400 ") && head.contains("problem+json"), "{head}");
    // Then it has the connection for good, and refuses them.
    for request in [format!("GET /images/a?v={tag} HTTP/1.1"), "GET /images/a HTTP/1.2".to_owned()]
    {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let first = "HEAD /healthz HTTP/1.1\r\nHost: a\r\n\r\n";
        stream.write_all(format!("{first}{request}\r\nHost: a\r\n\r\n").as_bytes()).await.unwrap();
        let first = read_head(&mut stream).await;
        assert!(first.starts_with("HTTP/1.1 200 OK\r\n"), "{first}");
        let second = read_head(&mut stream).await;
        assert!(second.starts_with("HTTP/1.1 400 "), "{request}: {second}");
    }
    let head = answer("/images/\"a\"".to_owned()).await;
    assert!(head.starts_with("HTTP/1.1 400 ") && head.contains("problem+json"), "{head}");
    let head = answer("/placeholders/64x64?text=\"<b>\"".to_owned()).await;
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
}

#[tokio::test]
async fn an_answer_lasts_no_longer_than_its_record_if_so_configured() {
    let redis = RedisServer::start().await;
    let capping = [("http.cap_max_age_at_expiry", "true"), ("http.stale_if_error", "1h")];
    let capped = Server::on(&redis, &capping).await.coherent().await;
    let usual = Server::on(&redis, &[]).await.coherent().await;
    let value = record(&encoded(&picture(1, 100, 50), image::ImageFormat::Png));
    redis.set("a", &value).await;
    let tag = etag(&value);
    let version = tag.trim_matches('"');
    let addresses = [
        "/images/a".to_owned(),
        format!("/images/a?v={version}"),
        "/images/a?w=64".to_owned(),
        format!("/images/a.webp?w=32&v={version}"),
        "/images/a/thumbnail".to_owned(),
    ];
    // The seconds of `max-age`, if they are all that it says.
    let seconds = |answer: &Answer| {
        let text = answer.header("cache-control");
        text.strip_prefix("public, max-age=").and_then(|it| it.parse::<u64>().ok())
    };
    let ask = async |server: &Server, method: Method, address: &str, known: bool| {
        let tag = server.get(address).await.header("etag").to_owned();
        let fields = [("if-none-match", tag.as_str())];
        let answer =
            server.send(method, address, &fields[..usize::from(known)], Bytes::new()).await;
        assert_eq!(answer.status.as_u16(), if known { 304 } else { 200 }, "{address}");
        answer
    };
    let is_capped = async |address: &str| {
        let mut all = true;
        // Often enough that the head is cached, if it is.
        for _ in 0..3 {
            for (method, known) in [
                (Method::GET, false),
                (Method::HEAD, false),
                (Method::GET, true),
                (Method::HEAD, true),
            ] {
                let answer = ask(&capped, method.clone(), address, known).await;
                let most = seconds(&answer);
                assert!(most.is_none_or(|it| it <= 100), "{address}: {answer:?}");
                all &= most.is_some();
                assert_eq!(seconds(&ask(&usual, method, address, known).await), None);
            }
        }
        all
    };
    // Without an expiry, so that heads are cached. The version stays the same when it gets one, and loses it.
    for address in &addresses {
        assert!(!is_capped(address).await, "{address}");
    }
    let mut connection = redis.connect().await;
    redis::cmd("EXPIRE").arg("image:a").arg(100).exec_async(&mut connection).await.unwrap();
    until("the expiry is known", || is_capped("/images/a")).await;
    for address in &addresses {
        assert!(is_capped(address).await, "{address}");
    }
    redis::cmd("PERSIST").arg("image:a").exec_async(&mut connection).await.unwrap();
    until("it expires no more", || async { !is_capped("/images/a").await }).await;
    for address in &addresses {
        assert!(!is_capped(address).await, "{address}");
    }
    // Longer than the usual time, it changes nothing.
    redis::cmd("EXPIRE").arg("image:a").arg(7200).exec_async(&mut connection).await.unwrap();
    until("the longer expiry is known", || async {
        let answer = capped.get(&addresses[1]).await;
        seconds(&answer).is_some_and(|it| it > 7000)
    })
    .await;
    assert!(capped.get("/images/a").await.header("cache-control").starts_with(HOUR));
}

#[tokio::test]
async fn cache_control_follows_the_settings() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 100))).await;
    let server = Server::on(&redis, &[]).await;
    assert_eq!(server.get("/images/a").await.header("cache-control"), HOUR);
    let settings = [
        ("http.max_age", "1min"),
        ("http.stale_while_revalidate", "1day"),
        ("http.stale_if_error", "2h"),
    ];
    let server = Server::on(&redis, &settings).await;
    // RFC 5861.
    assert_eq!(
        server.get("/images/a").await.header("cache-control"),
        "public, max-age=60, immutable, stale-while-revalidate=86400, stale-if-error=7200"
    );
}

#[tokio::test]
async fn a_response_carries_cache_status_and_server_timing() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    redis.set("a", &record(&png(1, 200_000))).await;
    redis.set("corrupt", b"{}").await;
    // An announcement that came during the fetch would have the image fetched once more.
    until("both changes were announced", || async {
        server.metric("afterimage_invalidations_total").await >= 2
    })
    .await;

    let cold = server.get("/images/a").await;
    assert_eq!(cold.header("cache-status"), "afterimage; fwd=miss; stored");
    let timing = cold.header("server-timing");
    for part in ["store;dur=", "hash;dur=", "decode;dur="] {
        assert!(timing.contains(part), "{timing}");
    }
    let hit = server.get("/images/a").await;
    assert_eq!(hit.header("cache-status"), "afterimage; hit");
    assert_eq!(hit.header("server-timing"), "store;dur=0");

    // Errors carry them too.
    for (path, status) in [("/images/absent", 404), ("/images/corrupt", 502)] {
        let cold = server.get(path).await;
        assert_eq!(
            (cold.status.as_u16(), cold.header("cache-status")),
            (status, "afterimage; fwd=miss")
        );
        assert!(cold.header("server-timing").starts_with("store;dur="));
        assert_eq!(server.get(path).await.header("cache-status"), "afterimage; hit");
    }
    let nowhere = Server::start(&[("redis.url", "redis://127.0.0.1:1")]).await;
    let failed = nowhere.get("/images/a").await;
    assert_eq!(failed.header("cache-status"), "afterimage; fwd=miss; detail=store-unavailable");
}

#[tokio::test]
async fn only_a_possibly_stale_response_has_an_age() {
    let mut redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    redis.set("a", &record(&png(1, 3000))).await;
    until("it is a hit", || async {
        server.get("/images/a").await.header("cache-status") == "afterimage; hit"
    })
    .await;
    // RFC 9111 §5.1: a response generated by the origin has no age.
    assert_eq!(server.get("/images/a").await.header("age"), "");
    redis.kill();
    let stale = || server.get("/images/a");
    until("the image has been stale for at least a second", || async {
        stale().await.header("age").parse::<u64>().is_ok_and(|age| age >= 1)
    })
    .await;
    let answer = stale().await;
    assert_eq!(answer.header("cache-status"), "afterimage; fwd=stale; detail=store-unreachable");
    assert_eq!(answer.header("cache-control"), "public, max-age=5");
    // A versioned address stays immutable, even during an outage.
    let version = answer.header("etag").trim_matches('"').to_owned();
    let versioned = server.get(&format!("/images/a?v={version}")).await;
    assert_eq!(versioned.header("cache-control"), "public, max-age=31536000, immutable");
}

#[tokio::test]
async fn every_image_response_has_the_common_headers() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("http.cors_origins", "[\"*\"]")]).await;
    let value = record(&png(1, 300));
    redis.set("a", &value).await;
    redis.set("corrupt", b"{}").await;
    let tag = etag(&value);
    let ask = |method: Method, path: &'static str, fields: Vec<(&'static str, String)>| {
        let server = &server;
        async move {
            let fields: Vec<_> = fields.iter().map(|(name, it)| (*name, it.as_str())).collect();
            server.send(method, path, &fields, Bytes::new()).await
        }
    };
    for (status, answer) in [
        (200, ask(Method::GET, "/images/a", vec![]).await),
        (200, ask(Method::HEAD, "/images/a", vec![]).await),
        (206, ask(Method::GET, "/images/a", vec![("range", "bytes=0-1".into())]).await),
        (304, ask(Method::GET, "/images/a", vec![("if-none-match", tag)]).await),
        (400, ask(Method::GET, "/images/-", vec![]).await),
        (400, ask(Method::GET, "/images/a?w=1", vec![]).await),
        (404, ask(Method::GET, "/images/absent", vec![]).await),
        (405, ask(Method::PATCH, "/images/a", vec![]).await),
        (
            200,
            ask(Method::OPTIONS, "/images/a", vec![("origin", "https://app.example".into())]).await,
        ),
        (412, ask(Method::GET, "/images/a", vec![("if-match", "\"x\"".into())]).await),
        (416, ask(Method::GET, "/images/a", vec![("range", "bytes=300-".into())]).await),
        (502, ask(Method::GET, "/images/corrupt", vec![]).await),
    ] {
        assert_eq!(answer.status, status);
        for (name, value) in [
            ("vary", "Accept-Encoding"),
            ("cross-origin-resource-policy", "cross-origin"),
            ("timing-allow-origin", "*"),
            ("x-content-type-options", "nosniff"),
        ] {
            assert_eq!(answer.header(name), value, "{name} of {answer:?}");
        }
    }
}

#[tokio::test]
async fn cross_origin_scripts_read_images_from_configured_origins_only() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 300))).await;
    let preflight = |server: &Server, origin: &'static str| {
        let address = server.address;
        async move {
            let fields = [
                ("origin", origin),
                ("access-control-request-method", "GET"),
                ("access-control-request-headers", "range"),
            ];
            let mut client = Client::connect(address).await;
            client.send(Method::OPTIONS, "/images/a", &fields, Bytes::new()).await.unwrap()
        }
    };
    let from = |server: &Server, origin: &'static str| {
        let address = server.address;
        async move { get(address, "/images/a", &[("origin", origin)]).await }
    };
    let allowed = |answer: &Answer| answer.header("access-control-allow-origin").to_owned();

    let closed = Server::on(&redis, &[]).await;
    assert_eq!(allowed(&from(&closed, "https://app.example").await), "");
    preflight(&closed, "https://app.example").await.problem(405, "method-not-allowed");

    let open = Server::on(&redis, &[("http.cors_origins", "[\"*\"]")]).await;
    let answer = from(&open, "https://app.example").await;
    assert_eq!(allowed(&answer), "*");
    assert!(answer.header("access-control-expose-headers").contains("etag"));
    // The response is the same for all origins, so it doesn't vary by Origin.
    assert_eq!(answer.header("vary"), "Accept-Encoding");
    let preflighted = preflight(&open, "https://app.example").await;
    assert_eq!(preflighted.status, StatusCode::OK);
    assert_eq!(allowed(&preflighted), "*");
    assert_eq!(preflighted.header("access-control-allow-methods"), "GET,HEAD");
    assert!(preflighted.header("access-control-allow-headers").contains("range"));
    assert_eq!(preflighted.header("access-control-max-age"), "86400");

    let origins = "[\"https://app.example\", \"https://other.example\"]";
    let listed = Server::on(&redis, &[("http.cors_origins", origins)]).await;
    let answer = from(&listed, "https://app.example").await;
    assert_eq!(allowed(&answer), "https://app.example");
    assert_eq!(allowed(&from(&listed, "https://evil.example").await), "");
    for origin in ["https://app.example", "https://evil.example"] {
        let answer = from(&listed, origin).await;
        let vary: Vec<_> = answer.headers.get_all("vary").iter().collect();
        // One field line, since nginx 1.22 reads only one.
        assert_eq!(vary, ["Accept-Encoding, origin"]);
    }
    assert_eq!(allowed(&preflight(&listed, "https://evil.example").await), "");
    // Errors carry the CORS headers too, so that a script can read their status.
    let fields = [("origin", "https://app.example")];
    for (path, status) in [("/images/absent", 404), ("/images/a/b", 400)] {
        let answer = get(listed.address, path, &fields).await;
        assert_eq!(
            (answer.status.as_u16(), allowed(&answer).as_str()),
            (status, "https://app.example")
        );
    }
}

#[tokio::test]
async fn an_svg_is_compressed_by_accept_encoding_with_an_etag_for_each_coding() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let drawing = drawing();
    let value = record(drawing.as_bytes());
    redis.set("a", &value).await;
    let version = etag(&value).trim_matches('"').to_owned();

    for _ in ["cold", "hit"] {
        for (accepted, coding) in [
            ("gzip, deflate, br, zstd", "br"),
            ("gzip, deflate", "gzip"),
            ("br;q=0.5, gzip;q=0.6", "gzip"),
            ("br;q=0, *", "gzip"),
            ("br;q=0.5, identity", ""),
            ("gzip;q=0", ""),
            ("zstd", ""),
            ("", ""),
            // No coding is acceptable: the image is sent all the same (RFC 9110 §12.5.3).
            ("identity;q=0", ""),
        ] {
            let answer = get(server.address, "/images/a", &[("accept-encoding", accepted)]).await;
            assert_eq!(answer.status, StatusCode::OK, "{accepted}");
            assert_eq!(answer.header("content-encoding"), coding, "{accepted}");
            let tag =
                if coding.is_empty() { version.clone() } else { format!("{version}-{coding}1") };
            assert_eq!(answer.header("etag"), format!("\"{tag}\""));
            // A client may use the entity-tag as the version.
            let versioned = server.get(&format!("/images/a?v={tag}")).await;
            assert_eq!(versioned.header("cache-control"), "public, max-age=31536000, immutable");
            assert_eq!(answer.header("content-length"), answer.body.len().to_string());
            assert_eq!(answer.header("content-type"), "image/svg+xml");
            assert!(answer.header("content-security-policy").contains("sandbox"));
            assert_eq!(decoded(coding, &answer.body), drawing.as_bytes());

            let fields = [("accept-encoding", accepted)];
            let mut client = Client::connect(server.address).await;
            let head = client.send(Method::HEAD, "/images/a", &fields, Bytes::new()).await.unwrap();
            for name in ["content-encoding", "content-length", "etag"] {
                assert_eq!(head.header(name), answer.header(name), "{name} for {accepted}");
            }
        }
    }
    // All codings come from one fetch, and are one cache entry.
    assert_eq!(server.metric("afterimage_fetches_total").await, 1);
    assert_eq!(server.metric("afterimage_cache_images").await, 1);
}

#[tokio::test]
async fn raster_images_are_never_compressed_again() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let mut compressible = png(1, 8);
    compressible.resize(100_000, 0);
    redis.set("a", &record(&compressible)).await;
    let answer = get(server.address, "/images/a", &[("accept-encoding", "br, gzip")]).await;
    assert_eq!(answer.header("content-encoding"), "");
    assert_eq!(answer.body, compressible);
}

fn decoded(coding: &str, body: &[u8]) -> Vec<u8> {
    let mut decoded = Vec::new();
    match coding {
        "br" => brotli::Decompressor::new(body, 4096).read_to_end(&mut decoded).unwrap(),
        "gzip" => flate2::read::GzDecoder::new(body).read_to_end(&mut decoded).unwrap(),
        _ => return body.to_vec(),
    };
    decoded
}
