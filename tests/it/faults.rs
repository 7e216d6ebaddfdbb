//! The promise while servers fail: demoted, switched, frozen, suspended, half alive, or with fewer rights than before.

use std::time::{Duration, Instant};

use afterimage::{App, Clock, Rules, Suspended};
use bytes::Bytes;
use hyper::{Method, StatusCode};

use crate::coherence::on_every_server;
use crate::harness::redis::free_port;
use crate::harness::server::{load, program};
use crate::harness::{
    Client, Flavour, Held, Process, Proxy, RedisServer, STALE, Server, etag, png, record, until,
    until_hit,
};

on_every_server! {
    a_primary_demoted_in_place_is_not_read_from
    a_switched_address_is_noticed_though_no_connection_is_cut
    a_switched_address_is_noticed_without_info
    a_server_that_nothing_tells_from_another_is_unverified
    a_primary_that_hung_during_a_failover_is_not_listened_to
    a_frozen_process_serves_nothing_that_was_replaced_meanwhile
    a_suspended_machine_serves_nothing_that_was_replaced_meanwhile
    a_store_that_is_loading_leaves_images_in_memory
    an_unverified_server_notices_a_demotion_and_a_switched_address
    a_switched_address_fails_no_request
    a_user_without_access_to_images_is_an_outage
    a_user_who_may_track_again_is_coherent_within_two_seconds
    an_image_fetched_during_its_own_write_survives_an_outage
}

/// Longest wait for anything that is promised within two or four seconds.
const FOUR_SECONDS: Duration = Duration::from_secs(4);

/// Waits until `/readyz` has this text.
async fn until_ready_says(server: &Server, text: &str) {
    until(text, || async {
        String::from_utf8_lossy(&server.get("/readyz").await.body).contains(text)
    })
    .await;
}

async fn run(redis: &RedisServer, command: &[&str]) {
    let mut it = redis::cmd(command[0]);
    it.arg(&command[1..]).exec_async(&mut redis.connect().await).await.unwrap();
}

fn values() -> [Vec<u8>; 3] {
    [1, 2, 3].map(|seed| record(&png(seed, 5000)))
}

async fn behind(proxy: &Proxy, settings: &[(&str, &str)]) -> Server {
    let url = format!("redis://{}", proxy.address);
    let mut all = vec![("redis.url", url.as_str())];
    all.extend_from_slice(settings);
    Server::start(&all).await
}

async fn a_primary_demoted_in_place_is_not_read_from(flavour: Flavour) {
    let redis = RedisServer::start_flavour(flavour, &[]).await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let [old, new, _] = values();
    redis.set("a", &old).await;
    until_hit(server.address, &old).await;
    // The link to the new primary is down, so the server will never learn of a write.
    run(&redis, &["REPLICAOF", "127.0.0.1", &free_port().to_string()]).await;
    until_ready_says(&server, "is a replica").await;
    until_ready_says(&server, "unreachable").await;
    for _ in 0..20 {
        let answer = server.get("/images/a").await;
        assert_eq!(answer.header("cache-status"), STALE);
    }
    let unknown = server.get("/images/b").await;
    assert_eq!(unknown.status, StatusCode::SERVICE_UNAVAILABLE);
    run(&redis, &["REPLICAOF", "NO", "ONE"]).await;
    redis.set("a", &new).await;
    until_hit(server.address, &new).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_refused_by_a_replica_is_503_and_the_address_is_looked_at_again() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    run(&redis, &["REPLICAOF", "127.0.0.1", &free_port().to_string()]).await;
    let put = || server.send(Method::PUT, "/images/a", &[], Bytes::from(png(1, 2000)));
    assert_eq!(put().await.status, StatusCode::SERVICE_UNAVAILABLE);
    until_ready_says(&server, "is a replica").await;
    run(&redis, &["REPLICAOF", "NO", "ONE"]).await;
    until("writes are accepted again", || async { put().await.status.is_success() }).await;
}

