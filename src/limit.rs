//! Limits on what happens at the same time, as places that guards hold. Clients share them.

use std::hash::Hash;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hashbrown::HashMap;
use prometheus_client::metrics::gauge::Gauge;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::settings::LimitSettings;

/// A number of places that clients share: a client gets another place while it holds fewer than are free.
///
/// So one client alone gets half of the places, two get a third each, and a newcomer always finds some, however greedy the
/// others are. Nobody has to be known beforehand, and nobody loses a place.
#[derive(Debug)]
pub(crate) struct Shares<K>(Arc<SharesState<K>>);

impl<K> Clone for Shares<K> {
    fn clone(&self) -> Shares<K> {
        Shares(Arc::clone(&self.0))
    }
}

#[derive(Debug)]
struct SharesState<K> {
    places: AtomicUsize,
    taken: Mutex<Taken<K>>,
}

#[derive(Debug)]
struct Taken<K> {
    total: usize,
    by_client: HashMap<K, usize>,
}

/// A place that is taken until this is dropped, by a panic too.
#[derive(Debug)]
pub(crate) struct Place<K: Eq + Hash> {
    shares: Shares<K>,
    client: Option<K>,
}

/// Reasons for which there is no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoPlace {
    /// All are taken.
    Full,
    /// The client holds its share.
    ShareTaken,
}

impl<K: Eq + Hash> Shares<K> {
    pub(crate) fn new(places: usize) -> Shares<K> {
        let taken = Mutex::new(Taken { total: 0, by_client: HashMap::new() });
        Shares(Arc::new(SharesState { places: AtomicUsize::new(places), taken }))
    }

    /// The number of places.
    pub(crate) fn places(&self) -> usize {
        self.0.places.load(Ordering::Relaxed)
    }

    /// Changes the number of places. Those that are taken stay, even if they are more.
    pub(crate) fn resize(&self, places: usize) {
        self.0.places.store(places, Ordering::Relaxed);
    }

    /// Takes a place, if the client's share leaves one. `None` is somebody without a share, such as a proxy that is trusted.
    pub(crate) fn try_take(&self, client: Option<K>) -> Result<Place<K>, NoPlace>
    where
        K: Clone,
    {
        let mut taken = self.lock();
        let free = self.places().saturating_sub(taken.total);
        if free == 0 {
            return Err(NoPlace::Full);
        }
        if let Some(client) = &client {
            let held = taken.by_client.entry(client.clone()).or_default();
            if *held >= free {
                return Err(NoPlace::ShareTaken);
            }
            *held += 1;
        }
        taken.total += 1;
        drop(taken);
        Ok(Place { shares: self.clone(), client })
    }

    fn lock(&self) -> MutexGuard<'_, Taken<K>> {
        // Nothing under the lock can panic half-way, so a poisoned one is sound.
        self.0.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Drop for Place<K> {
    fn drop(&mut self) {
        let mut taken = self.shares.lock();
        taken.total -= 1;
        if let Some(client) = &self.client
            && let Some(held) = taken.by_client.get_mut(client)
        {
            *held -= 1;
            if *held == 0 {
                taken.by_client.remove(client);
            }
        }
    }
}

/// Turns: each client has the same number of them at the same time, and waits for its own.
#[derive(Debug)]
pub(crate) struct Turns<K>(Arc<TurnsState<K>>);

#[derive(Debug)]
struct TurnsState<K> {
    each: AtomicUsize,
    by_client: Mutex<HashMap<K, Arc<Semaphore>>>,
}

/// A turn that lasts until this is dropped.
#[derive(Debug)]
pub(crate) struct Turn<K: Eq + Hash> {
    turns: Arc<TurnsState<K>>,
    client: K,
    permit: Option<OwnedSemaphorePermit>,
}

impl<K: Eq + Hash + Clone> Turns<K> {
    pub(crate) fn new(each: usize) -> Turns<K> {
        let each = AtomicUsize::new(each);
        Turns(Arc::new(TurnsState { each, by_client: Mutex::default() }))
    }

    /// Changes the number of turns, for clients that have none now.
    pub(crate) fn resize(&self, each: usize) {
        self.0.each.store(each, Ordering::Relaxed);
    }

