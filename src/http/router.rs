//! The one table of routes and the one stack of layers.

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::{Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tower_http::catch_panic::CatchPanicLayer;

use super::problem::Problem;
pub use super::writes::Peer;
use super::{images, ops, writes};
use crate::app::App;

/// Every route of the service.
pub fn router(app: Arc<App>) -> Router {
    let max_body = app.settings.records.max_value;
    Router::new()
        .route("/images/{id}", get(images::get).put(writes::put))
        .route("/healthz", get(ops::healthz))
        .route("/readyz", get(ops::readyz))
        .route("/metrics", get(ops::metrics))
        .fallback(unknown_address)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(DefaultBodyLimit::max(max_body))
        .layer(CatchPanicLayer::custom(panicked))
        .with_state(app)
}

/// An id with a slash in it matches no route; it is a bad id all the same.
async fn unknown_address(uri: Uri) -> Problem {
    if uri.path().starts_with("/images/") {
        Problem::bad_id(&"the id is empty, or has a slash in it")
    } else {
        Problem::unknown_address(uri.path())
    }
}

async fn method_not_allowed(method: Method) -> Problem {
    Problem::method_not_allowed(&method)
}

#[expect(clippy::needless_pass_by_value, reason = "the layer hands the panic over")]
fn panicked(panic: Box<dyn std::any::Any + Send>) -> Response {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("unknown");
    tracing::error!(panic = text, "a request panicked");
    Problem::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", "internal error", String::new())
        .into_response()
}
