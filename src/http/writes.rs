//! `PUT`, `POST` and `DELETE` of images.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, Request, State};
use axum::http::header::{
    CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, LOCATION,
};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use bytes::BytesMut;
use http_body_util::BodyExt;
use serde::Deserialize;
use serde_json::json;
use tower_http::timeout::TimeoutError;

use super::auth;
use super::digest::Digests;
use super::problem::{Problem, ProblemKind};
use super::state::HttpState;
use super::{conditional, images, urls};
use crate::app::App;
use crate::budget::WriteReservation;
use crate::image::MediaType;
use crate::image::preconditions::Preconditions;
use crate::peer::{Client, Peer, PeerKey};
use crate::settings;
use crate::store::Replaced;
use crate::write::{Put, Submission, Target};

/// Time to live of the submitted image, in seconds (RFC 8030 §5.2).
const TTL: HeaderName = HeaderName::from_static("ttl");

/// Copies of a body in memory at the same time, if the store sends a record from where it is: the body, and the record that is
/// made of it, which is a third larger, or the image that is in it.
const COPIES: u64 = 3;

/// Copies of a body otherwise: the record three times more, in the command, in the transaction and in the connection's
/// buffer.
const COPIES_FOR_A_TRANSACTION: u64 = 6;

/// First reservation for a body without `Content-Length`.
const FIRST_PIECE: usize = 64 * 1024;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct WriteParams {
    /// Such as `2h`, or `max`.
    ttl: Option<String>,
}

type Parsed = Result<Query<WriteParams>, QueryRejection>;

/// `PUT /images/{id}?ttl=2h` with an image or a JSON record. The body is read last, so that a client without the right to
/// write can't make the server hold one.
pub(crate) async fn put(
    State(state): State<Arc<HttpState>>,
    Extension(peer): Extension<Peer>,
    Extension(client): Extension<Client>,
    path: Result<Path<String>, PathRejection>,
    query: Parsed,
    request: Request,
) -> Result<Response, Problem> {
    auth::check_write(&state.app, peer, &request)?;
    let id = images::id(path)?;
    Ok(written(accept(&state.app, client.share(), Target::Id(id), query, request).await?))
}

/// `POST /images?ttl=2h` with an image or a JSON record. The id is made of the image's bytes, so the same image is stored
/// once, however often it is sent.
pub(crate) async fn post(
    State(state): State<Arc<HttpState>>,
    Extension(peer): Extension<Peer>,
    Extension(client): Extension<Client>,
    query: Parsed,
    request: Request,
) -> Result<Response, Problem> {
    auth::check_write(&state.app, peer, &request)?;
    Ok(written(accept(&state.app, client.share(), Target::Content, query, request).await?))
}

/// The answer to a write: the image's address, and that of its new version.
fn written(Put { id, metadata, replaced }: Put) -> Response {
    let status = match replaced {
        Replaced::Nothing => StatusCode::CREATED,
        Replaced::Value => StatusCode::OK,
    };
    let body = json!({
        "id": id.as_str(),
        "type": metadata.media_type.as_str(),
        "bytes": metadata.length,
        "etag": metadata.etag.to_str().unwrap_or_default(),
        "url": urls::versioned(&id, metadata.version),
    });
    let headers = [
        (LOCATION, HeaderValue::try_from(urls::image(&id)).expect("ids are ASCII")),
        (ETAG, metadata.etag),
        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
    ];
    (status, headers, Json(body)).into_response()
}

