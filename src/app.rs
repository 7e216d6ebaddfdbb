//! The composition root: the parts of one running service, put together.

use std::sync::Arc;

use tokio::sync::Notify;

use crate::audit::Auditor;
use crate::budget::{FetchBudget, WriteBudget};
use crate::cache::{Cache, CacheLimits};
use crate::changes::Changes;
use crate::clock::Clock;
use crate::cpu::Cpu;
use crate::events::Hub;
use crate::holders::Holders;
use crate::index::{Index, IndexLimits, Rules};
use crate::limit::{HeadLimits, Shares, Turns};
use crate::metrics::Metrics;
use crate::offload::{self, MoveTasks, Mover, Offload};
use crate::originals::Originals;
use crate::peer::PeerKey;
use crate::read::{CorruptLog, FETCHES_EACH, Outcome, Reader};
use crate::render::Renderer;
use crate::settings::{LimitSettings, Settings, Token};
use crate::shutdown::Shutdown;
use crate::store::{ChangeListener, Store};
use crate::task::Task;
use crate::tokens::Tokens;
use crate::write::Writer;

/// The share of the fetch budget that images which the cache doesn't keep may have for a moment, as one part in so many.
const RECENT_SHARE: usize = 4;

/// The parts of one service. Two services may run in one process: there are no globals.
///
/// Only `http` and `server` receive an `App`. Each part has the neighbours that it needs.
#[derive(Debug)]
pub struct App {
    /// The settings, as given at start. Those that a reload may change are read from the parts that obey them.
    pub settings: Settings,
    /// The store of records.
    pub(crate) store: Arc<Store>,
    /// The known content of the store.
    pub index: Arc<Index<Outcome>>,
    /// The bytes in memory.
    pub(crate) cache: Arc<Cache>,
    /// Reads images.
    pub reader: Arc<Reader>,
    /// Writes images.
    pub(crate) writer: Writer,
    budget: Arc<FetchBudget>,
    /// Memory for what is being written.
    pub(crate) write_budget: WriteBudget,
    /// Renders pictures.
    pub(crate) renderer: Renderer,
    /// The event streams, and the images that they follow.
    pub(crate) hub: Arc<Hub>,
    /// Hashes and decodes.
    pub(crate) cpu: Cpu,
    /// The answers that are being sent.
    pub(crate) holders: Arc<Holders>,
    /// The places for connections, and for requests that are worked on.
    pub(crate) connections: Shares<PeerKey>,
    pub(crate) requests: Shares<PeerKey>,
    pub(crate) head_limits: Arc<HeadLimits>,
    /// Notified at each reload of the settings.
    pub(crate) reloaded: Arc<Notify>,
    /// The counters.
    pub(crate) metrics: Arc<Metrics>,
    /// The tokens that may write and list.
    pub(crate) tokens: Tokens,
    #[expect(dead_code, reason = "held for its tasks")]
    moving: Option<MoveTasks>,
    #[expect(dead_code, reason = "held for its task")]
    audits: Option<Task>,
    /// The phases of a stop. The server moves it on.
    pub(crate) shutdown: Shutdown,
}

impl App {
    /// Opens the store and puts the parts together.
    pub async fn build(settings: Settings) -> anyhow::Result<Arc<App>> {
        App::build_with(settings, None).await
    }

    /// The same, with the token that the server made since it found none in the settings.
    pub(crate) async fn build_with(
        settings: Settings,
        made: Option<Token>,
    ) -> anyhow::Result<Arc<App>> {
        App::assemble(settings, made, Rules::default(), Clock::default()).await
    }

    #[doc(hidden)]
    pub async fn build_for_test(
        settings: Settings,
        rules: Rules,
        clock: Clock,
    ) -> anyhow::Result<Arc<App>> {
        App::assemble(settings, None, rules, clock).await
    }

    /// Takes over the limits of a reload. What is held beyond a limit stays until it is let go.
    pub(crate) fn set_limits(&self, limits: &LimitSettings) {
        self.index.resize(limits.waiters.get(), limits.requests.get());
        self.renderer.resize(limits.renders);
        self.holders.resize(limits.answers.get());
        self.connections.resize(limits.connections.get());
        self.requests.resize(limits.requests.get());
        self.budget.resize(limits.fetch_bytes);
        self.cache.set_recent_bytes(limits.fetch_bytes / RECENT_SHARE);
        self.write_budget.resize(limits.write_bytes);
        self.head_limits.set(limits);
    }

