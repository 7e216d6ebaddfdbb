//! `GET` and `HEAD` of an image.

use std::fmt::Write;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::header::{
    ACCEPT_RANGES, AGE, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE,
    CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, LAST_MODIFIED, LOCATION, VARY,
};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};

use super::conditional::{self, Part};
use super::params::{self, ImageParams};
use super::problem::{Problem, ProblemKind};
use super::router::HttpState;
use super::{CACHE_STATUS, FromMemory, SERVER_TIMING, negotiation, placeholders};
use crate::cache_status::CacheStatus;
use crate::image::variant::Transform;
use crate::image::{ImageId, MediaType, Metadata, Representation, RepresentationKind, Version};
use crate::read::{Answer, AnswerContent, ImageRequest, ReadFailure, Timing, Want};
use crate::settings;

/// The address names the version, and what that means never changes (RFC 8246).
const FRESH_FOR_EVER: HeaderValue = HeaderValue::from_static("public, max-age=31536000, immutable");

/// What may be out of date is asked for again: each time by a cache that counts its Age, and after a moment by one
/// that doesn't (nginx), so that no cache holds on to it when the store is back.
const FRESH_FOR_A_MOMENT: HeaderValue = HeaderValue::from_static("public, max-age=5");

/// The address names a version that isn't there any more: kept, and asked for each time (RFC 9111 §5.2.2.4).
const ASK_EACH_TIME: HeaderValue = HeaderValue::from_static("no-cache");

/// Where the address leaves the format to the server.
const BY_ENCODING_AND_TYPE: HeaderValue = HeaderValue::from_static("Accept-Encoding, Accept");

/// A hit costs the store nothing.
const NO_TIME: HeaderValue = HeaderValue::from_static("store;dur=0");

/// A document that can do nothing, for the one image type that can hold scripts.
const SANDBOXED: HeaderValue =
    HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'; sandbox");

