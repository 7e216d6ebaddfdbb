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
//! What is said of an image in memory was said by the router before and kept with its facts (`said`). So there is
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
use axum::http::header::{CONNECTION, CONTENT_LENGTH, HeaderName};
use axum::http::{HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use bytes::Bytes;
use http_body::Body as HttpBody;
use httparse::{Header, Status};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::activity::{Activity, Timeouts};
use super::exchange::{Found, Front, HitRequest, Sent, is_host};
use super::listen::Wire;
use super::said::{self, Named};
use crate::http::router::{Peer, Route};
use crate::http::{FromMemory, REQUEST_ID};

/// The largest head that is read here. A larger one is for the HTTP library, which has the limit of the settings.
const LARGEST_HEAD: usize = 8 * 1024;

/// More fields than any browser sends.
const MOST_FIELDS: usize = 64;

/// A connection as long as its requests are plain.
pub(super) struct Plain<'a> {
    pub(super) front: &'a Front,
    pub(super) peer: Peer,
    pub(super) activity: &'a Arc<Activity>,
    pub(super) timeouts: Timeouts,
    pub(super) wire: Box<dyn Wire>,
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
    pub(super) fn new(
        front: &'a Front,
        peer: Peer,
        activity: &'a Arc<Activity>,
        timeouts: Timeouts,
        wire: Box<dyn Wire>,
    ) -> Plain<'a> {
        let (unread, head, last) = (Vec::new(), Vec::new(), Instant::now());
        Plain { front, peer, activity, timeouts, wire, unread, head, last }
    }

    /// Answers requests until one isn't plain, or the server drains: then gives the connection back, with what was read
    /// of it. Gives nothing where it has ended, or the server's time is over.
    pub(super) async fn converse(
        mut self,
        draining: impl Future<Output = ()>,
        over: impl Future<Output = ()>,
    ) -> Option<(Box<dyn Wire>, Bytes)> {
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
                    return Some((self.wire, self.unread.into()));
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
                match Pin::new(&mut self.wire).poll_read(context, &mut space) {
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
                let answer = self.front.answer(self.peer, self.activity, request);
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
        let Some(asked) = Asked::of(&request) else { return Decided::Library };
        if self.front.app.is_stopping() {
            // It says so in each answer.
            return Decided::Library;
        }
        let decided = if let Some(hit) = self.front.hit(self.peer, &asked, self.last) {
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
        self.front.date.append(&mut head, self.last);
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
        if let (Some(named), Some(FromMemory(facts)), false) =
            (learns, parts.extensions.get(), closes)
        {
            said::keep(facts, status, named, || head.clone());
        }
        if let Some(id) = parts.headers.get(REQUEST_ID) {
            said::field(&mut head, &REQUEST_ID, id.as_bytes());
        }
        self.front.date.append(&mut head, Instant::now());
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
                let wire = Pin::new(&mut self.wire);
                // Two pieces at once cost more than one does, if only a little: it is what a 304 spends over nginx's.
                let written = match (head.get(done..), done.saturating_sub(head.len())) {
                    (Some(head @ [_, ..]), _) if body.is_empty() => wire.poll_write(context, head),
                    (Some(head @ [_, ..]), _) => {
                        let slices = [IoSlice::new(head), IoSlice::new(body)];
                        wire.poll_write_vectored(context, &slices)
                    }
                    (_, of_body) => wire.poll_write(context, &body[of_body..]),
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
            let flushed = ready!(Pin::new(&mut self.wire).poll_flush(context));
            Poll::Ready(flushed.is_ok())
        })
        .await;
        Progress { bytes: done.saturating_sub(head.len()) as u64, whole }
    }
}

/// How much of an answer's body the client has taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Progress {
    pub(super) bytes: u64,
    /// Whether that is all.
    pub(super) whole: bool,
}

/// A hit, ready to be sent.
pub(super) struct Hit<'a> {
    pub(super) found: Found,
    pub(super) request: HitRequest<'a>,
}

/// What a plain request asks.
pub(super) struct Asked<'b> {
    pub(super) method: Method,
    pub(super) target: &'b str,
    path: &'b str,
    /// What follows the path: a query, or the fragment that the router leaves out.
    rest: &'b str,
    host: &'b [u8],
    /// Where there is one field of that name.
    pub(super) if_none_match: Option<&'b [u8]>,
    pub(super) request_id: Option<&'b [u8]>,
    /// Whether nothing else is said that an answer could depend on, but the codings that are accepted.
    simple: bool,
}

