//! Load generators (wrk for HTTP/1.1, h2load for HTTP/2), and a server's processor time while they run.
//!
//! Both are closed loops: a connection sends its next request after the response. A stall of a second delays one request
//! per connection, and the percentiles show no more of it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::bench::Bench;
use crate::cells::{Figures, float, percentile};
use crate::installed::need;
use crate::process::{command, run};
use crate::servers::Server;
use crate::store::Redis;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

impl Protocol {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Protocol::Http1 => "HTTP/1.1",
            Protocol::Http2 => "HTTP/2",
        }
    }
}

/// Requested addresses.
#[derive(Debug)]
pub(crate) enum Addresses {
    One {
        path: String,
        if_none_match: Option<String>,
    },
    /// `/images/i0` and so on, in random order with `zipf` or `uniform` distribution.
    Many {
        chance: &'static str,
        count: usize,
        seed: usize,
    },
}

#[derive(Debug)]
pub(crate) struct Load {
    pub(crate) protocol: Protocol,
    pub(crate) connections: usize,
    pub(crate) addresses: Addresses,
    /// Expected length of each body; `None` for a 304.
    pub(crate) body: Option<usize>,
}

#[derive(Debug)]
struct Done {
    requests: u64,
    seconds: f64,
    /// Percentiles in milliseconds.
    p50: f64,
    p99: f64,
}

/// Loads a server, and measures throughput, latency and processor time.
pub(crate) fn measure(
    bench: &Bench,
    server: &mut Server,
    redis: &Redis,
    load: &Load,
) -> Result<Figures> {
    let before = (server.process.cpu(), redis.process.cpu());
    let done = match load.protocol {
        Protocol::Http1 => load.wrk(bench, server)?,
        Protocol::Http2 => load.h2load(bench, server)?,
    };
    let spent = server.process.cpu().since(&before.0).as_secs_f64();
    let spent_in_store = redis.process.cpu().since(&before.1).as_secs_f64();
    server.process.alive()?;
    let requests = float(done.requests);
    Ok(Figures::from([
        ("requests", requests),
        ("requests_per_second", requests / done.seconds),
        ("cpu_us", spent * 1e6 / requests),
        ("store_cpu_us", spent_in_store * 1e6 / requests),
        ("busy", spent / done.seconds),
        ("p50_ms", done.p50),
        ("p99_ms", done.p99),
    ]))
}

impl Load {
    fn limit(bench: &Bench) -> Duration {
        Duration::from_secs(u64::from(bench.options.seconds()) + 20)
    }

    fn wrk(&self, bench: &Bench, server: &Server) -> Result<Done> {
        let mut command = command(bench.cores.load.as_deref(), need("wrk")?);
        // One thread saturates one worker, and several would send requests in lockstep.
        command.args(["-t1", "--timeout", "10s"]);
        command.arg(format!("-c{}", self.connections));
        command.arg(format!("-d{}s", bench.options.seconds()));
        let script = |name: &str| bench.dir.path().join(name);
        match &self.addresses {
            Addresses::One { path, if_none_match } => {
                if let Some(tag) = if_none_match {
                    command.arg("-H").arg(format!("If-None-Match: {tag}"));
                }
                command.arg("-s").arg(script("one.lua"));
                command.arg(format!("http://{}{path}", server.http1));
            }
            Addresses::Many { chance, count, seed } => {
                command.arg("-s").arg(script("many.lua"));
                command.arg(format!("http://{}/", server.http1)).args(["--", chance]);
                command.args([count.to_string(), seed.to_string()]);
            }
        }
        let output = run("wrk", command, Self::limit(bench))?;
        let line = output.lines().find(|line| line.starts_with('{'));
        let line = line.with_context(|| format!("wrk printed no figures: {output}"))?;
        let figures: Value = serde_json::from_str(line)?;
        let figure =
            |name: &str| figures[name].as_u64().with_context(|| format!("{line}: no {name}"));
        let requests = figure("requests")?;
        ensure!(requests > 0, "no request was answered");
        let (refused, broken) = (figure("status")?, figure("socket")?);
        ensure!(
            refused + broken == 0,
            "{refused} responses were errors, {broken} connections broke"
        );
        // wrk accepts any response. A 304 in place of a 200 would be very quick.
        let mean = figure("bytes")? / requests;
        match self.body {
            Some(body) => ensure!(mean >= body as u64, "responses of {mean} bytes are no images"),
            None => ensure!(mean < 1500, "responses of {mean} bytes are no 304s"),
        }
        Ok(Done {
            requests,
            seconds: float(figure("microseconds")?) / 1e6,
            p50: float(figure("p50")?) / 1e3,
            p99: float(figure("p99")?) / 1e3,
        })
    }

    fn h2load(&self, bench: &Bench, server: &Server) -> Result<Done> {
        let Addresses::One { path, if_none_match } = &self.addresses else {
            anyhow::bail!("h2load takes one address only");
        };
        let address = server.http2.context("the server has no HTTP/2")?;
        let log = bench.dir.path().join("h2load");
        let _ = fs::remove_file(&log);
        let mut command = command(bench.cores.load.as_deref(), need("h2load")?);
        // One stream per connection, so that as many requests are in flight as over HTTP/1.1.
        command.args(["-t1", "-m1"]);
        command.arg(format!("-c{}", self.connections));
        command.arg(format!("-D{}", bench.options.seconds()));
        command.arg(format!("--log-file={}", log.display()));
        if let Some(tag) = if_none_match {
            command.arg("-H").arg(format!("if-none-match: {tag}"));
        }
        command.arg(format!("http://{address}{path}"));
        let output = run("h2load", command, Self::limit(bench))?;
        let (requests, mut times) = times(&log, if self.body.is_some() { "200" } else { "304" })?;
        ensure!(requests > 0, "no request was answered: {output}");
        ensure!(output.contains(" 0 failed, 0 errored, 0 timeout"), "h2load met errors: {output}");
        times.sort_by(f64::total_cmp);
        Ok(Done {
            requests,
            seconds: f64::from(bench.options.seconds()),
            p50: percentile(&times, 0.5),
            p99: percentile(&times, 0.99),
        })
    }
}

/// Reads the number of requests and their times in milliseconds from h2load's log. It prints no percentiles itself.
fn times(log: &Path, status: &str) -> Result<(u64, Vec<f64>)> {
    let text = fs::read_to_string(log).context("h2load wrote no log")?;
    let mut times = Vec::new();
    for line in text.lines() {
        let mut columns = line.split('\t').skip(1);
        let (Some(found), Some(time)) = (columns.next(), columns.next()) else { continue };
        ensure!(found == status, "expected {status}, got {found}");
        times.push(time.parse::<f64>()? / 1e3);
    }
    Ok((times.len() as u64, times))
}
