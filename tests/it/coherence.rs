//! Coherence: a hit costs no Redis command, and a replaced image is never served. Runs on Redis 7, Redis 8 and Valkey 9.

use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::{Method, StatusCode};
use redis::AsyncTypedCommands;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{
    Client, Flavour, Held, Proxy, RedisServer, Server, etag, png, record, until, until_hit,
};

/// Runs the same tests on each server. A server that isn't installed fails its tests.
macro_rules! on_every_server {
    ($($test:ident)*) => {
        on_every_server!(@module redis_7, Flavour::Redis, $($test)*);
        on_every_server!(@module redis_8, Flavour::Redis8, $($test)*);
        on_every_server!(@module valkey_9, Flavour::Valkey9, $($test)*);
    };
    (@module $module:ident, $flavour:expr, $($test:ident)*) => {
        mod $module {
            use crate::harness::Flavour;
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $test() {
                    super::$test($flavour).await;
                }
            )*
        }
    };
}
pub(crate) use on_every_server;

on_every_server! {
    a_304_a_head_and_a_404_need_neither_redis_nor_bytes
    a_404_becomes_200_when_the_key_is_written
    every_kind_of_change_to_a_key_invalidates_it
    an_expired_image_is_gone_even_before_redis_reclaims_it
    a_refreshed_time_to_live_costs_neither_hash_nor_decode
}

mod long {
    use super::{
        a_thousand_requests_for_a_cold_image_cost_one_get_and_one_decode,
        twenty_thousand_hits_cost_no_redis_command,
    };

    on_every_server! {
        twenty_thousand_hits_cost_no_redis_command
        a_thousand_requests_for_a_cold_image_cost_one_get_and_one_decode
    }
}

async fn coherent(flavour: Flavour) -> (RedisServer, Server) {
    let redis = RedisServer::start_flavour(flavour, &[]).await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    (redis, server)
}

/// Waits until the server serves this version of `a`, after the push.
async fn until_version(server: &Server, value: &[u8]) {
    let etag = etag(value);
    until("the new version is served", || async {
        server.get("/images/a").await.header("etag") == etag
    })
    .await;
}

async fn until_status(server: &Server, status: u16) {
    until("the status has changed", || async { server.get("/images/a").await.status == status })
        .await;
}

/// Asserts that Redis has seen only heartbeats and the test's own commands.
async fn only_heartbeats(redis: &RedisServer) {
    let calls = redis.calls().await;
    let own = [
        "hello",
        "strlen",
        "role",
        "info",
        "client|info",
        "client|setinfo",
        "config|resetstat",
        "command",
    ];
    let others: Vec<_> = calls.keys().filter(|name| !own.contains(&name.as_str())).collect();
    assert!(others.is_empty(), "{calls:?}");
    // One with each heartbeat, beside its HELLO.
    assert!(calls.get("strlen") <= calls.get("hello"), "{calls:?}");
}

async fn twenty_thousand_hits_cost_no_redis_command(flavour: Flavour) {
    const BATCH: usize = 500;
    let (redis, server) = coherent(flavour).await;
    let value = record(&png(1, 2000));
    redis.set("a", &value).await;
    until_hit(server.address, &value).await;
    let fetches = server.metric("afterimage_fetches_total").await;
    redis.reset_calls().await;

    // Pipelined for speed: each response has the same length.
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    let request = b"GET /images/a HTTP/1.1\r\nhost: test\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut first = vec![0; 64 * 1024];
    let mut length = 0;
    while !first[..length].windows(4).any(|it| it == b"\r\n\r\n") || length < 2000 {
        length += stream.read(&mut first[length..]).await.unwrap();
    }
    let expected = first[..length].to_vec();
    let body = expected.len() - 2000;
    let mut answers = vec![0; BATCH * expected.len()];
    for _ in 0..20_000 / BATCH {
        stream.write_all(&request.repeat(BATCH)).await.unwrap();
        stream.read_exact(&mut answers).await.unwrap();
        for answer in answers.chunks_exact(expected.len()) {
            assert!(answer.starts_with(b"HTTP/1.1 200 OK"));
            assert_eq!(answer[body..], expected[body..]);
        }
    }
    only_heartbeats(&redis).await;
    assert_eq!(server.metric("afterimage_fetches_total").await, fetches);
}

