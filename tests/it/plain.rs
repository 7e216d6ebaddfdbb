//! Responses of the fast loop and from cached heads, against those of the HTTP library and the router: they must not
//! differ.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::conditional::drawing;
use crate::harness::{Client, Protocol, RedisServer, Server, etag, png, record};
use crate::variants::{encoded, picture};

long_tests! {
    #[tokio::test] the_fast_path_answers_exactly_as_the_http_library_does
}

/// A response as on the wire.
#[derive(Debug, Clone, PartialEq)]
struct Raw {
    status: String,
    /// Header fields, without those that differ for each response.
    fields: BTreeMap<String, String>,
    body: Vec<u8>,
}

async fn read(stream: &mut TcpStream, head_only: bool) -> Raw {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.trim_end().split("\r\n");
    let status = lines.next().unwrap().to_owned();
    let mut fields: BTreeMap<String, String> = BTreeMap::new();
    for line in lines {
        let (name, value) = line.split_once(": ").unwrap();
        assert!(fields.insert(name.to_owned(), value.to_owned()).is_none(), "{name} twice: {head}");
    }
    for name in ["date", "x-request-id"] {
        assert!(fields.remove(name).is_some_and(|it| !it.is_empty()), "{name} isn't in {head}");
    }
    let length = fields.get("content-length").map_or(0, |it| it.parse().unwrap());
    let empty = head_only || status.contains(" 304 ");
    let mut body = vec![0; if empty { 0 } else { length }];
    stream.read_exact(&mut body).await.unwrap();
    Raw { status, fields, body }
}

async fn ask(address: SocketAddr, request: &str) -> Raw {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    read(&mut stream, request.starts_with("HEAD")).await
}

/// Sends the request over HTTP/2, and returns the response as it would be over HTTP/1.1.
async fn ask_over_http_2(address: SocketAddr, method: &str, path: &str, fields: &[String]) -> Raw {
    let mut client = Client::speaking(Protocol::Http2, address).await;
    let fields = fields.iter().flat_map(|it| it.split("\r\n"));
    let fields: Vec<_> = fields.map(|it| it.split_once(": ").unwrap()).collect();
    let answer = client.send(method.parse().unwrap(), path, &fields, Bytes::new()).await.unwrap();
    let reason = answer.status.canonical_reason().unwrap();
    let status = format!("HTTP/1.1 {} {reason}", answer.status.as_u16());
    let mut fields: BTreeMap<String, String> = BTreeMap::new();
    for (name, value) in &answer.headers {
        let value = value.to_str().unwrap().to_owned();
        assert!(fields.insert(name.to_string(), value).is_none(), "{name} twice: {answer:?}");
    }
    for name in ["date", "x-request-id"] {
        assert!(fields.remove(name).is_some_and(|it| !it.is_empty()), "{name}: {answer:?}");
    }
    Raw { status, fields, body: answer.body.to_vec() }
}

