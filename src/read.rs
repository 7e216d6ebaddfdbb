//! The life of a read, from a parsed request to an answer that HTTP only has to dress.

use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use lru::LruCache;

use crate::app::App;
use crate::cache::Kept;
use crate::collapse::Lost;
use crate::image::{EntityTags, Facts, ImageId, Representation, Version};
use crate::index::{Boarding, Digest, Found, Known, LookUp, Ticket};
use crate::record::{self, Content, Corrupt, Record};
use crate::store::StoreError;

/// Values up to this many bytes are hashed and decoded where they are: it takes under a fifth of a
/// millisecond, and a trip to another thread costs its share of that.
const INLINE_LIMIT: usize = 64 * 1024;

/// A read of an image, parsed and valid.
#[derive(Debug)]
pub struct ImageRequest {
    /// Which image.
    pub id: ImageId,
    /// Whether the bytes are asked for, or only what is known of them.
    pub wants: Wants,
    /// The representations that the client has already (RFC 9110 §13.1.2).
    pub if_none_match: Option<EntityTags>,
}

/// How much of an image a request is after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wants {
    /// The bytes.
    Bytes,
    /// Only what is known of them.
    Facts,
}

/// What a read found, and where it came from.
#[derive(Debug)]
pub struct Answer {
    /// What to send.
    pub content: AnswerContent,
    /// What it took.
    pub served: Served,
}

/// What to send.
#[derive(Debug)]
pub enum AnswerContent {
    /// The image.
    Image(Representation),
    /// What a GET would send, without its bytes.
    Facts(Arc<Facts>),
    /// The client has it already.
    NotModified(Arc<Facts>),
}

/// What an answer took, in the terms of RFC 9211.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// Nothing but memory.
    Hit,
    /// A fetch.
    Fetched {
        /// Led by another request.
        collapsed: bool,
        /// Whether the bytes are in memory now.
        kept: bool,
    },
    /// A fetch that found the version in memory to be the one in the store.
    Revalidated {
        /// Led by another request.
        collapsed: bool,
    },
    /// The last known version, since the store can't be reached.
    Stale,
}

/// Why a read has no image.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// There is no such key.
    #[error("there is no image with this id")]
    Absent,
    /// There is a value, and it is no image.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The record has the address of the image instead of its bytes.
    #[error("the image is stored at a URL, which this version doesn't serve")]
    Offloaded,
    /// The store had no answer.
    #[error(transparent)]
    Store(StoreError),
    /// As many requests wait for this image as may.
    #[error("too many requests are waiting for this image")]
    Busy,
    /// The fetch failed in a way that it should not.
    #[error("the image can't be fetched")]
    Lost(#[from] Lost),
}

/// What one fetch brings to all who wait for it, and when that will have expired.
pub type Outcome = Result<(Fetched, Option<Instant>), StoreError>;

/// What is under a key.
#[derive(Debug, Clone)]
pub enum Fetched {
    /// An image.
    Present(Representation, Source),
    /// Nothing.
    Absent,
    /// A value that is no image.
    Corrupt(Corrupt),
    /// The address of an image.
    Offloaded,
}

/// Where the bytes of a fetched version came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// They were in memory already.
    Memory,
    /// They were decoded, and kept or not.
    Decoded(Kept),
}

/// Answers a request for an image.
pub async fn image(app: &Arc<App>, request: ImageRequest) -> Result<Answer, ReadError> {
    // 1 index
    let boarding = match app.index.look_up(&request.id) {
        LookUp::Current(known) => match from_memory(app, &request, &known_image(app, known)?) {
            Some(content) => return Ok(Answer { content, served: Served::Hit }),
            None => app.index.ask(&request.id),
        },
        LookUp::Stale(facts) => {
            let content = from_memory(app, &request, &facts).ok_or_else(|| {
                let reason = app.index.coherence().reason().unwrap_or_default().to_owned();
                ReadError::Store(StoreError::Unreachable(reason))
            })?;
            return Ok(Answer { content, served: Served::Stale });
        }
        LookUp::Ask(boarding) => boarding,
    };

    // 2 store and 5 decode, together with whoever asks for the same; or the last known version, as soon as the
    // store is known to be unreachable
    let stale = || {
        let facts = app.index.last_known(&request.id)?;
        let content = from_memory(app, &request, &facts)?;
        Some(Answer { content, served: Served::Stale })
    };
    let mut fetch = pin!(fetch(app, &request.id, boarding));
    let fetched = tokio::select! {
        fetched = &mut fetch => fetched,
        () = app.index.until_unreachable() => match stale() {
            Some(answer) => return Ok(answer),
            None => fetch.await,
        },
    };
    match fetched {
        Ok((image, served)) => {
            let content = without_bytes(&request, &image.facts);
            Ok(Answer { content: content.unwrap_or(AnswerContent::Image(image)), served })
        }
        Err(ReadError::Store(error @ (StoreError::Unreachable(_) | StoreError::TimedOut))) => {
            stale().ok_or(ReadError::Store(error))
        }
        Err(error) => Err(error),
    }
}

