//! `GET /export`: a backup of the store, while the server has it.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::header::{CONTENT_DISPOSITION, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use futures_util::TryStreamExt;
use serde::Deserialize;

use super::events::parse_prefix;
use super::problem::Problem;
use super::state::HttpState;
use super::{NEVER_CACHED, auth};
use crate::backup;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ExportParams {
    prefix: Option<String>,
}

/// Backups that are made at the same time. Each has a record in memory for as long as its client dawdles.
pub(crate) const MOST: usize = 2;

/// `GET /export?prefix=`. The records as lines of JSON. A store that fails in the middle cuts the answer off.
pub(crate) async fn get(
    State(state): State<Arc<HttpState>>,
    query: Result<Query<ExportParams>, QueryRejection>,
    request: Request,
) -> Result<Response, Problem> {
    auth::check_operator(&state.app, &request)?;
    let Query(parameters) = query.map_err(|rejection| {
        Problem::bad_parameter(format!("{}; this address takes prefix", rejection.body_text()))
    })?;
    let prefix = parse_prefix(parameters.prefix.as_deref().unwrap_or_default())?.to_owned();
    let permit = Arc::clone(&state.exports).try_acquire_owned().map_err(|_none| {
        Problem::busy(format!("{MOST} backups are being made, which is the most at a time"))
    })?;
    let lines = backup::lines(Arc::clone(&state.app.store), prefix).inspect_err(move |error| {
        let _until_the_end = &permit;
        tracing::warn!(%error, "a backup was cut off");
    });
    let headers = [
        (CONTENT_TYPE, "application/x-ndjson"),
        (CONTENT_DISPOSITION, "attachment; filename=\"afterimage.jsonl\""),
    ];
    Ok(([NEVER_CACHED], headers, Body::from_stream(lines)).into_response())
}
