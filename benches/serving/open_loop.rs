//! An open-loop load generator: requests at a fixed rate, independent of the responses.
//!
//! The latency of each request counts from the time when it was due. So a stall delays all requests that fall due
//! meanwhile, as it delays independent users. The connections are polled in turn without sleeping: with a timer of a
//! millisecond, thirty requests would go out at once in place of one every thirty microseconds.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::cells::float;
use crate::client::{Head, head_end, request};

#[derive(Debug)]
pub(crate) struct Schedule {
    pub(crate) address: SocketAddr,
    pub(crate) path: String,
    pub(crate) connections: usize,
    /// Requests per second.
    pub(crate) rate: f64,
    pub(crate) duration: Duration,
    /// True if the generator has a core of its own and may spin on it.
    pub(crate) alone: bool,
}

#[derive(Debug)]
pub(crate) struct Outcome {
    /// Latencies in milliseconds, sorted.
    pub(crate) latencies: Vec<f64>,
    /// Requests that were due and not answered at the end, after twice the duration.
    pub(crate) missed: f64,
    /// Longest pause of the generator itself, in milliseconds. Longer latencies are due to the server.
    pub(crate) pause: f64,
}

struct Connection {
    stream: TcpStream,
    /// Due time of the current request.
    due: Instant,
    head: Vec<u8>,
    /// Missing bytes of the body, once the head is complete.
    missing: Option<usize>,
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a count of requests is small and positive"
)]
pub(crate) fn run(schedule: &Schedule) -> Result<Outcome> {
    ensure!(
        schedule.rate.is_finite() && schedule.rate > 0.0,
        "the rate must be positive, not {}",
        schedule.rate
    );
    let request = request(schedule.address, &schedule.path, &[]);
    let open = |_| Connection::open(schedule.address);
    let mut connections: Vec<Connection> =
        (0..schedule.connections).map(open).collect::<Result<_>>()?;
    let mut piece = vec![0; 256 << 10];
    let total = (schedule.rate * schedule.duration.as_secs_f64()) as u64;
    let begin = Instant::now() + Duration::from_millis(5);
    let end = begin + schedule.duration * 2;
    let due = |number: u64| begin + Duration::from_secs_f64(float(number) / schedule.rate);

    let mut latencies = Vec::with_capacity(total as usize);
    let mut idle: VecDeque<usize> = (0..connections.len()).collect();
    let mut active: Vec<usize> = Vec::new();
    let (mut next, mut looked, mut pause) = (0, Instant::now(), Duration::ZERO);
    loop {
        let now = Instant::now();
        pause = pause.max(now - looked);
        looked = now;
        if (next == total && active.is_empty()) || now > end {
            break;
        }
        if next < total && due(next) <= now {
            // The connection that has been idle for longest, so that all are used.
            if let Some(free) = idle.pop_front() {
                connections[free].send(&request, due(next))?;
                active.push(free);
                next += 1;
            }
        }
        let mut at = 0;
        while let Some(&busy) = active.get(at) {
            if connections[busy].receive(&mut piece)? {
                let latency = connections[busy].due.elapsed();
                latencies.push(latency.as_secs_f64() * 1000.0);
                idle.push_back(busy);
                active.swap_remove(at);
            } else {
                at += 1;
            }
        }
        if !schedule.alone {
            std::thread::yield_now();
        }
    }
    let missed = total - latencies.len() as u64;
    latencies.sort_by(f64::total_cmp);
    Ok(Outcome { latencies, missed: float(missed), pause: pause.as_secs_f64() * 1000.0 })
}

impl Connection {
    fn open(address: SocketAddr) -> Result<Connection> {
        let stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Connection { stream, due: Instant::now(), head: Vec::new(), missing: None })
    }

    fn send(&mut self, request: &[u8], due: Instant) -> Result<()> {
        self.due = due;
        self.head.clear();
        self.missing = None;
        // An empty socket buffer takes a whole request.
        Ok(self.stream.write_all(request)?)
    }

    /// Reads available bytes. Returns true once the response is complete.
    fn receive(&mut self, piece: &mut [u8]) -> Result<bool> {
        let mut length = match self.stream.read(piece) {
            Ok(0) => bail!("the server has closed a connection"),
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        if self.missing.is_none() {
            self.head.extend_from_slice(&piece[..length]);
            let Some(end) = head_end(&self.head) else { return Ok(false) };
            let Head { status, length: body } = Head::parse(&self.head[..end])?;
            ensure!(status == 200, "expected 200, got {status}");
            length = self.head.len() - end;
            self.missing = Some(body);
        }
        let missing = self.missing.unwrap_or_default();
        ensure!(length <= missing, "a response is longer than its Content-Length");
        self.missing = Some(missing - length);
        Ok(missing == length)
    }
}
