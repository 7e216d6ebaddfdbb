//! The parts of one running service, put together.

use std::sync::Arc;

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::cache::Cache;
use crate::index::{Bounds, Guard, Index};
use crate::read::{CorruptLog, Outcome};
use crate::settings::Settings;
use crate::store::{Announcer, Change, Store, StoreError};
use crate::telemetry::Metrics;

/// Everything that a request needs. There are no globals: two of them may run in one process.
#[derive(Debug)]
pub struct App {
    /// As they were given at start.
    pub settings: Settings,
    /// Where the records are.
    pub store: Store,
    /// What the store is known to hold.
    pub index: Arc<Index<Outcome>>,
    /// The decoded images in memory.
    pub cache: Cache,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Which corrupt records were logged.
    pub corrupt_log: CorruptLog,
    /// One permit for each value that is hashed and decoded at the same time: as many as there are cores,
    /// since more would only make each other wait.
    pub decoding: Arc<Semaphore>,
    /// One permit for each KiB of values that are being fetched and decoded.
    pub fetching: Semaphore,
}

impl App {
    /// Opens the store, listens to it, and prepares the rest.
    pub async fn build(settings: Settings) -> anyhow::Result<Arc<App>> {
        App::build_guarded(settings, Guard::On).await
    }

    #[doc(hidden)]
    pub async fn build_guarded(settings: Settings, guard: Guard) -> anyhow::Result<Arc<App>> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let bounds = Bounds {
            entries: settings.cache.known,
            waiters: settings.limits.waiters.get(),
            stale_if_error: settings.cache.stale_if_error,
        };
        let index = Arc::new(Index::guarded(bounds, guard));
        let metrics = Arc::new(Metrics::new());
        let mut store = Store::open(&settings).await?;
        store.watch({
            let (index, metrics) = (Arc::clone(&index), Arc::clone(&metrics));
            Announcer::new(move |change| {
                let invalidates = matches!(change, Change::Of(_) | Change::OfEverything);
                index.hear(change);
                if invalidates {
                    metrics.invalidations.inc();
                }
            })
        });
        Ok(Arc::new(App {
            store,
            index,
            cache: Cache::new(settings.cache.images, settings.cache.bytes),
            metrics,
            corrupt_log: CorruptLog::default(),
            decoding: Arc::new(Semaphore::new(cores)),
            fetching: Semaphore::new(settings.limits.fetch_bytes.div_ceil(1024)),
            settings,
        }))
    }

    /// Waits for room for a value of some bytes among those that are being fetched, no longer than Redis may
    /// take to answer. A value larger than all the room there is gets all of it.
    pub async fn room_for(&self, bytes: u64) -> Result<SemaphorePermit<'_>, StoreError> {
        let all = self.settings.limits.fetch_bytes.div_ceil(1024) as u64;
        let wanted = u32::try_from(bytes.div_ceil(1024).min(all)).unwrap_or(u32::MAX);
        let room = self.fetching.acquire_many(wanted);
        match tokio::time::timeout(self.settings.redis.response_timeout, room).await {
            Ok(Ok(room)) => Ok(room),
            Ok(Err(_)) | Err(_) => Err(StoreError::TimedOut),
        }
    }
}
