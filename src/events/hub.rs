//! The hub: which streams follow which images, and which images have changed.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::stream::{Followed, Stream};
use crate::image::ImageId;
use crate::index::Index;
use crate::read::Outcome;
use crate::store::{Change, Coherence, Cursor, Store, StoreError};

/// Delay before a failed listing or read is retried.
pub(super) const RETRY: Duration = Duration::from_secs(1);

/// The streams and what they follow.
#[derive(Debug, Default)]
pub(crate) struct Hub {
    followers: Mutex<Followers>,
    /// Notified when something has changed.
    changed: Notify,
    /// Notified when a stream with a prefix waits for a listing.
    unlisted: Notify,
}

#[derive(Debug, Default)]
struct Followers {
    streams: HashMap<u64, Arc<Stream>>,
    by_id: HashMap<ImageId, HashSet<u64>>,
    by_prefix: HashMap<String, HashSet<u64>>,
    next_stream: u64,
    /// Followed ids that have changed.
    changed: HashSet<ImageId>,
    /// All of them may have changed.
    everything: bool,
    /// Streams with a prefix that wait for a listing.
    unlisted: HashSet<u64>,
}

impl Hub {
    /// Notes a change of the store. It is called where pushes arrive, so the work is done by `Hub::dispatch`.
    pub(crate) fn apply(&self, change: &Change) {
        let mut followers = self.followers();
        match change {
            Change::Invalidated(id) if followers.is_followed(id) => {
                followers.changed.insert(id.clone());
            }
            Change::Flushed
            | Change::TrackingStarted { .. }
            | Change::TrackingLost { .. }
            | Change::Probed(_)
                if !followers.streams.is_empty() =>
            {
                followers.everything = true;
            }
            _ => return,
        }
        drop(followers);
        self.changed.notify_one();
    }

    /// Adds a stream, unless there are `most` already. Gives its number.
    pub(super) fn add(&self, stream: &Arc<Stream>, most: usize) -> Option<u64> {
        let mut followers = self.followers();
        if followers.streams.len() >= most {
            return None;
        }
        let number = followers.next_stream;
        followers.next_stream += 1;
        followers.streams.insert(number, Arc::clone(stream));
        match &stream.followed {
            Followed::Ids(ids) => {
                for id in ids {
                    followers.by_id.entry(id.clone()).or_default().insert(number);
                    stream.add(id);
                }
            }
            Followed::Prefix(prefix) => {
                followers.by_prefix.entry(prefix.clone()).or_default().insert(number);
                followers.unlisted.insert(number);
                self.unlisted.notify_one();
            }
        }
        Some(number)
    }

    /// Removes a stream.
    pub(super) fn remove(&self, number: u64) {
        let mut followers = self.followers();
        let Some(stream) = followers.streams.remove(&number) else { return };
        followers.unlisted.remove(&number);
        let leave = |numbers: &mut HashSet<u64>| {
            numbers.remove(&number);
            numbers.is_empty()
        };
        match &stream.followed {
            Followed::Ids(ids) => {
                for id in ids {
                    if followers.by_id.get_mut(id).is_some_and(leave) {
                        followers.by_id.remove(id);
                    }
                }
            }
            Followed::Prefix(prefix) => {
                if followers.by_prefix.get_mut(prefix).is_some_and(leave) {
                    followers.by_prefix.remove(prefix);
                }
            }
        }
    }

    /// Passes changed ids to the streams that follow them, for ever. While the store is unverified, every stream looks at
    /// all its images at each `interval`.
    pub(super) async fn dispatch(&self, index: &Index<Outcome>, interval: Duration) {
        let mut polled = Instant::now();
        loop {
            let _ = tokio::time::timeout(RETRY, self.changed.notified()).await;
            let unverified = matches!(index.coherence(), Coherence::Unverified(_));
            let poll = unverified && polled.elapsed() >= interval;
            if poll {
                polled = Instant::now();
            }
            let mut followers = self.followers();
            let changed = std::mem::take(&mut followers.changed);
            let following: Vec<_> =
                changed.into_iter().map(|id| (followers.following(&id), id)).collect();
            let everything = std::mem::take(&mut followers.everything) || poll;
            let everybody: Vec<Arc<Stream>> = if everything {
                followers.streams.values().map(Arc::clone).collect()
            } else {
                Vec::new()
            };
            drop(followers);
            for (streams, id) in following {
                for stream in streams {
                    stream.add(&id);
                }
            }
            for stream in everybody {
                stream.add_everything();
            }
            if everything {
                // Only now, so that a listing which is under way doesn't count as the one that is wanted.
                let mut followers = self.followers();
                let prefixed: Vec<u64> = followers.by_prefix.values().flatten().copied().collect();
                followers.unlisted.extend(prefixed);
                drop(followers);
                self.unlisted.notify_one();
            }
        }
    }

