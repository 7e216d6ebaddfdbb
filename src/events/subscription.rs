//! Opens streams of events, and gives the next event of each.

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use lru::LruCache;
use tokio::sync::Semaphore;

use super::content::{Encode, EventMaker, Inline, Unknown};
use super::hub::{Hub, RETRY};
use super::stream::{Due, Followed, Listing, Stream};
use crate::image::{ImageId, Version};
use crate::metrics::{Metrics, Shed};
use crate::read::Reader;
use crate::settings::Settings;
use crate::task::Task;

/// Most states that are read at the same time. After an outage all streams want to read theirs.
const READS: usize = 64;

/// Opens streams, and makes their events.
#[derive(Debug)]
pub(crate) struct Events {
    shared: Arc<StreamParts>,
    heartbeat: Duration,
    /// Most ids that one stream may name.
    most_ids: NonZeroUsize,
    most_streams: usize,
    #[expect(dead_code, reason = "held for its tasks")]
    tasks: [Task; 2],
}

#[derive(Debug)]
struct StreamParts {
    hub: Arc<Hub>,
    maker: Arc<EventMaker>,
    reading: Semaphore,
    metrics: Arc<Metrics>,
}

/// The limit on open streams is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} event streams are open ([events] connections)")]
pub(crate) struct TooMany(usize);

impl Events {
    /// Starts the tasks of a hub. They end when this is dropped.
    #[must_use]
    pub(crate) fn start(
        hub: &Arc<Hub>,
        reader: &Arc<Reader>,
        encode: Encode,
        settings: &Settings,
    ) -> Events {
        let events = &settings.events;
        // An idle stream must not look like one whose client takes nothing.
        let heartbeat = events.heartbeat.min(settings.http.send_timeout / 2);
        let most_ids = events.ids;
        let dispatch = {
            let (hub, index) = (Arc::clone(hub), Arc::clone(&reader.index));
            async move { hub.dispatch(&index, heartbeat).await }
        };
        let list = {
            let (hub, store) = (Arc::clone(hub), Arc::clone(&reader.store));
            async move { hub.list(&store, most_ids.get()).await }
        };
        let shared = StreamParts {
            hub: Arc::clone(hub),
            maker: Arc::new(EventMaker::new(Arc::clone(reader), encode, events.inline_bytes)),
            reading: Semaphore::new(READS),
            metrics: Arc::clone(&reader.metrics),
        };
        Events {
            shared: Arc::new(shared),
            heartbeat,
            most_ids,
            most_streams: events.connections.get(),
            tasks: [Task::start("events", dispatch), Task::start("event list", list)],
        }
    }

    /// Longest time between two signs of life on an idle stream.
    #[must_use]
    pub(crate) fn heartbeat(&self) -> Duration {
        self.heartbeat
    }

    /// Most ids that one stream may name.
    #[must_use]
    pub(crate) fn most_ids(&self) -> usize {
        self.most_ids.get()
    }

    /// Opens a stream. It begins with the state of every image that it follows; with a prefix, of no more images than a
    /// stream may name, and then the list of them.
    pub(crate) fn subscribe(
        &self,
        followed: Followed,
        inline: Inline,
    ) -> Result<Subscription, TooMany> {
        let most_ids = self.most_ids.get();
        let stream = Arc::new(Stream::new(followed, most_ids));
        let listed = stream.prefix().map(|_| Gathered::new(most_ids));
        let Some(number) = self.shared.hub.add(&stream, self.most_streams) else {
            self.shared.metrics.count_shed(Shed::Streams);
            return Err(TooMany(self.most_streams));
        };
        self.shared.metrics.event_streams.inc();
        Ok(Subscription {
            shared: Arc::clone(&self.shared),
            stream,
            number,
            inline,
            current: None,
            failed: Vec::new(),
            retry: None,
            sent: LruCache::new(self.most_ids),
            gathered: listed,
            listing: None,
            listed: None,
        })
    }
}

/// An open stream. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Subscription {
    shared: Arc<StreamParts>,
    stream: Arc<Stream>,
    number: u64,
    inline: Inline,
    /// The id that is being read. It stays here meanwhile, so that [`Subscription::next`] may be cancelled.
    current: Option<ImageId>,
    /// Ids whose state couldn't be read.
    failed: Vec<ImageId>,
    /// The time at which those are read again.
    retry: Option<Instant>,
    /// The version of each image that was sent last. An image that has left this is sent again when it may have changed.
    sent: LruCache<ImageId, Option<Version>>,
    /// The images with the prefix, gathered for the next list.
    gathered: Option<Gathered>,
    /// The listing whose list is to be sent next.
    listing: Option<Listing>,
    /// The list that was sent last, if nothing was sent since.
    listed: Option<List>,
}

