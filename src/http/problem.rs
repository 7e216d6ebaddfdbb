//! Error answers as `application/problem+json` (RFC 9457). Only this module gives an error its status.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::header::{
    CACHE_CONTROL, CONNECTION, CONTENT_TYPE, HeaderName, RETRY_AFTER, VARY, WWW_AUTHENTICATE,
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

/// Delay after which a client may try again when the store didn't answer, or the server is at a limit.
const RETRY_AFTER_503: Duration = Duration::from_secs(1);

/// The challenge to a client without a token (RFC 6750 §3).
const BEARER: HeaderValue = HeaderValue::from_static("Bearer realm=\"afterimage\"");

/// The challenge to a client with a token that isn't valid (RFC 6750 §3.1).
const INVALID_TOKEN: HeaderValue =
    HeaderValue::from_static("Bearer realm=\"afterimage\", error=\"invalid_token\"");

/// Declares [`ProblemKind`] by one table, so that no kind lacks its status, its title or its place in `ALL`.
macro_rules! problem_kinds {
    ($($kind:ident = $status:ident, $name:literal, $title:literal;)+) => {
        /// The kind of a problem. It decides the status, the title, and the type that clients tell problems apart by.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum ProblemKind {
            $(#[doc = $title] $kind,)+
        }

        impl ProblemKind {
            /// All kinds, ordered by status.
            pub const ALL: &[ProblemKind] = &[$(ProblemKind::$kind,)+];

            /// The status of an answer of this kind.
            #[must_use]
            pub const fn status(self) -> StatusCode {
                match self {
                    $(ProblemKind::$kind => StatusCode::$status,)+
                }
            }

            /// The stable end of the type, which is `urn:problem:afterimage:` and this.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(ProblemKind::$kind => $name,)+
                }
            }

            /// The title: the same for each occurrence (RFC 9457 §3.1.3).
            #[must_use]
            pub const fn title(self) -> &'static str {
                match self {
                    $(ProblemKind::$kind => $title,)+
                }
            }
        }
    };
}

problem_kinds! {
    BadHost = BAD_REQUEST, "bad-host", "bad host";
    BadId = BAD_REQUEST, "bad-id", "not an image id";
    BadParameter = BAD_REQUEST, "bad-parameter", "bad parameter";
    BadDigest = BAD_REQUEST, "bad-digest", "bad digest";
    BodyIncomplete = BAD_REQUEST, "body-incomplete", "the body can't be read";
    DigestMismatch = BAD_REQUEST, "digest-mismatch", "digest mismatch";
    NotAnImage = BAD_REQUEST, "not-an-image", "not an image, nor a record of one";
    PartialPut = BAD_REQUEST, "partial-put", "partial PUT";
    InvalidToken = UNAUTHORIZED, "invalid-token", "invalid token";
    Unauthorised = UNAUTHORIZED, "unauthorised", "unauthorised";
    ListingOff = FORBIDDEN, "listing-off", "listing is switched off";
    NotFromHere = FORBIDDEN, "not-from-here", "writes are local";
    ReadOnly = FORBIDDEN, "read-only", "read only";
    Absent = NOT_FOUND, "absent", "no such image";
    UnknownAddress = NOT_FOUND, "unknown-address", "no such address";
    MethodNotAllowed = METHOD_NOT_ALLOWED, "method-not-allowed", "method not allowed";
    NotAcceptable = NOT_ACCEPTABLE, "not-acceptable", "not acceptable";
    BodyTimeout = REQUEST_TIMEOUT, "body-timeout", "the body took too long";
    PreconditionFailed = PRECONDITION_FAILED, "precondition-failed", "precondition failed";
    BodyTooLarge = PAYLOAD_TOO_LARGE, "body-too-large", "the body is too large";
    TooManyPixels = PAYLOAD_TOO_LARGE, "too-many-pixels", "too many pixels";
    MediaType = UNSUPPORTED_MEDIA_TYPE, "media-type", "unsupported media type";
    RangeNotSatisfiable = RANGE_NOT_SATISFIABLE, "range-not-satisfiable", "range not satisfiable";
    Misdirected = MISDIRECTED_REQUEST, "misdirected", "not a host of this server's";
    Internal = INTERNAL_SERVER_ERROR, "internal", "internal error";
    CorruptRecord = BAD_GATEWAY, "corrupt-record", "corrupt record";
    OriginFailed = BAD_GATEWAY, "origin-failed", "origin failed";
    Busy = SERVICE_UNAVAILABLE, "busy", "too busy";
    RenderTimeout = SERVICE_UNAVAILABLE, "render-timeout", "the picture takes too long";
    Stopping = SERVICE_UNAVAILABLE, "stopping", "stopping";
    StoreUnavailable = SERVICE_UNAVAILABLE, "store-unavailable", "store unavailable";
    StoreTimeout = GATEWAY_TIMEOUT, "store-timeout", "store timeout";
    DiskFull = INSUFFICIENT_STORAGE, "disk-full", "disk full";
}