    async fn assemble(
        settings: Settings,
        made: Option<Token>,
        rules: Rules,
        clock: Clock,
    ) -> anyhow::Result<Arc<App>> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let patience = settings.redis.response_timeout;
        let limits = IndexLimits {
            entries: settings.cache.index_entries,
            absent: settings.cache.absent_entries,
            waiters: settings.limits.waiters.get(),
            fetches: settings.limits.requests.get(),
            serve_stale_for: settings.cache.serve_stale_for,
        };
        let metrics = Arc::new(Metrics::new());
        let index = Arc::new(Index::with_rules(limits, rules, clock));
        let (cache, holders, budget) = memory(&settings, &metrics);
        let cpu = Cpu::new(cores);
        let originals = Originals::new(Arc::clone(&cache), cpu.clone());
        let renderer = Renderer::new(
            cores,
            &settings,
            Arc::clone(&cache),
            Arc::clone(&budget),
            Arc::clone(&metrics),
        );
        let write_budget =
            WriteBudget::new(settings.limits.write_bytes, patience, Arc::clone(&metrics));

        let mover = Arc::new(Mover::default());
        let parts = offload::Parts {
            originals: originals.clone(),
            budget: Arc::clone(&budget),
            cpu: cpu.clone(),
            metrics: Arc::clone(&metrics),
        };
        let max_value = settings.records.max_value;
        let offload = Offload::open(&settings.offload, max_value, Arc::clone(&mover), parts)?;

        let hub = Arc::new(Hub::default());
        let changes = Changes {
            metrics: Arc::clone(&metrics),
            index: Arc::clone(&index),
            events: Arc::clone(&hub),
            mover: offload.as_ref().map(|_| mover),
        };
        let mut store = Store::open(&settings).await?;
        store.watch(
            clock,
            ChangeListener::new({
                let changes = changes.clone();
                move |change| changes.apply(&change)
            }),
        );
        let store = Arc::new(store);

        let reader = Arc::new(Reader {
            index: Arc::clone(&index),
            store: Arc::clone(&store),
            offload: offload.clone(),
            cache: Arc::clone(&cache),
            originals,
            renderer: renderer.clone(),
            patience,
            budget: Arc::clone(&budget),
            cpu: cpu.clone(),
            metrics: Arc::clone(&metrics),
            corrupt_log: CorruptLog::default(),
            turns: Turns::new(FETCHES_EACH),
        });
        let moving = offload
            .as_ref()
            .map(|offload| MoveTasks::start(&store, offload, &settings.offload, patience));
        let auditor = Auditor {
            index: Arc::clone(&index),
            store: Arc::clone(&store),
            budget: Arc::clone(&budget),
            cpu: cpu.clone(),
            metrics: Arc::clone(&metrics),
        };
        Ok(Arc::new(App {
            writer: Writer::new(&store, offload.as_ref(), &changes, &cpu, &renderer, &settings),
            hub,
            tokens: Tokens::load(&settings.writes, made)?,
            shutdown: Shutdown::new(),
            store,
            index,
            cache,
            reader,
            budget,
            connections: Shares::new(settings.limits.connections.get()),
            requests: Shares::new(settings.limits.requests.get()),
            head_limits: Arc::new(HeadLimits::new(&settings.limits)),
            reloaded: Arc::default(),
            write_budget,
            renderer,
            cpu,
            holders,
            metrics,
            moving,
            audits: auditor.start(&settings.audit),
            settings,
        }))
    }
}

/// The parts that know what is in memory, and who holds it.
fn memory(
    settings: &Settings,
    metrics: &Arc<Metrics>,
) -> (Arc<Cache>, Arc<Holders>, Arc<FetchBudget>) {
    let cache = Arc::new(Cache::new(CacheLimits {
        images: settings.cache.images,
        bytes: settings.cache.bytes,
        derived: settings.cache.derived_bytes,
        recent: settings.limits.fetch_bytes / RECENT_SHARE,
    }));
    let holders = Arc::new(Holders::new(
        settings.limits.answers.get(),
        settings.http.min_send_rate as u64,
        settings.http.send_timeout,
        Arc::clone(metrics),
    ));
    let budget = Arc::new(FetchBudget::new(
        settings.limits.fetch_bytes,
        settings.redis.response_timeout,
        Arc::clone(&cache),
        Arc::clone(&holders),
        Arc::clone(metrics),
    ));
    (cache, holders, budget)
}
