//! The index: what the store is known to hold, while the store would report a change of it.
//!
//! This is the heart of the promise that a hit asks nobody and that nothing replaced is served. One lock
//! holds three things together: the state of coherence, an entry for each known key, and the fetches under
//! way.
//!
//! # The race that the guard is for
//!
//! A push comes over the tracking connection, a reply over another. Nothing orders the two:
//!
//! ```text
//!             data connection            Redis             tracking connection
//!   fetch  ── GET a ───────────────────▶ a = old
//!                                        SET a new
//!             (reply "old", a megabyte,  ├───────────────▶ push: a changed
//!              on its way)               │                 entry of a dropped: there is none
//!   fetch  ◀─ "old" ─────────────────────┘
//!   keeps "old" as current: no further push will come, and it is stale for ever
//! ```
//!
//! So a fetch is registered *before* its GET is sent. A push for its key, under the same lock that a fetch
//! needs to keep its outcome, makes the fetch invalidate and detaches it:
//!
//! ```text
//!   request 1   registers the fetch ── GET a ──▶                ◀── "old": answers 1, is not kept
//!   push                                        a: invalidate, detached
//!   request 2                                     registers a new fetch ── GET a ──▶ ◀── "new": is kept
//! ```
//!
//! Request 1 began before the push, so "old" was a true answer to it. Request 2 began after the push and
//! never joins a fetch from before. If the push comes after the outcome was kept, it drops the entry. There
//! is no third order, since both take the lock.
//!
//! Over two connections the GET of request 1 may also be executed last, and bring something newer than request 2 gets. So a
//! result that isn't kept still ends what is known, if that differs, and invalidates a fetch that was sent: no request is
//! answered with what another one has seen replaced.
//!
//! # Epochs
//!
//! Whatever makes everything known doubtful at once (the tracking connection is lost, is made anew, or
//! says that all keys are gone) begins an epoch. An entry is current only in the epoch that its fetch began
//! in, so neither an entry nor a fetch from before can ever count as current again:
//!
//! ```text
//!   coherent, epoch 4 │ lost │ unverified, epoch 5            │ tracked │ coherent, epoch 6
//!   a: current        │      │ a: asked each time             │         │ a: asked once, then current
//!   fetch of b ───────┼──────┼───▶ answers, is not kept       │         │
//!                     │      │ fetch of c ────────────────────┼─────────┼──▶ answers, is not kept
//! ```
//!
//! The last line matters: the GET of `c` may have been answered before tracking began, and a change between
//! the two was told to nobody.

use std::collections::{HashMap, VecDeque};
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use lru::LruCache;
use tokio::sync::futures::OwnedNotified;
use tokio::sync::{Notify, watch};

use crate::clock::{BootInstant, Clock};
use crate::coalesce::{Completion, Flight};
use crate::image::record::Corrupt;
use crate::image::{ImageId, Metadata, Version};
use crate::offload::RemoteImage;
use crate::store::{Change, Coherence, Lease};

mod rules;

#[cfg(test)]
mod explore;
#[cfg(test)]
mod tests;

pub use rules::{Rule, Rules};

/// Most ended epochs that are remembered.
const MAX_ENDED: usize = 64;

/// The known content of a key.
#[derive(Debug, Clone)]
pub enum Known {
    /// An image.
    Present(Arc<Metadata>),
    /// No value.
    Absent,
    /// A value that is no image. Reading it again wouldn't make it one.
    Corrupt(Corrupt),
    /// A record with the address of the image.
    Offloaded(Arc<RemoteImage>),
}

impl Known {
    /// The version of the image, if there is one.
    #[must_use]
    pub fn version(&self) -> Option<Version> {
        match self {
            Known::Present(metadata) => Some(metadata.version),
            Known::Offloaded(remote) => Some(remote.version),
            Known::Absent | Known::Corrupt(_) => None,
        }
    }
}

/// A hash of a value that is faster than its version. It recognises a value that was only written again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Digest(u128);

impl Digest {
    /// The XXH3-128 of a value: a thirtieth of the time of its MD5.
    #[must_use]
    pub fn of(value: &[u8]) -> Digest {
        Digest(xxhash_rust::xxh3::xxh3_128(value))
    }
}

