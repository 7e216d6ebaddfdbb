//! The fast loop: `GET` and `HEAD` of images over HTTP/1.1, whose heads have nothing in them that changes how the
//! connection goes on. They are read and answered here. At the first other request the HTTP library gets the connection
//! for good, with the bytes that were read of it: it knows of bodies, of HTTP/2, and of the answer to a malformed head.
//! The line of that request is mended first (`mend_request_line`), like those that are read here. Later ones reach the library as
//! they come, since only it knows where a head begins behind a body. It refuses what would be mended here.
//!
//! ```text
//!   read ─▶ fast request? ── no ──▶ the HTTP library
//!             │ yes
//!             ├─ has a cached head, and its bytes are in memory ──▶ both in one write
//!             └─ anything else ──▶ the router, like the HTTP library's requests
//! ```
//!
//! A cached head was made by the router before (`http::cached_head`). So nothing here could say anything else, and no
//! head is put together again. An idle connection has no buffers. `benches/README.md` has the figures for which this is
//! worth its lines.

use std::future::poll_fn;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use axum::body::Body;
use axum::http::header::{CONNECTION, CONTENT_LENGTH};
use axum::http::{Method, Request, Response, StatusCode};
use bytes::Bytes;
use http_body::Body as HttpBody;
use httparse::{Header, Status};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::listener::Io;
use super::timeouts::ConnectionState;
use super::{Server, Timeouts};
use crate::holders::Held;
use crate::http::cached_head::{field, head_text};
use crate::http::fast_path::FastRequest;
use crate::http::in_flight::SentBody;
use crate::http::service::Replay;
use crate::peer::{Peer, PeerKey};

/// The largest head that is read here. A larger one is for the HTTP library, which has the limit of the settings.
pub(crate) const LARGEST_HEAD: usize = 8 * 1024;

/// Largest buffer that an idle connection keeps.
const KEPT: usize = 2 * 1024;

/// More fields than any browser sends.
pub(crate) const MOST_FIELDS: usize = 64;

/// A connection as long as its requests are fast ones.
pub(super) struct FastLoop<'a> {
    server: &'a Server,
    timeouts: Timeouts,
    peer: Peer,
    /// The client of the request.
    client: PeerKey,
    connection: &'a Arc<ConnectionState>,
    io: Box<dyn Io>,
    /// Bytes that were read and aren't answered yet.
    unread: Vec<u8>,
    /// The head that is being sent.
    head: Vec<u8>,
    /// Time of the last reading or writing.
    last: Instant,
    /// Set at the first request that gets a cached head.
    has_replayed: bool,
}

/// The way in which a request is answered.
#[expect(clippy::large_enum_variant, reason = "a hit is moved once, and an allocation costs more")]
enum Decision {
    /// By the HTTP library.
    Library,
    /// By nobody: the connection ends.
    End,
    /// By a cached head.
    Replay(Replay),
    /// By the router. Boxed: a cached head shouldn't be moved with the room for it.
    Route(Box<Request<Body>>),
}

/// The way in which a connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// With the next request.
    Request,
    /// With the HTTP library.
    Library,
    /// Not at all.
    End,
}

/// The part of an answer's body that the client has taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Progress {
    bytes: u64,
    whole: bool,
}

