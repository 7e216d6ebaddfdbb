//! Plain requests: `GET` and `HEAD` of images over HTTP/1.1, with nothing in their heads that changes how the connection
//! goes on. They are read and answered here. At the first other one the HTTP library gets the connection, with what was
//! read of it, for good: it knows of bodies, of HTTP/2, and of what to say to a malformed head.
//!
//! ```text
//!   read ─▶ plain? ── no ──▶ the HTTP library
//!             │ yes
//!             ├─ in memory, and asked for as it is ──▶ what was said of it before, and its bytes: one write
//!             └─ anything else ──▶ the router, like the HTTP library's requests
//! ```
//!
//! What is said of an image in memory was said by the router before and kept with its metadata (`said`). So there is
//! nothing here that could say something else, and a head is neither put together nor written out again. An idle
//! connection has no buffers. `benches/README.md` has the figures for which this is worth its lines.

use std::future::poll_fn;
use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::http::header::{CONNECTION, CONTENT_LENGTH};
use axum::http::{Method, Request, Response, StatusCode};
use bytes::Bytes;
use http_body::Body as HttpBody;
use httparse::Status;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::listener::Io;
use super::timeouts::{ConnectionState, Timeouts};
use crate::http::cached_head as said;
use crate::http::cached_head::Named;
use crate::http::fast_path::PlainRequest;
use crate::http::router::Peer;
use crate::http::service::{CachedHit, HitRequest, HttpService, Sent};
use crate::http::{FromMemory, REQUEST_ID};

/// The largest head that is read here. A larger one is for the HTTP library, which has the limit of the settings.
const LARGEST_HEAD: usize = 8 * 1024;

/// More fields than any browser sends.
const MOST_FIELDS: usize = 64;

/// A connection as long as its requests are plain.
pub(crate) struct Plain<'a> {
    pub(crate) service: &'a HttpService,
    pub(crate) peer: Peer,
    pub(crate) activity: &'a Arc<ConnectionState>,
    pub(crate) timeouts: Timeouts,
    pub(crate) io: Box<dyn Io>,
    /// What was read and isn't answered yet.
    unread: Vec<u8>,
    /// The head that is being sent.
    head: Vec<u8>,
    /// When something was last read or written.
    last: Instant,
}

/// What is to be done with a request.
enum Decided<'a> {
    /// It isn't plain.
    Library,
    /// It is answered from memory.
    Hit(Hit<'a>),
    /// The router answers it.
    Route {
        request: Request<Body>,
        /// To whom what is said may be said again.
        learns: Option<Named>,
    },
}

/// How a connection goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// With the next plain request.
    Plain,
    /// With the HTTP library.
    Library,
    /// Not at all.
    End,
}