/// The address leads to another server; connections to the first one live on, and it answers as ever.
async fn a_switched_address_is_noticed_though_no_connection_is_cut(flavour: Flavour) {
    let first = RedisServer::start_flavour(flavour, &[]).await;
    let second = RedisServer::start_flavour(flavour, &[]).await;
    switched(&first, &second).await;
}

/// The same, where a user may not run `INFO`.
async fn a_switched_address_is_noticed_without_info(flavour: Flavour) {
    let acl = ["--user", "default", "on", "nopass", "~*", "&*", "+@all", "-info"];
    let first = RedisServer::start_flavour(flavour, &acl).await;
    let second = RedisServer::start_flavour(flavour, &acl).await;
    switched(&first, &second).await;
}

async fn switched(first: &RedisServer, second: &RedisServer) {
    let proxy = Proxy::to(first.port).await;
    let server = behind(&proxy, &[]).await.coherent().await;
    let [old, new, newer] = values();
    first.set("a", &old).await;
    second.set("a", &new).await;
    until_hit(server.address, &old).await;
    for number in 0..8 {
        server.get(&format!("/images/n{number}")).await.problem(404, "absent");
    }
    proxy.lead_to(second.port);
    let switched = Instant::now();
    until_hit(server.address, &new).await;
    assert!(switched.elapsed() < FOUR_SECONDS, "{:?}", switched.elapsed());
    second.set("a", &newer).await;
    until_hit(server.address, &newer).await;
}

/// A server that isn't tracked is looked at all the same.
async fn an_unverified_server_notices_a_demotion_and_a_switched_address(flavour: Flavour) {
    let first = RedisServer::start_flavour(flavour, &[]).await;
    let second = RedisServer::start_flavour(flavour, &[]).await;
    let proxy = Proxy::to(first.port).await;
    let server = behind(&proxy, &[("redis.tracking", "false")]).await;
    let [old, new, newer] = values();
    first.set("a", &old).await;
    second.set("a", &new).await;
    // Open the data connections.
    for _ in 0..8 {
        assert_eq!(server.get("/images/a").await.header("etag"), etag(&old));
    }
    proxy.lead_to(second.port);
    until("the other server is asked", || async {
        server.get("/images/a").await.header("etag") == etag(&new)
    })
    .await;
    run(&second, &["REPLICAOF", "127.0.0.1", &free_port().to_string()]).await;
    until_ready_says(&server, "is a replica").await;
    assert_eq!(server.get("/images/a").await.header("cache-status"), STALE);
    run(&second, &["REPLICAOF", "NO", "ONE"]).await;
    second.set("a", &newer).await;
    until("the new version is served", || async {
        server.get("/images/a").await.header("etag") == etag(&newer)
    })
    .await;
}

/// Requests that find another server behind the address ask that one.
async fn a_switched_address_fails_no_request(flavour: Flavour) {
    let first = RedisServer::start_flavour(flavour, &[]).await;
    let second = RedisServer::start_flavour(flavour, &[]).await;
    let proxy = Proxy::to(first.port).await;
    let server = behind(&proxy, &[]).await.coherent().await;
    let [_, new, _] = values();
    second.set("a", &new).await;
    // No data connection is open yet.
    proxy.lead_to(second.port);
    assert_eq!(server.get("/images/a").await.header("etag"), etag(&new));
    until_hit(server.address, &new).await;
}

async fn a_server_that_nothing_tells_from_another_is_unverified(flavour: Flavour) {
    let acl = ["--user", "default", "on", "nopass", "~*", "&*", "+@all", "-info", "-client|info"];
    let redis = RedisServer::start_flavour(flavour, &acl).await;
    let server = Server::on(&redis, &[]).await;
    until_ready_says(&server, "allowed to run INFO or CLIENT INFO").await;
    assert_eq!(server.coherence().await, "unverified");
    for value in values() {
        redis.set("a", &value).await;
        assert_eq!(server.get("/images/a").await.header("etag"), etag(&value));
    }
}

