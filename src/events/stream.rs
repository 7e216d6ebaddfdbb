//! One client's stream: the images that it follows, and what it may have to send.

use std::collections::{HashSet, VecDeque};
use std::sync::{Arc, PoisonError};

use super::listings::Listing;
use crate::image::ImageId;
use crate::sync::futures::Notified;
use crate::sync::{Mutex, MutexGuard, Notify};

/// The images that a stream follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Followed {
    /// These.
    Ids(HashSet<ImageId>),
    /// Those whose id begins with this text.
    Prefix(String),
    /// The same, and only what changes from now on.
    Changes(String),
}

/// One client's stream.
///
/// Its memory is bounded, however slowly its client reads: with ids by their number; with a prefix it is a position in the log
/// of changes, and one listing that all streams with the prefix share.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) followed: Followed,
    pending: Mutex<Pending>,
    ready: Notify,
}

/// Changes that a stream has still to look at.
#[derive(Debug)]
struct Pending {
    /// Every image that the stream follows may have changed.
    everything: bool,
    /// With ids: those that have changed, in order.
    order: VecDeque<ImageId>,
    /// The ids in `order`, each once.
    ids: HashSet<ImageId>,
    /// With a prefix: position in the log of the first change that wasn't read; `None` if all were.
    since: Option<u64>,
    /// Position in the log at which a stream of changes began.
    began: u64,
    /// The listing that was made for it last.
    listing: Option<Arc<Listing>>,
    /// Number of the listing that the stream waits for. Listings that began before the last change of everything have an
    /// older one.
    wanted: u64,
    /// Number of the last listing that it got.
    listed: u64,
}

impl Stream {
    /// A stream that has everything to send, and with a prefix waits for a listing; one of changes has nothing yet.
    pub(super) fn new(followed: Followed) -> Stream {
        let everything = !matches!(followed, Followed::Changes(_));
        let pending = Pending {
            everything,
            order: VecDeque::new(),
            ids: HashSet::new(),
            since: None,
            began: 0,
            listing: None,
            wanted: u64::from(everything),
            listed: 0,
        };
        Stream { followed, pending: Mutex::new(pending), ready: Notify::new() }
    }

    /// The prefix, if the stream follows one.
    pub(super) fn prefix(&self) -> Option<&str> {
        match &self.followed {
            Followed::Ids(_) => None,
            Followed::Prefix(prefix) | Followed::Changes(prefix) => Some(prefix),
        }
    }

    /// The prefix, if the stream needs listings of the images with it.
    pub(super) fn listed_prefix(&self) -> Option<&str> {
        match &self.followed {
            Followed::Prefix(prefix) => Some(prefix),
            Followed::Ids(_) | Followed::Changes(_) => None,
        }
    }

    /// Notes that one of the ids that the stream follows has changed.
    pub(super) fn add(&self, id: &ImageId) {
        let mut pending = self.lock();
        if !pending.everything && pending.ids.insert(id.clone()) {
            pending.order.push_back(id.clone());
        }
        drop(pending);
        self.ready.notify_one();
    }

    /// Sets the position in the log from which on a stream of changes is told.
    pub(super) fn begin_at(&self, position: u64) {
        self.lock().began = position;
    }

    /// Notes that images with the prefix have changed, the first of them at this position in the log. It may be one from before
    /// the stream began: all streams with a prefix are told the same.
    pub(super) fn note_change(&self, position: u64) {
        let mut pending = self.lock();
        let position = position.max(pending.began);
        pending.since = Some(pending.since.map_or(position, |since| since.min(position)));
        drop(pending);
        self.ready.notify_one();
    }

    /// Notes that every image that the stream follows may have changed. A listing must begin after this. A stream of
    /// changes no longer tells those before it one by one, since its client lists them.
    pub(super) fn add_everything(&self) {
        let mut pending = self.lock();
        if matches!(self.followed, Followed::Changes(_)) {
            pending.since = None;
        }
        pending.everything = true;
        pending.order.clear();
        pending.ids.clear();
        pending.listing = None;
        pending.wanted += u64::from(self.listed_prefix().is_some());
        drop(pending);
        self.ready.notify_one();
    }

