//! Answers on their way, and the clients that hold them: who is too slow, and who is dropped when others need the room.

use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hashbrown::HashMap;
use tokio::sync::Notify;

use crate::metrics::{Dropped, Metrics};
use crate::peer::PeerKey;

/// Time in which no client is called slow.
const GRACE: Duration = Duration::from_secs(1);

/// Interval at which it is looked again whether memory was released that no answer here holds.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// The answers that are being sent, over all connections.
///
/// An answer is held by its client until the last byte was taken. There is no way to make a client take it sooner, so the
/// connection is dropped: of the client that holds most, the one that is slowest.
#[derive(Debug)]
pub(crate) struct Holders {
    answers: Mutex<Answers>,
    most: AtomicUsize,
    /// Bytes a second that a client has to take.
    min_rate: u64,
    /// Longest time between two looks at the rate of an answer.
    window: Duration,
    /// Notified when an answer is not held any more.
    released: Arc<Notify>,
    metrics: Arc<Metrics>,
}

#[derive(Debug, Default)]
struct Answers {
    by_number: HashMap<u64, Arc<HeldAnswer>>,
    next: u64,
    /// Answers whose connections go on, and by client.
    standing: usize,
    by_client: HashMap<PeerKey, ClientAnswers>,
    /// Nobody is slow before this time.
    nobody_before: Option<Instant>,
}

/// The answers of one client whose connections go on.
#[derive(Debug, Default)]
struct ClientAnswers {
    standing: usize,
    /// Bytes that the client hasn't taken yet.
    left: Arc<AtomicU64>,
    connections: HashMap<ConnectionEnd, usize>,
    /// None of them is slow before this time.
    nobody_before: Option<Instant>,
}

#[derive(Debug)]
struct HeldAnswer {
    client: PeerKey,
    connection: ConnectionEnd,
    began: Instant,
    bytes: u64,
    taken: AtomicU64,
    /// That of its client.
    left_of_client: Arc<AtomicU64>,
    pace: Mutex<Pace>,
}

/// The bytes that were taken at the last look.
#[derive(Debug)]
struct Pace {
    since: Instant,
    taken: u64,
    window: Duration,
}

/// A switch that ends a connection, whatever it does.
#[derive(Debug, Clone, Default)]
pub(crate) struct ConnectionEnd(Arc<Notify>);

impl ConnectionEnd {
    /// Ends the connection.
    pub(crate) fn end(&self) {
        self.0.notify_one();
    }

    /// Waits until the connection is to end.
    pub(crate) async fn ended(&self) {
        self.0.notified().await;
    }
}

impl PartialEq for ConnectionEnd {
    fn eq(&self, other: &ConnectionEnd) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for ConnectionEnd {}

impl Hash for ConnectionEnd {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.0).hash(state);
    }
}

/// An answer that is being sent, until this is dropped.
#[derive(Debug)]
pub(crate) struct Held {
    holders: Arc<Holders>,
    number: u64,
    answer: Arc<HeldAnswer>,
}

impl Holders {
    /// At most `most` answers at the same time. A client that takes less than `min_rate` bytes a second, looked at each
    /// `window`, is dropped.
    pub(crate) fn new(
        most: usize,
        min_rate: u64,
        window: Duration,
        metrics: Arc<Metrics>,
    ) -> Holders {
        let (answers, released) = (Mutex::default(), Arc::default());
        Holders { answers, most: AtomicUsize::new(most), min_rate, window, released, metrics }
    }

    /// Is notified when an answer is not held any more.
    pub(crate) fn released(&self) -> Arc<Notify> {
        Arc::clone(&self.released)
    }

    /// Returns the bytes of a client's answers that it hasn't taken yet.
    pub(crate) fn held_by(&self, client: PeerKey) -> u64 {
        let answers = self.lock();
        answers.by_client.get(&client).map_or(0, |it| it.left.load(Ordering::Relaxed))
    }

    /// Changes how many answers there may be at the same time.
    pub(crate) fn resize(&self, most: usize) {
        self.most.store(most, Ordering::Relaxed);
    }

    /// Adds an answer of some bytes, of which up to `piece` count as taken before they are.
    pub(crate) fn add(
        self: &Arc<Self>,
        client: PeerKey,
        connection: &ConnectionEnd,
        bytes: u64,
        piece: u64,
    ) -> Held {
        let began = Instant::now();
        let of_piece = Duration::from_secs(piece.checked_div(self.min_rate).unwrap_or(0));
        let pace = Pace { since: began, taken: 0, window: self.window.max(of_piece) };
        let mut answers = self.lock();
        if answers.standing >= self.most.load(Ordering::Relaxed) {
            answers.drop_most_answers();
            self.metrics.count_dropped(Dropped::Answers);
        }
        let left_of_client = Arc::clone(&answers.by_client.entry(client).or_default().left);
        left_of_client.fetch_add(bytes, Ordering::Relaxed);
        let answer = Arc::new(HeldAnswer {
            client,
            connection: connection.clone(),
            began,
            bytes,
            taken: AtomicU64::new(0),
            left_of_client,
            pace: Mutex::new(pace),
        });
        let number = answers.insert(Arc::clone(&answer));
        drop(answers);
        Held { holders: Arc::clone(self), number, answer }
    }

