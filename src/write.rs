//! The life of a write: an image is checked as a read would check it, then stored.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::changes::Changes;
use crate::cpu::Cpu;
use crate::image::preconditions::{EntityTags, Preconditions};
use crate::image::record::{self, Content, Corrupt, Record};
use crate::image::{ImageId, MediaType, Metadata, Representation, Version};
use crate::metrics::Metrics;
use crate::offload::Offload;
use crate::peer::PeerKey;
use crate::picture::{self, PictureError};
use crate::render::{RenderError, Renderer};
use crate::settings::Settings;
use crate::store::{Coherence, Condition, Expiry, Replaced, Store, StoreError, Written};

/// An image to be written.
#[derive(Debug)]
pub(crate) enum Submission {
    /// The bytes of an image. A record is made of them.
    Image {
        /// The bytes, as they will be served.
        bytes: Bytes,
        /// The type that the writer declared.
        declared: Option<MediaType>,
    },
    /// A record as a backend would store it.
    Record(Bytes),
}

/// The id to write to.
#[derive(Debug)]
pub(crate) enum Target {
    /// A given id.
    Id(ImageId),
    /// The id that is made of the image's bytes ([`ImageId::of_content`]).
    Content,
}

/// The result of a write.
#[derive(Debug)]
pub(crate) struct Put {
    /// The id that was written to.
    pub id: ImageId,
    /// The metadata that the next read answers.
    pub metadata: Metadata,
    /// The value that was replaced, if there was one.
    pub replaced: Replaced,
}

/// Reasons for a write that wasn't made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WriteError {
    /// The submission is no image. A read would answer an error.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The record has an address instead of the image's bytes.
    #[error(
        "a record must have base64_data, not url: the server itself moves images to the object store"
    )]
    Offloaded,
    /// The picture can't be decoded, and would be broken everywhere.
    #[error("{0} ([writes] verify)")]
    Broken(PictureError),
    /// The picture can't be decoded now.
    #[error(transparent)]
    Render(RenderError),
    /// The bytes are of another type than the declared one.
    #[error("the body is {}, but Content-Type says {}", found.as_str(), declared.as_str())]
    Mistyped {
        /// The declared type.
        declared: MediaType,
        /// The type of the bytes.
        found: MediaType,
    },
    /// The record is too large to be read back.
    #[error("the image makes a record of {size} bytes, the limit is {limit} ([records] max_value)")]
    TooLarge {
        /// Length of the record, in bytes.
        size: usize,
        /// The limit, in bytes.
        limit: usize,
    },
    /// A precondition failed.
    #[error("the stored image doesn't meet If-Match, If-None-Match or If-Unmodified-Since")]
    PreconditionFailed,
    /// There is nothing to remove.
    #[error("there is no image with this id")]
    Absent,
    /// The store refused the write, or didn't answer. Without an answer the write may have happened.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// A submission that is ready to be stored.
struct Prepared {
    id: ImageId,
    value: Bytes,
    metadata: Metadata,
    /// The image in the value.
    bytes: Bytes,
}

/// The parts that a write needs.
#[derive(Debug)]
pub(crate) struct Writer {
    store: Arc<Store>,
    offload: Option<Arc<Offload>>,
    changes: Changes,
    metrics: Arc<Metrics>,
    cpu: Cpu,
    /// Decodes pictures before they are stored; `None` if they needn't be whole.
    verifier: Option<Renderer>,
    max_value: usize,
}

impl Writer {
    /// Writes to a store, and through it to the object store if one is configured.
    pub(crate) fn new(
        store: &Arc<Store>,
        offload: Option<&Arc<Offload>>,
        changes: &Changes,
        cpu: &Cpu,
        renderer: &Renderer,
        settings: &Settings,
    ) -> Writer {
        Writer {
            store: Arc::clone(store),
            offload: offload.map(Arc::clone),
            changes: changes.clone(),
            metrics: Arc::clone(&changes.metrics),
            cpu: cpu.clone(),
            verifier: settings.writes.verify.then(|| renderer.clone()),
            max_value: settings.records.max_value,
        }
    }