impl<'a> Plain<'a> {
    pub(crate) fn new(
        service: &'a HttpService,
        peer: Peer,
        activity: &'a Arc<ConnectionState>,
        timeouts: Timeouts,
        io: Box<dyn Io>,
    ) -> Plain<'a> {
        let (unread, head, last) = (Vec::new(), Vec::new(), Instant::now());
        Plain { service, peer, activity, timeouts, io, unread, head, last }
    }

    /// Answers requests until one isn't plain, or the server drains: then gives the connection back, with what was read
    /// of it. Gives nothing where it has ended, or the server's time is over.
    pub(crate) async fn converse(
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
                Next::Plain => {}
                Next::Library => {
                    self.activity.go_on();
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
                        return Poll::Ready(Next::Plain);
                    }
                    Poll::Ready(Err(_gone)) => return Poll::Ready(Next::End),
                    Poll::Pending => {}
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

    /// Ready when it is time to look at how late it is; the next time comes later.
    fn poll_tick(&self, mut tick: Pin<&mut Sleep>, context: &mut Context<'_>) -> Poll<()> {
        ready!(tick.as_mut().poll(context));
        tick.reset((Instant::now() + self.timeouts.tick()).into());
        Poll::Ready(())
    }

    /// Answers what was read, if it is a plain request.
    async fn answer(&mut self, tick: Pin<&mut Sleep>) -> Next {
        match self.decide() {
            Decided::Library => Next::Library,
            Decided::Hit(hit) => self.send_hit(hit, tick).await,
            Decided::Route { request, learns } => {
                let head_only = request.method() == Method::HEAD;
                let answer = self.service.answer(self.peer, self.activity, request);
                // A connection that it isn't needed for shouldn't have the room for it: 0.5 KB.
                let response = Box::pin(answer).await;
                self.send(response, head_only, learns, tick).await
            }
        }
    }

    /// Takes a request from what was read, if it is plain.
    fn decide(&mut self) -> Decided<'a> {
        let mut fields = [const { MaybeUninit::uninit() }; MOST_FIELDS];
        let mut request = httparse::Request::new(&mut []);
        let parsed = request.parse_with_uninit_headers(&self.unread, &mut fields);
        let Ok(Status::Complete(length)) = parsed else { return Decided::Library };
        let Some(asked) = PlainRequest::of(&request) else { return Decided::Library };
        if self.service.app.is_stopping() {
            // It says so in each answer.
            return Decided::Library;
        }
        let decided = if let Some(hit) = self.service.hit(self.peer, &asked, self.last) {
            self.activity.note_request();
            Decided::Hit(hit)
        } else {
            let learns = asked.learns();
            match asked.to_request(request.headers) {
                Some(request) => Decided::Route { request, learns },
                None => return Decided::Library,
            }
        };
        self.forget(length);
        decided
    }

    /// What was read up to here is answered.
    fn forget(&mut self, length: usize) {
        if length == self.unread.len() {
            self.unread.clear();
        } else {
            self.unread.drain(..length);
        }
    }

    async fn send_hit(&mut self, hit: Hit<'_>, mut tick: Pin<&mut Sleep>) -> Next {
        let mut head = std::mem::take(&mut self.head);
        head.clear();
        head.extend_from_slice(hit.found.said().map_or(&[], Bytes::as_ref));
        said::field(&mut head, &REQUEST_ID, hit.request.id());
        self.service.date.append(&mut head, self.last);
        let sent = self.write(&head, &hit.found.body, tick.as_mut()).await;
        self.head = head;
        hit.request.end(sent);
        if sent.whole { Next::Plain } else { Next::End }
    }

    /// Sends an answer of the router's, and learns from it what to say the next time.
    async fn send(
        &mut self,
        response: Response<Sent>,
        head_only: bool,
        learns: Option<Named>,
        mut tick: Pin<&mut Sleep>,
    ) -> Next {
        let (parts, body) = response.into_parts();
        let mut body = pin!(body);
        let status = parts.status;
        let has_body =
            !head_only && !matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        let length = body.size_hint().exact().filter(|_| has_body);
        let mut head = said::text(status, &parts.headers, length);
        let mut closes = parts.headers.contains_key(CONNECTION);
        if has_body && length.is_none() && !parts.headers.contains_key(CONTENT_LENGTH) {
            // It ends with the connection (RFC 9112 §6.3).
            closes = true;
            said::field(&mut head, &CONNECTION, b"close");
        }
        if let (Some(named), Some(FromMemory(metadata)), false) =
            (learns, parts.extensions.get(), closes)
        {
            said::keep(metadata, status, named, || head.clone());
        }
        if let Some(id) = parts.headers.get(REQUEST_ID) {
            said::field(&mut head, &REQUEST_ID, id.as_bytes());
        }
        self.service.date.append(&mut head, Instant::now());
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
                return if closes { Next::End } else { Next::Plain };
            }
        }
    }

    /// Writes a head and a body, as long as the client takes some of it.
    async fn write(&mut self, head: &[u8], body: &[u8], mut tick: Pin<&mut Sleep>) -> Progress {
        let (all, mut done, mut progressed) = (head.len() + body.len(), 0, true);
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
                    }
                    Poll::Pending => {
                        // Only where there is something to wait for: the clock costs as much as a look at the cache.
                        if std::mem::take(&mut progressed) {
                            self.last = Instant::now();
                        }
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

/// How much of an answer's body the client has taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Progress {
    pub(crate) bytes: u64,
    /// Whether that is all.
    pub(crate) whole: bool,
}

/// A hit, ready to be sent.
pub(crate) struct Hit<'a> {
    pub(crate) found: CachedHit,
    pub(crate) request: HitRequest<'a>,
}

/// The date as a field, which is written out once a second.
#[derive(Debug, Default)]
pub(crate) struct DateField(Mutex<Option<(Instant, Vec<u8>)>>);

impl DateField {
    /// Ends a head that is sent now: with the date, and the empty line.
    fn append(&self, head: &mut Vec<u8>, now: Instant) {
        let mut field = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, text) = match &mut *field {
            Some(written) if now < written.0 => written,
            outdated => {
                let today = SystemTime::now();
                let since = today.duration_since(UNIX_EPOCH).unwrap_or_default();
                let left = 1_000_000_000 - since.subsec_nanos();
                let next = Instant::now() + Duration::from_nanos(left.into());
                let text = format!("date: {}\r\n\r\n", httpdate::fmt_http_date(today));
                outdated.insert((next, text.into_bytes()))
            }
        };
        head.extend_from_slice(text);
    }
}
