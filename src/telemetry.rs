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
    /// Images that were decoded from base64.
    pub decodes: Counter,
    cache_images: Gauge,
    cache_bytes: Gauge,
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
        let decodes = counter("decodes", "Images decoded from base64");
        let (cache_images, cache_bytes) = (Gauge::default(), Gauge::default());
        registry.register("cache_images", "Images held in memory", cache_images.clone());
        registry.register_with_unit(
            "cache",
            "Bytes of images held in memory",
            Unit::Bytes,
            cache_bytes.clone(),
        );
        Metrics { registry, corrupt_records, type_mismatches, decodes, cache_images, cache_bytes }
    }

    /// The metrics in the OpenMetrics text format.
    #[must_use]
    pub fn render(&self, held: cache::Held) -> String {
        self.cache_images.set(i64::try_from(held.images).unwrap_or(i64::MAX));
        self.cache_bytes.set(i64::try_from(held.bytes).unwrap_or(i64::MAX));
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
