//! Event streams: current states on connect, changes afterwards, and their limits.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::HeaderMap;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use image::ImageFormat;
use redis::AsyncTypedCommands;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::server::{metric, program};
use crate::harness::{
    PATIENCE, Process, Proxy, RedisServer, Server, etag, get, png, record, until,
};
use crate::variants::{encoded, picture};

long_tests! {
    #[tokio::test(flavor = "multi_thread")] a_new_stream_never_gets_an_older_state_after_a_newer_one
    #[tokio::test(flavor = "multi_thread")] a_thumbnail_that_missed_the_render_timeout_is_sent_later
    #[tokio::test] a_slow_reader_gets_the_newest_state_instead_of_every_event
    #[tokio::test(flavor = "multi_thread")] a_thousand_streams_get_the_newest_state_under_a_hundred_writes_a_second
}

/// An event stream, read as it arrives.
pub(crate) struct Events {
    body: Incoming,
    text: String,
    headers: HeaderMap,
}

/// An event with its fields.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) id: String,
    data: Value,
}

impl Events {
    pub(crate) async fn of(address: SocketAddr, query: &str) -> Events {
        Events::with(address, query, &[]).await
    }

    /// The same with further headers, such as a token.
    pub(crate) async fn with(address: SocketAddr, query: &str, headers: &[(&str, &str)]) -> Events {
        let stream = TcpStream::connect(address).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut request = Request::builder()
            .uri(format!("/events?{query}"))
            .header("host", address.to_string())
            .header("accept", "text/event-stream");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Empty::<Bytes>::new()).unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
        assert_eq!(header("content-type"), "text/event-stream");
        assert_eq!(header("cache-control"), "no-cache, no-transform");
        let headers = response.headers().clone();
        let mut events = Events { body: response.into_body(), text: String::new(), headers };
        let first = events.block().await.unwrap();
        let retry: u32 = first.strip_prefix("retry: ").unwrap().parse().unwrap();
        assert!((1000..3000).contains(&retry));
        events
    }

    /// Reads the next block of lines; `None` at the end of the stream.
    pub(crate) async fn block(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.text.find("\n\n") {
                let rest = self.text.split_off(end + 2);
                let block = std::mem::replace(&mut self.text, rest);
                return Some(block.trim_end().to_owned());
            }
            let frame = tokio::time::timeout(PATIENCE, self.body.frame())
                .await
                .expect("nothing arrives on the stream");
            let data = frame?.ok()?.into_data().unwrap();
            self.text.push_str(std::str::from_utf8(&data).unwrap());
        }
    }

    /// Reads the next event, skipping comments.
    pub(crate) async fn next(&mut self) -> Event {
        let next = async {
            loop {
                let block = self.block().await.expect("the stream has ended");
                if block != ":" {
                    return Event::parse(&block);
                }
            }
        };
        tokio::time::timeout(PATIENCE, next).await.expect("only comments arrive on the stream")
    }

    /// Reads until there is an event for each of these ids, ignoring others.
    async fn next_of(&mut self, ids: &[&str]) -> HashMap<String, Event> {
        let mut found = HashMap::new();
        while found.len() < ids.len() {
            let event = self.next().await;
            if ids.contains(&event.of().as_str()) {
                found.insert(event.of(), event);
            }
        }
        found
    }
}

impl Event {
    fn parse(block: &str) -> Event {
        let field = |name: &str| {
            let lines =
                block.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            lines.collect::<Vec<_>>().join("\n")
        };
        let event = Event {
            name: field("event"),
            id: field("id"),
            data: serde_json::from_str(&field("data")).expect(block),
        };
        assert_eq!(event.data["type"], event.name, "{block}");
        event
    }

    /// The data about its image.
    pub(crate) fn data(&self) -> &Value {
        &self.data["data"]
    }

    /// The id of its image; empty for a list.
    pub(crate) fn of(&self) -> String {
        if self.name == "concept_list" {
            return String::new();
        }
        self.data["data"]["concept_id"].as_str().unwrap().to_owned()
    }