/// The result of a fetch.
#[derive(Debug)]
pub struct FetchResult {
    /// The content of the key.
    pub known: Known,
    /// The digest of the value, if there is one.
    pub digest: Option<Digest>,
    /// The expiry of the value; `None` if it never expires.
    pub expires: Option<BootInstant>,
}

/// The answer of the index to a request.
#[derive(Debug)]
pub enum Lookup<T> {
    /// The store holds this now.
    Current(Known),
    /// The store can't be reached. It held this the last time that was certain, not too long ago.
    Stale(LastKnown),
    /// The store has to be asked.
    Ask(Admission<T>),
}

/// A version that may be out of date.
#[derive(Debug, Clone)]
pub struct LastKnown {
    /// The image.
    pub known: Known,
    /// Time since it was last certain to be current.
    pub age: Duration,
}

/// The way in which a request may ask the store.
#[derive(Debug)]
pub enum Admission<T> {
    /// Join a fetch that is under way: its outcome is a true answer.
    Join(Arc<Flight<T>>),
    /// Lead a fetch, and bring the outcome to those who join.
    Lead(FetchLease<T>),
    /// Neither: too many requests wait for the fetch, or too many fetches are under way.
    Full,
}

/// The right and the duty to fetch a key. Dropped without [`FetchLease::keep`], it leaves nothing behind.
#[derive(Debug)]
pub struct FetchLease<T> {
    index: Arc<Index<T>>,
    id: ImageId,
    flight: Arc<Flight<T>>,
    completion: Option<Completion<T>>,
    /// The fetch before, whose GET was sent already. This one waits for it, so that there are never more
    /// than two.
    before: Option<Arc<Flight<T>>>,
    epoch: u64,
    began: BootInstant,
}

/// A claim of the index that a key has this content now.
#[derive(Debug)]
pub struct Claim {
    /// The key.
    pub id: ImageId,
    /// Its content.
    pub content: ClaimedContent,
    fetched: BootInstant,
}

/// The content that the index claims a key to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClaimedContent {
    /// No value.
    Absent,
    /// A value that the store doesn't hand out: of another type than a string, or too large.
    Unreadable,
    /// A value with this digest.
    Value(Digest),
}

/// The limits of an index.
#[derive(Debug, Clone, Copy)]
pub struct IndexLimits {
    /// Most known keys with a value.
    pub entries: NonZeroUsize,
    /// Most keys that are known to be absent. Anybody can ask for those, so they have a bound of their own.
    pub absent: NonZeroUsize,
    /// Most requests that wait for one fetch.
    pub waiters: usize,
    /// Most fetches under way. They go on when their requests have left.
    pub fetches: usize,
    /// Longest time that a version is served after it was last certain to be current.
    pub serve_stale_for: Duration,
}

/// The known keys and the fetches under way.
#[derive(Debug)]
pub struct Index<T> {
    state: Mutex<State<T>>,
    serve_stale_for: Duration,
    /// Most requests that wait for one fetch.
    waiters: AtomicUsize,
    /// Most fetches under way.
    fetches: AtomicUsize,
    clock: Clock,
    unreachable: watch::Sender<bool>,
    /// Notified when a lease is renewed or the state of coherence changes.
    renewed: Arc<Notify>,
}

#[derive(Debug)]
struct State<T> {
    rules: Rules,
    /// Set once the store has been reached, or found out of reach.
    has_heard: bool,
    coherence: Coherence,
    /// Time at which that state began.
    since: BootInstant,
    /// The end of the time in which coherence may be relied upon without a new heartbeat. A process that was
    /// frozen wakes up with pushes that it has not read; the heartbeat that renews the lease lies behind them.
    lease: Lease,
    epoch: u64,
    /// The newest tracking connection that is known to be lost. A connection that is lost before it was
    /// announced must not make anything coherent afterwards.
    lost: u64,
    /// The tracking connection that made the store coherent last. The loss of an older one means nothing.
    tracked: u64,
    /// The keys with a value.
    entries: LruCache<ImageId, Entry>,
    /// The keys without. A key is in one of the two at most.
    absent: LruCache<ImageId, Entry>,
    /// The fetches that can be joined, all of the present epoch.
    flights: HashMap<ImageId, Arc<Flight<T>>>,
    /// Set once something was kept in the present epoch.
    has_kept: bool,
    /// Coherent epochs that have ended, with the last moment in which they were certain.
    ended: VecDeque<(u64, BootInstant)>,
}

