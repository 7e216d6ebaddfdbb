//! Byte budgets: memory for values that are being fetched (`[limits] fetch_bytes`) or written (`write_bytes`), which clients
//! share.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use crate::cache::Cache;
use crate::holders::{Holders, Whose};
use crate::metrics::{Metrics, Shed};
use crate::peer::PeerKey;

/// Memory for values that are being fetched and decoded, and for pixels.
///
/// Bodies that have left the cache, or never were in it, and that slow clients are still reading, count towards the same
/// budget and the same share.
#[derive(Debug)]
pub struct FetchBudget {
    room: Room,
    patience: Duration,
    cache: Arc<Cache>,
    holders: Arc<Holders>,
    metrics: Arc<Metrics>,
}

impl FetchBudget {
    /// A budget of `bytes`. A reservation waits for at most `patience`.
    #[must_use]
    pub(crate) fn new(
        bytes: usize,
        patience: Duration,
        cache: Arc<Cache>,
        holders: Arc<Holders>,
        metrics: Arc<Metrics>,
    ) -> FetchBudget {
        let room = Room::new(bytes, holders.released());
        FetchBudget { room, patience, cache, holders, metrics }
    }

    /// Reserves memory for a value. A value larger than the budget gets all of it. `None` is the server itself, which has no
    /// share.
    ///
    /// Drops the slowest of the clients that hold the memory with their answers: nobody knows when they will let go of it, and
    /// a new reader is as good as they are. Where the client holds its share, its own slowest answer is dropped.
    pub async fn reserve(
        &self,
        client: Option<PeerKey>,
        bytes: u64,
    ) -> Result<Reservation<'_>, OverBudget> {
        self.reserve_within(client, bytes, self.patience).await
    }

    /// All of the budget, in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        self.room.bytes()
    }

    /// Changes the budget. What is reserved stays so.
    pub(crate) fn resize(&self, bytes: usize) {
        self.room.resize(bytes);
    }

    /// The same as [`FetchBudget::reserve`], with a patience of the caller's.
    pub(crate) async fn reserve_within(
        &self,
        client: Option<PeerKey>,
        bytes: u64,
        patience: Duration,
    ) -> Result<Reservation<'_>, OverBudget> {
        let reserved = tokio::time::timeout(patience, self.reserve_in_turn(client, bytes)).await;
        reserved.map_err(|_elapsed| {
            self.metrics.count_shed(Shed::FetchBytes);
            match self.obstacle(client, bytes) {
                Some(Obstacle::Share) => OverBudget::FetchShare,
                _ => OverBudget::Fetch,
            }
        })
    }

    async fn reserve_in_turn(&self, client: Option<PeerKey>, bytes: u64) -> Reservation<'_> {
        loop {
            // Before the line: its first would otherwise make all others wait for slow clients, or for a share of its own.
            self.clear_the_way(client, bytes, true).await;
            let _first = self.room.line.lock().await;
            // Fetches that were ahead in the line may have filled it since.
            loop {
                let released = self.room.released.notified();
                match self.try_take(client, bytes) {
                    Ok(reservation) => return reservation,
                    Err(Obstacle::Held) => self.clear_the_way(client, bytes, false).await,
                    Err(Obstacle::Share) => break,
                    Err(Obstacle::Reserved) => released.await,
                }
            }
        }
    }

    /// Drops answers for as long as they are in the way. `with_share` drops the client's own as well, while it has its share.
    async fn clear_the_way(&self, client: Option<PeerKey>, bytes: u64, with_share: bool) {
        let in_the_way = || match self.obstacle(client, bytes) {
            Some(Obstacle::Held) => Some(Whose::Most),
            Some(Obstacle::Share) if with_share => client.map(Whose::Of),
            None | Some(Obstacle::Share | Obstacle::Reserved) => None,
        };
        self.holders.drop_while(in_the_way).await;
    }

    fn try_take(&self, client: Option<PeerKey>, bytes: u64) -> Result<Reservation<'_>, Obstacle> {
        self.with_held(client, |held| self.room.try_take(client, bytes, held))
    }

    fn obstacle(&self, client: Option<PeerKey>, bytes: u64) -> Option<Obstacle> {
        self.with_held(client, |held| self.room.check(client, bytes, 0, held)).err()
    }

    /// Calls a check with the memory that answers hold. Images that are in memory for a moment make room for what fails it.
    fn with_held<T>(
        &self,
        client: Option<PeerKey>,
        check: impl Fn(Held) -> Result<T, Obstacle>,
    ) -> Result<T, Obstacle> {
        let held = || {
            let total = self.cache.held().in_flight as u64;
            // What a client reads from the cache, or several together, is no more than all that is outside of it.
            let of_client = client.map_or(0, |client| self.holders.held_by(client).min(total));
            Held { total, of_client }
        };
        check(held()).or_else(|_obstacle| {
            self.cache.make_room();
            check(held())
        })
    }
}

