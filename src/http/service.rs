//! One request and its answer: who may ask, what every answer says, and the line in the log.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::http::header::{
    CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, VARY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use axum::response::IntoResponse;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::body::Incoming;
use tower_http::timeout::TimeoutBody;
use tracing::Level;

use super::cached_head as said;
use super::fast_path::{PlainRequest, is_host};
use crate::app::App;
use crate::http::problem::{Cause, Problem};
use crate::http::router::{Peer, Route, Routes, router};
use crate::http::{CACHE_STATUS, FromMemory, REQUEST_ID};
use crate::image::{Metadata, RepresentationKind, digits};
use crate::metrics::{HitMetrics, Shed};
use crate::server::h1::{DateField, Hit, Progress};
use crate::server::timeouts::{ConnectionState, Mark};

/// What is said of where a hit comes from.
const HIT: HeaderValue = HeaderValue::from_static("afterimage; hit");

/// The target of the lines about requests.
const ACCESS: &str = "afterimage::access";

/// Anyone may show an image, and time its loading (Fetch §3.7; W3C Resource Timing §4.5).
const SHOWN_ANYWHERE: (HeaderName, HeaderValue) = (
    HeaderName::from_static("cross-origin-resource-policy"),
    HeaderValue::from_static("cross-origin"),
);
const TIMED_ANYWHERE: (HeaderName, HeaderValue) =
    (HeaderName::from_static("timing-allow-origin"), HeaderValue::from_static("*"));
const NO_SNIFFING: (HeaderName, HeaderValue) =
    (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));

/// What answers the requests of a listener.
#[derive(Debug)]
pub(crate) struct HttpService {
    pub(crate) app: Arc<App>,
    pub(crate) date: DateField,
    service: Router,
    routes: Routes,
    hits: HitMetrics,
}

impl HttpService {
    /// What answers with these routes of an app's.
    pub(crate) fn new(app: Arc<App>, routes: Routes) -> HttpService {
        let service = router(Arc::clone(&app), routes);
        let hits = app.metrics.of_hits(Route::Image.pattern());
        HttpService { app, date: DateField::default(), service, routes, hits }
    }

    /// The body of a request, for which nobody waits for ever.
    pub(crate) fn body(&self, incoming: Incoming) -> Body {
        if incoming.is_end_stream() {
            return Body::empty();
        }
        Body::new(TimeoutBody::new(self.app.settings.http.body_timeout, incoming))
    }

    /// What answers a plain request for an image as it is, if that is in memory and was answered before.
    fn find(&self, asked: &PlainRequest<'_>, began: Instant) -> Option<CachedHit> {
        let (id, versioned) = asked.as_it_is()?;
        if self.routes == Routes::Admin {
            return None;
        }
        let (id, metadata) = self.app.index.current(id, began)?;
        if asked.version().is_some_and(|version| !metadata.version.is_named(version)) {
            return None;
        }
        let status = match asked.if_none_match {
            None => StatusCode::OK,
            Some(tag) => match tag.strip_prefix(b"W/").unwrap_or(tag) {
                tag if tag == metadata.etag.as_bytes() => StatusCode::NOT_MODIFIED,
                [b'"', inside @ .., b'"'] if !inside.contains(&b'"') => StatusCode::OK,
                // A list, or none: for `http::conditional`.
                _ => return None,
            },
        };
        said::slot(&metadata, status, versioned)?.get()?;
        let body = match status {
            StatusCode::OK => {
                self.app.cache.get(&id, metadata.version, RepresentationKind::Original)?.body
            }
            _ => Bytes::new(),
        };
        Some(CachedHit { metadata, status, versioned, body })
    }

