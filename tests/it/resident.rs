//! Memory under clients that ask for much: what stays in it, and how much of it there is.

use std::io::Write;

use bytes::Bytes;
use flate2::Compression;
use flate2::write::ZlibEncoder;
use hyper::{Method, StatusCode};
use image::{DynamicImage, ImageFormat};

use crate::harness::server::program;
use crate::harness::{
    Answer, Client, Process, Protocol, RedisServer, Server, get, png, record, until,
};
use crate::variants::{encoded, picture};

long_tests! {
    #[tokio::test(flavor = "multi_thread")] large_renders_share_one_budget
    #[tokio::test(flavor = "multi_thread")] large_writes_take_what_they_are_counted_for
    #[tokio::test(flavor = "multi_thread")] idle_connections_keep_no_large_buffers
}

const MIB: u64 = 1024 * 1024;

/// Bytes that Redis has sent to all clients.
async fn sent_by(redis: &RedisServer) -> u64 {
    let mut connection = redis.connect().await;
    let stats: redis::InfoDict =
        redis::cmd("INFO").arg("stats").query_async(&mut connection).await.unwrap();
    stats.get("total_net_output_bytes").unwrap()
}

/// A PNG of 16 bits a channel, all of it black, which is a thousandth of its pixels.
pub(crate) fn deep_png(side: u32) -> Vec<u8> {
    let chunk = |name: &[u8; 4], content: &[u8]| {
        let mut crc = flate2::Crc::new();
        crc.update(name);
        crc.update(content);
        let length = u32::try_from(content.len()).unwrap();
        [&length.to_be_bytes(), &name[..], content, &crc.sum().to_be_bytes()].concat()
    };
    let header = [&side.to_be_bytes()[..], &side.to_be_bytes(), &[16, 2, 0, 0, 0]].concat();
    let mut pixels = ZlibEncoder::new(Vec::new(), Compression::fast());
    let row = vec![0; 1 + 6 * side as usize];
    for _ in 0..side {
        pixels.write_all(&row).unwrap();
    }
    let pixels = pixels.finish().unwrap();
    let chunks = [chunk(b"IHDR", &header), chunk(b"IDAT", &pixels), chunk(b"IEND", &[])];
    [b"\x89PNG\r\n\x1a\n".to_vec(), chunks.concat()].concat()
}

#[tokio::test]
async fn placeholders_and_variants_drive_no_image_out() {
    const IMAGES: u64 = 40;
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let drawn = encoded(&picture(1, 400, 300), ImageFormat::Png);
    redis.set("drawn", &record(&drawn)).await;
    let mut client = Client::connect(server.address).await;
    // All that there is room for.
    for number in 0..IMAGES {
        redis.set(&format!("i{number}"), &record(&png(number, 1_000_000))).await;
        client.get(&format!("/images/i{number}"), &[]).await;
    }
    for text in 0..60 {
        client.get(&format!("/placeholders/64x64?text={text}"), &[]).await;
    }
    for width in [16, 32, 48, 64, 96, 128, 256, 320] {
        for quality in [50, 60, 70, 75, 80, 85, 90, 95] {
            client.get(&format!("/images/drawn.webp?w={width}&q={quality}"), &[]).await;
        }
    }
    let fetches = server.metric("afterimage_fetches_total").await;
    for number in 0..IMAGES {
        let answer = client.get(&format!("/images/i{number}"), &[]).await;
        assert_eq!(answer.header("cache-status"), "afterimage; hit", "{number}");
    }
    assert_eq!(server.metric("afterimage_fetches_total").await, fetches);
    assert!(server.metric("afterimage_cache_bytes").await <= 50 * MIB);
}

#[tokio::test]
async fn thumbnails_stay_when_their_originals_have_left() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("cache.images", "2")]).await.coherent().await;
    let mut client = Client::connect(server.address).await;
    let path = |number| format!("/images/i{number}/thumbnail");
    for number in 0..20 {
        let drawn = encoded(&picture(number, 100, 100), ImageFormat::Png);
        redis.set(&format!("i{number}"), &record(&drawn)).await;
        client.get(&path(number), &[]).await;
    }
    let fetches = server.metric("afterimage_fetches_total").await;
    for number in 0..20 {
        assert_eq!(client.get(&path(number), &[]).await.header("cache-status"), "afterimage; hit");
    }
    assert_eq!(server.metric("afterimage_renders_total").await, 20);
    assert_eq!(server.metric("afterimage_fetches_total").await, fetches);
}

