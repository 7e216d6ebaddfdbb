//! Spans, exported by OTLP. The collector is a stand-in: it takes exports as a collector does, and decodes the protobuf.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

use crate::harness::server::program;
use crate::harness::{Client, Process, RedisServer, get, record, until};
use crate::variants::{encoded, picture};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const CALLER: &str = "00f067aa0ba902b7";

/// A span, as the collector gets it.
#[derive(Debug, Clone, Default)]
struct Span {
    service: String,
    trace: String,
    id: String,
    parent: String,
    name: String,
    kind: u64,
    start: u64,
    end: u64,
    attributes: BTreeMap<String, String>,
    /// 2 is an error.
    status: u64,
}

/// Takes exports. Its spans are those of all exports so far.
struct Collector {
    address: SocketAddr,
    spans: Arc<Mutex<Vec<Span>>>,
}

impl Collector {
    async fn start() -> Collector {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (address, spans) = (listener.local_addr().unwrap(), Arc::<Mutex<Vec<Span>>>::default());
        let all = Arc::clone(&spans);
        tokio::spawn(async move {
            while let Ok((wire, _)) = listener.accept().await {
                let all = Arc::clone(&all);
                let service = service_fn(move |request: Request<Incoming>| {
                    let all = Arc::clone(&all);
                    async move {
                        assert_eq!(
                            (request.method(), request.uri().path()),
                            (&Method::POST, "/v1/traces")
                        );
                        assert_eq!(request.headers()["content-type"], "application/x-protobuf");
                        assert_eq!(request.headers()["x-key"], "secret");
                        let body = request.into_body().collect().await.unwrap().to_bytes();
                        all.lock().unwrap().extend(spans_of(&body));
                        Ok::<_, Infallible>(Response::new(Full::<Bytes>::default()))
                    }
                });
                let server = hyper::server::conn::http1::Builder::new();
                tokio::spawn(server.serve_connection(TokioIo::new(wire), service));
            }
        });
        Collector { address, spans }
    }

    fn named(&self, name: &str) -> Vec<Span> {
        self.spans.lock().unwrap().iter().filter(|span| span.name == name).cloned().collect()
    }
}

/// A field of a protobuf message: its number, and its number or bytes.
enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

/// Reads the fields of a message (protobuf's wire format).
fn fields(mut message: &[u8]) -> Vec<(u64, Value<'_>)> {
    fn varint(message: &mut &[u8]) -> u64 {
        let (mut value, mut shift) = (0, 0);
        loop {
            let byte = message[0];
            *message = &message[1..];
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte < 0x80 {
                return value;
            }
        }
    }
    let mut found = Vec::new();
    while !message.is_empty() {
        let key = varint(&mut message);
        let mut take = |length: usize| {
            let (taken, rest) = message.split_at(length);
            message = rest;
            taken
        };
        let value = match key & 7 {
            0 => Value::Number(varint(&mut message)),
            1 => Value::Number(u64::from_le_bytes(take(8).try_into().unwrap())),
            5 => Value::Number(u32::from_le_bytes(take(4).try_into().unwrap()).into()),
            2 => {
                let length = varint(&mut message);
                let (taken, rest) = message.split_at(usize::try_from(length).unwrap());
                message = rest;
                Value::Bytes(taken)
            }
            other => panic!("wire type {other}"),
        };
        found.push((key >> 3, value));
    }
    found
}