    /// The answer to a plain request over HTTP/1.1.
    pub(crate) fn hit(
        &self,
        peer: Peer,
        asked: &PlainRequest<'_>,
        began: Instant,
    ) -> Option<Hit<'_>> {
        let found = self.find(asked, began)?;
        let status = found.status;
        let metrics = &self.app.metrics;
        let others = metrics.requests_in_flight.inc();
        let id = RequestId::of(asked.request_id);
        let mut request = HitRequest { front: self, id, line: None };
        if usize::try_from(others).unwrap_or_default() >= self.app.settings.limits.requests.get() {
            return None;
        }
        self.hits.count(status.as_u16(), began.elapsed());
        if self.logs_access() {
            request.line = Some(Box::new(AccessRecord {
                id: request.id.value(),
                peer,
                method: Method::GET,
                path: asked.target.chars().take(LONGEST_PATH).collect(),
                version: Version::HTTP_11,
                status,
                cache: Some(HIT),
                cause: None,
                began,
            }));
        }
        Some(Hit { found, request })
    }

    /// Answers a request.
    pub(crate) async fn answer(
        &self,
        peer: Peer,
        activity: &Arc<ConnectionState>,
        request: Request<Body>,
    ) -> Response<Sent> {
        let began = Instant::now();
        let (method, version) = (request.method().clone(), request.version());
        let route = Route::of(request.uri().path());
        let given = request.headers().get(REQUEST_ID).map(HeaderValue::as_bytes);
        let id = RequestId::of(given).value();
        let counted = InFlight::new(self, activity, version, route);
        let logged = self.logs_access().then(|| path_and_query(request.uri()));

        let refused = self.refuses(&counted, &request);
        let asked = PlainRequest::over_http_2(&request).filter(|_| refused.is_none());
        let found = asked.as_ref().and_then(|asked| self.find(asked, began));
        let learns = asked.as_ref().and_then(PlainRequest::learns);
        let said = found.and_then(CachedHit::response);
        let is_said_again = said.is_some();
        let mut response = match (refused, said) {
            (Some(problem), _) if method == Method::HEAD => without_body(problem.into_response()),
            (Some(problem), _) => problem.into_response(),
            (None, Some(said)) => said,
            // A large future, which an answer from memory shouldn't have the room for.
            (None, None) => Box::pin(self.route(peer, request)).await,
        };

        let status = response.status();
        let headers = response.headers_mut();
        headers.insert(REQUEST_ID, id.clone());
        if route.is_of_images() && !is_said_again {
            for (name, value) in [SHOWN_ANYWHERE, TIMED_ANYWHERE, NO_SNIFFING] {
                headers.insert(name, value);
            }
            vary(headers);
        }
        if status == StatusCode::NOT_MODIFIED && method != Method::HEAD {
            // Over HTTP/1.1 some would wait for a body.
            headers.remove(CONTENT_LENGTH);
        }
        // The rest of a body that came too slowly, or is too large, is not read (RFC 9110 §15.5.9).
        let unread = [StatusCode::REQUEST_TIMEOUT, StatusCode::PAYLOAD_TOO_LARGE].contains(&status);
        if (self.app.is_stopping() || unread) && version <= Version::HTTP_11 {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        let name = method_name(&method);
        if is_said_again {
            self.hits.count(status.as_u16(), began.elapsed());
        } else {
            let (route, status) = (route.pattern(), status.as_u16());
            self.app.metrics.count_request(route, name, status, began.elapsed());
        }
        if let (Some(named), Some(FromMemory(metadata))) = (learns, response.extensions().get()) {
            let length = response.body().size_hint().exact();
            let length = length.filter(|_| status == StatusCode::OK);
            said::keep(metadata, status, named, || said::text(status, response.headers(), length));
        }
        let cause = response.extensions_mut().remove::<Cause>();
        // What fails by the server's fault is logged at once, even where not every request is.
        let line = (logged.is_some() || cause.is_some()).then(|| {
            let cache = response.headers().get(CACHE_STATUS).cloned();
            Box::new(AccessRecord {
                id,
                peer,
                method,
                path: logged.unwrap_or_default(),
                version,
                status,
                cache,
                cause,
                began,
            })
        });
        response.map(|body| Sent::new(body, counted, line, version))
    }

    /// Why a request isn't even routed.
    fn refuses(&self, counted: &InFlight, request: &Request<Body>) -> Option<Problem> {
        if let Err(detail) = check_host(request) {
            return Some(Problem::bad_host(detail));
        }
        let (limit, now) = match counted.among {
            Among::Operators(operators) => (OPERATORS, operators),
            Among::Everybody(requests) => (self.app.settings.limits.requests.get(), requests),
        };
        if now > limit {
            self.app.metrics.count_shed(Shed::Requests);
            let detail = format!("{limit} requests are being answered ([limits] requests)");
            return Some(Problem::busy(detail));
        }
        None
    }

    async fn route(&self, peer: Peer, mut request: Request<Body>) -> Response<Body> {
        request.extensions_mut().insert(peer);
        let answered = tower_service::Service::call(&mut self.service.clone(), request).await;
        answered.unwrap_or_else(|never| match never {})
    }

    fn logs_access(&self) -> bool {
        self.app.settings.log.access && tracing::enabled!(target: ACCESS, Level::INFO)
    }
}

