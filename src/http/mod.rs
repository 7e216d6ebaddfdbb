//! HTTP: the only part that knows of methods, headers and status codes.

use std::sync::Arc;

use axum::http::HeaderName;

use crate::image::Metadata;

pub mod auth;
pub(crate) mod cached_head;
mod conditional;
mod cors;
mod digest;
pub(crate) mod events;
pub(crate) mod fast_path;
mod images;
mod info;
mod negotiation;
mod openapi;
mod ops;
mod params;
mod placeholders;
pub(crate) mod problem;
pub mod router;
pub(crate) mod service;
mod urls;
mod writes;

pub use problem::ProblemKind;

/// Goes along with an answer about an image that came from memory as it is there.
#[derive(Debug, Clone)]
pub(crate) struct FromMemory(pub(crate) Arc<Metadata>);

/// RFC 9211.
pub(crate) const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// W3C Server Timing.
pub(crate) const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// By which a request is found in the logs of all who saw it.
pub(crate) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