#[tokio::test]
async fn an_image_has_a_bounded_number_of_variants_in_memory() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    redis.set("a", &record(&encoded(&DynamicImage::new_rgb8(1, 1), ImageFormat::Png))).await;
    let mut client = Client::connect(server.address).await;
    let thumbnail = async |client: &mut Client| client.get("/images/a/thumbnail", &[]).await;
    thumbnail(&mut client).await;
    thumbnail(&mut client).await;
    // Of a picture of one pixel all of these are one pixel, but each has an ETag of its own.
    let mut variants = 0;
    for width in [16, 32, 48, 64, 96, 128, 256, 320, 384, 512] {
        for height in [16, 32, 48, 64, 96, 128, 180, 200, 256, 320] {
            let path = format!("/images/a.webp?w={width}&h={height}");
            assert_eq!(client.get(&path, &[]).await.status, StatusCode::OK);
            variants += 1;
        }
    }
    assert_eq!(server.metric("afterimage_renders_total").await, 1 + variants);
    let kept = server.metric("afterimage_cache_bytes").await;
    assert!((64 * 1024..=66 * 1200).contains(&kept), "{kept} bytes");
    // What others use stays.
    assert_eq!(thumbnail(&mut client).await.header("cache-status"), "afterimage; hit");
}

#[tokio::test]
async fn many_ranges_of_a_large_image_share_one_fetch() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("cache.bytes", "1MiB")]).await.coherent().await;
    let bytes = png(1, 400_000);
    let value = record(&bytes);
    redis.set("a", &value).await;
    let mut client = Client::connect(server.address).await;
    let before = sent_by(&redis).await;
    for start in 0..200 {
        let range = format!("bytes={start}-{start}");
        let part = client.get("/images/a", &[("range", &range)]).await;
        assert_eq!(part.status, StatusCode::PARTIAL_CONTENT);
        assert_eq!(part.body, bytes[start..=start]);
    }
    assert_eq!(client.get("/images/a", &[]).await.body, bytes);
    assert_eq!(server.metric("afterimage_fetches_total").await, 1);
    // Heartbeats and this question itself are the rest.
    let sent = sent_by(&redis).await - before;
    assert!(sent < value.len() as u64 * 2, "{sent} bytes");
    // It is one of the images on their way, not one of the cache.
    assert_eq!(server.metric("afterimage_cache_images").await, 0);
    assert_eq!(server.metric("afterimage_in_flight_bytes").await, 400_000);
    // A replaced one isn't served from there.
    let other = png(2, 400_000);
    redis.set("a", &record(&other)).await;
    until("the new image is served", || async { server.get("/images/a").await.body == other })
        .await;
}

#[tokio::test]
async fn images_that_are_in_memory_for_a_moment_make_room_for_fetches() {
    let redis = RedisServer::start().await;
    let settings = [("cache.bytes", "1MiB"), ("limits.fetch_bytes", "2MiB")];
    let server = Server::on(&redis, &settings).await.coherent().await;
    for number in 0..8 {
        let bytes = png(number, if number % 2 == 0 { 400_000 } else { 1_300_000 });
        redis.set(&format!("i{number}"), &record(&bytes)).await;
        assert_eq!(server.get(&format!("/images/i{number}")).await.body, bytes);
    }
    assert_eq!(server.metric("afterimage_shed_total{limit=\"fetch_bytes\"}").await, 0);
}

#[tokio::test]
async fn a_picture_that_takes_more_than_the_budget_is_refused_and_served_as_it_is() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("limits.fetch_bytes", "2MiB")]).await.coherent().await;
    let bytes = deep_png(1000);
    redis.set("a", &record(&bytes)).await;
    for _ in 0..2 {
        let refused = server.get("/images/a.webp?w=64").await.problem(413, "too-many-pixels");
        let detail = refused["detail"].as_str().unwrap();
        assert!(detail.contains("[limits] fetch_bytes"), "{detail}");
    }
    assert_eq!(server.metric("afterimage_renders_total").await, 0);
    assert_eq!(server.get("/images/a").await.body, bytes);
    assert_eq!(server.get("/images/a?w=64").await.body, bytes);
    redis.set("a", &record(&deep_png(500))).await;
    until("the smaller picture is rendered", || async {
        server.get("/images/a.webp?w=64").await.status == StatusCode::OK
    })
    .await;
}