/// What is logged of an address: not the user and password that an absolute one may have, and no more than one needs,
/// since lines wait in memory for who reads them.
fn path_and_query(uri: &Uri) -> String {
    let text = uri.path_and_query().map_or("*", |it| it.as_str());
    text.chars().take(LONGEST_PATH).collect()
}

const LONGEST_PATH: usize = 1024;

/// The answer to a HEAD (RFC 9110 §9.3.2), which the router makes of those that it has.
fn without_body(mut response: Response<Body>) -> Response<Body> {
    if let Some(length) = response.body().size_hint().exact() {
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    *response.body_mut() = Body::empty();
    response
}

/// What a request is called.
enum RequestId {
    /// By the client.
    Given(HeaderValue),
    /// By this server: hexadecimal digits. As a value they would have to be allocated and checked.
    Own([u8; 32]),
}

impl RequestId {
    /// The client's id for its request, if it is fit to be repeated; or one of its own.
    fn of(given: Option<&[u8]>) -> RequestId {
        let fit = |id: &&[u8]| (1..=128).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic);
        let given = given.filter(fit).and_then(|id| HeaderValue::from_bytes(id).ok());
        given.map_or_else(|| RequestId::Own(random_digits()), RequestId::Given)
    }

    fn as_bytes(&self) -> &[u8] {
        match self {
            RequestId::Given(id) => id.as_bytes(),
            RequestId::Own(digits) => digits,
        }
    }

    fn value(&self) -> HeaderValue {
        match self {
            RequestId::Given(id) => id.clone(),
            RequestId::Own(digits) => {
                HeaderValue::from_bytes(digits).expect("hex digits are ASCII")
            }
        }
    }
}

fn random_digits() -> [u8; 32] {
    let random = fastrand::u128(..).to_be_bytes();
    std::array::from_fn(|place| digits(random[place / 2])[place % 2])
}

/// An image in memory, of which it was said what is to be said again.
pub(crate) struct CachedHit {
    metadata: Arc<Metadata>,
    status: StatusCode,
    versioned: bool,
    /// Empty where there is none to be sent.
    pub(crate) body: Bytes,
}

impl CachedHit {
    /// The head, but for what differs each time.
    pub(crate) fn said(&self) -> Option<&Bytes> {
        said::slot(&self.metadata, self.status, self.versioned)?.get()
    }

    fn response(self) -> Option<Response<Body>> {
        let headers = said::fields(self.said()?)?;
        let mut response = Response::new(Body::from(self.body));
        *response.status_mut() = self.status;
        *response.headers_mut() = headers;
        Some(response)
    }
}

/// A request that is answered without the router, for as long as its answer is being sent.
pub(crate) struct HitRequest<'a> {
    front: &'a HttpService,
    id: RequestId,
    line: Option<Box<AccessRecord>>,
}

impl HitRequest<'_> {
    /// What it is called.
    pub(crate) fn id(&self) -> &[u8] {
        self.id.as_bytes()
    }

    /// So much of its answer was taken.
    pub(crate) fn end(mut self, progress: Progress) {
        self.front.app.metrics.response_bytes.inc_by(progress.bytes);
        if let Some(line) = self.line.take() {
            line.log(progress.bytes, progress.whole);
        }
    }
}

impl Drop for HitRequest<'_> {
    fn drop(&mut self) {
        self.front.app.metrics.requests_in_flight.dec();
    }
}

