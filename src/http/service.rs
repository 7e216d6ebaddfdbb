//! One request: admit, then a cached head or the router, then finish. The same for HTTP/1.1, HTTP/2 and the fast loop.

use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::Body;
use axum::http::header::{EXPECT, HeaderName, REFERER, USER_AGENT};
use axum::http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, Version};
use axum::response::IntoResponse;
use bytes::Bytes;
use http_body::Body as HttpBody;
use hyper::body::Incoming;
use tower_http::timeout::TimeoutBody;
use tracing::Level;

use super::cached_head::{CachedHead, CachedHeads, HeadOrder, HeadStatus, field};
use super::combined_log::CombinedFields;
use super::common_headers::{self, Exchange};
use super::fast_path::{FastRequest, ImageAddress, OwnedAddress};
use super::host::{self, check_host};
use super::in_flight::{ACCESS, AccessRecord, InFlight, RequestLimits, SentBody, method_name};
use super::problem::{self, Cause, Problem};
use super::request_id::{REQUEST_ID, RequestId};
use super::router::{self, Route, Routes};
use super::state::HttpState;
use super::unread::UnreadBody;
use super::{CACHE_STATUS, FromMemory, forwarded};
use crate::app::App;
use crate::image::Metadata;
use crate::limit::Place;
use crate::metrics::HitMetrics;
use crate::peer::{Client, Peer, PeerKey};
use crate::server::timeouts::ConnectionState;
use crate::settings::LogFormat;
use crate::spans::{Begun, RequestSpan};
use crate::trace::{self, TRACEPARENT, TRACESTATE, Trace, TraceContext};

/// The longest address in the log, in characters: lines wait in memory for their reader.
const LONGEST_PATH: usize = 1024;

/// Answers the requests of a listener.
#[derive(Debug)]
pub(crate) struct HttpService {
    app: Arc<App>,
    router: Router,
    routes: Routes,
    limits: RequestLimits,
    heads: HeadOrder,
    /// The counters of images, and of thumbnails.
    hits: [HitMetrics; 2],
}

/// A hit that a cached head answers.
struct CachedHit {
    head: Arc<CachedHead>,
    route: Route,
    body: Bytes,
}

/// A request that has begun.
struct Started {
    began: Instant,
    peer: Peer,
    client: Client,
    method: Method,
    version: Version,
    route: Route,
    id: HeaderValue,
    /// Its address, if every request is logged.
    path: Option<String>,
    combined: Option<CombinedFields>,
    trace: Option<Trace>,
    span: Option<RequestSpan>,
    unread: Option<UnreadBody>,
    is_stopping: bool,
    in_flight: InFlight,
}

impl Started {
    fn exchange(&self) -> Exchange<'_> {
        let Started { route, version, is_stopping, .. } = *self;
        Exchange { route, method: &self.method, version, is_stopping }
    }
}

/// A hit that the fast loop sends.
pub(crate) struct Replay {
    head: Arc<CachedHead>,
    id: RequestId,
    pub(crate) body: Bytes,
    pub(crate) in_flight: InFlight,
}

impl Replay {
    /// Writes the head without `Date` and the empty line.
    pub(crate) fn write_head(&self, text: &mut Vec<u8>) {
        text.extend_from_slice(self.head.http_1());
        field(text, &REQUEST_ID, self.id.as_bytes());
    }
}

impl HttpService {
    pub(crate) fn new(
        state: &Arc<HttpState>,
        routes: Routes,
        limits: RequestLimits,
    ) -> HttpService {
        let app = Arc::clone(&state.app);
        let table = router::router(state, routes);
        let hits = [Route::Image, Route::Thumbnail].map(|it| app.metrics.of_hits(it.pattern()));
        let heads = HeadOrder::new(app.settings.cache.bytes);
        HttpService { app, router: table, routes, limits, heads, hits }
    }

    /// Gives the body of a request a time-out.
    pub(crate) fn body(&self, incoming: Incoming) -> Body {
        if incoming.is_end_stream() {
            return Body::empty();
        }
        Body::new(TimeoutBody::new(self.app.settings.http.body_timeout, incoming))
    }

