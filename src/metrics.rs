//! The metrics of one server, in the OpenMetrics text format.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::cache;
use crate::image::ImageId;
use crate::read::CacheStatus;
use crate::store::{Coherence, StoreError};

/// Upper bounds of the buckets of all histograms, in seconds. A hit takes some 20 µs, a cold read milliseconds.
const BUCKETS: [f64; 16] = [
    50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0,
    2.5, 10.0,
];

/// Of how many writes it is timed at once how long the store takes to tell of them.
const MAX_EXPECTED: usize = 1024;

/// The counters of one server. Two servers in one process have one each.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Records that were answered as corrupt.
    pub corrupt_records: Counter,
    /// Images whose declared type wasn't what their bytes are.
    pub type_mismatches: Counter,
    /// Changes that the store told of.
    pub invalidations: Counter,
    /// Fetches that the store was asked for, each for one request or many.
    pub fetches: Counter,
    /// Requests that waited for a fetch that another one led.
    pub collapsed: Counter,
    /// Values that were hashed.
    pub hashes: Counter,
    /// Images that were decoded from base64.
    pub decodes: Counter,
    /// Pictures that were rendered.
    pub renders: Counter,
    /// Images that were moved to the object store.
    pub offloaded: Counter,
    /// Images that were fetched from there.
    pub offload_fetches: Counter,
    /// Timing that it failed.
    pub offload_errors: Counter,
    /// Objects that were removed, since no record referred to them.
    pub swept: Counter,
    /// Events that were sent.
    pub events: Counter,
    /// Open event streams.
    pub event_streams: Gauge,
    /// Bytes of answers.
    pub response_bytes: Counter,
    /// Requests that are being answered, but for those of operators.
    pub requests_in_flight: Gauge,
    /// Open connections.
    pub connections: Gauge,
    requests: Family<RequestLabels, Counter>,
    durations: Family<RouteLabel, Histogram, fn() -> Histogram>,
    reads: Family<ServedLabel, Counter>,
    store_errors: Family<KindLabel, Counter>,
    shed: Family<LimitLabel, Counter>,
    push_latency: Histogram,
    /// When the writes were made of which the store hasn't told yet.
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
struct StateLabel {
    state: &'static str,
}

/// What was turned away so that the rest gets through, by the setting that says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shed {
    /// A connection.
    Connections,
    /// A request.
    Requests,
    /// A request that would have waited for a fetch.
    Waiters,
    /// A fetch.
    FetchBytes,
    /// A write.
    WriteBytes,
    /// A render.
    Renders,
    /// A stream of events.
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

/// Where a read was answered from.
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
        self.durations.observe(duration.as_secs_f64());
        self.reads.inc();
    }
}

/// What is looked at when somebody asks for the metrics.
#[derive(Debug)]
pub struct GaugeReadings {
    /// In memory.
    pub held: cache::Held,
    /// In the index.
    pub known_keys: usize,
    /// Of the store.
    pub coherence: Coherence,
}

impl Metrics {
    /// All at zero.
    #[must_use]
    pub fn new() -> Metrics {
        let mut registry = Registry::with_prefix("afterimage");
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The program", build);
        let histogram: fn() -> Histogram = || Histogram::new(BUCKETS);
        let metrics = Metrics {
            corrupt_records: counter(
                &mut registry,
                "corrupt_records",
                "Records answered as corrupt",
            ),
            type_mismatches: counter(
                &mut registry,
                "type_mismatches",
                "Images whose declared type is not what their bytes are",
            ),
            invalidations: counter(
                &mut registry,
                "invalidations",
                "Changes that the store told of",
            ),
            fetches: counter(&mut registry, "fetches", "Images that the store was asked for"),
            collapsed: counter(
                &mut registry,
                "collapsed",
                "Requests that waited for the fetch of another",
            ),
            hashes: counter(&mut registry, "hashes", "Values that were hashed for their version"),
            decodes: counter(&mut registry, "decodes", "Images decoded from base64"),
            renders: counter(&mut registry, "renders", "Variants and placeholders rendered"),
            offloaded: counter(&mut registry, "offloaded", "Images moved to the object store"),
            offload_fetches: counter(
                &mut registry,
                "offload_fetches",
                "Images fetched from the object store",
            ),
            offload_errors: counter(
                &mut registry,
                "offload_errors",
                "Moves to the object store and fetches from it that failed",
            ),
            swept: counter(
                &mut registry,
                "swept",
                "Objects removed, since no record referred to them",
            ),
            events: counter(&mut registry, "events", "Events sent to those who follow images"),
            event_streams: gauge(&mut registry, "event_streams", "Open event streams"),
            response_bytes: Counter::default(),
            requests_in_flight: gauge(
                &mut registry,
                "requests_in_flight",
                "Requests being answered",
            ),
            connections: gauge(&mut registry, "connections", "Open connections"),
            requests: Family::default(),
            durations: Family::new_with_constructor(histogram),
            reads: Family::default(),
            store_errors: Family::default(),
            shed: Family::default(),
            push_latency: histogram(),
            expected_pushes: Mutex::default(),
            tracking_round_trip: histogram(),
            cache_images: gauge(&mut registry, "cache_images", "Images held in memory"),
            cache_bytes: Gauge::default(),
            in_flight_bytes: Gauge::default(),
            known_keys: gauge(&mut registry, "known_keys", "Keys of which something is known"),
            coherence: Family::default(),
            registry,
        };
        metrics.registered()
    }

