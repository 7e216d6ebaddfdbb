//! Spans in a build without the feature `otlp`: there are none.

use std::time::Instant;

use axum::http::{HeaderValue, Method, StatusCode, Version};

use crate::peer::Client;
use crate::trace::TraceContext;

/// A span that can't be.
#[derive(Debug)]
pub(crate) enum RequestSpan {}

/// The parts of a request that its span would have.
#[derive(Debug)]
#[expect(dead_code, reason = "for the feature otlp")]
pub(crate) struct Begun<'a> {
    pub(crate) parent: Option<TraceContext>,
    pub(crate) began: Instant,
    pub(crate) method: &'a Method,
    pub(crate) route: &'static str,
    pub(crate) target: &'a str,
    pub(crate) version: Version,
    pub(crate) client: Client,
}

impl RequestSpan {
    pub(crate) fn begin(_begun: &Begun<'_>) -> Option<RequestSpan> {
        None
    }

    pub(crate) fn context(&self) -> TraceContext {
        match *self {}
    }

    pub(crate) fn answered(
        self,
        _status: StatusCode,
        _cache: Option<&HeaderValue>,
        _error: Option<&str>,
    ) -> RequestSpan {
        match self {}
    }

    pub(crate) fn end(self, _bytes: u64) {
        match self {}
    }
}

/// A step without a span.
#[derive(Debug)]
pub(crate) struct Step;

impl Step {
    pub(crate) fn begin(_name: &'static str) -> Step {
        Step
    }
}
