//! Outages: Redis goes away, goes silent and comes back while requests go on.

use std::time::{Duration, Instant};

use hyper::StatusCode;
use redis::AsyncTypedCommands;

use crate::coherence::on_every_server;
use crate::harness::{
    Client, Flavour, Held, Proxy, RedisServer, STALE, Server, etag, get, png, record, until,
    until_hit,
};

on_every_server! {
    a_silent_connection_is_noticed_within_two_seconds
    a_redis_restarted_without_its_data_has_no_images
    a_redis_restarted_with_its_data_has_the_same_images
    a_paused_redis_is_noticed_and_the_server_recovers
    hanging_data_connections_are_replaced
    after_the_address_leads_to_another_server_nothing_old_is_served
}

mod long {
    use super::{
        a_hanging_tracking_connection_leaves_every_response_fresh,
        a_killed_tracking_connection_leaves_nothing_stale, on_every_server,
    };

    on_every_server! {
        a_killed_tracking_connection_leaves_nothing_stale
        a_hanging_tracking_connection_leaves_every_response_fresh
    }
}

async fn until_stale(server: &Server) {
    until("the last known version is served as stale", || async {
        server.get("/images/a").await.header("cache-status") == STALE
    })
    .await;
}

async fn a_silent_connection_is_noticed_within_two_seconds(flavour: Flavour) {
    let redis = RedisServer::start_flavour(flavour, &[]).await;
    let proxy = Proxy::to(redis.port).await;
    let url = format!("redis://{}", proxy.address);
    let server = Server::start(&[("redis.url", &url)]).await.coherent().await;
    let (old, new) = (record(&png(1, 5000)), record(&png(2, 5000)));
    redis.set("a", &old).await;
    until_hit(server.address, &old).await;

    proxy.hold(Held::All);
    let silent = Instant::now();
    redis.set("a", &new).await;
    let mut client = Client::connect(server.address).await;
    // The bound of two seconds, and one more for a busy machine.
    while silent.elapsed() < Duration::from_secs(3) {
        let answer = client.get("/images/a", &[]).await;
        assert_eq!(answer.header("etag"), etag(&old), "{:?} {answer:?}", silent.elapsed());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for _ in 0..50 {
        let answer = client.get("/images/a", &[]).await;
        assert_eq!(answer.status, StatusCode::OK);
        assert_eq!(answer.header("etag"), etag(&old));
        assert_eq!(answer.header("cache-status"), STALE);
        assert_eq!(answer.header("cache-control"), "public, max-age=5");
    }
    proxy.hold(Held::None);
    until_hit(server.address, &new).await;
    until("it is coherent again", || async { server.coherence().await == "coherent" }).await;
    assert_eq!(server.get("/images/a").await.header("etag"), etag(&new));
}

async fn a_killed_tracking_connection_leaves_nothing_stale(flavour: Flavour) {
    let redis = RedisServer::start_flavour(flavour, &[]).await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let mut connection = redis.connect().await;
    let mut kills = 0;
    for round in 0..20 {
        let value = record(&png(round, 5000));
        redis.set("a", &value).await;
        until_hit(server.address, &value).await;
        let list: String =
            redis::cmd("CLIENT").arg("LIST").query_async(&mut connection).await.unwrap();
        // Flag `B`: broadcast tracking.
        let tracking = list.lines().find_map(|line| {
            let flags = line.split("flags=").nth(1)?.split(' ').next()?;
            let id = line.strip_prefix("id=")?.split(' ').next()?;
            flags.contains('B').then(|| id.to_owned())
        });
        let tracking = tracking.unwrap();
        kills += 1;
        // Killed and written in one pipeline, so that the push can't be delivered.
        let replaced = record(&png(1000 + round, 5000));
        let _: (i64, String) = redis::pipe()
            .cmd("CLIENT")
            .arg("KILL")
            .arg("ID")
            .arg(tracking)
            .cmd("SET")
            .arg("image:a")
            .arg(&replaced)
            .query_async(&mut connection)
            .await
            .unwrap();
        until_hit(server.address, &replaced).await;
        until("it is coherent again", || async { server.coherence().await == "coherent" }).await;
        assert_eq!(server.get("/images/a").await.header("etag"), etag(&replaced));
    }
    assert_eq!(kills, 20);
}

async fn a_hanging_tracking_connection_leaves_every_response_fresh(flavour: Flavour) {
    let redis = RedisServer::start_flavour(flavour, &[]).await;
    let proxy = Proxy::to(redis.port).await;
    let url = format!("redis://{}", proxy.address);
    let server = Server::start(&[("redis.url", &url)]).await.coherent().await;
    let value = record(&png(1, 5000));
    redis.set("a", &value).await;
    until_hit(server.address, &value).await;
    // Open all data connections first, since new ones would hang too.
    for number in 0..8 {
        server.get(&format!("/images/n{number}")).await.problem(404, "absent");
    }
    proxy.hold(Held::Tracking);
    until("the loss of tracking is noticed", || async { server.coherence().await == "unverified" })
        .await;
    for round in 0..300 {
        let value = record(&png(100 + round, 5000));
        redis.set("a", &value).await;
        let answer = server.get("/images/a").await;
        assert_eq!(answer.header("etag"), etag(&value), "{answer:?}");
        // Three seconds in all, in which heartbeats fail.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    proxy.hold(Held::None);
    until("it is coherent again", || async { server.coherence().await == "coherent" }).await;
}

async fn hanging_data_connections_are_replaced(flavour: Flavour) {
    let redis = RedisServer::start_flavour(flavour, &[]).await;
    let proxy = Proxy::to(redis.port).await;
    let url = format!("redis://{}", proxy.address);
    let settings = [
        ("redis.url", url.as_str()),
        ("redis.response_timeout", "300ms"),
        ("redis.connections", "1"),
    ];
    let server = Server::start(&settings).await.coherent().await;
    let (old, new) = (record(&png(1, 5000)), record(&png(2, 5000)));
    redis.set("a", &old).await;
    until_hit(server.address, &old).await;
    proxy.hold(Held::OldData);
    redis.set("a", &new).await;
    until("the push has come and the connection hangs", || async {
        server.get("/images/a").await.status == StatusCode::GATEWAY_TIMEOUT
    })
    .await;
    until_hit(server.address, &new).await;
    assert_eq!(server.coherence().await, "coherent");
}

async fn after_the_address_leads_to_another_server_nothing_old_is_served(flavour: Flavour) {
    let first = RedisServer::start_flavour(flavour, &[]).await;
    let second = RedisServer::start_flavour(flavour, &[]).await;
    let proxy = Proxy::to(first.port).await;
    let url = format!("redis://{}", proxy.address);
    let server = Server::start(&[("redis.url", &url)]).await.coherent().await;
    let (old, new, newer) = (record(&png(1, 5000)), record(&png(2, 5000)), record(&png(3, 5000)));
    first.set("a", &old).await;
    second.set("a", &new).await;
    until_hit(server.address, &old).await;
    // Open every data connection to the first server, which keeps running.
    for number in 0..8 {
        server.get(&format!("/images/n{number}")).await.problem(404, "absent");
    }
    proxy.lead_to(second.port);
    let mut kill = redis::cmd("CLIENT");
    // Only the tracking connection is killed, so only it reconnects.
    let list: String =
        redis::cmd("CLIENT").arg("LIST").query_async(&mut first.connect().await).await.unwrap();
    let tracking = list.lines().find(|line| {
        line.split("flags=").nth(1).is_some_and(|it| it.split(' ').next().unwrap().contains('B'))
    });
    let id = tracking.unwrap().strip_prefix("id=").unwrap().split(' ').next().unwrap();
    kill.arg("KILL").arg("ID").arg(id).exec_async(&mut first.connect().await).await.unwrap();
    until_hit(server.address, &new).await;
    second.set("a", &newer).await;
    until_hit(server.address, &newer).await;
}

async fn a_redis_restarted_without_its_data_has_no_images(flavour: Flavour) {
    let mut redis = RedisServer::start_flavour(flavour, &[]).await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let bytes = png(1, 5000);
    redis.set("a", &record(&bytes)).await;
    assert_eq!(server.get("/images/a").await.body, bytes);
    redis.kill();
    until_stale(&server).await;
    let answer = server.get("/images/a").await;
    assert_eq!((answer.status, answer.body), (StatusCode::OK, bytes.into()));
    server.get("/images/unknown").await.problem(503, "store-unavailable");
    redis.restart().await;
    until("the image is absent", || async {
        server.get("/images/a").await.status == StatusCode::NOT_FOUND
    })
    .await;
}

async fn a_redis_restarted_with_its_data_has_the_same_images(flavour: Flavour) {
    let arguments = ["--appendonly", "yes", "--appendfsync", "always"];
    let mut redis = RedisServer::start_flavour(flavour, &arguments).await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let value = record(&png(1, 50_000));
    redis.set("a", &value).await;
    until_hit(server.address, &value).await;
    redis.kill();
    until_stale(&server).await;
    redis.restart().await;
    until_hit(server.address, &value).await;
    until("it is coherent again", || async { server.coherence().await == "coherent" }).await;
    assert_eq!(server.metric("afterimage_decodes_total").await, 1);
    assert_eq!(server.metric("afterimage_hashes_total").await, 1);
}

async fn a_paused_redis_is_noticed_and_the_server_recovers(flavour: Flavour) {
    let redis = RedisServer::start_flavour(flavour, &[]).await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let value = record(&png(1, 5000));
    redis.set("a", &value).await;
    until_hit(server.address, &value).await;
    redis.signal("STOP");
    until_stale(&server).await;
    assert_eq!(server.get("/images/a").await.header("etag"), etag(&value));
    redis.signal("CONT");
    let replaced = record(&png(2, 5000));
    redis.set("a", &replaced).await;
    until_hit(server.address, &replaced).await;
}

#[tokio::test]
async fn a_stale_version_is_not_served_past_the_configured_limit() {
    let mut redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("cache.serve_stale_for", "700ms")]).await.coherent().await;
    redis.set("a", &record(&png(1, 5000))).await;
    server.get("/images/a").await;
    redis.kill();
    until_stale(&server).await;
    until("the limit has passed", || async {
        server.get("/images/a").await.status == StatusCode::SERVICE_UNAVAILABLE
    })
    .await;
}

