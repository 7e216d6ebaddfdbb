//! The floor of every server here: an epoll loop with one read and one write per request, and prepared responses. It
//! looks only at the path and for `If-None-Match` in the first bytes.
//!
//! For HTTP/2 the comparison is the HTTP library with as little behind it. It writes each frame by itself, so it is no
//! floor for larger images.
//!
//! Both run in a process of their own, this program again, so that their processor time is counted as the others' is.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context, Result};
use axum::http::header::IF_NONE_MATCH;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token};

use crate::bench::{Bench, free_port};
use crate::client::Client;
use crate::process::{Process, command};
use crate::servers::{FLOOR, LIBRARY, Server};

/// First argument of the serving process.
pub(crate) const ARGUMENT: &str = "floor";

const LISTENER: Token = Token(usize::MAX);

/// Serves the images of a folder over HTTP/1.1.
pub(crate) fn start(bench: &Bench, folder: &Path) -> Result<Server> {
    let (process, http1) = process(bench, FLOOR, "epoll", folder)?;
    Ok(Server { process, http1, http2: None })
}

/// Serves the images of a folder over HTTP/2, with the library that Afterimage uses.
pub(crate) fn start_library(bench: &Bench, folder: &Path) -> Result<Server> {
    let (process, address) = process(bench, LIBRARY, "library", folder)?;
    Ok(Server { process, http1: address, http2: Some(address) })
}

fn process(bench: &Bench, name: &str, kind: &str, folder: &Path) -> Result<(Process, SocketAddr)> {
    let address = free_port()?;
    let mut command = command(bench.cores.servers.as_deref(), std::env::current_exe()?);
    command.arg(ARGUMENT).arg(kind).arg(address.to_string()).arg(folder.join("images"));
    let mut process = Process::start(name, command, &bench.file("floor"))?;
    process.until(|| Client::connect(address).is_ok())?;
    Ok((process, address))
}

/// Main function of the serving process. Its arguments are the kind, an address, and a folder of images.
pub(crate) fn serve(arguments: &[String]) -> Result<Infallible> {
    let [kind, address, folder] = arguments else {
        anyhow::bail!("expected a kind, an address and a folder")
    };
    let mut images = HashMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let id = entry.file_name().into_string().ok().context("an id must be UTF-8")?;
        images.insert(id, fs::read(entry.path())?);
    }
    let address = address.parse()?;
    if kind == "library" { library(address, images) } else { Floor::new(images).run(address) }
}

/// Header fields that an image server has to send, at least.
const FIELDS: [(&str, &str); 5] = [
    ("content-type", "image/png"),
    ("cache-control", "public, max-age=3600, immutable"),
    ("etag", "\"0123456789abcdef0123456789abcdef\""),
    ("vary", "Accept-Encoding"),
    ("date", "Thu, 26 Nov 2026 12:00:00 GMT"),
];

type Answer = Rc<[u8]>;

struct Floor {
    answers: HashMap<Vec<u8>, Answer>,
    not_modified: Answer,
    /// Connections by token. Tokens are never reused, since a bench has only some thousand connections.
    connections: Vec<Option<Connection>>,
}

struct Connection {
    stream: TcpStream,
    /// Response in progress, and the number of its bytes that are written.
    answer: Option<(Answer, usize)>,
}

impl Floor {
    fn new(images: HashMap<String, Vec<u8>>) -> Floor {
        let fields = FIELDS.map(|(name, value)| format!("{name}: {value}\r\n")).concat();
        let answer = |(id, body): (String, Vec<u8>)| {
            let length = body.len();
            let head = format!("HTTP/1.1 200 OK\r\n{fields}content-length: {length}\r\n\r\n");
            (id.into_bytes(), Rc::from([head.into_bytes(), body].concat()))
        };
        let not_modified = format!("HTTP/1.1 304 Not Modified\r\n{fields}\r\n").into_bytes();
        let answers = images.into_iter().map(answer).collect();
        Floor { answers, not_modified: Rc::from(not_modified), connections: Vec::new() }
    }

    fn run(mut self, address: SocketAddr) -> Result<Infallible> {
        let mut poll = Poll::new()?;
        let mut events = Events::with_capacity(512);
        let mut listener = TcpListener::bind(address)?;
        poll.registry().register(&mut listener, LISTENER, Interest::READABLE)?;
        loop {
            poll.poll(&mut events, None)?;
            for event in &events {
                match event.token() {
                    LISTENER => self.accept(&listener, &poll)?,
                    Token(index) => {
                        if !self.go_on(index) {
                            self.connections[index] = None;
                        }
                    }
                }
            }
        }
    }

    fn accept(&mut self, listener: &TcpListener, poll: &Poll) -> Result<()> {
        loop {
            let mut stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            stream.set_nodelay(true)?;
            let token = Token(self.connections.len());
            poll.registry().register(
                &mut stream,
                token,
                Interest::READABLE | Interest::WRITABLE,
            )?;
            self.connections.push(Some(Connection { stream, answer: None }));
        }
    }

    /// Reads a request or continues a response. Returns false once the connection has ended.
    fn go_on(&mut self, index: usize) -> bool {
        let Some(connection) = &mut self.connections[index] else { return true };
        if connection.answer.is_none() {
            let mut head = [0; 4096];
            let length = match connection.stream.read(&mut head) {
                Ok(0) => return false,
                Ok(length) => length,
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            };
            let head = &head[..length];
            let id = head.strip_prefix(b"GET /images/").unwrap_or_default();
            let id = id.split(|&byte| byte == b' ').next().unwrap_or_default();
            let has_tag = head.windows(15).any(|it| it == b"\r\nIf-None-Match");
            let answer = if has_tag { Some(&self.not_modified) } else { self.answers.get(id) };
            let Some(answer) = answer else { return false };
            connection.answer = Some((Rc::clone(answer), 0));
        }
        connection.write()
    }
}

impl Connection {
    fn write(&mut self) -> bool {
        while let Some((answer, written)) = &mut self.answer {
            match self.stream.write(&answer[*written..]) {
                Ok(more) => *written += more,
                Err(error) => return error.kind() == ErrorKind::WouldBlock,
            }
            if *written == answer.len() {
                self.answer = None;
            }
        }
        true
    }
}

/// Serves with the HTTP library and nothing behind it, on one thread.
fn library(address: SocketAddr, images: HashMap<String, Vec<u8>>) -> Result<Infallible> {
    let fields: HeaderMap = FIELDS
        .iter()
        .map(|(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value)))
        .collect();
    let images: HashMap<String, Bytes> =
        images.into_iter().map(|(id, body)| (id, Bytes::from(body))).collect();
    let shared: &'static _ = Box::leak(Box::new((fields, images)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::bind(address).await?;
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            let answer = service_fn(async |request: Request<Incoming>| {
                let (fields, images) = shared;
                let id = request.uri().path().trim_start_matches("/images/");
                let has_tag = request.headers().contains_key(IF_NONE_MATCH);
                let body = if has_tag { None } else { images.get(id).cloned() };
                let mut response = Response::new(Full::new(body.unwrap_or_default()));
                *response.headers_mut() = fields.clone();
                if has_tag {
                    *response.status_mut() = StatusCode::NOT_MODIFIED;
                }
                Ok::<_, Infallible>(response)
            });
            tokio::spawn(async move {
                let builder = auto::Builder::new(TokioExecutor::new());
                // A client may leave at any time.
                let _ = builder.serve_connection(TokioIo::new(stream), answer).await;
            });
        }
    })
}
