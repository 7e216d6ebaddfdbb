//! What browsers are told while images appear and change: the newest state of each image, to all who asked for it.
//!
//! ```text
//!   store ─ a changed ─▶ apply ─▶ dispatch ── a is pending ─▶ stream 1, 2, …
//!                                                               │ when its client has room
//!                                 which version is a now? ◀─────┘ another one than was sent: its event, made once
//!                                                                 for all who want it in the same way
//! ```
//!
//! A stream holds no events, only the ids whose state it may have to send, and nothing is kept of an image but which
//! version each stream was told last. So whoever is slow gets fewer events and the newest state of each image, nobody can
//! be told an older state after a newer one, and a connection that is made anew begins with the state of every image.

use std::collections::{HashMap, HashSet, VecDeque};
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use lru::LruCache;
use serde::Serialize;
use tokio::sync::{Notify, Semaphore};

use crate::app::App;
use crate::coalesce::Flights;
use crate::image::coding::AcceptedCodings;
use crate::image::preconditions::Preconditions;
use crate::image::variant::Transform;
use crate::image::{ImageId, MediaType, Representation, Version};
use crate::metrics::Shed;
use crate::picture::PictureError;
use crate::read::{self, AnswerContent, ImageRequest, ReadError, Want};
use crate::render::RenderError;
use crate::settings::Settings;
use crate::store::{Change, Coherence, Cursor, StoreError};
use crate::task::Task;

/// How many states are looked at at the same time: after an outage all of them are.
const READS: usize = 64;

/// How soon it is tried again what failed.
const AGAIN: Duration = Duration::from_secs(1);

/// Events that are kept for those who want the same, in bytes of all of them.
const KEPT_BYTES: usize = 16 * 1024 * 1024;

/// How many ids may be pending on a stream for each that it may name. One with more is closed, and comes back.
const PENDING: usize = 100;

/// How much of an image stands in its events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Inline {
    /// Addresses alone.
    None,
    /// The thumbnail.
    Thumbnail,
    /// The thumbnail and, if it isn't too large, the image.
    Full,
}

impl Inline {
    /// As it stands in an address.
    #[must_use]
    pub fn named(name: &str) -> Option<Inline> {
        match name {
            "none" => Some(Inline::None),
            "thumbnail" => Some(Inline::Thumbnail),
            "full" => Some(Inline::Full),
            _ => None,
        }
    }
}

/// Which images a stream is told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// These.
    Ids(HashSet<ImageId>),
    /// Those whose id begins with this text.
    Prefix(String),
}

/// Everybody who is told, and what they wait for.
#[derive(Debug)]
pub struct Hub {
    told: Mutex<Told>,
    /// Rung when something has changed.
    changed: Arc<Notify>,
    /// Rung when a stream waits to be told what is there already.
    unlisted: Arc<Notify>,
    reading: Semaphore,
    making: Arc<Flights<EventKey, Result<Event, Unknown>>>,
    kept: Mutex<EventCache>,
    /// How many ids one stream may name.
    ids: NonZeroUsize,
    streams: usize,
    inline_bytes: usize,
    heartbeat: Duration,
    tasks: OnceLock<[Task; 2]>,
}

/// Who follows what.
#[derive(Debug, Default)]
struct Told {
    streams: HashMap<u64, Arc<Stream>>,
    by_id: HashMap<ImageId, HashSet<u64>>,
    by_prefix: HashMap<String, HashSet<u64>>,
    next_stream: u64,
    /// Ids that somebody follows and that have changed.
    changed: HashSet<ImageId>,
    /// Any of them may have.
    everything: bool,
    /// Streams with a prefix that wait for a listing.
    unlisted: HashSet<u64>,
}

/// One client.
#[derive(Debug)]
struct Stream {
    inline: Inline,
    wanted: Wanted,
    most: usize,
    pending: Mutex<Pending>,
    ready: Notify,
}

/// What a stream may have to send.
#[derive(Debug, Default)]
struct Pending {
    order: VecDeque<ImageId>,
    /// The same, each once.
    ids: HashSet<ImageId>,
    /// All that it was told may have changed.
    everything: bool,
    /// There was more than it may hold.
    overrun: bool,
}

/// An event, with the version that it tells of; none where there is no image.
#[derive(Debug, Clone)]
struct Event {
    version: Option<Version>,
    text: Bytes,
}

/// It can't be said now what there is under an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Unknown;

/// What an event is made for. It says the same whenever it is made.
type EventKey = (ImageId, Version, Inline);

/// Events that were made, the least recently sent leaving first.
#[derive(Debug)]
struct EventCache {
    events: LruCache<EventKey, Bytes>,
    bytes: usize,
}

