//! The request in flight: one guard that holds its place and counts its bytes; dropped, it ends and logs the request.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Instant, SystemTime};

use axum::body::Body;
use axum::http::{HeaderValue, Method, StatusCode, Version};
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::runtime::Handle;

use super::combined_log::{CombinedFields, CombinedLine};
use super::problem::{Cause, Problem};
use super::router::{Route, Routes};
use super::unread;
use crate::app::App;
use crate::holders::{Held, Holders};
use crate::limit::{GaugeGuard, NoPlace, Place, Shares};
use crate::metrics::{Metrics, Shed};
use crate::peer::{Client, PeerKey};
use crate::server::timeouts::ActiveRequest;
use crate::spans::RequestSpan;
use crate::trace::{Hex, TraceContext};

/// The target of the lines about requests.
pub(crate) const ACCESS: &str = "afterimage::access";

/// Most requests of operators that are worked on at the same time.
const OPERATORS: usize = 64;

/// The limits on requests of one app, which its listeners share.
///
/// A request has a place while it is worked on. A cached head is no work, and neither is a client that takes its time.
#[derive(Debug, Clone)]
pub(crate) struct RequestLimits(Arc<LimitParts>);

#[derive(Debug)]
struct LimitParts {
    everybody: Shares<PeerKey>,
    /// Operators look when there are too many other requests.
    operators: Shares<PeerKey>,
    metrics: Arc<Metrics>,
    holders: Arc<Holders>,
}

impl RequestLimits {
    pub(crate) fn new(app: &App) -> RequestLimits {
        RequestLimits(Arc::new(LimitParts {
            everybody: app.requests.clone(),
            operators: Shares::new(OPERATORS),
            metrics: Arc::clone(&app.metrics),
            holders: Arc::clone(&app.holders),
        }))
    }

    /// Takes a place for the work on a request. Probes that only ask if the process answers need none.
    pub(crate) fn admit(
        &self,
        route: Route,
        routes: Routes,
        client: PeerKey,
    ) -> Result<Option<Place<PeerKey>>, Problem> {
        let places = match route {
            Route::Healthz => return Ok(None),
            _ if route.is_for_operators() && routes != Routes::Public => &self.0.operators,
            _ => &self.0.everybody,
        };
        places.try_take(Some(client)).map(Some).map_err(|reason| {
            self.0.metrics.count_shed(Shed::Requests);
            let places = places.places();
            Problem::busy(match reason {
                NoPlace::Full => {
                    format!("{places} requests are being worked on ([limits] requests)")
                }
                NoPlace::ShareTaken => format!(
                    "this client has its share of {places} requests ([limits] requests): send fewer at the same time"
                ),
            })
        })
    }

    /// Begins a request. Those of operators are not in the gauge, which they look at.
    pub(crate) fn begin(
        &self,
        route: Route,
        client: PeerKey,
        connection: Option<ActiveRequest>,
    ) -> InFlight {
        let is_counted = !route.is_for_operators();
        InFlight {
            _gauge: is_counted.then(|| GaugeGuard::raise(&self.0.metrics.requests_in_flight)),
            limits: Arc::clone(&self.0),
            client,
            connection,
            held: None,
            bytes: 0,
            whole: false,
            record: None,
            span: None,
            unread: None,
        }
    }
}

/// A request that is being answered, over whichever protocol, by a cached head or by the router.
#[derive(Debug)]
pub(crate) struct InFlight {
    _gauge: Option<GaugeGuard>,
    limits: Arc<LimitParts>,
    client: PeerKey,
    /// `None` in the fast loop, which has time-outs of its own.
    connection: Option<ActiveRequest>,
    /// The answer, once it is being sent by the HTTP library.
    held: Option<Held>,
    /// The bytes of the body that were taken.
    bytes: u64,
    /// Set when that is all of it.
    whole: bool,
    record: Option<Box<AccessRecord>>,
    span: Option<RequestSpan>,
    /// The rest of the request's body, and the most bytes of it that are thrown away after the answer.
    unread: Option<(Body, u64)>,
}

impl InFlight {
    /// Sets the line that is logged at the end.
    pub(crate) fn log_at_end(&mut self, record: Option<Box<AccessRecord>>) {
        self.record = record;
    }

    /// Sets the span that ends with the request.
    pub(crate) fn end_span_at_end(&mut self, span: Option<RequestSpan>) {
        self.span = span;
    }

    /// Sets the rest of the request's body, of which up to `most` bytes are thrown away when the answer has been handed over.
    /// Not earlier: asked for its body, the client of `Expect: 100-continue` would be told to send it.
    pub(crate) fn throw_away_at_end(&mut self, unread: Body, most: u64) {
        self.unread = Some((unread, most));
    }

    /// Notes that some bytes of the body were taken, and whether that was the end.
    pub(crate) fn note_sent(&mut self, bytes: u64, whole: bool) {
        self.bytes += bytes;
        self.whole |= whole;
        if let Some(connection) = &self.connection {
            connection.note_progress();
        }
        if let Some(held) = &self.held {
            held.note_taken(bytes);
        }
    }

    /// Returns the client that it is accounted to.
    pub(crate) fn client(&self) -> PeerKey {
        self.client
    }

