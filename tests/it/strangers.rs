//! Attacks by one client, beside the requests of others, who are answered all the same.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::{Method, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::harness::server::{metric, program_below};
use crate::harness::{Answer, Client, PATIENCE, Process, RedisServer, Server, png, record, until};

long_tests! {
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    idle_connections_leave_files_for_the_store
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    requests_sent_ahead_of_their_answers_keep_no_memory_of_the_kernel
}

/// A connection of HTTP/2 frames, made by hand.
struct Frames(TcpStream);

impl Frames {
    /// Opens a connection from another address of this machine, whose streams may not be sent a byte.
    async fn without_window(address: SocketAddr) -> Frames {
        let mut stream = connect_from([127, 0, 0, 2], address).await;
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        // SETTINGS_INITIAL_WINDOW_SIZE (4) is 0 (RFC 9113 §6.5.2).
        stream.write_all(b"\0\0\x06\x04\0\0\0\0\0\0\x04\0\0\0\0").await.unwrap();
        Frames(stream)
    }

    async fn get(&mut self, stream: u32, path: &str) -> std::io::Result<()> {
        // :method GET, :scheme http, then :path and :authority as literals (RFC 7541).
        let mut block = vec![0x82, 0x86];
        for (name, value) in [(0x04, path), (0x01, "a")] {
            block.extend([name, u8::try_from(value.len()).unwrap()]);
            block.extend_from_slice(value.as_bytes());
        }
        let mut frame = vec![0, 0, u8::try_from(block.len()).unwrap(), 0x01, 0x05];
        frame.extend(stream.to_be_bytes());
        frame.extend(block);
        self.0.write_all(&frame).await
    }

    /// RST_STREAM with CANCEL (RFC 9113 §6.4).
    async fn reset(&mut self, stream: u32) -> std::io::Result<()> {
        let mut frame = vec![0, 0, 4, 0x03, 0];
        frame.extend(stream.to_be_bytes());
        frame.extend([0, 0, 0, 8]);
        self.0.write_all(&frame).await
    }
}

/// A connection from another address of this machine.
async fn connect_from(ip: [u8; 4], address: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind((ip, 0).into()).unwrap();
    socket.connect(address).await.unwrap()
}

/// Requests of others: images in memory and not, and the questions of operators.
async fn others_are_answered(server: &Server, redis: &RedisServer) {
    redis.set("new", &record(&png(9, 100_000))).await;
    for path in ["/images/a", "/images/new", "/healthz", "/readyz", "/metrics"] {
        assert_eq!(server.get(path).await.status, StatusCode::OK, "{path}");
    }
}

#[tokio::test]
async fn answers_that_nobody_takes_hold_no_place_of_others() {
    let redis = RedisServer::start().await;
    let settings = [("limits.requests", "50"), ("limits.answers", "1000")];
    let server = Server::on(&redis, &settings).await.coherent().await;
    redis.set("a", &record(&png(1, 100_000))).await;
    assert_eq!(server.get("/images/a").await.status, StatusCode::OK);
    // More than operators have places, and more than there are for requests and for answers.
    let mut attackers = Vec::new();
    for path in ["/healthz", "/metrics", "/images/a"] {
        for _ in 0..15 {
            let mut frames = Frames::without_window(server.address).await;
            for stream in 0..100 {
                // A connection that was ended can't be written to.
                let _ = frames.get(2 * stream + 1, path).await;
            }
            attackers.push(frames);
        }
        others_are_answered(&server, &redis).await;
    }
    // The first were ended for the sake of the last.
    until("no more answers are on their way than may be", || async {
        server.metric("afterimage_requests_in_flight").await <= 1000
    })
    .await;
}