#[derive(Debug)]
struct Entry {
    known: Known,
    digest: Option<Digest>,
    expires: Option<BootInstant>,
    epoch: u64,
    /// The beginning of the fetch that found it.
    fetched: BootInstant,
    /// The store has reported a change since: this content is known to be gone.
    replaced: bool,
    /// Time of the last push that named the key while it was known.
    pushed: Option<BootInstant>,
}

/// All that is known of a key, for people who look for a fault.
#[derive(Debug, Clone)]
pub struct Inspection {
    /// Its content, if any is known.
    pub entry: Option<InspectedEntry>,
    /// The present epoch.
    pub epoch: u64,
    /// True if a fetch is under way that requests can join.
    pub is_being_fetched: bool,
}

/// The known content of a key, and the reasons for which it is current or not.
#[derive(Debug, Clone)]
pub struct InspectedEntry {
    /// The content.
    pub known: Known,
    /// True if it is current.
    pub is_current: bool,
    /// True if a push has named the key since.
    pub is_replaced: bool,
    /// The epoch that it was fetched in.
    pub epoch: u64,
    /// Time since it was fetched.
    pub age: Duration,
    /// Time until it expires; `None` if it never does.
    pub time_to_live: Option<Duration>,
    /// Time since the last push that named the key.
    pub since_push: Option<Duration>,
}

impl<T: Clone> Index<T> {
    /// An index that knows nothing and relies on nobody.
    #[must_use]
    pub fn new(limits: IndexLimits) -> Index<T> {
        Index::with_rules(limits, Rules::default(), Clock::default())
    }

    #[doc(hidden)]
    #[must_use]
    pub fn with_rules(limits: IndexLimits, rules: Rules, clock: Clock) -> Index<T> {
        // Unbounded and then resized, since `LruCache::new` allocates for its whole capacity at once.
        let (mut entries, mut absent) = (LruCache::unbounded(), LruCache::unbounded());
        entries.resize(limits.entries);
        absent.resize(limits.absent);
        let (unreachable, _) = watch::channel(false);
        let state = State {
            rules,
            has_heard: false,
            coherence: Coherence::Unverified("the store has not been reached yet".into()),
            since: clock.now(),
            lease: Lease::Endless,
            epoch: 0,
            lost: 0,
            tracked: 0,
            entries,
            absent,
            flights: HashMap::new(),
            has_kept: false,
            ended: VecDeque::new(),
        };
        let (state, renewed) = (Mutex::new(state), Arc::default());
        let [waiters, fetches] = [limits.waiters, limits.fetches].map(AtomicUsize::new);
        let serve_stale_for = limits.serve_stale_for;
        Index { state, serve_stale_for, waiters, fetches, clock, unreachable, renewed }
    }

    /// Returns whether the store has been reached, or found out of reach, since the start.
    pub(crate) fn has_heard_of_store(&self) -> bool {
        self.lock().has_heard
    }

    /// Changes how many requests may wait for one fetch, and how many fetches may be under way.
    pub(crate) fn resize(&self, waiters: usize, fetches: usize) {
        self.waiters.store(waiters, Ordering::Relaxed);
        self.fetches.store(fetches, Ordering::Relaxed);
    }

    /// The clock that leases and expiries are read on.
    #[must_use]
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// Looks up an image, or admits the request to a fetch of it. An error if the lease is over: the next heartbeat renews
    /// it or fails, so look again after it.
    pub fn look_up(self: &Arc<Self>, id: &ImageId) -> Result<Lookup<T>, OwnedNotified> {
        let now = self.clock.now();
        let mut state = self.lock();
        let state = &mut *state;
        if state.coherence == Coherence::Coherent && !state.is_coherent_at(now) {
            return Err(Arc::clone(&self.renewed).notified_owned());
        }
        if let Some(entry) = state.entries.get(id).or_else(|| state.absent.get(id)) {
            match &state.coherence {
                Coherence::Coherent if entry.is_current_at(state.epoch, now) => {
                    return Ok(Lookup::Current(entry.known.clone()));
                }
                Coherence::Unreachable(_) => {
                    let stale_for = self.serve_stale_for;
                    if let Some(known) = entry.last_known(&state.ended, stale_for, now) {
                        return Ok(Lookup::Stale(known));
                    }
                }
                Coherence::Coherent | Coherence::Unverified(_) => {}
            }
        }
        Ok(Lookup::Ask(self.board(state, id, now)))
    }

