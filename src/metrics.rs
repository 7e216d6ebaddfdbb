//! The metrics of one server.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry, Unit};

use crate::cache;
use crate::cache_status::CacheStatus;
use crate::exposition::{self, Exposition};
use crate::histogram::{Counts, Histogram};
use crate::image::ImageId;
use crate::store::{Coherence, StoreError};

/// Most writes whose push is timed at once.
const MAX_EXPECTED_PUSHES: usize = 1024;

/// The metrics of one server. Two servers in one process have one each.
///
/// [`Metrics::new`] registers each with its name and its help text.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Records answered as corrupt.
    pub corrupt_records: Counter,
    /// Images whose declared type differs from that of their bytes.
    pub type_mismatches: Counter,
    /// Changes that the store announced.
    pub invalidations: Counter,
    /// Fetches from the store, each for one request or many.
    pub fetches: Counter,
    /// Requests that waited for the fetch of another request.
    pub collapsed: Counter,
    /// Values hashed.
    pub hashes: Counter,
    /// Images decoded from base64.
    pub decodes: Counter,
    /// Pictures rendered.
    pub renders: Counter,
    /// Images moved to the object store.
    pub offloaded: Counter,
    /// Images fetched from the object store.
    pub offload_fetches: Counter,
    /// Failed moves to the object store and failed fetches from it.
    pub offload_errors: Counter,
    /// Objects removed because no record referred to them.
    pub swept: Counter,
    /// Entries that were compared with the store.
    pub audit_checked: Counter,
    /// Entries among those that claimed to be current and weren't.
    pub audit_stale: Counter,
    /// Events sent.
    pub events: Counter,
    /// Open event streams.
    pub event_streams: Gauge,
    /// Bytes of response bodies.
    pub response_bytes: Counter,
    /// Requests being answered, except those of operators.
    pub requests_in_flight: Gauge,
    /// Open connections.
    pub connections: Gauge,
    requests: Family<RequestLabels, Counter>,
    durations: Family<RouteLabel, Histogram>,
    reads: Family<ServedLabel, Counter>,
    store_errors: Family<KindLabel, Counter>,
    shed: Family<LimitLabel, Counter>,
    dropped: Family<ReasonLabel, Counter>,
    push_latency: Histogram,
    /// Start of each write whose push hasn't come yet.
    expected_pushes: Mutex<HashMap<ImageId, Instant>>,
    tracking_round_trip: Histogram,
    cache_images: Gauge,
    cache_bytes: Gauge,
    in_flight_bytes: Gauge,
    known_keys: Gauge,
    coherence: Family<StateLabel, Gauge>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    route: &'static str,
    method: &'static str,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabel {
    route: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ServedLabel {
    served: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct LimitLabel {
    limit: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

/// Load that was turned away, by the limit that it exceeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shed {
    /// `[limits] connections`.
    Connections,
    /// `[limits] requests`.
    Requests,
    /// `[limits] waiters`.
    Waiters,
    /// `[limits] fetch_bytes`.
    FetchBytes,
    /// `[limits] write_bytes`.
    WriteBytes,
    /// `[limits] renders`.
    Renders,
    /// `[events] connections`.
    Streams,
}

impl Shed {
    const ALL: [Shed; 7] = [
        Shed::Connections,
        Shed::Requests,
        Shed::Waiters,
        Shed::FetchBytes,
        Shed::WriteBytes,
        Shed::Renders,
        Shed::Streams,
    ];

    const fn limit(self) -> &'static str {
        match self {
            Shed::Connections => "connections",
            Shed::Requests => "requests",
            Shed::Waiters => "waiters",
            Shed::FetchBytes => "fetch_bytes",
            Shed::WriteBytes => "write_bytes",
            Shed::Renders => "renders",
            Shed::Streams => "event_streams",
        }
    }
}

/// Reasons for which a connection is ended for the sake of other clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// Its client holds most of too many answers (`[limits] answers`).
    Answers,
    /// Its client is the slowest of those who hold memory that a fetch needs (`[limits] fetch_bytes`).
    Memory,
    /// Its client takes too little (`[http] min_send_rate`).
    Rate,
    /// Most of its streams were reset before they were answered.
    Resets,
}

impl Dropped {
    const ALL: [Dropped; 4] = [Dropped::Answers, Dropped::Memory, Dropped::Rate, Dropped::Resets];

    const fn reason(self) -> &'static str {
        match self {
            Dropped::Answers => "answers",
            Dropped::Memory => "memory",
            Dropped::Rate => "rate",
            Dropped::Resets => "resets",
        }
    }
}

/// Label values of `reads`: the source of the answer.
const SERVED: [&str; 7] =
    ["hit", "rendered", "fetched", "collapsed", "revalidated", "stale", "failed"];

/// The counters of hits on one route, which were looked up once.
#[derive(Debug)]
pub struct HitMetrics {
    /// By method, GET or HEAD, and status, 200 or 304.
    requests: [[Counter; 2]; 2],
    durations: Histogram,
    reads: Counter,
}