/// A primary hangs, another one takes its place and a write; then the first one wakes up and answers what it was asked.
/// Tracking begins no sooner on the other one, where the user may not track.
async fn a_primary_that_hung_during_a_failover_is_not_listened_to(flavour: Flavour) {
    let acl = ["--user", "default", "on", "nopass", "~*", "&*", "+@all", "-client|tracking"];
    let first = RedisServer::start_flavour(flavour, &[]).await;
    let second = RedisServer::start_flavour(flavour, &acl).await;
    let proxy = Proxy::to(first.port).await;
    let server = behind(&proxy, &[]).await.coherent().await;
    let [old, new, _] = values();
    let ids: Vec<String> = (0..40).map(|number| format!("n{number}")).collect();
    for id in &ids {
        first.set(id, &old).await;
    }
    // Open the data connections.
    for number in 0..8 {
        server.get(&format!("/images/o{number}")).await.problem(404, "absent");
    }
    first.signal("STOP");
    proxy.lead_to(second.port);
    for id in &ids {
        second.set(id, &new).await;
    }
    let asked: Vec<_> = ids
        .iter()
        .map(|id| {
            let (path, address) = (format!("/images/{id}"), server.address);
            tokio::spawn(async move { crate::harness::get(address, &path, &[]).await })
        })
        .collect();
    until_ready_says(&server, "can't push changes to this user").await;
    first.signal("CONT");
    for answer in asked {
        let answer = answer.await.unwrap();
        assert_eq!(answer.header("etag"), etag(&new), "{answer:?}");
    }
}

async fn a_frozen_process_serves_nothing_that_was_replaced_meanwhile(flavour: Flavour) {
    let redis = RedisServer::start_flavour(flavour, &[]).await;
    let mut command = program();
    command.args(["--redis-url", &redis.url()]);
    let process = Process::start(command);
    let mut version = 0;
    for milliseconds in [200, 400, 800, 1800, 3000] {
        version += 1;
        let old = record(&png(version, 5000));
        redis.set("a", &old).await;
        until_hit(process.address, &old).await;
        let mut clients = Vec::new();
        for _ in 0..40 {
            clients.push(Client::connect(process.address).await);
        }
        process.signal("STOP");
        version += 1;
        let new = record(&png(version, 5000));
        redis.set("a", &new).await;
        let asked: Vec<_> = clients
            .into_iter()
            .map(|mut client| tokio::spawn(async move { client.get("/images/a", &[]).await }))
            .collect();
        // Requests and push wait in their sockets.
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        process.signal("CONT");
        for answer in asked {
            let answer = answer.await.unwrap();
            assert_eq!(answer.header("etag"), etag(&new), "{milliseconds} ms: {answer:?}");
        }
    }
}

/// A clock that is put forward stands in for a suspension of the machine.
async fn a_suspended_machine_serves_nothing_that_was_replaced_meanwhile(flavour: Flavour) {
    let redis = RedisServer::start_flavour(flavour, &[]).await;
    let proxy = Proxy::to(redis.port).await;
    let url = format!("redis://{}", proxy.address);
    let suspended: &'static Suspended = Box::leak(Box::default());
    let clock = Clock::suspendable(suspended);
    let app =
        App::build_for_test(load(&[("redis.url", &url)]), Rules::default(), clock).await.unwrap();
    let server = Server::serve(app).coherent().await;
    for round in 0..5 {
        let (old, new) = (record(&png(2 * round, 5000)), record(&png(2 * round + 1, 5000)));
        redis.set("a", &old).await;
        until_hit(server.address, &old).await;
        // The push doesn't come, as if it had not been read yet.
        proxy.hold(Held::Tracking);
        redis.set("a", &new).await;
        suspended.add(Duration::from_secs(10));
        for _ in 0..20 {
            assert_eq!(server.get("/images/a").await.header("etag"), etag(&new));
        }
        proxy.hold(Held::None);
        until_hit(server.address, &new).await;
    }
}

