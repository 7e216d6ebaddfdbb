//! Probes and metrics for operators and their tools.

use std::sync::Arc;

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::http::header::{CONTENT_TYPE, VARY};
use axum::http::{HeaderMap, HeaderName};
use axum::response::IntoResponse;
use serde_json::json;

use super::NEVER_CACHED;
use super::negotiation::accepted_exposition;
use super::problem::Problem;
use super::state::HttpState;
use crate::metrics::GaugeReadings;
use crate::store::{Coherence, StoreError};

/// `GET /healthz`: succeeds if the process answers.
pub(crate) async fn healthz() -> impl IntoResponse {
    const PLAIN: (HeaderName, &str) = (CONTENT_TYPE, "text/plain; charset=utf-8");
    ([NEVER_CACHED, PLAIN], "ok\n")
}

/// `GET /readyz`: succeeds while anything can be answered, in an outage too, and reports the state of coherence. With
/// `?strict` it succeeds only while that is `coherent`.
///
/// An outage of the store is one for all servers at once. Were they unready, a balancer would take all of them out, and
/// nobody would get the images that they still have.
pub(crate) async fn readyz(
    State(state): State<Arc<HttpState>>,
    RawQuery(query): RawQuery,
) -> Result<impl IntoResponse, Problem> {
    let is_strict = match query.as_deref() {
        None | Some("") => false,
        Some("strict" | "strict=") => true,
        Some(_) => {
            return Err(Problem::bad_parameter("the only parameter is `strict`, without a value"));
        }
    };
    let coherence = state.app.index.coherence();
    if state.app.shutdown.is_stopping() {
        return Err(Problem::stopping().with_coherence(coherence));
    }
    let is_ready = match &coherence {
        Coherence::Coherent => true,
        // One that was never reached has nothing to answer with.
        Coherence::Unverified(_) => !is_strict && state.app.index.has_heard_of_store(),
        Coherence::Unreachable(_) => !is_strict && state.app.index.can_serve_in_an_outage(),
    };
    if !is_ready {
        let reason = coherence.reason().unwrap_or_default().to_owned();
        return Err(Problem::from(StoreError::unreachable(reason)).with_coherence(coherence));
    }
    let object_store = state.app.reader.offload.as_ref().and_then(|it| it.unavailability());
    let body = json!({
        "status": "ready",
        "coherence": coherence.name(),
        "reason": coherence.reason(),
        "write_failure": state.app.store.write_failure().as_deref(),
        "object_store": object_store.as_deref(),
    });
    Ok(([NEVER_CACHED], Json(body)))
}

/// `GET /metrics`: for Prometheus and others that read one of its formats.
pub(crate) async fn metrics(
    State(state): State<Arc<HttpState>>,
    headers: HeaderMap,
) -> impl IntoResponse {
    const BY_ACCEPT: (HeaderName, &str) = (VARY, "Accept");
    let (app, format) = (&state.app, accepted_exposition(&headers));
    let readings = GaugeReadings {
        held: app.cache.held(),
        known_keys: app.index.len(),
        coherence: app.index.coherence(),
    };
    let page = app.metrics.render(&readings, format);
    ([NEVER_CACHED, BY_ACCEPT, (CONTENT_TYPE, format.media_type())], page)
}