    /// Tells streams with a prefix which images are there already, for ever. One listing serves all streams that wait for
    /// one: it looks at every key of the store.
    pub(super) async fn list(&self, store: &Store, most: usize) {
        loop {
            let _ = tokio::time::timeout(RETRY, self.unlisted.notified()).await;
            let waiting: HashMap<u64, Arc<Stream>> = {
                let mut followers = self.followers();
                let unlisted = std::mem::take(&mut followers.unlisted);
                let stream = |number| Some((number, Arc::clone(followers.streams.get(&number)?)));
                unlisted.into_iter().filter_map(stream).collect()
            };
            if waiting.is_empty() {
                continue;
            }
            let streams: Vec<&Arc<Stream>> = waiting.values().collect();
            if let Err(error) = list_for(store, &streams, most).await {
                tracing::debug!(%error, "images with a prefix can't be listed yet");
                // Streams that have left are passed over.
                self.followers().unlisted.extend(waiting.keys());
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    fn followers(&self) -> MutexGuard<'_, Followers> {
        self.followers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Followers {
    fn is_followed(&self, id: &ImageId) -> bool {
        self.by_id.contains_key(id) || self.by_beginning(id).next().is_some()
    }

    /// The streams with a prefix of an id.
    fn by_beginning(&self, id: &ImageId) -> impl Iterator<Item = &u64> {
        let id = id.as_str();
        let lengths = if self.by_prefix.is_empty() { 0..0 } else { 0..id.len() + 1 };
        lengths.filter_map(move |length| self.by_prefix.get(&id[..length])).flatten()
    }

    /// The streams that follow an id.
    fn following(&self, id: &ImageId) -> Vec<Arc<Stream>> {
        let named = self.by_id.get(id).into_iter().flatten();
        let numbers = named.chain(self.by_beginning(id));
        numbers.filter_map(|number| self.streams.get(number)).map(Arc::clone).collect()
    }
}

/// A stream that waits for a listing.
struct Waiting<'a> {
    stream: &'a Arc<Stream>,
    prefix: &'a str,
    /// Number of this listing, for the stream.
    listing: u64,
    /// The images that it was told of. A listing may name one twice.
    found: HashSet<ImageId>,
}

/// Lists the images of some streams with a prefix, at most `most` for each.
async fn list_for(store: &Store, streams: &[&Arc<Stream>], most: usize) -> Result<(), StoreError> {
    let mut waiting: Vec<Waiting<'_>> = Vec::new();
    for stream in streams {
        if let Some(prefix) = stream.prefix() {
            let (listing, found) = (stream.begin_listing(), HashSet::new());
            waiting.push(Waiting { stream, prefix, listing, found });
        }
    }
    let common = waiting.iter().map(|it| it.prefix).reduce(|common, prefix| {
        let same = common.bytes().zip(prefix.bytes()).take_while(|(a, b)| a == b).count();
        &common[..same]
    });
    let common = common.unwrap_or_default();
    let mut from: Option<Cursor> = None;
    loop {
        let page = store.list(common, from).await?;
        for id in &page.ids {
            waiting.retain_mut(|it| {
                if !id.as_str().starts_with(it.prefix) || it.found.contains(id) {
                    return true;
                }
                if it.found.len() == most {
                    // It has its fill.
                    it.stream.end_listing(it.listing, false);
                    return false;
                }
                it.found.insert(id.clone());
                it.stream.add(id);
                true
            });
        }
        // A stream whose client has left needs no more.
        waiting.retain(|it| Arc::strong_count(it.stream) > 1);
        from = page.next;
        if from.is_none() || waiting.is_empty() {
            for it in &waiting {
                it.stream.end_listing(it.listing, true);
            }
            return Ok(());
        }
    }
}
