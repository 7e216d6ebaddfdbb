//! Opens streams of events, and gives the next event of each.

use std::collections::{HashSet, VecDeque};
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use lru::LruCache;

#[cfg(not(all(test, feature = "shuttle")))]
use super::content::EventMaker;
use super::content::{Encode, Event, ImageState, Inline, Unknown};
use super::hub::{Hub, RETRY};
use super::listings::Listing;
use super::stream::{Followed, Stream};
#[cfg(all(test, feature = "shuttle"))]
use super::threads::EventMaker;
use crate::image::ImageId;
use crate::limit::{Place, Shares};
use crate::metrics::{Metrics, Shed};
use crate::peer::PeerKey;
use crate::read::Reader;
use crate::settings::Settings;
use crate::sync::time::timeout_at;
use crate::sync::{Semaphore, yield_now};
use crate::task::Task;

/// Most states that are read from the store at the same time. After an outage all streams want to read theirs.
const READS: usize = 64;

/// Most streams that make events of what is in memory at the same time. After a change of an image that all of them follow,
/// all want to; whoever else has a request waits behind these alone.
const TURNS: usize = 8;

/// Most events that a stream makes at once, and the bytes after which it makes no further one.
const MOST_EVENTS: usize = 16;
const MOST_BYTES: usize = 16 * 1024;

/// Most ids whose reading is tried again. A stream with more begins again.
const MOST_FAILED: usize = 256;

/// Opens streams, and makes their events.
#[derive(Debug)]
pub(crate) struct Events {
    shared: Arc<StreamParts>,
    heartbeat: Duration,
    /// Most ids that one stream may name.
    most_ids: NonZeroUsize,
    /// A place for each stream.
    places: Shares<PeerKey>,
    #[expect(dead_code, reason = "held for its tasks")]
    tasks: [Task; 2],
}

#[derive(Debug)]
struct StreamParts {
    hub: Arc<Hub>,
    maker: Arc<EventMaker>,
    reading: Semaphore,
    turns: Semaphore,
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
            let (hub, reader) = (Arc::clone(hub), Arc::clone(reader));
            async move { hub.list(&*reader.store, &reader.index, most_ids.get()).await }
        };
        let shared = StreamParts {
            hub: Arc::clone(hub),
            maker: Arc::new(EventMaker::new(Arc::clone(reader), encode, events.inline_bytes)),
            reading: Semaphore::new(READS),
            turns: Semaphore::new(TURNS),
            metrics: Arc::clone(&reader.metrics),
        };
        Events {
            shared: Arc::new(shared),
            heartbeat,
            most_ids,
            places: Shares::new(events.connections.get()),
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
    /// stream may name, and then the list of them. A stream of changes begins with nothing.
    pub(crate) fn subscribe(
        &self,
        client: PeerKey,
        followed: Followed,
        inline: Inline,
    ) -> Result<Subscription, TooMany> {
        let Ok(place) = self.places.try_take(Some(client)) else {
            self.shared.metrics.count_shed(Shed::Streams);
            return Err(TooMany(self.places.places()));
        };
        Ok(Subscription::new(place, &self.shared, followed, inline, self.most_ids))
    }
}

/// An open stream. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Subscription {
    _place: Place<PeerKey>,
    shared: Arc<StreamParts>,
    stream: Arc<Stream>,
    number: u64,
    inline: Inline,
    /// Ids that were taken from the stream, and are to be read.
    due: VecDeque<ImageId>,
    /// The next thing to be done. It stays here meanwhile, so that [`Subscription::next`] may be cancelled.
    current: Option<Due>,
    /// The listing whose images are being sent.
    telling: Option<Telling>,
    /// Ids whose state couldn't be read.
    failed: HashSet<ImageId>,
    /// The time at which those are read again.
    retry: Option<Instant>,
    /// The state of each image that was sent last. An image that has left this is sent again when it may have changed.
    sent: LruCache<ImageId, ImageState>,
    /// The images with the prefix, gathered for the next list.
    gathered: Option<Gathered>,
    /// The list that was sent last, if nothing was sent since.
    listed: Option<List>,
    /// Events that were made and not sent yet.
    made: VecDeque<Bytes>,
}

/// The next thing that a stream may have to send.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Due {
    /// The state of this image.
    Image(ImageId),
    /// The same, of an image that a listing found. If it is gone by now, the client needn't know.
    Listed(ImageId),
    /// The list: all images that the listing found, and all that changed meanwhile, were sent.
    List {
        /// There were no more images than a stream may name.
        complete: bool,
    },
    /// The client of a stream of changes must list the images again.
    Resync,
}

