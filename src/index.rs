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

/// A switch for the guard against the race above.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guard {
    /// Always.
    On,
    /// Only in the tests that show that the checker of coherence notices its absence, and in no release build.
    #[cfg(debug_assertions)]
    Off,
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
    guard: Guard,
    clock: Clock,
    unreachable: watch::Sender<bool>,
    /// Notified when a lease is renewed or the state of coherence changes.
    renewed: Arc<Notify>,
}

#[derive(Debug)]
struct State<T> {
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
        Index::guarded(limits, Guard::On, Clock::default())
    }

    #[doc(hidden)]
    #[must_use]
    pub fn guarded(limits: IndexLimits, guard: Guard, clock: Clock) -> Index<T> {
        // Unbounded and then resized, since `LruCache::new` allocates for its whole capacity at once.
        let (mut entries, mut absent) = (LruCache::unbounded(), LruCache::unbounded());
        entries.resize(limits.entries);
        absent.resize(limits.absent);
        let (unreachable, _) = watch::channel(false);
        let state = State {
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
        Index { state, serve_stale_for, waiters, fetches, guard, clock, unreachable, renewed }
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
        Ok(Lookup::Ask(self.board(state, id)))
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
        self.board(&mut self.lock(), id)
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
        match change {
            Change::Invalidated(id) => {
                let now = self.clock.now();
                if let Some(entry) = state.peek_mut(&id) {
                    entry.replaced = true;
                    entry.pushed = Some(now);
                }
                if self.guard == Guard::On
                    && let Some(flight) = state.flights.remove(&id)
                {
                    flight.invalidate();
                }
            }
            Change::Flushed => {
                state.entries.clear();
                state.absent.clear();
                state.begin_epoch();
            }
            Change::TrackingStarted { connection, lease } => {
                if connection > state.lost {
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
    fn board(self: &Arc<Self>, state: &mut State<T>, id: &ImageId) -> Admission<T> {
        let now = self.clock.now();
        let coherent = state.is_coherent_at(now);
        let under_way = state.flights.get(id);
        if let Some(flight) = under_way
            && (coherent || !flight.is_sent())
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
        if let Some(before) = &before {
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
                Lease::Until(end) => now < end,
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
        self.epoch += 1;
        self.has_kept = false;
        self.flights.clear();
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
        let FetchResult { known, digest, expires } = found;
        let now = known.version();
        if self.flight.is_invalidated() || self.epoch != state.epoch {
            // Not kept, but it shows that an older entry is out of date.
            if let Some(entry) = state.peek_mut(&self.id)
                && entry.fetched < self.began
                && entry.known.version() != now
            {
                entry.replaced = true;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::MediaType;

    type TestIndex = Arc<Index<u32>>;

    fn limits() -> IndexLimits {
        IndexLimits {
            entries: NonZeroUsize::new(3).unwrap(),
            absent: NonZeroUsize::new(2).unwrap(),
            waiters: 2,
            fetches: 1000,
            serve_stale_for: Duration::from_mins(10),
        }
    }

    fn index() -> TestIndex {
        Arc::new(Index::new(limits()))
    }

    fn coherent() -> TestIndex {
        let index = index();
        index.apply(tracked(1));
        index
    }

    fn now() -> BootInstant {
        Clock::default().now()
    }

    fn id(text: &str) -> ImageId {
        ImageId::parse(text).unwrap()
    }

    fn tracked(connection: u64) -> Change {
        Change::TrackingStarted { connection, lease: Lease::Endless }
    }

    fn lost(connection: u64, coherence: Coherence) -> Change {
        Change::TrackingLost { connection, last_heard: now(), coherence }
    }

    fn unverified() -> Coherence {
        Coherence::Unverified("test".into())
    }

    fn unreachable() -> Coherence {
        Coherence::Unreachable("test".into())
    }

    fn present(version: &str) -> FetchResult {
        let metadata = Metadata::new(Version::of(version.as_bytes()), MediaType::Png, 1, None);
        FetchResult {
            known: Known::Present(Arc::new(metadata)),
            digest: Some(Digest::of(version.as_bytes())),
            expires: None,
        }
    }

    fn look_up(index: &TestIndex, name: &str) -> Lookup<u32> {
        index.look_up(&id(name)).expect("the lease holds")
    }

    fn lead(index: &TestIndex, name: &str) -> FetchLease<u32> {
        match look_up(index, name) {
            Lookup::Ask(Admission::Lead(lease)) => lease,
            other => panic!("expected to lead: {other:?}"),
        }
    }

    fn fetch(index: &TestIndex, name: &str, found: FetchResult) {
        let mut lease = lead(index, name);
        lease.keep(found);
        lease.complete(0);
    }

    fn is_current(index: &TestIndex, name: &str, version: &str) -> bool {
        matches!(look_up(index, name), Lookup::Current(Known::Present(metadata))
            if metadata.version == Version::of(version.as_bytes()))
    }

    #[test]
    fn what_was_fetched_while_coherent_is_current() {
        let index = coherent();
        fetch(&index, "a", present("1"));
        assert!(is_current(&index, "a", "1"));
        fetch(&index, "b", FetchResult { known: Known::Absent, digest: None, expires: None });
        assert!(matches!(look_up(&index, "b"), Lookup::Current(Known::Absent)));
    }

    #[tokio::test]
    async fn without_a_sign_of_life_nothing_is_current_until_the_next_one() {
        let index = index();
        let over = Lease::Until(now());
        let later = Lease::Until(now() + Duration::from_mins(1));
        index.apply(Change::TrackingStarted { connection: 1, lease: later });
        fetch(&index, "a", present("1"));
        assert!(is_current(&index, "a", "1"));
        index.apply(Change::Heartbeat { connection: 1, lease: over, round_trip: Duration::ZERO });
        let renewal = index.look_up(&id("a")).expect_err("the lease is over");
        index.apply(Change::Heartbeat { connection: 1, lease: later, round_trip: Duration::ZERO });
        renewal.await;
        assert!(is_current(&index, "a", "1"));
        // Of another connection, it says nothing.
        index.apply(Change::Heartbeat { connection: 0, lease: over, round_trip: Duration::ZERO });
        assert!(is_current(&index, "a", "1"));
    }

    #[test]
    fn a_fetch_that_is_not_kept_still_tells_that_an_older_entry_is_out_of_date() {
        let index = coherent();
        fetch(&index, "a", present("1"));
        fetch(&index, "b", present("1"));
        index.apply(lost(1, unverified()));
        let (mut new, mut same) = (lead(&index, "a"), lead(&index, "b"));
        index.apply(tracked(2));
        new.keep(present("2"));
        same.keep(present("1"));
        index.apply(lost(2, unreachable()));
        assert!(index.last_known(&id("a")).is_none());
        assert!(index.last_known(&id("b")).is_some());
    }

    #[tokio::test]
    async fn who_waits_is_told_when_the_store_is_unreachable() {
        let index = coherent();
        let waiting = tokio::spawn({
            let index = Arc::clone(&index);
            async move { index.until_unreachable().await }
        });
        index.apply(lost(1, unverified()));
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        index.apply(Change::Probed(unreachable()));
        waiting.await.unwrap();
    }

    #[test]
    fn what_was_fetched_while_unverified_is_never_current() {
        let index = index();
        fetch(&index, "a", present("1"));
        lead(&index, "a");
        index.apply(tracked(1));
        lead(&index, "a");
    }

    #[test]
    fn a_change_drops_what_is_known_of_its_key_alone() {
        let index = coherent();
        fetch(&index, "a", present("1"));
        fetch(&index, "b", present("1"));
        index.apply(Change::Invalidated(id("a")));
        lead(&index, "a");
        assert!(is_current(&index, "b", "1"));
    }

    #[test]
    fn a_change_voids_and_detaches_the_fetch_under_way() {
        let index = coherent();
        let mut first = lead(&index, "a");
        index.apply(Change::Invalidated(id("a")));
        // A request after the change doesn't join the fetch from before.
        let mut second = lead(&index, "a");
        second.keep(present("new"));
        second.complete(2);
        assert!(is_current(&index, "a", "new"));
        // And its outcome, arriving last, replaces nothing.
        first.keep(present("old"));
        first.complete(1);
        assert!(is_current(&index, "a", "new"));
    }

    #[test]
    fn without_the_guard_the_old_value_stays_for_ever() {
        let index: TestIndex = Arc::new(Index::guarded(limits(), Guard::Off, Clock::default()));
        index.apply(tracked(1));
        let mut first = lead(&index, "a");
        index.apply(Change::Invalidated(id("a")));
        first.keep(present("old"));
        first.complete(1);
        assert!(is_current(&index, "a", "old"));
    }

    #[test]
    fn a_change_of_everything_drops_all_and_voids_all() {
        let index = coherent();
        fetch(&index, "a", present("1"));
        let mut under_way = lead(&index, "b");
        index.apply(Change::Flushed);
        under_way.keep(present("1"));
        under_way.complete(1);
        lead(&index, "a");
        lead(&index, "b");
        assert!(index.is_empty());
    }

    #[test]
    fn epochs_in_which_nothing_was_kept_do_not_push_out_the_end_of_a_real_one() {
        let index = coherent();
        fetch(&index, "a", present("1"));
        for connection in 2..200 {
            index.apply(lost(connection - 1, unverified()));
            index.apply(tracked(connection));
        }
        index.apply(lost(199, unreachable()));
        let long_ago = index.state.lock().unwrap().ended.front().map(|(epoch, _)| *epoch);
        assert_eq!(long_ago, Some(1));
        assert!(index.last_known(&id("a")).is_some());
    }

    #[test]
    fn a_fetch_from_before_tracking_is_not_kept() {
        let index = index();
        let mut early = lead(&index, "a");
        index.apply(tracked(1));
        early.keep(present("1"));
        early.complete(1);
        lead(&index, "a");
    }

    #[test]
    fn losing_the_connection_makes_everything_unverified_at_once_and_for_good() {
        let index = coherent();
        fetch(&index, "a", present("1"));
        let mut under_way = lead(&index, "b");
        index.apply(lost(1, unverified()));
        lead(&index, "a");
        index.apply(tracked(2));
        lead(&index, "a");
        under_way.keep(present("1"));
        under_way.complete(1);
        lead(&index, "b");
    }

    #[test]
    fn a_connection_that_was_lost_before_it_was_announced_makes_nothing_coherent() {
        let index = index();
        index.apply(lost(1, unverified()));
        index.apply(tracked(1));
        assert_eq!(index.coherence(), unverified());
        index.apply(tracked(2));
        assert_eq!(index.coherence(), Coherence::Coherent);
    }

    #[test]
    fn the_late_loss_of_an_old_connection_means_nothing() {
        let index = coherent();
        index.apply(tracked(2));
        fetch(&index, "a", present("1"));
        index.apply(lost(1, unverified()));
        assert!(is_current(&index, "a", "1"));
    }

    #[test]
    fn requests_join_a_fetch_up_to_the_bound() {
        let index = coherent();
        let lease = lead(&index, "a");
        let _leader = lease.flight();
        let Lookup::Ask(Admission::Join(_one)) = look_up(&index, "a") else { panic!() };
        assert!(matches!(look_up(&index, "a"), Lookup::Ask(Admission::Full)));
    }

    #[tokio::test]
    async fn unverified_requests_join_only_a_fetch_that_has_not_departed() {
        let index = index();
        let mut first = lead(&index, "a");
        let Lookup::Ask(Admission::Join(joined)) = look_up(&index, "a") else { panic!() };
        first.mark_sent().await;
        // Too late for that one: the next, which all who come now share.
        let mut second = lead(&index, "a");
        assert!(matches!(look_up(&index, "a"), Lookup::Ask(Admission::Join(_))));
        // It waits for the first, so that outcomes settle in their order.
        let departing = tokio::spawn(async move {
            second.mark_sent().await;
            second
        });
        tokio::task::yield_now().await;
        assert!(!departing.is_finished());
        first.complete(1);
        assert_eq!(joined.outcome().await, Ok(1));
        departing.await.unwrap().complete(2);
        lead(&index, "a");
    }

    #[tokio::test]
    async fn a_fetch_that_another_has_taken_the_place_of_is_not_kept() {
        let index = coherent();
        let mut first = lead(&index, "a");
        first.mark_sent().await;
        // No sign of life: the next request can't join it, though the epoch goes on.
        index.apply(Change::Heartbeat {
            connection: 1,
            lease: Lease::Until(now()),
            round_trip: Duration::ZERO,
        });
        let Admission::Lead(mut second) = index.ask(&id("a")) else { panic!() };
        // The push finds only the second; the first must not settle on what it read before.
        index.apply(Change::Invalidated(id("a")));
        index.apply(Change::Heartbeat {
            connection: 1,
            lease: Lease::Endless,
            round_trip: Duration::ZERO,
        });
        first.keep(present("old"));
        first.complete(1);
        second.keep(present("old"));
        second.complete(2);
        lead(&index, "a");
    }

    #[test]
    fn a_ticket_that_is_dropped_leaves_nothing_to_join() {
        let index = coherent();
        drop(lead(&index, "a"));
        lead(&index, "a");
    }

    #[test]
    fn nothing_is_current_past_its_expiry() {
        let index = coherent();
        let expires = |after| Some(now() + Duration::from_millis(after));
        fetch(&index, "a", FetchResult { expires: expires(0), ..present("1") });
        lead(&index, "a");
        fetch(&index, "b", FetchResult { expires: expires(60_000), ..present("1") });
        assert!(is_current(&index, "b", "1"));
    }

    #[test]
    fn an_unreachable_store_leaves_the_last_known_versions_but_not_what_is_known_to_be_gone() {
        let index = coherent();
        fetch(&index, "a", present("1"));
        fetch(&index, "b", present("1"));
        fetch(&index, "c", FetchResult { expires: Some(now()), ..present("1") });
        index.apply(Change::Invalidated(id("b")));
        index.apply(lost(1, unreachable()));
        assert!(matches!(look_up(&index, "a"), Lookup::Stale(_)));
        assert!(index.last_known(&id("a")).is_some());
        lead(&index, "b");
        lead(&index, "c");
        index.apply(tracked(2));
        index.apply(Change::Flushed);
        index.apply(lost(2, unreachable()));
        lead(&index, "a");
    }

    #[test]
    fn a_version_is_stale_from_the_last_moment_in_which_it_was_certain() {
        let limits = IndexLimits { serve_stale_for: Duration::from_millis(40), ..limits() };
        let index: TestIndex = Arc::new(Index::new(limits));
        index.apply(tracked(1));
        fetch(&index, "a", present("1"));
        let fetched = now();
        while now().since(fetched) < Duration::from_millis(50) {
            std::hint::spin_loop();
        }
        // Long fetched, but certain until now.
        index.apply(lost(1, unreachable()));
        assert!(matches!(look_up(&index, "a"), Lookup::Stale(_)));
        let lost = now();
        while now().since(lost) < Duration::from_millis(50) {
            std::hint::spin_loop();
        }
        lead(&index, "a");
    }

    #[test]
    fn a_value_written_again_is_recognised_even_after_its_change() {
        let index = coherent();
        fetch(&index, "a", present("1"));
        index.apply(Change::Invalidated(id("a")));
        assert!(index.recognise(&id("a"), Digest::of(b"1")).is_some());
        assert!(index.recognise(&id("a"), Digest::of(b"2")).is_none());
        assert!(index.recognise(&id("b"), Digest::of(b"1")).is_none());
    }

    #[test]
    fn a_replaced_version_is_named_so_that_its_bytes_can_go() {
        let index = coherent();
        fetch(&index, "a", present("1"));
        index.apply(Change::Invalidated(id("a")));
        let mut lease = lead(&index, "a");
        assert_eq!(lease.keep(present("2")), Some(Version::of(b"1")));
        assert_eq!(lease.keep(present("2")), None);
    }

    #[test]
    fn absent_keys_push_out_no_images() {
        let index = coherent();
        let absent = || FetchResult { known: Known::Absent, digest: None, expires: None };
        let is_absent = |name| matches!(look_up(&index, name), Lookup::Current(Known::Absent));
        fetch(&index, "a", present("1"));
        for number in 0..10 {
            fetch(&index, &format!("i{number}"), absent());
        }
        assert!(is_current(&index, "a", "1"));
        assert!(is_absent("i9") && index.len() == 3);
        // A key is known once, whichever way it goes.
        index.apply(Change::Invalidated(id("a")));
        fetch(&index, "a", absent());
        assert!(is_absent("a"));
        index.apply(Change::Invalidated(id("a")));
        fetch(&index, "a", present("2"));
        assert!(is_current(&index, "a", "2"));
        assert_eq!(index.len(), 2);
        index.apply(Change::Flushed);
        assert!(index.is_empty());
    }

    #[test]
    fn a_fetch_that_nobody_waits_for_is_given_up_and_cannot_be_joined() {
        let index = coherent();
        let lease = lead(&index, "a");
        let waiting = lease.flight();
        assert!(!lease.give_up_if_unwanted());
        let Lookup::Ask(Admission::Join(joined)) = look_up(&index, "a") else { panic!() };
        drop(waiting);
        assert!(!lease.give_up_if_unwanted());
        drop(joined);
        assert!(lease.give_up_if_unwanted());
        let _next = lead(&index, "a");
        drop(lease);
        assert!(matches!(look_up(&index, "a"), Lookup::Ask(Admission::Join(_))));
    }

    #[test]
    fn never_more_entries_than_the_bound() {
        let index = coherent();
        for number in 0..10 {
            fetch(&index, &format!("i{number}"), present("1"));
        }
        assert_eq!(index.len(), 3);
    }
}
