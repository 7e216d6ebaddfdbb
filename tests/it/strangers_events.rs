//! Event streams of strangers: many of them, blocked ones, and listings again and again. Others are answered meanwhile,
//! nothing is lost, and what they hold and cost is bounded.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use crate::events::Events;
use crate::harness::server::{metric, program};
use crate::harness::{
    Client, PATIENCE, Process, RedisServer, Server, etag, get, png, record, until,
};

long_tests! {
    #[tokio::test(flavor = "multi_thread")]
    thousands_of_streams_delay_no_image_and_miss_no_change_of_a_burst
    #[tokio::test(flavor = "multi_thread")] a_blocked_stream_holds_little_and_ends_with_the_newest_state
    #[tokio::test(flavor = "multi_thread")] prefix_streams_share_a_few_listings
    #[tokio::test(flavor = "multi_thread")]
    events_have_addresses_only_while_slow_clients_hold_too_many_images
}

/// Starts the program on a Redis, in a process of its own.
async fn process(redis: &RedisServer) -> Process {
    rlimit::increase_nofile_limit(20_000).unwrap();
    let mut command = program();
    command.args(["--redis-url", &redis.url(), "--log-filter", "warn"]);
    let process = Process::start(command);
    let address = process.address;
    until("the server is coherent", || async {
        get(address, "/readyz", &[]).await.body.windows(10).any(|it| it == b"\"coherent\"")
    })
    .await;
    process
}

/// Opens a stream by hand, whose bytes the caller reads or doesn't.
async fn open(address: SocketAddr, query: &str, reads: bool) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    if !reads {
        // The kernel buffers little, the rest waits in the server.
        socket.set_recv_buffer_size(4096).unwrap();
    }
    let mut stream = socket.connect(address).await.unwrap();
    let request = format!("GET /events?{query} HTTP/1.1\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

/// The newest version of each image that the bytes of a stream tell of.
#[derive(Default)]
struct Told {
    rest: Vec<u8>,
    versions: HashMap<Vec<u8>, Vec<u8>>,
    lists: usize,
}

impl Told {
    fn take(&mut self, bytes: &[u8]) {
        self.rest.extend_from_slice(bytes);
        let mut begin = 0;
        while let Some(end) = self.rest[begin..].iter().position(|byte| *byte == b'\n') {
            let line = &self.rest[begin..begin + end];
            begin += end + 1;
            // {"type":"concept_progress","data":{"concept_id":"n7","full":"/images/n7?v=…","thumbnail":…
            let beginning =
                &b"data: {\"type\":\"concept_progress\",\"data\":{\"concept_id\":\""[..];
            if line.starts_with(b"event: concept_list") {
                self.lists += 1;
            } else if let Some(rest) = line.strip_prefix(beginning) {
                let id = rest.iter().position(|byte| *byte == b'"').unwrap();
                let version = 2 * id + "\",\"full\":\"/images/?v=".len();
                self.versions.insert(rest[..id].to_vec(), rest[version..version + 32].to_vec());
            }
        }
        self.rest.drain(..begin);
    }
}

/// Writes the changes of a burst in one pipeline. Gives the newest versions.
async fn burst(
    redis: &RedisServer,
    images: usize,
    changes: usize,
    length: usize,
    seed: u64,
) -> HashMap<Vec<u8>, Vec<u8>> {
    let (mut pipe, mut newest) = (redis::pipe(), HashMap::new());
    for change in 0..changes {
        let id = format!("n{}", change % images);
        let value = record(&png(seed + change as u64, length));
        pipe.cmd("SET").arg(format!("image:{id}")).arg(&value).ignore();
        newest.insert(id.into_bytes(), etag(&value).trim_matches('"').as_bytes().to_vec());
    }
    pipe.exec_async(&mut redis.connect().await).await.unwrap();
    newest
}

/// Asks for an image every few milliseconds until told to stop, in a thread that has nothing else to do. Gives the times
/// of the answers, in order of length.
fn ask_for_an_image(
    address: SocketAddr,
    stop: &Arc<AtomicBool>,
) -> std::thread::JoinHandle<Vec<Duration>> {
    let stop = Arc::clone(stop);
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(asked(address, stop))
    })
}

async fn asked(address: SocketAddr, stop: Arc<AtomicBool>) -> Vec<Duration> {
    let (mut client, mut times) = (Client::connect(address).await, Vec::new());
    let mut tick = tokio::time::interval(Duration::from_millis(5));
    while !stop.load(Ordering::Relaxed) {
        tick.tick().await;
        let asked = Instant::now();
        let answer = client.get("/images/unrelated", &[]).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        times.push(asked.elapsed());
    }
    times.sort();
    times
}

