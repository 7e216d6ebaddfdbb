//! `PUT` of a record, from this machine only: what `afterimage put` speaks to a running server.

use std::error::Error;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Extension;
use axum::body::{Body, Bytes};
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, Request, State};
use axum::http::header::{
    CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, FORWARDED, HOST, IF_MATCH,
    IF_NONE_MATCH, IF_UNMODIFIED_SINCE, ORIGIN, VIA,
};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Deserialize;
use tower_http::timeout::TimeoutError;

use super::images;
use super::problem::Problem;
use super::router::Site;
use crate::app::App;
use crate::settings;
use crate::store::Replaced;
use crate::write;

/// Who is at the other end of the connection.
#[derive(Debug, Clone, Copy)]
pub enum Peer {
    /// A socket address.
    Tcp(SocketAddr),
    /// A program on this machine, over a Unix socket: a proxy, as a rule, for whom nobody knows.
    Unix,
}

impl Peer {
    fn is_loopback(self) -> bool {
        match self {
            Peer::Tcp(address) => address.ip().to_canonical().is_loopback(),
            Peer::Unix => false,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Tcp(address) => address.fmt(f),
            Peer::Unix => f.write_str("unix"),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Parameters {
    /// Such as `2h`.
    ttl: Option<String>,
}

/// `PUT /images/{id}?ttl=2h` with a JSON record. The body is read last: who may not write can't make the
/// server hold one.
pub(crate) async fn put(
    State(site): State<Arc<Site>>,
    Extension(peer): Extension<Peer>,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<Parameters>, QueryRejection>,
    request: Request,
) -> Result<Response, Problem> {
    let app = &site.app;
    from_this_machine(app, peer, &request)?;
    let id = images::id(path)?;
    let ttl = match query.map_err(|rejection| Problem::bad_parameter(rejection.body_text()))?.0.ttl
    {
        Some(text) => settings::time_to_live(&text)
            .map_err(|expected| Problem::bad_parameter(format!("ttl is {expected}")))?,
        None => app.settings.records.ttl,
    };
    is_plain_record(request.headers())?;
    let limit = app.settings.records.max_value;
    // What says that it is too large is refused before it is sent; what doesn't say may be as large as any.
    let announced = request.headers().get(CONTENT_LENGTH);
    let announced = announced.and_then(|it| it.to_str().ok()?.parse().ok()).unwrap_or(limit as u64);
    if announced > limit as u64 {
        return Err(too_large(limit));
    }
    let _room = app.room_for(announced).await?;
    let body = read(request.into_body(), limit).await?;
    let written = write::put(app, &id, body, ttl).await?;
    let status = match written.replaced {
        Replaced::Nothing => StatusCode::CREATED,
        Replaced::Value => StatusCode::NO_CONTENT,
    };
    Ok((status, [(ETAG, written.facts.etag)]).into_response())
}

/// The whole body, or why it can't be had.
async fn read(body: Body, limit: usize) -> Result<Bytes, Problem> {
    match Limited::new(body, limit).collect().await {
        Ok(collected) => Ok(collected.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(too_large(limit)),
        Err(error) => {
            let causes = std::iter::successors(Some(&*error as &dyn Error), |it| (*it).source());
            let slow = causes.into_iter().any(<dyn Error>::is::<TimeoutError>);
            let detail = error.to_string();
            let (late, broken) = (StatusCode::REQUEST_TIMEOUT, StatusCode::BAD_REQUEST);
            Err(if slow {
                Problem::new(late, "body-timeout", "the body took too long", detail)
            } else {
                Problem::new(broken, "body-incomplete", "the body can't be read", detail)
            })
        }
    }
}

fn too_large(limit: usize) -> Problem {
    let detail = format!("the limit is {limit} bytes ([records] max_value)");
    let status = StatusCode::PAYLOAD_TOO_LARGE;
    Problem::new(status, "body-too-large", "the body is too large", detail)
}

/// A connection from this machine, for this machine: a page of another site that was made to resolve to
/// it still names itself in `Host` and `Origin`, and what came through a proxy came from anywhere.
fn from_this_machine(app: &App, peer: Peer, request: &Request) -> Result<(), Problem> {
    let headers = request.headers();
    // HTTP/2 names the host in `:authority`, HTTP/1 in `Host`.
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()?.parse::<Authority>().ok());
    let local = host
        .as_ref()
        .or_else(|| request.uri().authority())
        .is_some_and(|host| matches!(host.host(), "localhost" | "127.0.0.1" | "[::1]"));
    let proxied = [FORWARDED.as_str(), VIA.as_str(), "x-forwarded-for", "x-real-ip"]
        .iter()
        .any(|name| headers.contains_key(*name));
    let here = peer.is_loopback() && local && !proxied;
    if here && !headers.contains_key(ORIGIN) && app.settings.http.writes {
        return Ok(());
    }
    let detail = "writes are taken from a program on the server's own machine only ([http] writes)";
    Err(Problem::new(StatusCode::FORBIDDEN, "not-from-here", "writes are local", detail))
}

/// A precondition must not be ignored (RFC 9110 §13.1), so one that isn't understood is refused.
fn is_plain_record(headers: &HeaderMap) -> Result<(), Problem> {
    if [IF_MATCH, IF_NONE_MATCH, IF_UNMODIFIED_SINCE].iter().any(|it| headers.contains_key(it)) {
        let detail = "conditional writes aren't implemented";
        return Err(Problem::new(
            StatusCode::NOT_IMPLEMENTED,
            "conditional-write",
            "not implemented",
            detail,
        ));
    }
    // A part would be taken for the whole (RFC 9110 §14.5).
    if headers.contains_key(CONTENT_RANGE) {
        let detail = "a record is written whole, not by Content-Range";
        let status = StatusCode::BAD_REQUEST;
        return Err(Problem::new(status, "partial-put", "partial PUT", detail));
    }
    let json =
        headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).is_some_and(|value| {
            value
                .split(';')
                .next()
                .is_some_and(|name| name.trim().eq_ignore_ascii_case("application/json"))
        });
    if json && !headers.contains_key(CONTENT_ENCODING) {
        return Ok(());
    }
    let detail = "expected the record as application/json, without Content-Encoding";
    let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
    Err(Problem::new(status, "media-type", "unsupported media type", detail))
}
