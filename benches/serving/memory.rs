//! Resident memory, and the cost of hits among many images.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::bench::Bench;
use crate::cells::{Cell, Figures, Results, Spread, float, take_turns};
use crate::client::Client;
use crate::floor;
use crate::images::{path, png, record};
use crate::load::{Addresses, Load, Protocol, measure};
use crate::report::{self, Column};
use crate::servers::{
    self, AFTERIMAGE, AGAINST, FLOOR, NGINX, Peer, Server, afterimage, named, nginx,
};
use crate::store::Redis;

const SECTION: &str = "memory";
const FLOOD: &str = "images through the default cache";
const IDLE: &str = "idle connections";
const MANY: &str = "images in memory, of 200 bytes";
const CONNECTIONS: usize = 10_000;
const MANY_IMAGES: [(&str, usize); 2] = [("50,000", 50_000), ("50", 50)];
const SMALL: usize = 200;

pub(crate) fn run(bench: &Bench, results: &mut Results) -> Result<()> {
    flood(bench, results)?;
    idle(bench, results)?;
    many(bench, results)
}

/// Number of images: as many as the documented figure is for, or fewer in a quick run.
pub(crate) fn flood_size(bench: &Bench) -> usize {
    if bench.options.quick { 1_000 } else { 10_000 }
}

fn flood(bench: &Bench, results: &mut Results) -> Result<()> {
    let redis = Redis::start(bench, bench.cores.servers.as_deref())?;
    let images = flood_size(bench);
    let size = format!("{images} × 1 MB");
    for mut peer in servers::afterimages(bench, &redis, &[]) {
        let mut cell = Cell::new(SECTION, FLOOD, &size, &peer.name);
        eprintln!("memory: {size} through {}", peer.name);
        cell.add(peer.server().and_then(|server| {
            let before = server.process.memory("VmRSS");
            pass_through(server, &redis, images)?;
            Ok(memory(server, before))
        }));
        results.cells.push(cell);
    }
    println!(
        "Resident memory in MB (10⁶ bytes) before, after and at most, for a number of images of 1 MB:"
    );
    report::print(results, SECTION, FLOOD, &COLUMNS);
    Ok(())
}

const COLUMNS: [Column; 3] = [
    Column::Median { title: "before", figure: "before_mb", digits: 1 },
    Column::Median { title: "after", figure: "rss_mb", digits: 1 },
    Column::Median { title: "at most", figure: "hwm_mb", digits: 1 },
];

fn memory(server: &Server, before: u64) -> Figures {
    let mb = |bytes: u64| float(bytes) / 1e6;
    Figures::from([
        ("before_mb", mb(before)),
        ("rss_mb", mb(server.process.memory("VmRSS"))),
        ("hwm_mb", mb(server.process.memory("VmHWM"))),
    ])
}

/// Writes and requests images in four threads. Each image is deleted long after it has left the cache.
fn pass_through(server: &Server, redis: &Redis, images: usize) -> Result<()> {
    const AT_ONCE: usize = 16;
    let template = record(&png(1, 1_000_000));
    let begun = AtomicUsize::new(0);
    let lane = || -> Result<()> {
        let (mut store, mut client) = (redis.connect()?, Client::connect(server.http1)?);
        let mut value = template.clone();
        let mut written: Vec<Vec<String>> = Vec::new();
        loop {
            let first = begun.fetch_add(AT_ONCE, Ordering::Relaxed);
            if first >= images {
                break;
            }
            let ids: Vec<String> =
                (first..images.min(first + AT_ONCE)).map(|it| format!("m{it}")).collect();
            for (image, id) in (first..).zip(&ids) {
                // Digits are in base64's alphabet, so eight new bytes make another image.
                let middle = value.len() / 2;
                value[middle..middle + 8].copy_from_slice(format!("{image:08}").as_bytes());
                store.set(id, &value)?;
            }
            // The pushes of the writes must arrive first, or the fetched images aren't cached.
            sleep(Duration::from_millis(5));
            for id in &ids {
                let length = client.image(&path(id))?.body.len();
                ensure!(length == 1_000_000, "expected an image of 1 MB, got {length} bytes");
            }
            written.push(ids);
            if written.len() > 3 {
                store.remove(&written.remove(0))?;
            }
        }
        written.iter().try_for_each(|ids| store.remove(ids))
    };
    std::thread::scope(|scope| {
        let lanes: Vec<_> = (0..4).map(|_| scope.spawn(lane)).collect();
        lanes.into_iter().try_for_each(|lane| {
            lane.join().map_err(|_panic| anyhow::anyhow!("a client failed"))?
        })
    })
}