#[tokio::test]
async fn a_render_that_took_too_long_is_not_tried_again_at_once() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("pictures.timeout", "200ms")]).await.coherent().await;
    // It takes some seconds.
    redis.set("a", &record(&deep_png(7000))).await;
    server.get("/images/a").await;
    let address = server.address;
    let refused = |answer: Answer| answer.problem(503, "render-timeout");
    until("the render has timed out", || async {
        refused(get(address, "/images/a?w=64", &[]).await);
        server.metric("afterimage_renders_total").await > 0
    })
    .await;
    let renders = server.metric("afterimage_renders_total").await;
    // Decoding takes as long for any size.
    for path in ["/images/a?w=64", "/images/a?w=128", "/images/a/thumbnail", "/images/a?h=64"] {
        refused(get(address, path, &[]).await);
    }
    assert_eq!(server.metric("afterimage_renders_total").await, renders);
}

async fn large_renders_share_one_budget() {
    let redis = RedisServer::start().await;
    let mut command = program();
    command.args(["--redis-url", &redis.url(), "--limits-fetch-bytes", "80MiB"]);
    command.args(["--pictures-timeout", "5min"]);
    let process = Process::start(command);
    // 69 MiB in 8 bits a channel, of which there is room for one.
    redis.set("a", &record(&deep_png(4900))).await;
    let address = process.address;
    let sizes: Vec<_> = [64, 320]
        .map(|width| {
            let path = format!("/images/a.webp?w={width}");
            tokio::spawn(async move { get(address, &path, &[]).await })
        })
        .into();
    for size in sizes {
        let answer = size.await.unwrap();
        assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
    }
    let most = process.most_resident();
    println!("{} MiB resident at most", most / MIB);
    // The program itself, the budget and the image.
    assert!(most < 180 * MIB, "{most} bytes");
}

async fn large_writes_take_what_they_are_counted_for() {
    let redis = RedisServer::start().await;
    let mut command = program();
    command.args(["--redis-url", &redis.url()]);
    let process = Process::start(command);
    let before = process.resident();
    let body = Bytes::from(png(1, 20 << 20));
    let address = process.address;
    let writes = (0..2).map(|number| {
        let body = body.clone();
        tokio::spawn(async move {
            let mut client = Client::connect(address).await;
            let path = format!("/images/i{number}");
            let headers = [("content-type", "image/png")];
            client.send(Method::PUT, &path, &headers, body).await.unwrap()
        })
    });
    for write in writes.collect::<Vec<_>>() {
        assert_eq!(write.await.unwrap().status, StatusCode::CREATED);
    }
    let most = process.most_resident() - before;
    println!("{} MiB for two writes of 20 MiB", most / MIB);
    // Each is counted three times.
    assert!(most < 2 * 3 * 20 * MIB, "{most} bytes");
}

/// Behind large requests and answers an idle connection costs no more than behind small ones in the fast loop, and a bounded number
/// of bytes in the HTTP library, which keeps its buffers.
async fn idle_connections_keep_no_large_buffers() {
    const MOST_KEPT_BY_LIBRARY: u64 = 64 * 1024;
    const CONNECTIONS: u64 = 1000;
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 200_000))).await;
    let cookie = "x".repeat(7000);
    let (small, large) = (vec![], vec![("cookie", cookie.as_str())]);
    for (protocol, path, most_kept) in [
        (Protocol::Http1, "/images/a", 3000),
        (Protocol::Http2, "/images/a", MOST_KEPT_BY_LIBRARY),
        (Protocol::Http1, "/healthz", MOST_KEPT_BY_LIBRARY),
    ] {
        let mut command = program();
        command.args(["--redis-url", &redis.url(), "--log-filter", "warn"]);
        let process = Process::start(command);
        let mut idle = Vec::new();
        let mut connect = async |count: u64, path: &str, fields: &[(&str, &str)]| {
            let before = process.resident();
            for _ in 0..count {
                let mut client = Client::speaking(protocol, process.address).await;
                client.get(path, fields).await;
                idle.push(client);
            }
            process.resident().saturating_sub(before) / count
        };
        // What the server needs once.
        connect(50, path, &large).await;
        let [behind_small, behind_large] = [
            connect(CONNECTIONS, "/images/none", &small).await,
            connect(CONNECTIONS, path, &large).await,
        ];
        println!(
            "{protocol:?} {path}: {behind_small} bytes for each idle connection, {behind_large} behind \
             large requests"
        );
        let kept = behind_large.saturating_sub(behind_small);
        assert!(kept < most_kept, "{kept} bytes");
    }
}
