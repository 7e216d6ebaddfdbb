//! Traces: `traceparent` of a client in the log and in requests that are sent on (W3C Trace Context).

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use hyper::header::HeaderMap;
use hyper::{Method, StatusCode};
use serde_json::Value;

use crate::harness::s3::Faulty;
use crate::harness::{Client, Protocol, RedisServer, S3, get, png, record};
use crate::operation::Logging;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

fn traceparent() -> String {
    format!("00-{TRACE}-{CALLER}-01")
}

/// The log's only line about a request with an id.
fn line(log: &str, id: &str) -> Value {
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let lines: Vec<_> = lines.filter(|line| line["id"] == id).collect();
    let [line] = &lines[..] else { panic!("{id}: {log}") };
    line.clone()
}

/// Returns whether an id is one of a span that isn't the caller's.
fn is_own_span(id: &str) -> bool {
    let is_digit = |it: u8| it.is_ascii_digit() || (b'a'..=b'f').contains(&it);
    id.len() == 16 && id.bytes().all(is_digit) && id != CALLER && id != "0".repeat(16)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_has_the_trace_of_a_request_that_is_a_part_of_one() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 3000))).await;
    let server = Logging::start(&["--redis-url", &redis.url(), "--log-format", "json"]);
    let (address, parent) = (server.process.address, traceparent());
    // From the store, from memory in the fast loop, from memory over HTTP/2, and a failure of the client's.
    let mut client = Client::connect(address).await;
    let mut multiplexed = Client::speaking(Protocol::Http2, address).await;
    for (is_multiplexed, path, id) in [
        (false, "/images/a", "miss"),
        (false, "/images/a", "hit"),
        (true, "/images/a", "hit-2"),
        (true, "/images/absent", "absent"),
    ] {
        let client = if is_multiplexed { &mut multiplexed } else { &mut client };
        let fields = [("x-request-id", id), ("TraceParent", parent.as_str())];
        let answer = client.get(path, &fields).await;
        // As of nginx, Envoy and imgproxy: the answer doesn't repeat it.
        for field in ["traceparent", "traceresponse", "tracestate"] {
            assert_eq!(answer.header(field), "", "{id}");
        }
    }
    // Without a trace, or with one that isn't valid.
    let later = format!("01-{TRACE}-{CALLER}-01-more");
    let (zero, forbidden) = (parent.replace(TRACE, &"0".repeat(32)), parent.replace("00-", "ff-"));
    let (longer, upper) = (format!("{parent}-more"), parent.to_uppercase());
    let one = |value| vec![("traceparent", value)];
    for (id, fields) in [
        ("none", vec![]),
        ("zero", one(zero.as_str())),
        ("forbidden", one(&forbidden)),
        ("long", one(&longer)),
        ("upper", one(&upper)),
        ("empty", one("")),
        ("twice", [one(&parent), one(&parent)].concat()),
        ("state", vec![("tracestate", "a=1")]),
        ("later", one(&later)),
    ] {
        for (protocol, client) in [("1", &mut client), ("2", &mut multiplexed)] {
            let id = format!("{id}-{protocol}");
            let fields = [fields.clone(), vec![("x-request-id", id.as_str())]].concat();
            assert_eq!(client.get("/images/a", &fields).await.status, StatusCode::OK);
        }
    }
    drop((client, multiplexed));
    let log = server.end();
    for id in ["miss", "hit", "hit-2", "absent", "later-1", "later-2"] {
        let line = line(&log, id);
        assert_eq!(line["trace_id"], TRACE, "{line}");
        assert!(is_own_span(line["span_id"].as_str().unwrap()), "{line}");
    }
    assert_ne!(line(&log, "miss")["span_id"], line(&log, "hit")["span_id"]);
    for id in ["none", "zero", "forbidden", "long", "upper", "empty", "twice", "state"] {
        for protocol in ["1", "2"] {
            let line = line(&log, &format!("{id}-{protocol}"));
            assert!(line.get("trace_id").is_none() && line.get("span_id").is_none(), "{line}");
        }
    }
}

#[tokio::test]
async fn the_object_store_gets_the_trace_of_the_request_that_it_serves() {
    let (redis, s3) = (RedisServer::start().await, S3::start().await);
    let seen: Arc<Mutex<Vec<(Method, String, HeaderMap)>>> = Arc::default();
    let watched = Faulty::judging(&s3, {
        let seen = Arc::clone(&seen);
        move |request| {
            let (method, path) = (request.method().clone(), request.uri().path().to_owned());
            seen.lock().unwrap().push((method, path, request.headers().clone()));
            None
        }
    });
    let watched = watched.await;
    let (url, settings) = (redis.url(), S3::settings(watched.port));
    let mut arguments = vec!["--redis-url", &url, "--log-format", "json"];
    for (key, value) in &settings {
        arguments.extend([
            if *key == "offload.url" { "--offload-url" } else { "--offload-options" },
            value,
        ]);
    }
    let parent = traceparent();
    let fields = |id| {
        vec![
            ("x-request-id", id),
            ("traceparent", parent.as_str()),
            ("tracestate", "a=1"),
            ("tracestate", "b=2"),
        ]
    };
    let writing = Logging::start(&arguments);
    let mut client = Client::connect(writing.process.address).await;
    let png_type = [("content-type", "image/png")];
    let written = [&png_type[..], &fields("write")].concat();
    let body = Bytes::from(png(1, 3000));
    let answer = client.send(Method::PUT, "/images/a", &written, body.clone()).await.unwrap();
    assert_eq!(answer.status, StatusCode::CREATED);
    let answer = client.send(Method::PUT, "/images/b", &png_type, body).await.unwrap();
    assert_eq!(answer.status, StatusCode::CREATED);
    drop(client);
    let writing = writing.end();

    let reading = Logging::start(&arguments);
    let address = reading.process.address;
    assert_eq!(get(address, "/images/a", &fields("read")).await.status, StatusCode::OK);
    assert_eq!(get(address, "/images/b", &[]).await.status, StatusCode::OK);
    let reading = reading.end();

    let of = |wanted: Method, name: &str| {
        let seen = seen.lock().unwrap();
        let found = seen.iter().find(|(method, path, _)| *method == wanted && path.contains(name));
        found.unwrap_or_else(|| panic!("no {wanted} of {name} in {seen:?}")).2.clone()
    };
    for (method, log, id) in [(Method::PUT, &writing, "write"), (Method::GET, &reading, "read")] {
        let headers = of(method.clone(), "/shown/a/");
        let line = line(log, id);
        let own = line["span_id"].as_str().unwrap();
        assert_eq!(headers["traceparent"], format!("00-{TRACE}-{own}-01"), "{line}");
        assert_eq!(headers["tracestate"], "a=1,b=2");
        let headers = of(method, "/shown/b/");
        assert!(!headers.contains_key("traceparent") && !headers.contains_key("tracestate"));
    }
    // What the server asks for by itself is no part of a request.
    let probe = of(Method::GET, "/images");
    assert!(!probe.contains_key("traceparent"), "{probe:?}");
}