    /// Answers a request of the fast loop's, if it has a cached head and, where that needs them, its bytes are in
    /// memory.
    pub(crate) fn replay(
        &self,
        peer: Peer,
        request: &FastRequest<'_>,
        began: Instant,
    ) -> Option<Replay> {
        if !request.has_answered_host(&self.app.settings.http.hosts) {
            return None;
        }
        let client = request.client(peer, &self.app.settings.http.trusted_proxies)?;
        let CachedHit { head, route, body } = self.find(request)?;
        let mut in_flight = self.limits.begin(route, client.share(), None);
        let id = RequestId::of(request.request_id);
        self.count_hit(route, &request.method, head.status(), began);
        let parent = request.traceparent.and_then(TraceContext::parse);
        let span = RequestSpan::begin(&Begun {
            parent,
            began,
            method: &request.method,
            route: route.pattern(),
            target: request.target,
            version: Version::HTTP_11,
            client,
        });
        let trace = Trace::of(parent, span.as_ref(), None).map(|it| it.context);
        let (status, cache) = (head.status(), head.field(&CACHE_STATUS));
        in_flight.end_span_at_end(span.map(|span| span.answered(status, cache, None)));
        if self.logs_access() {
            in_flight.log_at_end(Some(Box::new(AccessRecord {
                id: id.value(),
                client,
                method: request.method.clone(),
                path: logged(request.target),
                version: Version::HTTP_11,
                status: head.status(),
                cache: head.field(&CACHE_STATUS).cloned(),
                cause: None,
                began,
                trace,
                combined: self.combined_fields(request.referer, request.user_agent),
            })));
        }
        Some(Replay { head, id, body, in_flight })
    }

