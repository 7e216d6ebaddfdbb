//! Cold images: the time between the store and the client.
//!
//! No server is bound to one core here. Afterimage hashes and decodes in parallel if it can, and the latency of a request
//! includes both; the others, and the plain connection, have the same cores.

use std::hint::black_box;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use md5::{Digest, Md5};

use crate::bench::Bench;
use crate::cells::{Cell, Figures, Results, Spread};
use crate::client::{Answer, Client};
use crate::images::{SIZES, Size, path, png, record};
use crate::servers::{self, AFTERIMAGE, CACHED, NAIVE, Peer, python};
use crate::store::{Connection, Redis};
use crate::table::{self, figure};

pub(crate) const SECTION: &str = "cold";
const LOAD: &str = "one request at a time";
/// Lower bound of any server: fetch and hash over a plain connection.
pub(crate) const PLAIN: &str = "GET + MD5";
const MEASURED: [&str; 2] = ["50 KB", "1 MB"];

pub(crate) fn run(bench: &Bench, results: &mut Results) -> Result<()> {
    bench.cores.spread_this_process()?;
    let everywhere = Bench { cores: bench.cores.everywhere(), ..bench.clone() };
    let measured = all(&everywhere, results);
    bench.cores.move_this_process()?;
    measured?;
    print(results);
    Ok(())
}

fn all(bench: &Bench, results: &mut Results) -> Result<()> {
    let redis = Redis::start(bench, None)?;
    let mut peers = servers::afterimages(bench, &redis, &[]);
    peers.push(Peer::new(CACHED, python(bench, &redis, "cached")));
    peers.push(Peer::new(NAIVE, python(bench, &redis, "naive")));
    let plain = Plain::start(redis.connect()?);
    for size in SIZES.iter().filter(|it| MEASURED.contains(&it.name)) {
        let mut cells: Vec<Cell> =
            peers.iter().map(|it| Cell::new(SECTION, LOAD, size.name, &it.name)).collect();
        cells.push(Cell::new(SECTION, LOAD, size.name, PLAIN));
        for round in 0..bench.options.rounds() {
            eprintln!("cold, round {} of {}: {}", round + 1, bench.options.rounds(), size.name);
            measure(*size, round, &redis, &mut peers, &plain, &mut cells)?;
        }
        results.cells.extend(cells);
    }
    Ok(())
}

/// Requests new images once from each server, in rotating order, since the first request brings Redis's value into the
/// processor's cache.
fn measure(
    size: Size,
    round: usize,
    redis: &Redis,
    peers: &mut [Peer],
    plain: &Plain,
    cells: &mut [Cell],
) -> Result<()> {
    const IMAGES: usize = 20;
    let mut store = redis.connect()?;
    let ids: Vec<String> =
        (0..IMAGES).map(|image| format!("cold-{}-{round}-{image}", size.id)).collect();
    for (seed, id) in ids.iter().enumerate() {
        store.set(id, &record(&png((round * IMAGES + seed) as u64, size.bytes)))?;
    }
    // The pushes of the writes must arrive first: a fetch that crosses one isn't cached.
    sleep(Duration::from_millis(100));
    let mut clients: Vec<Result<Client>> =
        peers.iter_mut().map(|it| Client::connect(it.server()?.http1)).collect();
    for (image, id) in ids.iter().enumerate() {
        for turn in 0..cells.len() {
            let at = (turn + image) % cells.len();
            let measured = match clients.get_mut(at) {
                Some(Ok(client)) => request_twice(client, id, size),
                Some(Err(error)) => Err(anyhow!("{error:#}")),
                None => plain.fetch(id),
            };
            cells[at].add(measured);
        }
    }
    store.remove(&ids)
}

