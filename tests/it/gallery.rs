//! The gallery: who may see it, its listing and its figures, and the page itself in Chromium.

use std::collections::HashSet;
use std::net::SocketAddr;

use bytes::Bytes;
use hyper::{Method, StatusCode};
use image::ImageFormat;
use redis::AsyncTypedCommands;
use serde_json::Value;

use crate::browser::passes_checks;
use crate::events::Events;
use crate::harness::server::program_with_rights;
use crate::harness::{Answer, Client, RedisServer, Server, etag, get, png, record, until};
use crate::variants::{encoded, picture};

long_tests! {
    #[tokio::test(flavor = "multi_thread")]
    the_gallery_stores_shows_replaces_and_removes_images_in_chromium
}

const TOKEN: &str = "a-token-of-some-length";
const BEARER: (&str, &str) = ("authorization", "Bearer a-token-of-some-length");
const SETTINGS: [(&str, &str); 3] = [
    ("gallery.enabled", "true"),
    ("writes.tokens", r#"["a-token-of-some-length"]"#),
    ("events.prefix", "token"),
];

async fn start(redis: &RedisServer) -> Server {
    Server::on(redis, &SETTINGS).await.coherent().await
}

async fn json(address: SocketAddr, path: &str) -> Value {
    let answer = get(address, path, &[BEARER]).await;
    assert_eq!(answer.status, StatusCode::OK, "{path}: {answer:?}");
    assert_eq!(answer.header("cache-control"), "no-store");
    assert_eq!(answer.header("cross-origin-resource-policy"), "same-origin");
    serde_json::from_slice(&answer.body).unwrap()
}

async fn send(
    address: SocketAddr,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
    body: Bytes,
) -> Answer {
    Client::connect(address).await.send(method, path, headers, body).await.unwrap()
}

/// Begins a session, and returns its cookie as it is sent back.
async fn session(address: SocketAddr) -> String {
    let answer = send(address, Method::POST, "/session", &[BEARER], Bytes::new()).await;
    assert_eq!(answer.status, StatusCode::NO_CONTENT);
    let cookie = answer.header("set-cookie");
    let (pair, attributes) = cookie.split_once(';').unwrap();
    assert_eq!(attributes, " Path=/; HttpOnly; SameSite=Strict");
    assert!(pair.starts_with(&format!("afterimage_{}=", address.port())), "{pair}");
    assert!(!pair.contains(TOKEN));
    pair.to_owned()
}

/// The images of all pages.
async fn listed(address: SocketAddr, parameters: &str) -> Vec<Value> {
    let (mut images, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = json(address, &format!("/images?{parameters}&cursor={cursor}")).await;
        images.extend(page["images"].as_array().unwrap().iter().cloned());
        match page["next"].as_str() {
            Some(next) => next.clone_into(&mut cursor),
            None => return images,
        }
    }
}

#[tokio::test]
async fn only_those_with_a_token_see_the_gallery_under_a_name_of_the_servers_own() {
    let redis = RedisServer::start().await;
    let server = start(&redis).await;
    let at = server.address;
    for path in ["/images", "/status", "/debug/images/a"] {
        get(at, path, &[]).await.problem(401, "unauthorised");
        let wrong = [("authorization", "Bearer another-token-of-some-length")];
        get(at, path, &wrong).await.problem(401, "invalid-token");
        json(at, path).await;
    }
    for path in ["/", "/status", "/debug/images/a"] {
        let rebound = [BEARER, ("host", "evil.example")];
        get(at, path, &rebound).await.problem(421, "misdirected");
    }
    let page = get(at, "/", &[]).await;
    assert_eq!(page.status, StatusCode::OK);
    assert_eq!(page.header("cache-control"), "no-store");
    assert_eq!(page.header("x-robots-tag"), "noindex");
    assert_eq!(page.header("x-content-type-options"), "nosniff");
    let policy = page.header("content-security-policy");
    assert!(policy.starts_with("default-src 'none'; script-src 'sha256-"), "{policy}");
    assert!(!policy.contains("unsafe"), "{policy}");
}

#[tokio::test]
async fn a_session_lists_and_writes_only_from_its_own_page() {
    let redis = RedisServer::start().await;
    let server = start(&redis).await;
    let at = server.address;
    let refused = send(at, Method::POST, "/session", &[], Bytes::new()).await;
    refused.problem(401, "unauthorised");
    let cookie = session(at).await;
    let cookie = ("cookie", cookie.as_str());
    let origin = format!("http://{at}");

    for (from, is_allowed) in [
        (None, true),
        (Some("same-origin"), true),
        (Some("none"), true),
        (Some("same-site"), false),
    ] {
        let mut headers = vec![("cookie", "other=1"), cookie];
        headers.extend(from.map(|from| ("sec-fetch-site", from)));
        let status = get(at, "/images", &headers).await.status;
        assert_eq!(status == StatusCode::OK, is_allowed, "{from:?}: {status}");
    }
    Events::with(at, "prefix=&from=now", &[cookie]).await;

    let image = Bytes::from(png(1, 1000));
    for (further, is_allowed) in [
        (vec![], false),
        (vec![("sec-fetch-site", "none")], false),
        (vec![("sec-fetch-site", "same-site"), ("origin", "http://127.0.0.1:1")], false),
        (vec![("origin", "http://127.0.0.1:1")], false),
        (vec![("origin", "null")], false),
        (vec![("sec-fetch-site", "same-origin")], true),
        (vec![("origin", origin.as_str())], true),
    ] {
        let headers = [&[cookie, ("content-type", "image/png")], &further[..]].concat();
        let status = send(at, Method::PUT, "/images/a", &headers, image.clone()).await.status;
        assert_eq!(status.is_success(), is_allowed, "{further:?}: {status}");
        assert!(is_allowed || status == StatusCode::UNAUTHORIZED);
    }

    let ended = send(at, Method::DELETE, "/session", &[cookie], Bytes::new()).await;
    assert!(
        ended.header("set-cookie").ends_with("=; Path=/; HttpOnly; SameSite=Strict; Max-Age=0")
    );
    let tls = [BEARER, ("origin", "https://gallery.example")];
    let secure = send(at, Method::POST, "/session", &tls, Bytes::new()).await;
    assert!(secure.header("set-cookie").ends_with("; SameSite=Strict; Secure"));
    // That of another port, or of another token, is none.
    let forged = format!("afterimage_{}={}", at.port(), "0".repeat(64));
    get(at, "/images", &[("cookie", &forged)]).await.problem(401, "unauthorised");
}

#[tokio::test]
async fn a_listing_tells_what_is_known_and_reads_nothing() {
    let redis = RedisServer::start().await;
    let server = start(&redis).await;
    let at = server.address;
    let picture = encoded(&picture(1, 40, 30), ImageFormat::Png);
    redis.set("known", &record(&picture)).await;
    redis.set("unread", &record(&png(1, 1000))).await;
    redis.set("bad", b"<b>no</b>").await;
    let mut commands = redis.connect().await;
    commands.rpush("image:list", "x").await.unwrap();
    commands.expire("image:known", 100).await.unwrap();
    server.get("/images/bad").await.problem(502, "corrupt-record");
    assert_eq!(server.get("/images/known/info").await.status, StatusCode::OK);
    until("the image is answered from memory", || async {
        server.get("/images/known").await.header("cache-status") == "afterimage; hit"
    })
    .await;

    redis.reset_calls().await;
    let mut images = listed(at, "limit=10").await;
    assert!(!redis.calls().await.contains_key("get"));
    images.sort_by_key(|image| image["id"].as_str().unwrap().to_owned());
    let [bad, known, list, unread] = &images[..] else { panic!("{images:?}") };
    assert_eq!((&bad["state"], &bad["record_bytes"]), (&"corrupt".into(), &9.into()));
    assert_eq!(bad["reason"], "the value isn't JSON (line 1, column 1)");
    assert_eq!((&list["state"], &list["record_bytes"]), (&"corrupt".into(), &Value::Null));
    assert_eq!(list["reason"], "the key doesn't hold a string");
    assert_eq!((&unread["state"], &unread["expires_in"]), (&"unread".into(), &Value::Null));
    assert_eq!(unread["record_bytes"], record(&png(1, 1000)).len());
    assert_eq!(known["state"], "present");
    assert_eq!(known["etag"], etag(&record(&picture)));
    assert_eq!((&known["width"], &known["height"]), (&40.into(), &30.into()));
    assert_eq!((&known["type"], &known["in_memory"]), (&"image/png".into(), &true.into()));
    assert!((90..=100).contains(&known["expires_in"].as_u64().unwrap()));
    let hits = known["hits"].as_u64().unwrap();
    server.get("/images/known").await;
    server.get("/images/known/thumbnail").await;
    assert_eq!(listed(at, "prefix=kn").await[0]["hits"], hits + 1);
}

#[tokio::test]
async fn the_pages_of_a_listing_have_every_image_and_bad_parameters_are_named() {
    let redis = RedisServer::start().await;
    let server = start(&redis).await;
    let at = server.address;
    let mut commands = redis::pipe();
    for number in 0..2500 {
        commands.cmd("SET").arg(format!("image:n{number}")).arg("x");
        commands.cmd("SET").arg(format!("other:{number}")).arg("x");
    }
    commands.exec_async(&mut redis.connect().await).await.unwrap();
    for (parameters, expected) in [("limit=1000", 2500), ("limit=37&prefix=n1", 1111)] {
        let images = listed(at, parameters).await;
        let ids: HashSet<_> = images.iter().map(|image| image["id"].as_str().unwrap()).collect();
        assert_eq!(ids.len(), expected, "{parameters}");
    }
    assert!(listed(at, "prefix=absent").await.is_empty());
    for (parameters, named) in [
        ("limit=0", "`limit` must be from 1 to 1000"),
        ("limit=1001", "`limit` must be from 1 to 1000"),
        ("limit=x", "limit"),
        ("prefix=a/b", "prefix is the beginning of an id"),
        ("page=2", "prefix, cursor and limit"),
    ] {
        let problem = get(at, &format!("/images?{parameters}"), &[BEARER]).await;
        let problem = problem.problem(400, "bad-parameter");
        assert!(problem["detail"].as_str().unwrap().contains(named), "{problem}");
    }
    let odd = json(at, "/images?cursor=never-handed-out").await;
    assert_eq!((&odd["images"], &odd["next"]), (&Value::Array(Vec::new()), &Value::Null));
}

#[tokio::test]
async fn a_stream_of_changes_begins_with_none_and_tells_all_that_a_page_needs() {
    let redis = RedisServer::start().await;
    let server = start(&redis).await;
    let at = server.address;
    redis.set("before", &record(&png(1, 1000))).await;
    server.get("/images/before").await;
    get(at, "/events?ids=a&from=now", &[]).await.problem(400, "bad-parameter");
    get(at, "/events?prefix=a&from=then", &[BEARER]).await.problem(400, "bad-parameter");

    let mut events = Events::with(at, "prefix=&from=now", &[BEARER]).await;
    let picture = encoded(&picture(1, 40, 30), ImageFormat::Png);
    let mut commands = redis.connect().await;
    commands.set_ex("image:a", record(&picture), 1000).await.unwrap();
    let event = events.next().await;
    assert_eq!((event.name.as_str(), event.of().as_str()), ("concept_progress", "a"));
    let data = event.data();
    assert_eq!(data["full"], format!("/images/a?v={}", event.id));
    assert_eq!((&data["width"], &data["height"]), (&40.into(), &30.into()));
    assert_eq!((&data["type"], &data["bytes"]), (&"image/png".into(), &picture.len().into()));
    assert!(data["thumbhash"].as_str().is_some_and(|hash| hash.len() > 20));
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let left = data["expires_at"].as_u64().unwrap() - now.as_secs();
    assert!((990..=1001).contains(&left), "{left}");

    redis.set("a", b"no image").await;
    let event = events.next().await;
    assert_eq!((event.name.as_str(), event.of().as_str()), ("concept_absent", "a"));
    assert_eq!(event.data()["reason"], "the value isn't JSON (line 1, column 2)");
    commands.del("image:a").await.unwrap();
    let event = events.next().await;
    assert_eq!((event.name.as_str(), &event.data()["reason"]), ("concept_absent", &Value::Null));
    // A picture that can't be decoded has no size.
    redis.set("odd", &record(&png(1, 1000))).await;
    let event = events.next().await;
    assert_eq!((&event.data()["width"], &event.data()["thumbhash"]), (&Value::Null, &Value::Null));
    assert_eq!(event.data()["bytes"], 1000);

    // Any image may have changed, and the same state may be news again.
    commands.flushall().await.unwrap();
    assert_eq!(events.next().await.name, "concept_resync");
    redis.set("odd", &record(&png(1, 1000))).await;
    assert_eq!(events.next().await.of(), "odd");
}

#[tokio::test]
async fn the_status_and_what_is_known_of_a_key_are_told_without_secrets() {
    let redis = RedisServer::start().await;
    let url = format!("redis://app:secret@127.0.0.1:{}/0", redis.port);
    let mut commands = redis.connect().await;
    let () = redis::cmd("ACL")
        .arg(&["SETUSER", "app", "on", ">secret", "~*", "&*", "+@all"])
        .query_async(&mut commands)
        .await
        .unwrap();
    let settings = [&SETTINGS[..], &[("redis.url", url.as_str())]].concat();
    let server = Server::start(&settings).await.coherent().await;
    let at = server.address;
    redis.set("a", &record(&png(1, 1000))).await;
    assert_eq!(json(at, "/debug/images/b").await["state"], "unknown");
    for _ in 0..4 {
        server.get("/images/a").await;
    }
    until("the image is answered from memory", || async {
        server.get("/images/a").await.header("cache-status") == "afterimage; hit"
    })
    .await;
    let status = json(at, "/status").await;
    assert_eq!(status["coherence"]["state"], "coherent");
    assert_eq!(status["store"]["address"], format!("redis://127.0.0.1:{}/0", redis.port));
    assert!(!status.to_string().contains("secret"));
    assert_eq!((&status["memory"]["images"], &status["known_keys"]), (&1.into(), &1.into()));
    for window in ["10s", "1m", "10m"] {
        let reads = &status["reads"][window];
        assert!(reads["requests"].as_u64().unwrap() >= 5, "{reads}");
        assert!(reads["p50_us"].is_u64() && reads["p99_us"].is_u64(), "{reads}");
    }

    let known = json(at, "/debug/images/a").await;
    assert_eq!((&known["state"], &known["current"]), (&"present".into(), &true.into()));
    assert_eq!((&known["key"], &known["fetch_under_way"]), (&"image:a".into(), &false.into()));
    assert_eq!(known["epoch"], known["present_epoch"]);
    assert_eq!(known["representations"][0]["bytes"], 1000);
    assert_eq!((&known["memory_bytes"], &known["expires_in"]), (&2024.into(), &Value::Null));
    redis.set("a", b"no image").await;
    until("the push is known", || async { json(at, "/debug/images/a").await["replaced"] == true })
        .await;
    server.get("/images/a").await.problem(502, "corrupt-record");
    let known = json(at, "/debug/images/a").await;
    assert_eq!((&known["state"], &known["replaced"]), (&"corrupt".into(), &false.into()));
    assert!(known["last_push_ms_ago"].is_u64(), "{known}");
}

#[tokio::test]
async fn with_an_admin_listener_the_gallery_is_there_alone() {
    let redis = RedisServer::start().await;
    let settings = [&SETTINGS[..], &[("admin.listen", "127.0.0.1:0")]].concat();
    let server = Server::on(&redis, &settings).await;
    redis.set("a", &record(&png(1, 1000))).await;
    for path in ["/", "/status", "/debug/images/a"] {
        get(server.address, path, &[BEARER]).await.problem(404, "unknown-address");
    }
    get(server.address, "/images", &[BEARER]).await.problem(405, "method-not-allowed");
    for path in ["/", "/status", "/debug/images/a", "/images", "/images/a", "/metrics"] {
        assert_eq!(get(server.admin, path, &[BEARER]).await.status, StatusCode::OK, "{path}");
    }
}

#[tokio::test]
async fn a_gallery_that_is_switched_off_is_nowhere() {
    let redis = RedisServer::start().await;
    let settings = [&SETTINGS[1..], &[("gallery.enabled", "false")]].concat();
    let server = Server::on(&redis, &settings).await;
    for path in ["/", "/status", "/debug/images/a"] {
        get(server.address, path, &[BEARER]).await.problem(404, "unknown-address");
    }
    get(server.address, "/images", &[BEARER]).await.problem(405, "method-not-allowed");
}

#[tokio::test]
async fn what_is_printed_at_the_start_has_no_token_unless_a_person_reads_it() {
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;
    let dir = tempfile::tempdir().unwrap();
    let mut command = program_with_rights(dir.path());
    command.args(["--embedded-dir", dir.path().to_str().unwrap(), "--embedded-demo", "false"]);
    command.args(["--http-listen", "127.0.0.1:0"]).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut lines = lines.skip_while(|line| !line.starts_with("Gallery"));
    assert!(lines.next().is_some());
    let address = lines.next().unwrap();
    assert!(address.starts_with("  http://127.0.0.1:") && address.ends_with('/'), "{address}");
    child.kill().unwrap();
    child.wait().unwrap();
}

async fn the_gallery_stores_shows_replaces_and_removes_images_in_chromium() {
    let redis = RedisServer::start().await;
    let server = start(&redis).await;
    let address = format!("http://{}/#token={TOKEN}", server.address);
    let images = std::env::var("AFTERIMAGE_TEST_GALLERY_IMAGES");
    let images = images.as_deref().unwrap_or("20000");
    passes_checks("gallery.mjs", &[&address, &redis.port.to_string(), images]).await;
}