/// `GET` and `HEAD /images/{id}`, `/images/{id}.webp` and so on.
pub(crate) async fn get(
    State(state): State<Arc<HttpState>>,
    method: Method,
    uri: Uri,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Response {
    let text = path.map_err(|rejection| Problem::bad_id(&rejection.body_text()));
    let answer = async {
        let Path(text) = text?;
        let allowed = &state.app.settings.pictures;
        let (id, extension) = params::split_format(&text, allowed)?;
        let id = parse_id(id)?;
        let parameters = params::parse(&uri, extension, &headers, allowed)?;
        Ok::<_, Problem>(answer(&state, &method, &headers, id, parameters).await)
    };
    let mut response = answer.await.unwrap_or_else(IntoResponse::into_response);
    if params::is_negotiated(&uri) {
        response.headers_mut().insert(VARY, BY_ENCODING_AND_TYPE);
    }
    response
}

/// `GET` and `HEAD /images/{id}/thumbnail`.
pub(crate) async fn thumbnail(
    State(state): State<Arc<HttpState>>,
    method: Method,
    uri: Uri,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let id = id(path)?;
    let parameters = params::parse(&uri, None, &headers, &state.app.settings.pictures)?;
    if parameters.transform.is_some() {
        return Err(Problem::bad_parameter("this address takes v and fallback"));
    }
    let parameters = ImageParams { transform: Some(Transform::THUMBNAIL), ..parameters };
    Ok(answer(&state, &method, &headers, id, parameters).await)
}

async fn answer(
    state: &HttpState,
    method: &Method,
    headers: &HeaderMap,
    id: ImageId,
    parameters: ImageParams,
) -> Response {
    let want = if method == Method::HEAD { Want::Metadata } else { Want::Body };
    let request = ImageRequest {
        id,
        want,
        preconditions: conditional::preconditions(headers),
        accepts: negotiation::accepted_codings(headers),
        transform: parameters.transform,
    };
    match state.app.reader.image(request).await {
        Ok(answer) => answered(state, headers, parameters.version.as_deref(), answer),
        Err(failure) => failed(state, &parameters, failure).await,
    }
}

/// The id in the path, decoded once. One that isn't UTF-8 once it is decoded is as bad as any other.
pub(crate) fn id(path: Result<Path<String>, PathRejection>) -> Result<ImageId, Problem> {
    let Path(text) = path.map_err(|rejection| Problem::bad_id(&rejection.body_text()))?;
    parse_id(&text)
}

fn parse_id(text: &str) -> Result<ImageId, Problem> {
    ImageId::parse(text).map_err(|invalid| Problem::bad_id(&invalid))
}

fn answered(
    state: &HttpState,
    headers: &HeaderMap,
    version: Option<&str>,
    answer: Answer,
) -> Response {
    let Answer { content, cache_status: source, timing } = answer;
    let from_memory = match &content {
        AnswerContent::Image(Representation { metadata, .. })
        | AnswerContent::Metadata(metadata)
        | AnswerContent::NotModified(metadata)
            if source == CacheStatus::Hit =>
        {
            Some(FromMemory(Arc::clone(metadata)))
        }
        _ => None,
    };
    let (mut response, version_of) = match content {
        AnswerContent::Image(Representation { metadata, body }) => {
            let response = match conditional::part(headers, &metadata) {
                Part::Whole => whole(&metadata, Body::from(body)),
                Part::Bytes { first, last } => {
                    partial(&metadata, first, last, Body::from(body.slice(first..=last)))
                }
                Part::Unsatisfiable => unsatisfiable(&metadata),
            };
            (response, metadata.version)
        }
        AnswerContent::Metadata(metadata) => (whole(&metadata, Body::empty()), metadata.version),
        AnswerContent::Redirect { version, location } => (redirect(location), version),
        AnswerContent::NotModified(metadata) => (not_modified(&metadata), metadata.version),
        AnswerContent::PreconditionFailed(metadata) => {
            (precondition_failed(&metadata), metadata.version)
        }
    };
    let status = response.status();
    let headers = response.headers_mut();
    if status.is_success() || status.is_redirection() {
        let freshness = match freshness(state, version_of, version, source) {
            // What an object store has goes some time after its record, so no cache should send anybody there for ever.
            forever if status == StatusCode::TEMPORARY_REDIRECT && forever == FRESH_FOR_EVER => {
                state.fresh.clone()
            }
            freshness => freshness,
        };
        headers.insert(CACHE_CONTROL, freshness);
        if let CacheStatus::Stale { age } = source {
            // Nobody else's answer is older than its request (RFC 9111 §5.1).
            headers.insert(AGE, HeaderValue::from(age.as_secs()));
        }
    }
    headers.insert(CACHE_STATUS, cache_status(source));
    headers.insert(SERVER_TIMING, server_timing(&timing));
    if let Some(from_memory) = from_memory {
        response.extensions_mut().insert(from_memory);
    }
    response
}

/// For how long caches need not ask again.
fn freshness(
    state: &HttpState,
    version: Version,
    asked: Option<&str>,
    served: CacheStatus,
) -> HeaderValue {
    match asked {
        Some(asked) if version.is_named(asked) => FRESH_FOR_EVER,
        Some(_) => ASK_EACH_TIME,
        None => match served {
            CacheStatus::Stale { .. } => FRESH_FOR_A_MOMENT,
            CacheStatus::Hit
            | CacheStatus::Rendered
            | CacheStatus::Fetched { .. }
            | CacheStatus::Revalidated { .. } => state.fresh.clone(),
        },
    }
}

/// `Cache-Control` of an image under its plain address.
pub(crate) fn cache_control(settings: &settings::HttpSettings) -> HeaderValue {
    let mut text = format!("public, max-age={}, immutable", settings.max_age.as_secs());
    for (name, time) in [
        ("stale-while-revalidate", settings.stale_while_revalidate),
        ("stale-if-error", settings.stale_if_error),
    ] {
        if !time.is_zero() {
            let _ = write!(text, ", {name}={}", time.as_secs());
        }
    }
    HeaderValue::try_from(text).expect("words and numbers are ASCII")
}

/// Where the answer came from (RFC 9211 §2).
pub(crate) fn cache_status(served: CacheStatus) -> HeaderValue {
    HeaderValue::from_static(match served {
        CacheStatus::Hit => "afterimage; hit",
        CacheStatus::Rendered => "afterimage; hit; detail=rendered",
        CacheStatus::Fetched { collapsed: false, stored: true } => "afterimage; fwd=miss; stored",
        CacheStatus::Fetched { collapsed: true, stored: true } => {
            "afterimage; fwd=miss; stored; collapsed"
        }
        CacheStatus::Fetched { collapsed: false, stored: false } => "afterimage; fwd=miss",
        CacheStatus::Fetched { collapsed: true, stored: false } => {
            "afterimage; fwd=miss; collapsed"
        }
        CacheStatus::Revalidated { collapsed: false } => {
            "afterimage; fwd=stale; detail=revalidated"
        }
        CacheStatus::Revalidated { collapsed: true } => {
            "afterimage; fwd=stale; collapsed; detail=revalidated"
        }
        CacheStatus::Stale { .. } => "afterimage; fwd=stale; detail=store-unreachable",
    })
}

/// How long the parts took, in milliseconds.
pub(crate) fn server_timing(times: &Timing) -> HeaderValue {
    let milliseconds = |time: Duration| time.as_secs_f64() * 1000.0;
    if *times == Timing::default() {
        return NO_TIME;
    }
    let mut text = format!("store;dur={:.3}", milliseconds(times.store));
    for (name, time) in [
        ("origin", times.origin),
        ("hash", times.hash),
        ("decode", times.decode),
        ("render", times.render),
    ] {
        if !time.is_zero() {
            let _ = write!(text, ", {name};dur={:.3}", milliseconds(time));
        }
    }
    HeaderValue::try_from(text).expect("words and numbers are ASCII")
}

/// How long a picture took that no store was asked for.
pub(crate) fn render_timing(render: Duration) -> HeaderValue {
    server_timing(&Timing { render, ..Timing::default() })
}

pub(crate) async fn failed(
    state: &HttpState,
    parameters: &ImageParams,
    failure: ReadFailure,
) -> Response {
    let ReadFailure { error, cache_status: source, timing } = failure;
    let problem = Problem::from(error);
    let status = source.map_or_else(
        || {
            // Whoever is too busy hasn't asked anybody.
            let asked = if problem.kind() == ProblemKind::Busy { "" } else { " fwd=miss;" };
            HeaderValue::try_from(format!("afterimage;{asked} detail={}", problem.kind().as_str()))
                .expect("kinds are tokens")
        },
        cache_status,
    );
    let mut response = if parameters.placeholder && problem.is_absence() {
        placeholders::in_place(state, problem, parameters.transform).await
    } else {
        problem.into_response()
    };
    response.headers_mut().insert(CACHE_STATUS, status);
    response.headers_mut().insert(SERVER_TIMING, server_timing(&timing));
    response
}

pub(crate) fn whole(metadata: &Metadata, body: Body) -> Response {
    let mut response = Response::new(body);
    describe(response.headers_mut(), metadata, metadata.length);
    response
}

/// A redirect to the image, by the same method (RFC 9110 §15.4.8).
fn redirect(location: String) -> Response {
    let location = HeaderValue::try_from(location).expect("addresses are checked at start");
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    response.headers_mut().insert(LOCATION, location);
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(0));
    response
}

