//! One stream of events: the ids that it may have to send, and the next event.

use std::collections::{HashSet, VecDeque};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use lru::LruCache;
use tokio::sync::{Notify, Semaphore};

use super::content::{Encode, EventMaker, Inline, Unknown};
use super::hub::{Followed, Hub, RETRY};
use crate::image::{ImageId, Version};
use crate::metrics::{Metrics, Shed};
use crate::read::Reader;
use crate::settings::Settings;
use crate::task::Task;

/// Most states that are read at the same time. After an outage all streams want to read theirs.
const READS: usize = 64;

/// Most ids that may be pending on a stream, for each that it may name. A stream with more is closed; its client comes
/// back.
const PENDING: usize = 100;

/// Opens streams, and makes their events.
#[derive(Debug)]
pub struct Events {
    shared: Arc<Shared>,
    heartbeat: Duration,
    /// Most ids that one stream may name.
    most_ids: NonZeroUsize,
    most_streams: usize,
    #[expect(dead_code, reason = "held for its tasks")]
    tasks: [Task; 2],
}

#[derive(Debug)]
struct Shared {
    hub: Arc<Hub>,
    maker: Arc<EventMaker>,
    reading: Semaphore,
    metrics: Arc<Metrics>,
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

/// The limit on open streams is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} event streams are open ([events] connections)")]
pub struct TooMany(usize);

impl Events {
    /// Starts the tasks of a hub. They end when this is dropped.
    #[must_use]
    pub fn start(
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
        let shared = Shared {
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
    pub fn heartbeat(&self) -> Duration {
        self.heartbeat
    }

    /// Most ids that one stream may name.
    #[must_use]
    pub fn most_ids(&self) -> usize {
        self.most_ids.get()
    }

    /// Opens a stream. It begins with the state of every image that it follows; with a prefix, of no more images than a
    /// stream may name.
    pub fn subscribe(&self, followed: Followed, inline: Inline) -> Result<Subscription, TooMany> {
        let stream = Arc::new(Stream {
            followed,
            most: self.most_ids.get().saturating_mul(PENDING),
            pending: Mutex::default(),
            ready: Notify::new(),
        });
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
        })
    }
}

impl Stream {
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

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An open stream. It ends when this is dropped.
#[derive(Debug)]
pub struct Subscription {
    shared: Arc<Shared>,
    stream: Arc<Stream>,
    number: u64,
    inline: Inline,
    /// The id that is being read. It stays here meanwhile, so that [`Subscription::next`] may be cancelled.
    current: Option<ImageId>,
    /// Ids whose state couldn't be read.
    failed: Vec<ImageId>,
    /// When those are read again.
    retry: Option<Instant>,
    /// The version of each image that was sent last. An image that has left this is sent again when it may have changed.
    sent: LruCache<ImageId, Option<Version>>,
}

impl Subscription {
    /// The next event; `None` when the stream has to end. Safe to cancel: no event is lost.
    pub async fn next(&mut self) -> Option<Bytes> {
        loop {
            if self.stream.lock().overrun {
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
                        self.sent.put(id, event.version);
                        self.shared.metrics.events.inc();
                        return Some(event.text);
                    }
                    Ok(None) => {}
                    Err(Unknown) => {
                        self.failed.push(id);
                        self.retry.get_or_insert_with(|| Instant::now() + RETRY);
                    }
                }
            }
            let ready = self.stream.ready.notified();
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

    /// The next id to be read.
    fn take(&mut self) -> Option<ImageId> {
        let mut pending = self.stream.lock();
        if std::mem::take(&mut pending.everything) {
            let named = match &self.stream.followed {
                Followed::Ids(ids) => Some(ids),
                Followed::Prefix(_) => None,
            };
            let sent = self.sent.iter().map(|(id, _)| id);
            for id in named.into_iter().flatten().chain(sent) {
                if pending.ids.insert(id.clone()) {
                    pending.order.push_back(id.clone());
                }
            }
        }
        if self.current.is_none() {
            self.current = pending.order.pop_front();
            if let Some(id) = &self.current {
                pending.ids.remove(id);
            }
        }
        self.current.clone()
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.shared.metrics.event_streams.dec();
        self.shared.hub.remove(self.number);
    }
}
