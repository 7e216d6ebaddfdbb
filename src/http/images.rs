//! `GET` and `HEAD` of an image.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::header::{
    CACHE_CONTROL, CONTENT_LENGTH, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, LAST_MODIFIED,
    VARY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};
use axum::response::Response;

use super::conditional;
use super::problem::Problem;
use crate::app::App;
use crate::image::{Facts, ImageId, MediaType, Representation};
use crate::read::{self, AnswerContent, ImageRequest, Served, Wants};

/// For an hour a browser need not ask again, not even on a reload (RFC 9111 §5.2.2, RFC 8246).
const FRESH_FOR_AN_HOUR: HeaderValue = HeaderValue::from_static("public, max-age=3600, immutable");

/// What may be out of date is asked for again soon.
const FRESH_FOR_A_MOMENT: HeaderValue = HeaderValue::from_static("public, max-age=5");

/// RFC 9211.
const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// Representations may differ by encoding, and caches must know it from the first answer on.
const BY_ENCODING: HeaderValue = HeaderValue::from_static("Accept-Encoding");

const NO_SNIFFING: HeaderValue = HeaderValue::from_static("nosniff");

/// A document that can do nothing, for the one image type that can hold scripts.
const SANDBOXED: HeaderValue =
    HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'; sandbox");

/// `GET` and `HEAD /images/{id}`.
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    method: Method,
    uri: Uri,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let wants = if method == Method::HEAD { Wants::Facts } else { Wants::Bytes };
    let if_none_match = conditional::if_none_match(&headers);
    let request = ImageRequest { id: id(path)?, wants, if_none_match };
    // Ignored, it would be answered with the original, which caches keep for an hour under that address.
    if uri.query().is_some_and(|query| !query.is_empty()) {
        return Err(Problem::bad_parameter("this address takes no parameters"));
    }
    let answer = read::image(&app, request).await?;
    let mut response = match answer.content {
        AnswerContent::Image(Representation { facts, body }) => ok(&facts, Body::from(body)),
        AnswerContent::Facts(facts) => ok(&facts, Body::empty()),
        AnswerContent::NotModified(facts) => not_modified(&facts),
    };
    let fresh = match answer.served {
        Served::Stale => FRESH_FOR_A_MOMENT,
        Served::Hit | Served::Fetched { .. } | Served::Revalidated { .. } => FRESH_FOR_AN_HOUR,
    };
    response.headers_mut().insert(CACHE_CONTROL, fresh);
    response.headers_mut().insert(CACHE_STATUS, cache_status(answer.served));
    Ok(response)
}

/// Where the answer came from (RFC 9211 §2).
fn cache_status(served: Served) -> HeaderValue {
    HeaderValue::from_static(match served {
        Served::Hit => "afterimage; hit",
        Served::Fetched { collapsed: false, kept: true } => "afterimage; fwd=miss; stored",
        Served::Fetched { collapsed: true, kept: true } => {
            "afterimage; fwd=miss; stored; collapsed"
        }
        Served::Fetched { collapsed: false, kept: false } => "afterimage; fwd=miss",
        Served::Fetched { collapsed: true, kept: false } => "afterimage; fwd=miss; collapsed",
        Served::Revalidated { collapsed: false } => "afterimage; fwd=stale; detail=revalidated",
        Served::Revalidated { collapsed: true } => {
            "afterimage; fwd=stale; collapsed; detail=revalidated"
        }
        Served::Stale => "afterimage; fwd=stale; detail=store-unreachable",
    })
}

/// The id in the path, decoded once. One that isn't UTF-8 once it is decoded is as bad as any other.
pub(crate) fn id(path: Result<Path<String>, PathRejection>) -> Result<ImageId, Problem> {
    let Path(text) = path.map_err(|rejection| Problem::bad_id(&rejection.body_text()))?;
    ImageId::parse(&text).map_err(|invalid| Problem::bad_id(&invalid))
}

fn ok(facts: &Facts, body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(facts.media_type.as_str()));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(facts.length));
    headers.insert(X_CONTENT_TYPE_OPTIONS, NO_SNIFFING);
    if facts.media_type == MediaType::Svg {
        headers.insert(CONTENT_SECURITY_POLICY, SANDBOXED);
    }
    validators(headers, facts);
    response
}

/// What a 304 has to repeat (RFC 9110 §15.4.5), and nothing that describes the body it hasn't got.
fn not_modified(facts: &Facts) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NOT_MODIFIED;
    // The length that the 200 has (RFC 9110 §8.6). Left out, the server would say 0 to a HEAD.
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(facts.length));
    validators(response.headers_mut(), facts);
    response
}

fn validators(headers: &mut HeaderMap, facts: &Facts) {
    headers.insert(ETAG, facts.etag.clone());
    headers.insert(VARY, BY_ENCODING);
    if let Some(date) = &facts.last_modified_value {
        headers.insert(LAST_MODIFIED, date.clone());
    }
}