async fn the_fast_path_answers_exactly_as_the_http_library_does() {
    let redis = RedisServer::start().await;
    for settings in [
        vec![],
        vec![("http.cors_origins", "[\"*\"]")],
        vec![("http.cors_origins", "[\"https://app.example\"]")],
        vec![("redis.tracking", "false")],
    ] {
        let server = Server::on(&redis, &settings).await;
        if !settings.contains(&("redis.tracking", "false")) {
            crate::harness::until("coherent", || async { server.coherence().await == "coherent" })
                .await;
        }
        let value = record(&png(1, 3000));
        redis.set("a", &value).await;
        redis.set("svg", &record(drawing().as_bytes())).await;
        redis.set("corrupt", b"{}").await;
        let photo = record(&encoded(&picture(1, 100, 50), image::ImageFormat::Png));
        redis.set("photo", &photo).await;
        let tag = etag(&value);
        let version = tag.trim_matches('"');
        let wrong = "0".repeat(32);
        let mut requests: Vec<(String, Vec<String>)> = Vec::new();
        // Variants, thumbnails and coded representations are replayed like originals.
        let photo_version = etag(&photo).trim_matches('"').to_owned();
        let variant_tag = {
            let answer = server.get("/images/photo.webp?w=64").await;
            format!("If-None-Match: {}", answer.header("etag"))
        };
        for path in [
            "/images/photo?w=64".to_owned(),
            "/images/photo.webp?w=64".to_owned(),
            format!("/images/photo.webp?w=64&v={photo_version}"),
            format!("/images/photo.webp?w=64&v={wrong}"),
            "/images/photo.png".to_owned(),
            "/images/photo?format=auto".to_owned(),
            "/images/photo?w=64&fallback=placeholder".to_owned(),
            "/images/photo?w=65".to_owned(),
            "/images/photo/thumbnail".to_owned(),
            format!("/images/photo/thumbnail?v={photo_version}"),
            "/images/photo/info".to_owned(),
            "/images/photo.webp/thumbnail".to_owned(),
            "/images/svg?format=auto".to_owned(),
        ] {
            for field in [
                "Accept: image/webp,*/*;q=0.5".to_owned(),
                "Accept: image/jpeg".to_owned(),
                "Accept: text/html\r\nAccept-Encoding: gzip".to_owned(),
                "Accept-Encoding: br".to_owned(),
                format!("If-None-Match: {tag}"),
                variant_tag.clone(),
            ] {
                requests.push((path.clone(), vec![field]));
            }
            requests.push((path, vec![]));
        }
        for path in [
            "/images/a".to_owned(),
            format!("/images/a?v={version}"),
            format!("/images/a?v={wrong}"),
            format!("/images/a?v=%22{version}%22"),
            "/images/a?".to_owned(),
            "/images/%61".to_owned(),
            "/images/a?w=64".to_owned(),
            "/images/svg".to_owned(),
            "/images/absent".to_owned(),
            "/images/corrupt".to_owned(),
            "/images/-".to_owned(),
            "/images/a/b".to_owned(),
            "/images/".to_owned(),
            "/placeholders/64x64?text=".to_owned(),
        ] {
            requests.push((path, vec![]));
        }
        for field in [
            format!("If-None-Match: {tag}"),
            format!("If-None-Match: W/{tag}"),
            format!("If-None-Match: \"x\", {tag}"),
            format!("If-None-Match: \"x\"\r\nIf-None-Match: {tag}"),
            "If-None-Match: *".to_owned(),
            "If-None-Match: \"x\"".to_owned(),
            format!("If-None-Match: {version}"),
            "If-None-Match: ".to_owned(),
            format!("If-Match: {tag}"),
            "If-Match: \"x\"".to_owned(),
            "Range: bytes=0-9".to_owned(),
            format!("Range: bytes=0-9\r\nIf-Range: {tag}"),
            "If-Modified-Since: Thu, 01 Jan 2099 00:00:00 GMT".to_owned(),
            "If-Unmodified-Since: Thu, 01 Jan 1998 00:00:00 GMT".to_owned(),
            "Accept-Encoding: gzip, br".to_owned(),
            "Origin: https://app.example".to_owned(),
            "Cookie: a=b\r\nX-Forwarded-For: 192.0.2.1\r\nAccept: image/webp".to_owned(),
        ] {
            for path in
                ["/images/a".to_owned(), format!("/images/a?v={version}"), "/images/svg".into()]
            {
                requests.push((path, vec![field.clone()]));
            }
        }
        for (number, (path, fields)) in requests.into_iter().enumerate() {
            for method in ["GET", "HEAD"] {
                let mut lines = vec![format!("{method} {path} HTTP/1.1"), "Host: a.example".into()];
                lines.extend_from_slice(&fields);
                let plain = lines.join("\r\n") + "\r\n\r\n";
                // An unknown upgrade is ignored, but keeps the request off the fast path.
                let other = plain.replace("\r\n\r\n", "\r\nUpgrade: nothing\r\n\r\n");
                // One request first, so that the image is known.
                ask(server.address, &other).await;
                let library = ask(server.address, &other).await;
                // The first response is the router's; later ones repeat its cached head, over both protocols.
                for turn in 0..4 {
                    let mut library = library.clone();
                    let answer = if (number + turn) % 2 == 0 {
                        ask(server.address, &plain).await
                    } else {
                        // `Connection` exists over HTTP/1 only.
                        library.fields.remove("connection");
                        ask_over_http_2(server.address, method, &path, &fields).await
                    };
                    assert_eq!(answer.status, library.status, "{turn} {plain}");
                    let timed = |raw: &Raw| {
                        let mut fields = raw.fields.clone();
                        // Timings differ unless the response is a hit.
                        let timing = fields.remove("server-timing");
                        (fields, timing.as_deref() == Some("store;dur=0"))
                    };
                    assert_eq!(timed(&answer), timed(&library), "{turn} {plain}");
                    assert_eq!(answer.body, library.body, "{turn} {plain}");
                }
            }
        }
    }
}

#[tokio::test]
async fn pipelined_requests_are_answered_in_order() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    for (id, length) in [("a", 10), ("b", 300_000), ("c", 5000)] {
        redis.set(id, &record(&png(1, length))).await;
    }
    let lengths = [("a", 10), ("b", 300_000), ("absent", 0), ("c", 5000), ("a", 10)];
    for _ in 0..3 {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let request = |(id, _)| format!("GET /images/{id} HTTP/1.1\r\nHost: a.example\r\n\r\n");
        let ahead = lengths.map(request).concat();
        stream.write_all(ahead.as_bytes()).await.unwrap();
        for (id, length) in lengths {
            let answer = read(&mut stream, false).await;
            if id == "absent" {
                assert_eq!(answer.status, "HTTP/1.1 404 Not Found");
            } else {
                assert_eq!(answer.body, png(1, length), "{id}");
            }
        }
    }
}

