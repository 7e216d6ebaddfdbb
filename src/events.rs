//! What browsers are told while images appear and change: the newest state of each image, to all who asked for it.
//!
//! ```text
//!   store ─ a changed ─▶ hear ─▶ dispatch ─▶ refresh a ── read, encode once ──▶ state of a
//!                                                                                  │ a is pending
//!                        stream 1, 2, … ◀── when it has room: the state of a as it is then
//! ```
//!
//! A stream never holds events, only the ids whose state it has not sent yet. So whoever is slow gets fewer events and
//! the newest state of each image, and takes no memory for what was in between; and a connection that is made anew
//! begins with the state of every image, so that nothing is lost.

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
use crate::coding::AcceptedCodings;
use crate::image::{ImageId, Representation, Version};
use crate::preconditions::Preconditions;
use crate::read::{self, AnswerContent, ImageRequest, ReadError, Wants};
use crate::render::RenderError;
use crate::store::{Change, Coherence};
use crate::task::Task;
use crate::telemetry::Shed;
use crate::variant::Asked;

/// How many states are read at the same time: after an outage all of them are.
const READS: usize = 16;

/// How soon a state is read again that could not be.
const AGAIN: Duration = Duration::from_secs(1);

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
    const ALL: [Inline; 3] = [Inline::None, Inline::Thumbnail, Inline::Full];

    /// As it stands in an address.
    #[must_use]
    pub fn named(name: &str) -> Option<Inline> {
        let names = ["none", "thumbnail", "full"];
        names.into_iter().zip(Inline::ALL).find(|(it, _)| *it == name).map(|(_, inline)| inline)
    }
}

/// Which images a stream is told of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// These.
    Ids(Vec<ImageId>),
    /// Those whose id begins with this text.
    Prefix(String),
}

/// Everything that is told, and to whom.
#[derive(Debug)]
pub struct Hub {
    told: Mutex<Told>,
    /// Rung when something has changed.
    changed: Arc<Notify>,
    /// One permit for each state that is being read.
    reading: Semaphore,
    /// One permit, for the listing under way: the store looks at all of its keys for it.
    listing: Semaphore,
    /// How many ids one stream is told of.
    ids: NonZeroUsize,
    streams: usize,
    inline_bytes: usize,
    heartbeat: Duration,
    dispatcher: OnceLock<Task>,
}

#[derive(Debug, Default)]
struct Told {
    topics: HashMap<ImageId, Topic>,
    streams: HashMap<u64, Arc<Stream>>,
    next_stream: u64,
    /// Ids that somebody wants and that have changed.
    changed: HashSet<ImageId>,
    /// Ids whose state could not be read.
    failed: HashSet<ImageId>,
    /// Any of them may have.
    everything: bool,
}

/// One image and those who are told of it.
#[derive(Debug, Default)]
struct Topic {
    state: Option<Arc<State>>,
    streams: Vec<Arc<Stream>>,
    /// It is being read; and it has changed since that began.
    refreshing: bool,
    again: bool,
}

/// What there is under an id, and the event that says so, for each way in which somebody wants it.
#[derive(Debug)]
struct State {
    version: Option<Version>,
    events: HashMap<Inline, Bytes>,
}

/// One client.
#[derive(Debug)]
struct Stream {
    number: u64,
    inline: Inline,
    prefix: Option<String>,
    pending: Mutex<Pending>,
    ready: Notify,
}

/// The ids whose state has not been sent, each once.
#[derive(Debug, Default)]
struct Pending {
    order: VecDeque<ImageId>,
    ids: HashSet<ImageId>,
}

/// As many streams are open as may be (`[events] streams`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} event streams are open ([events] streams)")]
pub struct TooMany(usize);

impl Hub {
    /// One that nobody listens to yet.
    #[must_use]
    pub fn new(settings: &crate::settings::Settings) -> Hub {
        let events = &settings.events;
        // An idle stream must not look like one whose client takes nothing.
        let heartbeat = events.heartbeat.min(settings.http.send_timeout / 2);
        Hub {
            told: Mutex::default(),
            changed: Arc::default(),
            reading: Semaphore::new(READS),
            listing: Semaphore::new(1),
            ids: events.ids,
            streams: events.streams.get(),
            inline_bytes: events.inline_bytes,
            heartbeat,
            dispatcher: OnceLock::new(),
        }
    }