/// Representations may differ by encoding, and caches must know it from the first answer on, whatever its status. In
/// one line: nginx 1.22 heeds the last one only, and would give a compressed answer to who can't read it.
fn vary(headers: &mut HeaderMap) {
    const BY_ENCODING: HeaderValue = HeaderValue::from_static("Accept-Encoding");
    let by_encoding = |line: &HeaderValue| line.as_bytes().starts_with(b"Accept-Encoding");
    let lines: Vec<HeaderValue> = headers.get_all(VARY).iter().cloned().collect();
    if let [line] = &lines[..]
        && by_encoding(line)
    {
        return;
    }
    let first = if lines.iter().any(by_encoding) { None } else { Some(BY_ENCODING) };
    let all: Vec<&[u8]> = first.iter().chain(&lines).map(HeaderValue::as_bytes).collect();
    headers.insert(VARY, HeaderValue::from_bytes(&all.join(&b", "[..])).unwrap_or(BY_ENCODING));
}

/// A request says which host it is for, once and well-formed (RFC 9112 §3.2, RFC 9113 §8.3.1); otherwise another
/// server in front may have understood something else.
fn check_host(request: &Request<Body>) -> Result<(), &'static str> {
    let mut lines = request.headers().get_all(HOST).iter();
    let (host, authority) = (lines.next(), request.uri().authority());
    if lines.next().is_some() {
        return Err("there is more than one Host");
    }
    let multiplexed = request.version() >= Version::HTTP_2;
    let host = match host {
        Some(host) if is_host(host.as_bytes()) => host.as_bytes(),
        Some(_) => return Err("Host is malformed"),
        None => match authority {
            Some(it) if multiplexed && is_host(it.as_str().as_bytes()) => return Ok(()),
            Some(_) if multiplexed => return Err(":authority is malformed"),
            _ if request.version() == Version::HTTP_10 => return Ok(()),
            _ => return Err("Host is missing"),
        },
    };
    match authority {
        Some(it) if multiplexed && !it.as_str().as_bytes().eq_ignore_ascii_case(host) => {
            Err("Host and :authority differ")
        }
        _ => Ok(()),
    }
}

/// The method, from a set that no client can make grow.
fn method_name(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::PUT => "PUT",
        Method::POST => "POST",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        Method::PATCH => "PATCH",
        _ => "other",
    }
}

/// A request that is being answered, for as long as it exists.
struct InFlight {
    app: Arc<App>,
    activity: Arc<ConnectionState>,
    /// Where there is an answer that is being sent.
    sending: Option<Mark>,
    among: Among,
}

/// Which requests one is counted among, and how many there are with it.
#[derive(Debug, Clone, Copy)]
enum Among {
    /// Those of operators, who look when there are too many others.
    Operators(usize),
    /// All others.
    Everybody(usize),
}

impl InFlight {
    fn new(
        front: &HttpService,
        activity: &Arc<ConnectionState>,
        version: Version,
        route: Route,
    ) -> InFlight {
        let metrics = &front.app.metrics;
        let count = |before: i64| usize::try_from(before + 1).unwrap_or_default();
        let among = if route.is_for_operators() && front.routes != Routes::Public {
            Among::Operators(count(metrics.operators_in_flight.inc()))
        } else {
            Among::Everybody(count(metrics.requests_in_flight.inc()))
        };
        activity.begin_handling(version >= Version::HTTP_2);
        let (app, activity) = (Arc::clone(&front.app), Arc::clone(activity));
        InFlight { app, activity, sending: None, among }
    }

    fn begin_sending(&mut self) {
        self.sending = Some(self.activity.begin_sending());
    }

