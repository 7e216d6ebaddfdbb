//! What operators and their tools ask: is it alive, is it ready, what has it counted.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderName;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::IntoResponse;
use serde_json::json;

use super::problem::Problem;
use crate::app::App;
use crate::store::Coherence;

const NEVER_CACHED: (HeaderName, &str) = (CACHE_CONTROL, "no-store");

/// The process answers.
pub(crate) async fn healthz() -> impl IntoResponse {
    ([NEVER_CACHED], "ok\n")
}

/// The store answers as well; and how far it can be relied upon to tell of changes.
pub(crate) async fn readyz(State(app): State<Arc<App>>) -> Result<impl IntoResponse, Problem> {
    app.store.ping().await?;
    let coherence = app.index.coherence();
    let body =
        json!({"status": "ready", "coherence": coherence.name(), "reason": coherence.reason()});
    Ok(([NEVER_CACHED], Json(body)))
}

/// The counters, for Prometheus.
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let coherent = app.index.coherence() == Coherence::Coherent;
    let page = app.metrics.render(app.cache.held(), app.index.len(), coherent);
    ([NEVER_CACHED, (CONTENT_TYPE, OPEN_METRICS)], page)
}
