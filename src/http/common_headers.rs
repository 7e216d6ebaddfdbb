//! Header fields that all answers have in common. No other file sets them.

use axum::body::Body;
use axum::http::header::{CONNECTION, CONTENT_LENGTH, HeaderMap, VARY, X_CONTENT_TYPE_OPTIONS};
use axum::http::{HeaderName, HeaderValue, Method, Response, StatusCode, Version};
use http_body::Body as HttpBody;

use super::router::Route;

/// Any site may show an image, and time its loading (Fetch §3.7; W3C Resource Timing §4.5).
const SHOWN_ANYWHERE: (HeaderName, HeaderValue) = (
    HeaderName::from_static("cross-origin-resource-policy"),
    HeaderValue::from_static("cross-origin"),
);
const TIMED_ANYWHERE: (HeaderName, HeaderValue) =
    (HeaderName::from_static("timing-allow-origin"), HeaderValue::from_static("*"));
const NO_SNIFFING: (HeaderName, HeaderValue) =
    (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));

/// No other site may so much as load what is for those who look after the images.
const SHOWN_HERE: (HeaderName, HeaderValue) = (
    HeaderName::from_static("cross-origin-resource-policy"),
    HeaderValue::from_static("same-origin"),
);

/// The parts of a request that the common fields of its answer depend on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Exchange<'a> {
    pub(crate) route: Route,
    pub(crate) method: &'a Method,
    pub(crate) version: Version,
    /// Set once the server was told to stop.
    pub(crate) is_stopping: bool,
}

/// Announces that the connection ends after this answer.
pub(crate) fn announce_close<B>(response: &mut Response<B>) {
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
}

/// Completes an answer of the router's. A cached head has all of this but the `Connection` field.
pub(crate) fn complete(response: &mut Response<Body>, exchange: &Exchange<'_>) {
    let status = response.status();
    let headers = response.headers_mut();
    let is_listing = exchange.route == Route::Images && exchange.method.is_safe();
    if exchange.route.is_of_gallery() || is_listing {
        for (name, value) in [SHOWN_HERE, NO_SNIFFING] {
            headers.insert(name, value);
        }
    } else if exchange.route.is_of_images() {
        for (name, value) in [SHOWN_ANYWHERE, TIMED_ANYWHERE, NO_SNIFFING] {
            headers.insert(name, value);
        }
        vary(headers);
    }
    if status == StatusCode::NOT_MODIFIED
        && (*exchange.method != Method::HEAD
            || headers.get(CONTENT_LENGTH).is_some_and(|length| length == "0"))
    {
        // Over HTTP/1.1 some clients would wait for a body. To a HEAD, 0 is the router's: no image has this length.
        headers.remove(CONTENT_LENGTH);
    }
    if status == StatusCode::NO_CONTENT {
        // The router's: it must not be there (RFC 9110 §8.6).
        headers.remove(CONTENT_LENGTH);
    }
    close(response, exchange);
}

/// Says that the connection ends where it does. Only HTTP/1 has a field for that.
pub(crate) fn close(response: &mut Response<Body>, exchange: &Exchange<'_>) {
    // The rest of a body that came too slowly, or is too large, isn't waited for (RFC 9110 §15.5.9).
    let is_unread =
        matches!(response.status(), StatusCode::REQUEST_TIMEOUT | StatusCode::PAYLOAD_TOO_LARGE);
    if (exchange.is_stopping || is_unread) && exchange.version <= Version::HTTP_11 {
        announce_close(response);
    }
}

/// Makes an answer to GET one to HEAD (RFC 9110 §9.3.2). The router does it for its own.
pub(crate) fn without_body(mut response: Response<Body>) -> Response<Body> {
    if let Some(length) = response.body().size_hint().exact() {
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
    }
    *response.body_mut() = Body::empty();
    response
}

/// Makes `Vary` name `Accept-Encoding`. Representations may differ by encoding, and caches must know it from the first
/// answer on, whatever its status. In one line: nginx 1.22 heeds the last one only, and would give a compressed answer to
/// a client that can't read it.
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