    /// Begins to tell what changes in an app, which owns this.
    pub fn start(&self, app: &Arc<App>) {
        let dispatch = dispatch(Arc::downgrade(app), Arc::clone(&self.changed));
        let dispatcher = Task::start("events", dispatch);
        // Whoever starts it twice has one dispatcher all the same.
        let _ = self.dispatcher.set(dispatcher);
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

    /// Takes note of what the store says. Doesn't block: the work is done elsewhere.
    pub fn hear(&self, change: &Change) {
        let mut told = self.told();
        match change {
            Change::Of(id) => {
                if !told.is_wanted(id) {
                    return;
                }
                told.changed.insert(id.clone());
            }
            Change::OfEverything
            | Change::Tracked { .. }
            | Change::Lost { .. }
            | Change::Reached(_) => {
                if told.streams.is_empty() {
                    return;
                }
                told.everything = true;
            }
            Change::Alive { .. } => return,
        }
        drop(told);
        self.changed.notify_one();
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a stream to those who are told of an image, and has its state read if nobody knows it yet.
    fn join(&self, app: &Arc<App>, id: &ImageId, stream: &Arc<Stream>) {
        let mut told = self.told();
        // It may have ended.
        if !told.streams.contains_key(&stream.number) {
            return;
        }
        let topic = told.topics.entry(id.clone()).or_default();
        if !topic.streams.iter().any(|it| Arc::ptr_eq(it, stream)) {
            topic.streams.push(Arc::clone(stream));
        }
        let known = topic.state.as_ref().is_some_and(|it| it.events.contains_key(&stream.inline));
        let refresh = !known && topic.begin_refreshing();
        drop(told);
        if known {
            stream.add(id);
        } else if refresh {
            tokio::spawn(refresh_topic(Arc::clone(app), id.clone()));
        }
    }

    /// Takes a stream from those who are told of an image.
    fn leave(&self, id: &ImageId, stream: &Arc<Stream>) {
        let mut told = self.told();
        if let Some(topic) = told.topics.get_mut(id) {
            topic.streams.retain(|it| !Arc::ptr_eq(it, stream));
            if topic.streams.is_empty() {
                told.topics.remove(id);
            }
        }
    }
}

impl Told {
    fn is_wanted(&self, id: &ImageId) -> bool {
        self.topics.contains_key(id) || self.prefixed(id).next().is_some()
    }

    /// The streams that want all ids with a beginning that this one has.
    fn prefixed(&self, id: &ImageId) -> impl Iterator<Item = &Arc<Stream>> {
        let wants = |stream: &&Arc<Stream>| {
            stream.prefix.as_ref().is_some_and(|prefix| id.as_str().starts_with(prefix))
        };
        self.streams.values().filter(wants)
    }
}

impl Topic {
    /// Whether it is to be read by whoever asks; otherwise whoever is reading it will do so again.
    fn begin_refreshing(&mut self) -> bool {
        self.again = self.refreshing;
        !std::mem::replace(&mut self.refreshing, true)
    }
}

impl Stream {
    /// The state of an image is to be sent.
    fn add(&self, id: &ImageId) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        if pending.ids.insert(id.clone()) {
            pending.order.push_back(id.clone());
        }
        drop(pending);
        self.ready.notify_one();
    }

    fn take(&self) -> Option<ImageId> {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        let id = pending.order.pop_front()?;
        pending.ids.remove(&id);
        Some(id)
    }
}

/// A place among those who are told, which is left when it is dropped.
#[derive(Debug)]
pub struct Subscription {
    app: Arc<App>,
    stream: Arc<Stream>,
    /// What was told last of each image.
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
        let (ids, prefix) = match wanted {
            Wanted::Ids(ids) => (ids, None),
            Wanted::Prefix(prefix) => (Vec::new(), Some(prefix)),
        };
        let number = told.next_stream;
        told.next_stream += 1;
        let (pending, ready) = (Mutex::default(), Notify::new());
        let stream = Arc::new(Stream { number, inline, prefix, pending, ready });
        told.streams.insert(number, Arc::clone(&stream));
        drop(told);
        app.metrics.event_streams.inc();
        let most = hub.ids.max(NonZeroUsize::new(ids.len()).unwrap_or(NonZeroUsize::MIN));
        let subscription = Subscription {
            app: Arc::clone(app),
            stream: Arc::clone(&stream),
            sent: LruCache::new(most),
        };
        for id in &ids {
            hub.join(app, id, &stream);
        }
        if stream.prefix.is_some() {
            tokio::spawn(list(Arc::clone(app), stream));
        }
        Ok(subscription)
    }

    /// The next event, whenever there is one. May be cancelled: nothing is lost.
    pub async fn next(&mut self) -> Bytes {
        loop {
            while let Some(id) = self.stream.take() {
                if let Some(event) = self.event(&id) {
                    self.app.metrics.events.inc();
                    return event;
                }
            }
            self.stream.ready.notified().await;
        }
    }