    /// Answers a request. What is in memory is answered at once, and everything else by a future of its own: each request's future is
    /// moved a few times, and should be small.
    pub(crate) fn answer<'a>(
        &'a self,
        peer: Peer,
        connection: &Arc<ConnectionState>,
        mut request: Request<Body>,
    ) -> impl Future<Output = Response<SentBody>> + Send + use<'a> {
        let started = self.start(peer, connection, &mut request);
        let refusal = self.refuse_head(started.route, &request);
        let fast = FastRequest::of_checked(&request).filter(|_| refusal.is_none());
        let answered = if let Some(hit) = fast.as_ref().and_then(|fast| self.find(fast)) {
            Ok(self.answer_hit(started, hit))
        } else {
            let address = fast.and_then(|fast| fast.image()).map(ImageAddress::to_owned);
            Err(Box::pin(self.answer_by_route(started, address, refusal, request)))
        };
        async {
            match answered {
                Ok(response) => response,
                Err(working) => working.await,
            }
        }
    }

    /// Begins a request: all that is known of it before it is answered.
    fn start(
        &self,
        peer: Peer,
        connection: &Arc<ConnectionState>,
        request: &mut Request<Body>,
    ) -> Started {
        let began = Instant::now();
        let (method, version) = (request.method().clone(), request.version());
        let route = Route::of(request.uri().path());
        let connection = connection.begin_request(version >= Version::HTTP_2);
        let given = request.headers().get(REQUEST_ID).map(HeaderValue::as_bytes);
        let id = RequestId::of(given).value();
        let client =
            forwarded::client(peer, &self.app.settings.http.trusted_proxies, request.headers());
        let path = self.logs_access().then(|| logged(path_and_query(request.uri())));
        let combined = path.as_ref().and_then(|_| {
            let field = |name| request.headers().get(name).map(HeaderValue::as_bytes);
            self.combined_fields(field(REFERER), field(USER_AGENT))
        });
        let (trace, span) = begin_span(request, route, client, began);
        let unread = HttpService::lend_body(request);
        let is_stopping = self.app.shutdown.is_stopping();
        let in_flight = self.limits.begin(route, client.share(), Some(connection));
        Started {
            began,
            peer,
            client,
            method,
            version,
            route,
            id,
            path,
            combined,
            trace,
            span,
            unread,
            is_stopping,
            in_flight,
        }
    }

    fn answer_hit(&self, started: Started, hit: CachedHit) -> Response<SentBody> {
        let CachedHit { head, route, body } = hit;
        self.count_hit(route, &started.method, head.status(), started.began);
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = head.status();
        *response.headers_mut() = head.fields(started.id.clone());
        common_headers::close(&mut response, &started.exchange());
        self.finish(started, None, response)
    }

    /// Answers a request by its route, or with a refusal.
    async fn answer_by_route(
        &self,
        started: Started,
        address: Option<OwnedAddress>,
        refusal: Option<Response<Body>>,
        request: Request<Body>,
    ) -> Response<SentBody> {
        let Started { route, client, .. } = started;
        // For the log of a failure, where not every request is logged.
        let uri = started.path.is_none().then(|| request.uri().clone());
        let place = if let Some(refusal) = refusal {
            Err(refusal)
        } else {
            let place = self.limits.admit(route, self.routes, client.share());
            place.map_err(IntoResponse::into_response)
        };
        let mut response = match place {
            Ok(place) => {
                let routed = self.route(started.peer, client, place, request);
                trace::within(started.trace.clone(), routed).await
            }
            Err(refusal) => {
                // Its body comes back.
                drop(request);
                if started.method == Method::HEAD {
                    common_headers::without_body(refusal)
                } else {
                    refusal
                }
            }
        };
        common_headers::complete(&mut response, &started.exchange());
        let from_memory = response.extensions_mut().remove::<FromMemory>();
        if let (Some(address), Some(FromMemory(metadata))) = (address, from_memory) {
            self.learn(&address.borrow(), &started.method, &metadata, &response);
        }
        response.headers_mut().insert(REQUEST_ID, started.id.clone());
        let (name, status) = (method_name(&started.method), response.status().as_u16());
        self.app.metrics.count_request(route.pattern(), name, status, started.began.elapsed());
        self.finish(started, uri, response)
    }

    /// Hands an answer over to be sent, with all that is due at its end.
    fn finish(
        &self,
        started: Started,
        uri: Option<Uri>,
        mut response: Response<Body>,
    ) -> Response<SentBody> {
        let Started { version, path, span, mut in_flight, unread, .. } = started;
        let cause = response.extensions_mut().remove::<Cause>();
        let (status, cache) = (response.status(), response.headers().get(CACHE_STATUS));
        let error = cause.as_ref().map(|Cause(error)| &**error);
        in_flight.end_span_at_end(span.map(|span| span.answered(status, cache, error)));
        // Probes and scrapes would fill the log. Refused ones show that something is set wrong.
        let is_routine = started.route.is_for_operators()
            && self.routes != Routes::Public
            && status.as_u16() < 400;
        // A failure by the server's fault is logged even where not every request is.
        let record = ((path.is_some() && !is_routine) || cause.is_some()).then(|| {
            let path = path.or_else(|| uri.map(|uri| logged(path_and_query(&uri))));
            let path = path.unwrap_or_default();
            let cache = cache.cloned();
            Box::new(AccessRecord {
                id: started.id,
                client: started.client,
                method: started.method,
                path,
                version,
                status,
                cache,
                cause,
                began: started.began,
                trace: started.trace.map(|it| it.context),
                combined: started.combined,
            })
        });
        if let Some(unread) = unread {
            self.throw_away(&unread, &mut response, version, &mut in_flight);
        }
        in_flight.log_at_end(record);
        response.map(|body| SentBody::new(body, in_flight, version))
    }

    /// Sees to it that what is left of a request's body is thrown away behind the answer.
    fn throw_away(
        &self,
        unread: &UnreadBody,
        response: &mut Response<Body>,
        version: Version,
        in_flight: &mut InFlight,
    ) {
        let Some(rest) = unread.take() else { return };
        // A body that is over the limit is refused as well.
        let most = 2 * self.app.settings.records.max_value as u64;
        let may_be_cut = unread.announced.is_none_or(|length| length > most);
        if may_be_cut && version < Version::HTTP_2 {
            // It may not be read to its end.
            common_headers::announce_close(response);
        }
        in_flight.throw_away_at_end(rest, most);
    }

    /// Sees to it that what isn't read of a request's body comes back. A client that waits for leave to send its body sends none
    /// without it.
    fn lend_body(request: &mut Request<Body>) -> Option<UnreadBody> {
        let waits = request.headers().contains_key(EXPECT);
        (!waits && !request.body().is_end_stream()).then(|| UnreadBody::lend(request))
    }

    /// Returns whether a request names a host that is answered. Metrics and the gallery are only for hosts of the server's own: a
    /// page under a name that was made to lead here could read them. Who may write or list is decided with their rights (`http::auth`).
    fn is_answered(&self, route: Route, request: &Request<Body>) -> bool {
        let listed = &self.app.settings.http.hosts;
        let is_open = match route {
            Route::Healthz | Route::Readyz => true,
            Route::Metrics
            | Route::Gallery
            | Route::Session
            | Route::Status
            | Route::Debug
            | Route::Export => false,
            Route::Images
            | Route::Image
            | Route::Thumbnail
            | Route::Info
            | Route::Placeholder
            | Route::Events
            | Route::OpenApi
            | Route::Unknown => listed.is_empty(),
        };
        is_open
            || self.routes == Routes::Admin
            || host::host_of(request).is_some_and(|host| host::is_own(host, listed))
    }

    /// Returns the answer to a request whose head is refused before it is routed.
    fn refuse_head(&self, route: Route, request: &Request<Body>) -> Option<Response<Body>> {
        // The HTTP library bounds its buffer, which may have room for more. Over HTTP/2 it counts.
        let limit = self.app.head_limits.header_bytes();
        if request.version() < Version::HTTP_2 && head_length(request) > limit {
            return Some(problem::head_too_large());
        }
        let problem = match check_host(request) {
            Err(reason) => Problem::bad_host(reason),
            Ok(()) if !self.is_answered(route, request) => Problem::misdirected(),
            Ok(()) => return None,
        };
        Some(problem.into_response())
    }

    /// Finds the cached head that answers a request, and the bytes that follow it. Coherence is the index's: it is asked
    /// first, whether the image is current.
    fn find(&self, request: &FastRequest<'_>) -> Option<CachedHit> {
        let address = request.image()?;
        let validator = request.validator()?;
        if self.routes == Routes::Admin {
            return None;
        }
        let (id, original) = self.app.index.current(address.id)?;
        if self.app.settings.http.cap_max_age_at_expiry
            && self.app.index.time_to_live(&id, original.version).is_some()
        {
            // Its freshness is another one each second. The head may be from before the record had an expiry.
            return None;
        }
        let (key, _is_primary) = address.key(&original)?;
        let is_head = request.method == Method::HEAD;
        let heads = original.attachment.get::<CachedHeads>()?;
        let head = heads.find(&key, validator, is_head)?;
        let body = if head.status() == StatusCode::OK && !is_head {
            self.app.cache.get(&id, original.version, head.kind)?.body
        } else {
            Bytes::new()
        };
        let route = if address.is_thumbnail() { Route::Thumbnail } else { Route::Image };
        if route == Route::Image {
            original.count_hit();
        }
        Some(CachedHit { head, route, body })
    }

    /// Caches the head of an answer that came from memory, if later requests may get it.
    fn learn(
        &self,
        address: &ImageAddress<'_>,
        method: &Method,
        metadata: &Metadata,
        response: &Response<Body>,
    ) {
        let status = HeadStatus::of(response.status(), *method == Method::HEAD);
        let original = self.app.index.current(address.id);
        let (Some(status), Some((_, original))) = (status, original) else { return };
        // The answer may be about the version before.
        if metadata.version != original.version {
            return;
        }
        if let Some((key, is_primary)) = address.key(&original) {
            let head = CachedHead::new(key, is_primary, status, metadata, response.headers());
            self.heads.keep(&original, head);
        }
    }

    /// Works on a request. Its place is free again as soon as the answer is known.
    async fn route(
        &self,
        peer: Peer,
        client: Client,
        _place: Option<Place<PeerKey>>,
        mut request: Request<Body>,
    ) -> Response<Body> {
        request.extensions_mut().insert(peer);
        request.extensions_mut().insert(client);
        let answered = tower_service::Service::call(&mut self.router.clone(), request).await;
        answered.unwrap_or_else(|never| match never {})
    }

    fn count_hit(&self, route: Route, method: &Method, status: StatusCode, began: Instant) {
        let hits = &self.hits[usize::from(route == Route::Thumbnail)];
        let is_head = *method == Method::HEAD;
        hits.count(is_head, status == StatusCode::NOT_MODIFIED, began.elapsed());
    }

    /// Returns the fields of a request that only one format of the log has, if it is that format.
    fn combined_fields(
        &self,
        referer: Option<&[u8]>,
        user_agent: Option<&[u8]>,
    ) -> Option<CombinedFields> {
        (self.app.settings.log.format == LogFormat::Combined)
            .then(|| CombinedFields::new(referer, user_agent))
    }

    fn logs_access(&self) -> bool {
        self.app.settings.log.access && tracing::enabled!(target: ACCESS, Level::INFO)
    }
}

