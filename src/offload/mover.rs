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
//!
//! An image that can't be moved waits in the queue until it is tried again, and others overtake it. While the object store or
//! the store of records is away, all images wait.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::circuit::{self, pause};
use super::{Offload, OffloadError, sweep};
use crate::budget::OverBudget;
use crate::image::record::{self, Content, Record};
use crate::image::{ImageId, Metadata, Version};
use crate::settings::OffloadSettings;
use crate::store::{Change, Condition, Expiry, LISTED_KEYS, Store, StoreError, Written};
use crate::task::Task;

/// Longest queue. Ids beyond it are found again by listing all records.
pub(super) const MOST: usize = 100_000;

/// Pauses until an image that can't be moved is tried again: the first, doubled with each failure up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_mins(1);

/// Pause of a worker for each failed upload since the last one that succeeded, up to the longest. A few images that can't be
/// moved delay nothing noticeably; where none can, the worker tries one a second.
const BREATH: Duration = Duration::from_millis(10);
const LONGEST_BREATH: Duration = Duration::from_secs(1);

/// The queue of ids whose records may have to be moved.
#[derive(Debug, Default)]
pub struct Mover {
    waiting: Mutex<MoveQueue>,
    /// Notified when an id is queued.
    more: Notify,
    /// Notified when all records are to be listed.
    all: Notify,
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
    /// The ids that couldn't be moved, in the order in which they are tried again.
    later: BTreeSet<(Instant, ImageId)>,
    /// The same ids, with the number of failures in a row and the time of the next attempt.
    failed: HashMap<ImageId, (u32, Instant)>,
}

impl MoveQueue {
    fn push(&mut self, id: ImageId) {
        if self.ids.insert(id.clone()) && !self.moving.contains(&id) {
            self.order.push_back(id);
        }
    }

    /// Forgets that an image couldn't be moved. Returns the number of failures in a row.
    fn forgive(&mut self, id: &ImageId) -> u32 {
        let Some((failures, retry_at)) = self.failed.remove(id) else { return 0 };
        self.later.remove(&(retry_at, id.clone()));
        failures
    }
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

impl MoveError {
    /// True if the image itself may be the reason, so that others can be moved.
    fn may_be_of_the_image(&self) -> bool {
        match self {
            MoveError::Store(_) | MoveError::OverBudget(_) => false,
            MoveError::Offload(error) => {
                !matches!(error, OffloadError::Away(_) | OffloadError::OverBudget(_))
            }
        }
    }
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

    pub(super) fn add(&self, id: ImageId) {
        let mut waiting = self.waiting();
        if waiting.ids.len() >= MOST {
            waiting.missed = true;
        } else {
            waiting.push(id);
        }
        drop(waiting);
        self.more.notify_one();
    }

    /// Queues an image that couldn't be moved, to be tried again after a pause. Returns the pause if this is its first
    /// failure.
    fn add_later(&self, id: &ImageId, now: Instant) -> Option<Duration> {
        let mut waiting = self.waiting();
        let failures = waiting.forgive(id);
        let pause = pause(FIRST_PAUSE, failures, LAST_PAUSE);
        // Beyond, it is found again when all records are listed.
        if waiting.failed.len() < MOST {
            waiting.failed.insert(id.clone(), (failures + 1, now + pause));
            waiting.later.insert((now + pause, id.clone()));
        }
        drop(waiting);
        // A worker that waits for more must not wait longer than until then.
        self.more.notify_one();
        (failures == 0).then_some(pause)
    }

    async fn next(&self) -> Turn<'_> {
        loop {
            if let Some(turn) = self.take(Instant::now()) {
                return turn;
            }
            let next = self.waiting().later.first().map(|(retry_at, _)| *retry_at);
            match next {
                Some(next) => drop(tokio::time::timeout_at(next, self.more.notified()).await),
                None => self.more.notified().await,
            }
        }
    }

    fn take(&self, now: Instant) -> Option<Turn<'_>> {
        let mut waiting = self.waiting();
        while let Some((retry_at, _)) = waiting.later.first()
            && *retry_at <= now
            && let Some((_, id)) = waiting.later.pop_first()
        {
            waiting.push(id);
        }
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
}

