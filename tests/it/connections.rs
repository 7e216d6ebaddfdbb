//! Connections: time-outs, limits, and requests that are refused before they are routed.

use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpSocket, TcpStream};

use crate::harness::server::metric;
use crate::harness::{Client, PATIENCE, Protocol, RedisServer, Server, get, png, record, until};
use crate::strangers::small_window;

long_tests! {
    #[tokio::test] a_client_that_reads_nothing_is_disconnected_after_the_send_timeout
    #[tokio::test] a_gallery_over_one_slow_connection_arrives_whole
    #[tokio::test] bytes_held_by_slow_clients_count_against_the_fetch_budget_and_the_slowest_is_dropped
}

/// The HTTP/2 connection preface (RFC 9113 §3.4), with an empty SETTINGS frame.
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// Reads until the server closes the connection. Returns the bytes and the time of the close.
async fn until_closed(stream: &mut TcpStream) -> (Vec<u8>, Instant) {
    let mut sent = Vec::new();
    let read = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut sent)).await;
    // A reset counts as closed.
    let _ = read.expect("the connection stays open");
    (sent, Instant::now())
}

pub(crate) async fn exchange(address: SocketAddr, request: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    String::from_utf8_lossy(&until_closed(&mut stream).await.0).into_owned()
}

#[tokio::test]
async fn an_idle_connection_is_closed_after_the_idle_timeout_and_not_before() {
    let settings = [("http.idle_timeout", "600ms"), ("http.header_timeout", "100ms")];
    let server =
        Server::start(&[("redis.url", "redis://127.0.0.1:1"), settings[0], settings[1]]).await;
    let start = Instant::now();
    // A connection that sends nothing, and one after a response, over either protocol.
    let mut silent = TcpStream::connect(server.address).await.unwrap();
    let mut used = TcpStream::connect(server.address).await.unwrap();
    used.write_all(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    let mut multiplexed = Client::speaking(Protocol::Http2, server.address).await;
    assert_eq!(multiplexed.get("/healthz", &[]).await.status, StatusCode::OK);
    let ((nothing, silent), (answer, used)) =
        tokio::join!(until_closed(&mut silent), until_closed(&mut used));
    assert!(nothing.is_empty());
    assert!(answer.starts_with(b"HTTP/1.1 200 OK"));
    for closed in [silent, used] {
        assert!(closed - start >= Duration::from_millis(600));
    }
    until("the HTTP/2 connection is closed too", || async {
        server.metric("afterimage_connections").await == 1
    })
    .await;
    let again = multiplexed.send(Method::GET, "/healthz", &[], Bytes::new()).await;
    assert!(again.is_err());
}

#[tokio::test]
async fn a_head_sent_byte_by_byte_is_cut_off_by_the_header_timeout() {
    let settings = [("redis.url", "redis://127.0.0.1:1"), ("http.header_timeout", "300ms")];
    let server = Server::start(&settings).await;
    let drip = |begin: &'static [u8]| async move {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        stream.write_all(begin).await.unwrap();
        let start = Instant::now();
        while stream.write_all(b"a").await.is_ok() {
            assert!(start.elapsed() < PATIENCE, "the connection stays open");
            let mut byte = [0; 1];
            let read = tokio::time::timeout(Duration::from_millis(20), stream.read(&mut byte));
            if let Ok(Ok(0) | Err(_)) = read.await {
                break;
            }
        }
    };
    drip(b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: ").await;
    drip(b"G").await;
    // An incomplete HTTP/2 preface.
    drip(b"PRI * HTTP/2.0\r\n\r\nSM").await;
}

#[tokio::test]
async fn an_http_2_preface_alone_does_not_keep_a_connection_open() {
    let settings = [("redis.url", "redis://127.0.0.1:1"), ("http.idle_timeout", "300ms")];
    let server = Server::start(&settings).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(PREFACE).await.unwrap();
    // The server announces the close with GOAWAY, a frame of type 7 (RFC 9113 §6.8).
    let (sent, _) = until_closed(&mut stream).await;
    let mut frames = &sent[..];
    let mut types = Vec::new();
    while let [_, high, low, kind, ..] = frames {
        types.push(*kind);
        frames = &frames[9 + usize::from(u16::from_be_bytes([*high, *low]))..];
    }
    assert!(types.contains(&7), "{types:?}");
}

async fn a_client_that_reads_nothing_is_disconnected_after_the_send_timeout() {
    let redis = RedisServer::start().await;
    let settings = [("http.send_timeout", "500ms"), ("http.idle_timeout", "1min")];
    let server = Server::on(&redis, &settings).await;
    redis.set("a", &record(&png(1, 20_000_000))).await;

    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut stalled = socket.connect(server.address).await.unwrap();
    stalled.write_all(b"GET /images/a HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    // Over HTTP/2 the window of 65,535 bytes is never opened further; PINGs and other requests keep the connection busy.
    let mut pinging = TcpStream::connect(server.address).await.unwrap();
    pinging.write_all(PREFACE).await.unwrap();
    pinging.write_all(&request_frame(1, "GET", "/images/a")).await.unwrap();
    let (mut from, mut to) = pinging.into_split();
    let pings = tokio::spawn(async move {
        let mut stream = 3;
        while to.write_all(b"\0\0\x08\x06\0\0\0\0\0abcdefgh").await.is_ok() {
            if to.write_all(&request_frame(stream, "HEAD", "/images/b")).await.is_err() {
                break;
            }
            stream += 2;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    let reads = tokio::spawn(async move {
        let mut all = Vec::new();
        let _ = from.read_to_end(&mut all).await;
        all.len()
    });
    until("both requests are in flight", || async {
        server.metric("afterimage_requests_in_flight").await == 2
    })
    .await;
    until("both clients are disconnected", || async {
        let page = server.get("/metrics").await;
        metric(&page, "afterimage_requests_in_flight") == 0
            && metric(&page, "afterimage_connections") == 1
    })
    .await;
    assert!(tokio::time::timeout(PATIENCE, reads).await.unwrap().unwrap() < 200_000);
    pings.abort();
    // The image is too large for the cache, and in memory for ten seconds.
    until("no bytes are in flight", || async {
        server.metric("afterimage_in_flight_bytes").await == 0
    })
    .await;
    drop(stalled);
}

/// A HEADERS frame with a request (RFC 9113 §6.2, RFC 7541).
fn request_frame(stream: u32, method: &str, path: &str) -> Vec<u8> {
    // :scheme http, then :method, :path and :authority as literals.
    let mut block = vec![0x86];
    for (name, value) in [(0x02, method), (0x04, path), (0x01, "a")] {
        block.extend([name, u8::try_from(value.len()).unwrap()]);
        block.extend_from_slice(value.as_bytes());
    }
    // END_STREAM and END_HEADERS.
    let mut frame = vec![0, 0, u8::try_from(block.len()).unwrap(), 0x01, 0x05];
    frame.extend(stream.to_be_bytes());
    frame.extend(block);
    frame
}

/// A connection that limits the rate of reads, as a slow line does.
struct SlowLine(TcpStream, Pin<Box<tokio::time::Sleep>>);

impl AsyncRead for SlowLine {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        // 16 KiB per 5 ms: three megabytes per second.
        ready!(self.1.as_mut().poll(context));
        let mut piece = [0; 16 * 1024];
        let length = buffer.remaining().min(piece.len());
        let mut some = ReadBuf::new(&mut piece[..length]);
        ready!(Pin::new(&mut self.0).poll_read(context, &mut some))?;
        buffer.put_slice(some.filled());
        self.1.as_mut().reset(tokio::time::Instant::now() + Duration::from_millis(5));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for SlowLine {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(context, bytes)
    }

    fn poll_flush(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(context)
    }

    fn poll_shutdown(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(context)
    }
}

async fn a_gallery_over_one_slow_connection_arrives_whole() {
    const IMAGES: u64 = 40;
    let redis = RedisServer::start().await;
    let settings = [("http.send_timeout", "2s"), ("http.idle_timeout", "2s")];
    let server = Server::on(&redis, &settings).await;
    for number in 0..IMAGES {
        redis.set(&format!("i{number}"), &record(&png(number, 300_000))).await;
    }
    let stream = TcpStream::connect(server.address).await.unwrap();
    let line = SlowLine(stream, Box::pin(tokio::time::sleep(Duration::ZERO)));
    // Windows as large as a browser's.
    let (sender, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
        .initial_stream_window_size(6 << 20)
        .initial_connection_window_size(15 << 20)
        .handshake::<_, Full<Bytes>>(TokioIo::new(line))
        .await
        .unwrap();
    tokio::spawn(connection);
    let start = Instant::now();
    let fetches = (0..IMAGES).map(|number| {
        let mut sender = sender.clone();
        let address = format!("http://a/images/i{number}");
        tokio::spawn(async move {
            let request = Request::get(address).body(Full::default()).unwrap();
            let answer = sender.send_request(request).await.unwrap();
            answer.into_body().collect().await.unwrap().to_bytes().len()
        })
    });
    for fetch in fetches.collect::<Vec<_>>() {
        assert_eq!(fetch.await.unwrap(), 300_000);
    }
    assert!(
        start.elapsed() > Duration::from_secs(3),
        "the line must be slow for this test to mean anything"
    );
}

#[tokio::test]
async fn abandoned_requests_cause_a_bounded_number_of_fetches() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("limits.requests", "20")]).await.coherent().await;
    redis.signal("STOP");
    for number in 0..200 {
        let mut client = TcpStream::connect(server.address).await.unwrap();
        let request = format!("GET /images/i{number} HTTP/1.1\r\nHost: a\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
    }
    until("all clients have left", || async { server.metric("afterimage_connections").await == 1 })
        .await;
    let fetches = server.metric("afterimage_fetches_total").await;
    assert!(fetches <= 40, "{fetches} fetches; at most 20 requests run at a time");
    redis.signal("CONT");
}

#[tokio::test]
async fn a_refused_head_request_has_no_body_over_either_protocol() {
    let server = Server::start(&[("redis.url", "redis://127.0.0.1:1")]).await;
    let mut multiplexed = Client::speaking(Protocol::Http2, server.address).await;
    let fields = [("host", "b")];
    let refused = multiplexed.send(Method::HEAD, "/healthz", &fields, Bytes::new()).await.unwrap();
    assert_eq!(refused.status, StatusCode::BAD_REQUEST);
    assert!(refused.body.is_empty());
    let answer = exchange(server.address, "HEAD / HTTP/1.1\r\nConnection: close\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.ends_with("\r\n\r\n"), "{answer}");
}

#[tokio::test]
async fn a_slow_client_that_keeps_reading_gets_the_whole_response() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("http.send_timeout", "1s")]).await;
    let image = png(1, 20_000_000);
    redis.set("a", &record(&image)).await;
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(400_000).unwrap();
    let mut slow = socket.connect(server.address).await.unwrap();
    let start = Instant::now();
    let request = b"GET /images/a HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    slow.write_all(request).await.unwrap();
    let (mut all, mut piece) = (Vec::new(), vec![0; 200_000]);
    loop {
        let length = slow.read(&mut piece).await.unwrap();
        if length == 0 {
            break;
        }
        all.extend_from_slice(&piece[..length]);
        // The pauses make the client slow for longer than the send time-out.
        if start.elapsed() < Duration::from_millis(2500) {
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }
    assert!(
        start.elapsed() > Duration::from_secs(2),
        "the client must be slow for this test to mean anything"
    );
    assert!(all.ends_with(&image));
}

#[tokio::test]
async fn a_stalled_request_body_is_408() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("http.body_timeout", "200ms")]).await;
    let head = "PUT /images/a HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
        Content-Length: 1000\r\n\r\n{";
    let answer = exchange(server.address, head).await;
    // RFC 9110 §15.5.9: the server closes instead of waiting for the rest.
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
    assert!(answer.contains("connection: close\r\n"), "{answer}");
    assert!(answer.contains("urn:problem:afterimage:body-timeout"), "{answer}");
    // An incomplete body changes nothing.
    server.get("/images/a").await.problem(404, "absent");
}

#[tokio::test]
async fn a_missing_repeated_or_malformed_host_is_400() {
    let server = Server::start(&[("redis.url", "redis://127.0.0.1:1")]).await;
    let ask = |host: &'static str| async move {
        let request = format!("GET /healthz HTTP/1.1\r\n{host}Connection: close\r\n\r\n");
        exchange(server.address, &request).await
    };
    for good in ["Host: a\r\n", "Host: a.example:80\r\n", "Host: [::1]:8000\r\n", "HOST: a\r\n"] {
        assert!(ask(good).await.starts_with("HTTP/1.1 200 "), "{good}");
    }
    for bad in [
        "",
        "Host:\r\n",
        "Host: a\r\nHost: a\r\n",
        "Host: a\r\nHost: b\r\n",
        "Host: a, b\r\n",
        "Host: a b\r\n",
        "Host: u@a\r\n",
        "Host: a:b\r\n",
        "Host: http://a/\r\n",
    ] {
        let answer = ask(bad).await;
        assert!(answer.starts_with("HTTP/1.1 400 "), "{bad:?}: {answer}");
        assert!(answer.contains("urn:problem:afterimage:bad-host"), "{answer}");
    }
    // HTTP/1.0 requires no Host.
    let old = exchange(server.address, "GET /healthz HTTP/1.0\r\n\r\n").await;
    assert!(old.starts_with("HTTP/1.0 200 ") || old.starts_with("HTTP/1.1 200 "), "{old}");
    // The host of an absolute target counts, and the field is required all the same (RFC 9112 §3.2.2).
    let absolute = "GET http://a/healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    assert!(exchange(server.address, absolute).await.starts_with("HTTP/1.1 200 "));
    let mut multiplexed = Client::speaking(Protocol::Http2, server.address).await;
    let differs = multiplexed.get("/healthz", &[("host", "b")]).await;
    differs.problem(400, "bad-host");
}

