//! Errors as `application/problem+json` (RFC 9457), and the one place that gives an error its status.

use std::sync::Arc;

use axum::body::Body;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_TYPE, HeaderName, RETRY_AFTER, VARY, WWW_AUTHENTICATE,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{HeaderValue, Method, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::budget::OverBudget;
use crate::picture::PictureError;
use crate::read::ReadError;
use crate::render::RenderError;
use crate::store::{Coherence, StoreError};
use crate::write::WriteError;

/// After how many seconds a client may ask again when the store didn't answer.
const RETRY_AFTER_SECONDS: HeaderValue = HeaderValue::from_static("1");

/// What a client without leave may show (RFC 6750 §3).
const BEARER: HeaderValue = HeaderValue::from_static("Bearer realm=\"afterimage\"");

const ANOTHER_BEARER: HeaderValue =
    HeaderValue::from_static("Bearer realm=\"afterimage\", error=\"invalid_token\"");

/// An error answer. Never cacheable: what is wrong now may be right in the next moment.
#[derive(Debug)]
pub(crate) struct Problem {
    status: StatusCode,
    kind: &'static str,
    title: &'static str,
    detail: String,
    cause: Option<Cause>,
    coherence: Option<Coherence>,
}

/// What is behind an answer that isn't the client's fault: for the log, not for the client, since it may name
/// hosts. It travels as an extension of the response to where the request is logged.
#[derive(Debug, Clone)]
pub(crate) struct Cause(pub(crate) Arc<str>);

impl Problem {
    /// `kind` is the stable end of the problem's type; `detail` explains this very occurrence.
    pub(crate) fn new(
        status: StatusCode,
        kind: &'static str,
        title: &'static str,
        detail: impl Into<String>,
    ) -> Problem {
        Problem { status, kind, title, detail: detail.into(), cause: None, coherence: None }
    }

    pub(crate) fn bad_id(detail: &impl ToString) -> Problem {
        Problem::new(StatusCode::BAD_REQUEST, "bad-id", "not an image id", detail.to_string())
    }

    pub(crate) fn bad_parameter(detail: impl Into<String>) -> Problem {
        Problem::new(StatusCode::BAD_REQUEST, "bad-parameter", "bad parameter", detail)
    }

    pub(crate) fn bad_host(detail: &str) -> Problem {
        Problem::new(StatusCode::BAD_REQUEST, "bad-host", "bad host", detail)
    }

    pub(crate) fn precondition_failed(detail: &str) -> Problem {
        let status = StatusCode::PRECONDITION_FAILED;
        Problem::new(status, "precondition-failed", "precondition failed", detail)
    }

    pub(crate) fn range_not_satisfiable(detail: String) -> Problem {
        let status = StatusCode::RANGE_NOT_SATISFIABLE;
        Problem::new(status, "range-not-satisfiable", "range not satisfiable", detail)
    }

    /// Of a write without a token (RFC 6750 §3).
    pub(crate) fn unauthorised(detail: &str) -> Problem {
        Problem::new(StatusCode::UNAUTHORIZED, "unauthorised", "unauthorised", detail)
    }

    /// Of a write with a token that doesn't count (RFC 6750 §3.1).
    pub(crate) fn invalid_token(detail: &str) -> Problem {
        Problem::new(StatusCode::UNAUTHORIZED, "invalid-token", "invalid token", detail)
    }

    pub(crate) fn busy(detail: String) -> Problem {
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, "busy", "too busy", detail)
    }

    pub(crate) fn internal(cause: &str) -> Problem {
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        let problem = Problem::new(status, "internal", "internal error", "");
        Problem { cause: Some(Cause(cause.into())), ..problem }
    }

    pub(crate) fn stopping() -> Problem {
        let detail = "the server is about to stop";
        Problem::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", "stopping", detail)
    }

    /// Tells in members of its own how far the store can be relied upon (RFC 9457 §3.2).
    pub(crate) fn with_coherence(self, coherence: Coherence) -> Problem {
        Problem { coherence: Some(coherence), ..self }
    }

    /// Whether the image isn't there, or can't be had now.
    pub(crate) fn is_absence(&self) -> bool {
        let absent =
            [StatusCode::NOT_FOUND, StatusCode::SERVICE_UNAVAILABLE, StatusCode::GATEWAY_TIMEOUT];
        absent.contains(&self.status)
    }

    /// The stable end of the problem's type.
    pub(crate) fn kind(&self) -> &'static str {
        self.kind
    }

    pub(crate) fn unknown_address(path: &str) -> Problem {
        let detail = format!("there is nothing at {}", shortened(path));
        Problem::new(StatusCode::NOT_FOUND, "unknown-address", "no such address", detail)
    }

    pub(crate) fn method_not_allowed(method: &Method) -> Problem {
        let detail = format!("{} isn't in Allow", shortened(method.as_str()));
        Problem::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "method-not-allowed",
            "method not allowed",
            detail,
        )
    }
}

