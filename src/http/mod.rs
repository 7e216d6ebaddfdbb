//! HTTP: the only part that knows methods, headers and status codes.

use std::sync::Arc;

use axum::http::HeaderName;
use axum::http::header::CACHE_CONTROL;

use crate::image::Metadata;

pub(crate) mod auth;
pub(crate) mod cached_head;
mod combined_log;
mod common_headers;
pub(crate) mod conditional;
mod cors;
pub(crate) mod digest;
pub(crate) mod events;
mod export;
pub(crate) mod fast_path;
pub(crate) mod forwarded;
mod gallery;
pub(crate) mod host;
mod images;
pub(crate) mod in_flight;
mod info;
mod json;
mod listing;
pub(crate) mod negotiation;
mod openapi;
mod ops;
pub(crate) mod params;
mod placeholders;
pub(crate) mod problem;
pub(crate) mod representation;
mod request_id;
pub(crate) mod router;
pub(crate) mod service;
mod session;
pub(crate) mod state;
mod status;
mod unread;
mod urls;
mod writes;

pub use problem::ProblemKind;

/// An extension of an answer that came from memory: the metadata of its representation.
#[derive(Debug, Clone)]
pub(crate) struct FromMemory(pub(crate) Arc<Metadata>);

/// For what is true for a moment only.
const NEVER_CACHED: (HeaderName, &str) = (CACHE_CONTROL, "no-store");

/// RFC 9211.
pub(crate) const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// W3C Server Timing.
pub(crate) const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

pub(crate) use request_id::REQUEST_ID;