/// A part of a representation (RFC 9110 §15.3.7).
fn partial(metadata: &Metadata, first: usize, last: usize, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    let headers = response.headers_mut();
    describe(headers, metadata, last - first + 1);
    headers.insert(CONTENT_RANGE, content_range(&format!("{first}-{last}"), metadata));
    response
}

/// RFC 9110 §15.5.17.
fn unsatisfiable(metadata: &Metadata) -> Response {
    let detail = format!("the image has {} bytes", metadata.length);
    let mut response = Problem::range_not_satisfiable(detail).into_response();
    response.headers_mut().insert(CONTENT_RANGE, content_range("*", metadata));
    response
}

fn content_range(range: &str, metadata: &Metadata) -> HeaderValue {
    HeaderValue::try_from(format!("bytes {range}/{}", metadata.length))
        .expect("words and numbers are ASCII")
}

fn describe(headers: &mut HeaderMap, metadata: &Metadata, length: usize) {
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(metadata.media_type.as_str()));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    if let RepresentationKind::Coded(coding) = metadata.kind {
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static(coding.as_str()));
    }
    if metadata.media_type == MediaType::Svg {
        headers.insert(CONTENT_SECURITY_POLICY, SANDBOXED);
    }
    validators(headers, metadata);
}

/// What a 304 has to repeat (RFC 9110 §15.4.5), and nothing that describes the body it hasn't got.
pub(crate) fn not_modified(metadata: &Metadata) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NOT_MODIFIED;
    // The length that the 200 has (RFC 9110 §8.6). Left out, the server would say 0 to a HEAD.
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(metadata.length));
    validators(response.headers_mut(), metadata);
    response
}

/// RFC 9110 §15.5.13. It says what there is instead.
pub(crate) fn precondition_failed(metadata: &Metadata) -> Response {
    let detail = "the image is not the one that If-Match or If-Unmodified-Since asks for";
    let mut response = Problem::precondition_failed(detail).into_response();
    validators(response.headers_mut(), metadata);
    response
}

fn validators(headers: &mut HeaderMap, metadata: &Metadata) {
    headers.insert(ETAG, metadata.etag.clone());
    if let Some(date) = &metadata.last_modified_value {
        headers.insert(LAST_MODIFIED, date.clone());
    }
}