impl HitMetrics {
    /// Counts a hit.
    pub fn count(&self, is_head: bool, is_304: bool, duration: Duration) {
        self.requests[usize::from(is_head)][usize::from(is_304)].inc();
        self.durations.observe(duration);
        self.reads.inc();
    }
}

/// The counters that the recent past is told by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ReadCounts {
    /// Reads of images.
    pub(crate) reads: u64,
    /// Those that were answered from memory.
    pub(crate) hits: u64,
    /// Times to the heads of answers to one route.
    pub(crate) durations: Counts,
}

/// State that is read when the metrics are requested.
#[derive(Debug)]
pub struct GaugeReadings {
    /// Images in memory.
    pub held: cache::Held,
    /// Entries of the index.
    pub known_keys: usize,
    /// State of the store.
    pub coherence: Coherence,
}

impl Metrics {
    /// Registers all metrics at zero.
    #[must_use]
    pub fn new() -> Metrics {
        let mut registry = Registry::with_prefix("afterimage");
        let all = &mut registry;
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        all.register("build", "The program", build);
        let metrics = Metrics {
            corrupt_records: registered(all, "corrupt_records", "Records answered as corrupt"),
            type_mismatches: registered(
                all,
                "type_mismatches",
                "Images whose declared type is not that of their bytes",
            ),
            invalidations: registered(all, "invalidations", "Changes that the store announced"),
            fetches: registered(all, "fetches", "Fetches of images from the store"),
            collapsed: registered(
                all,
                "collapsed",
                "Requests that waited for the fetch of another request",
            ),
            hashes: registered(all, "hashes", "Values hashed for their version"),
            decodes: registered(all, "decodes", "Images decoded from base64"),
            renders: registered(all, "renders", "Variants and placeholders rendered"),
            offloaded: registered(all, "offloaded", "Images moved to the object store"),
            offload_fetches: registered(
                all,
                "offload_fetches",
                "Images fetched from the object store",
            ),
            offload_errors: registered(
                all,
                "offload_errors",
                "Failed moves to the object store and failed fetches from it",
            ),
            swept: registered(all, "swept", "Objects removed because no record referred to them"),
            audit_checked: registered(
                all,
                "audit_checked",
                "Entries that claimed to be current and were compared with the store",
            ),
            audit_stale: registered(
                all,
                "audit_stale",
                "Compared entries whose value the store had replaced, unnoticed",
            ),
            events: registered(all, "events", "Events sent on event streams"),
            event_streams: registered(all, "event_streams", "Open event streams"),
            requests_in_flight: registered(all, "requests_in_flight", "Requests being answered"),
            connections: registered(all, "connections", "Open connections"),
            cache_images: registered(all, "cache_images", "Images in memory"),
            known_keys: registered(all, "known_keys", "Keys with metadata in the index"),
            requests: registered(all, "requests", "Requests answered"),
            reads: registered(all, "reads", "Reads of images, by the source of the answer"),
            store_errors: registered(
                all,
                "store_errors",
                "Fetches and writes that the store did not answer",
            ),
            shed: registered(
                all,
                "shed",
                "Connections and requests turned away, by the limit that they exceeded",
            ),
            dropped: registered(all, "dropped_connections", "Connections ended for other clients"),
            coherence: registered(
                all,
                "coherence",
                "1 for the present state of the store's announcements of changes",
            ),
            durations: seconds(
                all,
                "request_duration",
                "Time from the head of a request to the head of its answer",
                Family::default(),
            ),
            push_latency: seconds(
                all,
                "push_latency",
                "Time from a write made here to the store's announcement of it",
                Histogram::default(),
            ),
            expected_pushes: Mutex::default(),
            tracking_round_trip: seconds(
                all,
                "tracking_round_trip",
                "Time from a heartbeat on the tracking connection to its answer",
                Histogram::default(),
            ),
            response_bytes: bytes(all, "response", "Bytes of response bodies"),
            cache_bytes: bytes(all, "cache", "Bytes of images in memory"),
            in_flight_bytes: bytes(
                all,
                "in_flight",
                "Bytes of images in memory outside the cache: being sent, or about to be cached",
            ),
            registry,
        };
        metrics.start_labels_at_zero();
        metrics
    }

    /// A counter that appeared with its first event would show no increase.
    fn start_labels_at_zero(&self) {
        for served in SERVED {
            let _ = self.reads.get_or_create(&ServedLabel { served });
        }
        for kind in StoreError::KINDS {
            let _ = self.store_errors.get_or_create(&KindLabel { kind });
        }
        for shed in Shed::ALL {
            let _ = self.shed.get_or_create(&LimitLabel { limit: shed.limit() });
        }
        for dropped in Dropped::ALL {
            let _ = self.dropped.get_or_create(&ReasonLabel { reason: dropped.reason() });
        }
    }

    /// Counts the answer to a request.
    pub fn count_request(
        &self,
        route: &'static str,
        method: &'static str,
        status: u16,
        duration: Duration,
    ) {
        self.requests.get_or_create(&RequestLabels { route, method, status }).inc();
        self.durations.get_or_create(&RouteLabel { route }).observe(duration);
    }