/// Waits until images were sent more than this many times.
async fn until_asked_for(address: SocketAddr, times: u64) {
    let name = r#"afterimage_requests_total{route="/images/{id}",method="GET",status="200"} "#;
    until("the image was asked for often enough", || async {
        let page = get(address, "/metrics", &[]).await;
        String::from_utf8_lossy(&page.body).lines().any(|line| {
            line.strip_prefix(name).is_some_and(|count| count.parse::<u64>().unwrap() > times)
        })
    })
    .await;
}

async fn thousands_of_streams_delay_no_image_and_miss_no_change_of_a_burst() {
    const STREAMS: usize = 3000;
    const IMAGES: usize = 100;
    let redis = RedisServer::start().await;
    redis.set("unrelated", &record(&png(0, 3000))).await;
    let process = process(&redis).await;
    let address = process.address;
    let stop = Arc::new(AtomicBool::new(false));
    let alone = ask_for_an_image(address, &stop);
    let mut newest = burst(&redis, IMAGES, IMAGES, 300, 0).await;
    until_asked_for(address, 300).await;
    stop.store(true, Ordering::Relaxed);
    let alone = alone.join().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let opening = ask_for_an_image(address, &stop);

    let (sender, expected) = tokio::sync::watch::channel(newest.clone());
    let mut streams = Vec::new();
    for number in 0..STREAMS {
        // All images, or ten of them.
        let ids: Vec<String> = (0..10).map(|it| format!("n{}", (number + it) % IMAGES)).collect();
        let query = if number % 2 == 0 {
            "prefix=n&inline=none".to_owned()
        } else {
            format!("inline=none&ids={}", ids.join(","))
        };
        let mut stream = open(address, &query, true).await;
        let mut expected = expected.clone();
        streams.push(tokio::spawn(async move {
            let (mut told, mut buffer) = (Told::default(), vec![0; 16 * 1024]);
            loop {
                let is_newest = {
                    let expected = expected.borrow_and_update();
                    let count = if number % 2 == 0 { IMAGES } else { 10 };
                    told.versions.len() == count
                        && told.versions.iter().all(|(id, it)| expected.get(id) == Some(it))
                };
                // The last expectation is the one that stays.
                tokio::select! {
                    read = stream.read(&mut buffer) => {
                        let length = read.unwrap();
                        assert!(length > 0, "the stream has ended");
                        told.take(&buffer[..length]);
                    }
                    changed = expected.changed() => {
                        if changed.is_err() && is_newest {
                            return;
                        }
                        if changed.is_err() {
                            let length = stream.read(&mut buffer).await.unwrap();
                            assert!(length > 0, "the stream has ended");
                            told.take(&buffer[..length]);
                        }
                    }
                }
            }
        }));
    }
    stop.store(true, Ordering::Relaxed);
    let opening = opening.join().unwrap();

    let stop = Arc::new(AtomicBool::new(false));
    let asking = ask_for_an_image(address, &stop);
    for round in 1..=3 {
        newest = burst(&redis, IMAGES, 1000, 300, round * 10_000).await;
        sender.send_replace(newest.clone());
        let last = format!("n{}", IMAGES - 1);
        let version = String::from_utf8(newest[last.as_bytes()].clone()).unwrap();
        until("the burst is known", || async {
            get(address, &format!("/images/{last}"), &[]).await.header("etag").contains(&version)
        })
        .await;
    }
    drop(sender);
    let began = Instant::now();
    for stream in streams {
        let told = tokio::time::timeout(Duration::from_mins(2), stream).await;
        told.expect("a stream misses the newest state").unwrap();
    }
    let caught_up = began.elapsed();
    stop.store(true, Ordering::Relaxed);
    let times = asking.join().unwrap();
    let at = |times: &[Duration], share: usize| times[(times.len() - 1) * share / 1000];
    println!(
        "an image alone: p50 {:?}, p99 {:?}; beside opening streams: p50 {:?}, p99 {:?}; \
         beside bursts: p50 {:?}, p99 {:?}, worst {:?}; \
         all streams have the newest state after {caught_up:?}; {} MiB resident",
        at(&alone, 500),
        at(&alone, 990),
        at(&opening, 500),
        at(&opening, 990),
        at(&times, 500),
        at(&times, 990),
        at(&times, 1000),
        process.resident() >> 20,
    );
}