/// `DELETE /images/{id}`.
pub(crate) async fn delete(
    State(state): State<Arc<HttpState>>,
    Extension(peer): Extension<Peer>,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<StatusCode, Problem> {
    auth::check_write(&state.app, peer, &request)?;
    let id = images::id(path)?;
    if request.uri().query().is_some_and(|query| !query.is_empty()) {
        return Err(Problem::bad_parameter("a DELETE takes none"));
    }
    let preconditions = conditional::preconditions(request.headers());
    state.app.writer.remove(&id, preconditions).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Reads a submission, and writes it.
async fn accept(
    app: &App,
    client: PeerKey,
    target: Target,
    query: Parsed,
    request: Request,
) -> Result<Put, Problem> {
    let Query(parameters) = query.map_err(|rejection| {
        Problem::bad_parameter(format!("{}; this address takes ttl", rejection.body_text()))
    })?;
    let headers = request.headers();
    let ttl = time_to_live(parameters.ttl.as_deref(), headers, &app.settings.records)?;
    let content = content(headers)?;
    let digests =
        Digests::of(headers).map_err(|detail| Problem::new(ProblemKind::BadDigest, detail))?;
    let preconditions = conditional::preconditions(headers);
    let limit = app.settings.records.max_value;
    // A body that announces too much is refused before it is sent.
    let announced = headers.get(CONTENT_LENGTH);
    let announced: Option<usize> = announced.and_then(|it| it.to_str().ok()?.parse().ok());
    if announced.is_some_and(|length| length > limit) {
        return Err(too_large(limit));
    }
    let is_unconditional = preconditions == Preconditions::default();
    let copies = match target {
        Target::Id(_) if is_unconditional && app.store.sends_in_place() => COPIES,
        Target::Id(_) | Target::Content => COPIES_FOR_A_TRANSACTION,
    };
    let mut room =
        app.write_budget.reserve(client, copies * announced.unwrap_or(FIRST_PIECE) as u64).await?;
    let body = read(request.into_body(), announced, limit, copies, &mut room).await?;
    let check = {
        let body = body.clone();
        move || digests.contradiction(&body)
    };
    if let Some(algorithm) = app.cpu.run_on(body.len(), check).await {
        let detail = format!("the body isn't what its digest says ({algorithm})");
        return Err(Problem::new(ProblemKind::DigestMismatch, detail));
    }
    let submission = match content {
        BodyContent::Image(declared) => Submission::Image { bytes: body, declared },
        BodyContent::Record => Submission::Record(body),
    };
    Ok(app.writer.put(client, target, submission, ttl, preconditions).await?)
}

/// The time to live: from the parameter `ttl`, the field `TTL`, or the settings.
fn time_to_live(
    parameter: Option<&str>,
    headers: &HeaderMap,
    settings: &settings::RecordSettings,
) -> Result<Duration, Problem> {
    let field = headers.get(TTL).map(|seconds| {
        let seconds = seconds.to_str().ok().filter(|it| it.bytes().all(|it| it.is_ascii_digit()));
        let seconds = seconds.and_then(|it| it.parse().ok()).filter(|seconds| *seconds > 0);
        seconds.map(Duration::from_secs).ok_or("TTL is a whole number of seconds, 1 or more")
    });
    let asked = match (parameter, field) {
        (Some(_), Some(_)) => {
            return Err(Problem::bad_parameter("the life is given twice: by ttl and by TTL"));
        }
        (Some("max"), None) => settings.max_ttl,
        (Some(text), None) => settings::time_to_live(text)
            .map_err(|expected| Problem::bad_parameter(format!("ttl is {expected}")))?,
        (None, Some(field)) => field.map_err(Problem::bad_parameter)?,
        (None, None) => return Ok(settings.ttl),
    };
    if asked > settings.max_ttl {
        let most = humantime::format_duration(settings.max_ttl);
        let detail = format!("an image lives for at most {most} ([records] max_ttl)");
        return Err(Problem::bad_parameter(detail));
    }
    Ok(asked)
}

/// The declared content of a body.
enum BodyContent {
    Image(Option<MediaType>),
    Record,
}

/// The declared content of a body, if it can be written. curl declares no type for a file, and other clients declare
/// only bytes; then the type is told from the bytes.
fn content(headers: &HeaderMap) -> Result<BodyContent, Problem> {
    // A part would be taken for the whole (RFC 9110 §14.5).
    if headers.contains_key(CONTENT_RANGE) {
        let detail = "an image is written whole, not by Content-Range";
        return Err(Problem::new(ProblemKind::PartialPut, detail));
    }
    let unsupported = |detail: &str| Problem::new(ProblemKind::MediaType, detail);
    if headers.contains_key(CONTENT_ENCODING) {
        return Err(unsupported("expected a body without Content-Encoding"));
    }
    let Some(declared) = headers.get(CONTENT_TYPE) else {
        return Ok(BodyContent::Image(None));
    };
    let declared = declared.to_str().unwrap_or_default();
    let name = declared.split(';').next().unwrap_or_default().trim();
    if name.eq_ignore_ascii_case("application/json") {
        return Ok(BodyContent::Record);
    }
    if name.eq_ignore_ascii_case("application/octet-stream") {
        return Ok(BodyContent::Image(None));
    }
    let media_type = MediaType::named(name).ok_or_else(|| {
        let images = MediaType::ALL.map(MediaType::as_str).join(", ");
        unsupported(&format!("expected an image ({images}) or a record as application/json"))
    })?;
    Ok(BodyContent::Image(Some(media_type)))
}

/// Reads the whole body, into one piece of memory.
async fn read(
    mut body: Body,
    announced: Option<usize>,
    limit: usize,
    copies: u64,
    room: &mut WriteReservation<'_>,
) -> Result<Bytes, Problem> {
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| unread(&error))?;
        let Ok(data) = frame.into_data() else { continue };
        if whole.len() + data.len() > limit {
            return Err(too_large(limit));
        }
        if announced.is_none() {
            room.grow(copies * (whole.len() + data.len()) as u64)?;
        }
        // Only now: a body that is announced and doesn't come takes no memory.
        if whole.is_empty() {
            whole.reserve(announced.unwrap_or(data.len()));
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole.freeze())
}

fn unread(error: &axum::Error) -> Problem {
    let causes = std::iter::successors(Some(error as &dyn Error), |it| (*it).source());
    let slow = causes.into_iter().any(<dyn Error>::is::<TimeoutError>);
    let kind = if slow { ProblemKind::BodyTimeout } else { ProblemKind::BodyIncomplete };
    Problem::new(kind, error.to_string())
}

fn too_large(limit: usize) -> Problem {
    let detail = format!("the limit is {limit} bytes ([records] max_value)");
    Problem::new(ProblemKind::BodyTooLarge, detail)
}
