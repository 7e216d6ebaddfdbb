//! Moves what backends wrote into records to the object store, behind their backs and never in their way.
//!
//! ```text
//!   backend ── SET a = v1 ──▶ Redis ── push ──▶ Mover: a
//!   mover      GET a = v1, upload v1, write the record with its address, on the condition that a is v1 still
//!   backend    SET a = v2 at any time: the condition fails, the push brings a back, v2 is moved
//! ```
//!
//! Nothing is remembered over a restart but what the records say: one that has its bytes still is to be moved. So all of
//! them are looked at when the store begins to tell of changes.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;

use super::{Offload, OffloadError, keep};
use crate::app::{App, OverBudget};
use crate::image::record::{self, Content, Record};
use crate::image::{ImageId, Metadata, Version};
use crate::read::off_worker;
use crate::store::{Change, Condition, Expiry, StoreError, Written};

/// How many ids wait at the same time. What comes beyond is found again by looking at all of them.
const MOST: usize = 100_000;

/// Between attempts where the object store fails: from the first, doubled up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_mins(1);

/// The ids whose records are to be looked at.
#[derive(Debug, Default)]
pub(crate) struct Mover {
    waiting: Mutex<MoveQueue>,
    /// Rung when there is one more.
    more: Notify,
    /// Rung when all are to be looked at.
    all: Notify,
    /// How often it failed since it succeeded last.
    failures: AtomicU32,
}

#[derive(Debug, Default)]
struct MoveQueue {
    order: VecDeque<ImageId>,
    /// Those in the order, and those that are being moved and were heard of since.
    ids: HashSet<ImageId>,
    /// Those that a worker has. Another one at the same would upload it a second time, for nothing.
    moving: HashSet<ImageId>,
    /// There were more than may wait.
    missed: bool,
}

/// An id that a worker has, until this is dropped.
struct Turn<'a> {
    mover: &'a Mover,
    id: ImageId,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut waiting = self.mover.waiting();
        waiting.moving.remove(&self.id);
        if waiting.ids.contains(&self.id) {
            waiting.order.push_back(self.id.clone());
            drop(waiting);
            self.mover.more.notify_one();
        }
    }
}

/// Why an image is where it was.
#[derive(Debug, thiserror::Error)]
enum MoveError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Offload(#[from] OffloadError),
    #[error(transparent)]
    OverBudget(#[from] OverBudget),
}

impl Mover {
    /// Takes note of what the store says.
    pub(crate) fn apply(&self, change: &Change) {
        match change {
            Change::Invalidated(id) => self.add(id.clone()),
            Change::TrackingStarted { .. } => self.all.notify_one(),
            // There is nothing left; or nobody is told of anything until it is tracked again.
            Change::Flushed
            | Change::Heartbeat { .. }
            | Change::Probed(_)
            | Change::TrackingLost { .. } => {}
        }
    }

    fn add(&self, id: ImageId) {
        let mut waiting = self.waiting();
        if waiting.ids.len() >= MOST {
            waiting.missed = true;
        } else if waiting.ids.insert(id.clone()) && !waiting.moving.contains(&id) {
            waiting.order.push_back(id);
        }
        drop(waiting);
        self.more.notify_one();
    }

    async fn next(&self) -> Turn<'_> {
        loop {
            if let Some(turn) = self.take() {
                return turn;
            }
            self.more.notified().await;
        }
    }

    fn take(&self) -> Option<Turn<'_>> {
        let mut waiting = self.waiting();
        let id = waiting.order.pop_front()?;
        waiting.ids.remove(&id);
        waiting.moving.insert(id.clone());
        if !waiting.order.is_empty() {
            // One ring wakes one worker.
            self.more.notify_one();
        } else if std::mem::take(&mut waiting.missed) {
            self.all.notify_one();
        }
        Some(Turn { mover: self, id })
    }

    fn waiting(&self) -> MutexGuard<'_, MoveQueue> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it failed when it was tried last.
    pub(super) fn is_failing(&self) -> bool {
        self.failures.load(Ordering::Relaxed) > 0
    }

    /// An image was moved.
    pub(super) fn succeed(&self) {
        self.failures.store(0, Ordering::Relaxed);
    }

    /// How long to wait after a failure.
    fn pause(&self) -> Duration {
        let failures = self.failures.fetch_add(1, Ordering::Relaxed);
        let pause = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(failures)).min(LAST_PAUSE);
        pause.mul_f64(fastrand::f64().mul_add(0.5, 0.75))
    }
}

