//! `GET /status`: the state of the service as JSON, for the gallery; and `GET /debug/images/{id}`: all that is known of a key.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::response::IntoResponse;
use serde_json::{Map, Value, json};

use super::json::{merge, unix_seconds};
use super::problem::Problem;
use super::state::HttpState;
use super::{NEVER_CACHED, auth, images};
use crate::app::App;
use crate::cache;
use crate::image::variant::Format;
use crate::image::{Representation, RepresentationKind};
use crate::index::{InspectedEntry, Known};
use crate::recent::Window;
use crate::store::Store;

/// `GET /status`.
pub(crate) async fn get(
    State(state): State<Arc<HttpState>>,
    request: Request,
) -> Result<impl IntoResponse, Problem> {
    auth::check_operator(&state.app, &request)?;
    let app = &state.app;
    let (now, coherence) = (SystemTime::now(), app.index.coherence());
    let reads: Map<String, Value> = state.recent.windows().iter().map(window).collect();
    let held = app.cache.held();
    let object_store = app.reader.offload.as_ref().and_then(|it| it.unavailability());
    let status = json!({
        "version": env!("CARGO_PKG_VERSION"),
        "now": now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
        "started_at": unix_seconds(state.started),
        "coherence": {
            "state": coherence.name(),
            "since": unix_seconds(now - app.index.coherence_age()),
            "reason": coherence.reason(),
        },
        "store": store(app),
        "object_store": object_store.as_deref(),
        "reads": reads,
        "memory": {
            "images": held.images,
            "limit_images": app.settings.cache.images,
            "bytes": held.bytes,
            "limit_bytes": app.settings.cache.bytes,
            "in_flight_bytes": held.in_flight,
            "resident_bytes": resident_bytes(),
        },
        "known_keys": app.index.len(),
        "event_streams": app.metrics.event_streams.get(),
        "connections": app.metrics.connections.get(),
        "requests_in_flight": app.metrics.requests_in_flight.get(),
        "variants": variants(app),
    });
    Ok(([NEVER_CACHED], Json(status)))
}

fn window(window: &Window) -> (String, Value) {
    let microseconds = |duration: Option<Duration>| duration.map(|it| it.as_micros());
    #[expect(clippy::cast_precision_loss, reason = "a ratio to look at")]
    let hit_ratio = (window.reads > 0).then(|| window.hits as f64 / window.reads as f64);
    let figures = json!({
        "requests": window.reads,
        "hits": window.hits,
        "hit_ratio": hit_ratio,
        "p50_us": microseconds(window.p50),
        "p99_us": microseconds(window.p99),
    });
    (window.name.to_owned(), figures)
}

fn store(app: &App) -> Value {
    let (kind, address) = match &*app.store {
        Store::Redis(_) => ("redis", app.settings.redis.url.public()),
        Store::Embedded(store) => ("embedded", Some(store.path().display().to_string())),
    };
    json!({ "kind": kind, "address": address, "write_failure": app.store.write_failure().as_deref() })
}

/// The variants that clients may request.
fn variants(app: &App) -> Value {
    let pictures = &app.settings.pictures;
    let formats = Format::ALL.into_iter().filter(|it| *it != Format::Avif || pictures.avif);
    let formats: Vec<_> = formats.map(Format::name).collect();
    json!({
        "widths": pictures.widths,
        "heights": pictures.heights,
        "dprs": pictures.dprs,
        "qualities": pictures.qualities,
        "formats": formats,
    })
}

/// Bytes of this process in memory, where the system tells them.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kibibytes: u64 = resident.trim().strip_suffix(" kB")?.parse().ok()?;
    Some(kibibytes * 1024)
}

/// `GET /debug/images/{id}`. Asks nobody, and is no use of the image.
pub(crate) async fn debug(
    State(state): State<Arc<HttpState>>,
    path: Result<Path<String>, PathRejection>,
    request: Request,
) -> Result<impl IntoResponse, Problem> {
    auth::check_operator(&state.app, &request)?;
    let id = images::id(path)?;
    let app = &state.app;
    let inspection = app.index.inspect(&id);
    let mut known = json!({
        "id": id.as_str(),
        "key": format!("{}{id}", app.settings.records.key_prefix),
        "state": "unknown",
        "present_epoch": inspection.epoch,
        "fetch_under_way": inspection.is_being_fetched,
        "representations": [],
        "memory_bytes": 0,
    });
    if let Some(found) = &inspection.entry {
        let version = found.known.version();
        let held = version.map(|it| app.cache.representations(&id, it)).unwrap_or_default();
        let bytes: usize = held.iter().map(|it| it.body.len() + cache::OVERHEAD).sum();
        merge(&mut known, entry(found));
        let held: Vec<Value> = held.iter().map(representation).collect();
        merge(&mut known, json!({ "representations": held, "memory_bytes": bytes }));
    }
    Ok(([NEVER_CACHED], Json(known)))
}

fn entry(found: &InspectedEntry) -> Value {
    let mut entry = json!({
        "current": found.is_current,
        "replaced": found.is_replaced,
        "epoch": found.epoch,
        "age_ms": found.age.as_millis(),
        "expires_in": found.time_to_live.map(|left| left.as_secs()),
        "last_push_ms_ago": found.since_push.map(|it| it.as_millis()),
    });
    let content = match &found.known {
        Known::Absent => json!({ "state": "absent" }),
        Known::Corrupt(corrupt) => json!({ "state": "corrupt", "reason": corrupt.to_string() }),
        Known::Offloaded(remote) => {
            json!({ "state": "offloaded", "version": remote.version.to_string() })
        }
        Known::Present(metadata) => json!({
            "state": "present",
            "version": metadata.version.to_string(),
            "type": metadata.media_type.as_str(),
            "bytes": metadata.length,
            "hits": metadata.hits.load(Ordering::Relaxed),
        }),
    };
    merge(&mut entry, content);
    entry
}

fn representation(representation: &Representation) -> Value {
    let metadata = &representation.metadata;
    let kind = match metadata.kind {
        RepresentationKind::Original => "original",
        RepresentationKind::Coded(_) => "coded",
        RepresentationKind::Variant(_) => "variant",
        RepresentationKind::Stripped => "stripped",
    };
    json!({
        "kind": kind,
        "type": metadata.media_type.as_str(),
        "bytes": metadata.length,
        "etag": metadata.etag.to_str().unwrap_or_default(),
    })
}