    /// What there is to be told of an image that wasn't.
    fn event(&mut self, id: &ImageId) -> Option<Bytes> {
        let hub = &self.app.events;
        let state = hub.told().topics.get(id)?.state.clone()?;
        if self.sent.get(id) == Some(&state.version) {
            return None;
        }
        let Some(event) = state.events.get(&self.stream.inline) else {
            // Read for others, before this one came.
            hub.join(&self.app, id, &self.stream);
            return None;
        };
        if let Some((old, _)) = self.sent.push(id.clone(), state.version)
            && old != *id
        {
            // It comes back when it changes.
            hub.leave(&old, &self.stream);
        }
        Some(event.clone())
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.app.metrics.event_streams.dec();
        let mut told = self.app.events.told();
        told.streams.remove(&self.stream.number);
        told.topics.retain(|_, topic| {
            topic.streams.retain(|it| !Arc::ptr_eq(it, &self.stream));
            !topic.streams.is_empty()
        });
    }
}

/// Adds the images with a stream's prefix that are there already.
async fn list(app: Arc<App>, stream: Arc<Stream>) {
    let (hub, Some(prefix)) = (&app.events, &stream.prefix) else { return };
    let Ok(_permit) = hub.listing.acquire().await else { return };
    let (mut from, mut left) = (None, hub.ids.get());
    loop {
        match app.store.list(prefix, from).await {
            Ok(page) => {
                for id in page.ids.iter().take(left) {
                    hub.join(&app, id, &stream);
                }
                left = left.saturating_sub(page.ids.len());
                from = page.next;
            }
            Err(error) => {
                // When the store is heard of again they are listed again.
                tracing::debug!(%error, "the images with a prefix can't be listed");
                return;
            }
        }
        if from.is_none() || left == 0 {
            return;
        }
    }
}

/// Has the state of what changed read, for as long as the app lives.
async fn dispatch(app: Weak<App>, changed: Arc<Notify>) {
    let mut polled = Instant::now();
    loop {
        // The app owns this task, so it isn't held meanwhile.
        let _ = tokio::time::timeout(AGAIN, changed.notified()).await;
        let Some(app) = app.upgrade() else { return };
        // While nobody tells of changes, they are looked for.
        let unverified = matches!(app.index.coherence(), Coherence::Unverified(_));
        let poll = unverified && polled.elapsed() >= app.events.heartbeat;
        if poll {
            polled = Instant::now();
        }
        refresh_what_changed(&app, poll);
    }
}

fn refresh_what_changed(app: &Arc<App>, poll: bool) {
    let mut told = app.events.told();
    let changed = std::mem::take(&mut told.changed);
    let failed = std::mem::take(&mut told.failed);
    let everything = std::mem::take(&mut told.everything) || poll;
    let mut joining: Vec<(ImageId, Arc<Stream>)> = Vec::new();
    for id in &changed {
        let new = |stream: &&Arc<Stream>| {
            let topic = told.topics.get(id);
            !topic.is_some_and(|topic| topic.streams.iter().any(|it| Arc::ptr_eq(it, stream)))
        };
        joining.extend(told.prefixed(id).filter(new).map(|it| (id.clone(), Arc::clone(it))));
    }
    let due: Vec<ImageId> = if everything {
        told.topics.keys().cloned().collect()
    } else {
        changed.union(&failed).cloned().collect()
    };
    let mut refreshing = Vec::new();
    for id in due {
        if told.topics.get_mut(&id).is_some_and(Topic::begin_refreshing) {
            refreshing.push(id);
        }
    }
    let listing: Vec<_> = if everything {
        told.streams.values().filter(|it| it.prefix.is_some()).map(Arc::clone).collect()
    } else {
        Vec::new()
    };
    drop(told);
    for id in refreshing {
        tokio::spawn(refresh_topic(Arc::clone(app), id));
    }
    for (id, stream) in joining {
        app.events.join(app, &id, &stream);
    }
    for stream in listing {
        tokio::spawn(list(Arc::clone(app), stream));
    }
}

/// Reads the state of an image, until it has not changed meanwhile, and tells all who want it. Ends by itself, within
/// the time-outs of the store and of renders.
async fn refresh_topic(app: Arc<App>, id: ImageId) {
    let hub = &app.events;
    loop {
        let Ok(_permit) = hub.reading.acquire().await else { return };
        let inlines = {
            let mut told = hub.told();
            let Some(topic) = told.topics.get_mut(&id) else { return };
            topic.again = false;
            let wanted = |inline: &Inline| topic.streams.iter().any(|it| it.inline == *inline);
            Inline::ALL.into_iter().filter(wanted).collect::<Vec<_>>()
        };
        let state = state(&app, &id, &inlines).await;
        let mut told = hub.told();
        let Some(topic) = told.topics.get_mut(&id) else { return };
        let failed = state.is_none();
        if let Some(state) = state {
            topic.state = Some(Arc::new(state));
        }
        let streams = topic.streams.clone();
        let done = !topic.again;
        if done {
            topic.refreshing = false;
            if failed {
                told.failed.insert(id.clone());
            }
        }
        drop(told);
        for stream in streams {
            stream.add(&id);
        }
        if done {
            return;
        }
    }
}

