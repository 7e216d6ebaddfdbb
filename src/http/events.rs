//! `GET /events`: Server-Sent Events (HTML, §9.2), their framing, their JSON and the addresses in it.

use std::collections::HashSet;
use std::convert::Infallible;
use std::sync::Arc;

use axum::Extension;
use axum::body::Body;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderName, HeaderValue};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::stream;
use serde::{Deserialize, Serialize};

use super::problem::Problem;
use super::state::HttpState;
use super::{auth, urls};
use crate::events::{EventContent, Followed, Inline, Subscription, TooMany};
use crate::image::{ImageId, MAX_ID_LENGTH, Version};
use crate::peer::Client;
use crate::shutdown::Phase;

/// Tells nginx not to buffer the response.
const NOT_BUFFERED: (HeaderName, HeaderValue) =
    (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));

/// A comment, which keeps a connection open and means nothing.
const COMMENT: Bytes = Bytes::from_static(b":\n\n");

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct EventParams {
    ids: Option<String>,
    prefix: Option<String>,
    inline: Option<String>,
    from: Option<String>,
    /// Sent by polyfills of `EventSource`, which can't send the header `Last-Event-ID` to another origin. Neither is needed: a
    /// stream begins with the state of every image.
    #[serde(rename = "lastEventId")]
    _last_event_id: Option<String>,
}

/// `GET /events?ids=a,b` or `?prefix=concept_`, the latter with `from=now` for changes alone; with `inline=none`, `thumbnail` or
/// `full`, and `lastEventId`, which is ignored.
pub(crate) async fn get(
    State(state): State<Arc<HttpState>>,
    Extension(client): Extension<Client>,
    query: Result<Query<EventParams>, QueryRejection>,
    request: Request,
) -> Result<Response, Problem> {
    let Query(parameters) = query.map_err(|rejection| {
        let takes = "this address takes ids or prefix, from and inline";
        Problem::bad_parameter(format!("{}; {takes}", rejection.body_text()))
    })?;
    let followed = followed(&parameters, state.events.most_ids())?;
    if let Followed::Prefix(prefix) | Followed::Changes(prefix) = &followed {
        auth::check_list(&state.app, &request, prefix)?;
    }
    let inline = match parameters.inline.as_deref() {
        Some("none") => Inline::None,
        None | Some("thumbnail") => Inline::Thumbnail,
        Some("full") => Inline::Full,
        Some(_) => {
            return Err(Problem::bad_parameter("`inline` must be `none`, `thumbnail` or `full`"));
        }
    };
    let subscription = state.events.subscribe(client.share(), followed, inline)?;
    let headers = [
        (CONTENT_TYPE, HeaderValue::from_static("text/event-stream")),
        (CACHE_CONTROL, HeaderValue::from_static("no-cache, no-transform")),
        NOT_BUFFERED,
    ];
    Ok((headers, body(&state, subscription)).into_response())
}

pub(crate) fn followed(parameters: &EventParams, most: usize) -> Result<Followed, Problem> {
    let only_changes = match parameters.from.as_deref() {
        None => false,
        Some("now") if parameters.prefix.is_some() => true,
        Some(_) => return Err(Problem::bad_parameter("`from` must be `now`, beside a prefix")),
    };
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
            Ok(Followed::Ids(ids))
        }
        (None, Some(prefix)) => {
            let prefix = parse_prefix(prefix)?.to_owned();
            Ok(if only_changes { Followed::Changes(prefix) } else { Followed::Prefix(prefix) })
        }
        (None, None) => Err(Problem::bad_parameter("ids or prefix is missing")),
        (Some(_), Some(_)) => Err(Problem::bad_parameter("ids and prefix are both there")),
    }
}

/// Checks the beginning of an id.
pub(super) fn parse_prefix(prefix: &str) -> Result<&str, Problem> {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"._:~-".contains(&byte);
    if prefix.len() > MAX_ID_LENGTH || !prefix.bytes().all(known) {
        let detail = "prefix is the beginning of an id: up to 128 of A-Z a-z 0-9 . _ : ~ -";
        return Err(Problem::bad_parameter(detail));
    }
    Ok(prefix)
}

/// A part of an address, cut to a length that is fit to be sent back.
fn parameters_of(id: &str) -> String {
    id.chars().take(MAX_ID_LENGTH).collect()
}