    /// A piece of the answer was taken.
    fn take(&self) {
        if let Some(mark) = &self.sending {
            self.activity.take(mark);
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        match self.among {
            Among::Operators(_) => self.app.metrics.operators_in_flight.dec(),
            Among::Everybody(_) => self.app.metrics.requests_in_flight.dec(),
        };
        match &self.sending {
            Some(mark) => self.activity.end_sending(mark),
            None => self.activity.end_handling(),
        }
    }
}

/// What the log says of a request.
struct AccessRecord {
    id: HeaderValue,
    peer: Peer,
    method: Method,
    path: String,
    version: Version,
    status: StatusCode,
    cache: Option<HeaderValue>,
    cause: Option<Cause>,
    began: Instant,
}

impl AccessRecord {
    fn log(&self, bytes: u64, whole: bool) {
        let text = |value: &HeaderValue| value.to_str().unwrap_or_default().to_owned();
        let duration = self.began.elapsed().as_secs_f64() * 1000.0;
        // To the microsecond.
        let duration_ms = (duration * 1000.0).round() / 1000.0;
        let (id, cache) = (text(&self.id), self.cache.as_ref().map(text).unwrap_or_default());
        let (peer, method, path) = (&self.peer, method_name(&self.method), &self.path);
        let (version, status) = (self.version, self.status.as_u16());
        if let Some(Cause(error)) = &self.cause {
            tracing::warn!(
                target: ACCESS,
                id, %peer, method, path, ?version, status, bytes, cache, duration_ms, whole, %error,
                "request failed"
            );
        } else {
            tracing::info!(
                target: ACCESS,
                id, %peer, method, path, ?version, status, bytes, cache, duration_ms, whole,
                "request"
            );
        }
    }
}

/// A body is handed over in pieces of this many bytes, each when there is room for it, so that it is seen whether the
/// client takes any, and what it didn't take is known when it leaves. Over HTTP/1 that costs a system call for each.
const PIECE: usize = 256 * 1024;

/// The same over HTTP/2, where many answers share a connection and each should get its turn within the time-out.
pub(crate) const HTTP_2_PIECE: usize = 32 * 1024;

/// How many requests of operators are answered at the same time.
const OPERATORS: usize = 64;

/// The body of an answer on its way. When it is dropped the request is over.
pub(crate) struct Sent {
    body: Body,
    /// What is left of a frame that is handed over in pieces.
    rest: Bytes,
    piece: usize,
    bytes: u64,
    finished: bool,
    counted: InFlight,
    line: Option<Box<AccessRecord>>,
}

impl Sent {
    fn new(
        body: Body,
        mut counted: InFlight,
        line: Option<Box<AccessRecord>>,
        version: Version,
    ) -> Sent {
        counted.begin_sending();
        let piece = if version >= Version::HTTP_2 { HTTP_2_PIECE } else { PIECE };
        let finished = body.is_end_stream();
        Sent { body, rest: Bytes::new(), piece, bytes: 0, finished, counted, line }
    }

    fn hand_over(&mut self, mut data: Bytes) -> Frame<Bytes> {
        self.rest = data.split_off(data.len().min(self.piece));
        self.bytes += data.len() as u64;
        self.counted.take();
        Frame::data(data)
    }
}

impl HttpBody for Sent {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        if !self.rest.is_empty() {
            let rest = std::mem::take(&mut self.rest);
            return Poll::Ready(Some(Ok(self.hand_over(rest))));
        }
        match Pin::new(&mut self.body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => Poll::Ready(Some(Ok(match frame.into_data() {
                Ok(data) => self.hand_over(data),
                Err(trailers) => trailers,
            }))),
            Poll::Ready(None) => {
                self.finished = true;
                Poll::Ready(None)
            }
            other => other,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (body, rest) = (self.body.size_hint(), self.rest.len() as u64);
        let mut hint = SizeHint::new();
        hint.set_lower(body.lower() + rest);
        if let Some(upper) = body.upper() {
            hint.set_upper(upper + rest);
        }
        hint
    }
}

impl Drop for Sent {
    fn drop(&mut self) {
        self.counted.app.metrics.response_bytes.inc_by(self.bytes);
        if let Some(line) = self.line.take() {
            line.log(self.bytes, self.finished || self.is_end_stream());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_of_the_clients_is_kept_if_it_is_fit_to_be_repeated() {
        let id = |text: &str| {
            String::from_utf8(RequestId::of(Some(text.as_bytes())).as_bytes().to_vec()).unwrap()
        };
        assert_eq!(id("a-1:B/2"), "a-1:B/2");
        for unfit in ["", "a b", "ä", &"x".repeat(129)] {
            let own = id(unfit);
            assert!(own.len() == 32 && own.bytes().all(|it| it.is_ascii_hexdigit()), "{own}");
        }
    }
}
