//! A thousand images of 50 KB, requested with Zipf's distribution.

use anyhow::Result;

use crate::bench::Bench;
use crate::cells::{Cell, Figures, Results, take_turns};
use crate::images::{png, record};
use crate::load::{Addresses, Load, Protocol, measure};
use crate::report::{self, Column};
use crate::servers::{NGINX, Peer, VARNISH, afterimage, named, nginx, varnish};
use crate::store::Redis;

const SECTION: &str = "zipf";
const LOAD: &str = "1,000 images by Zipf, s = 1";
const IMAGES: usize = 1_000;
const LENGTH: usize = 50_000;
/// Afterimage with its default cache of 50 images.
const DEFAULT: &str = "afterimage, 50 kept";
const ALL: &str = "afterimage, all kept";

pub(crate) fn run(bench: &Bench, results: &mut Results) -> Result<()> {
    let redis = Redis::start(bench, bench.cores.servers.as_deref())?;
    let ids = || (0..IMAGES).map(|image| format!("i{image}"));
    let images: Vec<Vec<u8>> = (0..IMAGES).map(|image| png(image as u64, LENGTH)).collect();
    let records: Vec<(String, Vec<u8>)> =
        ids().zip(images.iter().map(|image| record(image))).collect();
    redis.connect()?.set_all(&records)?;
    drop(records);
    let folder = bench.files(ids().zip(images.iter().map(Vec::as_slice)))?;

    let roomy = [("cache.images", "2000"), ("cache.bytes", "200MiB")];
    let mut peers = vec![
        Peer::new(DEFAULT, afterimage(bench, &bench.afterimage, &redis, &[])),
        Peer::new(ALL, afterimage(bench, &bench.afterimage, &redis, &roomy)),
    ];
    if let Some(program) = &bench.against {
        peers.push(Peer::new("against, 50 kept", afterimage(bench, program, &redis, &[])));
        peers.push(Peer::new("against, all kept", afterimage(bench, program, &redis, &roomy)));
    }
    let mut nginx_peer = Peer::new(NGINX, nginx(bench, &folder, false));
    let origin = nginx_peer.server().map(|it| it.http1);
    peers.extend([nginx_peer, Peer::new(VARNISH, varnish(bench, &origin))]);
    for peer in &mut peers {
        if let Err(error) = peer.server().and_then(|it| it.warm(ids(), LENGTH)) {
            eprintln!("{}: {error:#}", peer.name);
        }
    }

    let cell = |peer: &Peer| Cell::new(SECTION, LOAD, "50 KB", &peer.name);
    let mut cells: Vec<Cell> = peers.iter().map(cell).collect();
    take_turns(bench.options.rounds(), &mut cells, |cell, round| {
        let server = named(&mut peers, &cell.server)?;
        let load = Load {
            protocol: Protocol::Http1,
            connections: 16,
            // The same images in the same order for every server of a round.
            addresses: Addresses::Many { chance: "zipf", count: IMAGES, seed: round + 1 },
            body: Some(LENGTH),
        };
        let before = server.metric("afterimage_fetches_total");
        let mut figures: Figures = measure(bench, server, &redis, &load)?;
        if let (Some(before), Some(after)) = (before, server.metric("afterimage_fetches_total")) {
            figures.insert("fetches", (after - before) / figures["requests"]);
        }
        Ok(figures)
    });
    results.cells.extend(cells);
    println!(
        "1,000 images of 50 KB by Zipf's law (s = 1), HTTP/1.1, 16 connections; ratios refer to the Afterimage that \
         caches all images:"
    );
    let mut columns = Vec::from(report::usual(ALL));
    let fetched = Column::Median { title: "fetched from Redis", figure: "fetches", digits: 3 };
    columns.push(fetched);
    report::print(results, SECTION, LOAD, &columns);
    Ok(())
}