fn idle(bench: &Bench, results: &mut Results) -> Result<()> {
    let redis = Redis::start(bench, bench.cores.servers.as_deref())?;
    let image = png(1, 2_000);
    redis.connect()?.set("2kb", &record(&image))?;
    let folder = bench.files(std::iter::once(("2kb".to_owned(), image.as_slice())))?;
    let mut peers = servers::afterimages(bench, &redis, &[]);
    peers.push(Peer::new(NGINX, nginx(bench, &folder, false)));
    // This process has an open file for each connection too.
    let allowed = rlimit::Resource::NOFILE.get_soft()?.saturating_sub(500);
    let connections = CONNECTIONS.min(usize::try_from(allowed)?);
    for peer in &mut peers {
        let size = format!("{connections}");
        let mut cell = Cell::new(SECTION, IDLE, &size, &peer.name);
        eprintln!("memory: {connections} connections to {}", peer.name);
        cell.add(peer.server().and_then(|server| {
            let before = server.process.memory("VmRSS");
            let open = |_| -> Result<Client> {
                let mut client = Client::connect(server.http1)?;
                client.image(&path("2kb"))?;
                Ok(client)
            };
            let mut clients: Vec<Client> = (0..connections).map(open).collect::<Result<_>>()?;
            let figures = memory(server, before);
            for client in [clients.first_mut()].into_iter().flatten() {
                client.image(&path("2kb")).context("the first connection was closed")?;
            }
            Ok(figures)
        }));
        results.cells.push(cell);
    }
    println!(
        "Resident memory in MB before, with a number of idle connections after one request each, and at most:"
    );
    report::print(results, SECTION, IDLE, &COLUMNS);
    Ok(())
}

fn many(bench: &Bench, results: &mut Results) -> Result<()> {
    let redis = Redis::start(bench, bench.cores.servers.as_deref())?;
    let mut store = redis.connect()?;
    let ids = |count: usize| (0..count).map(|image| format!("i{image}"));
    let images: Vec<(String, Vec<u8>)> = ids(MANY_IMAGES[0].1)
        .enumerate()
        .map(|(image, id)| (id, png(image as u64, SMALL)))
        .collect();
    let records: Vec<_> = images.iter().map(|(id, image)| (id.clone(), record(image))).collect();
    store.set_all(&records)?;
    let roomy =
        [("cache.images", "60000"), ("cache.index_entries", "60000"), ("cache.bytes", "200MiB")];
    let mut programs = vec![(AFTERIMAGE, &bench.afterimage)];
    programs.extend(bench.against.iter().map(|program| (AGAINST, program)));
    let (mut peers, mut cells) = (Vec::new(), Vec::new());
    for (name, program) in programs {
        for (size, count) in MANY_IMAGES {
            eprintln!("memory: {size} images in {name}");
            let server = afterimage(bench, program, &redis, &roomy)
                .and_then(|server| server.warm(ids(count), SMALL).map(|()| server));
            peers.push(Peer::new(&format!("{name} {size}"), server));
            cells.push(Cell::new(SECTION, MANY, size, name));
        }
    }
    for (size, count) in MANY_IMAGES {
        let files = images.iter().take(count).map(|(id, image)| (id.clone(), image.as_slice()));
        let server = bench.files(files).and_then(|folder| floor::start(bench, &folder));
        peers.push(Peer::new(&format!("{FLOOR} {size}"), server));
        cells.push(Cell::new(SECTION, MANY, size, FLOOR));
    }
    take_turns(bench.options.rounds(), &mut cells, |cell, round| {
        let server = named(&mut peers, &format!("{} {}", cell.server, cell.size))?;
        let count = MANY_IMAGES.iter().find(|it| it.0 == cell.size).context("no such count")?.1;
        let load = Load {
            protocol: Protocol::Http1,
            connections: 16,
            addresses: Addresses::Many { chance: "uniform", count, seed: round + 1 },
            body: Some(SMALL),
        };
        let before = server.metric("afterimage_fetches_total");
        let mut figures = measure(bench, server, &redis, &load)?;
        let fetched = server.metric("afterimage_fetches_total").zip(before);
        figures.insert("fetches", fetched.map_or(f64::NAN, |(after, before)| after - before));
        Ok(figures)
    });
    results.cells.extend(cells);
    println!("Hits on images of 200 bytes in random order, by the number of images in memory:");
    let mut columns = Vec::from(report::usual(AFTERIMAGE));
    columns.push(Column::Median { title: "fetched from Redis", figure: "fetches", digits: 0 });
    report::print(results, SECTION, MANY, &columns);
    Ok(())
}

/// In MB.
pub(crate) fn after_flood(results: &Results) -> Option<Spread> {
    let mut cells = results.cells.iter().filter(|it| it.load == FLOOD && it.server == AFTERIMAGE);
    cells.next()?.spread("rss_mb")
}

/// In MB.
pub(crate) fn with_connections(results: &Results) -> Option<Spread> {
    let mut cells = results.cells.iter().filter(|it| it.load == IDLE && it.server == AFTERIMAGE);
    cells.next()?.spread("rss_mb")
}

/// Processor time of a hit among many images divided by that among few.
pub(crate) fn among_many(results: &Results, server: &str) -> Option<Spread> {
    let cell = |size| results.find(SECTION, MANY, size, server);
    cell(MANY_IMAGES[0].0)?.over("cpu_us", cell(MANY_IMAGES[1].0)?, "cpu_us")
}
