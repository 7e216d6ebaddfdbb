//! Collapses identical work: many requests wait for the outcome of one.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, PoisonError, Weak};

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, MutexGuard, spawn, watch};

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
    K: Clone + Eq + Hash + Send + Sync + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// Joins the flight of a key, or begins one in a task of its own. Tells if it joined. The work may ask whether anybody
    /// still waits for it.
    pub(crate) fn join<W>(
        self: &Arc<Self>,
        key: K,
        work: impl FnOnce(Interest<K, T>) -> W,
    ) -> (Arc<Flight<T>>, bool)
    where
        W: Future<Output = T> + Send + 'static,
    {
        let mut flights = self.lock();
        if let Some(flight) = flights.get(&key) {
            return (Arc::clone(flight), true);
        }
        let (flight, completion) = Flight::new();
        flights.insert(key.clone(), Arc::clone(&flight));
        drop(flights);
        let place =
            Arc::new(Place { flights: Arc::clone(self), key, flight: Arc::downgrade(&flight) });
        let work = work(Interest(Arc::clone(&place)));
        // A task: the request that began it may leave.
        spawn(async move {
            let outcome = work.await;
            drop(place);
            completion.complete(outcome);
        });
        (flight, false)
    }
}

/// Tells the work of a flight in [`Flights`] if anybody waits for it.
pub(crate) struct Interest<K: Eq + Hash, T>(Arc<Place<K, T>>);

impl<K: Eq + Hash, T> Interest<K, T> {
    /// Gives the flight up if all who waited have left. From then on nobody can join it.
    pub(crate) fn give_up_if_unwanted(&self) -> bool {
        let mut flights = self.0.flights.lock();
        // One holder is the map.
        let is_unwanted = self.0.flight.strong_count() <= 1;
        if is_unwanted {
            self.0.leave(&mut flights);
        }
        is_unwanted
    }
}

impl<K, T> Flights<K, T> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, Arc<Flight<T>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True if nothing is under way.
    #[cfg(all(test, feature = "shuttle"))]
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }
}

/// The entry of a flight, removed however the work ends.
struct Place<K: Eq + Hash, T> {
    flights: Arc<Flights<K, T>>,
    key: K,
    flight: Weak<Flight<T>>,
}

impl<K: Eq + Hash, T> Place<K, T> {
    fn leave(&self, flights: &mut HashMap<K, Arc<Flight<T>>>) {
        // After it was given up another may be there.
        let is_mine = |it: &Arc<Flight<T>>| std::ptr::eq(Arc::as_ptr(it), self.flight.as_ptr());
        if flights.get(&self.key).is_some_and(is_mine) {
            flights.remove(&self.key);
        }
    }
}

impl<K: Eq + Hash, T> Drop for Place<K, T> {
    fn drop(&mut self) {
        self.leave(&mut self.flights.lock());
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

    #[tokio::test]
    async fn work_that_nobody_waits_for_is_given_up_and_cannot_be_joined() {
        let flights = Arc::new(Flights::<u8, bool>::default());
        let (give, interest) = tokio::sync::oneshot::channel();
        let (flight, _) = flights.join(1, |interest| {
            let _ = give.send(interest);
            std::future::pending()
        });
        let interest = interest.await.unwrap();
        assert!(!interest.give_up_if_unwanted());
        drop(flight);
        assert!(interest.give_up_if_unwanted());
        let (next, joined) = flights.join(1, |_| async { true });
        assert!(!joined);
        // The one that was given up leaves the next in its place.
        drop(interest);
        assert_eq!(next.outcome().await, Ok(true));
    }
}
