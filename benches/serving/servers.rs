//! The compared servers: each has one worker, and writes no access log unless the log is what is measured.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};

use crate::bench::{Bench, free_port};
use crate::client::Client;
use crate::images::path;
use crate::installed::{is_root, need};
use crate::process::{Process, command};
use crate::store::Redis;

pub(crate) const AFTERIMAGE: &str = "afterimage";
/// The other build of Afterimage.
pub(crate) const AGAINST: &str = "afterimage, against";
/// Lower bound: a server that only sends prepared bytes.
pub(crate) const FLOOR: &str = "floor";
/// The HTTP library that Afterimage uses, with nothing behind it.
pub(crate) const LIBRARY: &str = "hyper alone";
pub(crate) const NGINX: &str = "nginx";
pub(crate) const VARNISH: &str = "Varnish";
pub(crate) const CACHED: &str = "Python, cached";
pub(crate) const NAIVE: &str = "Python, naive";

/// A running server.
#[derive(Debug)]
pub(crate) struct Server {
    pub(crate) process: Process,
    pub(crate) http1: SocketAddr,
    /// Address for HTTP/2 in clear text.
    pub(crate) http2: Option<SocketAddr>,
}

/// A server, or the reason why it is missing.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) name: String,
    server: Result<Server, String>,
}

impl Peer {
    pub(crate) fn new(name: &str, server: Result<Server>) -> Peer {
        let server = server.map_err(|error| format!("{error:#}"));
        if let Err(why) = &server {
            eprintln!("{name}: {why}");
        }
        Peer { name: name.to_owned(), server }
    }

    pub(crate) fn server(&mut self) -> Result<&mut Server> {
        let server = self.server.as_mut().map_err(|why| anyhow!("{why}"))?;
        server.process.alive()?;
        Ok(server)
    }
}

/// Finds a server by name.
pub(crate) fn named<'a>(peers: &'a mut [Peer], name: &str) -> Result<&'a mut Server> {
    let peer = peers.iter_mut().find(|it| it.name == name);
    peer.with_context(|| format!("there is no server {name}"))?.server()
}

/// Starts the build under test and the one to compare it with, with the same settings.
pub(crate) fn afterimages(bench: &Bench, redis: &Redis, settings: &[(&str, &str)]) -> Vec<Peer> {
    let mut peers =
        vec![Peer::new(AFTERIMAGE, afterimage(bench, &bench.afterimage, redis, settings))];
    if let Some(program) = &bench.against {
        peers.push(Peer::new(AGAINST, afterimage(bench, program, redis, settings)));
    }
    peers
}