    /// The current image under an id, if it is known, and the id as it is kept.
    pub fn current(&self, id: &str) -> Option<(ImageId, Arc<Metadata>)> {
        let now = self.clock.now();
        let mut state = self.lock();
        let state = &mut *state;
        let coherent = state.is_coherent_at(now);
        let (id, entry) = state.entries.get_key_value(id)?;
        match &entry.known {
            Known::Present(metadata) if coherent && entry.is_current_at(state.epoch, now) => {
                Some((id.clone(), Arc::clone(metadata)))
            }
            _ => None,
        }
    }

    /// Admits a request to a fetch, for bytes that have left memory.
    pub fn ask(self: &Arc<Self>, id: &ImageId) -> Admission<T> {
        let now = self.clock.now();
        self.board(&mut self.lock(), id, now)
    }

    /// The last known version of an image whose fetch has failed, if that isn't too long ago.
    pub fn last_known(&self, id: &ImageId) -> Option<LastKnown> {
        let state = self.lock();
        let (entry, stale_for) = (state.entries.peek(id)?, self.serve_stale_for);
        entry.last_known(&state.ended, stale_for, self.clock.now())
    }

    /// Time until a version of an image expires, if it is the last known one and does.
    pub fn time_to_live(&self, id: &ImageId, version: Version) -> Option<Duration> {
        let state = self.lock();
        let entry = state.entries.peek(id)?;
        let expires = entry.expires.filter(|_| entry.known.version() == Some(version));
        expires.map(|expires| expires.since(self.clock.now()))
    }

    /// True if [`Index::recognise`] could recognise a value of this key.
    pub fn has_seen(&self, id: &ImageId) -> bool {
        self.lock().entries.peek(id).is_some_and(|entry| entry.digest.is_some())
    }

    /// The metadata of the image that was last seen under a key, if its value had this digest. The key may
    /// have another value by now; the metadata of this value never changes.
    pub fn recognise(&self, id: &ImageId, digest: Digest) -> Option<Arc<Metadata>> {
        let state = self.lock();
        let entry = state.entries.peek(id)?;
        match &entry.known {
            Known::Present(metadata) if entry.digest == Some(digest) => Some(Arc::clone(metadata)),
            _ => None,
        }
    }

    /// Applies a change that the store reports.
    pub fn apply(&self, change: Change) {
        let renews = !matches!(change, Change::Invalidated(_) | Change::Flushed);
        let mut state = self.lock();
        let rules = state.rules;
        match change {
            Change::Invalidated(id) => {
                let now = self.clock.now();
                if let Some(entry) = state.peek_mut(&id) {
                    entry.replaced |= rules.hold(Rule::PushReplacesEntry);
                    entry.pushed = Some(now);
                }
                if rules.hold(Rule::PushInvalidatesFetch)
                    && let Some(flight) = state.flights.remove(&id)
                {
                    flight.invalidate();
                }
            }
            Change::Flushed => {
                if rules.hold(Rule::FlushForgets) {
                    state.entries.clear();
                    state.absent.clear();
                }
                state.begin_epoch();
            }
            Change::TrackingStarted { connection, lease } => {
                if connection > state.lost || !rules.hold(Rule::LostBeforeAnnounced) {
                    state.has_heard = true;
                    state.tracked = connection;
                    state.lease = lease;
                    state.set_coherence(Coherence::Coherent, self.clock.now());
                    state.begin_epoch();
                }
            }
            Change::Heartbeat { connection, lease, .. } | Change::Awake { connection, lease } => {
                if connection == state.tracked {
                    state.lease = lease;
                }
            }
            Change::TrackingLost { connection, last_heard, coherence } => {
                state.lost = state.lost.max(connection);
                if connection < state.tracked {
                    return;
                }
                if state.coherence == Coherence::Coherent {
                    // An epoch that nothing was kept in leaves nothing whose age it could tell.
                    if state.has_kept {
                        let ended = (state.epoch, last_heard);
                        state.ended.push_back(ended);
                    }
                    let (now, limit) = (self.clock.now(), self.serve_stale_for);
                    state.ended.retain(|(_, end)| now.since(*end) < limit);
                    // A connection that comes and goes must not make this long. Entries of a dropped epoch
                    // count as certain only up to their fetch.
                    if state.ended.len() > MAX_ENDED {
                        state.ended.pop_front();
                    }
                    state.begin_epoch();
                }
                state.set_coherence(coherence, self.clock.now());
            }
            Change::Probed(coherence) => {
                state.has_heard = true;
                if state.coherence != Coherence::Coherent {
                    state.set_coherence(coherence, self.clock.now());
                }
            }
        }
        // Under the lock, so that two changes leave the state of the later one.
        let unreachable = matches!(state.coherence, Coherence::Unreachable(_));
        self.unreachable.send_if_modified(|it| std::mem::replace(it, unreachable) != unreachable);
        drop(state);
        if renews {
            self.renewed.notify_waiters();
        }
    }