    /// Writes an image that lives for `time_to_live`.
    pub(crate) async fn put(
        &self,
        client: PeerKey,
        target: Target,
        submission: Submission,
        time_to_live: Duration,
        preconditions: Preconditions,
    ) -> Result<Put, WriteError> {
        let length = match &submission {
            Submission::Image { bytes, .. } | Submission::Record(bytes) => bytes.len(),
        };
        let by_content = matches!(target, Target::Content);
        let limit = self.max_value;
        let prepare = move || prepare(target, submission, limit);
        let Prepared { id, mut value, mut metadata, bytes } =
            self.cpu.run_on(length, prepare).await?;
        self.verify(client, &id, &metadata, &bytes).await?;
        let condition = condition(preconditions);
        // The same image written again lives as long as the write that promised the most.
        let expiry =
            if by_content { Expiry::AtLeast(time_to_live) } else { Expiry::In(time_to_live) };
        // An image that can't be moved now is stored as it is, and moved later.
        let mut moved = None;
        if let Some(offload) = &self.offload
            && let Some(it) = offload.on_write(&id, &value, &metadata, &bytes).await
        {
            value = it.value.clone();
            metadata = metadata.of_version(it.version);
            moved = Some((offload, it, bytes));
        }
        let written = self.make(&id, self.store.put(&id, value, expiry, &condition));
        let Written::Done(replaced) = written.await? else {
            return Err(WriteError::PreconditionFailed);
        };
        match (moved, &self.offload) {
            (Some((offload, moved, bytes)), _) => offload.keep(&id, &moved, &metadata, bytes),
            (None, Some(offload)) => offload.move_later(&id),
            (None, None) => {}
        }
        Ok(Put { id, metadata, replaced })
    }

    /// Decodes a picture of a kind that is decoded, and refuses a broken one.
    async fn verify(
        &self,
        client: PeerKey,
        id: &ImageId,
        metadata: &Metadata,
        bytes: &Bytes,
    ) -> Result<(), WriteError> {
        let Some(verifier) = self.verifier.as_ref().filter(|_| metadata.media_type.is_decodable())
        else {
            return Ok(());
        };
        let metadata = Arc::new(metadata.of_version(metadata.version));
        let original = Representation { metadata, body: bytes.clone() };
        // The preview is of use: those who follow the image get it with the event.
        match verifier.preview(id, Some(client), original).await {
            Err(RenderError::Picture(broken @ PictureError::Broken(_))) => {
                Err(WriteError::Broken(broken))
            }
            // Too large, too slow, or of a kind that isn't decoded: it is served as it is.
            Ok(_) | Err(RenderError::Picture(_)) => Ok(()),
            Err(error) => Err(WriteError::Render(error)),
        }
    }

    /// Removes an image.
    pub(crate) async fn remove(
        &self,
        id: &ImageId,
        preconditions: Preconditions,
    ) -> Result<(), WriteError> {
        let condition = condition(preconditions);
        let (condition, removed) = match &self.offload {
            Some(_) => noting(condition),
            None => (condition, Arc::default()),
        };
        match self.make(id, self.store.remove(id, &condition)).await? {
            Written::Done(Replaced::Value) => {}
            Written::Done(Replaced::Nothing) => return Err(WriteError::Absent),
            Written::ConditionFailed => return Err(WriteError::PreconditionFailed),
        }
        let removed = removed.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let (Some(offload), Some(value)) = (&self.offload, removed) {
            offload.discard(&value);
        }
        Ok(())
    }

    /// Makes a write, times the push that it causes, and passes the change on at once.
    async fn make(
        &self,
        id: &ImageId,
        write: impl Future<Output = Result<Written, StoreError>>,
    ) -> Result<Written, StoreError> {
        if self.changes.index.coherence() == Coherence::Coherent {
            self.metrics.expect_push(id);
        }
        let written = write.await;
        match &written {
            Ok(Written::Done(_)) => {}
            Ok(Written::ConditionFailed) => self.metrics.expect_no_push(id),
            Err(error) => {
                self.metrics.expect_no_push(id);
                self.metrics.count_store_error(error);
            }
        }
        // After a failure as well: the write may have happened.
        self.changes.apply_own_write(id);
        written
    }
}

/// The same condition, which notes the value that it was evaluated against.
fn noting(condition: Condition) -> (Condition, Arc<Mutex<Option<Vec<u8>>>>) {
    let noted = Arc::<Mutex<Option<Vec<u8>>>>::default();
    let note = Arc::clone(&noted);
    let condition = Condition::is(move |value| {
        *note.lock().unwrap_or_else(PoisonError::into_inner) = value.map(<[u8]>::to_vec);
        condition.holds(value)
    });
    (condition, noted)
}

/// Decodes a submission as a read would. Takes milliseconds per megabyte.
fn prepare(target: Target, submission: Submission, limit: usize) -> Result<Prepared, WriteError> {
    let (value, bytes, media_type, created_at) = match submission {
        Submission::Image { bytes, declared } => {
            let found = record::sniffed(&bytes)?;
            if let Some(declared) = declared
                && declared != found
            {
                return Err(WriteError::Mistyped { declared, found });
            }
            // No date: the same content has to be the same version, however often it is written.
            let created_at = match target {
                Target::Id(_) => Some(record::whole_seconds(SystemTime::now())),
                Target::Content => None,
            };
            let value = Bytes::from(record::encode(&bytes, found, created_at));
            (value, bytes, found, created_at)
        }
        Submission::Record(value) => {
            let record = Record::parse(&value)?;
            let Content::Inline(base64) = record.content else {
                return Err(WriteError::Offloaded);
            };
            let decoded = record::decode(&base64)?;
            let (bytes, created_at) = (Bytes::from_owner(decoded.bytes), record.created_at);
            (value.clone(), bytes, decoded.media_type, created_at)
        }
    };
    if value.len() > limit {
        return Err(WriteError::TooLarge { size: value.len(), limit });
    }
    let id = match target {
        Target::Id(id) => id,
        Target::Content => ImageId::of_content(&Sha256::digest(&bytes).into()),
    };
    let metadata = Metadata::new(Version::of(&value), media_type, bytes.len(), created_at);
    let metadata = Metadata { traits: picture::strip::traits(&bytes, media_type), ..metadata };
    Ok(Prepared { id, value, metadata, bytes })
}