/// A listing whose images are being sent.
#[derive(Debug)]
struct Telling {
    listing: Arc<Listing>,
    /// Number of images that were told.
    told: usize,
    /// Position in the log at which the list is due.
    until: u64,
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

    fn list(self, complete: bool) -> List {
        let mut ids: Vec<ImageId> = self.ids.into_iter().collect();
        ids.sort_unstable_by(|a, b| a.as_str().cmp(b.as_str()));
        List { ids, complete: complete && !self.cut }
    }
}

impl List {
    /// True if a page that was sent the other list learns nothing from this one.
    fn adds_nothing_to(&self, other: &List) -> bool {
        self == other || !(self.complete || other.complete)
    }
}

impl Subscription {
    fn new(
        place: Place<PeerKey>,
        shared: &Arc<StreamParts>,
        followed: Followed,
        inline: Inline,
        most_ids: NonZeroUsize,
    ) -> Subscription {
        let stream = Arc::new(Stream::new(followed));
        let number = shared.hub.add(&stream);
        shared.metrics.event_streams.inc();
        Subscription {
            _place: place,
            shared: Arc::clone(shared),
            stream,
            number,
            inline,
            due: VecDeque::new(),
            current: None,
            telling: None,
            failed: HashSet::new(),
            retry: None,
            sent: LruCache::new(most_ids),
            gathered: None,
            listed: None,
            made: VecDeque::new(),
        }
    }

    /// A stream without the rest of the server. Gives its events from a maker that an exploration knows.
    #[cfg(all(test, feature = "shuttle"))]
    pub(super) fn explored(
        hub: &Arc<Hub>,
        maker: &Arc<EventMaker>,
        metrics: &Arc<Metrics>,
        followed: Followed,
    ) -> Subscription {
        let shared = Arc::new(StreamParts {
            hub: Arc::clone(hub),
            maker: Arc::clone(maker),
            reading: Semaphore::new(READS),
            turns: Semaphore::new(TURNS),
            metrics: Arc::clone(metrics),
        });
        let place = Shares::new(1).try_take(None).expect("a place is free");
        let most_ids = NonZeroUsize::new(8).expect("not zero");
        Subscription::new(place, &shared, followed, Inline::None, most_ids)
    }

    /// The numbers of ids that are held for it: by the stream, and here.
    #[cfg(all(test, feature = "shuttle"))]
    pub(super) fn held(&self) -> (usize, usize) {
        (self.stream.held(), self.due.len() + self.failed.len() + self.made.len())
    }

