//! Latency in an open loop: requests are sent on schedule, whether or not earlier ones are answered.

use std::time::Duration;

use anyhow::{Context, Result};

use crate::bench::Bench;
use crate::cells::{Cell, Figures, Results, Spread, percentile, take_turns};
use crate::images::{path, png, record};
use crate::load::{Addresses, Load, Protocol, measure};
use crate::open_loop::{self, Schedule};
use crate::report::{self, Column};
use crate::servers::{
    self, AFTERIMAGE, AGAINST, NGINX, Peer, Server, VARNISH, named, nginx, varnish,
};
use crate::store::Redis;

const SECTION: &str = "open";
const CAPACITY: &str = "capacity";
const HALF: &str = "50 % of its own capacity";
const MOST: &str = "80 % of its own capacity";
const SAME: &str = "one rate for all";
const SIZE: &str = "50 KB";
const LENGTH: usize = 50_000;
const CONNECTIONS: usize = 64;

pub(crate) fn run(bench: &Bench, results: &mut Results) -> Result<()> {
    let redis = Redis::start(bench, bench.cores.servers.as_deref())?;
    let image = png(1, LENGTH);
    redis.connect()?.set("50kb", &record(&image))?;
    let folder = bench.files(std::iter::once(("50kb".to_owned(), image.as_slice())))?;
    let mut peers = servers::afterimages(bench, &redis, &[]);
    let mut nginx_peer = Peer::new(NGINX, nginx(bench, &folder, false));
    let origin = nginx_peer.server().map(|it| it.http1);
    peers.extend([nginx_peer, Peer::new(VARNISH, varnish(bench, &origin))]);
    for peer in &mut peers {
        if let Err(error) =
            peer.server().and_then(|it| it.warm(std::iter::once("50kb".to_owned()), LENGTH))
        {
            eprintln!("{}: {error:#}", peer.name);
        }
    }

    let cells = |load: &str, names: &[&str]| -> Vec<Cell> {
        names.iter().map(|name| Cell::new(SECTION, load, SIZE, name)).collect()
    };
    let names: Vec<String> = peers.iter().map(|it| it.name.clone()).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let rounds = bench.options.rounds();
    let mut capacities = cells(CAPACITY, &names);
    take_turns(rounds, &mut capacities, |cell, _| {
        let load = Load {
            protocol: Protocol::Http1,
            connections: CONNECTIONS,
            addresses: Addresses::One { path: path("50kb"), if_none_match: None },
            body: Some(LENGTH),
        };
        measure(bench, named(&mut peers, &cell.server)?, &redis, &load)
    });
    results.cells.extend(capacities);

    let capacity = |server: &str| {
        let cell = results.find(SECTION, CAPACITY, SIZE, server);
        cell.and_then(|it| it.median("requests_per_second"))
    };
    // Capacity of the slower of the two servers that are compared.
    let shared = capacity(AFTERIMAGE).into_iter().chain(capacity(NGINX)).reduce(f64::min);
    let mut open = cells(HALF, &names);
    open.extend(cells(MOST, &names));
    let at_one_rate = [AFTERIMAGE, AGAINST, NGINX].into_iter().filter(|it| names.contains(it));
    open.extend(cells(SAME, &at_one_rate.collect::<Vec<_>>()));
    take_turns(rounds, &mut open, |cell, _| {
        let share = if cell.load == HALF { 0.5 } else { 0.8 };
        let capacity = if cell.load == SAME { shared } else { capacity(&cell.server) };
        let rate = share * capacity.context("its capacity wasn't measured")?;
        latency(bench, named(&mut peers, &cell.server)?, rate)
    });
    results.cells.extend(open);
    print(results);
    Ok(())
}

fn latency(bench: &Bench, server: &mut Server, rate: f64) -> Result<Figures> {
    let outcome = open_loop::run(&Schedule {
        address: server.http1,
        path: path("50kb"),
        connections: CONNECTIONS,
        rate,
        duration: Duration::from_secs(u64::from(bench.options.seconds())),
        alone: bench.cores.load.is_some(),
    })?;
    server.process.alive()?;
    Ok(Figures::from([
        ("rate", rate),
        ("p50_ms", percentile(&outcome.latencies, 0.5)),
        ("p99_ms", percentile(&outcome.latencies, 0.99)),
        ("p999_ms", percentile(&outcome.latencies, 0.999)),
        ("missed", outcome.missed),
        ("pause_ms", outcome.pause),
    ]))
}

/// Afterimage's 99th percentile divided by nginx's.
pub(crate) fn beside_nginx(results: &Results, own: bool) -> Option<Spread> {
    let load = if own { MOST } else { SAME };
    let cell = |server| results.find(SECTION, load, SIZE, server);
    cell(AFTERIMAGE)?.over("p99_ms", cell(NGINX)?, "p99_ms")
}

fn print(results: &Results) {
    println!("Capacity with {CONNECTIONS} connections, 50 KB, HTTP/1.1, hot, closed loop:");
    report::print(results, SECTION, CAPACITY, &report::usual(AFTERIMAGE));
    let median = |title, figure, digits| Column::Median { title, figure, digits };
    let columns = [
        median("requests/s", "rate", 0),
        median("p50 ms", "p50_ms", 3),
        median("p99 ms", "p99_ms", 3),
        median("p99.9 ms", "p999_ms", 3),
        Column::Ratio { title: "p99, afterimage ÷ it", figure: "p99_ms", reference: AFTERIMAGE },
        median("never answered", "missed", 0),
        median("generator's longest pause, ms", "pause_ms", 2),
    ];
    for load in [HALF, MOST, SAME] {
        println!("Open loop at {load}; latency counts from the time when a request was due:");
        report::print(results, SECTION, load, &columns);
    }
}
