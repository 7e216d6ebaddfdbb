//! Hits and revalidations of images that every server has in memory.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::bench::Bench;
use crate::cells::{Cell, Figures, Results, float, take_turns};
use crate::client::Client;
use crate::floor;
use crate::images::{SIZES, Size, path, png, record};
use crate::load::{Addresses, Load, Protocol, measure};
use crate::report::{self, Column};
use crate::servers::{
    self, AFTERIMAGE, AGAINST, CACHED, FLOOR, LIBRARY, NAIVE, NGINX, Peer, Server, VARNISH,
    afterimage, named, nginx, python, varnish,
};
use crate::store::Redis;

pub(crate) const SECTION: &str = "hit";
/// Name of a load that `targets` and `plot` look up.
pub(crate) const PLAIN: &str = "HTTP/1.1, 16 connections, 200";
pub(crate) const REVALIDATION: &str = "HTTP/1.1, 16 connections, 304";
const LOGGED: &str = "HTTP/1.1, 16 connections, 200, a line in a log";

/// Servers with an access log, which are processes of their own.
const LOGGING: [(&str, &str); 2] = [(AFTERIMAGE, "afterimage, logging"), (NGINX, "nginx, logging")];

struct Kind {
    protocol: Protocol,
    connections: usize,
    status: u16,
    sizes: &'static [&'static str],
    /// Sizes that the Python peers are measured with.
    pythons: &'static [&'static str],
}

/// Loads and sizes. A 304 has no body, so larger images slow down only Python, which hashes the value each time. The effect
/// of many connections shows at one or two sizes.
const KINDS: [Kind; 7] = [
    Kind {
        protocol: Protocol::Http1,
        connections: 16,
        status: 200,
        sizes: &["2 KB", "50 KB", "200 KB", "1 MB"],
        pythons: &["2 KB", "50 KB", "200 KB", "1 MB"],
    },
    Kind {
        protocol: Protocol::Http1,
        connections: 256,
        status: 200,
        sizes: &["50 KB", "1 MB"],
        pythons: &[],
    },
    Kind {
        protocol: Protocol::Http2,
        connections: 16,
        status: 200,
        sizes: &["2 KB", "50 KB", "200 KB", "1 MB"],
        pythons: &["50 KB"],
    },
    Kind {
        protocol: Protocol::Http2,
        connections: 256,
        status: 200,
        sizes: &["50 KB"],
        pythons: &[],
    },
    Kind {
        protocol: Protocol::Http1,
        connections: 16,
        status: 304,
        sizes: &["50 KB", "1 MB"],
        pythons: &["50 KB", "1 MB"],
    },
    Kind {
        protocol: Protocol::Http1,
        connections: 256,
        status: 304,
        sizes: &["50 KB"],
        pythons: &[],
    },
    Kind {
        protocol: Protocol::Http2,
        connections: 16,
        status: 304,
        sizes: &["50 KB"],
        pythons: &[],
    },
];

impl Kind {
    fn name(&self) -> String {
        format!("{}, {} connections, {}", self.protocol.name(), self.connections, self.status)
    }
}

pub(crate) fn run(bench: &Bench, results: &mut Results) -> Result<()> {
    let redis = Redis::start(bench, bench.cores.servers.as_deref())?;
    let images = SIZES.map(|size| (size, png(1, size.bytes)));
    for (size, image) in &images {
        redis.connect()?.set(size.id, &record(image))?;
    }
    let files = || images.iter().map(|(size, image)| (size.id.to_owned(), image.as_slice()));
    let (folder, logging_folder) = (bench.files(files())?, bench.files(files())?);
    let mut peers = servers::afterimages(bench, &redis, &[]);
    let mut nginx_peer = Peer::new(NGINX, nginx(bench, &folder, false));
    let origin = nginx_peer.server().map(|it| it.http1);
    let logged = [("log.access", "true")];
    peers.extend([
        nginx_peer,
        Peer::new(VARNISH, varnish(bench, &origin)),
        Peer::new(FLOOR, floor::start(bench, &folder)),
        Peer::new(LIBRARY, floor::start_library(bench, &folder)),
        Peer::new(CACHED, python(bench, &redis, "cached")),
        Peer::new(NAIVE, python(bench, &redis, "naive")),
        Peer::new(LOGGING[0].1, afterimage(bench, &bench.afterimage, &redis, &logged)),
        Peer::new(LOGGING[1].1, nginx(bench, &logging_folder, true)),
    ]);
    let logs = Logs {
        afterimage: named(&mut peers, LOGGING[0].1).map(|it| it.process.log.clone()).ok(),
        nginx: logging_folder.join("access.log"),
    };
    print_heads(&mut peers);

    let mut cells = cells(bench);
    take_turns(bench.options.rounds(), &mut cells, |cell, _| {
        let server = named(&mut peers, &cell.server)?;
        let size = size(&cell.size)?;
        let Some(kind) = KINDS.iter().find(|kind| kind.name() == cell.load) else {
            return logs.measure(bench, server, &redis, cell, size);
        };
        measure(bench, server, &redis, &load(kind, server, size)?)
    });
    results.cells.extend(cells);
    for kind in &KINDS {
        println!("{}, hot:", kind.name());
        report::print(results, SECTION, &kind.name(), &report::usual(AFTERIMAGE));
    }
    println!("The same with one line in a log file for each request:");
    let columns = [
        Column::Median { title: "requests/s", figure: "requests_per_second", digits: 0 },
        Column::Median { title: "CPU µs/request", figure: "cpu_us", digits: 1 },
        Column::Ratio { title: "CPU: afterimage ÷ it", figure: "cpu_us", reference: LOGGING[0].1 },
        Column::Median { title: "lines/request", figure: "lines_per_request", digits: 3 },
    ];
    report::print(results, SECTION, LOGGED, &columns);
    Ok(())
}