/// The condition on the stored value that the preconditions of a write make (RFC 9110 §13.2.2).
fn condition(preconditions: Preconditions) -> Condition {
    let Preconditions { if_match, if_none_match, if_modified_since: _, if_unmodified_since } =
        preconditions;
    match (if_match, if_none_match, if_unmodified_since) {
        (None, None, None) => Condition::Always,
        (None, Some(EntityTags::Any), None) => Condition::Absent,
        (Some(EntityTags::Any), None, _) => Condition::Present,
        (if_match, if_none_match, since) => Condition::is(move |value| {
            let version = value.map(Version::of);
            let unmodified = match (&if_match, since) {
                (Some(tags), _) => version.is_some_and(|it| tags.name_strongly(it)),
                // Ignored for a record without a date (§13.1.4).
                (None, Some(since)) => {
                    let record = value.and_then(|value| Record::parse(value).ok());
                    let modified = record.and_then(|record| record.created_at);
                    modified.is_none_or(|modified| modified <= since)
                }
                (None, None) => true,
            };
            let none_matches = match (&if_none_match, version) {
                (Some(tags), Some(version)) => !tags.name_weakly(version),
                (Some(_) | None, None) | (None, Some(_)) => true,
            };
            unmodified && none_matches
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;
    use crate::image::preconditions::EntityTag;

    fn holds(preconditions: Preconditions, value: Option<&[u8]>) -> bool {
        match condition(preconditions) {
            Condition::Always => true,
            Condition::Absent => value.is_none(),
            Condition::Present => value.is_some(),
            Condition::Is(is) => is(value),
        }
    }

    fn tags(opaque: &[&str]) -> EntityTags {
        let tag = |text: &&str| match text.strip_prefix("W/") {
            Some(text) => EntityTag { weak: true, opaque: text.into() },
            None => EntityTag { weak: false, opaque: (*text).into() },
        };
        EntityTags::List(opaque.iter().map(tag).collect())
    }

    #[test]
    fn the_preconditions_of_a_write_are_those_of_rfc_9110() {
        let value = br#"{"created_at": 1000}"#;
        let version = Version::of(value);
        let (own, coded, weak) =
            (format!("\"{version}\""), format!("\"{version}-br1\""), format!("W/\"{version}\""));
        let none = Preconditions::default;
        let cases = [
            (none(), true, true),
            (Preconditions { if_match: Some(EntityTags::Any), ..none() }, true, false),
            (Preconditions { if_none_match: Some(EntityTags::Any), ..none() }, false, true),
            (Preconditions { if_match: Some(tags(&["\"x\"", &own])), ..none() }, true, false),
            // Another representation of the same version.
            (Preconditions { if_match: Some(tags(&[&coded])), ..none() }, true, false),
            (Preconditions { if_match: Some(tags(&["\"x\""])), ..none() }, false, false),
            // Strong comparison, and weak.
            (Preconditions { if_match: Some(tags(&[&weak])), ..none() }, false, false),
            (Preconditions { if_none_match: Some(tags(&[&weak])), ..none() }, false, true),
            (Preconditions { if_none_match: Some(tags(&["\"x\""])), ..none() }, true, true),
            // Both.
            (
                Preconditions {
                    if_match: Some(tags(&[&own])),
                    if_none_match: Some(EntityTags::Any),
                    ..none()
                },
                false,
                false,
            ),
        ];
        for (preconditions, present, absent) in cases {
            assert_eq!(holds(preconditions.clone(), Some(value)), present, "{preconditions:?}");
            assert_eq!(holds(preconditions.clone(), None), absent, "{preconditions:?}");
        }
    }

    #[test]
    fn if_unmodified_since_is_ignored_for_records_without_a_date() {
        let since = |seconds| Preconditions {
            if_unmodified_since: Some(UNIX_EPOCH + Duration::from_secs(seconds)),
            ..Preconditions::default()
        };
        assert!(holds(since(1000), Some(br#"{"base64_data": "", "created_at": 1000}"#)));
        assert!(!holds(since(999), Some(br#"{"base64_data": "", "created_at": 1000}"#)));
        assert!(holds(since(1), Some(br#"{"base64_data": ""}"#)));
        assert!(holds(since(1), None));
    }
}
