//! One client's stream: the ids that it follows, and those whose state it may have to send.

use std::collections::{HashSet, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::image::ImageId;

/// Most ids that may be pending on a stream, for each that it may name. A stream with more is closed; its client comes
/// back.
const PENDING: usize = 100;

/// The images that a stream follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Followed {
    /// These.
    Ids(HashSet<ImageId>),
    /// Those whose id begins with this text.
    Prefix(String),
}

/// One client's stream.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) followed: Followed,
    most: usize,
    pending: Mutex<Pending>,
    ready: Notify,
}

/// The ids whose state a stream may have to send.
#[derive(Debug, Default)]
struct Pending {
    order: VecDeque<Due>,
    /// The ids in `order`, each once. At most one end of a listing is there beside them.
    ids: HashSet<ImageId>,
    /// Every image that the stream has sent may have changed.
    everything: bool,
    /// Number of the listing that the stream waits for. Listings that began before the last change of everything have an
    /// older one.
    listing: u64,
    /// There were more ids than it may hold.
    overrun: bool,
}

/// The next thing that a stream may have to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Due {
    /// The state of this image.
    Image(ImageId),
    /// The end of a listing: every image that was found is due before it.
    Listed(Listing),
}

/// A listing that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Listing {
    number: u64,
    /// There were no more images than a stream may name.
    pub(super) complete: bool,
}

impl Stream {
    /// A stream that may name `most_ids`.
    pub(super) fn new(followed: Followed, most_ids: usize) -> Stream {
        let most = most_ids.saturating_mul(PENDING);
        Stream { followed, most, pending: Mutex::default(), ready: Notify::new() }
    }

    /// The prefix, if the stream follows one.
    pub(super) fn prefix(&self) -> Option<&str> {
        match &self.followed {
            Followed::Ids(_) => None,
            Followed::Prefix(prefix) => Some(prefix),
        }
    }

    /// Notes that the state of an image may have to be sent.
    pub(super) fn add(&self, id: &ImageId) {
        let mut pending = self.lock();
        if pending.ids.len() >= self.most {
            pending.overrun = true;
        } else if pending.ids.insert(id.clone()) {
            pending.order.push_back(Due::Image(id.clone()));
        }
        drop(pending);
        self.ready.notify_one();
    }

    /// Notes that every image that the stream follows may have changed. A listing must begin after this.
    pub(super) fn add_everything(&self) {
        let mut pending = self.lock();
        pending.everything = true;
        pending.listing += 1;
        drop(pending);
        self.ready.notify_one();
    }

    /// Number of a listing that begins now.
    pub(super) fn begin_listing(&self) -> u64 {
        self.lock().listing
    }

    /// Notes that a listing has ended. Its images were added before.
    pub(super) fn end_listing(&self, number: u64, complete: bool) {
        let mut pending = self.lock();
        if pending.order.len() > pending.ids.len() {
            // The client reads slowly: the end of an earlier one is still due.
            pending.order.retain(|due| matches!(due, Due::Image(_)));
        }
        pending.order.push_back(Due::Listed(Listing { number, complete }));
        drop(pending);
        self.ready.notify_one();
    }

    /// Waits until something may be due.
    pub(super) fn ready(&self) -> Notified<'_> {
        self.ready.notified()
    }

    /// True once more ids were pending than the stream may hold.
    pub(super) fn is_overrun(&self) -> bool {
        self.lock().overrun
    }

    /// Makes every followed and every `sent` id due, if all of them may have changed; returns true then.
    pub(super) fn expand_everything<'a>(&'a self, sent: impl Iterator<Item = &'a ImageId>) -> bool {
        let mut pending = self.lock();
        let everything = std::mem::take(&mut pending.everything);
        if everything {
            let named = match &self.followed {
                Followed::Ids(ids) => Some(ids),
                Followed::Prefix(_) => None,
            };
            for id in named.into_iter().flatten().chain(sent) {
                if pending.ids.insert(id.clone()) {
                    pending.order.push_back(Due::Image(id.clone()));
                }
            }
        }
        everything
    }

    /// Takes what has been due longest, unless everything may have changed since [`Stream::expand_everything`].
    pub(super) fn pop(&self) -> Option<Due> {
        let mut pending = self.lock();
        while !pending.everything {
            match pending.order.pop_front()? {
                Due::Image(id) => {
                    pending.ids.remove(&id);
                    return Some(Due::Image(id));
                }
                Due::Listed(listing) if listing.number == pending.listing => {
                    return Some(Due::Listed(listing));
                }
                Due::Listed(_outdated) => {}
            }
        }
        None
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

    #[test]
    fn a_listing_that_began_before_everything_changed_does_not_count() {
        let stream = Stream::new(Followed::Prefix("a".to_owned()), 10);
        let early = stream.begin_listing();
        stream.add(&id("a1"));
        stream.add_everything();
        stream.end_listing(early, true);
        let late = stream.begin_listing();
        stream.add(&id("a2"));
        stream.end_listing(late, true);
        // Nothing is taken before all that was sent is due.
        assert_eq!(stream.pop(), None);
        assert!(stream.expand_everything([id("a0")].iter()));
        let due = std::iter::from_fn(|| stream.pop());
        let images = ["a1", "a2", "a0"].map(|it| Due::Image(id(it)));
        let end = Due::Listed(Listing { number: late, complete: true });
        let expected = [images[0].clone(), images[1].clone(), end, images[2].clone()];
        assert_eq!(due.collect::<Vec<_>>(), expected);
    }

    #[test]
    fn listings_do_not_accumulate_while_a_client_reads_nothing() {
        let stream = Stream::new(Followed::Prefix("a".to_owned()), 10);
        for _ in 0..100 {
            stream.add_everything();
            let number = stream.begin_listing();
            stream.add(&id("a"));
            stream.end_listing(number, true);
        }
        assert_eq!(stream.lock().order.len(), 2);
    }
}