/// Memory for what is being written. It is separate, so that writers can't take the readers' memory.
#[derive(Debug)]
pub(crate) struct WriteBudget {
    room: Room,
    patience: Duration,
    metrics: Arc<Metrics>,
}

impl WriteBudget {
    /// A budget of `bytes`. A reservation waits for at most `patience`.
    #[must_use]
    pub(crate) fn new(bytes: usize, patience: Duration, metrics: Arc<Metrics>) -> WriteBudget {
        WriteBudget { room: Room::new(bytes, Arc::default()), patience, metrics }
    }

    /// Reserves memory for a write. A write larger than the budget gets all of it.
    pub(crate) async fn reserve(
        &self,
        client: PeerKey,
        bytes: u64,
    ) -> Result<WriteReservation<'_>, OverBudget> {
        let reserved = tokio::time::timeout(self.patience, self.reserve_in_turn(client, bytes));
        match reserved.await {
            Ok(reservation) => Ok(WriteReservation { reservation, budget: self }),
            Err(_elapsed) => {
                let obstacle = self.room.check(Some(client), bytes, 0, Held::NOTHING);
                Err(self.shed(obstacle.err()))
            }
        }
    }

    async fn reserve_in_turn(&self, client: PeerKey, bytes: u64) -> Reservation<'_> {
        loop {
            let released = self.room.released.notified();
            let obstacle = self.room.check(Some(client), bytes, 0, Held::NOTHING);
            // Before the line, whose first would otherwise make all others wait for a share of its own.
            if obstacle.is_err_and(|it| it == Obstacle::Share) {
                released.await;
                continue;
            }
            let _first = self.room.line.lock().await;
            loop {
                let released = self.room.released.notified();
                match self.room.try_take(Some(client), bytes, Held::NOTHING) {
                    Ok(reservation) => return reservation,
                    Err(Obstacle::Share) => break,
                    Err(Obstacle::Held | Obstacle::Reserved) => released.await,
                }
            }
        }
    }

    /// Changes the budget. What is reserved stays so.
    pub(crate) fn resize(&self, bytes: usize) {
        self.room.resize(bytes);
    }

    fn shed(&self, obstacle: Option<Obstacle>) -> OverBudget {
        self.metrics.count_shed(Shed::WriteBytes);
        match obstacle {
            Some(Obstacle::Share) => OverBudget::WriteShare,
            _ => OverBudget::Write,
        }
    }
}

/// Memory that is reserved for a write, and grows with it.
#[derive(Debug)]
pub(crate) struct WriteReservation<'a> {
    reservation: Reservation<'a>,
    budget: &'a WriteBudget,
}

impl WriteReservation<'_> {
    /// Grows to `bytes` in all. It doesn't wait: two writes that each wait for more would wait for each other.
    pub(crate) fn grow(&mut self, bytes: u64) -> Result<(), OverBudget> {
        self.reservation.grow(bytes).map_err(|obstacle| self.budget.shed(Some(obstacle)))
    }
}