async fn a_thousand_requests_for_a_cold_image_cost_one_get_and_one_decode(flavour: Flavour) {
    for first_hangs_up in [false, true] {
        let redis = RedisServer::start_flavour(flavour, &[]).await;
        let proxy = Proxy::to(redis.port).await;
        let url = format!("redis://{}", proxy.address);
        let settings = [("redis.url", url.as_str()), ("redis.response_timeout", "1m")];
        let server = Server::start(&settings).await.coherent().await;
        let bytes = png(1, 300_000);
        redis.set("a", &record(&bytes)).await;
        // Open the data connections, which are held later.
        for number in 0..8 {
            server.get(&format!("/images/n{number}")).await.problem(404, "absent");
        }
        let fetches = server.metric("afterimage_fetches_total").await;
        redis.reset_calls().await;
        let mut clients = Vec::new();
        for _ in 0..1000 {
            clients.push(Client::connect(server.address).await);
        }
        // No response comes until every client has sent its request.
        proxy.hold(Held::OldData);
        let mut first = clients.pop().unwrap();
        let leader = tokio::spawn(async move { first.get("/images/a", &[]).await });
        until("the first request has begun a fetch", || async {
            server.metric("afterimage_fetches_total").await == fetches + 1
        })
        .await;
        let ask =
            |mut client: Client| tokio::spawn(async move { client.get("/images/a", &[]).await });
        let joined = async |expected: u64| {
            until("the others have joined the fetch", || async {
                server.metric("afterimage_collapsed_total").await == expected
            })
            .await;
        };
        let mut waiting = vec![ask(clients.pop().unwrap())];
        joined(1).await;
        // Before anybody joins, the fetch would be given up with its first request.
        if first_hangs_up {
            leader.abort();
        }
        waiting.extend(clients.into_iter().map(ask));
        joined(999).await;
        proxy.hold(Held::None);
        for answer in waiting {
            let answer = answer.await.unwrap();
            assert_eq!(answer.status, StatusCode::OK);
            assert_eq!(answer.body, bytes);
            assert_eq!(answer.header("cache-status"), "afterimage; fwd=miss; stored; collapsed");
        }
        if !first_hangs_up {
            assert_eq!(leader.await.unwrap().body, bytes);
        }
        assert_eq!(redis.calls().await.get("get"), Some(&1));
        assert_eq!(server.metric("afterimage_decodes_total").await, 1);
    }
}

async fn a_304_a_head_and_a_404_need_neither_redis_nor_bytes(flavour: Flavour) {
    let redis = RedisServer::start_flavour(flavour, &[]).await;
    // The cache holds one image: `b` evicts the bytes of `a`.
    let server = Server::on(&redis, &[("cache.images", "1")]).await.coherent().await;
    let value = record(&png(1, 50_000));
    redis.set("a", &value).await;
    redis.set("b", &record(&png(2, 50_000))).await;
    let mut client = Client::connect(server.address).await;
    for path in ["/images/a", "/images/b", "/images/missing"] {
        client.get(path, &[]).await;
    }
    redis.reset_calls().await;
    for _ in 0..10 {
        let known = [("if-none-match", &*etag(&value))];
        let answer = client.get("/images/a", &known).await;
        assert_eq!(answer.status, StatusCode::NOT_MODIFIED);
        assert_eq!(answer.header("cache-status"), "afterimage; hit");
        let head = client.send(Method::HEAD, "/images/a", &[], Bytes::new()).await.unwrap();
        assert_eq!(head.header("content-length"), "50000");
        assert_eq!(head.header("content-type"), "image/png");
        client.get("/images/missing", &[]).await.problem(404, "absent");
    }
    only_heartbeats(&redis).await;
    assert_eq!(server.metric("afterimage_cache_images").await, 1);
    // The evicted bytes must be fetched again.
    assert_eq!(
        client.get("/images/a", &[]).await.header("cache-status"),
        "afterimage; fwd=miss; stored"
    );
}

async fn a_404_becomes_200_when_the_key_is_written(flavour: Flavour) {
    let (redis, server) = coherent(flavour).await;
    for round in 0..20 {
        server.get("/images/a").await.problem(404, "absent");
        let before = server.metric("afterimage_invalidations_total").await;
        let bytes = png(round, 1000);
        redis.set("a", &record(&bytes)).await;
        until("the push has come", || async {
            server.metric("afterimage_invalidations_total").await > before
        })
        .await;
        // The very next request.
        assert_eq!(server.get("/images/a").await.body, bytes);
        redis.connect().await.del("image:a").await.unwrap();
        until_status(&server, 404).await;
    }
}

