//! Probes and metrics for operators and their tools.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderName;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::IntoResponse;
use serde_json::json;

use super::problem::Problem;
use super::state::HttpState;
use crate::metrics::GaugeReadings;

const NEVER_CACHED: (HeaderName, &str) = (CACHE_CONTROL, "no-store");

/// `GET /healthz`: succeeds if the process answers.
pub(crate) async fn healthz() -> impl IntoResponse {
    const PLAIN: (HeaderName, &str) = (CONTENT_TYPE, "text/plain; charset=utf-8");
    ([NEVER_CACHED, PLAIN], "ok\n")
}

/// `GET /readyz`: succeeds if the store answers, too, and the server isn't stopping. Reports the state of coherence.
pub(crate) async fn readyz(
    State(state): State<Arc<HttpState>>,
) -> Result<impl IntoResponse, Problem> {
    let answers = state.app.store.ping().await;
    let coherence = state.app.index.coherence();
    if state.app.shutdown.is_stopping() {
        return Err(Problem::stopping().with_coherence(coherence));
    }
    if let Err(error) = answers {
        return Err(Problem::from(error).with_coherence(coherence));
    }
    let body =
        json!({"status": "ready", "coherence": coherence.name(), "reason": coherence.reason()});
    Ok(([NEVER_CACHED], Json(body)))
}

/// `GET /metrics`: for Prometheus.
pub(crate) async fn metrics(State(state): State<Arc<HttpState>>) -> impl IntoResponse {
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let app = &state.app;
    let page = app.metrics.render(&GaugeReadings {
        held: app.cache.held(),
        known_keys: app.index.len(),
        coherence: app.index.coherence(),
    });
    ([NEVER_CACHED, (CONTENT_TYPE, OPEN_METRICS)], page)
}
