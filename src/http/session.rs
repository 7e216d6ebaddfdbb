//! `/session`: a browser's cookie in place of a token, which a page can't keep safely and `EventSource` can't send.

use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::header::{ORIGIN, SET_COOKIE};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};

use super::problem::Problem;
use super::state::HttpState;
use super::{NEVER_CACHED, auth};

/// `POST /session` with a bearer token.
pub(crate) async fn post(
    State(state): State<Arc<HttpState>>,
    request: Request,
) -> Result<Response, Problem> {
    let session = auth::begin_session(&state.app, &request)?;
    Ok(with_cookie(request.headers(), &session, ""))
}

/// `DELETE /session`.
pub(crate) async fn delete(headers: HeaderMap) -> Response {
    with_cookie(&headers, "", "; Max-Age=0")
}

fn with_cookie(headers: &HeaderMap, session: &str, attributes: &str) -> Response {
    let name = auth::session_cookie(headers);
    let is_secure = headers.get(ORIGIN).is_some_and(|it| it.as_bytes().starts_with(b"https://"));
    let secure = if is_secure { "; Secure" } else { "" };
    let cookie = format!("{name}={session}; Path=/; HttpOnly; SameSite=Strict{secure}{attributes}");
    let cookie = HeaderValue::try_from(cookie).expect("names and digits are ASCII");
    (StatusCode::NO_CONTENT, [NEVER_CACHED], [(SET_COOKIE, cookie)]).into_response()
}
