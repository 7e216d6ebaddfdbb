//! The recent past in figures: hit ratio and durations over some windows of time.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::metrics::{Metrics, ReadCounts};
use crate::task::Task;

/// Pause between two samples.
const INTERVAL: Duration = Duration::from_secs(1);

/// The windows that are told, each with its name.
const WINDOWS: [(&str, Duration); 3] = [
    ("10s", Duration::from_secs(10)),
    ("1m", Duration::from_mins(1)),
    ("10m", Duration::from_mins(10)),
];

/// Samples of the counters, one a second.
#[derive(Debug)]
pub(crate) struct Recent {
    samples: Arc<Mutex<Samples>>,
    metrics: Arc<Metrics>,
    route: &'static str,
    #[expect(dead_code, reason = "held for its task")]
    sampling: Task,
}

/// Samples as far back as the longest window, the oldest first.
#[derive(Debug, Default)]
struct Samples(VecDeque<(Instant, ReadCounts)>);

/// The figures of a window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Window {
    pub(crate) name: &'static str,
    pub(crate) reads: u64,
    pub(crate) hits: u64,
    /// The median of the durations; `None` without requests.
    pub(crate) p50: Option<Duration>,
    pub(crate) p99: Option<Duration>,
}

impl Recent {
    /// Takes samples from now on. The durations are those of the answers to one route.
    pub(crate) fn start(metrics: &Arc<Metrics>, route: &'static str) -> Recent {
        let samples = Arc::new(Mutex::<Samples>::default());
        let sampling = {
            let (samples, metrics) = (Arc::clone(&samples), Arc::clone(metrics));
            async move {
                let mut ticks = tokio::time::interval(INTERVAL);
                loop {
                    ticks.tick().await;
                    let counts = metrics.read_counts(route);
                    let mut samples = samples.lock().unwrap_or_else(PoisonError::into_inner);
                    samples.add(Instant::now(), counts);
                }
            }
        };
        let sampling = Task::start("recent", sampling);
        Recent { samples, metrics: Arc::clone(metrics), route, sampling }
    }

    /// Reads the figures of all windows.
    pub(crate) fn windows(&self) -> [Window; WINDOWS.len()] {
        let samples = self.samples.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock, so that no sample is later than they are.
        let counts = self.metrics.read_counts(self.route);
        samples.windows(Instant::now(), &counts)
    }
}

impl Samples {
    fn add(&mut self, now: Instant, counts: ReadCounts) {
        let [.., (_, longest)] = WINDOWS;
        self.0.push_back((now, counts));
        // One from before the longest window is kept: that is compared with it.
        while self.0.get(1).is_some_and(|(at, _)| now - *at >= longest) {
            self.0.pop_front();
        }
    }

    fn windows(&self, now: Instant, counts: &ReadCounts) -> [Window; WINDOWS.len()] {
        WINDOWS.map(|(name, length)| {
            let before = self.0.partition_point(|(at, _)| now - *at > length);
            let base = self.0.get(before.saturating_sub(1)).map_or(*counts, |(_, counts)| *counts);
            window(name, &base, counts)
        })
    }
}

fn window(name: &'static str, base: &ReadCounts, now: &ReadCounts) -> Window {
    let durations = now.durations.since(&base.durations);
    Window {
        name,
        reads: now.reads - base.reads,
        hits: now.hits - base.hits,
        p50: durations.quantile(0.5),
        p99: durations.quantile(0.99),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache_status::CacheStatus;

    #[test]
    fn each_window_has_what_happened_within_it() {
        let (metrics, start) = (Metrics::new(), Instant::now());
        let read = |status| {
            metrics.count_read(status);
            metrics.count_request("/images/{id}", "GET", 200, Duration::from_micros(20));
        };
        let counts = || metrics.read_counts("/images/{id}");
        let mut samples = Samples::default();
        let mut pass = |seconds: std::ops::Range<u64>| {
            for second in seconds.clone() {
                samples.add(start + Duration::from_secs(second), counts());
            }
            samples.windows(start + Duration::from_secs(seconds.end), &counts())
        };
        let figures = |windows: [Window; 3]| windows.map(|it| (it.name, it.reads, it.hits));
        pass(0..2);
        read(CacheStatus::Rendered);
        read(CacheStatus::Hit);
        let windows = pass(2..3);
        assert_eq!(figures(windows), [("10s", 2, 1), ("1m", 2, 1), ("10m", 2, 1)]);
        assert!(windows[0].p99.is_some());
        pass(3..20);
        read(CacheStatus::Hit);
        assert_eq!(figures(pass(20..21)), [("10s", 1, 1), ("1m", 3, 2), ("10m", 3, 2)]);
        let windows = pass(21..700);
        assert_eq!(figures(windows), [("10s", 0, 0), ("1m", 0, 0), ("10m", 0, 0)]);
        assert_eq!(windows[2].p50, None);
        assert_eq!(samples.0.len(), 601);
    }
}