/// What there is under an id; nothing where it can't be said.
async fn state(app: &Arc<App>, id: &ImageId, inlines: &[Inline]) -> Option<State> {
    let parts = match parts(app, id, inlines.contains(&Inline::Full)).await {
        Ok(parts) => parts?,
        // There is no image to show.
        Err(ReadError::Absent | ReadError::Corrupt(_)) => return Some(State::absent(id, inlines)),
        Err(error) => {
            tracing::debug!(image.id = %id, %error, "the state of an image can't be told");
            return None;
        }
    };
    let told = |inline: &Inline| {
        let data_url = |representation: &Representation| {
            let media_type = representation.facts.media_type.as_str();
            format!("data:{media_type};base64,{}", STANDARD.encode(&representation.body))
        };
        let thumbnail = match (inline, &parts.thumbnail) {
            (_, None) => None,
            (Inline::None, Some(_)) => Some(format!("/images/{id}/thumbnail?v={}", parts.version)),
            (Inline::Thumbnail | Inline::Full, Some(thumbnail)) => Some(data_url(thumbnail)),
        };
        let small = parts.original.as_ref().filter(|it| it.body.len() <= app.events.inline_bytes);
        let data = Progress {
            concept_id: id.as_str(),
            full: format!("/images/{id}?v={}", parts.version),
            thumbnail,
            image_data: small.filter(|_| *inline == Inline::Full).map(data_url),
        };
        (*inline, event("concept_progress", Some(parts.version), data))
    };
    Some(State { version: Some(parts.version), events: inlines.iter().map(told).collect() })
}

/// What the events of an image are made of.
struct Parts {
    version: Version,
    /// Where it can be made.
    thumbnail: Option<Representation>,
    /// Where it is asked for.
    original: Option<Representation>,
}

/// The parts, if they are of one version: nothing where it was replaced between them.
async fn parts(app: &Arc<App>, id: &ImageId, full: bool) -> Result<Option<Parts>, ReadError> {
    let ask = async |asked: Option<Asked>, wants: Wants| {
        let request = ImageRequest {
            id: id.clone(),
            wants,
            preconditions: Preconditions::default(),
            accepts: AcceptedCodings::UNSAID,
            asked,
        };
        let answer = read::image(app, request).await.map_err(|failure| failure.error)?;
        Ok(match answer.content {
            AnswerContent::Image(it) => (it.facts.version, Some(it)),
            AnswerContent::Facts(facts)
            | AnswerContent::NotModified(facts)
            | AnswerContent::PreconditionFailed(facts) => (facts.version, None),
            AnswerContent::Elsewhere(remote) => (remote.version, None),
        })
    };
    let thumbnail = match ask(Some(Asked::THUMBNAIL), Wants::Bytes).await {
        // It has none, or can't be drawn.
        Err(ReadError::NotAcceptable(_) | ReadError::Render(RenderError::Picture(_))) => None,
        thumbnail => Some(thumbnail?),
    };
    let whole = match (&thumbnail, full) {
        (_, true) => Some(ask(None, Wants::BytesHere).await?),
        (None, false) => Some(ask(None, Wants::Facts).await?),
        (Some(_), false) => None,
    };
    let versions: Vec<Version> =
        thumbnail.iter().chain(&whole).map(|(version, _)| *version).collect();
    let one = versions.iter().all(|version| *version == versions[0]);
    Ok(one.then(|| Parts {
        version: versions[0],
        thumbnail: thumbnail.and_then(|(_, it)| it),
        original: whole.and_then(|(_, it)| it),
    }))
}

impl State {
    fn absent(id: &ImageId, inlines: &[Inline]) -> State {
        let event = event("concept_absent", None, Absent { concept_id: id.as_str() });
        let events = inlines.iter().map(|inline| (*inline, event.clone())).collect();
        State { version: None, events }
    }
}

/// What an event says of an image.
#[derive(Serialize)]
struct Progress<'a> {
    concept_id: &'a str,
    full: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    thumbnail: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image_data: Option<String>,
}

/// What an event says of an id without an image.
#[derive(Serialize)]
struct Absent<'a> {
    concept_id: &'a str,
}

/// An event as it stands in a stream (HTML, §9.2.6).
fn event(name: &'static str, version: Option<Version>, data: impl Serialize) -> Bytes {
    #[derive(Serialize)]
    struct Message<T> {
        r#type: &'static str,
        data: T,
    }
    let json = serde_json::to_string(&Message { r#type: name, data }).expect("strings are JSON");
    let id = version.map(|version| format!("id: {version}\n")).unwrap_or_default();
    Bytes::from(format!("event: {name}\n{id}data: {json}\n\n"))
}