/// A server that is loading its data accepts connections, and tracks, but can't read.
async fn a_store_that_is_loading_leaves_images_in_memory(flavour: Flavour) {
    let mut redis = RedisServer::start_flavour(flavour, &[]).await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let [old, new, _] = values();
    redis.set("a", &old).await;
    for number in 0..200 {
        redis.set(&format!("n{number}"), &[b'x'; 2000]).await;
    }
    until_hit(server.address, &old).await;
    run(&redis, &["SAVE"]).await;
    redis.kill();
    // Two hundredths of a second for each key.
    redis.restart_loading(&[
        "--key-load-delay",
        "20000",
        "--loading-process-events-interval-bytes",
        "1024",
    ]);
    until("it is loading", || async { redis.is_loading().await }).await;
    let mut answers = 0;
    while !redis.answers().await {
        let answer = server.get("/images/a").await;
        let ready = server.get("/readyz").await;
        if redis.answers().await {
            break;
        }
        assert_eq!(answer.header("cache-status"), STALE, "{answer:?}");
        assert_eq!(ready.status, StatusCode::OK);
        answers += 1;
    }
    assert!(answers > 0);
    redis.set("a", &new).await;
    until_hit(server.address, &new).await;
}

async fn a_user_without_access_to_images_is_an_outage(flavour: Flavour) {
    let redis = RedisServer::start_flavour(flavour, &[]).await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let [old, new, _] = values();
    redis.set("a", &old).await;
    until_hit(server.address, &old).await;
    run(&redis, &["ACL", "SETUSER", "default", "resetkeys", "~other:*"]).await;
    until_ready_says(&server, "unreachable").await;
    until_ready_says(&server, "the store doesn't permit it").await;
    let ready = server.get("/readyz").await;
    assert_eq!(ready.status, StatusCode::OK);
    assert_eq!(server.get("/readyz?strict").await.status, StatusCode::SERVICE_UNAVAILABLE);
    let answer = server.get("/images/a").await;
    assert_eq!((answer.status, answer.header("cache-status")), (StatusCode::OK, STALE));
    server.get("/images/b").await.problem(503, "store-unavailable");
    run(&redis, &["ACL", "SETUSER", "default", "~*"]).await;
    redis.set("a", &new).await;
    until_hit(server.address, &new).await;
}

/// A user who loses only the right to read values: what is asked of Redis is refused, what is in memory is served.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_get_is_answered_from_memory() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("redis.tracking", "false")]).await;
    let [old, ..] = values();
    redis.set("a", &old).await;
    assert_eq!(server.get("/images/a").await.header("etag"), etag(&old));
    run(&redis, &["ACL", "SETUSER", "default", "-get"]).await;
    let answer = server.get("/images/a").await;
    assert_eq!((answer.status, answer.header("cache-status")), (StatusCode::OK, STALE));
    server.get("/images/b").await.problem(503, "store-unavailable");
}

async fn a_user_who_may_track_again_is_coherent_within_two_seconds(flavour: Flavour) {
    let redis = RedisServer::start_flavour(flavour, &[]).await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    run(&redis, &["ACL", "SETUSER", "default", "-client|tracking"]).await;
    run(&redis, &["CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes"]).await;
    until_ready_says(&server, "can't push changes to this user").await;
    run(&redis, &["ACL", "SETUSER", "default", "+client|tracking"]).await;
    let permitted = Instant::now();
    until("it is coherent again", || async { server.coherence().await == "coherent" }).await;
    assert!(permitted.elapsed() < FOUR_SECONDS, "{:?}", permitted.elapsed());
}