/// As many streams are open as may be (`[events] connections`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} event streams are open ([events] connections)")]
pub struct TooMany(usize);

impl Hub {
    /// One that nobody listens to yet.
    #[must_use]
    pub fn new(settings: &Settings) -> Hub {
        let events = &settings.events;
        Hub {
            told: Mutex::default(),
            changed: Arc::default(),
            unlisted: Arc::default(),
            reading: Semaphore::new(READS),
            making: Arc::default(),
            kept: Mutex::new(EventCache { events: LruCache::unbounded(), bytes: 0 }),
            ids: events.ids,
            streams: events.connections.get(),
            inline_bytes: events.inline_bytes,
            // An idle stream must not look like one whose client takes nothing.
            heartbeat: events.heartbeat.min(settings.http.send_timeout / 2),
            tasks: OnceLock::new(),
        }
    }

    /// Begins to tell what changes in an app, which owns this.
    pub fn start(&self, app: &Arc<App>) {
        let dispatch = dispatch(Arc::downgrade(app), Arc::clone(&self.changed));
        let list = list(Arc::downgrade(app), Arc::clone(&self.unlisted));
        // Whoever starts it twice has it once all the same.
        let _ = self.tasks.set([Task::start("events", dispatch), Task::start("event list", list)]);
    }

    /// How often an idle stream gets a sign of life.
    #[must_use]
    pub fn heartbeat(&self) -> Duration {
        self.heartbeat
    }

    /// How many ids one stream may name.
    #[must_use]
    pub fn most_ids(&self) -> usize {
        self.ids.get()
    }

    /// Takes note of what the store says. It is called where pushes come in, so the work is done elsewhere.
    pub fn apply(&self, change: &Change) {
        let mut told = self.told();
        match change {
            Change::Invalidated(id) if told.is_followed(id) => {
                told.changed.insert(id.clone());
            }
            Change::Flushed
            | Change::TrackingStarted { .. }
            | Change::TrackingLost { .. }
            | Change::Probed(_)
                if !told.streams.is_empty() =>
            {
                told.everything = true;
            }
            _ => return,
        }
        drop(told);
        self.changed.notify_one();
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kept(&self) -> MutexGuard<'_, EventCache> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Told {
    fn is_followed(&self, id: &ImageId) -> bool {
        self.by_id.contains_key(id) || self.prefixed(id).next().is_some()
    }

    /// The streams that follow all ids with a beginning that this one has.
    fn prefixed(&self, id: &ImageId) -> impl Iterator<Item = &u64> {
        let id = id.as_str();
        let lengths = if self.by_prefix.is_empty() { 0..0 } else { 0..id.len() + 1 };
        lengths.filter_map(move |length| self.by_prefix.get(&id[..length])).flatten()
    }

    /// The streams that follow an id.
    fn following(&self, id: &ImageId) -> Vec<Arc<Stream>> {
        let named = self.by_id.get(id).into_iter().flatten();
        let numbers = named.chain(self.prefixed(id));
        numbers.filter_map(|number| self.streams.get(number)).map(Arc::clone).collect()
    }
}

impl Stream {
    /// The state of an image may have to be sent.
    fn add(&self, id: &ImageId) {
        let mut pending = self.lock();
        if pending.ids.len() >= self.most {
            pending.overrun = true;
        } else if pending.ids.insert(id.clone()) {
            pending.order.push_back(id.clone());
        }
        drop(pending);
        self.ready.notify_one();
    }

    /// All that it was told may have changed.
    fn add_everything(&self) {
        self.lock().everything = true;
        self.ready.notify_one();
    }

