//! Limits on what happens at the same time, as permits that guards hold.

use std::sync::Arc;

use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A number of places, and the gauge that shows how many are taken.
#[derive(Debug, Clone)]
pub(crate) struct Limit {
    permits: Arc<Semaphore>,
    gauge: Gauge,
}

/// A place that is taken until this is dropped, by a panic too.
#[derive(Debug)]
pub(crate) struct Admitted {
    _gauge: GaugeGuard,
    _permit: OwnedSemaphorePermit,
}

/// Holds a gauge up by one.
#[derive(Debug)]
struct GaugeGuard(Gauge);

impl Limit {
    pub(crate) fn new(places: usize, gauge: &Gauge) -> Limit {
        let permits = Arc::new(Semaphore::new(places.min(Semaphore::MAX_PERMITS)));
        Limit { permits, gauge: gauge.clone() }
    }

    /// Takes a place, if one is free.
    pub(crate) fn try_take(&self) -> Option<Admitted> {
        let permit = Arc::clone(&self.permits).try_acquire_owned().ok()?;
        Some(Admitted { _gauge: GaugeGuard::raise(&self.gauge), _permit: permit })
    }
}

impl GaugeGuard {
    fn raise(gauge: &Gauge) -> GaugeGuard {
        gauge.inc();
        GaugeGuard(gauge.clone())
    }
}

impl Drop for GaugeGuard {
    fn drop(&mut self) {
        self.0.dec();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gauge_shows_the_places_that_are_taken() {
        let gauge = Gauge::default();
        let limit = Limit::new(2, &gauge);
        let (first, second) = (limit.try_take().unwrap(), limit.try_take().unwrap());
        assert_eq!(gauge.get(), 2);
        assert!(limit.try_take().is_none());
        assert_eq!(gauge.get(), 2);
        drop(first);
        assert_eq!(gauge.get(), 1);
        assert!(limit.try_take().is_some());
        drop(second);
        assert_eq!(gauge.get(), 0);
    }
}