/// The events as they come, with comments between them while there are none, until the server stops.
fn body(state: &HttpState, subscription: Subscription) -> Body {
    // Random, so that clients who lose a server all at once come back one by one.
    let beginning = Bytes::from(format!("retry: {}\n\n", fastrand::u32(1000..3000)));
    let heartbeat = state.events.heartbeat();
    let shutdown = state.app.shutdown.clone();
    let events = stream::unfold((Some(beginning), subscription), move |(beginning, it)| {
        let shutdown = shutdown.clone();
        async move {
            let mut subscription = it;
            let piece = if let Some(beginning) = beginning {
                beginning
            } else {
                tokio::select! {
                    biased;
                    () = shutdown.reached(Phase::Draining) => return None,
                    event = subscription.next() => event?,
                    () = tokio::time::sleep(heartbeat) => COMMENT,
                }
            };
            Some((Ok::<_, Infallible>(piece), (None, subscription)))
        }
    });
    Body::from_stream(events)
}

/// Encodes an event as it stands in a stream (HTML, §9.2.6).
pub(crate) fn encode(content: &EventContent<'_>) -> Bytes {
    match content {
        EventContent::Absent { id, corrupt } => {
            let absent = ConceptAbsent { concept_id: id.as_str(), reason: *corrupt };
            message("concept_absent", None, absent)
        }
        EventContent::Present {
            id,
            version,
            metadata,
            expires_at,
            inline,
            preview,
            thumbnail,
            original,
        } => {
            let preview = (*inline != Inline::None).then(|| PreviewData {
                width: preview.as_ref().map(|it| it.width),
                height: preview.as_ref().map(|it| it.height),
                thumbhash: preview.as_ref().map(|it| STANDARD.encode(&it.thumbhash)),
            });
            let thumbnail = match inline {
                Inline::None => Some(urls::thumbnail(id, *version)),
                Inline::Thumbnail | Inline::Full => thumbnail.as_ref().map(urls::data),
            };
            let progress = ConceptProgress {
                concept_id: id.as_str(),
                full: urls::versioned(id, *version),
                r#type: metadata.as_ref().map(|it| it.media_type.as_str()),
                bytes: metadata.as_ref().map(|it| it.length),
                expires_at: *expires_at,
                preview,
                thumbnail,
                image_data: original.as_ref().map(urls::data),
            };
            message("concept_progress", Some(*version), progress)
        }
        EventContent::List { prefix, complete, ids } => {
            let concept_ids = ids.iter().map(ImageId::as_str).collect();
            message("concept_list", None, ConceptList { prefix, complete: *complete, concept_ids })
        }
        EventContent::Resync { prefix } => {
            message("concept_resync", None, ConceptResync { prefix })
        }
    }
}

/// The data of the event of an image.
#[derive(Serialize)]
struct ConceptProgress<'a> {
    concept_id: &'a str,
    full: String,
    r#type: Option<&'static str>,
    bytes: Option<usize>,
    expires_at: Option<u64>,
    #[serde(flatten)]
    preview: Option<PreviewData>,
    #[serde(skip_serializing_if = "Option::is_none")]
    thumbnail: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image_data: Option<String>,
}

/// The members that need the picture to be decoded.
#[derive(Serialize)]
struct PreviewData {
    width: Option<u32>,
    height: Option<u32>,
    thumbhash: Option<String>,
}

/// The data of the event of an id without an image.
#[derive(Serialize)]
struct ConceptAbsent<'a> {
    concept_id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'a str>,
}

/// The data of the event that asks for a new listing.
#[derive(Serialize)]
struct ConceptResync<'a> {
    prefix: &'a str,
}

/// The data of the event of all images with a prefix.
#[derive(Serialize)]
struct ConceptList<'a> {
    prefix: &'a str,
    complete: bool,
    concept_ids: Vec<&'a str>,
}

fn message(name: &'static str, version: Option<Version>, data: impl Serialize) -> Bytes {
    #[derive(Serialize)]
    struct Message<T> {
        r#type: &'static str,
        data: T,
    }
    let json = serde_json::to_string(&Message { r#type: name, data }).expect("strings are JSON");
    // An empty id says that there is no version.
    let id = version.map(|version| version.to_string()).unwrap_or_default();
    Bytes::from(format!("event: {name}\nid: {id}\ndata: {json}\n\n"))
}

impl From<TooMany> for Problem {
    fn from(error: TooMany) -> Problem {
        Problem::busy(error.to_string())
    }
}