/// The push of a write voids a fetch that has read that very value.
async fn an_image_fetched_during_its_own_write_survives_an_outage(flavour: Flavour) {
    let mut redis = RedisServer::start_flavour(flavour, &[]).await;
    let proxy = Proxy::to(redis.port).await;
    let server = behind(&proxy, &[]).await.coherent().await;
    let [value, ..] = values();
    for number in 0..8 {
        server.get(&format!("/images/n{number}")).await.problem(404, "absent");
    }
    proxy.hold(Held::Data);
    let fetches = server.metric("afterimage_fetches_total").await;
    let address = server.address;
    let asked = tokio::spawn(async move { crate::harness::get(address, "/images/a", &[]).await });
    until("the fetch has begun", || async {
        server.metric("afterimage_fetches_total").await > fetches
    })
    .await;
    let pushes = server.metric("afterimage_invalidations_total").await;
    redis.set("a", &value).await;
    until("the push has come", || async {
        server.metric("afterimage_invalidations_total").await > pushes
    })
    .await;
    proxy.hold(Held::None);
    assert_eq!(asked.await.unwrap().header("etag"), etag(&value));
    until("the image is fetched once more", || async {
        server.metric("afterimage_fetches_total").await > fetches + 1
    })
    .await;
    until_hit(server.address, &value).await;
    assert_eq!(server.metric("afterimage_fetches_total").await, fetches + 2);
    redis.kill();
    until_ready_says(&server, "unreachable").await;
    let answer = server.get("/images/a").await;
    assert_eq!((answer.status, answer.header("cache-status")), (StatusCode::OK, STALE));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proxy_that_loses_pushes_is_noticed_by_the_canary() {
    let redis = RedisServer::start().await;
    let proxy = Proxy::to(redis.port).await;
    let server = behind(&proxy, &[("redis.canary", "true")]).await.coherent().await;
    let [old, new, newer] = values();
    redis.set("a", &old).await;
    until_hit(server.address, &old).await;
    proxy.hold(Held::Pushes);
    redis.set("a", &new).await;
    until_ready_says(&server, "no push of it came").await;
    until("the new version is served", || async {
        server.get("/images/a").await.header("etag") == etag(&new)
    })
    .await;
    proxy.hold(Held::None);
    redis.set("a", &newer).await;
    until_hit(server.address, &newer).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn time_outs_of_one_request_do_not_add_up() {
    let redis = RedisServer::start().await;
    let proxy = Proxy::to(redis.port).await;
    let server = behind(&proxy, &[("redis.response_timeout", "1s")]).await.coherent().await;
    let [value, ..] = values();
    redis.set("a", &value).await;
    for number in 0..8 {
        server.get(&format!("/images/n{number}")).await.problem(404, "absent");
    }
    // Each of the two replies is in time, both together are not.
    proxy.delay_data(Duration::from_millis(700));
    server.get("/images/a").await.problem(504, "store-timeout");
    proxy.delay_data(Duration::ZERO);
    until_hit(server.address, &value).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_of_a_cluster_is_refused_at_start() {
    let arguments = ["--cluster-enabled", "yes"];
    let redis = RedisServer::start_with(&arguments).await;
    let mut command = program();
    command.args(["--redis-url", &redis.url(), "--http-listen", "127.0.0.1:0"]);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && error.contains("Redis Cluster"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readiness_fails_only_where_nothing_can_be_answered() {
    let mut redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let [value, ..] = values();
    redis.set("a", &value).await;
    until_hit(server.address, &value).await;
    assert_eq!(server.get("/readyz?strict").await.status, StatusCode::OK);
    redis.kill();
    until_ready_says(&server, "unreachable").await;
    assert_eq!(server.get("/readyz").await.status, StatusCode::OK);
    assert_eq!(server.get("/readyz?strict").await.status, StatusCode::SERVICE_UNAVAILABLE);
    server.get("/readyz?stric").await.problem(400, "bad-parameter");
    // A server that has never reached its store has nothing to answer with.
    let new = Server::on(&redis, &[]).await;
    until_ready_says(&new, "unreachable").await;
    assert_eq!(new.get("/readyz").await.status, StatusCode::SERVICE_UNAVAILABLE);
}
