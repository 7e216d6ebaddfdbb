//! An HTTP/1.1 client with one request at a time.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

const PATIENCE: Duration = Duration::from_secs(20);

/// A persistent connection.
#[derive(Debug)]
pub(crate) struct Client {
    stream: TcpStream,
    address: SocketAddr,
    /// Bytes read beyond the last response.
    read: Vec<u8>,
}

#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Status line and header fields, without the empty line.
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> Result<Client> {
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Client { stream, address, read: Vec::new() })
    }

    pub(crate) fn get(&mut self, path: &str, headers: &[(&str, &str)]) -> Result<Answer> {
        self.stream.write_all(&request(self.address, path, headers))?;
        let mut piece = [0; 16 << 10];
        let end = loop {
            if let Some(end) = head_end(&self.read) {
                break end;
            }
            let length = self.stream.read(&mut piece)?;
            ensure!(length > 0, "the connection was closed before a response");
            self.read.extend_from_slice(&piece[..length]);
        };
        let Head { status, length } = Head::parse(&self.read[..end])?;
        let head = String::from_utf8_lossy(&self.read[..end]).trim_end().to_owned();
        let mut body = Vec::with_capacity(length);
        let there = length.min(self.read.len() - end);
        body.extend_from_slice(&self.read[end..end + there]);
        self.read.drain(..end + there);
        let missing = (length - there) as u64;
        let more = (&self.stream).take(missing).read_to_end(&mut body)?;
        ensure!(more as u64 == missing, "the connection was closed within a response");
        Ok(Answer { status, head, body })
    }

    /// Sends a GET as [`Self::get`] does, and fails unless the status is 200.
    pub(crate) fn image(&mut self, path: &str) -> Result<Answer> {
        let answer = self.get(path, &[])?;
        ensure!(answer.status == 200, "{path}: expected 200, got {}", answer.status);
        Ok(answer)
    }
}

impl Answer {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        header(&self.head, name)
    }
}

pub(crate) fn request(address: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Vec<u8> {
    let mut text = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n");
    for (name, value) in headers {
        text.extend([name, ": ", value, "\r\n"]);
    }
    text.push_str("\r\n");
    text.into_bytes()
}

/// Offset of the body, once the head is complete.
pub(crate) fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|it| it == b"\r\n\r\n").map(|at| at + 4)
}

/// Parts of a response's head that determine its end.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) status: u16,
    /// Length of the body.
    pub(crate) length: usize,
}

impl Head {
    pub(crate) fn parse(head: &[u8]) -> Result<Head> {
        let head = std::str::from_utf8(head)?;
        let status = head.split(' ').nth(1).and_then(|it| it.parse().ok());
        let status: u16 = status.with_context(|| format!("no status in {head:?}"))?;
        // The length that a 304 may show is that of the 200 (RFC 9110 §8.6).
        if status == 304 {
            return Ok(Head { status, length: 0 });
        }
        let length = header(head, "content-length").and_then(|it| it.parse().ok());
        Ok(Head { status, length: length.with_context(|| format!("no length in {head:?}"))? })
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let fields = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    fields.filter(|it| it.0.eq_ignore_ascii_case(name)).map(|it| it.1.trim()).next()
}
