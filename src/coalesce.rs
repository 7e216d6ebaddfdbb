//! One piece of work for many who want its outcome.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// Work under way, which anyone may wait for.
///
/// Whoever leads the work runs it in a task of its own and may itself stop waiting: the followers get
/// their outcome all the same. When the work fails to bring one, they are told so, and never hang.
#[derive(Debug)]
pub struct Flight<T> {
    outcome: watch::Receiver<Option<T>>,
    sent: AtomicBool,
    invalidated: AtomicBool,
}

/// The duty to bring a flight's outcome. Dropped without, the flight is [`Lost`].
#[derive(Debug)]
pub struct Completion<T>(watch::Sender<Option<T>>);

/// The work ended without an outcome: it panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the work that this was waiting for failed")]
pub struct Lost;

impl<T: Clone> Flight<T> {
    /// A flight that has not been sent, and the duty to complete it.
    #[must_use]
    pub fn new() -> (Arc<Flight<T>>, Completion<T>) {
        let (sender, outcome) = watch::channel(None);
        let (sent, invalidated) = (AtomicBool::new(false), AtomicBool::new(false));
        (Arc::new(Flight { outcome, sent, invalidated }), Completion(sender))
    }

    /// Waits for the outcome. May be cancelled.
    pub async fn outcome(&self) -> Result<T, Lost> {
        let mut outcome = self.outcome.clone();
        let outcome = outcome.wait_for(Option::is_some).await.map_err(|_dropped| Lost)?;
        outcome.clone().ok_or(Lost)
    }

    /// How many hold this flight besides the one place where it can be joined, the leader included.
    #[must_use]
    pub fn holders(self: &Arc<Self>) -> usize {
        Arc::strong_count(self).saturating_sub(1)
    }

    /// Says that the work begins to look at the world: what happens from now on it may have missed.
    pub fn mark_sent(&self) {
        self.sent.store(true, Ordering::Relaxed);
    }

    /// Whether it has been sent.
    #[must_use]
    pub fn is_sent(&self) -> bool {
        self.sent.load(Ordering::Relaxed)
    }

    /// Says that the outcome must not be kept.
    pub fn invalidate(&self) {
        self.invalidated.store(true, Ordering::Relaxed);
    }

    /// Whether the outcome must not be kept.
    #[must_use]
    pub fn is_invalidated(&self) -> bool {
        self.invalidated.load(Ordering::Relaxed)
    }
}

impl<T> Completion<T> {
    /// Brings the outcome to all who wait and to all who will.
    pub fn complete(self, outcome: T) {
        self.0.send_replace(Some(outcome));
    }
}

/// Work under way, each piece under a key whose outcome is the same whenever it is asked for.
#[derive(Debug)]
pub struct Flights<K, T>(Mutex<HashMap<K, Arc<Flight<T>>>>);

impl<K, T> Default for Flights<K, T> {
    fn default() -> Self {
        Flights(Mutex::default())
    }
}

impl<K, T> Flights<K, T>
where
    K: Clone + Eq + Hash + Send + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// The work under a key, begun in a task of its own where it isn't under way; and whether it was.
    pub fn join<W>(self: &Arc<Self>, key: K, work: impl FnOnce() -> W) -> (Arc<Flight<T>>, bool)
    where
        W: Future<Output = T> + Send + 'static,
    {
        let joined = self.join_within(key, usize::MAX, work);
        joined.expect("there are never so many")
    }

    /// The same, or nothing where it isn't under way and as many as may are.
    pub fn join_within<W>(
        self: &Arc<Self>,
        key: K,
        most: usize,
        work: impl FnOnce() -> W,
    ) -> Option<(Arc<Flight<T>>, bool)>
    where
        W: Future<Output = T> + Send + 'static,
    {
        let mut flights = self.lock();
        if let Some(flight) = flights.get(&key) {
            return Some((Arc::clone(flight), true));
        }
        if flights.len() >= most {
            return None;
        }
        let (flight, completion) = Flight::new();
        flights.insert(key.clone(), Arc::clone(&flight));
        drop(flights);
        let (place, work) = (Place { flights: Arc::clone(self), key }, work());
        // Whoever asked first may leave.
        tokio::spawn(async move {
            let outcome = work.await;
            drop(place);
            completion.complete(outcome);
        });
        Some((flight, false))
    }
}

impl<K, T> Flights<K, T> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, Arc<Flight<T>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place among the work under way, which is left whatever happens.
struct Place<K: Eq + Hash, T> {
    flights: Arc<Flights<K, T>>,
    key: K,
}

impl<K: Eq + Hash, T> Drop for Place<K, T> {
    fn drop(&mut self) {
        self.flights.lock().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn everyone_gets_the_outcome_before_and_after_the_landing() {
        let (flight, completion) = Flight::new();
        let waiting: Vec<_> = (0..10)
            .map(|_| {
                let flight = Arc::clone(&flight);
                tokio::spawn(async move { flight.outcome().await })
            })
            .collect();
        tokio::task::yield_now().await;
        completion.complete(7);
        for waiter in waiting {
            assert_eq!(waiter.await.unwrap(), Ok(7));
        }
        assert_eq!(flight.outcome().await, Ok(7));
    }

    #[tokio::test]
    async fn a_leader_that_fails_leaves_nobody_waiting() {
        let (flight, completion) = Flight::<u8>::new();
        let waiting = tokio::spawn({
            let flight = Arc::clone(&flight);
            async move { flight.outcome().await }
        });
        tokio::task::yield_now().await;
        drop(completion);
        assert_eq!(waiting.await.unwrap(), Err(Lost));
        assert_eq!(flight.outcome().await, Err(Lost));
    }
}
