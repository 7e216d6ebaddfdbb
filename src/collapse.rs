//! One piece of work for many who want its outcome.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

/// Work under way, which anyone may wait for.
///
/// Whoever leads the work runs it in a task of its own and may itself stop waiting: the followers get
/// their outcome all the same. When the work fails to bring one, they are told so, and never hang.
#[derive(Debug)]
pub struct Flight<T> {
    outcome: watch::Receiver<Option<T>>,
    departed: AtomicBool,
    void: AtomicBool,
}

/// The duty to bring a flight's outcome. Dropped without, the flight is [`Lost`].
#[derive(Debug)]
pub struct Landing<T>(watch::Sender<Option<T>>);

/// The work ended without an outcome: it panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the work that this was waiting for failed")]
pub struct Lost;

impl<T: Clone> Flight<T> {
    /// A flight that has not departed, and the duty to land it.
    #[must_use]
    pub fn new() -> (Arc<Flight<T>>, Landing<T>) {
        let (sender, outcome) = watch::channel(None);
        let (departed, void) = (AtomicBool::new(false), AtomicBool::new(false));
        (Arc::new(Flight { outcome, departed, void }), Landing(sender))
    }

    /// Waits for the outcome. May be cancelled.
    pub async fn outcome(&self) -> Result<T, Lost> {
        let mut outcome = self.outcome.clone();
        let landed = outcome.wait_for(Option::is_some).await.map_err(|_dropped| Lost)?;
        landed.clone().ok_or(Lost)
    }

    /// How many hold this flight besides the one place where it can be joined, the leader included.
    #[must_use]
    pub fn holders(self: &Arc<Self>) -> usize {
        Arc::strong_count(self).saturating_sub(1)
    }

    /// Says that the work begins to look at the world: what happens from now on it may have missed.
    pub fn depart(&self) {
        self.departed.store(true, Ordering::Relaxed);
    }

    /// Whether it has departed.
    #[must_use]
    pub fn has_departed(&self) -> bool {
        self.departed.load(Ordering::Relaxed)
    }

    /// Says that the outcome must not be kept.
    pub fn void(&self) {
        self.void.store(true, Ordering::Relaxed);
    }

    /// Whether the outcome must not be kept.
    #[must_use]
    pub fn is_void(&self) -> bool {
        self.void.load(Ordering::Relaxed)
    }
}

impl<T> Landing<T> {
    /// Brings the outcome to all who wait and to all who will.
    pub fn land(self, outcome: T) {
        self.0.send_replace(Some(outcome));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn everyone_gets_the_outcome_before_and_after_the_landing() {
        let (flight, landing) = Flight::new();
        let waiting: Vec<_> = (0..10)
            .map(|_| {
                let flight = Arc::clone(&flight);
                tokio::spawn(async move { flight.outcome().await })
            })
            .collect();
        tokio::task::yield_now().await;
        landing.land(7);
        for waiter in waiting {
            assert_eq!(waiter.await.unwrap(), Ok(7));
        }
        assert_eq!(flight.outcome().await, Ok(7));
    }

    #[tokio::test]
    async fn a_leader_that_fails_leaves_nobody_waiting() {
        let (flight, landing) = Flight::<u8>::new();
        let waiting = tokio::spawn({
            let flight = Arc::clone(&flight);
            async move { flight.outcome().await }
        });
        tokio::task::yield_now().await;
        drop(landing);
        assert_eq!(waiting.await.unwrap(), Err(Lost));
        assert_eq!(flight.outcome().await, Err(Lost));
    }
}