    /// Number of the listing that the stream waits for, if it does.
    pub(super) fn wanted_listing(&self) -> Option<u64> {
        let pending = self.lock();
        (pending.wanted != pending.listed).then_some(pending.wanted)
    }

    /// Hands over the listing of a number, unless the stream waits for a later one by now.
    pub(super) fn end_listing(&self, number: u64, listing: &Arc<Listing>) {
        let mut pending = self.lock();
        if pending.wanted != number {
            return;
        }
        pending.listed = number;
        pending.listing = Some(Arc::clone(listing));
        drop(pending);
        self.ready.notify_one();
    }

    /// Waits until something may be due.
    pub(super) fn ready(&self) -> Notified<'_> {
        self.ready.notified()
    }

    /// Returns once whether everything may have changed.
    pub(super) fn take_everything(&self) -> bool {
        std::mem::take(&mut self.lock().everything)
    }

    /// Takes the id that has been due longest.
    pub(super) fn pop(&self) -> Option<ImageId> {
        let mut pending = self.lock();
        let id = pending.order.pop_front()?;
        pending.ids.remove(&id);
        Some(id)
    }

    /// Takes the listing that has ended.
    pub(super) fn take_listing(&self) -> Option<Arc<Listing>> {
        self.lock().listing.take()
    }

    /// Position in the log of the first change that wasn't read.
    pub(super) fn since(&self) -> Option<u64> {
        self.lock().since
    }

    /// Takes that position, in order to read from it on.
    pub(super) fn take_since(&self) -> Option<u64> {
        self.lock().since.take()
    }

    /// The number of ids that it holds.
    #[cfg(all(test, feature = "shuttle"))]
    pub(super) fn held(&self) -> usize {
        let pending = self.lock();
        pending.order.len().max(pending.ids.len())
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> ImageId {
        ImageId::parse(text).unwrap()
    }

    fn listing() -> Arc<Listing> {
        Arc::new(Listing { ids: vec![id("a1")], complete: true, began: 0 })
    }

    #[test]
    fn a_listing_that_began_before_everything_changed_does_not_count() {
        let stream = Stream::new(Followed::Prefix("a".to_owned()));
        let early = stream.wanted_listing().unwrap();
        stream.add_everything();
        stream.end_listing(early, &listing());
        assert!(stream.take_listing().is_none());
        let late = stream.wanted_listing().unwrap();
        stream.end_listing(late, &listing());
        assert!(stream.take_listing().is_some() && stream.wanted_listing().is_none());
        // One that wasn't told yet is dropped when it is out of date.
        stream.add_everything();
        stream.end_listing(stream.wanted_listing().unwrap(), &listing());
        stream.add_everything();
        assert!(stream.take_listing().is_none() && stream.wanted_listing().is_some());
    }

    #[test]
    fn a_stream_of_changes_begins_with_nothing_and_needs_no_listing() {
        let stream = Stream::new(Followed::Changes("a".to_owned()));
        assert!(!stream.take_everything() && stream.wanted_listing().is_none());
        stream.add_everything();
        assert!(stream.take_everything() && stream.wanted_listing().is_none());
        assert_eq!((stream.prefix(), stream.listed_prefix()), (Some("a"), None));
    }

    #[test]
    fn a_stream_of_changes_does_not_tell_those_that_its_client_is_about_to_list() {
        let stream = Stream::new(Followed::Changes("a".to_owned()));
        stream.note_change(7);
        stream.add_everything();
        assert_eq!(stream.since(), None);
        stream.note_change(9);
        assert_eq!(stream.take_since(), Some(9));
    }

    #[test]
    fn nothing_accumulates_while_a_client_reads_nothing() {
        let ids = Stream::new(Followed::Ids([id("a"), id("b")].into()));
        assert!(ids.take_everything() && !ids.take_everything());
        for _ in 0..100 {
            ids.add(&id("a"));
            ids.add(&id("b"));
        }
        assert_eq!(ids.lock().order.len(), 2);
        ids.add_everything();
        ids.add(&id("a"));
        assert_eq!(ids.lock().order.len(), 0);
        let prefix = Stream::new(Followed::Prefix("a".to_owned()));
        for position in [7, 8, 5, 9] {
            prefix.note_change(position);
        }
        assert_eq!((prefix.take_since(), prefix.since()), (Some(5), None));
    }
}
