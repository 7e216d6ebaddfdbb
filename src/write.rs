//! The life of a write: what is to be written is checked as a read would check it, then stored.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::app::App;
use crate::image::preconditions::{EntityTags, Preconditions};
use crate::image::record::{self, Content, Corrupt, Record};
use crate::image::{ImageId, MediaType, Metadata, Version};
use crate::offload;
use crate::read::off_worker;
use crate::store::{Change, Coherence, Condition, Expiry, Replaced, StoreError, Written};

/// What is to be written.
#[derive(Debug)]
pub enum Submission {
    /// The bytes of an image, of which a record is made.
    Image {
        /// As they are to be served.
        bytes: Bytes,
        /// What the writer says that they are, where it says anything.
        declared: Option<MediaType>,
    },
    /// A record as a backend would store it.
    Record(Bytes),
}

/// Under which id.
#[derive(Debug)]
pub enum Target {
    /// This one.
    Id(ImageId),
    /// The one that the image's bytes have ([`ImageId::of_content`]).
    Content,
}

/// What a write did.
#[derive(Debug)]
pub struct Put {
    /// Under which id.
    pub id: ImageId,
    /// What the next read answers.
    pub metadata: Metadata,
    /// Whether it created the image.
    pub replaced: Replaced,
}

/// Why a write did nothing.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// It is no image: a read would have answered an error.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The record has the address of the image instead of its bytes.
    #[error(
        "a record with url instead of base64_data can't be written: the server itself moves images"
    )]
    Offloaded,
    /// The bytes are none of the type that was declared.
    #[error("the body is {}, and Content-Type says {}", found.as_str(), declared.as_str())]
    Mistyped {
        /// What was declared.
        declared: MediaType,
        /// What the bytes are.
        found: MediaType,
    },
    /// The image makes a larger record than may be read.
    #[error("the image makes a record of {size} bytes, the limit is {limit} ([records] max_value)")]
    TooLarge {
        /// Of the record, in bytes.
        size: usize,
        /// In bytes.
        limit: usize,
    },
    /// What is there isn't what the preconditions ask for.
    #[error("what is stored isn't what If-Match, If-None-Match or If-Unmodified-Since asks for")]
    PreconditionFailed,
    /// There is nothing to remove.
    #[error("there is no image with this id")]
    Absent,
    /// The store didn't take it, or didn't say so: the write may or may not have happened.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What is ready to be stored.
struct Prepared {
    id: ImageId,
    value: Bytes,
    metadata: Metadata,
    /// The image in the value.
    bytes: Bytes,
}

/// Writes an image that lives for `time_to_live`.
pub async fn put(
    app: &Arc<App>,
    target: Target,
    submission: Submission,
    time_to_live: Duration,
    preconditions: Preconditions,
) -> Result<Put, WriteError> {
    let length = match &submission {
        Submission::Image { bytes, .. } | Submission::Record(bytes) => bytes.len(),
    };
    let by_content = matches!(target, Target::Content);
    let limit = app.settings.records.max_value;
    let prepared = off_worker(app, length, move || prepare(target, submission, limit)).await?;
    let Prepared { id, mut value, mut metadata, bytes } = prepared;
    let condition = condition(preconditions);
    // An image that is written again lives as long as the one that promised the most.
    let expiry = if by_content { Expiry::AtLeast(time_to_live) } else { Expiry::In(time_to_live) };
    // Where it isn't moved it is stored as it is, and moved later.
    let moved = offload::on_write(app, &id, &value, &metadata, &bytes).await;
    if let Some(moved) = &moved {
        value = moved.value.clone();
        let Metadata { media_type, length, last_modified, .. } = metadata;
        metadata = Metadata::new(moved.version, media_type, length, last_modified);
    }
    let written = tell(app, &id, app.store.put(&id, value, expiry, &condition));
    let Written::Done(replaced) = written.await? else {
        return Err(WriteError::PreconditionFailed);
    };
    if let Some(moved) = &moved {
        app.metrics.offloaded.inc();
        offload::keep(app, &id, moved, &metadata, bytes);
    }
    Ok(Put { id, metadata, replaced })
}

/// Removes an image.
pub async fn remove(
    app: &Arc<App>,
    id: &ImageId,
    preconditions: Preconditions,
) -> Result<(), WriteError> {
    let condition = condition(preconditions);
    let (condition, removed) = match &app.offload {
        Some(_) => noting(condition),
        None => (condition, Arc::default()),
    };
    match tell(app, id, app.store.remove(id, &condition)).await? {
        Written::Done(Replaced::Value) => {}
        Written::Done(Replaced::Nothing) => return Err(WriteError::Absent),
        Written::ConditionFailed => return Err(WriteError::PreconditionFailed),
    }
    let removed = removed.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let (Some(offload), Some(value)) = (&app.offload, removed) {
        offload::discard(offload, id, &value).await;
    }
    Ok(())
}

/// The same condition, which notes what it was asked of.
fn noting(condition: Condition) -> (Condition, Arc<Mutex<Option<Vec<u8>>>>) {
    let noted = Arc::<Mutex<Option<Vec<u8>>>>::default();
    let note = Arc::clone(&noted);
    let condition = Condition::is(move |value| {
        *note.lock().unwrap_or_else(PoisonError::into_inner) = value.map(<[u8]>::to_vec);
        condition.holds(value)
    });
    (condition, noted)
}

/// Makes a write, times how long the store takes to tell of it, and tells of it here at once.
async fn tell(
    app: &App,
    id: &ImageId,
    write: impl Future<Output = Result<Written, StoreError>>,
) -> Result<Written, StoreError> {
    if app.index.coherence() == Coherence::Coherent {
        app.metrics.expect_push(id);
    }
    let written = write.await;
    match &written {
        Ok(Written::Done(_)) => {}
        Ok(Written::ConditionFailed) => app.metrics.expect_no_push(id),
        Err(error) => {
            app.metrics.expect_no_push(id);
            app.metrics.count_store_error(error);
        }
    }
    // The push says so too, later; but who has read this answer must not be shown what was there before. A write
    // that failed may have happened all the same.
    let change = Change::Invalidated(id.clone());
    app.index.apply(change.clone());
    app.events.apply(&change);
    written
}

/// Reads what is to be written as a read would read it. Takes milliseconds a megabyte.
fn prepare(target: Target, submission: Submission, limit: usize) -> Result<Prepared, WriteError> {
    let (value, bytes, media_type, created_at) = match submission {
        Submission::Image { bytes, declared } => {
            let found = record::sniffed(&bytes)?;
            if let Some(declared) = declared
                && declared != found
            {
                return Err(WriteError::Mistyped { declared, found });
            }
            // The same content is the same version, however often it is written: so it has no date.
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
    Ok(Prepared { id, value, metadata, bytes })
}

/// What the preconditions of a write ask of what is stored (RFC 9110 §13.2.2).
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
                // One without a date isn't asked for it (§13.1.4).
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
            // Another form of the same version.
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
    fn a_date_is_asked_of_what_has_one_alone() {
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