/// Memory of which parts are reserved, in turn. A client gets another part while it holds less than is free, as it gets places
/// (`limit::Shares`). So one client alone gets half, and one part more, and its first may be as large as there is room.
#[derive(Debug)]
struct Room {
    bytes: AtomicU64,
    reserved: Mutex<Reserved>,
    /// First come, first served, among those whose share isn't taken: many small parts don't keep a large one waiting.
    line: tokio::sync::Mutex<()>,
    /// Notified when memory was released.
    released: Arc<Notify>,
}

#[derive(Debug, Default)]
struct Reserved {
    total: u64,
    by_client: HashMap<PeerKey, u64>,
}

/// Memory that counts towards a budget and isn't reserved: of everybody, and of the client.
#[derive(Debug, Clone, Copy)]
struct Held {
    total: u64,
    of_client: u64,
}

impl Held {
    const NOTHING: Held = Held { total: 0, of_client: 0 };
}

/// Reasons for which a part can't be reserved now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Obstacle {
    /// Too much is held without a reservation.
    Held,
    /// The client has its share.
    Share,
    /// Too much is reserved.
    Reserved,
}

/// A part of a budget, until this is dropped, by a panic too.
#[derive(Debug)]
pub struct Reservation<'a> {
    room: &'a Room,
    client: Option<PeerKey>,
    bytes: u64,
}

impl Room {
    fn new(bytes: usize, released: Arc<Notify>) -> Room {
        let (reserved, line) = (Mutex::default(), tokio::sync::Mutex::default());
        Room { bytes: AtomicU64::new(bytes as u64), reserved, line, released }
    }

    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Takes a part; all of it for more bytes than there are.
    fn try_take(
        &self,
        client: Option<PeerKey>,
        bytes: u64,
        held: Held,
    ) -> Result<Reservation<'_>, Obstacle> {
        let bytes = bytes.min(self.bytes());
        let mut reserved = self.lock();
        reserved.check(self.bytes(), client, bytes, 0, held)?;
        reserved.add(client, bytes);
        drop(reserved);
        Ok(Reservation { room: self, client, bytes })
    }

    /// Looks if a part could be taken, beside one of `before` bytes that it enlarges.
    fn check(
        &self,
        client: Option<PeerKey>,
        bytes: u64,
        before: u64,
        held: Held,
    ) -> Result<(), Obstacle> {
        let bytes = bytes.min(self.bytes());
        self.lock().check(self.bytes(), client, bytes, before, held)
    }

    /// Changes the size. What is reserved stays so.
    fn resize(&self, bytes: usize) {
        self.bytes.store(bytes as u64, Ordering::Relaxed);
        self.released.notify_waiters();
    }

    fn lock(&self) -> MutexGuard<'_, Reserved> {
        // Nothing under the lock can panic half-way, so a poisoned one is sound.
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Reserved {
    fn check(
        &self,
        all: u64,
        client: Option<PeerKey>,
        bytes: u64,
        before: u64,
        held: Held,
    ) -> Result<(), Obstacle> {
        if held.total > 0 && held.total + bytes > all {
            return Err(Obstacle::Held);
        }
        let used = self.total + held.total;
        let free = all.saturating_sub(used);
        if let Some(client) = client {
            let own = self.by_client.get(&client).copied().unwrap_or(0) + held.of_client;
            if own > before && own >= free {
                return Err(Obstacle::Share);
            }
        }
        if used > 0 && bytes > free {
            return Err(Obstacle::Reserved);
        }
        Ok(())
    }

    fn add(&mut self, client: Option<PeerKey>, bytes: u64) {
        self.total += bytes;
        if let Some(client) = client {
            *self.by_client.entry(client).or_default() += bytes;
        }
    }

    fn remove(&mut self, client: Option<PeerKey>, bytes: u64) {
        self.total -= bytes;
        if let Some(client) = client
            && let Entry::Occupied(mut of_client) = self.by_client.entry(client)
        {
            *of_client.get_mut() -= bytes;
            if *of_client.get() == 0 {
                of_client.remove();
            }
        }
    }
}