#[tokio::test]
async fn one_client_gets_no_more_connections_than_it_leaves_to_others() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("limits.connections", "40")]).await.coherent().await;
    redis.set("a", &record(&png(1, 1000))).await;
    let mut greedy = Vec::new();
    for _ in 0..60 {
        greedy.push(connect_from([127, 0, 0, 2], server.address).await);
    }
    others_are_answered(&server, &redis).await;
    let open = server.metric("afterimage_connections").await;
    assert!((15..=25).contains(&open), "{open}");
    // A second greedy one is no different.
    for _ in 0..60 {
        greedy.push(connect_from([127, 0, 0, 3], server.address).await);
    }
    others_are_answered(&server, &redis).await;
}

#[tokio::test]
async fn a_client_below_the_least_rate_is_disconnected() {
    let redis = RedisServer::start().await;
    let settings = [("http.send_timeout", "400ms"), ("http.min_send_rate", "1MiB")];
    let server = Server::on(&redis, &settings).await.coherent().await;
    redis.set("a", &record(&png(1, 8_000_000))).await;
    assert_eq!(server.get("/images/a").await.status, StatusCode::OK);
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let mut slow = socket.connect(server.address).await.unwrap();
    slow.write_all(b"GET /images/a HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
    // It takes a little all the time, which is no pause.
    let read = async {
        let (mut all, mut some) = (0, [0; 512]);
        while let Ok(length @ 1..) = slow.read(&mut some).await {
            all += length;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        all
    };
    let taken = tokio::time::timeout(Duration::from_secs(30), read).await.expect("it goes on");
    assert!(taken < 4_000_000, "{taken}");
}

#[tokio::test]
async fn streams_that_are_reset_stop_costing_and_end_their_connection() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    redis.set("a", &record(&png(1, 1000))).await;
    for number in 0..300 {
        redis.set(&format!("n{number}"), &record(&png(number, 100_000))).await;
    }
    let mut frames = Frames::without_window(server.address).await;
    let mut opened = 0_u32;
    // It doesn't read, so only the end of the connection can stop it.
    while opened < 20_000 {
        let stream = 2 * opened + 1;
        let path = format!("/images/n{}", opened % 300);
        if frames.get(stream, &path).await.is_err() || frames.reset(stream).await.is_err() {
            break;
        }
        opened += 1;
    }
    assert!(opened < 20_000, "the connection was never ended");
    others_are_answered(&server, &redis).await;
    // Most were reset before their turn came.
    let fetches = server.metric("afterimage_fetches_total").await;
    assert!(fetches < 300, "{fetches} fetches for {opened} streams");
}

#[tokio::test]
async fn the_end_of_a_connection_with_too_many_resets_is_announced() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let mut frames = Frames::without_window(server.address).await;
    for number in 0..700 {
        let stream = 2 * number + 1;
        if frames.get(stream, "/images/none").await.is_err() || frames.reset(stream).await.is_err()
        {
            break;
        }
    }
    let mut received = Vec::new();
    let _ = frames.0.read_to_end(&mut received).await;
    // GOAWAY is type 7 (RFC 9113 §6.8).
    let mut rest = received.as_slice();
    let mut types = Vec::new();
    while let [a, b, c, kind, _, _, _, _, _, payload @ ..] = rest {
        let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
        types.push(*kind);
        rest = payload.get(length..).unwrap_or_default();
    }
    assert!(types.contains(&7), "{types:?}");
}

#[tokio::test]
async fn random_ids_do_not_push_known_images_out_of_the_index() {
    let redis = RedisServer::start().await;
    let settings = [("cache.index_entries", "50"), ("cache.absent_entries", "50")];
    let server = Server::on(&redis, &settings).await.coherent().await;
    let mut client = Client::connect(server.address).await;
    for number in 0..40 {
        redis.set(&format!("n{number}"), &record(&png(number, 1000))).await;
        assert_eq!(client.get(&format!("/images/n{number}"), &[]).await.status, StatusCode::OK);
    }
    for number in 0..500 {
        client.get(&format!("/images/x{number}"), &[]).await.problem(404, "absent");
    }
    let fetches = server.metric("afterimage_fetches_total").await;
    for number in 0..40 {
        let path = format!("/images/n{number}");
        let known = client.send(Method::HEAD, &path, &[], Bytes::new()).await.unwrap();
        assert_eq!(known.status, StatusCode::OK);
    }
    assert_eq!(server.metric("afterimage_fetches_total").await, fetches);
}

