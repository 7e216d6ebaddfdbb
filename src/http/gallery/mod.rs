//! `GET /`: the gallery, one page that is put together from three files.

use std::sync::Arc;

use axum::extract::State;
use axum::http::header::{
    CONTENT_ENCODING, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue,
    REFERRER_POLICY, VARY,
};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::state::HttpState;
use super::{NEVER_CACHED, negotiation};
use crate::image::coding::Coding;

const ROBOTS: HeaderName = HeaderName::from_static("x-robots-tag");

/// The page, and the policy that lets it run its own script and nothing else (Content Security Policy Level 3).
#[derive(Debug)]
pub(crate) struct Gallery {
    page: Bytes,
    gzip: Option<Bytes>,
    policy: HeaderValue,
}

impl Gallery {
    /// Puts the page together.
    pub(crate) fn new() -> Gallery {
        let (style, script) = (include_str!("style.css"), include_str!("app.js"));
        let page = include_str!("index.html")
            .replacen("<style></style>", &format!("<style>{style}</style>"), 1)
            .replacen("<script></script>", &format!("<script>{script}</script>"), 1);
        // Not Brotli: it saves 4 % and takes 70 ms.
        let gzip = Coding::Gzip.encode(page.as_bytes()).map(Bytes::from);
        let policy = format!(
            "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; img-src 'self' data: blob:; \
             connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            STANDARD.encode(Sha256::digest(script)),
            STANDARD.encode(Sha256::digest(style)),
        );
        let policy = HeaderValue::try_from(policy).expect("base64 is ASCII");
        Gallery { gzip, page: Bytes::from(page), policy }
    }
}

/// `GET /`. The page has nothing of anybody's in it: what it shows, it asks for with a right to see it.
pub(crate) async fn get(State(state): State<Arc<HttpState>>, headers: HeaderMap) -> Response {
    let Gallery { page, gzip, policy } = state.gallery.get_or_init(Gallery::new);
    let accepted = negotiation::accepted_codings(&headers);
    let best = accepted.best(gzip.iter().map(|_| Coding::Gzip));
    let gzip = gzip.as_ref().filter(|_| best.is_some());
    let fixed = |text| HeaderValue::from_static(text);
    let headers = [
        (CONTENT_TYPE, fixed("text/html; charset=utf-8")),
        (CONTENT_SECURITY_POLICY, policy.clone()),
        (REFERRER_POLICY, fixed("no-referrer")),
        (ROBOTS, fixed("noindex")),
        (VARY, fixed("Accept-Encoding")),
    ];
    let encoding = gzip.map(|_| [(CONTENT_ENCODING, Coding::Gzip.as_str())]);
    let body = gzip.unwrap_or(page).clone();
    ([NEVER_CACHED], headers, encoding, body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_whole_and_small() {
        let Gallery { page, gzip, .. } = Gallery::new();
        let text = std::str::from_utf8(&page).unwrap();
        assert!(text.matches("<style>").count() == 1 && text.matches("<script>").count() == 1);
        assert!(!text.contains("<style></style>") && !text.contains("<script></script>"));
        let sent = gzip.unwrap().len();
        assert!(sent < 20 * 1024, "{sent} bytes");
        // Nothing of another host's.
        assert!(
            !text.contains("src=\"http") && !text.contains("@import") && !text.contains("url(http")
        );
    }
}
