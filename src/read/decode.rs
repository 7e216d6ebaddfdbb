//! From a stored value to an image: hash, parse, decode. Unchanged values are recognised without hashing them again.

use std::num::NonZeroUsize;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use lru::LruCache;

use super::Reader;
use super::answer::Timing;
use crate::image::record::{self, Corrupt, Record};
use crate::image::{Image, ImageId, Metadata, Representation, Version};
use crate::index::Digest;
use crate::offload::RemoteImage;

/// The content of a value.
pub(super) enum Opened {
    /// An image that is still in memory.
    InMemory(Image),
    /// A freshly decoded image.
    Decoded(Representation),
    /// An image in the object store.
    Offloaded(RemoteImage),
    /// No image.
    Corrupt(Corrupt),
}

/// A record, decoded before its version is known.
struct DecodedRecord {
    /// `None` if the image is in the object store.
    image: Option<record::Decoded>,
    /// The declared type, if the bytes are of another one.
    mistaken: Option<String>,
    created_at: Option<SystemTime>,
}

impl Reader {
    /// Opens a value. One that was only written again is recognised by its digest: without a new hash, and if its bytes
    /// are still in memory, without decoding it again. Any other value is hashed and decoded at the same time: nine tenths
    /// of the work is its MD5, which one core alone can do.
    pub(super) async fn decode(&self, id: &ImageId, value: Bytes) -> (Opened, Digest, Timing) {
        let mut timing = Timing::default();
        let mut digest = None;
        let length = value.len();
        if self.index.has_seen(id) {
            let value = value.clone();
            let (seen, time) = self.cpu.run_on(length, || timed(move || Digest::of(&value))).await;
            (digest, timing.hash) = (Some(seen), time);
        }
        let known = digest.and_then(|digest| self.index.recognise(id, digest));
        if let (Some(metadata), Some(digest)) = (&known, digest)
            && let Some(image) = self.cache.get_image(id, metadata.version)
        {
            return (Opened::InMemory(image), digest, timing);
        }
        let hash = async {
            if let Some(metadata) = known {
                return (metadata.version, Duration::ZERO);
            }
            self.metrics.hashes.inc();
            let value = value.clone();
            self.cpu.run_on(length, || timed(move || Version::of(&value))).await
        };
        let decode = {
            let value = value.clone();
            let decode = move || (digest.unwrap_or_else(|| Digest::of(&value)), decode(&value));
            self.cpu.run_on(length, || timed(decode))
        };
        let ((version, hash_time), ((digest, decoded), decode_time)) = tokio::join!(hash, decode);
        timing.hash += hash_time;
        timing.decode = decode_time;
        if let Some(image) = self.cache.get_image(id, version) {
            return (Opened::InMemory(image), digest, timing);
        }
        let opened = decoded.and_then(|decoded| self.opened(id, version, &value, decoded));
        let opened = opened.unwrap_or_else(|corrupt| {
            self.corrupt_log.report(id, Some(version), &corrupt);
            Opened::Corrupt(corrupt)
        });
        (opened, digest, timing)
    }

    /// The content of a record, now that its version is known.
    fn opened(
        &self,
        id: &ImageId,
        version: Version,
        value: &[u8],
        decoded: DecodedRecord,
    ) -> Result<Opened, Corrupt> {
        let DecodedRecord { image, mistaken, created_at } = decoded;
        let Some(record::Decoded { bytes, media_type, traits }) = image else {
            let record = Record::parse(value)?;
            let offload = self.offload.as_ref().ok_or(Corrupt::ForeignUrl)?;
            let remote = match &record.content {
                record::Content::Offloaded(it) => offload.locate(version, &record, it),
                record::Content::Inline(_) => None,
            };
            return remote.map(Opened::Offloaded).ok_or(Corrupt::ForeignUrl);
        };
        self.metrics.decodes.inc();
        if let Some(declared) = mistaken {
            self.metrics.type_mismatches.inc();
            let found = media_type.as_str();
            tracing::warn!(image.id = %id, declared, found, "the declared type is not what the bytes are");
        }
        let metadata = Metadata::new(version, media_type, bytes.len(), created_at);
        let metadata = Metadata { traits, ..metadata };
        Ok(Opened::Decoded(self.originals.counted(metadata, bytes)))
    }
}

fn decode(value: &[u8]) -> Result<DecodedRecord, Corrupt> {
    let record = Record::parse(value)?;
    let image = match &record.content {
        record::Content::Inline(base64) => Some(record::decode(base64)?),
        record::Content::Offloaded(_) => None,
    };
    let declared = record.declared_type.filter(|declared| {
        image.as_ref().is_some_and(|image| !image.media_type.is_named(declared))
    });
    let mistaken = declared.map(|declared| declared.chars().take(64).collect());
    Ok(DecodedRecord { image, mistaken, created_at: record.created_at })
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let began = Instant::now();
    (work(), began.elapsed())
}

/// Corrupt records that were logged. Each is logged once, however often it is requested, and again when another corrupt
/// value replaces it.
#[derive(Debug)]
pub struct CorruptLog(Mutex<LruCache<ImageId, (Option<Version>, Corrupt)>>);

impl CorruptLog {
    pub(super) fn report(&self, id: &ImageId, version: Option<Version>, corrupt: &Corrupt) {
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