fn size(name: &str) -> Result<Size> {
    SIZES.into_iter().find(|it| it.name == name).context("no such size")
}

fn cells(bench: &Bench) -> Vec<Cell> {
    let mut cells = Vec::new();
    for kind in &KINDS {
        for size in kind.sizes {
            let mut servers = vec![AFTERIMAGE];
            servers.extend(bench.against.is_some().then_some(AGAINST));
            servers.extend([NGINX, VARNISH]);
            servers.push(match kind.protocol {
                Protocol::Http1 => FLOOR,
                Protocol::Http2 => LIBRARY,
            });
            if kind.pythons.contains(size) {
                servers.extend([CACHED, NAIVE]);
            }
            let cell = |server| Cell::new(SECTION, &kind.name(), size, server);
            cells.extend(servers.into_iter().map(cell));
        }
    }
    for size in ["2 KB", "50 KB"] {
        cells.extend(LOGGING.map(|(_, server)| Cell::new(SECTION, LOGGED, size, server)));
    }
    cells
}

fn load(kind: &Kind, server: &Server, size: Size) -> Result<Load> {
    let path = path(size.id);
    // This loads the image into memory if necessary.
    let answer = Client::connect(server.http1)?.image(&path)?;
    let if_none_match = match kind.status {
        304 => {
            let tag = answer
                .header("etag")
                .context("the server sends no ETag, so nothing can be revalidated")?;
            Some(tag.to_owned())
        }
        _ => None,
    };
    let body = if_none_match.is_none().then_some(size.bytes);
    Ok(Load {
        protocol: kind.protocol,
        connections: kind.connections,
        addresses: Addresses::One { path, if_none_match },
        body,
    })
}

/// Access logs of the logging servers.
struct Logs {
    afterimage: Option<PathBuf>,
    nginx: PathBuf,
}

impl Logs {
    fn measure(
        &self,
        bench: &Bench,
        server: &mut Server,
        redis: &Redis,
        cell: &Cell,
        size: Size,
    ) -> Result<Figures> {
        let log =
            if cell.server == LOGGING[1].1 { Some(&self.nginx) } else { self.afterimage.as_ref() };
        let log = log.context("there is no log")?;
        let load = load(&KINDS[0], server, size)?;
        File::options().write(true).open(log)?.set_len(0)?;
        let mut figures = measure(bench, server, redis, &load)?;
        // A background writer needs time to finish.
        sleep(Duration::from_millis(300));
        // A logger that drops lines would look quick.
        figures.insert("lines_per_request", lines(log)? / figures["requests"]);
        Ok(figures)
    }
}

fn lines(log: &Path) -> Result<f64> {
    // The last piece follows the last newline, and is no line.
    let pieces = fs::read(log)?.split(|&byte| byte == b'\n').count();
    Ok(float(pieces as u64 - 1))
}

/// Prints the size of each server's response head, since a smaller one costs less.
fn print_heads(peers: &mut [Peer]) {
    let heads = peers.iter_mut().filter(|it| !it.name.ends_with("logging")).map(|peer| {
        let mut head = || -> Result<usize> {
            let mut client = Client::connect(peer.server()?.http1)?;
            client.image(&path("50kb"))?;
            Ok(client.image(&path("50kb"))?.head.len())
        };
        match head() {
            Ok(length) => format!("{} {length}", peer.name),
            Err(error) => format!("{} – ({error:#})", peer.name),
        }
    });
    println!("Bytes of headers with an image: {}.\n", heads.collect::<Vec<_>>().join("; "));
}