    /// A list of the images with a prefix.
    fn list(prefix: &str, complete: bool, ids: &[&str]) -> Event {
        let data = json!({"prefix": prefix, "complete": complete, "concept_ids": ids});
        let data = json!({"type": "concept_list", "data": data});
        Event { name: "concept_list".to_owned(), id: String::new(), data }
    }
}

/// Decodes the bytes in a data URL.
fn inlined(url: &Value, media_type: &str) -> Vec<u8> {
    let prefix = format!("data:{media_type};base64,");
    STANDARD.decode(url.as_str().unwrap().strip_prefix(&prefix).expect(&prefix)).unwrap()
}

fn drawn(seed: u8) -> Vec<u8> {
    encoded(&picture(seed, 96, 64), ImageFormat::Png)
}

#[tokio::test]
async fn a_stream_sends_the_current_state_and_every_change() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let first = drawn(1);
    redis.set("a", &record(&first)).await;
    let mut events = Events::of(server.address, "ids=a,b").await;
    assert_eq!(events.headers["x-accel-buffering"], "no");
    let mut known = events.next_of(&["a", "b"]).await;
    let version = etag(&record(&first)).trim_matches('"').to_owned();
    let a = known.remove("a").unwrap();
    assert_eq!((a.name.as_str(), &a.id), ("concept_progress", &version));
    let data = a.data["data"].as_object().unwrap();
    let names: HashSet<&str> = data.keys().map(String::as_str).collect();
    let all = "concept_id full thumbnail type bytes expires_at width height thumbhash";
    assert_eq!(names, all.split(' ').collect());
    assert_eq!(data["full"], format!("/images/a?v={version}"));
    let thumbnail = inlined(&data["thumbnail"], "image/webp");
    assert_eq!(thumbnail, server.get("/images/a/thumbnail").await.body);
    let full = server.get(data["full"].as_str().unwrap()).await;
    assert_eq!(full.body, first);
    assert!(full.header("cache-control").contains("31536000"), "{full:?}");
    let absent = json!({"type": "concept_absent", "data": {"concept_id": "b"}});
    assert_eq!(known["b"].data, absent);

    // Written, replaced, written again with the same value, removed, and expired.
    redis.set("b", &record(&drawn(2))).await;
    assert_eq!(events.next().await.of(), "b");
    redis.set("a", &record(&drawn(3))).await;
    let replaced = events.next().await;
    assert_eq!(replaced.id, etag(&record(&drawn(3))).trim_matches('"'));
    redis.set("a", &record(&drawn(3))).await;
    redis.connect().await.del("image:b").await.unwrap();
    assert_eq!(events.next().await.data, absent);
    let mut expiring = redis::cmd("SET");
    expiring.arg("image:b").arg(record(&drawn(4))).arg("PX").arg(300);
    expiring.exec_async(&mut redis.connect().await).await.unwrap();
    assert_eq!(events.next().await.name, "concept_progress");
    assert_eq!(events.next().await.data, absent);
    // A corrupt record counts as absent, and another image's changes aren't sent.
    redis.set("c", &record(&drawn(5))).await;
    redis.set("a", b"{}").await;
    assert_eq!(events.next().await.name, "concept_absent");
}

#[tokio::test]
async fn an_image_is_inlined_if_requested_and_small_enough() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("events.inline_bytes", "2KiB")]).await.coherent().await;
    let (small, large) = (drawn(1), png(2, 2049));
    assert!(small.len() <= 2048, "{}", small.len());
    redis.set("small", &record(&small)).await;
    redis.set("large", &record(&large)).await;
    let ids = ["small", "large"];
    let addresses =
        Events::of(server.address, "ids=small,large&inline=none").await.next_of(&ids).await;
    let version = &addresses["small"].id;
    assert_eq!(
        addresses["small"].data["data"]["thumbnail"],
        format!("/images/small/thumbnail?v={version}")
    );
    let full = Events::of(server.address, "ids=small,large&inline=full").await.next_of(&ids).await;
    assert_eq!(inlined(&full["small"].data["data"]["image_data"], "image/png"), small);
    assert!(full["small"].data["data"]["thumbnail"].is_string());
    // An image that isn't inlined still has its URL; an undecodable one has no thumbnail.
    let large = &full["large"].data["data"];
    assert!(large["image_data"].is_null() && large["thumbnail"].is_null());
    assert_eq!(large["full"], format!("/images/large?v={}", full["large"].id));
}

