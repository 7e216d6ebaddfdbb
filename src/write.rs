//! The life of a write: a record is checked as a read would check it, then stored.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::app::App;
use crate::image::{Facts, ImageId, Version};
use crate::read::off_worker;
use crate::record::{self, Content, Corrupt, Record};
use crate::store::{Change, Coherence, Replaced, StoreError};

/// What a write did.
#[derive(Debug)]
pub struct Written {
    /// What the next read answers.
    pub facts: Facts,
    /// Whether it created the image.
    pub replaced: Replaced,
}

/// Why a write did nothing.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The record is no image: a read would have answered an error.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The record has the address of the image instead of its bytes.
    #[error("a record with url instead of base64_data can't be written yet")]
    Offloaded,
    /// The store didn't take it, or didn't say so: the write may or may not have happened.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Writes a record that lives for `time_to_live`.
pub async fn put(
    app: &Arc<App>,
    id: &ImageId,
    value: Bytes,
    time_to_live: Duration,
) -> Result<Written, WriteError> {
    let facts = off_worker(app, value.len(), {
        let value = value.clone();
        move || facts(&value)
    });
    let facts = facts.await?;
    if app.index.coherence() == Coherence::Coherent {
        app.metrics.expect_push(id);
    }
    let replaced = app.store.put(id, value, Some(time_to_live)).await;
    if let Err(error) = &replaced {
        app.metrics.expect_no_push(Some(id));
        app.metrics.count_store_error(error);
    }
    // The push says so too, later; but who has read this answer must not be shown what was there before. A write
    // that failed may have happened all the same.
    app.index.hear(Change::Of(id.clone()));
    let replaced = replaced?;
    Ok(Written { facts, replaced })
}

fn facts(value: &[u8]) -> Result<Facts, WriteError> {
    let record = Record::parse(value)?;
    let Content::Inline(base64) = record.content else {
        return Err(WriteError::Offloaded);
    };
    let decoded = record::decode(&base64)?;
    Ok(Facts::new(Version::of(value), decoded.media_type, decoded.bytes.len(), record.created_at))
}