    /// Looks up the metrics of hits on a route.
    pub fn of_hits(&self, route: &'static str) -> HitMetrics {
        let counter = |method, status| {
            self.requests.get_or_create_owned(&RequestLabels { route, method, status })
        };
        HitMetrics {
            requests: ["GET", "HEAD"].map(|method| [200, 304].map(|it| counter(method, it))),
            durations: self.durations.get_or_create_owned(&RouteLabel { route }),
            reads: self.reads.get_or_create_owned(&ServedLabel { served: SERVED[0] }),
        }
    }

    /// Counts the answer to a read.
    pub fn count_read(&self, status: CacheStatus) {
        let [hit, rendered, fetched, collapsed, revalidated, stale, _failed] = SERVED;
        let served = match status {
            CacheStatus::Hit => hit,
            CacheStatus::Rendered => rendered,
            CacheStatus::Fetched { collapsed: false, .. } => fetched,
            CacheStatus::Fetched { collapsed: true, .. } => collapsed,
            CacheStatus::Revalidated { .. } => revalidated,
            CacheStatus::Stale { .. } => stale,
        };
        self.reads.get_or_create(&ServedLabel { served }).inc();
    }

    /// Counts a read without an answer.
    pub fn count_failed_read(&self) {
        let [.., failed] = SERVED;
        self.reads.get_or_create(&ServedLabel { served: failed }).inc();
    }

    /// Reads how many reads there were, and how long the answers to a route took.
    pub(crate) fn read_counts(&self, route: &'static str) -> ReadCounts {
        let count = |served| self.reads.get_or_create(&ServedLabel { served }).get();
        ReadCounts {
            reads: SERVED.into_iter().map(count).sum(),
            hits: count(SERVED[0]),
            durations: self.durations.get_or_create(&RouteLabel { route }).counts(),
        }
    }

    /// Counts a connection or request that was turned away.
    pub fn count_shed(&self, shed: Shed) {
        self.shed.get_or_create(&LimitLabel { limit: shed.limit() }).inc();
    }

    /// Counts a connection that is ended for the sake of others.
    pub fn count_dropped(&self, dropped: Dropped) {
        self.dropped.get_or_create(&ReasonLabel { reason: dropped.reason() }).inc();
    }

    /// Counts a failure of the store.
    pub fn count_store_error(&self, error: &StoreError) {
        if let Some(kind) = error.kind() {
            self.store_errors.get_or_create(&KindLabel { kind }).inc();
        }
    }

    /// Begins to time a write that is made here, until the store announces it.
    pub fn expect_push(&self, id: &ImageId) {
        let mut expected = self.expected_pushes();
        if expected.len() < MAX_EXPECTED_PUSHES {
            expected.insert(id.clone(), Instant::now());
        }
    }

    /// Records the time of a write that the store has announced, if it was made here.
    pub fn push_received(&self, id: &ImageId) {
        if let Some(written) = self.expected_pushes().remove(id) {
            self.push_latency.observe(written.elapsed());
        }
    }

    /// Stops timing a write that wasn't made.
    pub fn expect_no_push(&self, id: &ImageId) {
        self.expected_pushes().remove(id);
    }

    /// Stops timing all writes: their announcements may be lost.
    pub fn expect_no_pushes(&self) {
        self.expected_pushes().clear();
    }

    fn expected_pushes(&self) -> MutexGuard<'_, HashMap<ImageId, Instant>> {
        self.expected_pushes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records an answered heartbeat.
    pub fn observe_heartbeat(&self, round_trip: Duration) {
        self.tracking_round_trip.observe(round_trip);
    }

    /// Encodes the metrics.
    #[must_use]
    pub fn render(&self, readings: &GaugeReadings, format: Exposition) -> String {
        let count = |it: usize| i64::try_from(it).unwrap_or(i64::MAX);
        self.cache_images.set(count(readings.held.images));
        self.cache_bytes.set(count(readings.held.bytes));
        self.in_flight_bytes.set(count(readings.held.in_flight));
        self.known_keys.set(count(readings.known_keys));
        for state in Coherence::NAMES {
            let is = state == readings.coherence.name();
            self.coherence.get_or_create(&StateLabel { state }).set(i64::from(is));
        }
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string can't fail");
        match format {
            Exposition::OpenMetrics => text,
            Exposition::Text => exposition::to_text(&text),
        }
    }
}

/// Registers a metric without a unit.
fn registered<M>(registry: &mut Registry, name: &str, help: &str) -> M
where
    M: Metric + Clone + Default,
{
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

/// Registers a metric in bytes, which its name ends with.
fn bytes<M>(registry: &mut Registry, name: &str, help: &str) -> M
where
    M: Metric + Clone + Default,
{
    let metric = M::default();
    registry.register_with_unit(name, help, Unit::Bytes, metric.clone());
    metric
}

/// Registers a metric in seconds, which its name ends with.
fn seconds<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register_with_unit(name, help, Unit::Seconds, metric.clone());
    metric
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics::new()
    }
}
