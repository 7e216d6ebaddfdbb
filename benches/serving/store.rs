//! The bench's redis-server, and a plain connection to it.
//!
//! The connection is written by hand, since its GET is the reference for cold images: the overhead of a library would
//! flatter Afterimage.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::bench::{Bench, free_port};
use crate::installed::need;
use crate::process::{Process, command};

#[derive(Debug)]
pub(crate) struct Redis {
    pub(crate) process: Process,
    pub(crate) address: SocketAddr,
}

impl Redis {
    pub(crate) fn start(bench: &Bench, cores: Option<&str>) -> Result<Redis> {
        let address = free_port()?;
        let mut command = command(cores, need("redis-server")?);
        command.args(["--bind", "127.0.0.1", "--port", &address.port().to_string()]);
        // No persistence.
        command.args(["--save", "", "--appendonly", "no", "--dir"]).arg(bench.dir.path());
        let process = Process::start("redis-server", command, &bench.file("redis"))?;
        let mut redis = Redis { process, address };
        redis.process.until(|| Connection::open(address).is_ok_and(|mut it| it.ping().is_ok()))?;
        Ok(redis)
    }

    pub(crate) fn connect(&self) -> Result<Connection> {
        Connection::open(self.address)
    }
}

#[derive(Debug)]
pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    fn open(address: SocketAddr) -> Result<Connection> {
        const PATIENCE: Duration = Duration::from_secs(20);
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Connection { stream: BufReader::with_capacity(64 << 10, stream) })
    }

    fn ping(&mut self) -> Result<()> {
        self.send(&[b"PING"])?;
        self.line().map(drop)
    }

    pub(crate) fn set(&mut self, id: &str, value: &[u8]) -> Result<()> {
        self.send(&[b"SET", key(id).as_bytes(), value])?;
        self.line().map(drop)
    }

    /// Stores many images, pipelined.
    pub(crate) fn set_all(&mut self, images: &[(String, Vec<u8>)]) -> Result<()> {
        for some in images.chunks(64) {
            for (id, value) in some {
                self.send(&[b"SET", key(id).as_bytes(), value])?;
            }
            for _ in some {
                self.line()?;
            }
        }
        Ok(())
    }

    pub(crate) fn get(&mut self, id: &str) -> Result<Vec<u8>> {
        self.send(&[b"GET", key(id).as_bytes()])?;
        let line = self.line()?;
        let length: u64 = line.strip_prefix('$').and_then(|it| it.parse().ok()).context(line)?;
        let mut value = Vec::with_capacity(usize::try_from(length)?);
        self.stream.by_ref().take(length).read_to_end(&mut value)?;
        ensure!(value.len() as u64 == length, "Redis has closed the connection");
        self.line()?;
        Ok(value)
    }

    pub(crate) fn remove(&mut self, ids: &[String]) -> Result<()> {
        let keys: Vec<String> = ids.iter().map(|id| key(id)).collect();
        let mut words: Vec<&[u8]> = vec![b"UNLINK"];
        words.extend(keys.iter().map(String::as_bytes));
        self.send(&words)?;
        self.line().map(drop)
    }

    fn send(&mut self, words: &[&[u8]]) -> Result<()> {
        let mut bytes =
            Vec::with_capacity(64 + words.iter().map(|it| it.len() + 16).sum::<usize>());
        write!(bytes, "*{}\r\n", words.len())?;
        for word in words {
            write!(bytes, "${}\r\n", word.len())?;
            bytes.extend_from_slice(word);
            bytes.extend_from_slice(b"\r\n");
        }
        Ok(self.stream.get_mut().write_all(&bytes)?)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stream.read_line(&mut line)?;
        match line.trim_end() {
            "" if line.is_empty() => bail!("Redis has closed the connection"),
            error if error.starts_with('-') => bail!("Redis answered {error}"),
            line => Ok(line.to_owned()),
        }
    }
}

fn key(id: &str) -> String {
    format!("image:{id}")
}