/// Adds all ids that there are, each time that this is called for, and from time to time: nobody may tell of changes.
pub(super) async fn list(app: Weak<App>, mover: Arc<Mover>, interval: Duration) {
    loop {
        let _ = tokio::time::timeout(interval, mover.all.notified()).await;
        let mut from = None;
        loop {
            let Some(app) = app.upgrade() else { return };
            match app.store.list("", from).await {
                Ok(page) => {
                    page.ids.into_iter().for_each(|id| mover.add(id));
                    from = page.next;
                }
                // It is listed again when it is tracked again.
                Err(error) => {
                    tracing::warn!(%error, "the images to be moved can't be listed");
                    break;
                }
            }
            if from.is_none() {
                break;
            }
        }
    }
}

/// Moves one after the other, for as long as the app lives.
pub(super) async fn work(app: Weak<App>, mover: Arc<Mover>) {
    loop {
        let turn = mover.next().await;
        let Some(app) = app.upgrade() else { return };
        let Some(offload) = &app.offload else { return };
        let Err(error) = move_one(&app, offload, &turn.id).await else { continue };
        app.metrics.offload_errors.inc();
        let pause = mover.pause();
        let pause_ms = pause.as_millis();
        tracing::warn!(image.id = %turn.id, %error, pause_ms, "an image can't be moved yet");
        mover.add(turn.id.clone());
        drop((turn, app));
        tokio::time::sleep(pause).await;
    }
}

async fn move_one(app: &Arc<App>, offload: &Offload, id: &ImageId) -> Result<(), MoveError> {
    let size = match app.store.size(id).await {
        // A read says what is wrong with it.
        Err(StoreError::TooLarge { .. } | StoreError::WrongType) | Ok(0) => return Ok(()),
        size => size?,
    };
    // For the record and for the image in it.
    let _room = app.reserve(2 * size).await?;
    let Some(stored) = app.store.get(id, size).await? else {
        return Ok(());
    };
    let value = stored.value.clone();
    let found = off_worker(app, value.len(), move || found(&value)).await;
    let Some((metadata, bytes)) = found else {
        return Ok(());
    };
    let (version, media_type) = (metadata.version, metadata.media_type);
    let moved = offload.upload(id, &stored.value, version, media_type, &bytes).await?;
    if moved.value.len() > app.settings.records.max_value {
        // It could not be read any more.
        return Ok(());
    }
    // To the last byte: what is written in place of it says the same.
    let is_still = Condition::is(move |value| value == Some(&stored.value));
    let put = app.store.put(id, moved.value.clone(), Expiry::Kept, &is_still);
    match put.await? {
        Written::Done(_) => {
            app.metrics.offloaded.inc();
            keep(app, id, &moved, &metadata, bytes);
        }
        // It was replaced, which is told, or moved by another server. The object is found by the sweep.
        Written::ConditionFailed => {}
    }
    Ok(())
}

/// The image in a value, if there is one that is to be moved.
fn found(value: &[u8]) -> Option<(Metadata, Bytes)> {
    let record = Record::parse(value).ok()?;
    let Content::Inline(base64) = record.content else {
        return None;
    };
    let decoded = record::decode(&base64).ok()?;
    let length = decoded.bytes.len();
    let metadata = Metadata::new(Version::of(value), decoded.media_type, length, record.created_at);
    let metadata = Metadata { animated: decoded.animated, ..metadata };
    Some((metadata, Bytes::from_owner(decoded.bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_moved_by_one_at_a_time_and_looked_at_again_if_it_was_heard_of_meanwhile() {
        let mover = Mover::default();
        let [a, b] = ["a", "b"].map(|id| ImageId::parse(id).unwrap());
        for id in [&a, &a, &b] {
            mover.add(id.clone());
        }
        let first = mover.take().unwrap();
        mover.add(a.clone());
        let second = mover.take().unwrap();
        assert_eq!((&first.id, &second.id), (&a, &b));
        assert!(mover.take().is_none());
        drop((first, second));
        assert_eq!(mover.take().unwrap().id, a);
        assert!(mover.take().is_none());
        assert!(mover.waiting().moving.is_empty());
    }
}