/// Requests a cold image, and then the same once more: the difference is due neither to the network nor to the client.
fn request_twice(client: &mut Client, id: &str, size: Size) -> Result<Figures> {
    let mut ask = || -> Result<(Answer, Duration)> {
        let begin = Instant::now();
        let answer = client.image(&path(id))?;
        let wall = begin.elapsed();
        ensure!(
            answer.body.len() == size.bytes,
            "expected {} bytes, got {}",
            size.bytes,
            answer.body.len()
        );
        Ok((answer, wall))
    };
    let (answer, cold) = ask()?;
    let (_, hot) = ask()?;
    let mut figures = Figures::from([
        ("wall_ms", milliseconds(cold)),
        ("more_ms", milliseconds(cold) - milliseconds(hot)),
    ]);
    let Some(timing) = answer.header("server-timing") else { return Ok(figures) };
    let status = answer.header("cache-status").unwrap_or_default();
    ensure!(status.contains("fwd=miss"), "the image wasn't cold: {status}");
    for part in timing.split(',') {
        let (name, time) = part.split_once(";dur=").with_context(|| timing.to_owned())?;
        let known = [("store", "store_ms"), ("hash", "hash_ms"), ("decode", "decode_ms")];
        if let Some((_, figure)) = known.iter().find(|it| it.0 == name.trim()) {
            figures.insert(figure, time.trim().parse()?);
        }
    }
    let part = |name: &str| figures.get(name).copied().unwrap_or_default();
    // Hash and decode begin together, once the value is there.
    let whole = part("store_ms") + part("hash_ms").max(part("decode_ms"));
    figures.insert("server_ms", whole);
    Ok(figures)
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// A thread that fetches values over a plain connection and hashes them.
struct Plain {
    ids: Sender<String>,
    fetched: Receiver<Result<Figures>>,
}

impl Plain {
    fn start(mut store: Connection) -> Plain {
        let (ids, wanted) = channel::<String>();
        let (report, fetched) = channel();
        std::thread::spawn(move || {
            for id in wanted {
                if report.send(fetch(&mut store, &id)).is_err() {
                    break;
                }
            }
        });
        Plain { ids, fetched }
    }

    fn fetch(&self, id: &str) -> Result<Figures> {
        const PATIENCE: Duration = Duration::from_secs(30);
        self.ids.send(id.to_owned()).context("the plain connection is gone")?;
        self.fetched.recv_timeout(PATIENCE).context("the plain connection doesn't answer")?
    }
}

fn fetch(store: &mut Connection, id: &str) -> Result<Figures> {
    let begin = Instant::now();
    let value = store.get(id)?;
    let fetched = begin.elapsed();
    black_box(Md5::digest(&value));
    let whole = begin.elapsed();
    let whole = milliseconds(whole);
    Ok(Figures::from([
        ("store_ms", milliseconds(fetched)),
        ("hash_ms", whole - milliseconds(fetched)),
        ("server_ms", whole),
        ("more_ms", whole),
    ]))
}

/// Afterimage's time divided by that of the plain connection, from `Server-Timing` or as measured by the client.
pub(crate) fn overhead(results: &Results, size: &str, at_client: bool) -> Option<Spread> {
    let cell = |server| results.find(SECTION, LOAD, size, server);
    let figure = if at_client { "more_ms" } else { "server_ms" };
    cell(AFTERIMAGE)?.over(figure, cell(PLAIN)?, figure)
}

fn print(results: &Results) {
    println!(
        "Cold, one request at a time; medians in milliseconds. \"In the server\" is the store plus the longer of hash and \
         decode, which Afterimage does in parallel. \"More than hot\" is the client's additional wait compared with a \
         second request for the same image:"
    );
    let head = [
        "size",
        "server",
        "store",
        "hash",
        "decode",
        "in the server",
        "÷ GET + MD5",
        "at the client",
        "more than hot",
        "÷ GET + MD5",
        "at the client: afterimage ÷ it",
        table::TROUBLE,
    ];
    let cells: Vec<&Cell> = results.cells.iter().filter(|it| it.section == SECTION).collect();
    let rows = cells.iter().map(|cell| {
        let other = |server| results.find(SECTION, LOAD, &cell.size, server);
        let over_plain = |figure| {
            let ratio = other(PLAIN).and_then(|it| cell.over(figure, it, figure));
            ratio.map(|it| it.median)
        };
        let ours = other(AFTERIMAGE).and_then(|it| it.over("wall_ms", cell, "wall_ms"));
        let median = |name: &str| figure(cell.median(name), 2);
        // A server without a cache is never hot.
        let kept = |text: String| if cell.server == NAIVE { "–".to_owned() } else { text };
        vec![
            cell.size.clone(),
            cell.server.clone(),
            median("store_ms"),
            median("hash_ms"),
            median("decode_ms"),
            median("server_ms"),
            figure(over_plain("server_ms"), 2),
            median("wall_ms"),
            kept(median("more_ms")),
            kept(figure(over_plain("more_ms"), 2)),
            figure(ours.map(|it| it.median), 2),
            cell.trouble.clone().unwrap_or_default(),
        ]
    });
    table::print(2, &head, &rows.collect::<Vec<_>>());
}
