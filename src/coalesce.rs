//! Collapses identical work: many requests wait for the outcome of one.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

/// Work under way, whose outcome any number of tasks may wait for.
///
/// The work runs in a task of its own, so its leader may leave and the followers still get the outcome. If the work ends
/// without an outcome, the followers get an error and never hang.
#[derive(Debug)]
pub struct Flight<T> {
    outcome: watch::Receiver<Option<T>>,
    sent: AtomicBool,
    invalidated: AtomicBool,
}

/// The duty to complete a flight. If it is dropped before, the flight is [`Lost`].
#[derive(Debug)]
pub struct Completion<T>(watch::Sender<Option<T>>);

/// The work ended without an outcome: it panicked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the work that this request was waiting for failed")]
pub struct Lost;

impl<T: Clone> Flight<T> {
    /// A flight that has not been sent, and the duty to complete it.
    #[must_use]
    pub fn new() -> (Arc<Flight<T>>, Completion<T>) {
        let (sender, outcome) = watch::channel(None);
        let (sent, invalidated) = (AtomicBool::new(false), AtomicBool::new(false));
        (Arc::new(Flight { outcome, sent, invalidated }), Completion(sender))
    }

    /// Waits for the outcome. Safe to cancel.
    pub async fn outcome(&self) -> Result<T, Lost> {
        let mut outcome = self.outcome.clone();
        let outcome = outcome.wait_for(Option::is_some).await.map_err(|_dropped| Lost)?;
        outcome.clone().ok_or(Lost)
    }

    /// The number of tasks that hold this flight, the leader included.
    #[must_use]
    pub fn holders(self: &Arc<Self>) -> usize {
        Arc::strong_count(self).saturating_sub(1)
    }

    /// Marks the work as sent: it may miss any change from now on.
    pub fn mark_sent(&self) {
        self.sent.store(true, Ordering::Relaxed);
    }

    /// True once it has been sent.
    #[must_use]
    pub fn is_sent(&self) -> bool {
        self.sent.load(Ordering::Relaxed)
    }

    /// Marks the outcome as one that must not be kept.
    pub fn invalidate(&self) {
        self.invalidated.store(true, Ordering::Relaxed);
    }

    /// True if the outcome must not be kept.
    #[must_use]
    pub fn is_invalidated(&self) -> bool {
        self.invalidated.load(Ordering::Relaxed)
    }
}

impl<T> Completion<T> {
    /// Hands the outcome to all who wait, now or later.
    pub fn complete(self, outcome: T) {
        self.0.send_replace(Some(outcome));
    }
}

/// Flights under way, by keys whose outcome never changes.
#[derive(Debug)]
pub(crate) struct Flights<K, T>(Mutex<HashMap<K, Arc<Flight<T>>>>);

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
    /// Joins the flight of a key, or begins one in a task of its own. Tells if it joined.
    pub(crate) fn join<W>(
        self: &Arc<Self>,
        key: K,
        work: impl FnOnce() -> W,
    ) -> (Arc<Flight<T>>, bool)
    where
        W: Future<Output = T> + Send + 'static,
    {
        let joined = self.join_or_begin(key, || Some(work()));
        joined.expect("the work is never refused")
    }

    /// The same; `None` if there is no flight to join and `begin` refuses one by giving no work.
    pub(crate) fn join_or_begin<W>(
        self: &Arc<Self>,
        key: K,
        begin: impl FnOnce() -> Option<W>,
    ) -> Option<(Arc<Flight<T>>, bool)>
    where
        W: Future<Output = T> + Send + 'static,
    {
        let mut flights = self.lock();
        if let Some(flight) = flights.get(&key) {
            return Some((Arc::clone(flight), true));
        }
        let work = begin()?;
        let (flight, completion) = Flight::new();
        flights.insert(key.clone(), Arc::clone(&flight));
        drop(flights);
        let place = Place { flights: Arc::clone(self), key };
        // A task: the request that began it may leave.
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

/// The entry of a flight, removed however the work ends.
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