#[tokio::test]
async fn a_request_head_over_the_limit_is_refused() {
    let settings = [("redis.url", "redis://127.0.0.1:1"), ("limits.header_bytes", "8KiB")];
    let server = Server::start(&settings).await;
    let long = "x".repeat(9000);
    let answer = get(server.address, "/healthz", &[("x", &long)]).await;
    assert_eq!(answer.status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    let mut multiplexed = Client::speaking(Protocol::Http2, server.address).await;
    // Over HTTP/2 the stream is reset (RFC 9113 §8.1.1) or gets the same status.
    match multiplexed.send(Method::GET, "/healthz", &[("x", &long)], Bytes::new()).await {
        Ok(answer) => assert_eq!(answer.status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
        Err(error) => assert!(!error.is_timeout(), "{error}"),
    }
    let fits = "x".repeat(7000);
    assert_eq!(get(server.address, "/healthz", &[("x", &fits)]).await.status, StatusCode::OK);
}

#[tokio::test]
async fn connections_over_the_limit_get_503_and_leave_the_others_alone() {
    let settings = [("redis.url", "redis://127.0.0.1:1"), ("limits.connections", "5")];
    let server = Server::start(&settings).await;
    let mut held = Vec::new();
    // One client gets no more than are left for others.
    for _ in 0..3 {
        let mut client = Client::connect(server.address).await;
        assert_eq!(client.get("/healthz", &[]).await.status, StatusCode::OK);
        held.push(client);
    }
    let refused = exchange(server.address, "GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    assert!(refused.contains("Retry-After: 1\r\n"), "{refused}");
    for client in &mut held {
        assert_eq!(client.get("/healthz", &[]).await.status, StatusCode::OK);
    }
    let page = held[0].get("/metrics", &[]).await;
    assert_eq!(metric(&page, "afterimage_shed_total{limit=\"connections\"}"), 1);
    assert_eq!(metric(&page, "afterimage_connections"), 3);
    held.pop();
    until("a closed connection makes room", || async {
        let request = "GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
        exchange(server.address, request).await.starts_with("HTTP/1.1 200 ")
    })
    .await;
}

#[tokio::test]
async fn requests_over_the_limit_get_503_while_health_checks_are_answered() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("limits.requests", "3"), ("limits.h2_streams", "10")]).await;
    redis.set("a", &record(&png(1, 100))).await;
    redis.set("b", &record(&png(2, 100))).await;
    redis.signal("STOP");
    let address = server.address;
    let waiting: Vec<_> = ["/images/a", "/images/b"]
        .map(|path| tokio::spawn(async move { get(address, path, &[]).await }))
        .into_iter()
        .collect();
    until("both requests have reached the server", || async {
        server.metric("afterimage_requests_in_flight").await == 2
    })
    .await;
    let shed = server.get("/images/c").await;
    let members = shed.problem(503, "busy");
    assert!(members["detail"].as_str().unwrap().contains("[limits] requests"));
    assert_eq!(shed.header("retry-after"), "1");
    assert_eq!(server.metric("afterimage_shed_total{limit=\"requests\"}").await, 1);
    assert_eq!(server.get("/healthz").await.status, StatusCode::OK);
    redis.signal("CONT");
    for waiting in waiting {
        assert_eq!(waiting.await.unwrap().status, StatusCode::OK);
    }
}