impl<'a> FastLoop<'a> {
    pub(super) fn new(
        server: &'a Server,
        peer: Peer,
        connection: &'a Arc<ConnectionState>,
        io: Box<dyn Io>,
    ) -> FastLoop<'a> {
        let (unread, head, last) = (Vec::new(), Vec::new(), Instant::now());
        let (timeouts, client) = (server.timeouts, peer.share());
        FastLoop {
            server,
            timeouts,
            peer,
            client,
            connection,
            io,
            unread,
            head,
            last,
            has_replayed: false,
        }
    }

    /// Answers requests until one is for the HTTP library, or the server drains: then returns the connection, with the
    /// bytes that were read of it. Returns `None` where it has ended, or the server's time is over.
    pub(super) async fn run(
        mut self,
        draining: impl Future<Output = ()>,
        over: impl Future<Output = ()>,
    ) -> Option<(Box<dyn Io>, Bytes)> {
        let (mut draining, mut over) = (pin!(draining), pin!(over));
        let mut tick = pin!(tokio::time::sleep(self.timeouts.tick()));
        loop {
            let next = if self.unread.is_empty() {
                self.read(draining.as_mut(), tick.as_mut()).await
            } else {
                let next = tokio::select! {
                    biased;
                    next = self.answer(tick.as_mut()) => next,
                    () = &mut over => Next::End,
                };
                // A request that was sent ahead begins now.
                if !self.unread.is_empty() {
                    self.last = Instant::now();
                }
                next
            };
            match next {
                Next::Request => {}
                Next::Library => {
                    self.connection.restart();
                    mend_request_line(&mut self.unread);
                    return Some((self.io, self.unread.into()));
                }
                Next::End => return None,
            }
        }
    }

    /// Waits for a request. The bytes are read to the stack first, so that an idle connection has no buffer.
    async fn read(
        &mut self,
        mut draining: Pin<&mut impl Future<Output = ()>>,
        mut tick: Pin<&mut Sleep>,
    ) -> Next {
        poll_fn(|context| {
            loop {
                let mut space = [const { MaybeUninit::uninit() }; LARGEST_HEAD];
                let mut space = ReadBuf::uninit(&mut space);
                match Pin::new(&mut self.io).poll_read(context, &mut space) {
                    Poll::Ready(Ok(())) if space.filled().is_empty() => {
                        return Poll::Ready(Next::End);
                    }
                    Poll::Ready(Ok(())) => {
                        self.unread.extend_from_slice(space.filled());
                        self.last = Instant::now();
                        return Poll::Ready(Next::Request);
                    }
                    Poll::Ready(Err(_gone)) => return Poll::Ready(Next::End),
                    Poll::Pending => self.drop_large_buffers(),
                }
                if draining.as_mut().poll(context).is_ready() {
                    return Poll::Ready(Next::Library);
                }
                ready!(self.poll_tick(tick.as_mut(), context));
                if self.last.elapsed() > self.timeouts.idle() {
                    return Poll::Ready(Next::End);
                }
            }
        })
        .await
    }

    /// A connection without a request keeps no buffer that one large head or answer has needed.
    fn drop_large_buffers(&mut self) {
        for buffer in [&mut self.unread, &mut self.head] {
            if buffer.capacity() > KEPT {
                *buffer = Vec::new();
            }
        }
    }

    /// Is ready when it is time to check the time-outs, and sets the next time.
    fn poll_tick(&self, mut tick: Pin<&mut Sleep>, context: &mut Context<'_>) -> Poll<()> {
        ready!(tick.as_mut().poll(context));
        tick.reset((Instant::now() + self.timeouts.tick()).into());
        Poll::Ready(())
    }

    /// Answers the first request of the bytes that were read.
    async fn answer(&mut self, tick: Pin<&mut Sleep>) -> Next {
        match self.decide() {
            Decision::Library => Next::Library,
            Decision::End => Next::End,
            Decision::Replay(replay) => self.send_replay(replay, tick).await,
            Decision::Route(request) => {
                let head_only = request.method() == Method::HEAD;
                let answer = self.server.service.answer(self.peer, self.connection, *request);
                // Boxed: a connection that doesn't need it shouldn't have the room for it.
                let response = Box::pin(answer).await;
                self.send(response, head_only, tick).await
            }
        }
    }

    /// Takes the first request from the bytes that were read, unless it is for the HTTP library.
    fn decide(&mut self) -> Decision {
        match self.take_request() {
            Ok(decision) => decision,
            Err(httparse::Error::Version) if mend_request_line(&mut self.unread) => self.decide(),
            // It has the answers to malformed heads.
            Err(_malformed) => Decision::Library,
        }
    }

    fn take_request(&mut self) -> Result<Decision, httparse::Error> {
        // A connection is of one protocol from its first byte on (RFC 9113 §3.3).
        if self.unread.starts_with(b"PRI ") && self.connection.has_had_request() {
            return Ok(Decision::End);
        }
        let mut fields = [const { MaybeUninit::uninit() }; MOST_FIELDS];
        let Some((fast, fields, length)) = fast_request(&self.unread, &mut fields)? else {
            return Ok(Decision::Library);
        };
        if self.server.shutdown.is_stopping() {
            // It says so in each answer.
            return Ok(Decision::Library);
        }
        let decision = if let Some(replay) = self.server.service.replay(self.peer, &fast, self.last)
        {
            if !std::mem::replace(&mut self.has_replayed, true) {
                self.connection.note_request();
            }
            Decision::Replay(replay)
        } else {
            match fast.to_request(fields) {
                Some(request) => Decision::Route(Box::new(request)),
                None => return Ok(Decision::Library),
            }
        };
        self.forget(length);
        Ok(decision)
    }

    /// Drops the first bytes that were read: their request is being answered.
    fn forget(&mut self, length: usize) {
        if length == self.unread.len() {
            self.unread.clear();
        } else {
            self.unread.drain(..length);
        }
    }

    async fn send_replay(&mut self, mut replay: Replay, mut tick: Pin<&mut Sleep>) -> Next {
        let mut head = std::mem::take(&mut self.head);
        head.clear();
        replay.write_head(&mut head);
        self.server.date.append(&mut head, self.last);
        self.client = replay.in_flight.client();
        let sent = self.write(&head, &replay.body, tick.as_mut()).await;
        self.head = head;
        replay.in_flight.note_sent(sent.bytes, sent.whole);
        if sent.whole { Next::Request } else { Next::End }
    }

    /// Sends an answer of the router's.
    async fn send(
        &mut self,
        response: Response<SentBody>,
        head_only: bool,
        mut tick: Pin<&mut Sleep>,
    ) -> Next {
        let (parts, body) = response.into_parts();
        self.client = body.client();
        let mut body = pin!(body);
        let status = parts.status;
        let has_body =
            !head_only && !matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        let mut head = head_text(status, &parts.headers);
        let mut closes = parts.headers.contains_key(CONNECTION);
        if has_body && !parts.headers.contains_key(CONTENT_LENGTH) {
            if let Some(length) = body.size_hint().exact() {
                field(&mut head, &CONTENT_LENGTH, length.to_string().as_bytes());
            } else {
                // The body ends with the connection (RFC 9112 §6.3).
                closes = true;
                field(&mut head, &CONNECTION, b"close");
            }
        }
        self.server.date.append(&mut head, Instant::now());
        loop {
            let frame = poll_fn(|context| body.as_mut().poll_frame(context)).await;
            let data = match frame {
                Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
                Some(Err(_broken)) => return Next::End,
                None => Bytes::new(),
            };
            let last = data.is_empty() || body.is_end_stream();
            if !self.write(&head, &data, tick.as_mut()).await.whole {
                return Next::End;
            }
            head.clear();
            if last {
                return if closes { Next::End } else { Next::Request };
            }
        }
    }

    /// Writes a head and a body, for as long as the client goes on taking them.
    async fn write(&mut self, head: &[u8], body: &[u8], mut tick: Pin<&mut Sleep>) -> Progress {
        let (all, mut done, mut progressed) = (head.len() + body.len(), 0, true);
        // Only an answer that has to wait is held.
        let mut slow: Option<Held> = None;
        let whole = poll_fn(|context| {
            while done < all {
                let io = Pin::new(&mut self.io);
                // Two pieces at once cost more than one does, if only a little: it is what a 304 spends over nginx's.
                let written = match (head.get(done..), done.saturating_sub(head.len())) {
                    (Some(head @ [_, ..]), _) if body.is_empty() => io.poll_write(context, head),
                    (Some(head @ [_, ..]), _) => {
                        let slices = [IoSlice::new(head), IoSlice::new(body)];
                        io.poll_write_vectored(context, &slices)
                    }
                    (_, of_body) => io.poll_write(context, &body[of_body..]),
                };
                match written {
                    Poll::Ready(Ok(0) | Err(_)) => return Poll::Ready(false),
                    Poll::Ready(Ok(written)) => {
                        done += written;
                        progressed = true;
                        if let Some(slow) = &slow {
                            slow.note_taken(written as u64);
                        }
                    }
                    Poll::Pending => {
                        // Only when it has to wait: the clock costs as much as a look into the cache.
                        if std::mem::take(&mut progressed) {
                            self.last = Instant::now();
                        }
                        slow.get_or_insert_with(|| {
                            let left = (all - done) as u64;
                            self.server.holders.add(self.client, self.connection.end(), left, 0)
                        });
                        ready!(self.poll_tick(tick.as_mut(), context));
                        if self.last.elapsed() > self.timeouts.send() {
                            return Poll::Ready(false);
                        }
                    }
                }
            }
            let flushed = ready!(Pin::new(&mut self.io).poll_flush(context));
            Poll::Ready(flushed.is_ok())
        })
        .await;
        Progress { bytes: done.saturating_sub(head.len()) as u64, whole }
    }
}

