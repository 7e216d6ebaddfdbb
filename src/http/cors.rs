//! Cross-origin reads by scripts (the Fetch standard).

use std::time::Duration;

use axum::http::header::{
    ACCEPT_RANGES, AGE, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, DATE, ETAG, IF_MATCH,
    IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, ORIGIN, RANGE, RETRY_AFTER,
};
use axum::http::{HeaderName, Method};
use tower_http::cors::{AllowOrigin, CorsLayer};

use super::{CACHE_STATUS, REQUEST_ID, SERVER_TIMING};
use crate::settings::Origins;

/// The layer for the allowed origins; `None` where there are none.
///
/// Answers depend on the origin only where there is a list of them, so only then does `Vary` name it.
pub(crate) fn layer(origins: &Origins) -> Option<CorsLayer> {
    let (origins, vary) = match origins {
        Origins::None => return None,
        Origins::Any => (AllowOrigin::any(), vec![]),
        Origins::Listed(listed) => (AllowOrigin::list(listed.clone()), vec![ORIGIN]),
    };
    Some(
        CorsLayer::new()
            .allow_origin(origins)
            .vary(vary)
            .allow_methods([Method::GET, Method::HEAD])
            .allow_headers([
                IF_MATCH,
                IF_MODIFIED_SINCE,
                IF_NONE_MATCH,
                IF_RANGE,
                IF_UNMODIFIED_SINCE,
                RANGE,
                REQUEST_ID,
                // Sent by a script that follows events without EventSource.
                HeaderName::from_static("last-event-id"),
            ])
            .expose_headers([
                ACCEPT_RANGES,
                AGE,
                CACHE_STATUS,
                CONTENT_ENCODING,
                CONTENT_LENGTH,
                CONTENT_RANGE,
                DATE,
                ETAG,
                RETRY_AFTER,
                SERVER_TIMING,
                REQUEST_ID,
            ])
            .max_age(Duration::from_hours(24)),
    )
}
