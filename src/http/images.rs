//! `GET` and `HEAD` of an image.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::header::{
    CACHE_CONTROL, CONTENT_LENGTH, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, LAST_MODIFIED,
    VARY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::Response;

use super::conditional;
use super::problem::Problem;
use crate::app::App;
use crate::image::{Facts, ImageId, MediaType, Representation};
use crate::read::{self, Answer, ImageRequest};

/// For an hour a browser need not ask again, not even on a reload (RFC 9111 §5.2.2, RFC 8246).
const FRESH_FOR_AN_HOUR: HeaderValue = HeaderValue::from_static("public, max-age=3600, immutable");

/// Representations may differ by encoding, and caches must know it from the first answer on.
const BY_ENCODING: HeaderValue = HeaderValue::from_static("Accept-Encoding");

const NO_SNIFFING: HeaderValue = HeaderValue::from_static("nosniff");

/// A document that can do nothing, for the one image type that can hold scripts.
const SANDBOXED: HeaderValue =
    HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'; sandbox");

/// `GET /images/{id}`. For `HEAD` the body is left out further up; nothing is copied for it.
pub(crate) async fn get(
    State(app): State<Arc<App>>,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let request =
        ImageRequest { id: id(path)?, if_none_match: conditional::if_none_match(&headers) };
    Ok(match read::image(&app, request).await? {
        Answer::Image(image) => ok(image),
        Answer::NotModified(facts) => not_modified(&facts),
    })
}

/// The id in the path, decoded once. One that isn't UTF-8 once it is decoded is as bad as any other.
pub(crate) fn id(path: Result<Path<String>, PathRejection>) -> Result<ImageId, Problem> {
    let Path(text) = path.map_err(|rejection| Problem::bad_id(&rejection.body_text()))?;
    ImageId::parse(&text).map_err(|invalid| Problem::bad_id(&invalid))
}

fn ok(image: Representation) -> Response {
    let length = HeaderValue::from(image.body.len());
    let mut response = Response::new(Body::from(image.body));
    let headers = response.headers_mut();
    let facts = &image.facts;
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(facts.media_type.as_str()));
    headers.insert(CONTENT_LENGTH, length);
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
    headers.insert(CACHE_CONTROL, FRESH_FOR_AN_HOUR);
    headers.insert(ETAG, facts.etag.clone());
    headers.insert(VARY, BY_ENCODING);
    if let Some(date) = &facts.last_modified_value {
        headers.insert(LAST_MODIFIED, date.clone());
    }
}
