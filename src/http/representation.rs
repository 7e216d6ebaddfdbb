//! From an answer to a response: status, `Cache-Control`, `Cache-Status`, `Server-Timing` and validators.

use std::fmt::Write;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{
    ACCEPT_RANGES, AGE, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE,
    CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG, LAST_MODIFIED, LOCATION,
};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;

use super::conditional::{self, Part};
use super::params::ImageParams;
use super::problem::{Problem, ProblemKind};
use super::state::HttpState;
use super::{CACHE_STATUS, FromMemory, SERVER_TIMING, placeholders};
use crate::cache_status::CacheStatus;
use crate::image::{ImageId, MediaType, Metadata, Representation, RepresentationKind, Version};
use crate::peer::Client;
use crate::read::{Answer, AnswerContent, ReadFailure, Timing};
use crate::settings;

/// For an address with the current version, whose content never changes (RFC 8246).
const IMMUTABLE: HeaderValue = HeaderValue::from_static("public, max-age=31536000, immutable");

/// For a stale answer: a cache that counts its Age revalidates it each time, a cache that doesn't (nginx) after a moment.
/// So no cache holds on to it when the store is back.
const STALE: HeaderValue = HeaderValue::from_static("public, max-age=5");

/// For an address with another version: stored, but revalidated each time (RFC 9111 §5.2.2.4).
const REVALIDATE: HeaderValue = HeaderValue::from_static("no-cache");

/// `Server-Timing` of a hit.
const NO_TIME: HeaderValue = HeaderValue::from_static("store;dur=0");

/// For SVG, the one image type that can hold scripts: the document can do nothing.
const SANDBOXED: HeaderValue =
    HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'; sandbox");

/// The response to a read.
pub(crate) fn answered(
    state: &HttpState,
    headers: &HeaderMap,
    id: &ImageId,
    version: Option<&str>,
    answer: Answer,
) -> Response {
    let Answer { content, cache_status: source, timing } = answer;
    let is_redirect = matches!(content, AnswerContent::Redirect { .. });
    let (mut response, metadata) = match content {
        AnswerContent::Image(Representation { metadata, body }) => {
            (requested_part(headers, &metadata, body), metadata)
        }
        AnswerContent::Metadata(metadata) => (whole(&metadata, Body::empty()), metadata),
        AnswerContent::Redirect { metadata, not_modified: true, .. }
        | AnswerContent::NotModified(metadata) => (not_modified(&metadata), metadata),
        AnswerContent::Redirect { metadata, location, not_modified: false } => {
            (redirect(location, &metadata), metadata)
        }
        AnswerContent::PreconditionFailed(metadata) => (precondition_failed(&metadata), metadata),
    };
    let time_left = time_left(state, id, metadata.version);
    let status = response.status();
    let headers = response.headers_mut();
    if status.is_success() || status.is_redirection() {
        let freshness = match freshness(state, &metadata, version, source) {
            // An object is removed some time after its record, so no cache should keep the redirect for ever.
            forever if is_redirect && forever == IMMUTABLE => state.fresh.clone(),
            freshness => freshness,
        };
        headers.insert(CACHE_CONTROL, capped(freshness, time_left));
        if let CacheStatus::Stale { age } = source {
            // Only a stale answer is older than its request (RFC 9111 §5.1).
            headers.insert(AGE, HeaderValue::from(age.as_secs()));
        }
    }
    headers.insert(
        CACHE_STATUS,
        match cache_status(source) {
            status if metadata.is_stopped => first_frame(&status),
            status => status,
        },
    );
    headers.insert(SERVER_TIMING, server_timing(&timing));
    // The head of a record that expires isn't cached where it has the time that is left.
    if source == CacheStatus::Hit
        && !is_redirect
        && status != StatusCode::PRECONDITION_FAILED
        && time_left.is_none()
    {
        response.extensions_mut().insert(FromMemory(metadata));
    }
    response
}

/// The part of an image that a GET asks for.
pub(crate) fn requested_part(headers: &HeaderMap, metadata: &Metadata, body: Bytes) -> Response {
    match conditional::part(headers, metadata) {
        Part::Whole => whole(metadata, Body::from(body)),
        Part::Bytes { first, last } => {
            partial(metadata, first, last, Body::from(body.slice(first..=last)))
        }
        Part::Unsatisfiable => unsatisfiable(metadata),
    }
}

/// Time until a record expires, if `Cache-Control` depends on it.
pub(crate) fn time_left(state: &HttpState, id: &ImageId, version: Version) -> Option<Duration> {
    let caps = state.app.settings.http.cap_max_age_at_expiry;
    if caps { state.app.index.time_to_live(id, version) } else { None }
}

