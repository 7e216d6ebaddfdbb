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
    order: VecDeque<ImageId>,
    /// The same ids, each once.
    ids: HashSet<ImageId>,
    /// Every image that the stream has sent may have changed.
    everything: bool,
    /// There were more ids than it may hold.
    overrun: bool,
}

impl Stream {
    /// A stream that may name `most_ids`.
    pub(super) fn new(followed: Followed, most_ids: usize) -> Stream {
        let most = most_ids.saturating_mul(PENDING);
        Stream { followed, most, pending: Mutex::default(), ready: Notify::new() }
    }

    /// Notes that the state of an image may have to be sent.
    pub(super) fn add(&self, id: &ImageId) {
        let mut pending = self.lock();
        if pending.ids.len() >= self.most {
            pending.overrun = true;
        } else if pending.ids.insert(id.clone()) {
            pending.order.push_back(id.clone());
        }
        drop(pending);
        self.ready.notify_one();
    }

    /// Notes that every image that the stream follows may have changed.
    pub(super) fn add_everything(&self) {
        self.lock().everything = true;
        self.ready.notify_one();
    }

    /// Waits until an id may be pending.
    pub(super) fn ready(&self) -> Notified<'_> {
        self.ready.notified()
    }

    /// True once more ids were pending than the stream may hold.
    pub(super) fn is_overrun(&self) -> bool {
        self.lock().overrun
    }

    /// Makes every followed and every `sent` id pending, if all of them may have changed.
    pub(super) fn expand_everything<'a>(&'a self, sent: impl Iterator<Item = &'a ImageId>) {
        let mut pending = self.lock();
        if std::mem::take(&mut pending.everything) {
            let named = match &self.followed {
                Followed::Ids(ids) => Some(ids),
                Followed::Prefix(_) => None,
            };
            for id in named.into_iter().flatten().chain(sent) {
                if pending.ids.insert(id.clone()) {
                    pending.order.push_back(id.clone());
                }
            }
        }
    }

    /// Takes the id that has been pending longest.
    pub(super) fn pop(&self) -> Option<ImageId> {
        let mut pending = self.lock();
        let id = pending.order.pop_front()?;
        pending.ids.remove(&id);
        Some(id)
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