    fn lock(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl EventCache {
    fn get(&mut self, key: &EventKey) -> Option<Bytes> {
        self.events.get(key).cloned()
    }

    fn put(&mut self, key: EventKey, event: Bytes) {
        self.bytes += event.len();
        if let Some((_, old)) = self.events.push(key, event) {
            self.bytes -= old.len();
        }
        while self.bytes > KEPT_BYTES {
            let Some((_, old)) = self.events.pop_lru() else { break };
            self.bytes -= old.len();
        }
    }
}

/// A place among those who are told, which is left when it is dropped.
#[derive(Debug)]
pub struct Subscription {
    app: Arc<App>,
    stream: Arc<Stream>,
    number: u64,
    /// The id that is being looked at. It stays here while somebody waits, so that waiting may be cancelled.
    current: Option<ImageId>,
    /// Ids of which nothing could be said, and when that is tried again.
    failed: Vec<ImageId>,
    again: Option<Instant>,
    /// What was told last of each image. One that has left is told again when it may have changed.
    sent: LruCache<ImageId, Option<Version>>,
}

impl Subscription {
    /// Opens a stream. It begins with the state of every image that is wanted; of those with a prefix, of no more than
    /// a stream may name.
    pub fn open(app: &Arc<App>, wanted: Wanted, inline: Inline) -> Result<Subscription, TooMany> {
        let hub = &app.events;
        let mut told = hub.told();
        if told.streams.len() >= hub.streams {
            drop(told);
            app.metrics.count_shed(Shed::Streams);
            return Err(TooMany(hub.streams));
        }
        let number = told.next_stream;
        told.next_stream += 1;
        let most = hub.ids.get().saturating_mul(PENDING);
        let (pending, ready) = (Mutex::default(), Notify::new());
        let stream = Arc::new(Stream { inline, wanted, most, pending, ready });
        told.streams.insert(number, Arc::clone(&stream));
        match &stream.wanted {
            Wanted::Ids(ids) => {
                for id in ids {
                    told.by_id.entry(id.clone()).or_default().insert(number);
                    stream.add(id);
                }
            }
            Wanted::Prefix(prefix) => {
                told.by_prefix.entry(prefix.clone()).or_default().insert(number);
                told.unlisted.insert(number);
                hub.unlisted.notify_one();
            }
        }
        drop(told);
        app.metrics.event_streams.inc();
        let sent = LruCache::new(hub.ids);
        let (app, current, failed, again) = (Arc::clone(app), None, Vec::new(), None);
        Ok(Subscription { app, stream, number, current, failed, again, sent })
    }

    /// The next event, whenever there is one; nothing where the stream has to end. May be cancelled: nothing is lost.
    pub async fn next(&mut self) -> Option<Bytes> {
        loop {
            if self.stream.lock().overrun {
                return None;
            }
            while let Some(id) = self.take() {
                match self.state(&id).await {
                    Ok(Some(event)) => {
                        self.current = None;
                        self.sent.put(id, event.version);
                        self.app.metrics.events.inc();
                        return Some(event.text);
                    }
                    Ok(None) => self.current = None,
                    Err(Unknown) => {
                        self.current = None;
                        self.failed.push(id);
                        self.again.get_or_insert_with(|| Instant::now() + AGAIN);
                    }
                }
            }
            let ready = self.stream.ready.notified();
            match self.again {
                None => ready.await,
                Some(again) => {
                    if tokio::time::timeout_at(again.into(), ready).await.is_err() {
                        self.again = None;
                        self.failed.drain(..).for_each(|id| self.stream.add(&id));
                    }
                }
            }
        }
    }

    /// The next id to be looked at.
    fn take(&mut self) -> Option<ImageId> {
        let mut pending = self.stream.lock();
        if std::mem::take(&mut pending.everything) {
            let named = match &self.stream.wanted {
                Wanted::Ids(ids) => Some(ids),
                Wanted::Prefix(_) => None,
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

    /// What there is to be told of an image, if it isn't what was told already.
    async fn state(&self, id: &ImageId) -> Result<Option<Event>, Unknown> {
        let hub = &self.app.events;
        let _permit = hub.reading.acquire().await.map_err(|_closed| Unknown)?;
        let version = version(&self.app, id).await?;
        if self.sent.peek(id) == Some(&version) {
            return Ok(None);
        }
        let Some(version) = version else {
            return Ok(Some(absent(id)));
        };
        let key = (id.clone(), version, self.stream.inline);
        if let Some(text) = hub.kept().get(&key) {
            return Ok(Some(Event { version: Some(version), text }));
        }
        let (making, _joined) = hub.making.join(key.clone(), || {
            let app = Arc::clone(&self.app);
            async move { make(&app, key).await }
        });
        making.outcome().await.map_err(|_lost| Unknown)?.map(Some)
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.app.metrics.event_streams.dec();
        let mut told = self.app.events.told();
        told.streams.remove(&self.number);
        told.unlisted.remove(&self.number);
        let leave = |followers: &mut HashSet<u64>| {
            followers.remove(&self.number);
            followers.is_empty()
        };
        match &self.stream.wanted {
            Wanted::Ids(ids) => {
                for id in ids {
                    if told.by_id.get_mut(id).is_some_and(leave) {
                        told.by_id.remove(id);
                    }
                }
            }
            Wanted::Prefix(prefix) => {
                if told.by_prefix.get_mut(prefix).is_some_and(leave) {
                    told.by_prefix.remove(prefix);
                }
            }
        }
    }
}

/// Hands on what changed to who follows it, for as long as the app lives.
async fn dispatch(app: Weak<App>, changed: Arc<Notify>) {
    let mut polled = Instant::now();
    loop {
        // The app owns this task, so it isn't held meanwhile.
        let _ = tokio::time::timeout(AGAIN, changed.notified()).await;
        let Some(app) = app.upgrade() else { return };
        let hub = &app.events;
        // While nobody tells of changes, they are looked for.
        let unverified = matches!(app.index.coherence(), Coherence::Unverified(_));
        let poll = unverified && polled.elapsed() >= hub.heartbeat;
        if poll {
            polled = Instant::now();
        }
        let mut told = hub.told();
        let changed = std::mem::take(&mut told.changed);
        let following: Vec<_> = changed.into_iter().map(|id| (told.following(&id), id)).collect();
        let everybody: Vec<Arc<Stream>> = if std::mem::take(&mut told.everything) || poll {
            let prefixed: Vec<u64> = told.by_prefix.values().flatten().copied().collect();
            told.unlisted.extend(prefixed);
            hub.unlisted.notify_one();
            told.streams.values().map(Arc::clone).collect()
        } else {
            Vec::new()
        };
        drop(told);
        for (streams, id) in following {
            for stream in streams {
                stream.add(&id);
            }
        }
        for stream in everybody {
            stream.add_everything();
        }
    }
}

/// Tells streams with a prefix what is there already: all that wait for it by one look at the keys of the store, which
/// is slow where there are many.
async fn list(app: Weak<App>, unlisted: Arc<Notify>) {
    loop {
        let _ = tokio::time::timeout(AGAIN, unlisted.notified()).await;
        let Some(app) = app.upgrade() else { return };
        let waiting: HashMap<u64, Arc<Stream>> = {
            let mut told = app.events.told();
            let unlisted = std::mem::take(&mut told.unlisted);
            let stream = |number| Some((number, Arc::clone(told.streams.get(&number)?)));
            unlisted.into_iter().filter_map(stream).collect()
        };
        if waiting.is_empty() {
            continue;
        }
        let streams: Vec<&Arc<Stream>> = waiting.values().collect();
        if let Err(error) = list_for(&app, &streams).await {
            tracing::debug!(%error, "images with a prefix can't be listed yet");
            // Those that have left are passed over.
            app.events.told().unlisted.extend(waiting.keys());
            tokio::time::sleep(AGAIN).await;
        }
    }
}

async fn list_for(app: &App, streams: &[&Arc<Stream>]) -> Result<(), StoreError> {
    let prefix = |stream: &Arc<Stream>| match &stream.wanted {
        Wanted::Prefix(prefix) => prefix.clone(),
        Wanted::Ids(_) => String::new(),
    };
    let mut waiting: Vec<(String, &Arc<Stream>, usize)> =
        streams.iter().map(|it| (prefix(it), *it, app.events.ids.get())).collect();
    let common = waiting.iter().map(|(prefix, ..)| prefix.as_str()).reduce(|common, prefix| {
        let same = common.bytes().zip(prefix.bytes()).take_while(|(a, b)| a == b).count();
        &common[..same]
    });
    let common = common.unwrap_or_default().to_owned();
    let mut from: Option<Cursor> = None;
    loop {
        let page = app.store.list(&common, from).await?;
        for id in &page.ids {
            for (prefix, stream, left) in &mut waiting {
                if *left > 0 && id.as_str().starts_with(prefix.as_str()) {
                    *left -= 1;
                    stream.add(id);
                }
            }
        }
        // Nobody waits any more: each has its fill, or has left.
        waiting.retain(|(_, stream, left)| *left > 0 && Arc::strong_count(stream) > 1);
        from = page.next;
        if from.is_none() || waiting.is_empty() {
            return Ok(());
        }
    }
}

/// The version that there is under an id, if there is an image.
async fn version(app: &Arc<App>, id: &ImageId) -> Result<Option<Version>, Unknown> {
    match ask(app, id, None, Want::Metadata).await {
        Ok((version, _)) => Ok(Some(version)),
        // There is nothing to show.
        Err(ReadError::Absent | ReadError::Corrupt(_)) => Ok(None),
        Err(error) => {
            tracing::debug!(image.id = %id, %error, "the state of an image can't be told");
            Err(Unknown)
        }
    }
}

/// The version of an image, and its bytes where they are wanted.
async fn ask(
    app: &Arc<App>,
    id: &ImageId,
    asked: Option<Transform>,
    want: Want,
) -> Result<(Version, Option<Representation>), ReadError> {
    let request = ImageRequest {
        id: id.clone(),
        want,
        preconditions: Preconditions::default(),
        accepts: AcceptedCodings::UNSAID,
        asked,
    };
    let answer = read::image(app, request).await.map_err(|failure| failure.error)?;
    Ok(match answer.content {
        AnswerContent::Image(it) => (it.metadata.version, Some(it)),
        AnswerContent::Metadata(metadata)
        | AnswerContent::NotModified(metadata)
        | AnswerContent::PreconditionFailed(metadata) => (metadata.version, None),
        AnswerContent::Redirect(remote) => (remote.version, None),
    })
}

/// The event of a version, or of the one that has taken its place meanwhile.
async fn make(app: &Arc<App>, (id, _, inline): EventKey) -> Result<Event, Unknown> {
    let (version, data) = match parts(app, &id, inline).await {
        Ok(parts) => parts.ok_or(Unknown)?,
        Err(ReadError::Absent | ReadError::Corrupt(_)) => return Ok(absent(&id)),
        Err(error) => {
            tracing::debug!(image.id = %id, %error, "the event of an image can't be made");
            return Err(Unknown);
        }
    };
    let text = text("concept_progress", Some(version), data);
    app.events.kept().put((id, version, inline), text.clone());
    Ok(Event { version: Some(version), text })
}

/// What an event says, if its parts are of one version.
async fn parts(
    app: &Arc<App>,
    id: &ImageId,
    inline: Inline,
) -> Result<Option<(Version, ConceptProgress)>, ReadError> {
    let progress = |version, thumbnail, image_data| ConceptProgress {
        concept_id: id.as_str().to_owned(),
        full: format!("/images/{id}?v={version}"),
        thumbnail,
        image_data,
    };
    if inline == Inline::None {
        let (version, _) = ask(app, id, None, Want::Metadata).await?;
        let thumbnail = format!("/images/{id}/thumbnail?v={version}");
        return Ok(Some((version, progress(version, Some(thumbnail), None))));
    }
    let whole = match inline {
        Inline::Full => Some(ask(app, id, None, Want::BodyNoRedirect).await?),
        Inline::None | Inline::Thumbnail => None,
    };
    let thumbnail = match ask(app, id, Some(Transform::THUMBNAIL), Want::Body).await {
        Ok(thumbnail) => Some(thumbnail),
        // It takes too long now, and not for ever.
        Err(error @ ReadError::Render(RenderError::Picture(PictureError::TimedOut))) => {
            return Err(error);
        }
        // It has none, or can't be drawn.
        Err(ReadError::NotAcceptable(_) | ReadError::Render(RenderError::Picture(_))) => None,
        Err(error) => return Err(error),
    };
    let version = match (&whole, &thumbnail) {
        // It was replaced between the two.
        (Some((whole, _)), Some((thumbnail, _))) if whole != thumbnail => return Ok(None),
        (Some((version, _)), _) | (None, Some((version, _))) => *version,
        (None, None) => ask(app, id, None, Want::Metadata).await?.0,
    };
    let data_url = |it: &Representation| {
        let media_type: MediaType = it.metadata.media_type;
        format!("data:{};base64,{}", media_type.as_str(), STANDARD.encode(&it.body))
    };
    let small = |it: &Representation| it.body.len() <= app.events.inline_bytes;
    let image_data = whole.and_then(|(_, it)| it).filter(small).as_ref().map(data_url);
    let thumbnail = thumbnail.and_then(|(_, it)| it).as_ref().map(data_url);
    Ok(Some((version, progress(version, thumbnail, image_data))))
}

/// What an event says of an image.
#[derive(Serialize)]
struct ConceptProgress {
    concept_id: String,
    full: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    thumbnail: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image_data: Option<String>,
}

/// The event of an id without an image.
fn absent(id: &ImageId) -> Event {
    /// What it says.
    #[derive(Serialize)]
    struct Absent<'a> {
        concept_id: &'a str,
    }
    Event { version: None, text: text("concept_absent", None, Absent { concept_id: id.as_str() }) }
}

/// An event as it stands in a stream (HTML, §9.2.6).
fn text(name: &'static str, version: Option<Version>, data: impl Serialize) -> Bytes {
    #[derive(Serialize)]
    struct Message<T> {
        r#type: &'static str,
        data: T,
    }
    let json = serde_json::to_string(&Message { r#type: name, data }).expect("strings are JSON");
    // An empty one says that there is none.
    let id = version.map(|version| version.to_string()).unwrap_or_default();
    Bytes::from(format!("event: {name}\nid: {id}\ndata: {json}\n\n"))
}
