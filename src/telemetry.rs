//! What the service tells its operator: the log and the metrics.

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::cache;
use crate::settings;

/// Sends the log of this process to standard error. Only `main` calls it: it is process-wide.
pub fn start_log(settings: &settings::Log) -> anyhow::Result<()> {
    let filter: Targets = settings.filter.parse()?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_filter(filter);
    Ok(tracing_subscriber::registry().with(lines).try_init()?)
}

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
    cache_images: Gauge,
    cache_bytes: Gauge,
    known_keys: Gauge,
    coherent: Gauge,
}

impl Metrics {
    /// All at zero.
    #[must_use]
    pub fn new() -> Metrics {
        let mut registry = Registry::with_prefix("afterimage");
        let mut counter = |name: &str, help: &str| {
            let counter: Counter = Counter::default();
            registry.register(name, help, counter.clone());
            counter
        };
        let corrupt_records = counter("corrupt_records", "Records answered as corrupt");
        let type_mismatches =
            counter("type_mismatches", "Images whose declared type is not what their bytes are");
        let invalidations = counter("invalidations", "Changes that the store told of");
        let fetches = counter("fetches", "Images that the store was asked for");
        let collapsed = counter("collapsed", "Requests that waited for the fetch of another");
        let hashes = counter("hashes", "Values that were hashed for their version");
        let decodes = counter("decodes", "Images decoded from base64");
        let (cache_images, cache_bytes) = (Gauge::default(), Gauge::default());
        let (known_keys, coherent) = (Gauge::default(), Gauge::default());
        registry.register("cache_images", "Images held in memory", cache_images.clone());
        registry.register_with_unit(
            "cache",
            "Bytes of images held in memory",
            Unit::Bytes,
            cache_bytes.clone(),
        );
        registry.register("known_keys", "Keys of which something is known", known_keys.clone());
        registry.register("coherent", "1 while the store tells of every change", coherent.clone());
        Metrics {
            registry,
            corrupt_records,
            type_mismatches,
            invalidations,
            fetches,
            collapsed,
            hashes,
            decodes,
            cache_images,
            cache_bytes,
            known_keys,
            coherent,
        }
    }

    /// The metrics in the OpenMetrics text format.
    #[must_use]
    pub fn render(&self, held: cache::Held, known_keys: usize, coherent: bool) -> String {
        self.cache_images.set(i64::try_from(held.images).unwrap_or(i64::MAX));
        self.cache_bytes.set(i64::try_from(held.bytes).unwrap_or(i64::MAX));
        self.known_keys.set(i64::try_from(known_keys).unwrap_or(i64::MAX));
        self.coherent.set(i64::from(coherent));
        let mut text = String::new();
        encode(&mut text, &self.registry).expect("writing to a string can't fail");
        text
    }
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics::new()
    }
}