impl Reservation<'_> {
    /// Grows to `bytes` in all, if there is room now.
    fn grow(&mut self, bytes: u64) -> Result<(), Obstacle> {
        let more = bytes.saturating_sub(self.bytes);
        let mut reserved = self.room.lock();
        reserved.check(self.room.bytes(), self.client, more, self.bytes, Held::NOTHING)?;
        reserved.add(self.client, more);
        self.bytes += more;
        Ok(())
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.room.lock().remove(self.client, self.bytes);
        self.room.released.notify_waiters();
    }
}

/// A budget for memory is used up, or the client's share of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum OverBudget {
    /// `[limits] fetch_bytes`.
    #[error(
        "too many images are being fetched, rendered and sent: there is no memory for another one ([limits] fetch_bytes)"
    )]
    Fetch,
    /// The client's share of it, or of the fetches at the same time.
    #[error(
        "this client has its share of the images that are being fetched, rendered and sent (of [limits] fetch_bytes, \
         or 64 fetches): ask for fewer at the same time"
    )]
    FetchShare,
    /// `[limits] write_bytes`.
    #[error(
        "too many images are being written: there is no memory for another one ([limits] write_bytes)"
    )]
    Write,
    /// The client's share of it.
    #[error(
        "this client has its share of the images that are being written ([limits] write_bytes): \
         write fewer at the same time"
    )]
    WriteShare,
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::num::NonZeroUsize;

    use bytes::Bytes;
    use futures_util::FutureExt;

    use super::*;
    use crate::cache::CacheLimits;
    use crate::holders::ConnectionEnd;

    const LONG: Duration = Duration::from_hours(1);

    fn client(last: u8) -> PeerKey {
        PeerKey::V4(Ipv4Addr::new(127, 0, 0, last))
    }

    /// A budget, with the cache whose bodies count towards it.
    fn fetches(bytes: usize) -> (FetchBudget, Arc<Cache>, Arc<Holders>) {
        let cache = Arc::new(Cache::new(CacheLimits {
            images: NonZeroUsize::MIN,
            bytes: 1 << 20,
            derived: 0,
            recent: 0,
        }));
        let metrics = Arc::new(Metrics::new());
        let holders = Arc::new(Holders::new(100, 1, LONG, Arc::clone(&metrics)));
        let budget =
            FetchBudget::new(bytes, LONG, Arc::clone(&cache), Arc::clone(&holders), metrics);
        (budget, cache, holders)
    }

    fn body(cache: &Cache, length: usize) -> Bytes {
        cache.count(vec![0; length])
    }

    #[tokio::test]
    async fn a_budget_that_shrinks_gives_out_less_once_its_memory_is_free() {
        let (budget, ..) = fetches(4096);
        let reserve = |bytes| budget.reserve(None, bytes);
        let held = reserve(3072).await.unwrap();
        budget.resize(2048);
        assert!(reserve(1024).now_or_never().is_none());
        drop(held);
        let all = reserve(9999).await.unwrap();
        assert_eq!(all.bytes, 2048);
        assert!(reserve(1).now_or_never().is_none());
        budget.resize(4096);
        assert_eq!(reserve(2048).await.unwrap().bytes, 2048);
    }

    #[tokio::test]
    async fn what_is_fetched_and_what_is_sent_are_one_sum() {
        let (budget, cache, _) = fetches(1000);
        let sent = body(&cache, 400);
        let first = budget.reserve(Some(client(1)), 400).await.unwrap();
        // Neither is over the budget, together they are.
        let mut second = Box::pin(budget.reserve(Some(client(2)), 300));
        assert!((&mut second).now_or_never().is_none());
        drop(first);
        second.await.unwrap();
        drop(sent);
        assert_eq!(budget.reserve(None, 1000).await.unwrap().bytes, 1000);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_has_one_share_of_what_it_fetches_and_of_what_it_reads() {
        let (budget, cache, holders) = fetches(1000);
        let (greedy, connection) = (Some(client(1)), ConnectionEnd::default());
        let _body = body(&cache, 300);
        let answer = holders.add(client(1), &connection, 300, 0);
        let first = budget.reserve(greedy, 200).await.unwrap();
        // Half of the budget is its own.
        let mut second = Box::pin(budget.reserve(greedy, 100));
        assert!((&mut second).now_or_never().is_none());
        // Nobody else waits for it.
        let other = budget.reserve(Some(client(2)), 300).now_or_never().unwrap().unwrap();
        drop(other);
        // What it has read is no part of its share any more.
        answer.note_taken(250);
        drop(first);
        second.await.unwrap();
    }

    #[tokio::test]
    async fn a_client_that_waits_for_its_share_is_told_of_the_limit() {
        let (budget, cache, holders) = fetches(1000);
        let _body = body(&cache, 600);
        let _answer = holders.add(client(1), &ConnectionEnd::default(), 600, 0);
        let refused =
            |last, bytes| budget.reserve_within(Some(client(last)), bytes, Duration::ZERO);
        let error = refused(1, 300).await.unwrap_err();
        assert_eq!(error, OverBudget::FetchShare);
        assert_eq!(refused(2, 500).await.unwrap_err(), OverBudget::Fetch);
        assert!(error.to_string().contains("[limits] fetch_bytes"));
        refused(2, 400).await.unwrap();
    }

    #[tokio::test]
    async fn many_small_parts_do_not_keep_a_large_one_waiting() {
        let (budget, ..) = fetches(1000);
        let small = budget.reserve(Some(client(1)), 100).await.unwrap();
        let mut large = Box::pin(budget.reserve(Some(client(2)), 1000));
        assert!((&mut large).now_or_never().is_none());
        let mut next = Box::pin(budget.reserve(Some(client(3)), 100));
        assert!((&mut next).now_or_never().is_none());
        drop(small);
        let large = large.now_or_never().unwrap().unwrap();
        assert!((&mut next).now_or_never().is_none());
        drop(large);
        next.await.unwrap();
    }

    #[tokio::test]
    async fn a_writer_alone_gets_half_and_another_finds_room() {
        let budget = WriteBudget::new(1000, Duration::ZERO, Arc::new(Metrics::new()));
        let first = budget.reserve(client(1), 300).await.unwrap();
        let _second = budget.reserve(client(1), 300).await.unwrap();
        let refused = budget.reserve(client(1), 1).await.unwrap_err();
        assert_eq!(refused, OverBudget::WriteShare);
        assert!(refused.to_string().contains("[limits] write_bytes"));
        let other = budget.reserve(client(2), 400).await.unwrap();
        assert_eq!(budget.reserve(client(3), 1).await.unwrap_err(), OverBudget::Write);
        drop((first, other));
        // Its first write may be as large as there is room.
        let mut grown = budget.reserve(client(2), 100).await.unwrap();
        grown.grow(700).unwrap();
        assert_eq!(grown.grow(701).unwrap_err(), OverBudget::Write);
        assert_eq!(grown.reservation.bytes, 700);
    }

    #[tokio::test]
    async fn a_writer_that_waits_for_its_share_is_in_nobodys_way() {
        let budget = WriteBudget::new(1000, LONG, Arc::new(Metrics::new()));
        let first = budget.reserve(client(1), 500).await.unwrap();
        let mut second = Box::pin(budget.reserve(client(1), 400));
        assert!((&mut second).now_or_never().is_none());
        budget.reserve(client(2), 400).now_or_never().unwrap().unwrap();
        drop(first);
        second.now_or_never().unwrap().unwrap();
        assert!(budget.room.lock().by_client.is_empty());
        assert_eq!(budget.room.lock().total, 0);
    }
}