#[tokio::test]
async fn an_invalidated_image_is_never_served_during_an_outage() {
    let mut redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    redis.set("a", &record(&png(1, 5000))).await;
    server.get("/images/a").await;
    let before = server.metric("afterimage_invalidations_total").await;
    redis.connect().await.del("image:a").await.unwrap();
    until("the push has come", || async {
        server.metric("afterimage_invalidations_total").await > before
    })
    .await;
    redis.kill();
    until("redis is gone", || async { server.coherence().await != "coherent" }).await;
    for _ in 0..20 {
        server.get("/images/a").await.problem(503, "store-unavailable");
    }
}

#[tokio::test]
async fn a_redis_outage_under_load_is_503_with_retry_after_and_recovers() {
    let mut redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let address = server.address;
    // Each request is for an unknown image.
    let requests = tokio::spawn(async move {
        let mut client = Client::connect(address).await;
        let (mut refused, mut absent_after) = (0, 0);
        for number in 0.. {
            let answer = client.get(&format!("/images/n{number}"), &[]).await;
            match answer.status.as_u16() {
                404 if refused == 0 => {}
                404 => absent_after += 1,
                503 => {
                    answer.problem(503, "store-unavailable");
                    assert_eq!(answer.header("retry-after"), "1");
                    refused += 1;
                }
                _ => panic!("{answer:?}"),
            }
            if absent_after == 10 {
                return;
            }
            tokio::task::yield_now().await;
        }
    });
    redis.kill();
    until("requests are refused", || async {
        server.get("/images/other").await.status == StatusCode::SERVICE_UNAVAILABLE
    })
    .await;
    redis.restart().await;
    requests.await.unwrap();
    redis.set("a", &record(&png(1, 50_000))).await;
    assert_eq!(server.get("/images/a").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_full_redis_still_serves_its_images() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let bytes = png(1, 5000);
    redis.set("a", &record(&bytes)).await;
    let mut set = redis::cmd("CONFIG");
    set.arg("SET").arg("maxmemory").arg("1").exec_async(&mut redis.connect().await).await.unwrap();
    assert_eq!(server.get("/images/a").await.body, bytes);
    server.get("/images/b").await.problem(404, "absent");
}

#[tokio::test]
async fn the_server_can_start_before_redis() {
    let mut redis = RedisServer::start().await;
    redis.kill();
    let server = Server::on(&redis, &[]).await;
    server.get("/images/a").await.problem(503, "store-unavailable");
    redis.restart().await;
    redis.set("a", &record(&png(1, 100))).await;
    until("the server recovers", || async {
        server.get("/images/a").await.status == StatusCode::OK
    })
    .await;
}

#[tokio::test]
async fn a_corrected_redis_password_needs_no_restart() {
    let redis = RedisServer::start_with(&["--requirepass", "old"]).await;
    let url = format!("redis://:new@127.0.0.1:{}", redis.port);
    let server = Server::start(&[("redis.url", &url)]).await;
    server.get("/images/a").await.problem(503, "store-unavailable");
    let client = redis::Client::open(format!("redis://:old@127.0.0.1:{}", redis.port)).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let mut set = redis::cmd("CONFIG");
    set.arg("SET").arg("requirepass").arg("new").exec_async(&mut connection).await.unwrap();
    until("the password is accepted", || async {
        server.get("/images/a").await.status == StatusCode::NOT_FOUND
    })
    .await;
    until("it is coherent", || async { server.coherence().await == "coherent" }).await;
}

#[tokio::test]
async fn idle_connections_closed_by_redis_fail_no_request() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let mut own = redis.connect().await;
    for round in 0..5 {
        // Use all connections, then have Redis close them.
        for number in 0..8 {
            let path = format!("/images/r{round}n{number}");
            assert_eq!(get(server.address, &path, &[]).await.status, StatusCode::NOT_FOUND);
        }
        let mut kill = redis::cmd("CLIENT");
        kill.arg("KILL").arg("TYPE").arg("normal").arg("SKIPME").arg("yes");
        kill.exec_async(&mut own).await.unwrap();
        for number in 0..8 {
            let path = format!("/images/again{round}n{number}");
            assert_eq!(get(server.address, &path, &[]).await.status, StatusCode::NOT_FOUND);
        }
    }
}
