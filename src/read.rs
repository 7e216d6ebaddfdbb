//! The life of a read, from a parsed request to an answer that HTTP only has to dress.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use lru::LruCache;

use crate::app::App;
use crate::image::{EntityTags, Facts, ImageId, Representation, Version};
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
    /// The representations that the client has already (RFC 9110 §13.1.2).
    pub if_none_match: Option<EntityTags>,
}

/// What a read found.
#[derive(Debug)]
pub enum Answer {
    /// The image.
    Image(Representation),
    /// The client has it already.
    NotModified(Arc<Facts>),
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
}

/// Answers a request for an image.
pub async fn image(app: &Arc<App>, request: ImageRequest) -> Result<Answer, ReadError> {
    // 1 index: until Redis tells of changes, nothing is known without asking.

    // 2 store
    let stored =
        app.store.get(&request.id).await.map_err(|error| refused(app, &request.id, error))?;
    let Some(stored) = stored else {
        return Err(ReadError::Absent);
    };

    // 4 LRU, 5 decode: before the validators, since both need the hash, and only the hash takes time.
    let image = current(app, &request.id, stored.value).await?;

    // 3 validators
    match request.if_none_match {
        Some(tags) if tags.match_weakly(&image.facts.etag) => Ok(Answer::NotModified(image.facts)),
        _ => Ok(Answer::Image(image)),
    }
}

/// The image in a value, decoded unless that very version is in memory. Off the async workers where
/// the value is large.
async fn current(app: &Arc<App>, id: &ImageId, value: Bytes) -> Result<Representation, ReadError> {
    let image = off_worker(app, value.len(), {
        let (app, id) = (Arc::clone(app), id.clone());
        move || {
            let version = Version::of(&value);
            match app.cache.get(&id, version) {
                Some(image) => Ok(image),
                None => decode(&app, &id, version, &value).map_err(|error| (version, error)),
            }
        }
    });
    image.await.map_err(|(version, error)| {
        if let ReadError::Corrupt(corrupt) = &error {
            app.metrics.corrupt_records.inc();
            app.corrupt_log.report(id, Some(version), corrupt);
        }
        error
    })
}

fn decode(
    app: &App,
    id: &ImageId,
    version: Version,
    value: &[u8],
) -> Result<Representation, ReadError> {
    let record = Record::parse(value)?;
    let Content::Inline(base64) = record.content else {
        return Err(ReadError::Offloaded);
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
    let image = Representation { facts: Arc::new(facts), body: Bytes::from(decoded.bytes) };
    app.cache.insert(id, image.clone());
    Ok(image)
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

/// A value that the store wouldn't hand out is a corrupt record; everything else is the store's trouble.
fn refused(app: &App, id: &ImageId, error: StoreError) -> ReadError {
    let corrupt = match error {
        StoreError::WrongType => Corrupt::WrongType,
        StoreError::TooLarge { size, limit } => Corrupt::TooLarge { size, limit },
        error => return ReadError::Store(error),
    };
    app.metrics.corrupt_records.inc();
    app.corrupt_log.report(id, None, &corrupt);
    ReadError::Corrupt(corrupt)
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