/// The messages in a field.
fn messages(message: &[u8], number: u64) -> Vec<&[u8]> {
    let all = fields(message).into_iter().filter(|(it, _)| *it == number);
    all.filter_map(|(_, value)| match value {
        Value::Bytes(bytes) => Some(bytes),
        Value::Number(_) => None,
    })
    .collect()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    let digit = |it: u8| char::from_digit(it.into(), 16).unwrap();
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// `KeyValue` with a string or a number.
fn attribute(message: &[u8]) -> (String, String) {
    let value = match fields(messages(message, 2)[0]).pop() {
        Some((1, Value::Bytes(bytes))) => text(bytes),
        Some((3, Value::Number(number))) => number.to_string(),
        _ => String::new(),
    };
    (text(messages(message, 1)[0]), value)
}

/// The spans of an `ExportTraceServiceRequest`.
fn spans_of(export: &[u8]) -> Vec<Span> {
    let mut spans = Vec::new();
    for resource_spans in messages(export, 1) {
        let resource = messages(resource_spans, 1)[0];
        let resource: BTreeMap<_, _> = messages(resource, 1).into_iter().map(attribute).collect();
        let scopes = messages(resource_spans, 2);
        for message in scopes.into_iter().flat_map(|scope| messages(scope, 2)) {
            let mut span = Span { service: resource["service.name"].clone(), ..Span::default() };
            for field in fields(message) {
                match field {
                    (1, Value::Bytes(id)) => span.trace = hex(id),
                    (2, Value::Bytes(id)) => span.id = hex(id),
                    (4, Value::Bytes(id)) => span.parent = hex(id),
                    (5, Value::Bytes(name)) => span.name = text(name),
                    (6, Value::Number(kind)) => span.kind = kind,
                    (7, Value::Number(start)) => span.start = start,
                    (8, Value::Number(end)) => span.end = end,
                    (9, Value::Bytes(message)) => span.attributes.extend([attribute(message)]),
                    (15, Value::Bytes(message)) => {
                        for (number, value) in fields(message) {
                            if let (3, Value::Number(code)) = (number, value) {
                                span.status = code;
                            }
                        }
                    }
                    _ => {}
                }
            }
            spans.push(span);
        }
    }
    spans
}

fn start(redis: &str, endpoint: SocketAddr, variables: &[(&str, &str)]) -> Process {
    let mut command = program();
    command.args(["--redis-url", redis]).stderr(Stdio::null());
    command.env("OTEL_EXPORTER_OTLP_ENDPOINT", format!("http://{endpoint}"));
    command.env("OTEL_EXPORTER_OTLP_HEADERS", "x-key=secret");
    for (name, value) in variables {
        command.env(name, value);
    }
    Process::start(command)
}

fn stop(mut server: Process) {
    server.signal("INT");
    assert!(server.child.wait().unwrap().success());
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_fetches_and_renders_are_exported_as_spans_of_their_clients_trace() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&encoded(&picture(1, 64, 48), image::ImageFormat::Png))).await;
    let collector = Collector::start().await;
    let server = start(&redis.url(), collector.address, &[("OTEL_SERVICE_NAME", "images")]);
    until("pushes come, so that there are hits", || async {
        get(server.address, "/readyz?strict", &[]).await.status == StatusCode::OK
    })
    .await;
    let parent = format!("00-{TRACE}-{CALLER}-01");
    let traced = [("traceparent", parent.as_str())];
    let mut client = Client::connect(server.address).await;
    assert_eq!(client.get("/images/a?w=32", &traced).await.status, StatusCode::OK);
    // From memory, in the fast loop.
    assert_eq!(client.get("/images/a?w=32", &traced).await.status, StatusCode::OK);
    let unsampled = format!("00-{}-{CALLER}-00", "1".repeat(32));
    client.get("/images/a", &[("traceparent", &unsampled)]).await;
    get(server.address, "/images/absent", &[]).await.problem(404, "absent");
    get(server.address, "/healthz", &[]).await;
    drop(client);
    // What is left is exported at the stop.
    stop(server);

    let requests = collector.named("GET /images/{id}");
    let [miss, hit, absent] = &requests[..] else { panic!("{requests:#?}") };
    for span in [miss, hit] {
        assert_eq!((span.trace.as_str(), span.parent.as_str()), (TRACE, CALLER));
        assert_eq!((span.kind, span.status, span.service.as_str()), (2, 0, "images"));
        assert!(span.start > 0 && span.start <= span.end);
        for (name, value) in [
            ("http.request.method", "GET"),
            ("http.route", "/images/{id}"),
            ("url.path", "/images/a"),
            ("url.query", "w=32"),
            ("http.response.status_code", "200"),
            ("network.protocol.version", "1.1"),
            ("client.address", "127.0.0.1"),
        ] {
            assert_eq!(span.attributes[name], value, "{span:?}");
        }
        assert_ne!(span.attributes["http.response.body.size"], "0");
    }
    assert_eq!(hit.attributes["http.response.header.cache-status"], "afterimage; hit");
    // Whoever sent no trace begins one. A client's mistake is no error.
    assert!(absent.parent.is_empty() && absent.trace.len() == 32 && absent.trace != TRACE);
    assert_eq!(
        (absent.attributes["http.response.status_code"].as_str(), absent.status),
        ("404", 0)
    );
    for name in ["fetch", "render"] {
        let steps = collector.named(name);
        let step = steps.iter().find(|step| step.parent == miss.id);
        let step = step.unwrap_or_else(|| panic!("{name} of {miss:?} in {steps:#?}"));
        assert_eq!((step.trace.as_str(), step.kind), (TRACE, 1));
        assert!(miss.start <= step.start && step.end <= miss.end);
        assert!(!steps.iter().any(|step| step.parent == hit.id));
    }
    let is_probe = |span: &Span| span.name.contains("healthz") || span.trace.starts_with("111");
    assert!(!collector.spans.lock().unwrap().iter().any(is_probe));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sampler_of_the_environment_counts_and_failures_are_errors() {
    let collector = Collector::start().await;
    let nowhere = "redis://127.0.0.1:1";
    let off = start(nowhere, collector.address, &[("OTEL_TRACES_SAMPLER", "always_off")]);
    get(off.address, "/images/a", &[]).await;
    stop(off);
    assert!(collector.spans.lock().unwrap().is_empty());
    let on = start(nowhere, collector.address, &[]);
    assert_eq!(get(on.address, "/images/a", &[]).await.status, StatusCode::SERVICE_UNAVAILABLE);
    stop(on);
    let requests = collector.named("GET /images/{id}");
    let [request] = &requests[..] else { panic!("{requests:#?}") };
    assert_eq!((request.status, request.service.as_str()), (2, "afterimage"));
    assert_eq!(request.attributes["error.type"], "503");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_answers_nothing_holds_up_no_request_and_the_stop_for_seconds_at_most() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&encoded(&picture(1, 64, 48), image::ImageFormat::Png))).await;
    // It takes connections, and nothing else.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let variables = [("OTEL_BSP_MAX_QUEUE_SIZE", "16"), ("OTEL_BSP_SCHEDULE_DELAY", "50")];
    let server = start(&redis.url(), silent.local_addr().unwrap(), &variables);
    let mut client = Client::connect(server.address).await;
    // Many more than the queue has room for.
    for _ in 0..1000 {
        assert_eq!(client.get("/images/a", &[]).await.status, StatusCode::OK);
    }
    drop(client);
    let ended = tokio::task::spawn_blocking(move || stop(server));
    let ended = async { ended.await.unwrap() };
    tokio::time::timeout(crate::harness::PATIENCE, ended).await.unwrap();
}