#[tokio::test]
async fn a_prefix_follows_existing_and_new_images() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    for id in ["concept_0", "concept_1", "other"] {
        redis.set(id, &record(&drawn(1))).await;
    }
    let mut events = Events::of(server.address, "prefix=concept_").await;
    let both = events.next_of(&["concept_0", "concept_1"]).await;
    assert_eq!(both.len(), 2);
    assert_eq!(events.next().await, Event::list("concept_", true, &["concept_0", "concept_1"]));
    redis.set("other", &record(&drawn(2))).await;
    redis.set("concept_2", &record(&drawn(3))).await;
    assert_eq!(events.next().await.of(), "concept_2");
    redis.set("concept_0", &record(&drawn(4))).await;
    assert_eq!(events.next().await.id, etag(&record(&drawn(4))).trim_matches('"'));
    // A flush names no keys.
    let flush = redis::cmd("FLUSHALL");
    flush.exec_async(&mut redis.connect().await).await.unwrap();
    let gone = events.next_of(&["concept_0", "concept_1", "concept_2"]).await;
    assert!(gone.values().all(|event| event.name == "concept_absent"), "{gone:?}");
    assert_eq!(events.next().await, Event::list("concept_", true, &[]));
}

#[tokio::test]
async fn a_page_that_was_cut_off_learns_which_images_with_its_prefix_are_left() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    for id in ["n1", "n2", "n3", "other"] {
        redis.set(id, &record(&drawn(1))).await;
    }
    let mut events = Events::of(server.address, "prefix=n").await;
    events.next_of(&["n1", "n2", "n3"]).await;
    assert_eq!(events.next().await, Event::list("n", true, &["n1", "n2", "n3"]));
    // A removal that it sees, and one while it is cut off.
    redis.connect().await.del("image:n1").await.unwrap();
    assert_eq!(events.next_of(&["n1"]).await["n1"].name, "concept_absent");
    drop(events);
    redis.connect().await.del("image:n2").await.unwrap();
    redis.set("n4", &record(&drawn(4))).await;

    let mut events = Events::of(server.address, "prefix=n").await;
    events.next_of(&["n3", "n4"]).await;
    assert_eq!(events.next().await, Event::list("n", true, &["n3", "n4"]));
    // None at all is a list, too.
    let mut events = Events::of(server.address, "prefix=none").await;
    assert_eq!(events.next().await, Event::list("none", true, &[]));
}

#[tokio::test]
async fn a_list_of_more_images_than_a_stream_may_name_says_that_it_is_not_complete() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("events.ids", "3")]).await.coherent().await;
    for id in ["n1", "n2", "n3"] {
        redis.set(id, &record(&drawn(1))).await;
    }
    let mut events = Events::of(server.address, "prefix=n").await;
    events.next_of(&["n1", "n2", "n3"]).await;
    assert_eq!(events.next().await, Event::list("n", true, &["n1", "n2", "n3"]));
    redis.set("n4", &record(&drawn(1))).await;
    let mut events = Events::of(server.address, "prefix=n").await;
    let mut told = Vec::new();
    let list = loop {
        let event = events.next().await;
        if event.name == "concept_list" {
            break event;
        }
        told.push(event.of());
    };
    told.sort();
    let told: Vec<&str> = told.iter().map(String::as_str).collect();
    assert_eq!((told.len(), list), (3, Event::list("n", false, &told)));
}

#[tokio::test]
async fn removals_during_a_redis_outage_are_told_afterwards() {
    let redis = RedisServer::start().await;
    let proxy = Proxy::to(redis.port).await;
    let url = format!("redis://{}", proxy.address);
    let server = Server::start(&[("redis.url", &url)]).await.coherent().await;
    for id in ["a1", "a2", "a3"] {
        redis.set(id, &record(&drawn(1))).await;
    }
    let mut named = Events::of(server.address, "ids=a1,a2,a3").await;
    let mut prefixed = Events::of(server.address, "prefix=a").await;
    for events in [&mut named, &mut prefixed] {
        events.next_of(&["a1", "a2", "a3"]).await;
    }
    assert_eq!(prefixed.next().await, Event::list("a", true, &["a1", "a2", "a3"]));
    proxy.hold(crate::harness::Held::All);
    redis.connect().await.del("image:a2").await.unwrap();
    until("the outage is noticed", || async { server.coherence().await == "unreachable" }).await;
    proxy.hold(crate::harness::Held::None);
    for events in [&mut named, &mut prefixed] {
        assert_eq!(events.next_of(&["a2"]).await["a2"].name, "concept_absent");
    }
    assert_eq!(prefixed.next().await, Event::list("a", true, &["a1", "a3"]));
}