async fn every_kind_of_change_to_a_key_invalidates_it(flavour: Flavour) {
    let (redis, server) = coherent(flavour).await;
    let mut connection = redis.connect().await;
    let values: Vec<Vec<u8>> = (0..6).map(|seed| record(&png(seed, 3000))).collect();
    redis.set("a", &values[0]).await;
    until_version(&server, &values[0]).await;

    connection.mset(&[("image:x", &values[1]), ("image:a", &values[1])]).await.unwrap();
    until_version(&server, &values[1]).await;

    let mut eval = redis::cmd("EVAL");
    let script = "return redis.call('SET', KEYS[1], ARGV[1])";
    eval.arg(script).arg(1).arg("image:a").arg(&values[2]);
    eval.exec_async(&mut connection).await.unwrap();
    until_version(&server, &values[2]).await;

    connection.set("image:other", &values[3]).await.unwrap();
    connection.rename("image:other", "image:a").await.unwrap();
    until_version(&server, &values[3]).await;

    connection.append("image:a", " ").await.unwrap();
    until_version(&server, &[values[3].as_slice(), b" "].concat()).await;

    connection.rename("image:a", "elsewhere").await.unwrap();
    until_status(&server, 404).await;

    redis.set("a", &values[4]).await;
    until_version(&server, &values[4]).await;
    redis::cmd("FLUSHALL").exec_async(&mut connection).await.unwrap();
    until_status(&server, 404).await;

    redis.set("a", &values[5]).await;
    until_version(&server, &values[5]).await;
    connection.pexpire("image:a", 50).await.unwrap();
    until_status(&server, 404).await;

    redis.set("a", &values[0]).await;
    until_version(&server, &values[0]).await;
    for (name, value) in [("maxmemory-policy", "allkeys-random"), ("maxmemory", "1")] {
        let mut set = redis::cmd("CONFIG");
        set.arg("SET").arg(name).arg(value).exec_async(&mut connection).await.unwrap();
    }
    until_status(&server, 404).await;
}

async fn an_expired_image_is_gone_even_before_redis_reclaims_it(flavour: Flavour) {
    let redis = RedisServer::start_flavour(flavour, &["--enable-debug-command", "yes"]).await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let mut connection = redis.connect().await;
    let mut debug = redis::cmd("DEBUG");
    debug.arg("SET-ACTIVE-EXPIRE").arg(0).exec_async(&mut connection).await.unwrap();
    let life = Duration::from_millis(700);
    let mut set = redis::cmd("SET");
    set.arg("image:a").arg(record(&png(1, 1000))).arg("PX").arg(700);
    set.exec_async(&mut connection).await.unwrap();
    let dead = Instant::now() + life;
    while Instant::now() < dead {
        // In the last moments either status is right: the clocks of Redis and of the test differ a little.
        let status = server.get("/images/a").await.status;
        assert!(status == StatusCode::OK || status == StatusCode::NOT_FOUND);
    }
    server.get("/images/a").await.problem(404, "absent");
}

async fn a_refreshed_time_to_live_costs_neither_hash_nor_decode(flavour: Flavour) {
    let (redis, server) = coherent(flavour).await;
    let value = record(&png(1, 100_000));
    redis.set("a", &value).await;
    until_version(&server, &value).await;
    let mut connection = redis.connect().await;
    for round in 1..=10 {
        let before = server.metric("afterimage_invalidations_total").await;
        if round % 2 == 0 {
            connection.expire("image:a", 7200).await.unwrap();
        } else {
            redis.set("a", &value).await;
        }
        until("the push has come", || async {
            server.metric("afterimage_invalidations_total").await > before
        })
        .await;
        let answer = server.get("/images/a").await;
        assert_eq!(answer.header("cache-status"), "afterimage; fwd=stale; detail=revalidated");
        assert_eq!(answer.header("etag"), etag(&value));
    }
    assert_eq!(server.metric("afterimage_hashes_total").await, 1);
    assert_eq!(server.metric("afterimage_decodes_total").await, 1);
}