/// An error answer. Never cacheable: the next request may succeed.
#[derive(Debug)]
pub(crate) struct Problem {
    kind: ProblemKind,
    /// Explains this very occurrence to the client.
    detail: String,
    cause: Option<Cause>,
    coherence: Option<Coherence>,
    /// Delay after which the client may try again. A 503 has one in any case.
    retry_after: Option<Duration>,
}

/// The cause of an error that isn't the client's fault. It goes to the log and not to the client, since it may name
/// hosts: it travels as an extension of the response to the place that logs the request.
#[derive(Debug, Clone)]
pub(crate) struct Cause(pub(crate) Arc<str>);

impl Problem {
    pub(crate) fn new(kind: ProblemKind, detail: impl Into<String>) -> Problem {
        let retry_after =
            (kind.status() == StatusCode::SERVICE_UNAVAILABLE).then_some(RETRY_AFTER_503);
        Problem { kind, detail: detail.into(), cause: None, coherence: None, retry_after }
    }

    pub(crate) fn bad_id(detail: &impl ToString) -> Problem {
        Problem::new(ProblemKind::BadId, detail.to_string())
    }

    pub(crate) fn bad_parameter(detail: impl Into<String>) -> Problem {
        Problem::new(ProblemKind::BadParameter, detail)
    }

    pub(crate) fn bad_host(detail: &str) -> Problem {
        Problem::new(ProblemKind::BadHost, detail)
    }

    /// Answers a request for a host that isn't answered, or not with this.
    pub(crate) fn misdirected() -> Problem {
        let detail = "the host must be localhost, an IP address or one of [http] hosts";
        Problem::new(ProblemKind::Misdirected, detail)
    }

    pub(crate) fn precondition_failed(detail: &str) -> Problem {
        Problem::new(ProblemKind::PreconditionFailed, detail)
    }

    pub(crate) fn range_not_satisfiable(detail: String) -> Problem {
        Problem::new(ProblemKind::RangeNotSatisfiable, detail)
    }

    pub(crate) fn busy(detail: String) -> Problem {
        Problem::new(ProblemKind::Busy, detail)
    }

    pub(crate) fn internal(cause: &str) -> Problem {
        Problem::new(ProblemKind::Internal, "").caused_by(cause)
    }

    pub(crate) fn stopping() -> Problem {
        Problem::new(ProblemKind::Stopping, "the server is about to stop")
    }

    pub(crate) fn unknown_address(path: &str) -> Problem {
        let detail = format!("there is nothing at {}", shortened(path));
        Problem::new(ProblemKind::UnknownAddress, detail)
    }

    pub(crate) fn method_not_allowed(method: &Method) -> Problem {
        let detail = format!("{} isn't in Allow", shortened(method.as_str()));
        Problem::new(ProblemKind::MethodNotAllowed, detail)
    }

    fn caused_by(self, cause: impl Into<Arc<str>>) -> Problem {
        Problem { cause: Some(Cause(cause.into())), ..self }
    }

    /// Adds the state of coherence as members of its own (RFC 9457 §3.2).
    pub(crate) fn with_coherence(self, coherence: Coherence) -> Problem {
        Problem { coherence: Some(coherence), ..self }
    }

    pub(crate) fn kind(&self) -> ProblemKind {
        self.kind
    }

    /// True where the image doesn't exist or can't be had now.
    pub(crate) fn is_absence(&self) -> bool {
        matches!(
            self.kind.status(),
            StatusCode::NOT_FOUND | StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT
        )
    }
}

