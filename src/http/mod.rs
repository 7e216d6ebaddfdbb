//! HTTP: the only part that knows of methods, headers and status codes.

use std::sync::Arc;

use axum::http::HeaderName;

use crate::image::Facts;

mod access;
pub mod client;
mod conditional;
mod cors;
mod digest;
mod events;
mod images;
mod info;
mod negotiation;
mod openapi;
mod ops;
mod parameters;
mod placeholders;
pub(crate) mod problem;
pub mod router;
mod writes;

/// Goes along with an answer about an image that came from memory as it is there.
#[derive(Debug, Clone)]
pub(crate) struct FromMemory(pub(crate) Arc<Facts>);

/// RFC 9211.
pub(crate) const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// W3C Server Timing.
pub(crate) const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// By which a request is found in the logs of all who saw it.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
