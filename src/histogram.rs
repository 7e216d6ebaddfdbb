//! A histogram that can be read back.
//!
//! The library's own can only be encoded, and takes a lock for each observation.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::{MetricType, TypedMetric};

/// Upper bounds of the buckets of all histograms. A hit takes some 20 µs, a cold read milliseconds.
const BOUNDS: [Duration; 16] = [
    Duration::from_micros(50),
    Duration::from_micros(100),
    Duration::from_micros(250),
    Duration::from_micros(500),
    Duration::from_millis(1),
    Duration::from_micros(2500),
    Duration::from_millis(5),
    Duration::from_millis(10),
    Duration::from_millis(25),
    Duration::from_millis(50),
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_millis(2500),
    Duration::from_secs(10),
];

/// Numbers of observations by bucket, the last of which has no upper bound.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Counts([u64; BOUNDS.len() + 1]);

/// Durations, counted in buckets. Clones share the counts.
#[derive(Debug, Clone, Default)]
pub(crate) struct Histogram(Arc<Buckets>);

#[derive(Debug, Default)]
struct Buckets {
    counts: [AtomicU64; BOUNDS.len() + 1],
    sum_ns: AtomicU64,
}

impl Histogram {
    /// Counts a duration.
    pub(crate) fn observe(&self, duration: Duration) {
        let bucket = BOUNDS.iter().position(|bound| duration <= *bound).unwrap_or(BOUNDS.len());
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.0.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.0.sum_ns.fetch_add(nanoseconds, Ordering::Relaxed);
    }

    /// Reads the counts.
    pub(crate) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for (count, current) in counts.0.iter_mut().zip(&self.0.counts) {
            *count = current.load(Ordering::Relaxed);
        }
        counts
    }
}

impl EncodeMetric for Histogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        let (Counts(counts), sum_ns) = (self.counts(), self.0.sum_ns.load(Ordering::Relaxed));
        let bounds = BOUNDS.iter().map(Duration::as_secs_f64).chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(counts).collect();
        let sum = Duration::from_nanos(sum_ns).as_secs_f64();
        encoder.encode_histogram::<NoLabelSet>(sum, counts.iter().sum(), &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

impl TypedMetric for Histogram {
    const TYPE: MetricType = MetricType::Histogram;
}

impl Counts {
    /// The observations since an earlier reading.
    pub(crate) fn since(&self, earlier: &Counts) -> Counts {
        let mut counts = *self;
        for (count, before) in counts.0.iter_mut().zip(earlier.0) {
            *count = count.saturating_sub(before);
        }
        counts
    }

    /// Estimates the duration that a part of all observations don't exceed, 0.99 for the 99th percentile, as Prometheus'
    /// `histogram_quantile` does: linearly within its bucket. `None` without observations.
    pub(crate) fn quantile(&self, part: f64) -> Option<Duration> {
        let all: u64 = self.0.iter().sum();
        if all == 0 {
            return None;
        }
        #[expect(clippy::cast_precision_loss, reason = "an estimate")]
        let count = |count: u64| count as f64;
        let (mut rank, mut lower) = (part * count(all), Duration::ZERO);
        for (bound, observed) in BOUNDS.into_iter().zip(self.0) {
            if observed > 0 && rank <= count(observed) {
                let width = bound.saturating_sub(lower);
                return Some(lower + width.mul_f64(rank / count(observed)));
            }
            rank -= count(observed);
            lower = bound;
        }
        Some(lower)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quantile_is_estimated_within_its_bucket() {
        let histogram = Histogram::default();
        assert_eq!(histogram.counts().quantile(0.5), None);
        for _ in 0..99 {
            histogram.observe(Duration::from_micros(20));
        }
        histogram.observe(Duration::from_millis(7));
        let counts = histogram.counts();
        let quantile = |part| counts.quantile(part).unwrap();
        assert!((25..26).contains(&quantile(0.5).as_micros()), "{:?}", quantile(0.5));
        assert_eq!(quantile(0.99), Duration::from_micros(50));
        assert_eq!(quantile(1.0), Duration::from_millis(10));
        assert_eq!(counts.since(&counts).quantile(0.5), None);
        histogram.observe(Duration::from_mins(1));
        let late = histogram.counts().since(&counts);
        assert_eq!(late.quantile(0.5), Some(Duration::from_secs(10)));
    }
}
