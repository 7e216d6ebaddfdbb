//! Moves images that backends wrote into records to the object store, without the backends noticing.
//!
//! ```text
//!   backend ── SET a = v1 ──▶ Redis ── push ──▶ Mover: a
//!   mover      GET a = v1, upload v1, write the record with its address, on the condition that a is still v1
//!   backend    SET a = v2 at any time: the condition fails, the push queues a again, v2 is moved
//! ```
//!
//! The records themselves are the only memory across restarts: a record that still has its bytes is to be moved. So all
//! records are listed whenever tracking starts.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;

use super::{Offload, OffloadError, sweep};
use crate::budget::OverBudget;
use crate::image::record::{self, Content, Record};
use crate::image::{ImageId, Metadata, Version};
use crate::settings::OffloadSettings;
use crate::store::{Change, Condition, Expiry, Store, StoreError, Written};
use crate::task::Task;

/// Longest queue. Ids beyond it are found again by listing all records.
const MOST: usize = 100_000;

/// Pauses while the object store fails: the first, doubled with each failure up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_mins(1);

/// The queue of ids whose records may have to be moved.
#[derive(Debug, Default)]
pub struct Mover {
    waiting: Mutex<MoveQueue>,
    /// Notified when an id is queued.
    more: Notify,
    /// Notified when all records are to be listed.
    all: Notify,
    /// Failures since the last success.
    failures: AtomicU32,
}

#[derive(Debug, Default)]
struct MoveQueue {
    order: VecDeque<ImageId>,
    /// The ids in `order`, and those that are being moved and have changed since.
    ids: HashSet<ImageId>,
    /// The ids that a worker has. A second worker would only upload the same image again.
    moving: HashSet<ImageId>,
    /// The queue was full, and ids were dropped.
    missed: bool,
}

/// An id that a worker has. Dropping it gives the id back.
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

/// Reasons for a failed move.
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
    /// Queues what a change of the store may have left to move.
    pub(crate) fn apply(&self, change: &Change) {
        match change {
            Change::Invalidated(id) => self.add(id.clone()),
            Change::TrackingStarted { .. } => self.all.notify_one(),
            // Either no record is left, or all are listed when tracking starts again.
            Change::Flushed
            | Change::Heartbeat { .. }
            | Change::Awake { .. }
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
            // One notification wakes one worker.
            self.more.notify_one();
        } else if std::mem::take(&mut waiting.missed) {
            self.all.notify_one();
        }
        Some(Turn { mover: self, id })
    }

    fn waiting(&self) -> MutexGuard<'_, MoveQueue> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if the last attempt failed.
    pub(super) fn is_failing(&self) -> bool {
        self.failures.load(Ordering::Relaxed) > 0
    }

    /// Notes a success.
    pub(super) fn succeed(&self) {
        self.failures.store(0, Ordering::Relaxed);
    }

    /// Notes a failure, and gives the pause after it.
    fn pause(&self) -> Duration {
        let failures = self.failures.fetch_add(1, Ordering::Relaxed);
        let pause = FIRST_PAUSE.saturating_mul(2_u32.saturating_pow(failures)).min(LAST_PAUSE);
        pause.mul_f64(fastrand::f64().mul_add(0.5, 0.75))
    }
}

/// The tasks that move and sweep. They end when this is dropped.
#[derive(Debug)]
pub(crate) struct MoveTasks(#[expect(dead_code, reason = "held for its tasks")] Vec<Task>);

impl MoveTasks {
    /// Starts to move and to sweep. `settling` is the longest time from an upload to the write of its record, in addition
    /// to `[offload] timeout`.
    #[must_use]
    pub(crate) fn start(
        store: &Arc<Store>,
        offload: &Arc<Offload>,
        settings: &OffloadSettings,
        settling: Duration,
    ) -> MoveTasks {
        let both = || (Arc::clone(store), Arc::clone(offload));
        let (store, offload) = both();
        let mut tasks = vec![Task::start("offload list", {
            let interval = settings.sweep_interval;
            async move { list(&store, &offload.mover, interval).await }
        })];
        for _ in 0..settings.concurrency.get() {
            let (store, offload) = both();
            tasks.push(Task::start("offload move", async move { work(&store, &offload).await }));
        }
        let ((store, offload), settings) = (both(), settings.clone());
        tasks.push(Task::start("offload sweep", async move {
            sweep::run(&store, &offload, &settings, settling).await;
        }));
        MoveTasks(tasks)
    }
}

/// Queues all ids of the store: on notification, and from time to time, since an untracked store notifies nobody.
async fn list(store: &Store, mover: &Mover, interval: Duration) {
    loop {
        let _ = tokio::time::timeout(interval, mover.all.notified()).await;
        let mut from = None;
        loop {
            match store.list("", from).await {
                Ok(page) => {
                    page.ids.into_iter().for_each(|id| mover.add(id));
                    from = page.next;
                }
                // It is listed again when tracking starts again.
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

/// Moves one image after the other.
async fn work(store: &Store, offload: &Offload) {
    let mover = &offload.mover;
    loop {
        let turn = mover.next().await;
        let Err(error) = move_one(store, offload, &turn.id).await else { continue };
        offload.parts.metrics.offload_errors.inc();
        let pause = mover.pause();
        let pause_ms = pause.as_millis();
        tracing::warn!(image.id = %turn.id, %error, pause_ms, "an image can't be moved yet");
        mover.add(turn.id.clone());
        drop(turn);
        tokio::time::sleep(pause).await;
    }
}

async fn move_one(store: &Store, offload: &Offload, id: &ImageId) -> Result<(), MoveError> {
    let size = match store.size(id).await {
        // A read reports what is wrong with it.
        Err(StoreError::TooLarge { .. } | StoreError::WrongType) | Ok(0) => return Ok(()),
        size => size?,
    };
    // For the record and for the image in it.
    let _reservation = offload.parts.budget.reserve(2 * size).await?;
    let Some(stored) = store.get(id, size).await? else {
        return Ok(());
    };
    let value = stored.value.clone();
    let found = offload.parts.cpu.run_on(value.len(), move || inline_image(&value)).await;
    let Some((metadata, bytes)) = found else {
        return Ok(());
    };
    let (version, media_type) = (metadata.version, metadata.media_type);
    let moved = offload.upload(id, &stored.value, version, media_type, &bytes).await?;
    if moved.value.len() > offload.max_value {
        // It could not be read any more.
        return Ok(());
    }
    // To the last byte: the new record says the same as the one that it replaces.
    let is_unchanged = Condition::is(move |value| value == Some(&stored.value));
    let put = store.put(id, moved.value.clone(), Expiry::Kept, &is_unchanged);
    match put.await? {
        Written::Done(_) => offload.keep(id, &moved, &metadata, bytes),
        // It was replaced, which is pushed, or moved by another server. The sweep finds the object.
        Written::ConditionFailed => {}
    }
    Ok(())
}

/// The image of a record that still has its bytes.
fn inline_image(value: &[u8]) -> Option<(Metadata, Bytes)> {
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