#[tokio::test]
async fn the_limit_of_http_2_streams_is_announced_in_settings() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("limits.h2_streams", "2")]).await;
    redis.set("a", &record(&png(1, 100))).await;
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(PREFACE).await.unwrap();
    let mut settings = vec![0; 200];
    stream.read_exact(&mut settings[..9]).await.unwrap();
    let length = usize::from(settings[2]);
    stream.read_exact(&mut settings[..length]).await.unwrap();
    // SETTINGS_MAX_CONCURRENT_STREAMS is 3 (RFC 9113 §6.5.2).
    assert!(settings[..length].chunks(6).any(|it| it == [0, 3, 0, 0, 0, 2]), "{settings:?}");
}

async fn bytes_held_by_slow_clients_count_against_the_fetch_budget_and_the_slowest_is_dropped() {
    let redis = RedisServer::start().await;
    // The cache keeps one image, and the fetch budget has room for two and a half more.
    let settings =
        [("cache.images", "1"), ("limits.fetch_bytes", "25MB"), ("cache.bytes", "100MiB")];
    let server = Server::on(&redis, &settings).await;
    for number in 0..5 {
        redis.set(&format!("i{number}"), &record(&png(number, 8_000_000))).await;
    }
    let mut slow = Vec::new();
    for number in 0..4 {
        // Each from an address of its own, so that no share is in the way.
        let mut stream = small_window([127, 0, 0, 2 + number], server.address).await;
        let request = format!("GET /images/i{number} HTTP/1.1\r\nHost: a\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        // The head has arrived, so the image is in memory, and most of it can't be sent.
        stream.readable().await.unwrap();
        slow.push(stream);
    }
    // The slowest is dropped, not the newest reader refused.
    assert_eq!(server.get("/images/i4").await.status, StatusCode::OK);
    assert!(server.metric("afterimage_connections").await <= 4);
    // Many requests at once don't exceed the budget either.
    let many = (0..12).map(|number| {
        let address = server.address;
        tokio::spawn(async move {
            let mut stream = small_window([127, 0, 0, 10 + number], address).await;
            let request = format!("GET /images/i{} HTTP/1.1\r\nHost: a\r\n\r\n", number % 5);
            stream.write_all(request.as_bytes()).await.unwrap();
            stream.readable().await.unwrap();
            stream
        })
    });
    for one in many.collect::<Vec<_>>() {
        slow.push(one.await.unwrap());
    }
    let in_flight = server.metric("afterimage_in_flight_bytes").await;
    assert!((16_000_000..=50_000_000).contains(&in_flight), "{in_flight}");
    drop(slow);
    until("released bytes make room", || async {
        server.get("/images/i4").await.status == StatusCode::OK
    })
    .await;
}
