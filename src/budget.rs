//! Byte budgets: memory for values that are being fetched (`[limits] fetch_bytes`) or written (`write_bytes`).

use std::sync::Arc;
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
    /// One permit for each KiB.
    permits: Semaphore,
    bytes: u64,
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
        let permits = Semaphore::new(bytes.div_ceil(1024));
        FetchBudget { permits, bytes: bytes as u64, patience, cache, holders, metrics }
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
        self.bytes
    }

    /// The same as [`FetchBudget::reserve`], with a patience of the caller's.
    pub(crate) async fn reserve_within(
        &self,
        bytes: u64,
        patience: Duration,
    ) -> Result<SemaphorePermit<'_>, OverBudget> {
        let has_room = || {
            let in_flight = self.cache.held().in_flight as u64;
            in_flight == 0 || in_flight + bytes <= self.bytes
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
            let permit = self.permits.acquire_many(kibibytes(bytes.min(self.bytes))).await.ok()?;
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
    /// One permit for each KiB.
    permits: Semaphore,
    bytes: u64,
    patience: Duration,
    metrics: Arc<Metrics>,
}

impl WriteBudget {
    /// A budget of `bytes`. A reservation waits for at most `patience`.
    #[must_use]
    pub(crate) fn new(bytes: usize, patience: Duration, metrics: Arc<Metrics>) -> WriteBudget {
        let permits = Semaphore::new(bytes.div_ceil(1024));
        WriteBudget { permits, bytes: bytes as u64, patience, metrics }
    }

    /// Reserves memory for a write. A write larger than the budget gets all of it.
    pub(crate) async fn reserve(&self, bytes: u64) -> Result<WriteReservation<'_>, OverBudget> {
        let permits = self.permits.acquire_many(kibibytes(bytes.min(self.bytes)));
        let permit = tokio::time::timeout(self.patience, permits).await;
        let Ok(Ok(permit)) = permit else { return Err(self.shed()) };
        Ok(WriteReservation { permit, budget: self })
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
            let permit = self.budget.permits.try_acquire_many(more);
            self.permit.merge(permit.map_err(|_full| self.budget.shed())?);
        }
        Ok(())
    }
}

fn kibibytes(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}

/// A budget for memory is used up (`[limits] fetch_bytes` or `write_bytes`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many images are being fetched, sent or written: there is no memory for another one")]
pub struct OverBudget;