    /// Waits for a turn. Safe to cancel.
    pub(crate) async fn take(&self, client: K) -> Turn<K> {
        // Made before the wait, so that a client whose wait is cancelled is forgotten as well.
        let mut turn = Turn { turns: Arc::clone(&self.0), client, permit: None };
        let semaphore = {
            let mut by_client = self.0.lock();
            let semaphore = by_client.entry(turn.client.clone());
            let each = self.0.each.load(Ordering::Relaxed);
            Arc::clone(semaphore.or_insert_with(|| Arc::new(Semaphore::new(each))))
        };
        turn.permit = semaphore.acquire_owned().await.ok();
        turn
    }
}

impl<K> TurnsState<K> {
    fn lock(&self) -> MutexGuard<'_, HashMap<K, Arc<Semaphore>>> {
        self.by_client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Drop for Turn<K> {
    fn drop(&mut self) {
        self.permit.take();
        let mut by_client = self.turns.lock();
        // Waiting tasks and permits hold the semaphore, and new ones find it under the lock.
        if by_client.get(&self.client).is_some_and(|it| Arc::strong_count(it) == 1) {
            by_client.remove(&self.client);
        }
    }
}

/// The limits on the heads of requests and on those of one connection, for connections to come.
#[derive(Debug)]
pub(crate) struct HeadLimits {
    header_bytes: AtomicUsize,
    h2_streams: AtomicU32,
}

impl HeadLimits {
    pub(crate) fn new(settings: &LimitSettings) -> HeadLimits {
        HeadLimits {
            header_bytes: AtomicUsize::new(settings.header_bytes),
            h2_streams: AtomicU32::new(settings.h2_streams.get()),
        }
    }

    pub(crate) fn set(&self, settings: &LimitSettings) {
        self.header_bytes.store(settings.header_bytes, Ordering::Relaxed);
        self.h2_streams.store(settings.h2_streams.get(), Ordering::Relaxed);
    }

    pub(crate) fn header_bytes(&self) -> usize {
        self.header_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn h2_streams(&self) -> u32 {
        self.h2_streams.load(Ordering::Relaxed)
    }
}

/// Holds a gauge up by one.
#[derive(Debug)]
pub(crate) struct GaugeGuard(Gauge);

impl GaugeGuard {
    pub(crate) fn raise(gauge: &Gauge) -> GaugeGuard {
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
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn one_client_alone_gets_half_and_a_newcomer_always_gets_a_place() {
        let shares = Shares::new(100);
        let mut held = Vec::new();
        for client in 0..5 {
            let before = held.len();
            while let Ok(place) = shares.try_take(Some(client)) {
                held.push(place);
            }
            assert!(held.len() > before, "client {client}");
        }
        assert_eq!(shares.lock().by_client[&0], 50);
        assert_eq!(shares.try_take(Some(0)).unwrap_err(), NoPlace::ShareTaken);
        held.clear();
        assert!(shares.lock().by_client.is_empty());
        assert_eq!(shares.lock().total, 0);
    }

    #[test]
    fn fewer_places_are_given_out_once_there_are_fewer() {
        let shares = Shares::<u8>::new(2);
        let both = [shares.try_take(None).unwrap(), shares.try_take(None).unwrap()];
        shares.resize(1);
        assert_eq!(shares.try_take(None).unwrap_err(), NoPlace::Full);
        drop(both);
        let _one = shares.try_take(None).unwrap();
        assert_eq!(shares.try_take(None).unwrap_err(), NoPlace::Full);
        shares.resize(2);
        assert!(shares.try_take(None).is_ok());
    }

    #[test]
    fn who_has_no_share_may_take_all() {
        let shares = Shares::<u8>::new(2);
        let _both = [shares.try_take(None).unwrap(), shares.try_take(None).unwrap()];
        assert_eq!(shares.try_take(None).unwrap_err(), NoPlace::Full);
        assert_eq!(shares.try_take(Some(1)).unwrap_err(), NoPlace::Full);
    }

    #[test]
    fn a_single_place_is_for_anybody() {
        let shares = Shares::new(1);
        let place = shares.try_take(Some(1)).unwrap();
        assert!(shares.try_take(Some(1)).is_err());
        drop(place);
        assert!(shares.try_take(Some(2)).is_ok());
    }

    #[tokio::test]
    async fn a_client_waits_for_its_own_turns_only() {
        let turns = Turns::new(1);
        let first = turns.take("a").await;
        let mut second = Box::pin(turns.take("a"));
        assert!((&mut second).now_or_never().is_none());
        drop(turns.take("b").await);
        drop(first);
        drop((&mut second).now_or_never().unwrap());
        // A wait that is given up leaves nothing behind.
        let first = turns.take("a").await;
        assert!(turns.take("a").now_or_never().is_none());
        drop(first);
        assert!(turns.0.lock().is_empty());
    }
}
