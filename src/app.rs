//! The parts of one running service, put together.

use std::sync::Arc;

use tokio::sync::Semaphore;

use crate::cache::Cache;
use crate::read::CorruptLog;
use crate::settings::Settings;
use crate::store::Store;
use crate::telemetry::Metrics;

/// Everything that a request needs. There are no globals: two of them may run in one process.
#[derive(Debug)]
pub struct App {
    /// As they were given at start.
    pub settings: Settings,
    /// Where the records are.
    pub store: Store,
    /// The decoded images in memory.
    pub cache: Cache,
    /// What is counted.
    pub metrics: Metrics,
    /// Which corrupt records were logged.
    pub corrupt_log: CorruptLog,
    /// One permit for each value that is hashed and decoded at the same time: as many as there are cores,
    /// since more would only make each other wait.
    pub decoding: Arc<Semaphore>,
}

impl App {
    /// Opens the store and prepares the rest.
    pub async fn build(settings: Settings) -> anyhow::Result<Arc<App>> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Arc::new(App {
            store: Store::open(&settings).await?,
            cache: Cache::new(&settings.cache),
            metrics: Metrics::new(),
            corrupt_log: CorruptLog::default(),
            decoding: Arc::new(Semaphore::new(cores)),
            settings,
        }))
    }
}