#[tokio::test]
async fn a_list_that_has_not_changed_is_not_sent_again() {
    let redis = RedisServer::start().await;
    // The store is listed at each heartbeat.
    let settings = [("redis.tracking", "false"), ("events.heartbeat", "100ms")];
    let server = Server::on(&redis, &settings).await;
    redis.set("a", &record(&drawn(1))).await;
    let mut events = Events::of(server.address, "prefix=a").await;
    events.next_of(&["a"]).await;
    assert_eq!(events.next().await, Event::list("a", true, &["a"]));
    for _ in 0..10 {
        assert_eq!(events.block().await.unwrap(), ":");
    }
    redis.connect().await.del("image:a").await.unwrap();
    assert_eq!(events.next().await.name, "concept_absent");
    assert_eq!(events.next().await, Event::list("a", true, &[]));
}

#[tokio::test]
async fn the_last_event_id_that_a_polyfill_names_in_the_query_is_taken() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    for id in ["", "99914b932bd37a50b983c5e7c90ae93b", "any%20text"] {
        let mut events = Events::of(server.address, &format!("ids=a&lastEventId={id}")).await;
        assert_eq!(events.next().await.name, "concept_absent");
    }
    for query in ["ids=a&lasteventid=1", "ids=a&lastEventId=1&lastEventId=2", "lastEventId=1"] {
        server.get(&format!("/events?{query}")).await.problem(400, "bad-parameter");
    }
}

#[tokio::test]
async fn a_bad_subscription_is_400_with_the_reason() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("events.ids", "3")]).await;
    for (query, kind, says) in [
        ("", "bad-parameter", "ids or prefix is missing"),
        ("ids=a&prefix=b", "bad-parameter", "both"),
        ("ids=a,b,c,d", "bad-parameter", "4 ids are named, the limit is 3 ([events] ids)"),
        ("ids=a&inline=some", "bad-parameter", "`inline` must be `none`, `thumbnail` or `full`"),
        ("ids=a&since=1", "bad-parameter", "this address takes ids or prefix, from and inline"),
        ("ids=a&from=now", "bad-parameter", "`from` must be `now`, beside a prefix"),
        ("prefix=a*", "bad-parameter", "prefix is the beginning of an id"),
        ("ids=", "bad-id", "the id is empty"),
        ("ids=a,,b", "bad-id", "the id is empty"),
        ("ids=a,b%2fc", "bad-id", "position 1"),
    ] {
        let answer = server.get(&format!("/events?{query}")).await;
        let problem = answer.problem(400, kind);
        assert!(problem["detail"].as_str().unwrap().contains(says), "{query}: {problem}");
    }
    // A repeated id counts once.
    Events::of(server.address, "ids=a,b,c,a,b,c").await.next_of(&["a", "b", "c"]).await;
}

#[tokio::test]
async fn a_stream_over_the_limit_gets_503_until_another_one_ends() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("events.connections", "3")]).await.coherent().await;
    // One client gets no more than are left for others.
    let first = Events::of(server.address, "ids=a").await;
    let _second = Events::of(server.address, "prefix=a").await;
    let answer = server.get("/events?ids=a").await;
    answer.problem(503, "busy");
    assert_eq!(answer.header("retry-after"), "1");
    assert_eq!(server.metric("afterimage_event_streams").await, 2);
    assert_eq!(server.metric("afterimage_shed_total{limit=\"event_streams\"}").await, 1);
    drop(first);
    until("a stream is free", || async { server.metric("afterimage_event_streams").await == 1 })
        .await;
    Events::of(server.address, "ids=a").await.next().await;
}