/// `Cache-Control` that lasts no longer than the record does.
fn capped(freshness: HeaderValue, time_left: Option<Duration>) -> HeaderValue {
    let Some(left) = time_left.map(|left| left.as_secs()) else { return freshness };
    let text = freshness.to_str().unwrap_or_default();
    let max_age = text.split(", ").find_map(|it| it.strip_prefix("max-age=")?.parse().ok());
    match max_age {
        Some(max_age) if left < max_age => HeaderValue::try_from(format!("public, max-age={left}"))
            .expect("words and numbers are ASCII"),
        _ => freshness,
    }
}

/// `Cache-Control` of an answer.
fn freshness(
    state: &HttpState,
    metadata: &Metadata,
    asked: Option<&str>,
    served: CacheStatus,
) -> HeaderValue {
    match asked {
        Some(asked) if metadata.is_named(asked) => IMMUTABLE,
        Some(_) => REVALIDATE,
        None => match served {
            CacheStatus::Stale { .. } => STALE,
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

/// `Cache-Status` of an answer (RFC 9211 §2).
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

/// `Cache-Status` of the first frame of an animation. `detail` says one thing (RFC 9211 §2.8), and what is left out of it can
/// be told from the rest, and from `Age` and `Server-Timing`.
fn first_frame(status: &HeaderValue) -> HeaderValue {
    let text = status.to_str().unwrap_or_default();
    let text = text.split_once("; detail=").map_or(text, |(before, _)| before);
    HeaderValue::try_from(format!("{text}; detail=first-frame")).expect("words are ASCII")
}

/// `Server-Timing` of an answer, in milliseconds.
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

/// `Server-Timing` of a picture for which no store was asked.
pub(crate) fn render_timing(render: Duration) -> HeaderValue {
    server_timing(&Timing { render, ..Timing::default() })
}

/// The response to a failed read, with a placeholder as its body if the address asks for one.
pub(crate) async fn failed(
    state: &HttpState,
    client: Client,
    parameters: &ImageParams,
    failure: ReadFailure,
) -> Response {
    let ReadFailure { error, cache_status: source, timing } = failure;
    let problem = Problem::from(error);
    let status = source.map_or_else(
        || {
            // A busy server has asked nobody.
            let asked = if problem.kind() == ProblemKind::Busy { "" } else { " fwd=miss;" };
            HeaderValue::try_from(format!("afterimage;{asked} detail={}", problem.kind().as_str()))
                .expect("kinds are tokens")
        },
        cache_status,
    );
    let mut response = if parameters.placeholder && problem.is_absence() {
        placeholders::in_place(state, client, problem, parameters.transform).await
    } else {
        problem.into_response()
    };
    response.headers_mut().insert(CACHE_STATUS, status);
    response.headers_mut().insert(SERVER_TIMING, server_timing(&timing));
    response
}

/// A 200, whose body may be left out for a HEAD.
pub(crate) fn whole(metadata: &Metadata, body: Body) -> Response {
    let mut response = Response::new(body);
    describe(response.headers_mut(), metadata, metadata.length);
    response
}

/// A redirect to the image, by the same method (RFC 9110 §15.4.8).
fn redirect(location: String, metadata: &Metadata) -> Response {
    let location = HeaderValue::try_from(location).expect("addresses are checked at start");
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    response.headers_mut().insert(LOCATION, location);
    response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(metadata.length));
    validators(response.headers_mut(), metadata);
    response
}

/// A 206 (RFC 9110 §15.3.7).
fn partial(metadata: &Metadata, first: usize, last: usize, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::PARTIAL_CONTENT;
    let headers = response.headers_mut();
    describe(headers, metadata, last - first + 1);
    headers.insert(CONTENT_RANGE, content_range(&format!("{first}-{last}"), metadata));
    response
}

/// A 416 (RFC 9110 §15.5.17).
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

/// A 304: the fields that it must repeat (RFC 9110 §15.4.5), and none that describes a body.
pub(crate) fn not_modified(metadata: &Metadata) -> Response {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NOT_MODIFIED;
    // The length of the 200 (RFC 9110 §8.6), unless it isn't known: of a variant that isn't rendered yet.
    if metadata.length > 0 {
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(metadata.length));
    }
    validators(response.headers_mut(), metadata);
    response
}

/// A 412, with the validators of the current representation (RFC 9110 §15.5.13).
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_fresh_for_longer_than_its_record_lasts() {
        let left = |seconds: u64| Some(Duration::from_millis(seconds * 1000 + 900));
        let hour = HeaderValue::from_static("public, max-age=3600, immutable, stale-if-error=60");
        for (freshness, left, expected) in [
            (&hour, None, hour.to_str().unwrap()),
            (&hour, left(3600), hour.to_str().unwrap()),
            (&hour, left(3599), "public, max-age=3599"),
            (&hour, left(0), "public, max-age=0"),
            (&IMMUTABLE, left(3600), "public, max-age=3600"),
            (&STALE, left(4), "public, max-age=4"),
            (&STALE, left(5), "public, max-age=5"),
            (&REVALIDATE, left(1), "no-cache"),
        ] {
            assert_eq!(capped(freshness.clone(), left), expected);
        }
    }
}
