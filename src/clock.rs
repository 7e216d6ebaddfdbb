//! Time that goes on while the machine is suspended.
//!
//! Leases and the expiry of records are counted with this clock. `CLOCK_MONOTONIC`, which std and tokio read, stands still in
//! a suspended machine: a lease of half a second would be good for hours.

use std::ops::Add;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_BOOTTIME`, where the system has it.
#[cfg(any(target_os = "linux", target_os = "android"))]
const CLOCK: ClockId = ClockId::Boottime;
#[cfg(not(any(target_os = "linux", target_os = "android")))]
const CLOCK: ClockId = ClockId::Monotonic;

/// A moment, counted from the start of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootInstant(Duration);

impl BootInstant {
    /// A moment by the time since the start of the machine.
    #[cfg(test)]
    pub(crate) const fn after_boot(duration: Duration) -> BootInstant {
        BootInstant(duration)
    }

    /// Time from an earlier moment to this one; zero if `earlier` is later.
    #[must_use]
    pub fn since(self, earlier: BootInstant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// Saturates: a time to live of many centuries is for ever.
impl Add<Duration> for BootInstant {
    type Output = BootInstant;

    fn add(self, duration: Duration) -> BootInstant {
        BootInstant(self.0.saturating_add(duration))
    }
}

/// The clock of the machine. Tests can put it forward, as a suspension does, or turn one by hand.
#[derive(Debug, Clone, Copy, Default)]
pub struct Clock(Source);

#[derive(Debug, Clone, Copy, Default)]
enum Source {
    #[default]
    Machine,
    Suspended(&'static Suspended),
    /// Nanoseconds.
    #[cfg(test)]
    ByHand(&'static AtomicU64),
    /// Tokio's clock, which stands still and jumps where a test has paused it, counted from this moment.
    #[cfg(test)]
    Tokio(tokio::time::Instant),
}

/// Time for which a test pretends that the machine was suspended.
#[derive(Debug, Default)]
pub struct Suspended(AtomicU64);

impl Suspended {
    /// Puts the clocks forward that were made with this.
    pub fn add(&self, duration: Duration) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.0.fetch_add(nanoseconds, Ordering::SeqCst);
    }
}

impl Clock {
    /// A clock that a test can put forward.
    #[must_use]
    pub fn suspendable(suspended: &'static Suspended) -> Clock {
        Clock(Source::Suspended(suspended))
    }

    /// A clock that shows what a test has set.
    #[cfg(test)]
    pub(crate) fn by_hand(nanoseconds: &'static AtomicU64) -> Clock {
        Clock(Source::ByHand(nanoseconds))
    }

    /// Tokio's clock.
    #[cfg(test)]
    pub(crate) fn of_tokio() -> Clock {
        Clock(Source::Tokio(tokio::time::Instant::now()))
    }

    /// The present moment.
    #[must_use]
    pub fn now(self) -> BootInstant {
        BootInstant(match self.0 {
            Source::Machine => since_boot(),
            Source::Suspended(Suspended(added)) => {
                since_boot() + Duration::from_nanos(added.load(Ordering::SeqCst))
            }
            #[cfg(test)]
            Source::ByHand(nanoseconds) => Duration::from_nanos(nanoseconds.load(Ordering::SeqCst)),
            #[cfg(test)]
            Source::Tokio(start) => start.elapsed(),
        })
    }

    /// Time from a moment until now.
    #[must_use]
    pub fn elapsed(self, since: BootInstant) -> Duration {
        self.now().since(since)
    }
}

fn since_boot() -> Duration {
    let now = clock_gettime(CLOCK);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    Duration::new(seconds, u32::try_from(now.tv_nsec).unwrap_or_default())
}