    /// Some of the entries that claim to be current: of those that were asked for last, and of those that are oldest.
    pub fn sample(&self, count: usize) -> Vec<Claim> {
        /// Entries that are looked at from either end. The lock is held meanwhile.
        const WINDOW: usize = 1000;
        let now = self.clock.now();
        let state = self.lock();
        if !state.is_coherent_at(now) {
            return Vec::new();
        }
        let ends = |entries| {
            let entries: &LruCache<_, _> = entries;
            let oldest = entries.iter().rev().take(entries.len().saturating_sub(WINDOW));
            entries.iter().take(WINDOW).chain(oldest.take(WINDOW))
        };
        let current = ends(&state.entries)
            .chain(ends(&state.absent))
            .filter(|(_, entry)| entry.is_current_at(state.epoch, now));
        let claim = |(id, entry): (&ImageId, &Entry)| Claim {
            id: id.clone(),
            content: match (&entry.known, entry.digest) {
                (_, Some(digest)) => ClaimedContent::Value(digest),
                (Known::Absent, None) => ClaimedContent::Absent,
                (_, None) => ClaimedContent::Unreadable,
            },
            fetched: entry.fetched,
        };
        fastrand::choose_multiple(current.map(claim), count)
    }

    /// True if the index still makes a claim.
    pub fn still_claims(&self, claim: &Claim) -> bool {
        let now = self.clock.now();
        let state = self.lock();
        state.is_coherent_at(now)
            && state.peek(&claim.id).is_some_and(|entry| {
                entry.fetched == claim.fetched && entry.is_current_at(state.epoch, now)
            })
    }

    /// Waits until the store is known to be unreachable.
    pub async fn until_unreachable(&self) {
        // The sender lives as long as this index.
        let _ = self.unreachable.subscribe().wait_for(|unreachable| *unreachable).await;
    }

    /// The state of coherence.
    pub fn coherence(&self) -> Coherence {
        let state = self.lock();
        if state.coherence == Coherence::Coherent && !state.is_coherent_at(self.clock.now()) {
            return Coherence::Unverified("waiting for the next heartbeat".into());
        }
        state.coherence.clone()
    }

    /// Time since the state of coherence began.
    pub fn coherence_age(&self) -> Duration {
        self.clock.elapsed(self.lock().since)
    }

    /// The current content of some keys, `None` for those that the store would have to be asked for. Counts as no use.
    pub fn peek(&self, ids: &[ImageId]) -> Vec<Option<Known>> {
        let now = self.clock.now();
        let state = self.lock();
        let is_coherent = state.is_coherent_at(now);
        let current = |id| {
            let entry = state.peek(id)?;
            (is_coherent && entry.is_current_at(state.epoch, now)).then(|| entry.known.clone())
        };
        ids.iter().map(current).collect()
    }

    /// All that is known of a key. Counts as no use.
    pub fn inspect(&self, id: &ImageId) -> Inspection {
        let now = self.clock.now();
        let state = self.lock();
        let is_coherent = state.is_coherent_at(now);
        let entry = state.peek(id).map(|entry| InspectedEntry {
            known: entry.known.clone(),
            is_current: is_coherent && entry.is_current_at(state.epoch, now),
            is_replaced: entry.replaced,
            epoch: entry.epoch,
            age: now.since(entry.fetched),
            time_to_live: entry.expires.map(|expires| expires.since(now)),
            since_push: entry.pushed.map(|pushed| now.since(pushed)),
        });
        let is_being_fetched = state.flights.contains_key(id);
        Inspection { entry, epoch: state.epoch, is_being_fetched }
    }

