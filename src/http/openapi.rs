//! The `OpenAPI` 3.1 description, from which programs make clients and tests.

use axum::http::HeaderName;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::IntoResponse;

/// `GET /openapi.json`.
pub(crate) async fn get() -> impl IntoResponse {
    const HEADERS: [(HeaderName, &str); 2] =
        [(CONTENT_TYPE, "application/json"), (CACHE_CONTROL, "max-age=3600")];
    (HEADERS, include_str!("openapi.json"))
}