    fn registered(mut self) -> Metrics {
        // At zero from the start: what appears with its first event has no rise that anyone could see.
        for served in SERVED {
            let _ = self.reads.get_or_create(&ServedLabel { served });
        }
        for kind in StoreError::KINDS {
            let _ = self.store_errors.get_or_create(&KindLabel { kind });
        }
        for shed in Shed::ALL {
            let _ = self.shed.get_or_create(&LimitLabel { limit: shed.limit() });
        }
        let registry = &mut self.registry;
        registry.register("requests", "Requests answered", self.requests.clone());
        registry.register(
            "reads",
            "Reads of images, by where the answer came from",
            self.reads.clone(),
        );
        registry.register(
            "store_errors",
            "Fetches and writes that the store didn't answer",
            self.store_errors.clone(),
        );
        registry.register(
            "shed",
            "Connections and requests turned away, by the setting that says so",
            self.shed.clone(),
        );
        registry.register(
            "coherence",
            "1 for the state that the store is in: whether it tells of every change",
            self.coherence.clone(),
        );
        let seconds = || Unit::Seconds;
        registry.register_with_unit(
            "request_duration",
            "From a request's head to its answer's",
            seconds(),
            self.durations.clone(),
        );
        registry.register_with_unit(
            "push_latency",
            "From a write made here to the store telling of it",
            seconds(),
            self.push_latency.clone(),
        );
        registry.register_with_unit(
            "tracking_round_trip",
            "From a heartbeat on the connection that changes are told over to its answer",
            seconds(),
            self.tracking_round_trip.clone(),
        );
        let bytes = || Unit::Bytes;
        registry.register_with_unit(
            "response",
            "Bytes of answers' bodies",
            bytes(),
            self.response_bytes.clone(),
        );
        registry.register_with_unit(
            "cache",
            "Bytes of images held in memory",
            bytes(),
            self.cache_bytes.clone(),
        );
        registry.register_with_unit(
            "in_flight",
            "Bytes of images in memory outside the cache: being sent, or about to be kept",
            bytes(),
            self.in_flight_bytes.clone(),
        );
        self
    }

    /// A request was answered.
    pub fn count_request(
        &self,
        route: &'static str,
        method: &'static str,
        status: u16,
        duration: Duration,
    ) {
        self.requests.get_or_create(&RequestLabels { route, method, status }).inc();
        self.durations.get_or_create(&RouteLabel { route }).observe(duration.as_secs_f64());
    }

    /// Looks up the counters of hits on a route.
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

    /// An image was read, or nothing could be said of it.
    pub fn count_read(&self, served: Option<CacheStatus>) {
        let [hit, rendered, fetched, collapsed, revalidated, stale, failed] = SERVED;
        let served = match served {
            Some(CacheStatus::Hit) => hit,
            Some(CacheStatus::Rendered) => rendered,
            Some(CacheStatus::Fetched { collapsed: false, .. }) => fetched,
            Some(CacheStatus::Fetched { collapsed: true, .. }) => collapsed,
            Some(CacheStatus::Revalidated { .. }) => revalidated,
            Some(CacheStatus::Stale { .. }) => stale,
            None => failed,
        };
        self.reads.get_or_create(&ServedLabel { served }).inc();
    }

    /// Something was turned away.
    pub fn count_shed(&self, shed: Shed) {
        self.shed.get_or_create(&LimitLabel { limit: shed.limit() }).inc();
    }

    /// The store didn't answer.
    pub fn count_store_error(&self, error: &StoreError) {
        if let Some(kind) = error.kind() {
            self.store_errors.get_or_create(&KindLabel { kind }).inc();
        }
    }

    /// A write is made here, and the store will tell of it: from now on the time runs.
    pub fn expect_push(&self, id: &ImageId) {
        let mut expected = self.expected_pushes();
        if expected.len() < MAX_EXPECTED {
            expected.insert(id.clone(), Instant::now());
        }
    }

    /// The store told of a change of an image.
    pub fn push_came(&self, id: &ImageId) {
        if let Some(written) = self.expected_pushes().remove(id) {
            self.push_latency.observe(written.elapsed().as_secs_f64());
        }
    }

    /// The store may not tell of what it was expected to.
    pub fn expect_no_push(&self, id: Option<&ImageId>) {
        match id {
            Some(id) => drop(self.expected_pushes().remove(id)),
            None => self.expected_pushes().clear(),
        }
    }

    fn expected_pushes(&self) -> MutexGuard<'_, HashMap<ImageId, Instant>> {
        self.expected_pushes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A heartbeat came back.
    pub fn observe_heartbeat(&self, round_trip: Duration) {
        self.tracking_round_trip.observe(round_trip.as_secs_f64());
    }

    /// The metrics in the OpenMetrics text format.
    #[must_use]
    pub fn render(&self, observed: &GaugeReadings) -> String {
        let count = |it: usize| i64::try_from(it).unwrap_or(i64::MAX);
        self.cache_images.set(count(observed.held.images));
        self.cache_bytes.set(count(observed.held.bytes));
        self.in_flight_bytes.set(count(observed.held.in_flight));
        self.known_keys.set(count(observed.known_keys));
        for state in Coherence::NAMES {
            let is = state == observed.coherence.name();
            self.coherence.get_or_create(&StateLabel { state }).set(i64::from(is));
        }
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string can't fail");
        text
    }
}

fn counter(registry: &mut Registry, name: &str, help: &str) -> Counter {
    let counter = Counter::default();
    registry.register(name, help, counter.clone());
    counter
}

fn gauge(registry: &mut Registry, name: &str, help: &str) -> Gauge {
    let gauge = Gauge::default();
    registry.register(name, help, gauge.clone());
    gauge
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics::new()
    }
}
