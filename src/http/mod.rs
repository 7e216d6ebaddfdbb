//! HTTP: the only part that knows of methods, headers and status codes.

use axum::http::HeaderName;

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

/// RFC 9211.
pub(crate) const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// W3C Server Timing.
pub(crate) const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// By which a request is found in the logs of all who saw it.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
