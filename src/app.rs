//! The parts of one running service, put together.

use std::sync::Arc;

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::cache::Cache;
use crate::events::hub::Hub;
use crate::http::auth::Writers;
use crate::index::{Guard, Index, IndexLimits};
use crate::metrics::{Metrics, Shed};
use crate::offload::Offload;
use crate::read::{CorruptLog, Outcome};
use crate::render::Renderer;
use crate::settings::Settings;
use crate::shutdown::Shutdown;
use crate::store::{Change, ChangeListener, Store};

/// Everything that a request needs. There are no globals: two of them may run in one process.
#[derive(Debug)]
pub struct App {
    /// As they were given at start.
    pub settings: Settings,
    /// Where the records are.
    pub store: Store,
    /// Where images are that moved out of the records, if anywhere.
    pub offload: Option<Offload>,
    /// What the store is known to hold.
    pub index: Arc<Index<Outcome>>,
    /// The decoded images in memory.
    pub cache: Cache,
    /// Who is told of changes.
    pub events: Arc<Hub>,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// Who may write.
    pub writers: Writers,
    /// What makes pictures of them.
    pub renderer: Renderer,
    /// Which corrupt records were logged.
    pub corrupt_log: CorruptLog,
    /// One permit for each value that is hashed and decoded at the same time: as many as there are cores,
    /// since more would only make each other wait.
    pub decoding: Arc<Semaphore>,
    /// One permit for each KiB of values that are being fetched and decoded.
    pub fetching: Semaphore,
    /// One permit for each KiB of what is being written: no writer takes a reader's room.
    pub writing: Semaphore,
    /// The way to the end, which the server moves on.
    pub shutdown: Shutdown,
}

impl App {
    /// Opens the store, listens to it, and prepares the rest.
    pub async fn build(settings: Settings) -> anyhow::Result<Arc<App>> {
        App::build_guarded(settings, Guard::On).await
    }

    #[doc(hidden)]
    pub async fn build_guarded(settings: Settings, guard: Guard) -> anyhow::Result<Arc<App>> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let bounds = IndexLimits {
            entries: settings.cache.known,
            waiters: settings.limits.waiters.get(),
            fetches: settings.limits.requests.get(),
            stale_if_error: settings.cache.stale_if_error,
        };
        let index = Arc::new(Index::guarded(bounds, guard));
        let metrics = Arc::new(Metrics::new());
        let events = Arc::new(Hub::new(&settings));
        let offload = Offload::open(&settings.offload)?;
        let mover = offload.as_ref().map(|offload| Arc::clone(offload.mover()));
        let mut store = Store::open(&settings).await?;
        store.watch({
            let (index, metrics) = (Arc::clone(&index), Arc::clone(&metrics));
            let events = Arc::clone(&events);
            ChangeListener::new(move |change| {
                match &change {
                    Change::Invalidated(id) => {
                        metrics.invalidations.inc();
                        metrics.push_came(id);
                    }
                    Change::Flushed => {
                        metrics.invalidations.inc();
                    }
                    Change::Heartbeat { round_trip, .. } => metrics.observe_heartbeat(*round_trip),
                    Change::TrackingLost { .. } => metrics.expect_no_push(None),
                    Change::TrackingStarted { .. } | Change::Probed(_) => {}
                }
                let told = change.clone();
                index.apply(change);
                // Afterwards, so that whoever looks sees no more what was there before.
                events.apply(&told);
                if let Some(mover) = &mover {
                    mover.apply(&told);
                }
            })
        });
        let app = Arc::new(App {
            store,
            offload,
            index,
            cache: Cache::new(settings.cache.images, settings.cache.bytes),
            events,
            metrics,
            writers: Writers::load(&settings.writes)?,
            renderer: Renderer::new(cores, &settings),
            corrupt_log: CorruptLog::default(),
            decoding: Arc::new(Semaphore::new(cores)),
            fetching: Semaphore::new(settings.limits.fetch_bytes.div_ceil(1024)),
            writing: Semaphore::new(settings.limits.write_bytes.div_ceil(1024)),
            shutdown: Shutdown::new(),
            settings,
        });
        app.events.start(&app);
        if let Some(offload) = &app.offload {
            offload.start(&app, &app.settings.offload);
        }
        Ok(app)
    }

    /// Waits for room for a value of some bytes among those that are being fetched, no longer than Redis may
    /// take to answer. A value larger than all the room there is gets all of it.
    ///
    /// Images that have left the cache, or never were in it, and that slow clients are still reading, take
    /// from the same room: nobody knows for how long, so that a value without room beside them is refused
    /// at once.
    pub async fn reserve(&self, bytes: u64) -> Result<SemaphorePermit<'_>, OverBudget> {
        let all = self.settings.limits.fetch_bytes as u64;
        let none = || {
            self.metrics.count_shed(Shed::FetchBytes);
            OverBudget
        };
        let is_full = || {
            let in_flight = self.cache.held().in_flight as u64;
            in_flight > 0 && in_flight + bytes > all
        };
        if is_full() {
            return Err(none());
        }
        let wanted = bytes.div_ceil(1024).min(all.div_ceil(1024));
        let room = self.fetching.acquire_many(u32::try_from(wanted).unwrap_or(u32::MAX));
        match tokio::time::timeout(self.settings.redis.response_timeout, room).await {
            // Those that were waiting in front may have filled it since.
            Ok(Ok(room)) if !is_full() => Ok(room),
            Ok(Ok(_) | Err(_)) | Err(_) => Err(none()),
        }
    }

    /// Waits for room for some bytes to be written, no longer than Redis may take to answer. Those that need more than
    /// there is get all of it.
    pub async fn reserve_write(&self, bytes: u64) -> Result<WriteReservation<'_>, OverBudget> {
        let all = self.settings.limits.write_bytes as u64;
        let room = self.writing.acquire_many(kibibytes(bytes.min(all)));
        let room = tokio::time::timeout(self.settings.redis.response_timeout, room).await;
        let Ok(Ok(permit)) = room else {
            self.metrics.count_shed(Shed::WriteBytes);
            return Err(OverBudget);
        };
        Ok(WriteReservation { permit, app: self })
    }
}

/// Room for what is being written, which grows with it.
#[derive(Debug)]
pub struct WriteReservation<'a> {
    permit: SemaphorePermit<'a>,
    app: &'a App,
}

impl WriteReservation<'_> {
    /// Makes room for so many bytes, if it is free: nobody who has some waits for more.
    pub fn grow(&mut self, bytes: u64) -> Result<(), OverBudget> {
        let has = u32::try_from(self.permit.num_permits()).unwrap_or(u32::MAX);
        let more = kibibytes(bytes).saturating_sub(has);
        if more > 0 {
            match self.app.writing.try_acquire_many(more) {
                Ok(permit) => self.permit.merge(permit),
                Err(_full) => {
                    self.app.metrics.count_shed(Shed::WriteBytes);
                    return Err(OverBudget);
                }
            }
        }
        Ok(())
    }
}

fn kibibytes(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(1024)).unwrap_or(u32::MAX)
}

/// Memory is full of images that are being fetched and sent (`[limits] fetch_bytes`), or written (`write_bytes`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("too many images are being fetched, sent or written: there is no room for another one")]
pub struct OverBudget;
