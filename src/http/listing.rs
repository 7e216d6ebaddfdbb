//! `GET /images`: the images in the store, page by page.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::events::parse_prefix;
use super::json::{merge, unix_seconds};
use super::problem::Problem;
use super::state::HttpState;
use super::{NEVER_CACHED, auth};
use crate::read::{ListedImage, ListedState};
use crate::store::{Cursor, LISTED_KEYS};

/// Longest cursor, in bytes: the longest key and its prefix.
const MAX_CURSOR: usize = 1024;

/// Keys that a page looks at unless the request says another number.
const DEFAULT_LIMIT: usize = 100;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ListParams {
    prefix: Option<String>,
    cursor: Option<String>,
    limit: Option<usize>,
}

/// `GET /images?prefix=&cursor=&limit=`. As with `SCAN`, a page has about as many images as were asked for, in no order, and an
/// image may be on two pages; the last page has no `next`.
pub(crate) async fn get(
    State(state): State<Arc<HttpState>>,
    query: Result<Query<ListParams>, QueryRejection>,
    request: Request,
) -> Result<Response, Problem> {
    auth::check_operator(&state.app, &request)?;
    let Query(parameters) = query.map_err(|rejection| {
        let takes = "this address takes prefix, cursor and limit";
        Problem::bad_parameter(format!("{}; {takes}", rejection.body_text()))
    })?;
    let prefix = parse_prefix(parameters.prefix.as_deref().unwrap_or_default())?;
    let limit = parameters.limit.unwrap_or(DEFAULT_LIMIT);
    if !(1..=LISTED_KEYS).contains(&limit) {
        return Err(Problem::bad_parameter(format!("`limit` must be from 1 to {LISTED_KEYS}")));
    }
    let cursor = parameters.cursor.as_deref().filter(|it| !it.is_empty());
    if cursor.is_some_and(|it| it.len() > MAX_CURSOR) {
        return Err(Problem::bad_parameter("`cursor` must be the `next` of the page before"));
    }
    let page = state.app.reader.list(prefix, cursor.map(Cursor::parse), limit).await?;
    let images: Vec<Value> = page.images.iter().map(image).collect();
    let next = page.next.as_ref().map(Cursor::as_str);
    Ok(([NEVER_CACHED], Json(json!({ "images": images, "next": next }))).into_response())
}

fn image(listed: &ListedImage) -> Value {
    let mut image = json!({
        "id": listed.id.as_str(),
        "record_bytes": listed.record_bytes,
        "expires_in": listed.time_to_live.map(|left| left.as_secs()),
    });
    let further = match &listed.state {
        ListedState::Unread => json!({ "state": "unread" }),
        ListedState::Corrupt(corrupt) => {
            json!({ "state": "corrupt", "reason": corrupt.to_string() })
        }
        ListedState::Present { metadata, preview, in_memory } => json!({
            "state": "present",
            "type": metadata.media_type.as_str(),
            "bytes": metadata.length,
            "etag": metadata.etag.to_str().unwrap_or_default(),
            "v": metadata.version.to_string(),
            "width": preview.as_ref().map(|it| it.width),
            "height": preview.as_ref().map(|it| it.height),
            "created_at": metadata.last_modified.map(unix_seconds),
            "hits": metadata.hits.load(Ordering::Relaxed),
            "in_memory": in_memory,
        }),
    };
    merge(&mut image, further);
    image
}