async fn a_blocked_stream_holds_little_and_ends_with_the_newest_state() {
    const STREAMS: usize = 300;
    // More than the log of changes has.
    const IMAGES: usize = 20_000;
    let redis = RedisServer::start().await;
    let process = process(&redis).await;
    let address = process.address;
    let query = "prefix=n&inline=full";
    let metric =
        |name: &'static str| async move { metric(&get(address, "/metrics", &[]).await, name) };
    // The log of changes fills first.
    let mut blocked = vec![open(address, query, false).await];
    burst(&redis, IMAGES, IMAGES, 2000, 0).await;
    until("the first stream has events", || async {
        metric("afterimage_events_total").await > 100
    })
    .await;
    let before = process.resident();
    for _ in 1..STREAMS {
        blocked.push(open(address, query, false).await);
    }
    until("all streams are open", || async {
        metric("afterimage_event_streams").await == STREAMS as u64
    })
    .await;
    for round in 1..=2 {
        burst(&redis, IMAGES, IMAGES, 2000, round * 100_000).await;
    }
    let mark = async |seed: u64| {
        let value = record(&png(seed, 2000));
        redis.set("n_last", &value).await;
        etag(&value).trim_matches('"').to_owned()
    };
    let version = mark(1).await;
    until("the last change is known", || async {
        get(address, "/images/n_last", &[]).await.header("etag").contains(&version)
    })
    .await;
    let held = process.resident().saturating_sub(before) / STREAMS as u64;
    println!("{} KiB for each blocked stream", held >> 10);
    assert!(held < 96 * 1024, "{held} bytes for each blocked stream");
    // They read on. Once one has caught up, it is told of each change again. It may have to wait for a listing, and each
    // listing for its share of the time.
    for (number, mut stream) in (2..).zip(blocked.into_iter().take(3)) {
        let (mut told, mut buffer) = (Told::default(), vec![0; 64 * 1024]);
        let (mut version, began) = (version.clone(), Instant::now());
        while told.versions.get(&b"n_last"[..]).is_none_or(|it| it[..] != *version.as_bytes()) {
            assert!(began.elapsed() < 3 * PATIENCE, "the newest state doesn't arrive");
            let read = stream.read(&mut buffer);
            match tokio::time::timeout(Duration::from_millis(300), read).await {
                Ok(read) => {
                    let length = read.unwrap();
                    assert!(length > 0, "the stream has ended");
                    told.take(&buffer[..length]);
                }
                Err(_nothing) => version = mark(number).await,
            }
        }
    }
}

async fn prefix_streams_share_a_few_listings() {
    const KEYS: usize = 50_000;
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    for chunk in 0..KEYS / 1000 {
        let mut filled = redis::pipe();
        for number in 0..1000 {
            filled.cmd("SET").arg(format!("image:other{chunk}_{number}")).arg("x").ignore();
        }
        filled.exec_async(&mut redis.connect().await).await.unwrap();
    }
    burst(&redis, 20, 20, 300, 0).await;
    let scans = || async { redis.calls().await.get("scan").copied().unwrap_or_default() };
    // A listing visits a few keys more than there are.
    let listings = || async { scans().await / (KEYS as u64 / 1000) };

    // One after the other, each until it has its list.
    redis.reset_calls().await;
    for round in 0..52 {
        let mut events = Events::of(server.address, "prefix=n&inline=none").await;
        let mut told = 0;
        while events.next().await.name != "concept_list" {
            told += 1;
        }
        assert_eq!(told, 20 + usize::from(round >= 26));
        if round == 25 {
            // A change between two of them is no reason for another listing.
            redis.set("n20", &record(&png(20, 300))).await;
            until("the change is known", || async {
                server.get("/images/n20").await.status == 200
            })
            .await;
        }
    }
    println!("{} SCANs for 52 streams with one prefix", scans().await);
    assert!(listings().await <= 2, "{} SCANs", scans().await);

    // At once, each with another prefix.
    redis.reset_calls().await;
    let mut streams = Vec::new();
    for number in 0..52 {
        streams
            .push(Events::of(server.address, &format!("prefix=other{number}_1&inline=none")).await);
    }
    for events in &mut streams {
        while events.next().await.name != "concept_list" {}
    }
    println!("{} SCANs for 52 streams with as many prefixes", scans().await);
    assert!(listings().await <= 6, "{} SCANs", scans().await);
}

async fn events_have_addresses_only_while_slow_clients_hold_too_many_images() {
    // More than a socket's buffers take.
    const LENGTH: usize = 4_000_000;
    const STREAMS: usize = 20;
    let redis = RedisServer::start().await;
    let settings = [
        ("events.inline_bytes", "8MiB"),
        // Hashing and decoding takes long in an unoptimised build.
        ("redis.response_timeout", "30s"),
        ("cache.bytes", "256MiB"),
    ];
    let server = Server::on(&redis, &settings).await.coherent().await;
    for number in 0..=STREAMS {
        redis.set(&format!("n{number}"), &record(&png(number as u64, LENGTH))).await;
    }
    let mut blocked = Vec::new();
    for number in 0..STREAMS {
        blocked.push(open(server.address, &format!("ids=n{number}&inline=full"), false).await);
    }
    let query = format!("ids=n{STREAMS}&inline=full");
    let has_image = || async {
        let event = Events::of(server.address, &query).await.next().await;
        assert_eq!(event.name, "concept_progress");
        event.data()["image_data"].is_string()
    };
    until("slow clients hold too much", || async { !has_image().await }).await;
    drop(blocked);
    until("they hold nothing any more", has_image).await;
}