#[tokio::test]
async fn a_client_never_reads_an_older_version_than_its_own_acknowledged_write() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let mut client = Client::connect(server.address).await;
    let json = [("content-type", "application/json")];
    for round in 0..300 {
        let bytes = png(round, 3000);
        let value = Bytes::from(record(&bytes));
        let put = client.send(Method::PUT, "/images/a", &json, value).await.unwrap();
        assert!(put.status.is_success());
        assert_eq!(client.get("/images/a", &[]).await.body, bytes);
    }
}

#[tokio::test]
async fn if_redis_refuses_tracking_every_request_is_checked_against_redis() {
    let redis = RedisServer::start_with(&[
        "--user",
        "default",
        "on",
        "nopass",
        "~*",
        "&*",
        "+@all",
        "-client|tracking",
    ])
    .await;
    let server = Server::on(&redis, &[]).await;
    until("the server has noticed the refusal", || async {
        let ready = server.get("/readyz").await;
        String::from_utf8_lossy(&ready.body).contains("can't push changes")
    })
    .await;
    assert_eq!(server.coherence().await, "unverified");
    for round in 0..20 {
        let bytes = png(round, 2000);
        redis.set("a", &record(&bytes)).await;
        assert_eq!(server.get("/images/a").await.body, bytes);
        // A second request is checked against Redis too, and the value is recognised as unchanged.
        let again = server.get("/images/a").await;
        assert_eq!(again.header("cache-status"), "afterimage; fwd=stale; detail=revalidated");
    }
    assert_eq!(server.metric("afterimage_decodes_total").await, 20);
    redis.connect().await.del("image:a").await.unwrap();
    server.get("/images/a").await.problem(404, "absent");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_embedded_store_invalidates_replaced_and_expired_images() {
    let dir = tempfile::tempdir().unwrap();
    let settings = [("embedded.dir", dir.path().to_str().unwrap()), ("embedded.demo", "false")];
    let server = Server::start(&settings).await;
    assert_eq!(server.coherence().await, "coherent");
    let json = [("content-type", "application/json")];
    let put = async |path: &str, bytes: &[u8]| {
        let value = Bytes::from(record(bytes));
        let answer = server.send(Method::PUT, path, &json, value).await;
        assert!(answer.status.is_success(), "{answer:?}");
    };
    server.get("/images/a").await.problem(404, "absent");
    for round in 0..20 {
        let bytes = png(round, 100_000);
        put("/images/a", &bytes).await;
        assert_eq!(server.get("/images/a").await.body, bytes);
        assert_eq!(server.get("/images/a").await.header("cache-status"), "afterimage; hit");
    }
    assert_eq!(server.metric("afterimage_fetches_total").await, 21);
    let written = Instant::now();
    put("/images/a?ttl=300ms", &png(99, 1000)).await;
    assert_eq!(server.get("/images/a").await.status, StatusCode::OK);
    until_status(&server, 404).await;
    assert!(written.elapsed() >= Duration::from_millis(300));
}

#[tokio::test]
async fn requests_over_the_limit_of_waiters_are_503() {
    let redis = RedisServer::start().await;
    let proxy = Proxy::to(redis.port).await;
    let url = format!("redis://{}", proxy.address);
    let server =
        Server::start(&[("redis.url", &url), ("limits.waiters", "3")]).await.coherent().await;
    redis.set("a", &record(&png(1, 1000))).await;
    proxy.hold(Held::Data);
    let address = server.address;
    let waiting: Vec<_> = (0..20)
        .map(|_| tokio::spawn(async move { crate::harness::get(address, "/images/a", &[]).await }))
        .collect();
    let refused = || waiting.iter().filter(|it| it.is_finished()).count();
    until("the requests over the limit are refused", || async { refused() >= 15 }).await;
    proxy.hold(Held::None);
    let mut answered = 0;
    for answer in waiting {
        let answer = answer.await.unwrap();
        match answer.status {
            StatusCode::OK => answered += 1,
            _ => drop(answer.problem(503, "busy")),
        }
    }
    assert!((1..=5).contains(&answered), "{answered}");
}

#[tokio::test]
async fn known_keys_are_bounded() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("cache.absent_entries", "100")]).await.coherent().await;
    let mut client = Client::connect(server.address).await;
    for number in 0..300 {
        client.get(&format!("/images/n{number}"), &[]).await.problem(404, "absent");
    }
    assert_eq!(server.metric("afterimage_known_keys").await, 100);
}