/// Starts Afterimage on a Redis, with settings such as `("cache.images", "3")`.
pub(crate) fn afterimage(
    bench: &Bench,
    program: &Path,
    redis: &Redis,
    settings: &[(&str, &str)],
) -> Result<Server> {
    let address = free_port()?;
    let mut command = command(bench.cores.servers.as_deref(), program);
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if name.starts_with("AFTERIMAGE_") || name == "PORT" || name == "REDIS_URL" {
            command.env_remove(&*name);
        }
    }
    command.env("TOKIO_WORKER_THREADS", "1");
    // Its token is made there, and removed with the bench.
    command.env("XDG_RUNTIME_DIR", bench.file("runtime"));
    let (listen, store) = (address.to_string(), format!("redis://{}", redis.address));
    let all = [("http.listen", &*listen), ("redis.url", &*store), ("log.access", "false")];
    // A given setting replaces a default one.
    let given = |name: &str| settings.iter().any(|it| it.0 == name);
    for (name, value) in all.iter().filter(|it| !given(it.0)).chain(settings) {
        command.arg(format!("--{}", name.replace(['.', '_'], "-"))).arg(value);
    }
    let mut process = Process::start(AFTERIMAGE, command, &bench.file("afterimage"))?;
    process.until(|| {
        let ready = Client::connect(address).and_then(|mut it| it.get("/readyz", &[]));
        ready.is_ok_and(|it| String::from_utf8_lossy(&it.body).contains(r#""coherent""#))
    })?;
    Ok(Server { process, http1: address, http2: Some(address) })
}

/// Starts nginx on a folder, with or without `access.log` in it.
pub(crate) fn nginx(bench: &Bench, folder: &Path, logging: bool) -> Result<Server> {
    let (http1, http2) = (free_port()?, free_port()?);
    let filled = include_str!("nginx.conf")
        .replace("{user}", if is_root() { "user root;" } else { "" })
        .replace("{access_log}", if logging { "access.log combined" } else { "off" })
        .replace("{http1}", &http1.to_string())
        .replace("{http2}", &http2.to_string());
    let config = bench.file("nginx.conf");
    fs::write(&config, filled)?;
    let mut command = command(bench.cores.servers.as_deref(), need("nginx")?);
    command.arg("-p").arg(folder).arg("-c").arg(&config);
    let mut process = Process::start(NGINX, command, &bench.file("nginx"))?;
    process.until(|| Client::connect(http1).is_ok())?;
    Ok(Server { process, http1, http2: Some(http2) })
}

/// Starts Varnish in front of a server.
pub(crate) fn varnish(bench: &Bench, origin: &Result<SocketAddr>) -> Result<Server> {
    let origin =
        origin.as_ref().map_err(|why| anyhow!("Varnish needs nginx behind it: {why:#}"))?;
    let address = free_port()?;
    let filled = include_str!("varnish.vcl")
        .replace("{host}", &origin.ip().to_string())
        .replace("{port}", &origin.port().to_string());
    let config = bench.file("varnish.vcl");
    fs::write(&config, filled)?;
    let mut command = command(bench.cores.servers.as_deref(), need("varnishd")?);
    // Without a jail: a process that changes its user gets no signal when this bench is killed.
    command.args(["-j", "none", "-F", "-T", "none", "-s", "malloc,1g", "-a", &address.to_string()]);
    command.arg("-n").arg(bench.file("varnish-work")).arg("-f").arg(&config);
    for parameter in ["http_gzip_support=off", "feature=+http2"] {
        command.args(["-p", parameter]);
    }
    let mut process = Process::start(VARNISH, command, &bench.file("varnish"))?;
    process.until(|| Client::connect(address).is_ok())?;
    Ok(Server { process, http1: address, http2: Some(address) })
}

/// Starts a Python backend of kind `naive` or `cached`.
pub(crate) fn python(bench: &Bench, redis: &Redis, kind: &str) -> Result<Server> {
    let python = bench.python.as_ref().map_err(|why| anyhow!("{why}"))?;
    let address = free_port()?;
    let mut command = command(bench.cores.servers.as_deref(), python);
    command.args(["-m", "uvicorn", "peer:app", "--workers", "1", "--app-dir"]);
    command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/benches/serving"));
    command.args(["--host", "127.0.0.1", "--port", &address.port().to_string()]);
    command.args(["--no-access-log", "--log-level", "warning"]);
    // Fixed, since the default depends on installed packages.
    command.args(["--http", "h11", "--loop", "asyncio"]);
    command.env("PEER", kind).env("REDIS_PORT", redis.address.port().to_string());
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    let mut process = Process::start("Python", command, &bench.file("python"))?;
    process.until(|| Client::connect(address).is_ok())?;
    Ok(Server { process, http1: address, http2: None })
}

impl Server {
    /// Requests each image twice: once so that it is in the server's memory, and once more since a server may prepare
    /// something at the first hit.
    pub(crate) fn warm(
        &self,
        ids: impl Iterator<Item = String> + Clone,
        length: usize,
    ) -> Result<()> {
        let mut client = Client::connect(self.http1)?;
        for id in ids.clone().chain(ids) {
            let found = client.image(&path(&id))?.body.len();
            ensure!(found == length, "{id} has {found} bytes; expected {length}");
        }
        Ok(())
    }

    /// Fetches one of Afterimage's metrics; `None` for other servers.
    pub(crate) fn metric(&self, name: &str) -> Option<f64> {
        let page = Client::connect(self.http1).ok()?.get("/metrics", &[]).ok()?;
        let page = String::from_utf8_lossy(&page.body).into_owned();
        page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }
}