/// The tasks that move, sweep and probe. They end when this is dropped.
#[derive(Debug)]
pub(crate) struct MoveTasks(#[expect(dead_code, reason = "held for its tasks")] Vec<Task>);

impl MoveTasks {
    /// Starts to move, to sweep and to probe. `settling` is the longest time from an upload to the write of its record, in addition
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
        tasks.push(Task::start("offload probe", {
            let (_, offload) = both();
            async move { circuit::run(&offload).await }
        }));
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
            match store.list("", from, LISTED_KEYS).await {
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
    let (mover, circuit) = (&offload.mover, &offload.circuit);
    let mut failures = 0;
    loop {
        circuit.until_back().await;
        let turn = mover.next().await;
        let id = &turn.id;
        let error = match move_one(store, offload, id).await {
            Ok(()) => {
                failures = 0;
                mover.waiting().forgive(id);
                continue;
            }
            Err(MoveError::Offload(OffloadError::Away(_))) => {
                mover.add(id.clone());
                continue;
            }
            Err(error) => error,
        };
        offload.parts.metrics.offload_errors.inc();
        if error.may_be_of_the_image() {
            if let Some(pause) = mover.add_later(id, Instant::now()) {
                let pause_ms = pause.as_millis();
                tracing::warn!(image.id = %id, %error, pause_ms, "an image can't be moved yet");
            } else {
                tracing::debug!(image.id = %id, %error, "an image can't be moved yet");
            }
            drop(turn);
            tokio::time::sleep((BREATH * circuit.failed_uploads()).min(LONGEST_BREATH)).await;
        } else {
            let pause = pause(FIRST_PAUSE, failures, LAST_PAUSE);
            failures += 1;
            tracing::warn!(%error, pause_ms = pause.as_millis(), "images can't be moved yet");
            mover.add(id.clone());
            drop(turn);
            tokio::time::sleep(pause).await;
        }
    }
}

async fn move_one(store: &Store, offload: &Offload, id: &ImageId) -> Result<(), MoveError> {
    let size = match store.size(id).await {
        // A read reports what is wrong with it.
        Err(StoreError::TooLarge { .. } | StoreError::WrongType) | Ok(0) => return Ok(()),
        size => size?,
    };
    // For the record and for the image in it.
    let _reservation = offload.parts.budget.reserve(None, 2 * size).await?;
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
    let metadata = Metadata { traits: decoded.traits, ..metadata };
    Some((metadata, Bytes::from_owner(decoded.bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids<const N: usize>(names: [&str; N]) -> [ImageId; N] {
        names.map(|name| ImageId::parse(name).unwrap())
    }

    #[test]
    fn an_image_is_moved_by_one_at_a_time_and_looked_at_again_if_it_was_heard_of_meanwhile() {
        let (mover, now) = (Mover::default(), Instant::now());
        let [a, b] = ids(["a", "b"]);
        for id in [&a, &a, &b] {
            mover.add(id.clone());
        }
        let first = mover.take(now).unwrap();
        mover.add(a.clone());
        let second = mover.take(now).unwrap();
        assert_eq!((&first.id, &second.id), (&a, &b));
        assert!(mover.take(now).is_none());
        drop((first, second));
        assert_eq!(mover.take(now).unwrap().id, a);
        assert!(mover.take(now).is_none());
        assert!(mover.waiting().moving.is_empty());
    }

    #[test]
    fn an_image_that_cannot_be_moved_is_overtaken_and_tried_again_later_each_time() {
        let (mover, mut now) = (Mover::default(), Instant::now());
        let [a, b] = ids(["a", "b"]);
        mover.add(a.clone());
        mover.add(b.clone());
        let mut last = Duration::ZERO;
        for failures in 0..4 {
            let turn = mover.take(now).unwrap();
            assert_eq!(turn.id, a);
            assert_eq!(mover.add_later(&turn.id, now).is_some(), failures == 0);
            drop(turn);
            if failures == 0 {
                assert_eq!(mover.take(now).unwrap().id, b);
            }
            assert!(mover.take(now).is_none());
            let (next, _) = mover.waiting().later.first().cloned().unwrap();
            assert!(next - now > last, "{:?} after {last:?}", next - now);
            (last, now) = (next - now, next);
        }
        // A new record is tried at once, and its success forgives.
        mover.add(a.clone());
        assert_eq!(mover.take(now).unwrap().id, a);
        mover.waiting().forgive(&a);
        assert!(mover.waiting().later.is_empty());
        assert!(mover.waiting().failed.is_empty());
    }
}