#[tokio::test]
async fn an_idle_stream_has_a_heartbeat_and_ends_with_the_server() {
    let redis = RedisServer::start().await;
    // The send time-out closes clients that don't read, and must not close a stream without events.
    let settings = [("events.heartbeat", "10min"), ("http.send_timeout", "400ms")];
    let server = Server::on(&redis, &settings).await.coherent().await;
    let mut events = Events::of(server.address, "ids=a").await;
    events.next().await;
    for _ in 0..5 {
        assert_eq!(events.block().await.unwrap(), ":");
    }
    let began = Instant::now();
    let ended = tokio::spawn(async move {
        while let Some(block) = events.block().await {
            assert_eq!(block, ":");
        }
    });
    server.stop().await;
    ended.await.unwrap();
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_reconnecting_stream_misses_no_change() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    redis.set("a", &record(&drawn(0))).await;
    redis.set("b", &record(&drawn(100))).await;
    for round in 1..20 {
        let mut events = Events::of(server.address, "ids=a,b,c").await;
        let known = events.next_of(&["a", "b"]).await;
        assert_eq!(known["a"].id, etag(&record(&drawn(round - 1))).trim_matches('"'));
        drop(events);
        redis.set("a", &record(&drawn(round))).await;
        // The push has arrived once the new version is served.
        let tag = etag(&record(&drawn(round)));
        until("the new version is served", || async {
            server.get("/images/a").await.header("etag") == tag
        })
        .await;
    }
}

#[tokio::test]
async fn changes_during_a_redis_outage_are_sent_afterwards() {
    let redis = RedisServer::start().await;
    let proxy = Proxy::to(redis.port).await;
    let url = format!("redis://{}", proxy.address);
    let server = Server::start(&[("redis.url", &url)]).await.coherent().await;
    redis.set("a1", &record(&drawn(1))).await;
    let mut named = Events::of(server.address, "ids=a1,a2").await;
    named.next_of(&["a1", "a2"]).await;
    let mut prefixed = Events::of(server.address, "prefix=a").await;
    prefixed.next_of(&["a1"]).await;
    proxy.hold(crate::harness::Held::All);
    redis.set("a1", &record(&drawn(2))).await;
    redis.set("a2", &record(&drawn(3))).await;
    until("the outage is noticed", || async { server.coherence().await == "unreachable" }).await;
    proxy.hold(crate::harness::Held::None);
    for events in [&mut named, &mut prefixed] {
        let told = events.next_of(&["a1", "a2"]).await;
        assert_eq!(told["a1"].id, etag(&record(&drawn(2))).trim_matches('"'));
        assert_eq!(told["a2"].id, etag(&record(&drawn(3))).trim_matches('"'));
    }
}

#[tokio::test]
async fn without_tracking_the_server_polls_for_changes() {
    let redis = RedisServer::start().await;
    let settings = [("redis.tracking", "false"), ("events.heartbeat", "200ms")];
    let server = Server::on(&redis, &settings).await;
    let mut events = Events::of(server.address, "prefix=a").await;
    for seed in 1..=2 {
        redis.set("a", &record(&drawn(seed))).await;
        let told = events.next_of(&["a"]).await;
        assert_eq!(told["a"].id, etag(&record(&drawn(seed))).trim_matches('"'));
    }
}

async fn a_new_stream_never_gets_an_older_state_after_a_newer_one() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    // Its thumbnail takes long.
    let slow = record(&encoded(&picture(1, 3000, 3000), ImageFormat::Png));
    redis.set("a", &slow).await;
    let left = Events::of(server.address, "ids=a").await;
    until("the image is decoded, after which its thumbnail is rendered", || async {
        server.metric("afterimage_decodes_total").await == 1
    })
    .await;
    drop(left);
    let quick = record(&drawn(2));
    redis.set("a", &quick).await;
    let mut events = Events::of(server.address, "ids=a").await;
    let newest = etag(&quick).trim_matches('"').to_owned();
    while events.next().await.id != newest {}
    // Longer than the first thumbnail takes; no event may follow in this time.
    let late = tokio::time::timeout(Duration::from_secs(4), events.next()).await;
    assert!(late.is_err(), "{late:?}");
    assert_eq!(Events::of(server.address, "ids=a").await.next().await.id, newest);
}

