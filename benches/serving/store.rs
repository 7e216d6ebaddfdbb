//! A redis-server of the bench's own, and a plain connection to it.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Result, bail};

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
        // Nothing goes to the disk.
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
            error if error.starts_with('-') => bail!("Redis says {error}"),
            line => Ok(line.to_owned()),
        }
    }
}

fn key(id: &str) -> String {
    format!("image:{id}")
}
