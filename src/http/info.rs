//! `GET /images/{id}/info`: the metadata of an image, and a small picture of it, as JSON.

use std::sync::Arc;

use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::http::HeaderValue;
use axum::http::header::CACHE_CONTROL;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

use super::images;
use super::params::ImageParams;
use super::problem::Problem;
use super::representation;
use super::state::HttpState;
use super::{CACHE_STATUS, SERVER_TIMING, urls};
use crate::peer::Client;

/// `GET /images/{id}/info`.
pub(crate) async fn get(
    State(state): State<Arc<HttpState>>,
    Extension(client): Extension<Client>,
    path: Result<Path<String>, PathRejection>,
) -> Result<Response, Problem> {
    let id = images::id(path)?;
    let info = match state.app.reader.info(&id, client.share()).await {
        Ok(info) => info,
        Err(failure) => {
            return Ok(
                representation::failed(&state, client, &ImageParams::default(), failure).await
            );
        }
    };
    let metadata = &info.metadata;
    let expires_in = info.time_to_live.map(|left| left.as_secs());
    let frames = info.preview.as_ref().and_then(|it| it.frames);
    let body = json!({
        "id": id.as_str(),
        "type": metadata.media_type.as_str(),
        "width": info.preview.as_ref().map(|it| it.width),
        "height": info.preview.as_ref().map(|it| it.height),
        "frames": frames.map(|it| it.count),
        "duration": frames.map(|it| it.duration),
        "bytes": metadata.length,
        "etag": metadata.etag.to_str().unwrap_or_default(),
        "expires_in": expires_in,
        "thumbhash": info.preview.as_ref().map(|it| STANDARD.encode(&it.thumbhash)),
        "thumbnail": info.thumbnail.as_ref().map(urls::data),
        "url": urls::versioned(&id, metadata.version),
    });
    // `no-store`: the time to live changes with each second.
    let headers = [
        (CACHE_CONTROL, HeaderValue::from_static("no-store")),
        (CACHE_STATUS, representation::cache_status(info.cache_status)),
        (SERVER_TIMING, representation::server_timing(&info.timing)),
    ];
    Ok((headers, Json(body)).into_response())
}