#[tokio::test]
async fn a_request_in_pieces_is_answered_and_the_connection_stays_open() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    redis.set("a", &record(&png(1, 5000))).await;
    let request = "GET /images/a HTTP/1.1\r\nHost: a.example\r\n\r\n";
    for cut in [1, 10, request.len() - 3, request.len() - 1] {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        for _ in 0..2 {
            stream.write_all(&request.as_bytes()[..cut]).await.unwrap();
            // The pause lets the server read the first piece alone.
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            stream.write_all(&request.as_bytes()[cut..]).await.unwrap();
            assert_eq!(read(&mut stream, false).await.body, png(1, 5000));
            // A request in one piece.
            stream.write_all(request.as_bytes()).await.unwrap();
            assert_eq!(read(&mut stream, false).await.body, png(1, 5000));
        }
    }
}

#[tokio::test]
async fn a_head_cached_for_a_wrong_v_is_not_replayed_for_the_right_one() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    for (id, protocol) in [("a", Protocol::Http1), ("b", Protocol::Http2)] {
        let value = record(&png(1, 3000));
        redis.set(id, &value).await;
        let tag = etag(&value);
        let version = tag.trim_matches('"').to_owned();
        let mut client = Client::speaking(protocol, server.address).await;
        let wrong = "0".repeat(32);
        let other = format!("{}&format=auto", &version[..20]);
        for fields in [vec![], vec![("if-none-match", tag.as_str())]] {
            for named in [&wrong, &wrong, &other, &other] {
                client.get(&format!("/images/{id}?v={named}"), &fields).await;
            }
            let raw = format!("GET /images/{id}#?v={version} HTTP/1.1\r\nHost: a.example\r\n\r\n");
            for _ in 0..2 {
                ask(server.address, &raw).await;
            }
            for _ in 0..3 {
                let answer = client.get(&format!("/images/{id}?v={version}"), &fields).await;
                let cache_control = answer.header("cache-control");
                assert_eq!(
                    cache_control, "public, max-age=31536000, immutable",
                    "{protocol:?} {fields:?}"
                );
                assert_eq!(answer.header("vary"), "Accept-Encoding");
            }
        }
    }
}

#[tokio::test]
async fn a_cached_head_is_not_replayed_for_the_next_version_over_http_2() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let mut client = Client::speaking(Protocol::Http2, server.address).await;
    for seed in 0..200 {
        let image = png(seed, 1000 + usize::try_from(seed).unwrap());
        let value = record(&image);
        redis.set("a", &value).await;
        let tag = etag(&value);
        // The new version comes as soon as the push has arrived, and stays.
        while client.get("/images/a", &[]).await.header("etag") != tag {}
        for _ in 0..3 {
            let answer = client.get("/images/a", &[]).await;
            assert_eq!((answer.header("etag"), &answer.body[..]), (&*tag, &image[..]));
            let answer = client.get("/images/a", &[("if-none-match", &tag)]).await;
            assert_eq!((answer.status.as_u16(), answer.header("etag")), (304, &*tag));
        }
    }
}

#[tokio::test]
async fn a_cached_head_is_not_replayed_for_the_next_version() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    for seed in 0..200 {
        let value = record(&png(seed, 1000 + usize::try_from(seed).unwrap()));
        redis.set("a", &value).await;
        let tag = etag(&value);
        // The new version comes as soon as the push has arrived, and stays.
        loop {
            let request = "GET /images/a HTTP/1.1\r\nHost: a.example\r\n\r\n";
            stream.write_all(request.as_bytes()).await.unwrap();
            let answer = read(&mut stream, false).await;
            if answer.fields["etag"] == tag {
                assert_eq!(answer.body, png(seed, 1000 + usize::try_from(seed).unwrap()));
                break;
            }
        }
        for _ in 0..3 {
            let request = format!(
                "GET /images/a HTTP/1.1\r\nHost: a.example\r\nIf-None-Match: {tag}\r\n\r\n"
            );
            stream.write_all(request.as_bytes()).await.unwrap();
            let answer = read(&mut stream, false).await;
            assert_eq!(
                (answer.status.as_str(), &answer.fields["etag"]),
                ("HTTP/1.1 304 Not Modified", &tag)
            );
        }
    }
}

