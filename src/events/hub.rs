//! The hub: which streams follow which images, and which images have changed.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::change_log::{ChangeLog, Changes};
use super::listings::{AllWaiting, Listing, Pace, Slices, Waiting};
use super::stream::{Followed, Stream};
use crate::image::ImageId;
use crate::index::Index;
use crate::read::Outcome;
use crate::store::{Change, Coherence, Cursor, LISTED_KEYS, Page, Store, StoreError};
use crate::sync::time::{sleep, timeout};
use crate::sync::{Mutex, MutexGuard, Notify, yield_now};

/// Delay before a failed listing or read is retried.
pub(super) const RETRY: Duration = Duration::from_secs(1);

/// Streams that are looked up under one lock.
const CHUNK: usize = 64;

/// Prefixes that nobody follows any more and whose listing is kept, and the time for which it is.
const LEFT: usize = 64;
const LEFT_FOR: Duration = Duration::from_mins(1);

/// Longest time for which a listing of more images than a stream may name is given to further streams.
const INCOMPLETE_FOR: Duration = Duration::from_secs(5);

/// The streams and what they follow.
#[derive(Debug, Default)]
pub(crate) struct Hub {
    followers: Mutex<Followers>,
    /// Changed images with a prefix that a stream follows. Locked after `followers`, where both are.
    log: Mutex<ChangeLog>,
    /// Notified when something has changed.
    changed: Notify,
    /// Notified when a stream with a prefix waits for a listing.
    unlisted: Notify,
}

#[derive(Debug, Default)]
struct Followers {
    streams: BTreeMap<u64, Arc<Stream>>,
    by_id: HashMap<ImageId, BTreeSet<u64>>,
    by_prefix: HashMap<String, Group>,
    /// Lengths of those prefixes, each with the number of prefixes that have it.
    lengths: BTreeMap<usize, usize>,
    next_stream: u64,
    /// Ids that streams name and that have changed.
    changed: HashSet<ImageId>,
    /// Prefixes with changes that their streams weren't told of.
    touched: Vec<String>,
    /// Every image may have changed.
    everything: bool,
    /// Number of times at which every image may have changed. Listings from before the last one aren't kept.
    doubts: u64,
    /// Prefixes with streams that wait for a listing.
    unlisted: HashSet<String>,
    /// Prefixes in the order in which their last streams left, with the time.
    left: VecDeque<(Instant, String)>,
}

/// The streams with one prefix.
#[derive(Debug, Default)]
struct Group {
    streams: BTreeSet<u64>,
    /// Those that wait for a listing, and whether all of them do.
    waiting: BTreeSet<u64>,
    all_wait: bool,
    /// Position in the log of the first change that they weren't told of.
    since: Option<u64>,
    kept: Option<Kept>,
}

/// A listing that further streams may get: what has changed since is in the log.
#[derive(Debug, Clone)]
struct Kept {
    listing: Arc<Listing>,
    doubts: u64,
    made: Instant,
}

/// Lists the ids of a store. An exploration of orders has a store of its own.
pub(super) trait ListIds: Sync {
    /// Gives the next part of the ids that begin with a text, as [`Store::list`] does.
    fn list_ids(
        &self,
        beginning: &str,
        from: Option<Cursor>,
    ) -> impl Future<Output = Result<Page, StoreError>> + Send;
}

impl ListIds for Store {
    async fn list_ids(&self, beginning: &str, from: Option<Cursor>) -> Result<Page, StoreError> {
        self.list(beginning, from, LISTED_KEYS).await
    }
}