/// A fast request, the fields of its head, and the length of that.
pub(crate) type FastHead<'fields, 'bytes> = (FastRequest<'bytes>, &'fields [Header<'bytes>], usize);

/// Parses the head at the front of some bytes. `None` for one that is not whole, or is for the HTTP library.
pub(crate) fn fast_request<'fields, 'bytes>(
    bytes: &'bytes [u8],
    fields: &'fields mut [MaybeUninit<Header<'bytes>>],
) -> Result<Option<FastHead<'fields, 'bytes>>, httparse::Error> {
    let mut request = httparse::Request::new(&mut []);
    let parsed = request.parse_with_uninit_headers(bytes, fields);
    let Status::Complete(length) = parsed? else { return Ok(None) };
    Ok(FastRequest::of(&request).map(|fast| (fast, &*request.headers, length)))
}

/// Mends the request line at the front of some bytes, if it is whole, of what the HTTP library refuses. Returns whether it did.
///
/// A later version of HTTP/1 becomes 1.1: its meaning is the same to a server that doesn't know that version (RFC 9110 §2.5).
/// Quotes and angle brackets in the target become escapes, as in [`FastRequest::to_request`].
pub(crate) fn mend_request_line(bytes: &mut Vec<u8>) -> bool {
    // A head may begin with empty lines, and end its lines without a carriage return.
    let begin = bytes.iter().take_while(|it| matches!(it, b'\r' | b'\n')).count();
    let line = &mut bytes[begin..];
    let Some(end) = line.iter().position(|it| *it == b'\n') else { return false };
    let line = &mut line[..end];
    let is_space = |it: &u8| *it == b' ';
    let (Some(before), Some(behind)) =
        (line.iter().position(is_space), line.iter().rposition(is_space))
    else {
        return false;
    };
    let mut is_mended = false;
    if let [b'H', b'T', b'T', b'P', b'/', b'1', b'.', minor @ b'2'..=b'9']
    | [b'H', b'T', b'T', b'P', b'/', b'1', b'.', minor @ b'2'..=b'9', b'\r'] =
        &mut line[behind + 1..]
    {
        *minor = b'1';
        is_mended = true;
    }
    let target = &line[before..behind];
    if target.iter().any(|it| matches!(it, b'"' | b'<' | b'>')) {
        let mut escaped = Vec::with_capacity(target.len() + 16);
        for byte in target {
            match byte {
                b'"' => escaped.extend_from_slice(b"%22"),
                b'<' => escaped.extend_from_slice(b"%3C"),
                b'>' => escaped.extend_from_slice(b"%3E"),
                other => escaped.push(*other),
            }
        }
        bytes.splice(begin + before..begin + behind, escaped);
        is_mended = true;
    }
    is_mended
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_line_is_mended_of_a_later_version_and_of_quotes() {
        for (given, expected) in [
            ("GET / HTTP/1.2\r\n", "GET / HTTP/1.1\r\n"),
            ("GET / HTTP/1.2\n", "GET / HTTP/1.1\n"),
            ("GET / HTTP/1.9\r\nA: HTTP/1.9\r\n", "GET / HTTP/1.1\r\nA: HTTP/1.9\r\n"),
            ("GET / HTTP/1.0\r\n", "GET / HTTP/1.0\r\n"),
            ("GET / HTTP/2.2\r\n", "GET / HTTP/2.2\r\n"),
            ("GET /HTTP/1.2\r\n", "GET /HTTP/1.2\r\n"),
            ("GET / HTTP/1.2", "GET / HTTP/1.2"),
            ("GET /a?v=\"b\" HTTP/1.1\r\nA: \"\r\n", "GET /a?v=%22b%22 HTTP/1.1\r\nA: \"\r\n"),
            ("PUT /<a> HTTP/1.3\nA: <\r\n", "PUT /%3Ca%3E HTTP/1.1\nA: <\r\n"),
            ("GET /a?v=\"b\" HTTP/1.1", "GET /a?v=\"b\" HTTP/1.1"),
            ("\r\n\nGET /\"a\" HTTP/1.2\r\n", "\r\n\nGET /%22a%22 HTTP/1.1\r\n"),
            ("\"\r\n", "\"\r\n"),
            ("\r\n", "\r\n"),
        ] {
            let mut bytes = given.as_bytes().to_vec();
            assert_eq!(mend_request_line(&mut bytes), given != expected);
            assert_eq!(str::from_utf8(&bytes).unwrap(), expected);
        }
    }
}