#[tokio::test]
async fn a_head_over_the_limit_is_431_on_every_request_of_a_connection() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let large = "x".repeat(10_000);
    let fields: Vec<_> = ["a", "b", "c", "d"].map(|name| (name, large.as_str())).into();
    for requests_before in [0, 1, 2] {
        let mut client = Client::connect(server.address).await;
        for _ in 0..requests_before {
            // One that is for the HTTP library.
            let answer = client.get("/healthz", &[("connection", "keep-alive"), ("expect", "")]);
            assert_eq!(answer.await.status, StatusCode::OK);
        }
        let answer = client.get("/healthz", &fields).await;
        assert_eq!(answer.status, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
        assert!(answer.body.is_empty());
    }
}

/// Sends bytes, and reads what comes until the connection ends.
async fn exchange(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes).await.unwrap();
    let mut all = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut all));
    let _ = read.await.expect("the connection stays open");
    String::from_utf8_lossy(&all).into_owned()
}

#[tokio::test]
async fn http_2_begins_no_later_than_a_connection() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let mut bytes = b"GET /images/none HTTP/1.1\r\nHost: a\r\n\r\n".to_vec();
    bytes.extend(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
    let answer = exchange(server.address, &bytes).await;
    assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
}

#[tokio::test]
async fn a_later_version_of_http_1_is_answered_as_http_1_1() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    redis.set("a", &record(&png(1, 1000))).await;
    let request = b"GET /images/a HTTP/1.2\r\nHost: a\r\nConnection: close\r\n\r\n";
    let answer = exchange(server.address, request).await;
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
}

async fn idle_connections_leave_files_for_the_store() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 1000))).await;
    let mut command = program_below(&["prlimit", "--nofile=400:400"]);
    command.args(["--redis-url", &redis.url()]);
    let process = Process::start(command);
    let mut client = Client::connect(process.address).await;
    assert_eq!(client.get("/images/a", &[]).await.status, StatusCode::OK);
    let mut idle = Vec::new();
    for _ in 0..600 {
        // Half of them from elsewhere, so that no share ends before the files do.
        let from = [127, 0, 0, 1 + u8::try_from(idle.len() % 200).unwrap()];
        idle.push(connect_from(from, process.address).await);
    }
    // All connections to Redis are made anew.
    for kind in ["normal", "pubsub"] {
        let mut connection = redis.connect().await;
        let kill = redis::cmd("CLIENT").arg(&["KILL", "TYPE", kind]).to_owned();
        let _: u64 = kill.query_async(&mut connection).await.unwrap();
    }
    redis.set("b", &record(&png(2, 1000))).await;
    // All places are taken, so it is this connection that can ask.
    let began = Instant::now();
    while !String::from_utf8_lossy(&client.get("/readyz", &[]).await.body).contains("\"coherent\"")
    {
        assert!(began.elapsed() < PATIENCE, "Redis can't be reached");
    }
    assert_eq!(client.get("/images/b", &[]).await.status, StatusCode::OK);
}

async fn requests_sent_ahead_of_their_answers_keep_no_memory_of_the_kernel() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    redis.set("a", &record(&png(1, 1_000_000))).await;
    assert_eq!(server.get("/images/a").await.status, StatusCode::OK);
    let mut unread = Vec::new();
    for _ in 0..200 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let mut stream = socket.connect(server.address).await.unwrap();
        let ahead = b"GET /images/a HTTP/1.1\r\nHost: a\r\n\r\n".repeat(20);
        stream.write_all(&ahead).await.unwrap();
        stream.readable().await.unwrap();
        unread.push(stream);
    }
    others_are_answered(&server, &redis).await;
    let page: Answer = server.get("/metrics").await;
    let taken = metric(&page, "afterimage_response_bytes_total");
    // The kernel holds less than one answer for each.
    assert!(taken < 200 * 1_000_000, "{taken}");
}