/// The answer about a known version, unless its bytes are needed and have left.
fn from_memory(app: &App, request: &ImageRequest, facts: &Arc<Facts>) -> Option<AnswerContent> {
    // 3 validators, 4 LRU
    without_bytes(request, facts)
        .or_else(|| app.cache.get(&request.id, facts.version).map(AnswerContent::Image))
}

/// The answer about a version, where none of its bytes are needed.
fn without_bytes(request: &ImageRequest, facts: &Arc<Facts>) -> Option<AnswerContent> {
    let has_it = request.if_none_match.as_ref().is_some_and(|tags| tags.match_weakly(&facts.etag));
    match request.wants {
        _ if has_it => Some(AnswerContent::NotModified(Arc::clone(facts))),
        Wants::Facts => Some(AnswerContent::Facts(Arc::clone(facts))),
        Wants::Bytes => None,
    }
}

fn known_image(app: &App, known: Known) -> Result<Arc<Facts>, ReadError> {
    match known {
        Known::Present(facts) => Ok(facts),
        Known::Absent => Err(ReadError::Absent),
        Known::Corrupt(corrupt) => Err(corrupt_record(app, corrupt)),
        Known::Offloaded => Err(ReadError::Offloaded),
    }
}

fn corrupt_record(app: &App, corrupt: Corrupt) -> ReadError {
    app.metrics.corrupt_records.inc();
    ReadError::Corrupt(corrupt)
}

/// Waits for the fetch that this request joins or leads.
async fn fetch(
    app: &Arc<App>,
    id: &ImageId,
    mut boarding: Boarding<Outcome>,
) -> Result<(Representation, Served), ReadError> {
    let (fetched, collapsed) = loop {
        let (flight, collapsed) = match boarding {
            Boarding::Join(flight) => {
                app.metrics.collapsed.inc();
                (flight, true)
            }
            Boarding::Lead(ticket) => {
                let flight = ticket.flight();
                // A task of its own: it ends by itself, within the store's time-outs, whoever still waits.
                // Should it panic, its ticket is dropped and those who wait are told.
                tokio::spawn(lead(Arc::clone(app), ticket));
                (flight, false)
            }
            Boarding::Full => return Err(ReadError::Busy),
        };
        let (fetched, expires) = flight.outcome().await?.map_err(ReadError::Store)?;
        // Who joined late may have begun after the expiry of what the store handed out before it.
        if collapsed && expires.is_some_and(|expires| Instant::now() >= expires) {
            boarding = app.index.ask(id);
        } else {
            break (fetched, collapsed);
        }
    };
    match fetched {
        Fetched::Present(image, Source::Memory) => Ok((image, Served::Revalidated { collapsed })),
        Fetched::Present(image, Source::Decoded(kept)) => {
            Ok((image, Served::Fetched { collapsed, kept: kept == Kept::Yes }))
        }
        Fetched::Absent => Err(ReadError::Absent),
        Fetched::Corrupt(corrupt) => Err(corrupt_record(app, corrupt)),
        Fetched::Offloaded => Err(ReadError::Offloaded),
    }
}

/// Fetches an image for all who wait, and keeps what was found before they are told.
async fn lead(app: Arc<App>, mut ticket: Ticket<Outcome>) {
    app.metrics.fetches.inc();
    ticket.depart().await;
    let outcome = ask_store(&app, ticket.id()).await.map(|(fetched, digest, expires)| {
        let known = match &fetched {
            Fetched::Present(image, _) => Known::Present(Arc::clone(&image.facts)),
            Fetched::Absent => Known::Absent,
            Fetched::Corrupt(corrupt) => Known::Corrupt(corrupt.clone()),
            Fetched::Offloaded => Known::Offloaded,
        };
        if let Some(version) = ticket.keep(Found { known, digest, expires }) {
            app.cache.remove(ticket.id(), version);
        }
        (fetched, expires)
    });
    ticket.land(outcome);
}

