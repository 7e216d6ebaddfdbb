//! Cost and effect of coherence, on a redis-server that this bench starts and stops.
//!
//! `cargo bench --bench coherence`: a hit against the same hit in unverified mode; a hit with 50, 5,000 and
//! 50,000 images known and kept, on one thread and on two; and the time from a writer's OK to the first fresh
//! answer, over 10,000 writes while others read.

#![expect(clippy::unwrap_used, reason = "a bench without its server has nothing to measure")]

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use afterimage::App;
use afterimage::CacheStatus;
use afterimage::image::ImageId;
use afterimage::image::coding::AcceptedCodings;
use afterimage::image::preconditions::Preconditions;
use afterimage::store::Coherence;
use afterimage::{Answer, ImageRequest, Want};
use criterion::{BenchmarkId, Criterion};
use redis::aio::MultiplexedConnection;
use tokio::runtime::Runtime;

#[path = "../tests/it/harness/mod.rs"]
#[allow(dead_code, unused_imports, reason = "the tests use all of it")]
mod harness;

use harness::{Client, RedisServer, Server, png, record, until};

async fn app(redis: &RedisServer, given: &[(&str, &str)]) -> Arc<App> {
    let url = redis.url();
    let mut all = vec![("redis.url", url.as_str())];
    all.extend_from_slice(given);
    let app = App::build(harness::server::load(&all)).await.unwrap();
    if app.settings.redis.tracking {
        until("the server is coherent", || async { app.index.coherence() == Coherence::Coherent })
            .await;
    }
    app
}

fn id(number: usize) -> ImageId {
    ImageId::parse(&format!("i{number}")).unwrap()
}

async fn set(connection: &mut MultiplexedConnection, number: usize, value: &[u8]) {
    let mut set = redis::cmd("SET");
    set.arg(format!("image:i{number}")).arg(value);
    set.exec_async(connection).await.unwrap();
}

async fn get(app: &Arc<App>, id: ImageId) -> Answer {
    let request = ImageRequest {
        id,
        client: None,
        want: Want::Body,
        preconditions: Preconditions::default(),
        accepts: AcceptedCodings::UNSAID,
        transform: None,
    };
    app.reader.image(request).await.unwrap()
}

/// Fetches until the image is a hit, so that the push of its own write has been processed.
async fn warm(app: &Arc<App>, id: &ImageId) {
    while get(app, id.clone()).await.cache_status != CacheStatus::Hit {}
}

fn coherent_and_unverified(criterion: &mut Criterion, runtime: &Runtime, redis: &RedisServer) {
    let mut group = criterion.benchmark_group("a known image");
    for (name, length) in [("50 KB", 50_000), ("1 MB", 1_000_000)] {
        for tracking in ["true", "false"] {
            let app = runtime.block_on(async {
                let app = app(redis, &[("redis.tracking", tracking)]).await;
                set(&mut redis.connect().await, 0, &record(&png(1, length))).await;
                get(&app, id(0)).await;
                if tracking == "true" {
                    warm(&app, &id(0)).await;
                }
                app
            });
            let mode = if tracking == "true" { "coherent" } else { "unverified" };
            group.bench_function(BenchmarkId::new(mode, name), |bencher| {
                bencher.iter(|| black_box(runtime.block_on(get(&app, id(0)))));
            });
        }
    }
}

fn many_images(criterion: &mut Criterion, runtime: &Runtime, redis: &RedisServer) {
    let mut group = criterion.benchmark_group("a hit among");
    for images in [50, 5_000, 50_000] {
        let app = runtime.block_on(async {
            let app = app(redis, &[("cache.images", "60000"), ("cache.bytes", "1GiB")]).await;
            let mut connection = redis.connect().await;
            for number in 0..images {
                set(&mut connection, number, &record(&png(number as u64, 200))).await;
            }
            // Once the last image is a hit, all pushes have been processed.
            warm(&app, &id(images - 1)).await;
            for number in 0..images {
                warm(&app, &id(number)).await;
            }
            app
        });
        let ids: Vec<ImageId> = (0..images).map(id).collect();
        for threads in [1, 2] {
            group.bench_function(
                BenchmarkId::new(format!("{images} images"), threads),
                |bencher| {
                    bencher.iter_custom(|rounds| {
                        let begin = Instant::now();
                        std::thread::scope(|scope| {
                            for thread in 0..threads {
                                let (app, ids, runtime) = (&app, &ids, &runtime);
                                scope.spawn(move || {
                                    runtime.block_on(async {
                                        let mut at = thread * images / 2;
                                        for _ in 0..rounds {
                                            // A stride that reaches every image, not in the order of use.
                                            at = (at + 7919) % images;
                                            black_box(get(app, ids[at].clone()).await);
                                        }
                                    });
                                });
                            }
                        });
                        begin.elapsed()
                    });
                },
            );
        }
    }
}

async fn freshness(redis: &RedisServer) {
    const WRITES: u64 = 10_000;
    let server = Server::on(redis, &[]).await.coherent().await;
    let mut writer = redis.connect().await;
    for number in 0..20 {
        set(&mut writer, number, &record(&png(0, 50_000))).await;
    }
    let stop = Arc::new(AtomicBool::new(false));
    let load = tokio::spawn({
        let (stop, address) = (Arc::clone(&stop), server.address);
        async move {
            let (mut client, mut requests) = (Client::connect(address).await, 0_u32);
            while !stop.load(Ordering::Relaxed) {
                client.get(&format!("/images/i{}", 1 + requests % 19), &[]).await;
                requests += 1;
            }
            requests
        }
    });
    let mut reader = Client::connect(server.address).await;
    let mut times = Vec::new();
    let begin = Instant::now();
    for write in 1..=WRITES {
        let image = png(write, 50_000);
        set(&mut writer, 0, &record(&image)).await;
        let written = Instant::now();
        while reader.get("/images/i0", &[]).await.body != image {}
        times.push(written.elapsed());
    }
    let elapsed = begin.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    let others = f64::from(load.await.unwrap()) / elapsed;
    times.sort();
    let at = |thousandth: usize| times[(times.len() - 1) * thousandth / 1000];
    println!(
        "\nfrom a writer's OK to the end of the first fresh answer of 50 KB, {WRITES} writes beside \
         {others:.0} other requests a second:\n  p50 {:?}  p90 {:?}  p99 {:?}  p99.9 {:?}  max {:?}\n",
        at(500),
        at(900),
        at(990),
        at(999),
        at(1000),
    );
}

fn main() {
    let runtime = Runtime::new().unwrap();
    let redis = runtime.block_on(RedisServer::start());
    runtime.block_on(freshness(&redis));
    let mut criterion = Criterion::default().configure_from_args();
    coherent_and_unverified(&mut criterion, &runtime, &redis);
    many_images(&mut criterion, &runtime, &redis);
    criterion.final_summary();
}