/// Begins the span of a request. There is a trace if its client sent one or the span is exported.
fn begin_span(
    request: &Request<Body>,
    route: Route,
    client: Client,
    began: Instant,
) -> (Option<Trace>, Option<RequestSpan>) {
    let (parent, state) = trace_fields(request.headers());
    let span = if route.is_for_operators() {
        // Probes and scrapes would be most of the spans.
        None
    } else {
        RequestSpan::begin(&Begun {
            parent,
            began,
            method: request.method(),
            route: route.pattern(),
            target: path_and_query(request.uri()),
            version: request.version(),
            client,
        })
    };
    (Trace::of(parent, span.as_ref(), state), span)
}

/// Returns the span of a request's client, and the state that belongs to it.
pub(crate) fn trace_fields(headers: &HeaderMap) -> (Option<TraceContext>, Option<HeaderValue>) {
    let mut lines = headers.get_all(TRACEPARENT).iter();
    let only = lines.next().filter(|_| lines.next().is_none());
    let Some(parent) = only.and_then(|it| TraceContext::parse(it.as_bytes())) else {
        return (None, None);
    };
    let mut lines = headers.get_all(TRACESTATE).iter().map(HeaderValue::as_bytes);
    // A list, whose lines may be joined (RFC 9110 §5.3).
    let state =
        lines.next().map(|first| lines.fold(first.to_vec(), |all, it| [&all, it].join(&b',')));
    (Some(parent), state.and_then(|state| HeaderValue::try_from(state).ok()))
}