/// Asks the store, and makes an image of its answer.
async fn ask_store(
    app: &Arc<App>,
    id: &ImageId,
) -> Result<(Fetched, Option<Digest>, Option<Instant>), StoreError> {
    let value = async {
        let size = app.store.size(id).await?;
        // The room that the value takes until it is decoded and dropped.
        let room = app.room_for(size).await?;
        // An expiry is counted from before the question, so that it is never later here than there.
        let asked = Instant::now();
        let stored = app.store.get(id).await?;
        Ok((stored, asked, room))
    };
    let (stored, asked, _room) = match value.await {
        Ok(value) => value,
        Err(StoreError::WrongType) => return Ok(unreadable(app, id, Corrupt::WrongType)),
        Err(StoreError::TooLarge { size, limit }) => {
            return Ok(unreadable(app, id, Corrupt::TooLarge { size, limit }));
        }
        Err(error) => return Err(error),
    };
    let Some(stored) = stored else {
        return Ok((Fetched::Absent, None, None));
    };
    let expires = stored.time_to_live.and_then(|left| asked.checked_add(left));
    let (fetched, digest) = off_worker(app, stored.value.len(), {
        let (app, id, value) = (Arc::clone(app), id.clone(), stored.value);
        move || open(&app, &id, &value)
    })
    .await;
    Ok((fetched, Some(digest), expires))
}

/// The image in a value. One that was only written again is known by its digest, without a new hash, and
/// where its bytes are still in memory, without a new decoding.
fn open(app: &App, id: &ImageId, value: &[u8]) -> (Fetched, Digest) {
    let digest = Digest::of(value);
    let known = app.index.recognise(id, digest);
    let version = known.map_or_else(
        || {
            app.metrics.hashes.inc();
            Version::of(value)
        },
        |facts| facts.version,
    );
    if let Some(image) = app.cache.get(id, version) {
        return (Fetched::Present(image, Source::Memory), digest);
    }
    let fetched = match decode(app, id, version, value) {
        Ok(Some(image)) => {
            let kept = app.cache.insert(id, image.clone());
            Fetched::Present(image, Source::Decoded(kept))
        }
        Ok(None) => Fetched::Offloaded,
        Err(corrupt) => {
            app.corrupt_log.report(id, Some(version), &corrupt);
            Fetched::Corrupt(corrupt)
        }
    };
    (fetched, digest)
}

/// The image in a record, or none where the record says that it is elsewhere.
fn decode(
    app: &App,
    id: &ImageId,
    version: Version,
    value: &[u8],
) -> Result<Option<Representation>, Corrupt> {
    let record = Record::parse(value)?;
    let Content::Inline(base64) = record.content else {
        return Ok(None);
    };
    let decoded = record::decode(&base64)?;
    app.metrics.decodes.inc();
    if let Some(declared) = record.declared_type
        && !decoded.media_type.is_named(&declared)
    {
        app.metrics.type_mismatches.inc();
        let declared: String = declared.chars().take(64).collect();
        let found = decoded.media_type.as_str();
        tracing::warn!(image.id = %id, declared, found, "the declared type is not what the bytes are");
    }
    let facts = Facts::new(version, decoded.media_type, decoded.bytes.len(), record.created_at);
    Ok(Some(Representation { facts: Arc::new(facts), body: Bytes::from(decoded.bytes) }))
}

/// A value that the store wouldn't hand out is a corrupt record.
fn unreadable(
    app: &App,
    id: &ImageId,
    corrupt: Corrupt,
) -> (Fetched, Option<Digest>, Option<Instant>) {
    app.corrupt_log.report(id, None, &corrupt);
    (Fetched::Corrupt(corrupt), None, None)
}

/// Runs work on a value of some length: here where it is short, on a blocking thread otherwise.
pub(crate) async fn off_worker<T: Send + 'static>(
    app: &App,
    length: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    if length <= INLINE_LIMIT {
        return work();
    }
    let permit = Arc::clone(&app.decoding).acquire_owned().await;
    let work = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        work()
    });
    work.await.expect("hashing and decoding don't panic, and the runtime ends after the requests")
}

/// Remembers which corrupt records were logged, so that each is logged once however often it is asked
/// for, and again when it is replaced by another corrupt one.
#[derive(Debug)]
pub struct CorruptLog(Mutex<LruCache<ImageId, (Option<Version>, Corrupt)>>);

impl CorruptLog {
    fn report(&self, id: &ImageId, version: Option<Version>, corrupt: &Corrupt) {
        let reported = (version, corrupt.clone());
        let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if log.get(id) != Some(&reported) {
            log.put(id.clone(), reported);
            drop(log);
            tracing::warn!(image.id = %id, reason = %corrupt, "corrupt record");
        }
    }
}

impl Default for CorruptLog {
    fn default() -> CorruptLog {
        let kept = NonZeroUsize::new(1024).expect("not zero");
        CorruptLog(Mutex::new(LruCache::new(kept)))
    }
}