/// What a client sent, cut to what is sensible to send back.
fn shortened(text: &str) -> String {
    match text.chars().count() {
        0..=200 => text.to_owned(),
        _ => text.chars().take(200).chain(['…']).collect(),
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Problem {
        let cause = Some(Cause(error.to_string().into()));
        let problem = match error {
            StoreError::TimedOut => Problem::new(
                StatusCode::GATEWAY_TIMEOUT,
                "store-timeout",
                "store timeout",
                "the store didn't answer in time",
            ),
            StoreError::Unreachable(_)
            | StoreError::Refused(_)
            | StoreError::WrongType
            | StoreError::TooLarge { .. } => Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "store-unavailable",
                "store unavailable",
                "the store can't be reached, or refuses to answer",
            ),
        };
        Problem { cause, ..problem }
    }
}

impl From<OverBudget> for Problem {
    fn from(over_budget: OverBudget) -> Problem {
        Problem::busy(over_budget.to_string())
    }
}

impl From<ReadError> for Problem {
    fn from(error: ReadError) -> Problem {
        let detail = error.to_string();
        match error {
            ReadError::Absent => {
                Problem::new(StatusCode::NOT_FOUND, "absent", "no such image", detail)
            }
            ReadError::Corrupt(_) => {
                Problem::new(StatusCode::BAD_GATEWAY, "corrupt-record", "corrupt record", detail)
            }
            ReadError::Offload(error) => {
                let (status, detail) =
                    (StatusCode::BAD_GATEWAY, "the object store didn't give the image");
                let problem = Problem::new(status, "origin-failed", "origin failed", detail);
                Problem { cause: Some(Cause(error.to_string().into())), ..problem }
            }
            ReadError::Store(error) => error.into(),
            ReadError::Busy => Problem::busy(detail),
            ReadError::OverBudget(over_budget) => over_budget.into(),
            ReadError::NotAcceptable(_) => {
                let status = StatusCode::NOT_ACCEPTABLE;
                Problem::new(status, "not-acceptable", "not acceptable", detail)
            }
            ReadError::Render(error) => error.into(),
            ReadError::Lost(_) => Problem::internal("a fetch ended without an outcome"),
        }
    }
}

impl From<RenderError> for Problem {
    fn from(error: RenderError) -> Problem {
        let detail = error.to_string();
        match error {
            RenderError::Busy => Problem::busy(detail),
            RenderError::Lost(_) => Problem::internal("a render ended without an outcome"),
            RenderError::Picture(PictureError::TooManyPixels { .. }) => Problem::new(
                StatusCode::PAYLOAD_TOO_LARGE,
                "too-many-pixels",
                "too many pixels",
                detail,
            ),
            RenderError::Picture(PictureError::TimedOut) => {
                let status = StatusCode::SERVICE_UNAVAILABLE;
                Problem::new(status, "render-timeout", "the picture takes too long", detail)
            }
            RenderError::Picture(PictureError::Opaque(_)) => {
                Problem::new(StatusCode::NOT_ACCEPTABLE, "not-acceptable", "not acceptable", detail)
            }
            RenderError::Picture(PictureError::Broken(_) | PictureError::Encoding(_)) => {
                Problem::new(StatusCode::BAD_GATEWAY, "broken-image", "broken image", detail)
            }
        }
    }
}

impl From<WriteError> for Problem {
    fn from(error: WriteError) -> Problem {
        let detail = error.to_string();
        match error {
            WriteError::Corrupt(_) | WriteError::Offloaded => Problem::new(
                StatusCode::BAD_REQUEST,
                "not-an-image",
                "not an image, nor a record of one",
                detail,
            ),
            WriteError::Mistyped { .. } => {
                let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
                Problem::new(status, "media-type", "unsupported media type", detail)
            }
            WriteError::TooLarge { .. } => {
                let status = StatusCode::PAYLOAD_TOO_LARGE;
                Problem::new(status, "body-too-large", "the body is too large", detail)
            }
            WriteError::PreconditionFailed => Problem::precondition_failed(&detail),
            WriteError::Absent => ReadError::Absent.into(),
            WriteError::Store(error) => error.into(),
        }
    }
}

/// The members of RFC 9457 §3.1.
#[derive(Serialize)]
struct Members<'a> {
    r#type: String,
    title: &'a str,
    status: u16,
    #[serde(skip_serializing_if = "str::is_empty")]
    detail: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    coherence: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let members = Members {
            r#type: format!("urn:problem:afterimage:{}", self.kind),
            title: self.title,
            status: self.status.as_u16(),
            detail: &self.detail,
            coherence: self.coherence.as_ref().map(Coherence::name),
            reason: self.coherence.as_ref().and_then(Coherence::reason),
        };
        let body = serde_json::to_vec(&members).expect("strings and a number are JSON");
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        let fixed: [(HeaderName, &'static str); 4] = [
            (CONTENT_TYPE, "application/problem+json"),
            (CACHE_CONTROL, "no-store"),
            (VARY, "Accept-Encoding"),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        ];
        for (name, value) in fixed {
            headers.insert(name, HeaderValue::from_static(value));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let shown = self.kind == "invalid-token";
            headers.insert(WWW_AUTHENTICATE, if shown { ANOTHER_BEARER } else { BEARER });
        }
        if self.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, RETRY_AFTER_SECONDS);
        }
        if let Some(cause) = self.cause {
            response.extensions_mut().insert(cause);
        }
        response
    }
}
