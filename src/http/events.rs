//! `GET /events`: Server-Sent Events (HTML, §9.2) of the images that a page waits for.

use std::collections::HashSet;
use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use serde::Deserialize;

use super::problem::Problem;
use super::router::HttpState;
use crate::app::App;
use crate::events::hub::{Inline, Subscription, TooMany, Wanted};
use crate::image::{ImageId, MAX_ID_LENGTH};
use crate::shutdown::Phase;

/// nginx passes on what carries this as it comes.
const NOT_BUFFERED: (HeaderName, HeaderValue) =
    (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));

/// What keeps a connection open and means nothing.
const COMMENT: Bytes = Bytes::from_static(b":\n\n");

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EventParams {
    ids: Option<String>,
    prefix: Option<String>,
    inline: Option<String>,
}

/// `GET /events?ids=a,b` or `?prefix=concept_`, with `inline=none`, `thumbnail` or `full`.
pub(crate) async fn get(
    State(state): State<Arc<HttpState>>,
    query: Result<Query<EventParams>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(parameters) = query.map_err(|rejection| {
        let takes = "this address takes ids or prefix, and inline";
        Problem::bad_parameter(format!("{}; {takes}", rejection.body_text()))
    })?;
    let app = &state.app;
    let wanted = wanted(&parameters, app.events.most_ids())?;
    let inline = match parameters.inline.as_deref() {
        None => Inline::Thumbnail,
        Some(name) => Inline::named(name)
            .ok_or_else(|| Problem::bad_parameter("inline is none, thumbnail or full"))?,
    };
    let subscription = Subscription::open(app, wanted, inline)?;
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (CACHE_CONTROL, HeaderValue::from_static("no-cache, no-transform")),
        NOT_BUFFERED,
    ];
    Ok((headers, body(app, subscription)).into_response())
}

fn wanted(parameters: &EventParams, most: usize) -> Result<Wanted, Problem> {
    match (&parameters.ids, &parameters.prefix) {
        (Some(ids), None) => {
            let ids = ids.split(',').map(|id| {
                let wrong = |why| Problem::bad_id(&format!("{why}, in ids={}", parameters_of(id)));
                ImageId::parse(id).map_err(wrong)
            });
            // Each once.
            let ids: HashSet<ImageId> = ids.collect::<Result<_, _>>()?;
            if ids.len() > most {
                let (named, detail) = (ids.len(), "[events] ids");
                let detail = format!("{named} ids are named, the limit is {most} ({detail})");
                return Err(Problem::bad_parameter(detail));
            }
            Ok(Wanted::Ids(ids))
        }
        (None, Some(prefix)) => {
            let known = |byte: u8| byte.is_ascii_alphanumeric() || b"._:~-".contains(&byte);
            if prefix.len() > MAX_ID_LENGTH || !prefix.bytes().all(known) {
                let detail = "prefix is the beginning of an id: up to 128 of A-Z a-z 0-9 . _ : ~ -";
                return Err(Problem::bad_parameter(detail));
            }
            Ok(Wanted::Prefix(prefix.clone()))
        }
        (None, None) => Err(Problem::bad_parameter("ids or prefix is missing")),
        (Some(_), Some(_)) => Err(Problem::bad_parameter("ids and prefix are both there")),
    }
}

/// As much of what a client sent as is sensible to send back.
fn parameters_of(id: &str) -> String {
    id.chars().take(MAX_ID_LENGTH).collect()
}

/// The events as they come, with a sign of life where none does, until the server stops.
fn body(app: &Arc<App>, subscription: Subscription) -> Body {
    // Those who lose a server all at once come back one by one.
    let beginning = Bytes::from(format!("retry: {}\n\n", fastrand::u32(1000..3000)));
    let heartbeat = app.events.heartbeat();
    let app = Arc::clone(app);
    let events = stream::unfold((Some(beginning), subscription), move |(beginning, it)| {
        let app = Arc::clone(&app);
        async move {
            let mut subscription = it;
            let piece = if let Some(beginning) = beginning {
                beginning
            } else {
                tokio::select! {
                    biased;
                    () = app.shutdown.reached(Phase::Draining) => return None,
                    event = subscription.next() => event?,
                    () = tokio::time::sleep(heartbeat) => COMMENT,
                }
            };
            Some((Ok::<_, Infallible>(piece), (None, subscription)))
        }
    });
    Body::from_stream(events)
}

impl From<TooMany> for Problem {
    fn from(error: TooMany) -> Problem {
        Problem::busy(error.to_string())
    }
}
