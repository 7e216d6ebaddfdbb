//! What operators and their tools ask: is it alive, is it ready, what has it counted.

use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderName;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::IntoResponse;

use super::problem::Problem;
use crate::app::App;

const NEVER_CACHED: (HeaderName, &str) = (CACHE_CONTROL, "no-store");

/// The process answers.
pub(crate) async fn healthz() -> impl IntoResponse {
    ([NEVER_CACHED], "ok\n")
}

/// The store answers as well.
pub(crate) async fn readyz(State(app): State<Arc<App>>) -> Result<impl IntoResponse, Problem> {
    app.store.ping().await?;
    Ok(([NEVER_CACHED], "ready\n"))
}

/// The counters, for Prometheus.
pub(crate) async fn metrics(State(app): State<Arc<App>>) -> impl IntoResponse {
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([NEVER_CACHED, (CONTENT_TYPE, OPEN_METRICS)], app.metrics.render(app.cache.held()))
}
