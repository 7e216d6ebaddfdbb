//! The one table of routes and the one stack of layers.

use std::sync::Arc;

use axum::Router;
use axum::http::{Method, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tower_http::catch_panic::CatchPanicLayer;

use super::problem::Problem;
use super::state::HttpState;
use super::{
    cors, events, export, gallery, images, info, listing, openapi, ops, placeholders, session,
    status, writes,
};
use crate::app::App;

/// Kinds of address, by which requests are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "their patterns say it")]
pub enum Route {
    Images,
    Image,
    Thumbnail,
    Info,
    Placeholder,
    Events,
    OpenApi,
    Healthz,
    Readyz,
    Metrics,
    Gallery,
    Session,
    Status,
    Debug,
    Export,
    /// An address without a route.
    Unknown,
}

impl Route {
    /// Returns the route of a path, whatever the method.
    #[must_use]
    pub fn of(path: &str) -> Route {
        let known = [
            Route::Images,
            Route::Events,
            Route::OpenApi,
            Route::Healthz,
            Route::Readyz,
            Route::Metrics,
            Route::Gallery,
            Route::Session,
            Route::Status,
            Route::Export,
        ];
        match path.strip_prefix("/images/").map(|rest| rest.split_once('/')) {
            Some(Some((_, "thumbnail"))) => Route::Thumbnail,
            Some(Some((_, "info"))) => Route::Info,
            Some(_) => Route::Image,
            None if path.starts_with("/placeholders/") => Route::Placeholder,
            None if path.starts_with("/debug/images/") => Route::Debug,
            None => known.into_iter().find(|it| it.pattern() == path).unwrap_or(Route::Unknown),
        }
    }

    /// Returns whether it tells of the service and not of images.
    #[must_use]
    pub const fn is_for_operators(self) -> bool {
        matches!(self, Route::Healthz | Route::Readyz | Route::Metrics)
    }

    /// Returns whether it is for those who look after the images.
    #[must_use]
    pub const fn is_of_gallery(self) -> bool {
        matches!(
            self,
            Route::Gallery | Route::Session | Route::Status | Route::Debug | Route::Export
        )
    }

    /// Returns whether its answers are images, or say why there is none.
    #[must_use]
    pub const fn is_of_images(self) -> bool {
        matches!(
            self,
            Route::Images | Route::Image | Route::Thumbnail | Route::Info | Route::Placeholder
        )
    }

    /// Returns its pattern in the table.
    #[must_use]
    pub const fn pattern(self) -> &'static str {
        match self {
            Route::Images => "/images",
            Route::Image => "/images/{id}",
            Route::Thumbnail => "/images/{id}/thumbnail",
            Route::Info => "/images/{id}/info",
            Route::Placeholder => "/placeholders/{size}",
            Route::Events => "/events",
            Route::OpenApi => "/openapi.json",
            Route::Healthz => "/healthz",
            Route::Readyz => "/readyz",
            Route::Metrics => "/metrics",
            Route::Gallery => "/",
            Route::Session => "/session",
            Route::Status => "/status",
            Route::Debug => "/debug/images/{id}",
            Route::Export => "/export",
            Route::Unknown => "unknown",
        }
    }
}

/// The routes of a listener.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Routes {
    /// All of them.
    All,
    /// Those for the public: the operators have a listener of their own.
    Public,
    /// Those for operators.
    Admin,
}

/// Builds the router of a listener.
pub(crate) fn router(state: &Arc<HttpState>, routes: Routes) -> Router {
    let app = &state.app;
    let operations = Router::new()
        .route(Route::Healthz.pattern(), get(ops::healthz))
        .route(Route::Readyz.pattern(), get(ops::readyz))
        .route(Route::Metrics.pattern(), get(ops::metrics))
        .method_not_allowed_fallback(method_not_allowed);
    let has_gallery = app.settings.gallery.enabled && routes != Routes::Public;
    let images = public(app, has_gallery);
    let table = match routes {
        Routes::All => images.merge(operations),
        Routes::Public => images,
        // The gallery shows images, follows them and writes them.
        Routes::Admin if has_gallery => images.merge(operations),
        Routes::Admin => operations.fallback(unknown_address),
    };
    let table = if has_gallery { table.merge(gallery()) } else { table };
    table.layer(CatchPanicLayer::custom(panicked)).with_state(Arc::clone(state))
}

/// Builds the routes of those who look after the images.
fn gallery() -> Router<Arc<HttpState>> {
    Router::new()
        .route(Route::Gallery.pattern(), get(gallery::get))
        .route(Route::Session.pattern(), post(session::post).delete(session::delete))
        .route(Route::Status.pattern(), get(status::get))
        .route(Route::Debug.pattern(), get(status::debug))
        .route(Route::Export.pattern(), get(export::get))
        .method_not_allowed_fallback(method_not_allowed)
}

/// Builds the routes for the public. A script of another origin may read errors as well, so its leave is given outside
/// of everything else.
fn public(app: &App, has_listing: bool) -> Router<Arc<HttpState>> {
    let all_images = post(writes::post);
    let all_images = if has_listing { all_images.get(listing::get) } else { all_images };
    let images = Router::new()
        .route(Route::Images.pattern(), all_images)
        .route(Route::Image.pattern(), get(images::get).put(writes::put).delete(writes::delete))
        .route(Route::Thumbnail.pattern(), get(images::thumbnail))
        .route(Route::Info.pattern(), get(info::get))
        .route(Route::Placeholder.pattern(), get(placeholders::get))
        .route(Route::Events.pattern(), get(events::get))
        .route(Route::OpenApi.pattern(), get(openapi::get))
        .method_not_allowed_fallback(method_not_allowed)
        .fallback(unknown_image_or_address)
        .layer(CatchPanicLayer::custom(panicked));
    match cors::layer(&app.settings.http.cors_origins) {
        Some(layer) => images.layer(layer),
        None => images,
    }
}

/// Answers an address without a route. An id with a slash in it matches no route; it is a bad id all the same.
async fn unknown_image_or_address(uri: Uri) -> Problem {
    match Route::of(uri.path()) {
        Route::Image => Problem::bad_id(&"the id must have a character, and no slash"),
        Route::Images
        | Route::Thumbnail
        | Route::Info
        | Route::Placeholder
        | Route::Events
        | Route::OpenApi
        | Route::Healthz
        | Route::Readyz
        | Route::Metrics
        | Route::Gallery
        | Route::Session
        | Route::Status
        | Route::Debug
        | Route::Export
        | Route::Unknown => Problem::unknown_address(uri.path()),
    }
}

async fn unknown_address(uri: Uri) -> Problem {
    Problem::unknown_address(uri.path())
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
    Problem::internal(&format!("a request panicked: {text}")).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_counted_under_the_route_that_answers_it() {
        for route in [
            Route::Images,
            Route::Image,
            Route::Thumbnail,
            Route::Info,
            Route::Placeholder,
            Route::Events,
            Route::OpenApi,
            Route::Healthz,
            Route::Readyz,
            Route::Metrics,
            Route::Gallery,
            Route::Session,
            Route::Status,
            Route::Debug,
            Route::Export,
        ] {
            assert_eq!(Route::of(route.pattern()), route);
        }
        assert_eq!(Route::of("/images/a/b"), Route::Image);
        assert_eq!(Route::of("/nothing"), Route::Unknown);
        assert_eq!(Route::of("/metrics/"), Route::Unknown);
    }
}
