//! Bounds of memory.

use crate::harness::server::{metric, program};
use crate::harness::{Client, Process, RedisServer, Server, get, png, record};

long_tests! {
    #[tokio::test] the_cache_never_exceeds_its_image_count_nor_its_byte_budget
}

const MIB: usize = 1024 * 1024;

async fn the_cache_never_exceeds_its_image_count_nor_its_byte_budget() {
    let redis = RedisServer::start().await;
    let mut command = program();
    command.args(["--redis-url", &redis.url()]);
    let process = Process::start(command);
    let mut client = Client::connect(process.address).await;
    let mut connection = redis.connect().await;

    // Images of 60 KB reach the limit of the count first, those of 1.5 MB the byte budget, of which 8 MiB are left to variants.
    // Some of the small ones stay, since the large ones are asked for no more often.
    for (length, count, least_images) in [(60_000, 120, 50), (1_500_000, 70, 27)] {
        for number in 0..count {
            let bytes = png(number, length);
            // Of an id of its own: the push of a replaced image may come after the answer to its writer.
            redis::cmd("SET")
                .arg(format!("image:i{length}-{number}"))
                .arg(record(&bytes))
                .exec_async(&mut connection)
                .await
                .unwrap();
            assert_eq!(client.get(&format!("/images/i{length}-{number}"), &[]).await.body, bytes);
            let page = client.get("/metrics", &[]).await;
            assert!(metric(&page, "afterimage_cache_images") <= 50);
            assert!(metric(&page, "afterimage_cache_bytes") <= 50 * MIB as u64);
        }
        let held = metric(&client.get("/metrics", &[]).await, "afterimage_cache_images");
        assert!((least_images..=50).contains(&held), "{held}");
        println!("{held} images of {length} bytes held, {} bytes resident", process.resident());
    }
    // The budget and the program's other memory: a generous bound that finds leaks.
    assert!(process.resident() < 150 * MIB as u64, "{} bytes resident", process.resident());
}

#[tokio::test]
async fn an_image_larger_than_a_quarter_of_the_budget_is_served_and_not_kept() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("cache.bytes", "1MiB")]).await;
    let bytes = png(1, MIB / 4 + 1);
    redis.set("a", &record(&bytes)).await;
    for _ in 0..2 {
        assert_eq!(server.get("/images/a").await.body, bytes);
        assert_eq!(server.metric("afterimage_cache_images").await, 0);
    }
}

#[tokio::test]
async fn a_known_version_is_decoded_once() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let value = record(&png(1, 100_000));
    redis.set("a", &value).await;
    for _ in 0..10 {
        server.get("/images/a").await;
        redis.set("a", &value).await;
    }
    assert_eq!(server.metric("afterimage_decodes_total").await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn concurrent_cold_images_share_the_fetch_budget_and_all_are_served() {
    let redis = RedisServer::start().await;
    // Room for one image at a time, and less than the largest image needs alone.
    let server = Server::on(&redis, &[("limits.fetch_bytes", "1MiB")]).await.coherent().await;
    let image = |number: u64| png(number, if number == 0 { 3 * MIB } else { 600_000 });
    for number in 0..30 {
        redis.set(&format!("i{number}"), &record(&image(number))).await;
    }
    let address = server.address;
    let requests: Vec<_> = (0..30)
        .map(|number| {
            tokio::spawn(async move { get(address, &format!("/images/i{number}"), &[]).await })
        })
        .collect();
    for (number, answer) in (0..).zip(requests) {
        assert_eq!(answer.await.unwrap().body, image(number));
    }
}
