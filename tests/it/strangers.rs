//! Attacks by one client, beside the requests of others, who are answered all the same.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::future::join_all;
use hyper::{Method, StatusCode};
use image::ImageFormat;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::harness::server::{metric, program, program_below};
use crate::harness::{
    Answer, Client, PATIENCE, Process, Protocol, RedisServer, Server, get, png, record, until,
};
use crate::resident::deep_png;
use crate::variants::{encoded, picture};

long_tests! {
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    idle_connections_leave_files_for_the_store
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    requests_sent_ahead_of_their_answers_keep_no_memory_of_the_kernel
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    others_are_answered_during_every_attack_and_memory_stays_bounded
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    under_all_attacks_at_once_memory_stays_within_the_sum_of_its_budgets
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    a_client_that_fetches_and_holds_takes_one_share_and_others_find_room
}

/// A connection of HTTP/2 frames, made by hand.
struct Frames(TcpStream);

impl Frames {
    /// Opens a connection from another address of this machine, whose streams may not be sent a byte.
    async fn without_window(address: SocketAddr) -> Frames {
        Frames::without_window_from([127, 0, 0, 2], address).await
    }

    async fn without_window_from(ip: [u8; 4], address: SocketAddr) -> Frames {
        let mut stream = connect_from(ip, address).await;
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

    /// `RST_STREAM` with CANCEL (RFC 9113 §6.4).
    async fn reset(&mut self, stream: u32) -> std::io::Result<()> {
        let mut frame = vec![0, 0, 4, 0x03, 0];
        frame.extend(stream.to_be_bytes());
        frame.extend([0, 0, 0, 8]);
        self.0.write_all(&frame).await
    }
}

/// A connection from another address of this machine.
pub(crate) async fn connect_from(ip: [u8; 4], address: SocketAddr) -> TcpStream {
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

/// Attacks with the default settings, each from an address of its own.
#[derive(Debug, Clone, Copy)]
enum Attack {
    /// Streams of `/healthz` whose answers nobody takes.
    HealthStreams,
    /// Streams of an image whose answers nobody takes.
    ImageStreams,
    /// Large images that are read a few bytes at a time.
    SlowReaders,
    Placeholders,
    /// One byte of many images.
    Ranges,
    /// Thousands of forms of a tiny picture.
    Forms,
    RandomIds,
    /// Streams that are reset as soon as they are open.
    Resets,
    /// Requests that are sent ahead of answers that nobody takes.
    Ahead,
    /// Connections without a request.
    Idle,
    /// Large images that are written, several at a time.
    Writes,
    /// A picture that takes much memory, in one size after the other.
    Renders,
    /// Streams of events that nobody reads.
    Events,
}

impl Attack {
    /// Those beside which a core is left for the others.
    const LIGHT: [Attack; 10] = [
        Attack::HealthStreams,
        Attack::ImageStreams,
        Attack::SlowReaders,
        Attack::Placeholders,
        Attack::Ranges,
        Attack::Forms,
        Attack::RandomIds,
        Attack::Resets,
        Attack::Ahead,
        Attack::Idle,
    ];

    const HEAVY: [Attack; 3] = [Attack::Writes, Attack::Renders, Attack::Events];

    /// Runs until it is dropped. Whatever fails is the attacker's affair.
    async fn run(self, address: SocketAddr) {
        let from = [127, 0, 1, self as u8];
        let large = match self {
            Attack::Writes => png(1, 20 << 20).into(),
            _ => Bytes::new(),
        };
        let mut held = Vec::new();
        for round in 0_u64.. {
            match self {
                Attack::HealthStreams => {
                    hold_streams(&mut held, from, address, 1, "/healthz").await;
                }
                Attack::ImageStreams => {
                    hold_streams(&mut held, from, address, 200, "/images/a").await;
                }
                Attack::SlowReaders => read_slowly(&mut held, from, address).await,
                Attack::Placeholders => {
                    ask(from, address, |n| (format!("/placeholders/64x64?text={round}-{n}"), None))
                        .await;
                }
                Attack::Ranges => {
                    ask(from, address, |n| (format!("/images/n{}", n % 60), Some("bytes=0-0")))
                        .await;
                }
                Attack::Forms => {
                    let sizes =
                        [16, 32, 48, 64, 96, 128, 256, 320, 384, 512, 640, 1080, 1200, 2048];
                    let quality = [50, 60, 70, 75, 80, 85, 90, 95];
                    ask(from, address, |n| {
                        let n = usize::try_from(n + 50 * round).unwrap();
                        let (w, h) = (sizes[n % 14], sizes[n / 14 % 14]);
                        let q = quality[n / 196 % 8];
                        (format!("/images/dot?w={w}&h={h}&q={q}&format=jpg"), None)
                    })
                    .await;
                }
                Attack::RandomIds => {
                    ask(from, address, |n| (format!("/images/x{round}-{n}"), None)).await;
                }
                Attack::Resets => {
                    let mut frames = Frames::without_window_from(from, address).await;
                    for stream in 0..1000 {
                        let path = format!("/images/n{}", stream % 60);
                        let stream = 2 * stream + 1;
                        if frames.get(stream, &path).await.is_err()
                            || frames.reset(stream).await.is_err()
                        {
                            break;
                        }
                    }
                }
                Attack::Ahead => {
                    if held.len() < 1500 {
                        let mut stream = small_window(from, address).await;
                        let ahead = b"GET /images/a HTTP/1.1\r\nHost: a\r\n\r\n".repeat(20);
                        let _ = stream.write_all(&ahead).await;
                        held.push(Frames(stream));
                    } else {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
                Attack::Idle => {
                    if held.len() < 1500 {
                        held.push(Frames(connect_from(from, address).await));
                    } else {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
                Attack::Writes => {
                    let write = |number| write(from, address, number, large.clone());
                    join_all((0..4).map(write)).await;
                }
                Attack::Renders => render(from, address, round).await,
                Attack::Events => {
                    if held.len() < 300 {
                        let mut stream = small_window(from, address).await;
                        let query = "GET /events?prefix=e&inline=full HTTP/1.1";
                        let request = format!("{query}\r\nHost: {address}\r\n\r\n");
                        let _ = stream.write_all(request.as_bytes()).await;
                        held.push(Frames(stream));
                    } else {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        }
    }
}

/// Asks for large images, and reads them a byte at a time.
async fn read_slowly(held: &mut Vec<Frames>, from: [u8; 4], address: SocketAddr) {
    for number in 0..87 {
        let mut stream = small_window(from, address).await;
        let path = format!("GET /images/large{} HTTP/1.1\r\nHost: a\r\n\r\n", number % 20);
        let _ = stream.write_all(path.as_bytes()).await;
        held.push(Frames(stream));
    }
    for _ in 0..50 {
        for Frames(stream) in &mut *held {
            let _ = stream.try_read(&mut [0; 1]);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Opens streams on some connections, and holds them for a while.
async fn hold_streams(
    held: &mut Vec<Frames>,
    from: [u8; 4],
    address: SocketAddr,
    connections: usize,
    path: &str,
) {
    if held.len() >= connections {
        tokio::time::sleep(Duration::from_millis(100)).await;
        // Those that were ended are opened anew.
        held.retain(|it| it.0.try_write(&[]).is_ok());
        return;
    }
    let mut frames = Frames::without_window_from(from, address).await;
    for stream in 0..100 {
        let _ = frames.get(2 * stream + 1, path).await;
    }
    held.push(frames);
}

/// A connection of which the kernel of the client takes little.
pub(crate) async fn small_window(from: [u8; 4], address: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    socket.bind((from, 0).into()).unwrap();
    socket.connect(address).await.unwrap()
}

/// Sends fifty requests, one after the other.
async fn ask(
    from: [u8; 4],
    address: SocketAddr,
    request: impl Fn(u64) -> (String, Option<&'static str>),
) {
    let stream = connect_from(from, address).await;
    let mut client = Client::over(Protocol::Http1, stream, "a").await;
    for number in 0..50 {
        let (path, range) = request(number);
        let fields: Vec<_> = range.map(|it| ("range", it)).into_iter().collect();
        if client.send(Method::GET, &path, &fields, Bytes::new()).await.is_err() {
            return;
        }
    }
}

/// Asks for a picture in a width and several heights and qualities.
async fn render(from: [u8; 4], address: SocketAddr, round: u64) {
    let widths = [16, 32, 48, 64, 96, 128, 256, 320, 384, 512];
    let width = widths[usize::try_from(round).unwrap() % widths.len()];
    let of_quality = |quality| {
        ask(from, address, move |number| {
            let height = 16 * (number % 3 + 1);
            (format!("/images/deep.webp?w={width}&h={height}&q={quality}"), None)
        })
    };
    join_all([50, 60].map(of_quality)).await;
}

/// Writes an image.
async fn write(from: [u8; 4], address: SocketAddr, number: u64, body: Bytes) {
    let stream = connect_from(from, address).await;
    let mut client = Client::over(Protocol::Http1, stream, &address.to_string()).await;
    let fields = [("content-type", "image/png")];
    let _ = client.send(Method::PUT, &format!("/images/w{number}"), &fields, body).await;
}

/// Answers to another client, as its median and its 99th percentile.
async fn other_client(address: SocketAddr) -> [Duration; 2] {
    let mut client = Client::connect(address).await;
    let mut times = Vec::new();
    for number in 0..500 {
        let path = format!("/images/warm{}", number % 10);
        let began = Instant::now();
        assert_eq!(client.get(&path, &[]).await.status, StatusCode::OK);
        times.push(began.elapsed());
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    times.sort_unstable();
    [times[250], times[495]]
}

/// A Redis with the images that attacks and others ask for.
async fn redis_to_attack() -> RedisServer {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 1_000_000))).await;
    let dot = encoded(&picture(1, 1, 1), ImageFormat::Png);
    redis.set("dot", &record(&dot)).await;
    for number in 0..20 {
        redis.set(&format!("large{number}"), &record(&png(number, 3_000_000))).await;
    }
    for number in 0..60 {
        redis.set(&format!("n{number}"), &record(&png(number, 1_000_000))).await;
    }
    for number in 0..10 {
        redis.set(&format!("warm{number}"), &record(&png(number, 100_000))).await;
    }
    redis
}

const MIB: u64 = 1024 * 1024;

async fn others_are_answered_during_every_attack_and_memory_stays_bounded() {
    let redis = redis_to_attack().await;
    let mut command = program();
    command.args(["--redis-url", &redis.url(), "--log-access", "false"]);
    let process = Process::start(command);
    let address = process.address;
    other_client(address).await;
    let mut highest = 0;
    for attack in Attack::LIGHT {
        let before = other_client(address).await;
        let attacker = tokio::spawn(attack.run(address));
        tokio::time::sleep(Duration::from_millis(500)).await;
        let during = other_client(address).await;
        for path in ["/healthz", "/readyz", "/images/n1"] {
            assert_eq!(get(address, path, &[]).await.status, StatusCode::OK, "{attack:?} {path}");
        }
        let resident = process.resident();
        highest = highest.max(resident);
        attacker.abort();
        println!(
            "{attack:?}: p50 {:?} to {:?}, p99 {:?} to {:?}, {} MiB resident",
            before[0],
            during[0],
            before[1],
            during[1],
            resident / MIB
        );
    }
    assert!(highest < MOST_RESIDENT, "{} MiB", highest / MIB);
}

/// The sum of the budgets by default (`docs/limits.md`): `[cache] bytes` and the heads beside it, `[limits] fetch_bytes` and
/// `write_bytes`, and 100 MiB for everything else.
const MOST_RESIDENT: u64 = (50 + 16 + 256 + 256 + 100) * MIB;

/// The short run is for the second tier, the long one for the soak.
async fn under_all_attacks_at_once_memory_stays_within_the_sum_of_its_budgets() {
    let seconds = std::env::var("AFTERIMAGE_TEST_STRANGERS_SECONDS");
    let seconds = seconds.map_or(8, |it| it.parse().expect("a number of seconds"));
    rlimit::increase_nofile_limit(20_000).unwrap();
    let redis = redis_to_attack().await;
    // 69 MiB in 8 bits a channel.
    redis.set("deep", &record(&deep_png(4900))).await;
    let mut command = program();
    command.args(["--redis-url", &redis.url(), "--log-access", "false", "--log-filter", "error"]);
    // Two cores are shared with thirteen attackers.
    command.args(["--redis-response-timeout", "30s", "--pictures-timeout", "30s"]);
    let process = Process::start(command);
    let address = process.address;
    other_client(address).await;
    let began = Instant::now();
    let attackers: Vec<_> = Attack::LIGHT
        .into_iter()
        .chain(Attack::HEAVY)
        .map(|attack| tokio::spawn(attack.run(address)))
        .collect();
    let (mut client, mut number, mut samples) = (Client::connect(address).await, 0, Vec::new());
    while began.elapsed() < Duration::from_secs(seconds) {
        number += 1;
        redis.set(&format!("new{number}"), &record(&png(number, 100_000))).await;
        for path in [
            "/healthz".to_owned(),
            "/readyz".to_owned(),
            format!("/images/warm{}", number % 10),
            format!("/images/new{number}"),
        ] {
            let answer = client.get(&path, &[]).await;
            assert_eq!(answer.status, StatusCode::OK, "{path}: {answer:?}");
        }
        // What the streams of events follow.
        let body = Bytes::from(png(number, 2000));
        let (path, fields) =
            (format!("/images/e{}", number % 100), [("content-type", "image/png")]);
        let written = client.send(Method::PUT, &path, &fields, body).await.unwrap();
        assert!(written.status.is_success(), "{written:?}");
        samples.push(process.resident() / MIB);
    }
    for attacker in attackers {
        attacker.abort();
    }
    let page = get(address, "/metrics", &[]).await;
    for line in String::from_utf8_lossy(&page.body).lines() {
        if line.starts_with("afterimage_shed_total") || line.starts_with("afterimage_dropped") {
            println!("{line}");
        }
    }
    let most = process.most_resident();
    samples.sort_unstable();
    println!(
        "{number} rounds of others in {:?}; resident: {} MiB in half of them, {} MiB at most, of {} MiB",
        began.elapsed(),
        samples[samples.len() / 2],
        most / MIB,
        MOST_RESIDENT / MIB
    );
    assert!(most < MOST_RESIDENT, "{} MiB", most / MIB);
}

async fn a_client_that_fetches_and_holds_takes_one_share_and_others_find_room() {
    let redis = RedisServer::start().await;
    // The cache keeps one image, and the budget has room for four more.
    let settings =
        [("cache.images", "1"), ("limits.fetch_bytes", "40MB"), ("cache.bytes", "100MiB")];
    let server = Server::on(&redis, &settings).await.coherent().await;
    for number in 0..24 {
        redis.set(&format!("i{number}"), &record(&png(number, 4_000_000))).await;
    }
    let slow = async |from: [u8; 4], number: usize| {
        let mut stream = small_window(from, server.address).await;
        let request = format!("GET /images/i{number} HTTP/1.1\r\nHost: a\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        stream
    };
    // One reader takes its time, but holds little.
    let mut modest = slow([127, 0, 0, 3], 0).await;
    modest.readable().await.unwrap();
    // Another client holds all that it gets, and goes on fetching.
    let mut greedy = Vec::new();
    for number in 1..20 {
        greedy.push(slow([127, 0, 0, 2], number).await);
    }
    for number in 20..24 {
        let path = format!("/images/i{number}");
        assert_eq!(server.get(&path).await.body, png(number, 4_000_000), "{path}");
    }
    let in_flight = server.metric("afterimage_in_flight_bytes").await;
    assert!(in_flight <= 40_000_000, "{in_flight}");
    until("the greedy client has lost connections of its own", || async {
        let dropped = "afterimage_dropped_connections_total{reason=\"memory\"}";
        server.metric(dropped).await > 0
    })
    .await;
    let mut whole = vec![0; 4_000_000];
    let read = tokio::time::timeout(PATIENCE, modest.read_exact(&mut whole));
    read.await.expect("it goes on").expect("the connection of another client was dropped");
}

#[tokio::test]
async fn answers_over_http_1_are_accounted_to_the_client_that_a_trusted_proxy_names() {
    const LENGTH: usize = 8_000_000;
    let redis = RedisServer::start().await;
    let settings = [("http.trusted_proxies", "[\"127.0.0.1\"]"), ("limits.answers", "12")];
    let server = Server::on(&redis, &settings).await.coherent().await;
    redis.set("a", &record(&png(1, LENGTH))).await;
    for _ in 0..2 {
        assert_eq!(server.get("/images/a").await.status, StatusCode::OK);
    }
    let slow = async |client: &str| {
        let mut stream = small_window([127, 0, 0, 1], server.address).await;
        let request =
            format!("GET /images/a HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: {client}\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        stream.readable().await.unwrap();
        stream
    };
    let mut modest = Vec::new();
    for _ in 0..3 {
        modest.push(slow("192.0.2.1").await);
    }
    let mut greedy = Vec::new();
    for _ in 0..40 {
        greedy.push(slow("192.0.2.2").await);
    }
    until("too many answers have ended connections", || async {
        server.metric("afterimage_dropped_connections_total{reason=\"answers\"}").await >= 20
    })
    .await;
    for mut stream in modest {
        let mut whole = vec![0; LENGTH];
        let read = tokio::time::timeout(PATIENCE, stream.read_exact(&mut whole));
        read.await.expect("it goes on").expect("the connection of the modest client was dropped");
    }
}
