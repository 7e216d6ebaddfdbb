//! `GET /`: the gallery, one page that is put together from three files at the start.

use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderName;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, REFERRER_POLICY,
};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::state::HttpState;

const ROBOTS: HeaderName = HeaderName::from_static("x-robots-tag");

/// The page, and the policy that lets it run its own script and nothing else (Content Security Policy Level 3).
#[derive(Debug)]
pub(crate) struct Gallery {
    page: Bytes,
    policy: HeaderValue,
}

impl Gallery {
    /// Puts the page together.
    pub(crate) fn new() -> Gallery {
        let (style, script) = (include_str!("style.css"), include_str!("app.js"));
        let page = include_str!("index.html")
            .replacen("<style></style>", &format!("<style>{style}</style>"), 1)
            .replacen("<script></script>", &format!("<script>{script}</script>"), 1);
        let policy = format!(
            "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; img-src 'self' data: blob:; \
             connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            STANDARD.encode(Sha256::digest(script)),
            STANDARD.encode(Sha256::digest(style)),
        );
        let policy = HeaderValue::try_from(policy).expect("base64 is ASCII");
        Gallery { page: Bytes::from(page), policy }
    }
}

/// `GET /`. The page has nothing of anybody's in it: what it shows, it asks for with a right to see it.
pub(crate) async fn get(State(state): State<Arc<HttpState>>) -> Response {
    let fixed = |text| HeaderValue::from_static(text);
    let headers = [
        (CONTENT_TYPE, fixed("text/html; charset=utf-8")),
        (CACHE_CONTROL, fixed("no-store")),
        (CONTENT_SECURITY_POLICY, state.gallery.policy.clone()),
        (REFERRER_POLICY, fixed("no-referrer")),
        (ROBOTS, fixed("noindex")),
    ];
    (headers, state.gallery.page.clone()).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_whole_and_small() {
        let page = Gallery::new().page;
        let text = std::str::from_utf8(&page).unwrap();
        assert!(text.matches("<style>").count() == 1 && text.matches("<script>").count() == 1);
        assert!(!text.contains("<style></style>") && !text.contains("<script></script>"));
        assert!(page.len() < 40 * 1024, "{} bytes", page.len());
        // Nothing of another host's.
        assert!(
            !text.contains("src=\"http") && !text.contains("@import") && !text.contains("url(http")
        );
    }
}