/// The images with a prefix that were there when they were last read, since everything may have changed.
///
/// All that a listing finds are read, and all that change meanwhile. So once the listing has ended and they are read, these
/// are all that there are: a page may drop every other one. That is how it learns of removals that it missed. An image that
/// can't be read may be there, and is among them.
#[derive(Debug)]
struct Gathered {
    ids: HashSet<ImageId>,
    /// Most ids that are gathered.
    most: usize,
    /// There were more.
    cut: bool,
}

/// Images with a prefix, in order.
#[derive(Debug, PartialEq, Eq)]
struct List {
    ids: Vec<ImageId>,
    complete: bool,
}

impl Gathered {
    fn new(most: usize) -> Gathered {
        Gathered { ids: HashSet::new(), most, cut: false }
    }

    fn note(&mut self, id: &ImageId, present: bool) {
        if !present {
            self.ids.remove(id);
        } else if self.ids.len() < self.most || self.ids.contains(id) {
            self.ids.insert(id.clone());
        } else {
            self.cut = true;
        }
    }

    fn list(self, listing: Listing) -> List {
        let mut ids: Vec<ImageId> = self.ids.into_iter().collect();
        ids.sort_unstable_by(|a, b| a.as_str().cmp(b.as_str()));
        List { ids, complete: listing.complete && !self.cut }
    }
}

impl List {
    /// True if a page that was sent the other list learns nothing from this one.
    fn adds_nothing_to(&self, other: &List) -> bool {
        self == other || !(self.complete || other.complete)
    }
}

impl Subscription {
    /// The next event; `None` when the stream has to end. Safe to cancel: no event is lost.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        loop {
            if self.stream.is_overrun() {
                return None;
            }
            while let Some(id) = self.take() {
                let event = {
                    let _permit = self.shared.reading.acquire().await.ok()?;
                    let sent = self.sent.peek(&id);
                    self.shared.maker.event(&id, self.inline, sent).await
                };
                self.current = None;
                match event {
                    Ok(Some(event)) => {
                        self.gather(&id, event.version.is_some());
                        self.sent.put(id, event.version);
                        self.listed = None;
                        self.shared.metrics.events.inc();
                        return Some(event.text);
                    }
                    Ok(None) => {
                        let present = self.sent.peek(&id).is_some_and(Option::is_some);
                        self.gather(&id, present);
                    }
                    Err(Unknown) => {
                        // Perhaps it is there: it must not be taken for removed.
                        self.gather(&id, true);
                        self.failed.push(id);
                        self.retry.get_or_insert_with(|| Instant::now() + RETRY);
                    }
                }
            }
            if let Some(listing) = self.listing.take() {
                let Some(list) = self.list(listing) else { continue };
                self.shared.metrics.events.inc();
                return Some(list);
            }
            let ready = self.stream.ready();
            match self.retry {
                None => ready.await,
                Some(retry) => {
                    if tokio::time::timeout_at(retry.into(), ready).await.is_err() {
                        self.retry = None;
                        self.failed.drain(..).for_each(|id| self.stream.add(&id));
                    }
                }
            }
        }
    }

    /// The next id to be read; `None` if none is due, or a list.
    fn take(&mut self) -> Option<ImageId> {
        let sent = self.sent.iter().map(|(id, _)| id);
        if self.stream.expand_everything(sent) && self.stream.prefix().is_some() {
            self.gathered = Some(Gathered::new(self.sent.cap().get()));
            self.listing = None;
        }
        if self.current.is_none() && self.listing.is_none() {
            match self.stream.pop()? {
                Due::Image(id) => self.current = Some(id),
                Due::Listed(listing) => self.listing = Some(listing),
            }
        }
        self.current.clone()
    }

    fn gather(&mut self, id: &ImageId, present: bool) {
        if let Some(gathered) = &mut self.gathered {
            gathered.note(id, present);
        }
    }

    /// The event of a list; `None` if the page learns nothing from it.
    fn list(&mut self, listing: Listing) -> Option<Bytes> {
        let list = self.gathered.take()?.list(listing);
        let known = self.listed.as_ref().is_some_and(|listed| list.adds_nothing_to(listed));
        let event = (!known).then(|| {
            let prefix = self.stream.prefix().unwrap_or_default();
            self.shared.maker.list(prefix, list.complete, &list.ids)
        });
        self.listed = Some(list);
        event
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.shared.metrics.event_streams.dec();
        self.shared.hub.remove(self.number);
    }
}
