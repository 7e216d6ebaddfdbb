//! Byte budgets: memory for values that are being fetched (`[limits] fetch_bytes`) or written (`write_bytes`).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::cache::Cache;
use crate::holders::Holders;
use crate::metrics::{Metrics, Shed};

/// Memory for values that are being fetched and decoded.
///
/// Bodies that have left the cache, or never were in it, and that slow clients are still reading, count towards the same
/// budget.
#[derive(Debug)]
pub struct FetchBudget {
    room: Room,
    patience: Duration,
    cache: Arc<Cache>,
    holders: Arc<Holders>,
    metrics: Arc<Metrics>,
}

impl FetchBudget {
    /// A budget of `bytes`. A reservation waits for at most `patience`.
    #[must_use]
    pub(crate) fn new(
        bytes: usize,
        patience: Duration,
        cache: Arc<Cache>,
        holders: Arc<Holders>,
        metrics: Arc<Metrics>,
    ) -> FetchBudget {
        FetchBudget { room: Room::new(bytes), patience, cache, holders, metrics }
    }

    /// Reserves memory for a value. A value larger than the budget gets all of it.
    ///
    /// Drops the slowest of the clients that hold the memory with their answers: nobody knows when they will let go of it, and
    /// a new reader is as good as they are.
    pub async fn reserve(&self, bytes: u64) -> Result<SemaphorePermit<'_>, OverBudget> {
        self.reserve_within(bytes, self.patience).await
    }

    /// All of the budget, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.room.bytes()
    }

    /// Changes the budget. What is reserved stays so.
    pub(crate) fn resize(&self, bytes: usize) {
        self.room.resize(bytes);
    }

    /// The same as [`FetchBudget::reserve`], with a patience of the caller's.
    pub(crate) async fn reserve_within(
        &self,
        bytes: u64,
        patience: Duration,
    ) -> Result<SemaphorePermit<'_>, OverBudget> {
        let has_room = || {
            let in_flight = self.cache.held().in_flight as u64;
            in_flight == 0 || in_flight + bytes <= self.bytes()
        };
        let fits = || {
            // Images that are in memory for a moment make room first.
            has_room() || {
                self.cache.make_room();
                has_room()
            }
        };
        let reserved = async {
            // Before the queue, whose first would otherwise wait for slow clients, and all others for the first.
            self.holders.drop_until(fits).await;
            let permit = self.room.reserve(bytes).await?;
            // Fetches that were ahead in the queue may have filled it since.
            self.holders.drop_until(fits).await;
            Some(permit)
        };
        let permit = tokio::time::timeout(patience, reserved).await.ok().flatten();
        if permit.is_none() {
            self.metrics.count_shed(Shed::FetchBytes);
        }
        permit.ok_or(OverBudget)
    }
}

/// Memory for what is being written. It is separate, so that writers can't take the readers' memory.
#[derive(Debug)]
pub(crate) struct WriteBudget {
    room: Room,
    patience: Duration,
    metrics: Arc<Metrics>,
}

impl WriteBudget {
    /// A budget of `bytes`. A reservation waits for at most `patience`.
    #[must_use]
    pub(crate) fn new(bytes: usize, patience: Duration, metrics: Arc<Metrics>) -> WriteBudget {
        WriteBudget { room: Room::new(bytes), patience, metrics }
    }

    /// Reserves memory for a write. A write larger than the budget gets all of it.
    pub(crate) async fn reserve(&self, bytes: u64) -> Result<WriteReservation<'_>, OverBudget> {
        let permit = tokio::time::timeout(self.patience, self.room.reserve(bytes)).await;
        let Ok(Some(permit)) = permit else { return Err(self.shed()) };
        Ok(WriteReservation { permit, budget: self })
    }

    /// Changes the budget. What is reserved stays so.
    pub(crate) fn resize(&self, bytes: usize) {
        self.room.resize(bytes);
    }

    fn shed(&self) -> OverBudget {
        self.metrics.count_shed(Shed::WriteBytes);
        OverBudget
    }
}

/// Memory that is reserved for a write, and grows with it.
#[derive(Debug)]
pub(crate) struct WriteReservation<'a> {
    permit: SemaphorePermit<'a>,
    budget: &'a WriteBudget,
}

impl WriteReservation<'_> {
    /// Grows to `bytes` in all. It doesn't wait: two writes that each wait for more would wait for each other.
    pub(crate) fn grow(&mut self, bytes: u64) -> Result<(), OverBudget> {
        let reserved = u32::try_from(self.permit.num_permits()).unwrap_or(u32::MAX);
        let more = kibibytes(bytes).saturating_sub(reserved);
        if more > 0 {
            let permit = self.budget.room.permits.try_acquire_many(more);
            self.permit.merge(permit.map_err(|_full| self.budget.shed())?);
        }
        Ok(())
    }
}

/// Memory of which parts are reserved, in turn.
#[derive(Debug)]
struct Room {
    /// One permit for each KiB.
    permits: Arc<Semaphore>,
    bytes: AtomicU64,
}

impl Room {
    fn new(bytes: usize) -> Room {
        let permits = Arc::new(Semaphore::new(bytes.div_ceil(1024)));
        Room { permits, bytes: AtomicU64::new(bytes as u64) }
    }

    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Waits for a part; all of it for more bytes than there are.
    async fn reserve(&self, bytes: u64) -> Option<SemaphorePermit<'_>> {
        self.permits.acquire_many(kibibytes(bytes.min(self.bytes()))).await.ok()
    }

    /// Changes the size. Surplus permits are taken away in turn, like a reservation that is never given back.
    fn resize(&self, bytes: usize) {
        let before = self.bytes.swap(bytes as u64, Ordering::Relaxed);
        let (before, now) = (kibibytes(before), kibibytes(bytes as u64));
        if now >= before {
            self.permits.add_permits((now - before) as usize);
            return;
        }
        let permits = Arc::clone(&self.permits);
        tokio::spawn(async move {
            if let Ok(surplus) = permits.acquire_many(before - now).await {
                surplus.forget();
            }
        });
    }
}

fn kibibytes(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}

/// A budget for memory is used up (`[limits] fetch_bytes` or `write_bytes`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many images are being fetched, sent or written: there is no memory for another one")]
pub struct OverBudget;

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn a_budget_that_shrinks_gives_out_less_once_its_memory_is_free() {
        let room = Room::new(4096);
        let held = room.reserve(3072).await.unwrap();
        room.resize(2048);
        // The surplus is next in turn, before whoever comes now.
        tokio::task::yield_now().await;
        assert!(room.reserve(1024).now_or_never().is_none());
        drop(held);
        tokio::task::yield_now().await;
        let both = room.reserve(9999).await.unwrap();
        assert_eq!(both.num_permits(), 2);
        assert!(room.reserve(1).now_or_never().is_none());
        room.resize(4096);
        assert_eq!(room.reserve(2048).await.unwrap().num_permits(), 2);
    }
}