    /// True if an image is known that may be served while the store can't be reached, among those that were asked for last.
    pub fn can_serve_in_an_outage(&self) -> bool {
        /// Entries that are looked at. The lock is held meanwhile.
        const WINDOW: usize = 1000;
        let (now, stale_for) = (self.clock.now(), self.serve_stale_for);
        let state = self.lock();
        let mut newest = state.entries.iter().take(WINDOW);
        newest.any(|(_, entry)| entry.last_known(&state.ended, stale_for, now).is_some())
    }

    /// The number of known keys.
    pub fn len(&self) -> usize {
        let state = self.lock();
        state.entries.len() + state.absent.len()
    }

    /// True if no key is known.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Joins the fetch under way, or registers one.
    ///
    /// While coherent, a fetch that a request finds here is one that no change has invalidated. Otherwise only a
    /// fetch that has not been sent will see every write that was acknowledged before the request began; so at
    /// most one fetch is under way and one is waiting for it.
    fn board(
        self: &Arc<Self>,
        state: &mut State<T>,
        id: &ImageId,
        now: BootInstant,
    ) -> Admission<T> {
        let coherent = state.is_coherent_at(now);
        let under_way = state.flights.get(id);
        if let Some(flight) = under_way
            && ((coherent && !flight.is_invalidated())
                || !flight.is_sent()
                || !state.rules.hold(Rule::JoinsUnsentOnly))
        {
            return if flight.holders() > self.waiters.load(Ordering::Relaxed) {
                Admission::Full
            } else {
                Admission::Join(Arc::clone(flight))
            };
        }
        let before = under_way.map(Arc::clone);
        if before.is_none() && state.flights.len() >= self.fetches.load(Ordering::Relaxed) {
            return Admission::Full;
        }
        if let Some(before) = &before
            && state.rules.hold(Rule::SuccessorInvalidates)
        {
            // A push finds only the fetches in `flights`, and this one leaves its place there.
            before.invalidate();
        }
        let (flight, completion) = Flight::new();
        state.flights.insert(id.clone(), Arc::clone(&flight));
        Admission::Lead(FetchLease {
            index: Arc::clone(self),
            id: id.clone(),
            flight,
            completion: Some(completion),
            before,
            epoch: state.epoch,
            began: now,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing under the lock can panic half-way, so a poisoned one is sound.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> State<T> {
    /// True if every change up to `now` has been pushed, or will be before the lease is renewed.
    fn is_coherent_at(&self, now: BootInstant) -> bool {
        self.coherence == Coherence::Coherent
            && match self.lease {
                Lease::Endless => true,
                Lease::Until(end) => now < end || !self.rules.hold(Rule::LeaseEnds),
            }
    }

    fn peek(&self, id: &ImageId) -> Option<&Entry> {
        self.entries.peek(id).or_else(|| self.absent.peek(id))
    }

    fn peek_mut(&mut self, id: &ImageId) -> Option<&mut Entry> {
        self.entries.peek_mut(id).or_else(|| self.absent.peek_mut(id))
    }

    fn set_coherence(&mut self, coherence: Coherence, now: BootInstant) {
        if coherence.name() != self.coherence.name() {
            self.since = now;
        }
        self.coherence = coherence;
    }

    /// Begins an epoch: nothing known before is current any more, and no fetch begun before can be joined or kept.
    fn begin_epoch(&mut self) {
        self.epoch += u64::from(self.rules.hold(Rule::EpochBegins));
        self.has_kept = false;
        if self.rules.hold(Rule::EpochDetachesFetches) {
            self.flights.clear();
        }
    }
}

impl Entry {
    fn is_current_at(&self, epoch: u64, now: BootInstant) -> bool {
        self.epoch == epoch && !self.replaced && self.expires.is_none_or(|expires| now < expires)
    }

    /// The image, unless it is known to be gone, or was last certain too long ago: at its fetch, or at the end
    /// of the coherent epoch that it was fetched in.
    fn last_known(
        &self,
        ended: &VecDeque<(u64, BootInstant)>,
        serve_stale_for: Duration,
        now: BootInstant,
    ) -> Option<LastKnown> {
        let end = ended.iter().find(|(epoch, _)| *epoch == self.epoch).map(|(_, end)| *end);
        let certain = end.map_or(self.fetched, |end| end.max(self.fetched));
        let age = now.since(certain);
        let has_expired = self.expires.is_some_and(|expires| now >= expires);
        let is_image = self.known.version().is_some();
        let may_be_sent = is_image && !self.replaced && !has_expired && age < serve_stale_for;
        may_be_sent.then(|| LastKnown { known: self.known.clone(), age })
    }
}

impl<T: Clone> FetchLease<T> {
    /// The image to fetch.
    #[must_use]
    pub fn id(&self) -> &ImageId {
        &self.id
    }

    /// The flight that this lease leads.
    #[must_use]
    pub fn flight(&self) -> Arc<Flight<T>> {
        Arc::clone(&self.flight)
    }

    /// Waits for the fetch before, then marks this one as sent: the store may be asked from now on.
    pub async fn mark_sent(&mut self) {
        if let Some(before) = self.before.take() {
            // Its outcome doesn't matter here.
            let _ = before.outcome().await;
        }
        // Under the lock, so that every request that joins does so before the store is asked.
        let state = self.index.lock();
        self.flight.mark_sent();
        drop(state);
        self.began = self.index.clock.now();
    }

    /// Keeps the result, unless a change has overtaken it. Gives the version that it replaces here.
    pub fn keep(&mut self, found: FetchResult) -> Option<Version> {
        let mut state = self.index.lock();
        let rules = state.rules;
        if !rules.hold(Rule::ResultOfItsEpoch) {
            self.epoch = state.epoch;
        }
        if !rules.hold(Rule::AgeFromQuestion) {
            self.began = self.index.clock.now();
        }
        let FetchResult { known, digest, expires } = found;
        let expires = expires.filter(|_| rules.hold(Rule::ExpiryEnds));
        let now = known.version();
        if self.flight.is_invalidated() || self.epoch != state.epoch {
            // Those who waited have seen this result, so nobody may be given an older one from now on. Nothing tells which of
            // two results is older: a GET that was sent first may be executed last, over another connection.
            if let Some(entry) = state.peek_mut(&self.id)
                && entry.known.version() != now
            {
                entry.replaced |= rules.hold(Rule::ResultContradictsEntry);
            }
            if let Some(flight) = state.flights.get(&self.id)
                && flight.is_sent()
                && rules.hold(Rule::ResultInvalidatesFetch)
            {
                flight.invalidate();
            }
            return None;
        }
        let entry = Entry {
            known,
            digest,
            expires,
            epoch: self.epoch,
            fetched: self.began,
            replaced: false,
            pushed: state.peek(&self.id).and_then(|before| before.pushed),
        };
        state.has_kept = true;
        let id = self.id.clone();
        let old = if matches!(entry.known, Known::Absent) {
            let old = state.entries.pop(&id);
            state.absent.put(id, entry).or(old)
        } else {
            state.absent.pop(&id);
            state.entries.put(id, entry)
        };
        old?.known.version().filter(|old| now != Some(*old))
    }

    /// Gives the fetch up if nobody waits for it, as when all its requests were reset. From then on nobody can join it.
    pub fn give_up_if_unwanted(&self) -> bool {
        let mut state = self.index.lock();
        let is_listed = state.flights.get(&self.id).is_some_and(|it| Arc::ptr_eq(it, &self.flight));
        // New requests come to it by the list alone, under the lock.
        let waiting = Arc::strong_count(&self.flight) - 1 - usize::from(is_listed);
        if waiting > 0 {
            return false;
        }
        if is_listed {
            state.flights.remove(&self.id);
        }
        true
    }

    /// True if the result isn't kept although its epoch goes on: a push has named the key, or another fetch took this one's
    /// place.
    pub fn is_overtaken(&self) -> bool {
        let state = self.index.lock();
        self.flight.is_invalidated()
            && self.epoch == state.epoch
            && state.coherence == Coherence::Coherent
    }

    /// Brings the outcome to all who wait.
    pub fn complete(mut self, outcome: T) {
        self.leave();
        if let Some(completion) = self.completion.take() {
            completion.complete(outcome);
        }
    }
}

impl<T> FetchLease<T> {
    /// Makes it impossible to join.
    fn leave(&self) {
        let mut state = self.index.state.lock().unwrap_or_else(PoisonError::into_inner);
        let mine = state.flights.get(&self.id).is_some_and(|it| Arc::ptr_eq(it, &self.flight));
        if mine {
            state.flights.remove(&self.id);
        }
    }
}

impl<T> Drop for FetchLease<T> {
    fn drop(&mut self) {
        self.leave();
    }
}