#[tokio::test(flavor = "multi_thread")]
async fn short_lived_streams_do_not_delay_the_state_sent_to_others() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let mut connection = redis.connect().await;
    for chunk in 0..50 {
        let mut filled = redis::pipe();
        for number in 0..1000 {
            filled.cmd("SET").arg(format!("image:n{chunk}_{number}")).arg("x").ignore();
        }
        filled.exec_async(&mut connection).await.unwrap();
    }
    for id in ["concept_0", "concept_1"] {
        redis.set(id, &record(&drawn(1))).await;
    }
    for _ in 0..100 {
        drop(Events::of(server.address, "prefix=concept_").await);
    }
    let began = Instant::now();
    let mut events = Events::of(server.address, "prefix=concept_").await;
    events.next_of(&["concept_0", "concept_1"]).await;
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_prefix_with_more_images_than_the_id_limit_misses_no_change() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("events.ids", "10")]).await.coherent().await;
    let mut events = Events::of(server.address, "prefix=n&inline=none").await;
    let mut newest = HashMap::new();
    for round in 0..10_u8 {
        for number in 0..30_u8 {
            let (id, value) = (format!("n{number}"), record(&drawn(round * 20 + number)));
            redis.set(&id, &value).await;
            newest.insert(id, etag(&value).trim_matches('"').to_owned());
        }
    }
    let mut told = HashMap::new();
    while told != newest {
        let event = events.next().await;
        if event.name != "concept_list" {
            told.insert(event.of(), event.id);
        }
    }
}

async fn a_thumbnail_that_missed_the_render_timeout_is_sent_later() {
    let redis = RedisServer::start().await;
    let settings = [("pictures.timeout", "300ms")];
    let server = Server::on(&redis, &settings).await.coherent().await;
    redis.set("a", &record(&drawn(1))).await;
    // Other renders occupy all cores.
    redis.set("busy", &record(&encoded(&picture(1, 3000, 3000), ImageFormat::Png))).await;
    let address = server.address;
    let busy: Vec<_> = ["?w=16", "?w=32", "?w=48", "?w=64", ".webp?w=16", ".webp?w=32"]
        .map(|it| format!("/images/busy{it}"))
        .into_iter()
        .map(|path| tokio::spawn(async move { get(address, &path, &[]).await }))
        .collect();
    let event = Events::of(address, "ids=a").await.next().await;
    assert!(event.data["data"]["thumbnail"].is_string(), "{event:?}");
    for request in busy {
        request.await.unwrap();
    }
}

#[tokio::test]
async fn polling_does_not_render_an_unchanged_image_again() {
    let redis = RedisServer::start().await;
    let settings =
        [("redis.tracking", "false"), ("events.heartbeat", "100ms"), ("cache.images", "1")];
    let server = Server::on(&redis, &settings).await;
    redis.set("a", &record(&drawn(1))).await;
    redis.set("b", &record(&drawn(2))).await;
    let mut events = Events::of(server.address, "ids=a,b").await;
    events.next_of(&["a", "b"]).await;
    for _ in 0..20 {
        assert_eq!(events.block().await.unwrap(), ":");
    }
    assert_eq!(server.metric("afterimage_renders_total").await, 2);
}

async fn a_slow_reader_gets_the_newest_state_instead_of_every_event() {
    const WRITES: u64 = 200;
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    // The kernel buffers little, the rest waits in the server.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut slow = socket.connect(server.address).await.unwrap();
    let request =
        format!("GET /events?ids=a&inline=full HTTP/1.1\r\nHost: {}\r\n\r\n", server.address);
    slow.write_all(request.as_bytes()).await.unwrap();
    let mut quick = Events::of(server.address, "ids=a&inline=none").await;
    quick.next().await;
    let mut newest = String::new();
    for seed in 0..WRITES {
        let value = record(&png(seed, 250_000));
        redis.set("a", &value).await;
        etag(&value).trim_matches('"').clone_into(&mut newest);
        // The other stream gets each event in spite of the slow one.
        while quick.next().await.id != newest {}
    }
    let (mut text, mut buffer) = (String::new(), vec![0; 1 << 20]);
    let end = format!("/images/a?v={newest}");
    while !text.contains(&end) {
        let read = tokio::time::timeout(PATIENCE, slow.read(&mut buffer)).await;
        let length = read.expect("the newest state doesn't arrive").unwrap();
        assert!(length > 0, "the stream has ended");
        text.push_str(&String::from_utf8_lossy(&buffer[..length]));
    }
    let events = text.matches("event: concept_progress").count();
    println!("{events} of {WRITES} events went to the slow reader");
    assert!(events < 100, "{events} of {WRITES} events were queued for the slow reader");
}

