//! The state that the handlers share.

use std::sync::Arc;

use axum::http::HeaderValue;

use super::{events, representation};
use crate::app::App;
use crate::events::Events;

/// The app, and the parts of a server that only HTTP needs. The listeners of a server share it.
#[derive(Debug)]
pub(crate) struct HttpState {
    pub(crate) app: Arc<App>,
    /// `Cache-Control` of an image under its plain address.
    pub(crate) fresh: HeaderValue,
    /// Opens event streams.
    pub(crate) events: Events,
}

impl HttpState {
    pub(crate) fn new(app: Arc<App>) -> HttpState {
        let fresh = representation::cache_control(&app.settings.http);
        let events = Events::start(&app.hub, &app.reader, events::encode, &app.settings);
        HttpState { app, fresh, events }
    }
}
