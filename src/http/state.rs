//! The state that the handlers share.

use std::sync::Arc;

use axum::http::HeaderValue;

use super::representation;
use crate::app::App;

/// The app, and values that are made of its settings once.
#[derive(Debug)]
pub(crate) struct HttpState {
    pub(crate) app: Arc<App>,
    /// `Cache-Control` of an image under its plain address.
    pub(crate) fresh: HeaderValue,
}

impl HttpState {
    pub(crate) fn new(app: Arc<App>) -> HttpState {
        let fresh = representation::cache_control(&app.settings.http);
        HttpState { app, fresh }
    }
}