/// Checks the events of a thousand streams while a hundred writes per second replace twenty images.
async fn check_a_thousand_streams(seconds: u64) {
    const PAGES: usize = 1000;
    const IMAGES: usize = 20;
    const EACH: usize = 5;
    let redis = RedisServer::start().await;
    let mut command = program();
    command.args(["--redis-url", &redis.url(), "--log-filter", "warn"]);
    let process = Process::start(command);
    let address = process.address;
    let ready =
        || async { get(address, "/readyz", &[]).await.body.windows(8).any(|it| it == b"coherent") };
    until("the server is coherent", ready).await;

    let mut pages = Vec::new();
    for page in 0..PAGES {
        let ids: Vec<String> =
            (0..EACH).map(|number| format!("i{}", (page + number) % IMAGES)).collect();
        let mut events = Events::of(address, &format!("ids={}", ids.join(","))).await;
        let (sender, newest) = tokio::sync::watch::channel(HashMap::<String, String>::new());
        let task = tokio::spawn(async move {
            let mut told = 0_u64;
            while let Some(block) = events.block().await {
                if block != ":" {
                    let event = Event::parse(&block);
                    told += 1;
                    sender.send_modify(|newest| drop(newest.insert(event.of(), event.id)));
                }
            }
            told
        });
        pages.push((ids, newest, task));
    }
    // Two clients that never read.
    let mut stuck = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request =
            format!("GET /events?prefix=i&inline=full HTTP/1.1\r\nHost: {address}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        stuck.push(stream);
    }

    let mut connection = redis.connect().await;
    let mut values: HashMap<String, String> = HashMap::new();
    let (mut tick, began) = (tokio::time::interval(Duration::from_millis(10)), Instant::now());
    let mut writes = 0_u64;
    while began.elapsed() < Duration::from_secs(seconds) {
        tick.tick().await;
        let seed = u8::try_from(writes % 251).unwrap();
        let id = format!("i{}", writes % IMAGES as u64);
        let value = record(&drawn(seed));
        connection.set(format!("image:{id}"), &value).await.unwrap();
        values.insert(id, etag(&value).trim_matches('"').to_owned());
        writes += 1;
    }
    let rate = writes * 1000 / u64::try_from(began.elapsed().as_millis()).unwrap();
    for (ids, newest, _) in &mut pages {
        let all = |newest: &HashMap<String, String>| {
            ids.iter().all(|id| newest.get(id) == values.get(id))
        };
        let in_time = tokio::time::timeout(Duration::from_mins(1), newest.wait_for(all)).await;
        in_time.expect("a stream misses the newest state").unwrap();
    }
    let (resident, page) = (process.resident() >> 20, get(address, "/metrics", &[]).await);
    let (events, renders) =
        (metric(&page, "afterimage_events_total"), metric(&page, "afterimage_renders_total"));
    println!(
        "{writes} writes at {rate} a second: {events} events to {PAGES} pages, {renders} renders, {resident} MiB resident"
    );
    // All streams share one thumbnail for each version.
    assert!(renders <= writes, "{renders} renders of {writes} images");
    assert!(resident < 300, "{resident} MiB");
    drop(stuck);
    for (_, _, task) in pages {
        task.abort();
    }
}

async fn a_thousand_streams_get_the_newest_state_under_a_hundred_writes_a_second() {
    let seconds = std::env::var("AFTERIMAGE_TEST_EVENTS_SECONDS").ok();
    check_a_thousand_streams(seconds.map_or(15, |it| it.parse().unwrap())).await;
}