impl<'b> Asked<'b> {
    /// What a head asks, if it is plain.
    fn of(request: &httparse::Request<'_, 'b>) -> Option<Asked<'b>> {
        let fields = request.headers.iter().map(|it| (it.name, it.value));
        let is_http_1_1 = request.version == Some(1);
        Asked::plain(request.method?, request.path?, None, fields).filter(|_| is_http_1_1)
    }

    /// What a request over HTTP/2 asks, if it would be plain over HTTP/1.1.
    pub(super) fn over_http_2(request: &'b Request<Body>) -> Option<Asked<'b>> {
        if request.version() != Version::HTTP_2 || !request.body().is_end_stream() {
            return None;
        }
        let (uri, headers) = (request.uri(), request.headers());
        let fields = headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes()));
        let host = uri.authority()?.as_str().as_bytes();
        Asked::plain(request.method().as_str(), uri.path_and_query()?.as_str(), Some(host), fields)
    }

    fn plain(
        method: &str,
        target: &'b str,
        mut host: Option<&'b [u8]>,
        fields: impl Iterator<Item = (&'b str, &'b [u8])>,
    ) -> Option<Asked<'b>> {
        let method = match method {
            "GET" => Method::GET,
            "HEAD" => Method::HEAD,
            _ => return None,
        };
        let end = target.bytes().position(|byte| matches!(byte, b'?' | b'#'));
        let (path, rest) = target.split_at(end.unwrap_or(target.len()));
        if !Route::of(path).is_of_images() {
            return None;
        }
        let (mut if_none_match, mut request_id, mut simple) = (None, None, true);
        for (name, value) in fields {
            let is = |other: &str| name.eq_ignore_ascii_case(other);
            match name.len() {
                4 if is("host") && host.is_none() => host = Some(value),
                4 if is("host") => return None,
                10 if is("connection") && value.eq_ignore_ascii_case(b"keep-alive") => {}
                10 if is("connection") => return None,
                13 if is("if-none-match") => {
                    simple &= if_none_match.replace(value).is_none();
                }
                12 if is("x-request-id") => simple &= request_id.replace(value).is_none(),
                // What comes after the head, or instead of HTTP.
                6 if is("expect") => return None,
                7 if is("upgrade") => return None,
                14 if is("content-length") || is("http2-settings") => return None,
                17 if is("transfer-encoding") => return None,
                // What the router's answer depends on (`http::conditional`, `http::cors`).
                5 if is("range") => simple = false,
                6 if is("origin") => simple = false,
                8 if is("if-match") || is("if-range") => simple = false,
                17 if is("if-modified-since") => simple = false,
                19 if is("if-unmodified-since") => simple = false,
                _ => {}
            }
        }
        let host = host?;
        Some(Asked { method, target, path, rest, host, if_none_match, request_id, simple })
    }

    /// The id in the address of an image, and whether the address names its version, where nothing but the image as it is
    /// is asked for.
    pub(super) fn as_it_is(&self) -> Option<(&'b str, bool)> {
        // Only whole ids are found in the index: one with an escape, a slash or a format at its end isn't.
        let id = self.path.strip_prefix("/images/")?;
        let versioned = match self.version() {
            Some(version) if version.len() == 32 && !version.contains('#') => true,
            None if self.rest.is_empty() => false,
            Some(_) | None => return None,
        };
        let plain = self.simple && self.method == Method::GET && is_host(self.host);
        plain.then_some((id, versioned))
    }

    /// To whom the answer may be said again: who names the same version, or none, where nothing else is asked for.
    pub(super) fn learns(&self) -> Option<Named> {
        self.as_it_is()?;
        match self.version() {
            None => Some(None),
            Some(version) => version.as_bytes().try_into().ok().map(Some),
        }
    }

    /// The version that the address names.
    pub(super) fn version(&self) -> Option<&'b str> {
        self.rest.strip_prefix("?v=")
    }

    fn to_request(&self, fields: &[Header<'_>]) -> Option<Request<Body>> {
        let mut request = Request::new(Body::empty());
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = Uri::try_from(self.target).ok()?;
        *request.version_mut() = Version::HTTP_11;
        let headers = request.headers_mut();
        headers.reserve(fields.len());
        for Header { name, value } in fields {
            let name = HeaderName::from_bytes(name.as_bytes()).ok()?;
            headers.append(name, HeaderValue::from_bytes(value).ok()?);
        }
        Some(request)
    }
}

/// The date as a field, which is written out once a second.
#[derive(Debug, Default)]
pub(super) struct DateField(Mutex<Option<(Instant, Vec<u8>)>>);

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