/// The streams that are told something.
#[derive(Debug, Clone, Copy)]
enum Audience<'a> {
    All,
    OfId(&'a ImageId),
    OfPrefix(&'a str),
    Of(&'a BTreeSet<u64>),
}

impl Hub {
    /// Notes a change of the store. It is called where pushes arrive, so the work is done by `Hub::dispatch`.
    pub(crate) fn apply(&self, change: &Change) {
        let mut followers = self.followers();
        let is_followed = match change {
            Change::Invalidated(id) => followers.note_change(id, &self.log),
            Change::Flushed
            | Change::TrackingStarted { .. }
            | Change::TrackingLost { .. }
            | Change::Probed(_) => {
                followers.doubts += 1;
                followers.everything |= !followers.streams.is_empty();
                followers.everything
            }
            Change::Heartbeat { .. } | Change::Awake { .. } => false,
        };
        drop(followers);
        if is_followed {
            self.changed.notify_one();
        }
    }

    /// Adds a stream. Gives its number.
    pub(super) fn add(&self, stream: &Arc<Stream>) -> u64 {
        let mut followers = self.followers();
        let number = followers.next_stream;
        followers.next_stream += 1;
        followers.streams.insert(number, Arc::clone(stream));
        match &stream.followed {
            Followed::Ids(ids) => {
                for id in ids {
                    followers.by_id.entry(id.clone()).or_default().insert(number);
                }
            }
            Followed::Prefix(prefix) => {
                let group = followers.group(prefix);
                group.streams.insert(number);
                group.waiting.insert(number);
                followers.unlisted.insert(prefix.clone());
                self.unlisted.notify_one();
            }
            Followed::Changes(prefix) => {
                followers.group(prefix).streams.insert(number);
                stream.begin_at(self.log_end());
            }
        }
        number
    }

    /// Removes a stream.
    pub(super) fn remove(&self, number: u64) {
        let mut followers = self.followers();
        let Some(stream) = followers.streams.remove(&number) else { return };
        match &stream.followed {
            Followed::Ids(ids) => {
                for id in ids {
                    let numbers = followers.by_id.get_mut(id);
                    if numbers.is_some_and(|it| it.remove(&number) && it.is_empty()) {
                        followers.by_id.remove(id);
                    }
                }
            }
            Followed::Prefix(prefix) | Followed::Changes(prefix) => {
                followers.leave(prefix, number);
                if followers.by_prefix.is_empty() {
                    self.log().clear();
                }
            }
        }
    }

    /// Reads some of the changes of images with a prefix; `None` if some have left the log.
    pub(super) fn changes(&self, from: u64, prefix: &str) -> Option<Changes> {
        self.log().read(from, prefix)
    }

    /// Position of the next change in the log.
    pub(super) fn log_end(&self) -> u64 {
        self.log().end()
    }

    /// Lets a stream that is too far behind begin again.
    pub(super) fn start_over(&self, number: u64, stream: &Stream) {
        stream.add_everything();
        if let Some(prefix) = stream.listed_prefix() {
            let mut followers = self.followers();
            followers.group(prefix).waiting.insert(number);
            followers.unlisted.insert(prefix.to_owned());
            self.unlisted.notify_one();
        }
    }

    /// Passes changes on to the streams that follow them, for ever. While the store is unverified, every stream looks at all
    /// its images at each `interval`.
    pub(super) async fn dispatch(&self, index: &Index<Outcome>, interval: Duration) {
        let mut polled = Instant::now();
        loop {
            let _ = timeout(RETRY, self.changed.notified()).await;
            let unverified = matches!(index.coherence(), Coherence::Unverified(_));
            let poll = unverified && polled.elapsed() >= interval;
            if poll {
                polled = Instant::now();
            }
            let mut slices = Slices::begin();
            let (changed, touched, everything) = self.take_changes();
            for id in changed {
                self.tell(Audience::OfId(&id), &mut slices, |stream| stream.add(&id)).await;
            }
            for (prefix, since) in touched {
                let audience = Audience::OfPrefix(&prefix);
                self.tell(audience, &mut slices, |stream| stream.note_change(since)).await;
            }
            if everything || poll {
                let mut prefixes = HashSet::new();
                self.tell(Audience::All, &mut slices, |stream| {
                    stream.add_everything();
                    if let Some(prefix) =
                        stream.listed_prefix().filter(|it| !prefixes.contains(*it))
                    {
                        prefixes.insert(prefix.to_owned());
                    }
                })
                .await;
                // Only now, so that a listing which is under way doesn't count as the one that is wanted.
                self.want_listings(prefixes, &mut slices).await;
            }
        }
    }

    /// Tells streams with a prefix which images are there already, for ever. A listing looks at every key of the store. So
    /// there is one at a time, for all who wait, at a pace; and who comes later gets it too, with the changes since.
    pub(super) async fn list<L: ListIds>(&self, store: &L, index: &Index<Outcome>, most: usize) {
        let mut pace = Pace::new(Instant::now());
        loop {
            let is_waited_for = !self.followers().unlisted.is_empty();
            let pause = if is_waited_for { pace.pause(Instant::now()) } else { RETRY };
            let _ = timeout(pause, self.unlisted.notified()).await;
            self.give_kept(index, most).await;
            if self.followers().unlisted.is_empty() || !pace.pause(Instant::now()).is_zero() {
                continue;
            }
            let (prefixes, began) =
                (std::mem::take(&mut self.followers().unlisted), Instant::now());
            let listed = self.list_for(&prefixes, store, index, most).await;
            pace.note(began, Instant::now());
            if let Err(error) = listed {
                tracing::debug!(%error, "images with a prefix can't be listed yet");
                self.want_listings(prefixes, &mut Slices::begin()).await;
                sleep(RETRY).await;
            }
        }
    }

    /// Takes the ids, and the prefixes with their positions in the log, that streams have to be told of.
    fn take_changes(&self) -> (HashSet<ImageId>, Vec<(String, u64)>, bool) {
        let mut followers = self.followers();
        followers.drop_left();
        let changed = std::mem::take(&mut followers.changed);
        let touched = std::mem::take(&mut followers.touched).into_iter();
        let touched = touched.filter_map(|prefix| {
            let since = followers.by_prefix.get_mut(&prefix)?.since.take()?;
            Some((prefix, since))
        });
        let touched = touched.collect();
        (changed, touched, std::mem::take(&mut followers.everything))
    }

    /// Tells some streams something, in slices and outside of the lock.
    async fn tell(
        &self,
        audience: Audience<'_>,
        slices: &mut Slices,
        mut tell: impl FnMut(&Arc<Stream>),
    ) {
        let mut after = Bound::Unbounded;
        loop {
            let some = self.followers().some(audience, after);
            let Some((last, _)) = some.last() else { return };
            after = Bound::Excluded(*last);
            for (_, stream) in &some {
                tell(stream);
            }
            if some.len() < CHUNK {
                slices.pause().await;
                return;
            }
            // Each of these wakes up, and has its turn before the next.
            yield_now().await;
        }
    }

    /// Lets all streams with some prefixes wait for a listing.
    async fn want_listings(&self, prefixes: HashSet<String>, slices: &mut Slices) {
        for prefix in prefixes {
            self.followers().want_listing(prefix);
            slices.pause().await;
        }
        self.unlisted.notify_one();
    }

    /// Gives streams a listing that was made before they came, if there is one.
    async fn give_kept(&self, index: &Index<Outcome>, most: usize) {
        if index.coherence() != Coherence::Coherent {
            return;
        }
        let prefixes = std::mem::take(&mut self.followers().unlisted);
        let mut slices = Slices::begin();
        for prefix in prefixes {
            let kept = self.followers().kept(&prefix);
            let Some((kept, listing)) =
                kept.and_then(|kept| Some((kept.clone(), self.renewed(&kept, &prefix, most)?)))
            else {
                // Not notified: who asks for it looks.
                self.followers().unlisted.insert(prefix);
                slices.pause().await;
                continue;
            };
            let (listing, waiting) = (Arc::new(listing), self.followers().take_waiting(&prefix));
            self.tell(Audience::Of(&waiting), &mut slices, |stream| {
                if let Some(number) = stream.wanted_listing() {
                    stream.end_listing(number, &listing);
                }
            })
            .await;
            self.followers().keep(&prefix, Kept { listing, ..kept });
        }
    }

    /// A listing with the changes since; `None` if that can't be told.
    fn renewed(&self, kept: &Kept, prefix: &str, most: usize) -> Option<Listing> {
        let (listing, began) = (&kept.listing, self.log_end());
        if !listing.complete {
            let is_young = kept.made.elapsed() < INCOMPLETE_FOR;
            return is_young.then(|| Listing { ids: listing.ids.clone(), complete: false, began });
        }
        let mut ids: Vec<ImageId> =
            listing.ids.iter().filter(|id| id.as_str().starts_with(prefix)).cloned().collect();
        let mut found: HashSet<ImageId> = ids.iter().cloned().collect();
        let mut from = Some(listing.began);
        while let Some(position) = from {
            let changes = self.changes(position, prefix)?;
            ids.extend(changes.ids.into_iter().filter(|id| found.insert(id.clone())));
            if ids.len() > most {
                return None;
            }
            from = changes.next;
        }
        Some(Listing { ids, complete: true, began })
    }

    /// Lists the images of the streams with some prefixes, at most `most` for each.
    async fn list_for<L: ListIds>(
        &self,
        prefixes: &HashSet<String>,
        store: &L,
        index: &Index<Outcome>,
        most: usize,
    ) -> Result<(), StoreError> {
        // In this order: a change that comes in between only makes the listing look older than it is.
        let doubts = self.followers().doubts;
        let is_coherent = index.coherence() == Coherence::Coherent;
        let began = self.log_end();
        let (made, mut slices, mut all) = (Instant::now(), Slices::begin(), AllWaiting::default());
        for prefix in prefixes {
            let (mut streams, waiting) = (Vec::new(), self.followers().take_waiting(prefix));
            self.tell(Audience::Of(&waiting), &mut slices, |stream| {
                streams.extend(stream.wanted_listing().map(|number| (Arc::clone(stream), number)));
            })
            .await;
            if !streams.is_empty() {
                all.add(prefix.clone(), Waiting::new(streams));
            }
        }
        let keep = |prefix: &str, listing: Arc<Listing>| {
            if is_coherent {
                self.followers().keep(prefix, Kept { listing, doubts, made });
            }
        };
        let common = all.common_prefix();
        let mut from: Option<Cursor> = None;
        while !all.is_empty() {
            let page = store.list_ids(&common, from).await?;
            for (prefix, full) in all.found(&page.ids, most, &mut slices).await {
                keep(&prefix, full.end(false, began, &mut slices).await);
            }
            all.drop_unwanted();
            from = page.next;
            if from.is_none() {
                break;
            }
        }
        for (prefix, waiting) in all.into_rest() {
            keep(&prefix, waiting.end(true, began, &mut slices).await);
        }
        Ok(())
    }

    /// True if nobody follows anything.
    #[cfg(all(test, feature = "shuttle"))]
    pub(super) fn is_unused(&self) -> bool {
        let followers = self.followers();
        followers.streams.is_empty()
            && followers.by_id.is_empty()
            && followers.by_prefix.values().all(|group| group.streams.is_empty())
    }

    fn followers(&self) -> MutexGuard<'_, Followers> {
        self.followers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn log(&self) -> MutexGuard<'_, ChangeLog> {
        self.log.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Followers {
    /// Notes a changed image. Returns whether a stream has to be told.
    fn note_change(&mut self, id: &ImageId, log: &Mutex<ChangeLog>) -> bool {
        let is_named = self.by_id.contains_key(id);
        if is_named {
            self.changed.insert(id.clone());
        }
        let mut number = None;
        for length in self.lengths.keys().take_while(|length| **length <= id.as_str().len()) {
            let prefix = &id.as_str()[..*length];
            let Some(group) = self.by_prefix.get_mut(prefix) else { continue };
            let number = *number
                .get_or_insert_with(|| log.lock().unwrap_or_else(PoisonError::into_inner).note(id));
            if group.since.is_none() && !group.streams.is_empty() {
                group.since = Some(number);
                self.touched.push(prefix.to_owned());
            }
        }
        is_named || !self.touched.is_empty()
    }

    /// The next streams of an audience.
    fn some(&self, audience: Audience<'_>, after: Bound<u64>) -> Vec<(u64, Arc<Stream>)> {
        let range = (after, Bound::Unbounded);
        let numbers = match audience {
            Audience::All => {
                let streams = self.streams.range(range).take(CHUNK);
                return streams.map(|(number, stream)| (*number, Arc::clone(stream))).collect();
            }
            Audience::OfId(id) => self.by_id.get(id),
            Audience::OfPrefix(prefix) => self.by_prefix.get(prefix).map(|it| &it.streams),
            Audience::Of(numbers) => Some(numbers),
        };
        let numbers = numbers.into_iter().flat_map(|it| it.range(range)).take(CHUNK);
        numbers.filter_map(|it| Some((*it, Arc::clone(self.streams.get(it)?)))).collect()
    }

    fn group(&mut self, prefix: &str) -> &mut Group {
        if !self.by_prefix.contains_key(prefix) {
            *self.lengths.entry(prefix.len()).or_default() += 1;
        }
        self.by_prefix.entry(prefix.to_owned()).or_default()
    }

    /// Removes a stream from its group. A group whose last stream leaves stays for a while, if it has a listing.
    fn leave(&mut self, prefix: &str, number: u64) {
        let Some(group) = self.by_prefix.get_mut(prefix) else { return };
        group.streams.remove(&number);
        group.waiting.remove(&number);
        if !group.streams.is_empty() {
            return;
        }
        self.unlisted.remove(prefix);
        if group.kept.as_ref().is_none_or(|kept| kept.doubts != self.doubts) {
            self.drop_group(prefix);
            return;
        }
        self.left.push_back((Instant::now(), prefix.to_owned()));
        if self.left.len() > LEFT
            && let Some((_, first)) = self.left.pop_front()
        {
            self.drop_group(&first);
        }
    }

    /// Drops the groups whose last streams left a while ago.
    fn drop_left(&mut self) {
        while let Some((at, _)) = self.left.front()
            && at.elapsed() >= LEFT_FOR
            && let Some((_, prefix)) = self.left.pop_front()
        {
            self.drop_group(&prefix);
        }
    }

    /// Drops a group, unless it has streams.
    fn drop_group(&mut self, prefix: &str) {
        if self.by_prefix.get(prefix).is_none_or(|group| !group.streams.is_empty()) {
            return;
        }
        self.by_prefix.remove(prefix);
        if let Some(count) = self.lengths.get_mut(&prefix.len()) {
            *count -= 1;
            if *count == 0 {
                self.lengths.remove(&prefix.len());
            }
        }
    }

    /// Lets all streams with a prefix wait for a listing.
    fn want_listing(&mut self, prefix: String) {
        if let Some(group) = self.by_prefix.get_mut(&prefix)
            && !group.streams.is_empty()
        {
            group.all_wait = true;
            self.unlisted.insert(prefix);
        }
    }

    /// Takes the streams with a prefix that wait for a listing.
    fn take_waiting(&mut self, prefix: &str) -> BTreeSet<u64> {
        let Some(group) = self.by_prefix.get_mut(prefix) else { return BTreeSet::new() };
        let waiting = std::mem::take(&mut group.waiting);
        if std::mem::take(&mut group.all_wait) { group.streams.clone() } else { waiting }
    }

    /// Keeps a listing for the streams that are still to come.
    fn keep(&mut self, prefix: &str, kept: Kept) {
        if let Some(group) = self.by_prefix.get_mut(prefix) {
            group.kept = Some(kept);
        }
    }

    /// A listing that has the images with a prefix: its own, or one of all with a shorter prefix.
    fn kept(&self, prefix: &str) -> Option<Kept> {
        let kept = self.lengths.range(..=prefix.len()).filter_map(|(length, _)| {
            let is_own = *length == prefix.len();
            let kept = self.by_prefix.get(&prefix[..*length])?.kept.as_ref()?;
            (kept.doubts == self.doubts && (is_own || kept.listing.complete)).then_some(kept)
        });
        kept.max_by_key(|kept| kept.listing.complete).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stream_of_changes_is_told_nothing_from_before_it_began() {
        let (hub, id) = (Hub::default(), |text: &str| ImageId::parse(text).unwrap());
        let follow = || {
            let stream = Arc::new(Stream::new(Followed::Changes("a".to_owned())));
            hub.add(&stream);
            stream
        };
        let early = follow();
        hub.apply(&Change::Invalidated(id("a1")));
        let late = follow();
        hub.apply(&Change::Invalidated(id("a2")));
        let (_, touched, _) = hub.take_changes();
        let [(prefix, since)] = &touched[..] else { panic!("{touched:?}") };
        let audience = Audience::OfPrefix(prefix);
        hub.tell(audience, &mut Slices::begin(), |stream| stream.note_change(*since)).await;
        let read = |stream: &Stream| hub.changes(stream.take_since().unwrap(), "a").unwrap().ids;
        assert_eq!(read(&early), [id("a1"), id("a2")]);
        assert_eq!(read(&late), [id("a2")]);
    }
}