#[tokio::test]
async fn variants_and_thumbnails_of_the_next_version_are_its_own() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let mut client = Client::speaking(protocol, server.address).await;
        for seed in 0..5 {
            let value = record(&encoded(&picture(seed, 100, 50), image::ImageFormat::Png));
            redis.set("a", &value).await;
            let version = etag(&value).trim_matches('"').to_owned();
            while !client.get("/images/a", &[]).await.header("etag").contains(&version) {}
            for path in ["/images/a?w=64", "/images/a/thumbnail", "/images/a.webp"] {
                let first = client.get(path, &[]).await;
                assert!(first.header("etag").contains(&version), "{path} {protocol:?}");
                for _ in 0..4 {
                    let again = client.get(path, &[]).await;
                    assert_eq!(again.header("etag"), first.header("etag"), "{path} {protocol:?}");
                    assert_eq!(again.body, first.body, "{path} {protocol:?}");
                    let tag = first.header("etag").to_owned();
                    let fields = [("if-none-match", tag.as_str())];
                    assert_eq!(client.get(path, &fields).await.status.as_u16(), 304);
                }
            }
        }
    }
}

#[tokio::test]
async fn a_moving_picture_stays_one_where_the_format_is_left_to_the_server() {
    let redis = RedisServer::start().await;
    let limits = [("pictures.max_animation_frames", "1")];
    let server = Server::on(&redis, &limits).await.coherent().await;
    let moving = crate::variants::animation();
    redis.set("a", &record(&moving)).await;
    for protocol in [Protocol::Http1, Protocol::Http2] {
        let mut client = Client::speaking(protocol, server.address).await;
        for _ in 0..4 {
            let fields = [("accept", "image/webp,*/*")];
            let answer = client.get("/images/a?format=auto", &fields).await;
            assert_eq!(answer.header("content-type"), "image/gif", "{protocol:?}");
            assert_eq!(answer.body[..], moving[..], "{protocol:?}");
            let still = client.get("/images/a.webp", &fields).await;
            assert_eq!(still.header("content-type"), "image/webp", "{protocol:?}");
        }
    }
}

#[tokio::test]
async fn replayed_answers_are_counted_and_logged_over_either_protocol() {
    for (protocol, version) in [(Protocol::Http1, "HTTP/1.1"), (Protocol::Http2, "HTTP/2.0")] {
        let redis = RedisServer::start().await;
        let value = record(&encoded(&picture(1, 100, 50), image::ImageFormat::Png));
        redis.set("a", &value).await;
        let url = redis.url();
        let log = crate::operation::Logging::start(&["--redis-url", &url, "--log-format", "json"]);
        let address = log.process.address;
        crate::harness::until("coherent", || async {
            crate::harness::get(address, "/readyz", &[])
                .await
                .body
                .windows(10)
                .any(|it| it == b"\"coherent\"")
        })
        .await;
        let mut client = Client::speaking(protocol, address).await;
        let mut bytes = Vec::new();
        for (path, method) in [
            ("/images/a", "GET"),
            ("/images/a", "HEAD"),
            ("/images/a?w=64", "GET"),
            ("/images/a/thumbnail", "GET"),
        ] {
            for number in 0..5 {
                let id = format!("{method}-{}-{number}", path.len());
                let fields = [("x-request-id", id.as_str())];
                let method = method.parse().unwrap();
                let answer = client.send(method, path, &fields, Bytes::new()).await.unwrap();
                assert_eq!(answer.header("x-request-id"), id);
                bytes.push((id, path, answer.body.len()));
            }
        }
        crate::harness::until("the last one is over", || async {
            let page = crate::harness::get(address, "/metrics", &[]).await;
            crate::harness::server::metric(&page, "afterimage_requests_in_flight") == 0
        })
        .await;
        let page = crate::harness::get(address, "/metrics", &[]).await;
        let count = |labels: &str| {
            let name = format!("afterimage_requests_total{{{labels},status=\"200\"}}");
            crate::harness::server::metric(&page, &name)
        };
        assert_eq!(count("route=\"/images/{id}\",method=\"GET\""), 10);
        assert_eq!(count("route=\"/images/{id}\",method=\"HEAD\""), 5);
        assert_eq!(count("route=\"/images/{id}/thumbnail\",method=\"GET\""), 5);
        let metric = |name: &str| crate::harness::server::metric(&page, name);
        // The first was fetched, and two were rendered.
        assert_eq!(metric("afterimage_reads_total{served=\"hit\"}"), 17);
        let sent: usize = bytes.iter().map(|(_, _, length)| length).sum();
        assert!(metric("afterimage_response_bytes_total") >= sent as u64);
        drop(client);
        let log = log.end();
        let lines: Vec<serde_json::Value> =
            log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for (id, path, length) in bytes {
            let of_it: Vec<_> = lines.iter().filter(|line| line["id"] == *id).collect();
            let [line] = of_it[..] else { panic!("{id}: {of_it:?}") };
            assert_eq!((&line["path"], &line["bytes"]), (&path.into(), &length.into()), "{line}");
            assert_eq!((&line["version"], &line["whole"]), (&version.into(), &true.into()));
            assert_eq!(line["status"], 200);
        }
    }
}