    /// Drops connections for as long as somebody's are in the way, one after the other: the slowest of that client, or of the one
    /// that holds most bytes. Where nobody can be dropped, it waits for those who are quick. Safe to cancel.
    pub(crate) async fn drop_while(&self, in_the_way: impl Fn() -> Option<Whose>) {
        loop {
            let released = self.released.notified();
            let Some(whose) = in_the_way() else { return };
            let next = self.lock().drop_slowest(whose, Instant::now());
            match next {
                Victim::Dropped => {
                    self.metrics.count_dropped(Dropped::Memory);
                    released.await;
                }
                Victim::NobodyFor(wait) => {
                    let _ = tokio::time::timeout(wait, released).await;
                }
            }
        }
    }

    /// Drops the connections of clients that take less than the least rate, again and again.
    pub(crate) async fn drop_too_slow(self: Arc<Self>) {
        if self.min_rate == 0 {
            return;
        }
        loop {
            tokio::time::sleep(self.window / 4).await;
            self.drop_too_slow_at(Instant::now());
        }
    }

    fn drop_too_slow_at(&self, now: Instant) {
        let mut answers = self.lock();
        let late: Vec<_> = answers
            .standing()
            .filter(|it| it.is_too_slow(self.min_rate, now))
            .map(Arc::clone)
            .collect();
        for answer in late {
            // One connection may have many of them.
            if answers.end(&answer.connection) {
                self.metrics.count_dropped(Dropped::Rate);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Answers> {
        // Nothing under the lock can panic half-way, so a poisoned one is sound.
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The client whose connection is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Whose {
    /// The one that holds most bytes.
    Most,
    /// This one.
    Of(PeerKey),
}

/// The outcome of looking for somebody to drop.
enum Victim {
    Dropped,
    /// Nobody is slow before this time has passed.
    NobodyFor(Duration),
}

impl Answers {
    fn insert(&mut self, answer: Arc<HeldAnswer>) -> u64 {
        let of_client = self.by_client.entry(answer.client).or_default();
        *of_client.connections.entry(answer.connection.clone()).or_default() += 1;
        of_client.standing += 1;
        self.standing += 1;
        let number = self.next;
        self.next += 1;
        self.by_number.insert(number, answer);
        number
    }

    fn remove(&mut self, number: u64) {
        let Some(answer) = self.by_number.remove(&number) else { return };
        let Some(of_client) = self.by_client.get_mut(&answer.client) else { return };
        // A connection that was dropped isn't there any more.
        let Some(count) = of_client.connections.get_mut(&answer.connection) else { return };
        *count -= 1;
        if *count == 0 {
            of_client.connections.remove(&answer.connection);
        }
        of_client.standing -= 1;
        self.standing -= 1;
        if of_client.standing == 0 {
            self.by_client.remove(&answer.client);
        }
    }

    /// The answers whose connections go on.
    fn standing(&self) -> impl Iterator<Item = &Arc<HeldAnswer>> {
        let goes_on = |it: &HeldAnswer| {
            let of_client = self.by_client.get(&it.client);
            of_client.is_some_and(|all| all.connections.contains_key(&it.connection))
        };
        self.by_number.values().filter(move |it| goes_on(it))
    }

    /// Drops the connection with the most answers of the client with the most answers.
    fn drop_most_answers(&mut self) {
        let of_client = self.by_client.values().max_by_key(|it| it.standing);
        let connections = of_client.into_iter().flat_map(|it| &it.connections);
        let chosen = connections.max_by_key(|(_, count)| **count).map(|(it, _)| it.clone());
        if let Some(chosen) = chosen {
            self.end(&chosen);
        }
    }

    /// Drops a client's slowest connection. Where it is known that there is none, no answer is looked at: many fetches wait, and
    /// look again whenever memory is released.
    fn drop_slowest(&mut self, whose: Whose, now: Instant) -> Victim {
        let nobody_before = match whose {
            Whose::Most => self.nobody_before,
            Whose::Of(client) => match self.by_client.get(&client) {
                Some(of_client) => of_client.nobody_before,
                None => return Victim::NobodyFor(LOOK_AGAIN),
            },
        };
        if let Some(time) = nobody_before
            && now < time
        {
            return Victim::NobodyFor(time - now);
        }
        match self.slowest(whose, now) {
            Ok(connection) => {
                self.end(&connection);
                Victim::Dropped
            }
            Err(None) => Victim::NobodyFor(LOOK_AGAIN),
            Err(Some(wait)) => {
                // Later answers become slow later.
                let time = Some(now + wait);
                match whose {
                    Whose::Most => self.nobody_before = time,
                    Whose::Of(client) => {
                        self.by_client.entry(client).and_modify(|it| it.nobody_before = time);
                    }
                }
                Victim::NobodyFor(wait)
            }
        }
    }

    /// The slowest connection of a client, or the time until one is slow.
    fn slowest(&self, whose: Whose, now: Instant) -> Result<ConnectionEnd, Option<Duration>> {
        let age = |it: &HeldAnswer| now.saturating_duration_since(it.began);
        let meant = || {
            self.standing().filter(|it| match whose {
                Whose::Most => true,
                Whose::Of(client) => it.client == client,
            })
        };
        let slow = meant().filter(|it| age(it) >= GRACE);
        let Some(client) = most(slow.map(|it| (it.client, it.left()))) else {
            return Err(meant().map(|it| GRACE.saturating_sub(age(it))).min());
        };
        let of_client = self.standing().filter(|it| it.client == client && age(it) >= GRACE);
        let slowest = of_client.min_by(|a, b| a.rate(now).total_cmp(&b.rate(now)));
        slowest.map(|it| it.connection.clone()).ok_or(None)
    }

    /// Ends a connection, unless it was ended before. A proxy's may carry the answers of several clients.
    fn end(&mut self, connection: &ConnectionEnd) -> bool {
        let mut is_new = false;
        for of_client in self.by_client.values_mut() {
            let Some(count) = of_client.connections.remove(connection) else { continue };
            of_client.standing -= count;
            self.standing -= count;
            is_new = true;
        }
        self.by_client.retain(|_, it| it.standing > 0);
        connection.end();
        is_new
    }
}

/// Returns the client with the largest sum.
fn most(amounts: impl Iterator<Item = (PeerKey, u64)>) -> Option<PeerKey> {
    let mut sums = HashMap::<PeerKey, u64>::new();
    for (client, amount) in amounts {
        *sums.entry(client).or_default() += amount;
    }
    sums.into_iter().max_by_key(|(_, sum)| *sum).map(|(client, _)| client)
}

impl HeldAnswer {
    fn left(&self) -> u64 {
        self.bytes.saturating_sub(self.taken.load(Ordering::Relaxed))
    }

    /// Bytes a second.
    #[expect(clippy::cast_precision_loss, reason = "rates are compared, not counted")]
    fn rate(&self, now: Instant) -> f64 {
        let seconds = now.saturating_duration_since(self.began).as_secs_f64().max(0.001);
        self.taken.load(Ordering::Relaxed) as f64 / seconds
    }

    /// True once in each window in which the client took too little.
    fn is_too_slow(&self, min_rate: u64, now: Instant) -> bool {
        let mut pace = self.pace.lock().unwrap_or_else(PoisonError::into_inner);
        let passed = now.saturating_duration_since(pace.since);
        if passed < pace.window {
            return false;
        }
        let taken = self.taken.load(Ordering::Relaxed);
        let in_window = taken - std::mem::replace(&mut pace.taken, taken);
        pace.since = now;
        u128::from(in_window) * 1000 < u128::from(min_rate) * passed.as_millis()
    }
}

impl Held {
    /// Notes that the client took some bytes.
    pub(crate) fn note_taken(&self, bytes: u64) {
        let before = self.answer.taken.fetch_add(bytes, Ordering::Relaxed);
        let fewer = bytes.min(self.answer.bytes.saturating_sub(before));
        self.answer.left_of_client.fetch_sub(fewer, Ordering::Relaxed);
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.answer.left_of_client.fetch_sub(self.answer.left(), Ordering::Relaxed);
        self.holders.lock().remove(self.number);
        self.holders.released.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::atomic::AtomicBool;

    use futures_util::FutureExt;

    use super::*;

    const RATE: u64 = 1024;
    const WINDOW: Duration = Duration::from_mins(1);

    fn client(last: u8) -> PeerKey {
        PeerKey::V4(Ipv4Addr::new(127, 0, 0, last))
    }

    fn holders(most: usize) -> Arc<Holders> {
        Arc::new(Holders::new(most, RATE, WINDOW, Arc::new(Metrics::new())))
    }

    fn is_ended(connection: &ConnectionEnd) -> bool {
        connection.ended().now_or_never().is_some()
    }

    /// Makes an answer older.
    fn after(seconds: u64) -> Instant {
        Instant::now() + Duration::from_secs(seconds)
    }

    #[test]
    fn one_answer_too_many_ends_the_connection_with_most_of_the_client_with_most() {
        let holders = holders(6);
        let connections: Vec<_> = (0..4).map(|_| ConnectionEnd::default()).collect();
        let add =
            |who, connection: usize| holders.add(client(who), &connections[connection], 10, 0);
        // One client has four over two connections, another has three of which two are on one.
        let _held = [add(1, 0), add(1, 1), add(1, 1), add(1, 1), add(2, 2), add(2, 2)];
        assert!(!connections.iter().any(is_ended));
        let _newcomer = add(3, 3);
        let ended: Vec<_> = connections.iter().map(is_ended).collect();
        assert_eq!(ended, [false, true, false, false]);
        // What is about to go doesn't count.
        let _next = add(3, 3);
        assert!(!connections.iter().any(is_ended));
    }

    #[test]
    fn the_slowest_of_the_client_that_holds_most_bytes_is_dropped() {
        let holders = holders(100);
        let connections: Vec<_> = (0..3).map(|_| ConnectionEnd::default()).collect();
        let fast = holders.add(client(1), &connections[0], 10_000, 0);
        let _slow = holders.add(client(1), &connections[1], 10_000, 0);
        let _other = holders.add(client(2), &connections[2], 9_000, 0);
        fast.note_taken(5_000);
        assert!(matches!(
            holders.lock().drop_slowest(Whose::Most, Instant::now()),
            Victim::NobodyFor(_)
        ));
        for expected in [[false, true, false], [false, false, true], [true, false, false]] {
            assert!(matches!(holders.lock().drop_slowest(Whose::Most, after(2)), Victim::Dropped));
            let ended: Vec<_> = connections.iter().map(is_ended).collect();
            assert_eq!(ended, expected);
        }
        assert!(matches!(holders.lock().drop_slowest(Whose::Most, after(2)), Victim::NobodyFor(_)));
    }

    #[test]
    fn a_client_over_its_share_loses_its_own_slowest_connection() {
        let holders = holders(100);
        let connections: Vec<_> = (0..3).map(|_| ConnectionEnd::default()).collect();
        let _most = holders.add(client(1), &connections[0], 10_000, 0);
        let slow = holders.add(client(2), &connections[1], 100, 0);
        let fast = holders.add(client(2), &connections[2], 100, 0);
        slow.note_taken(10);
        fast.note_taken(90);
        assert_eq!(holders.held_by(client(2)), 100);
        let dropped = holders.lock().drop_slowest(Whose::Of(client(2)), after(2));
        assert!(matches!(dropped, Victim::Dropped));
        let ended: Vec<_> = connections.iter().map(is_ended).collect();
        assert_eq!(ended, [false, true, false]);
        drop(slow);
        assert_eq!(holders.held_by(client(2)), 10);
        // More than there is counts as all of it.
        fast.note_taken(20);
        assert_eq!(holders.held_by(client(2)), 0);
        drop(fast);
        assert_eq!(holders.held_by(client(2)), 0);
    }

    #[test]
    fn a_client_has_to_take_the_least_rate_in_each_window() {
        let holders = holders(100);
        let connections: Vec<_> = (0..3).map(|_| ConnectionEnd::default()).collect();
        let steady = holders.add(client(1), &connections[0], 1 << 30, 0);
        let first_only = holders.add(client(1), &connections[1], 1 << 30, 0);
        // Its pieces are so large that one takes four minutes at the least rate.
        let _in_pieces = holders.add(client(1), &connections[2], 1 << 30, 240 * RATE);
        first_only.note_taken(1 << 20);
        steady.note_taken(1 << 20);
        holders.drop_too_slow_at(after(61));
        steady.note_taken(61 * RATE);
        holders.drop_too_slow_at(after(121));
        let ended: Vec<_> = connections.iter().map(is_ended).collect();
        assert_eq!(ended, [false, true, false]);
        holders.drop_too_slow_at(after(242));
        assert!(is_ended(&connections[2]));
    }

    #[tokio::test]
    async fn room_is_made_as_soon_as_an_answer_is_gone() {
        let holders = holders(100);
        holders.drop_while(|| None).await;
        let connection = ConnectionEnd::default();
        let held = holders.add(client(1), &connection, 10, 0);
        let gone = Arc::new(AtomicBool::new(false));
        tokio::spawn({
            let gone = Arc::clone(&gone);
            async move {
                tokio::task::yield_now().await;
                gone.store(true, Ordering::Relaxed);
                drop(held);
            }
        });
        let in_the_way = || (!gone.load(Ordering::Relaxed)).then_some(Whose::Most);
        holders.drop_while(in_the_way).await;
    }
}