/// Cuts a text of the client's to a length that is sensible to send back.
fn shortened(text: &str) -> String {
    match text.chars().count() {
        0..=200 => text.to_owned(),
        _ => text.chars().take(200).chain(['…']).collect(),
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Problem {
        let (kind, detail) = match &error {
            // The system's own words, which name no host and no path.
            StoreError::DiskFull(_) => {
                return Problem::new(ProblemKind::DiskFull, error.to_string())
                    .caused_by(error.to_string());
            }
            StoreError::TimedOut => (ProblemKind::StoreTimeout, "the store didn't answer in time"),
            StoreError::Unreachable(_)
            | StoreError::Forbidden(_)
            | StoreError::Refused(_)
            | StoreError::WrongType
            | StoreError::TooLarge { .. } => {
                let detail = "the store can't be reached, or refuses to answer";
                (ProblemKind::StoreUnavailable, detail)
            }
        };
        Problem::new(kind, detail).caused_by(error.to_string())
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
            ReadError::Absent => Problem::new(ProblemKind::Absent, detail),
            ReadError::Corrupt(_) => Problem::new(ProblemKind::CorruptRecord, detail),
            ReadError::Offload(error) => {
                let detail = "the object store didn't give the image";
                let problem = Problem::new(ProblemKind::OriginFailed, detail);
                let retry_after = error.retry_after();
                Problem { retry_after, ..problem.caused_by(error.to_string()) }
            }
            ReadError::Store(error) => error.into(),
            ReadError::Busy => Problem::busy(detail),
            ReadError::OverBudget(over_budget) => over_budget.into(),
            ReadError::NotAcceptable(_) => Problem::new(ProblemKind::NotAcceptable, detail),
            ReadError::Impossible { error, .. } => {
                let kind = match error {
                    PictureError::TooManyPixels { .. } | PictureError::TooMuchMemory { .. } => {
                        ProblemKind::TooManyPixels
                    }
                    _ => ProblemKind::NotAcceptable,
                };
                Problem::new(kind, detail)
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
            RenderError::Busy | RenderError::GivenUp | RenderError::Unavailable(_) => {
                Problem::busy(detail)
            }
            RenderError::OverBudget(over_budget) => over_budget.into(),
            RenderError::Lost(_) => Problem::internal("a render ended without an outcome"),
            RenderError::Picture(error) if error.is_timeout() => {
                Problem::new(ProblemKind::RenderTimeout, detail)
            }
            // Of a picture that is drawn here: an image has its own answers.
            RenderError::Picture(_) => Problem::internal(&detail),
        }
    }
}

impl From<WriteError> for Problem {
    fn from(error: WriteError) -> Problem {
        let detail = error.to_string();
        match error {
            WriteError::Corrupt(_) | WriteError::Offloaded | WriteError::Broken(_) => {
                Problem::new(ProblemKind::NotAnImage, detail)
            }
            WriteError::Mistyped { .. } => Problem::new(ProblemKind::MediaType, detail),
            WriteError::TooLarge { .. } => Problem::new(ProblemKind::BodyTooLarge, detail),
            WriteError::PreconditionFailed => Problem::precondition_failed(&detail),
            WriteError::Absent => ReadError::Absent.into(),
            WriteError::Render(error) => error.into(),
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
        let status = self.kind.status();
        let members = Members {
            r#type: format!("urn:problem:afterimage:{}", self.kind.as_str()),
            title: self.kind.title(),
            status: status.as_u16(),
            detail: &self.detail,
            coherence: self.coherence.as_ref().map(Coherence::name),
            reason: self.coherence.as_ref().and_then(Coherence::reason),
        };
        let body = serde_json::to_vec(&members).expect("strings and a number are JSON");
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
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
        if status == StatusCode::UNAUTHORIZED {
            let shown = self.kind == ProblemKind::InvalidToken;
            headers.insert(WWW_AUTHENTICATE, if shown { INVALID_TOKEN } else { BEARER });
        }
        if let Some(delay) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(delay.as_secs().max(1)));
        }
        if let Some(cause) = self.cause {
            response.extensions_mut().insert(cause);
        }
        response
    }
}
/// The answer to a head over `[limits] header_bytes`: the same as the HTTP library's, which ends the connection too.
pub(crate) fn head_too_large() -> Response {
    let status = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
    (status, [(CONNECTION, HeaderValue::from_static("close"))]).into_response()
}
