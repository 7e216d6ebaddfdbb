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
    coded: Vec<(Coding, Bytes)>,
    policy: HeaderValue,
}

impl Gallery {
    /// Puts the page together.
    pub(crate) fn new() -> Gallery {
        let (style, script) = (include_str!("style.css"), include_str!("app.js"));
        let page = include_str!("index.html")
            .replacen("<style></style>", &format!("<style>{style}</style>"), 1)
            .replacen("<script></script>", &format!("<script>{script}</script>"), 1);
        let coded = Coding::ALL
            .into_iter()
            .filter_map(|coding| Some((coding, coding.encode(page.as_bytes())?.into())));
        let policy = format!(
            "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; img-src 'self' data: blob:; \
             connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
            STANDARD.encode(Sha256::digest(script)),
            STANDARD.encode(Sha256::digest(style)),
        );
        let policy = HeaderValue::try_from(policy).expect("base64 is ASCII");
        Gallery { coded: coded.collect(), page: Bytes::from(page), policy }
    }
}

/// `GET /`. The page has nothing of anybody's in it: what it shows, it asks for with a right to see it.
pub(crate) async fn get(State(state): State<Arc<HttpState>>, headers: HeaderMap) -> Response {
    let Gallery { page, coded, policy } = state.gallery.get_or_init(Gallery::new);
    let best = negotiation::accepted_codings(&headers).best(coded.iter().map(|(it, _)| *it));
    let chosen = coded.iter().find(|(coding, _)| Some(*coding) == best);
    let fixed = |text| HeaderValue::from_static(text);
    let headers = [
        (CONTENT_TYPE, fixed("text/html; charset=utf-8")),
        (CONTENT_SECURITY_POLICY, policy.clone()),
        (REFERRER_POLICY, fixed("no-referrer")),
        (ROBOTS, fixed("noindex")),
        (VARY, fixed("Accept-Encoding")),
    ];
    let encoding = chosen.map(|(coding, _)| [(CONTENT_ENCODING, coding.as_str())]);
    let body = chosen.map_or(page, |(_, coded)| coded).clone();
    ([NEVER_CACHED], headers, encoding, body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_whole_and_small() {
        let Gallery { page, coded, .. } = Gallery::new();
        let text = std::str::from_utf8(&page).unwrap();
        assert!(text.matches("<style>").count() == 1 && text.matches("<script>").count() == 1);
        assert!(!text.contains("<style></style>") && !text.contains("<script></script>"));
        for (coding, bytes) in coded {
            assert!(bytes.len() < 20 * 1024, "{} bytes of {coding:?}", bytes.len());
        }
        // Nothing of another host's.
        assert!(
            !text.contains("src=\"http") && !text.contains("@import") && !text.contains("url(http")
        );
    }
}
