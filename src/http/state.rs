//! The state that the handlers share.

use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use axum::http::HeaderValue;
use tokio::sync::Semaphore;

use super::gallery::Gallery;
use super::router::Route;
use super::{events, export, representation};
use crate::app::App;
use crate::events::Events;
use crate::recent::Recent;

/// The app, and the parts of a server that only HTTP needs. The listeners of a server share it.
#[derive(Debug)]
pub(crate) struct HttpState {
    pub(crate) app: Arc<App>,
    /// `Cache-Control` of an image under its plain address.
    pub(crate) fresh: HeaderValue,
    /// Opens event streams.
    pub(crate) events: Events,
    /// The figures of the last minutes.
    pub(crate) recent: Recent,
    /// Put together for the first that asks, so that a start doesn't wait for its compression.
    pub(crate) gallery: OnceLock<Gallery>,
    /// Leave to make a backup.
    pub(crate) exports: Arc<Semaphore>,
    /// Time of the start.
    pub(crate) started: SystemTime,
}

impl HttpState {
    pub(crate) fn new(app: Arc<App>) -> HttpState {
        let fresh = representation::cache_control(&app.settings.http);
        let events = Events::start(&app.hub, &app.reader, events::encode, &app.settings);
        let recent = Recent::start(&app.metrics, Route::Image.pattern());
        HttpState {
            app,
            fresh,
            events,
            recent,
            gallery: OnceLock::new(),
            exports: Arc::new(Semaphore::new(export::MOST)),
            started: SystemTime::now(),
        }
    }
}