    /// The next event; `None` when the stream has to end. Safe to cancel: no event is lost.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(event) = self.made.pop_front() {
                return Some(event);
            }
            if self.has_due() {
                self.make().await?;
                continue;
            }
            let ready = self.stream.ready();
            match self.retry {
                None => ready.await,
                Some(retry) => {
                    if timeout_at(retry.into(), ready).await.is_err() {
                        self.retry();
                    }
                }
            }
        }
    }

    /// Makes the next events: those that need no waiting for, or one that does.
    async fn make(&mut self) -> Option<()> {
        let shared = Arc::clone(&self.shared);
        let turn = shared.turns.acquire().await.ok()?;
        // Others first. The turn is kept meanwhile: otherwise no stream would wait for one, and all would be in the queue.
        yield_now().await;
        let mut bytes = 0;
        for _ in 0..MOST_EVENTS {
            if !self.has_due() {
                break;
            }
            let Some(due) = self.current.clone() else { break };
            let event = match due {
                Due::Image(ref id) | Due::Listed(ref id) => {
                    let event = shared.maker.event(id, self.inline, self.sent.peek(id).copied());
                    let Some(event) = event.now_or_never() else { break };
                    self.current = None;
                    self.note(&due, event)
                }
                Due::List { complete } => {
                    self.current = None;
                    self.list(complete)
                }
                Due::Resync => {
                    self.current = None;
                    let prefix = self.stream.prefix().unwrap_or_default();
                    Some(self.shared.maker.resync(prefix))
                }
            };
            if let Some(event) = event {
                self.shared.metrics.events.inc();
                bytes += event.len();
                self.made.push_back(event);
            }
            if bytes >= MOST_BYTES {
                break;
            }
        }
        drop(turn);
        if self.made.is_empty()
            && let Some(due) = self.current.clone()
        {
            return self.make_slowly(&due).await;
        }
        Some(())
    }

    /// Makes an event whose image has to be read or rendered.
    async fn make_slowly(&mut self, due: &Due) -> Option<()> {
        let shared = Arc::clone(&self.shared);
        let (Due::Image(id) | Due::Listed(id)) = due else { return Some(()) };
        let _permit = shared.reading.acquire().await.ok()?;
        let event = shared.maker.event(id, self.inline, self.sent.peek(id).copied()).await;
        self.current = None;
        if let Some(event) = self.note(due, event) {
            self.shared.metrics.events.inc();
            self.made.push_back(event);
        }
        Some(())
    }

    /// Notes the state of an image. Gives its event, if it has to be sent.
    fn note(&mut self, due: &Due, event: Result<Option<Event>, Unknown>) -> Option<Bytes> {
        let (Due::Image(id) | Due::Listed(id)) = due else { return None };
        let is_listed = matches!(due, Due::Listed(_));
        match event {
            Ok(Some(event)) => {
                let is_present = event.state.is_present();
                self.gather(id, is_present);
                if is_listed && !is_present && !self.sent.contains(id) {
                    return None;
                }
                self.sent.put(id.clone(), event.state);
                self.listed = None;
                Some(event.text)
            }
            Ok(None) => {
                let present = self.sent.peek(id).is_some_and(|state| state.is_present());
                self.gather(id, present);
                None
            }
            Err(Unknown) => {
                // Perhaps it is there: it must not be taken for removed.
                self.gather(id, true);
                self.failed.insert(id.clone());
                self.retry.get_or_insert_with(|| Instant::now() + RETRY);
                None
            }
        }
    }

    /// Makes the ids due again whose state couldn't be read.
    fn retry(&mut self) {
        self.retry = None;
        if self.failed.len() > MOST_FAILED {
            self.failed = HashSet::new();
            self.shared.hub.start_over(self.number, &self.stream);
        } else {
            self.due.extend(self.failed.drain());
        }
    }

    /// Returns whether anything is due, which is `current` then.
    fn has_due(&mut self) -> bool {
        if self.stream.take_everything() {
            self.begin_again();
        }
        if self.current.is_none() {
            self.current = self.next_due();
        }
        self.current.is_some()
    }

    /// Makes every image due, each once. With a prefix these are the ones that were sent, before those of a new listing. A stream
    /// of changes forgets what it has sent: its client is about to learn newer states elsewhere.
    fn begin_again(&mut self) {
        let mut ids: HashSet<ImageId> = self.due.drain(..).collect();
        match &self.stream.followed {
            Followed::Ids(named) => ids.extend(named.iter().cloned()),
            Followed::Prefix(_) => {
                ids.extend(self.sent.iter().map(|(id, _)| id.clone()));
                self.gathered = Some(Gathered::new(self.sent.cap().get()));
                self.telling = None;
                if matches!(self.current, Some(Due::List { .. })) {
                    self.current = None;
                }
            }
            Followed::Changes(_) => {
                ids.clear();
                self.sent.clear();
                self.current = Some(Due::Resync);
            }
        }
        self.due.extend(ids);
    }

    fn next_due(&mut self) -> Option<Due> {
        loop {
            if let Some(id) = self.due.pop_front() {
                return Some(Due::Image(id));
            }
            let Some(prefix) = self.stream.prefix() else {
                return self.stream.pop().map(Due::Image);
            };
            let hub = &self.shared.hub;
            if self.telling.is_none()
                && let Some(listing) = self.stream.take_listing()
            {
                self.stream.note_change(listing.began);
                self.telling = Some(Telling { listing, told: 0, until: hub.log_end() });
            }
            if let Some(telling) = &mut self.telling {
                if let Some(id) = telling.listing.ids.get(telling.told) {
                    telling.told += 1;
                    return Some(Due::Listed(id.clone()));
                }
                if self.stream.since().is_none_or(|since| since >= telling.until) {
                    let complete = telling.listing.complete;
                    self.telling = None;
                    return Some(Due::List { complete });
                }
            }
            let from = self.stream.take_since()?;
            let Some(changes) = hub.changes(from, prefix) else {
                hub.start_over(self.number, &self.stream);
                return None;
            };
            self.due.extend(changes.ids);
            if let Some(next) = changes.next {
                self.stream.note_change(next);
            }
        }
    }

    fn gather(&mut self, id: &ImageId, present: bool) {
        if let Some(gathered) = &mut self.gathered {
            gathered.note(id, present);
        }
    }

    /// The event of a list; `None` if the page learns nothing from it.
    fn list(&mut self, complete: bool) -> Option<Bytes> {
        let list = self.gathered.take()?.list(complete);
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