/// Returns the length of a head over HTTP/1.
fn head_length(request: &Request<Body>) -> usize {
    let target = path_and_query(request.uri()).len();
    let field = |(name, value): (&HeaderName, &HeaderValue)| name.as_str().len() + value.len() + 4;
    target + request.headers().iter().map(field).sum::<usize>()
}

/// Returns the address without the user and password that an absolute one may have.
fn path_and_query(uri: &Uri) -> &str {
    uri.path_and_query().map_or("*", |it| it.as_str())
}

/// Shortens an address for the log.
fn logged(address: &str) -> String {
    address.chars().take(LONGEST_PATH).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::time::Duration;

    use axum::http::header::{ACCEPT, ACCEPT_ENCODING, HOST};

    use super::*;
    use crate::image::{ImageId, MediaType, record};
    use crate::store::{Condition, Expiry};

    #[tokio::test]
    async fn every_representation_in_memory_is_answered_from_a_cached_head() {
        let (app, _dir) = crate::server::tests::app(&[]).await;
        let mut picture = Cursor::new(Vec::new());
        let pixels = ::image::RgbImage::new(100, 50);
        pixels.write_to(&mut picture, ::image::ImageFormat::Png).unwrap();
        let circles = "<circle cx='5' cy='5' r='4'/>".repeat(50);
        let drawing = format!("<svg xmlns='http://www.w3.org/2000/svg'>{circles}</svg>");
        for (name, bytes, media_type) in [
            ("a", picture.get_ref().as_slice(), MediaType::Png),
            ("svg", drawing.as_bytes(), MediaType::Svg),
        ] {
            let value = Bytes::from(record::encode(bytes, media_type, None));
            let (id, ttl) = (ImageId::parse(name).unwrap(), Duration::from_mins(1));
            app.store.put(&id, value, Expiry::In(ttl), &Condition::Always).await.unwrap();
        }
        let service = HttpService::new(
            &Arc::new(HttpState::new(Arc::clone(&app))),
            Routes::All,
            RequestLimits::new(&app),
        );
        let connection = Arc::new(ConnectionState::new());
        for (path, is_cached) in [
            ("/images/a", true),
            // First, so that it is known that the picture doesn't move.
            ("/images/a?format=auto", true),
            ("/images/a?w=64", true),
            ("/images/a.webp", true),
            ("/images/a/thumbnail", true),
            ("/images/svg", true),
            ("/images/a?w=%36%34", false),
            ("/images/a?v=00000000000000000000000000000000", false),
            ("/images/absent", false),
        ] {
            for method in [Method::GET, Method::HEAD] {
                let request = || {
                    let request = Request::builder().method(&method).uri(path);
                    let request = request.header(HOST, "a").header(ACCEPT_ENCODING, "br");
                    request.header(ACCEPT, "image/webp").body(Body::empty()).unwrap()
                };
                for _ in 0..3 {
                    drop(service.answer(Peer::Unix, &connection, request()).await);
                }
                let request = request();
                let fast = FastRequest::of_checked(&request).unwrap();
                let hit = service.find(&fast);
                assert_eq!(hit.is_some(), is_cached, "{method} {path}");
            }
        }
    }
}