    /// Notes that the answer is known: it is being sent from now on, in pieces.
    fn begin_sending(&mut self, length: Option<u64>, piece: usize) {
        let Some(connection) = &mut self.connection else { return };
        connection.begin_sending();
        // An endless answer waits for events, not for its client.
        if let Some(length) = length.filter(|it| *it > 0) {
            let (holders, end) = (&self.limits.holders, connection.end());
            self.held = Some(holders.add(self.client, end, length, piece as u64));
        }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.limits.metrics.response_bytes.inc_by(self.bytes);
        if self.whole
            && let Some(connection) = &mut self.connection
        {
            connection.mark_answered();
        }
        if let Some(span) = self.span.take() {
            span.end(self.bytes);
        }
        if let Some(record) = self.record.take() {
            record.log(self.bytes, self.whole);
        }
        if let (Some((rest, most)), Some(connection)) = (self.unread.take(), self.connection.take())
            && let Ok(runtime) = Handle::try_current()
        {
            let busy = connection.another();
            drop(connection);
            // It ends with the connection at the latest, since the body does.
            runtime.spawn(unread::throw_away(rest, most, busy));
        }
    }
}

/// The line of the access log about a request.
#[derive(Debug)]
pub(crate) struct AccessRecord {
    pub(crate) id: HeaderValue,
    pub(crate) client: Client,
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) version: Version,
    pub(crate) status: StatusCode,
    pub(crate) cache: Option<HeaderValue>,
    pub(crate) cause: Option<Cause>,
    pub(crate) began: Instant,
    /// The span of the request, if it is a part of a trace.
    pub(crate) trace: Option<TraceContext>,
    /// Set if the line is to be in the combined format.
    pub(crate) combined: Option<CombinedFields>,
}

impl AccessRecord {
    fn log(&self, bytes: u64, whole: bool) {
        if let Some(fields) = &self.combined {
            let line = CombinedLine {
                client: self.client,
                time: SystemTime::now(),
                method: &self.method,
                path: &self.path,
                version: self.version,
                status: self.status,
                bytes,
                fields,
            };
            tracing::info!(target: ACCESS, "{}", line.format());
            // The format has no place for the cause of a failure, which is another line.
            if self.cause.is_none() {
                return;
            }
        }
        let text = |value: &HeaderValue| value.to_str().unwrap_or_default().to_owned();
        let duration = self.began.elapsed().as_secs_f64() * 1000.0;
        // To the microsecond.
        let duration_ms = (duration * 1000.0).round() / 1000.0;
        let (id, cache) = (text(&self.id), self.cache.as_ref().map(text).unwrap_or_default());
        let (peer, method, path) = (self.client.peer(), method_name(&self.method), &self.path);
        let client = self.client.forwarded().map(tracing::field::display);
        let (version, status) = (self.version, self.status.as_u16());
        let trace = self.trace.as_ref();
        let trace_id = trace.map(|it| tracing::field::display(Hex(&it.trace_id)));
        let span_id = trace.map(|it| tracing::field::display(Hex(&it.span_id)));
        if let Some(Cause(error)) = &self.cause {
            tracing::warn!(
                target: ACCESS,
                id, trace_id, span_id, %peer, client, method, path, ?version, status, bytes, cache, duration_ms,
                whole, %error,
                "request failed"
            );
        } else {
            tracing::info!(
                target: ACCESS,
                id, trace_id, span_id, %peer, client, method, path, ?version, status, bytes, cache, duration_ms,
                whole,
                "request"
            );
        }
    }
}

/// Returns the name of a method, from a set that no client can make grow.
pub(crate) fn method_name(method: &Method) -> &'static str {
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

/// A body is handed over in pieces of this many bytes, each when there is room for it. So it is seen whether the client
/// takes any, and the bytes that it didn't take are known when it leaves. Over HTTP/1 that costs a system call for each.
const PIECE: usize = 256 * 1024;

/// The same over HTTP/2, where many answers share a connection and each should get its turn within the time-out.
pub(crate) const HTTP_2_PIECE: usize = 32 * 1024;

/// The body of an answer on its way. Its request is over when it is dropped.
#[derive(Debug)]
pub(crate) struct SentBody {
    body: Body,
    /// The rest of a frame that is handed over in pieces.
    rest: Bytes,
    piece: usize,
    in_flight: InFlight,
}

impl SentBody {
    pub(crate) fn new(body: Body, mut in_flight: InFlight, version: Version) -> SentBody {
        let piece = if version >= Version::HTTP_2 { HTTP_2_PIECE } else { PIECE };
        in_flight.begin_sending(body.size_hint().exact(), piece);
        in_flight.whole = body.is_end_stream();
        SentBody { body, rest: Bytes::new(), piece, in_flight }
    }

    /// Returns the client that it is accounted to.
    pub(crate) fn client(&self) -> PeerKey {
        self.in_flight.client
    }

    fn hand_over(&mut self, mut data: Bytes) -> Frame<Bytes> {
        self.rest = data.split_off(data.len().min(self.piece));
        let is_last = self.is_end_stream();
        self.in_flight.note_sent(data.len() as u64, is_last);
        Frame::data(data)
    }
}

impl HttpBody for SentBody {
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
                self.in_flight.whole = true;
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
