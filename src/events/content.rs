//! The content of events, and the events that were made.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use lru::LruCache;

use crate::coalesce::Flights;
use crate::image::{ImageId, Representation, Version};
use crate::picture::PictureError;
use crate::read::{ReadError, Reader};
use crate::render::RenderError;

/// Memory for events that several streams may want, in bytes.
const KEPT_BYTES: usize = 16 * 1024 * 1024;

/// Memory for events with images in them, those above and those that wait for their clients, in bytes. While slow clients
/// hold more, events have addresses only.
const HELD_BYTES: usize = 64 * 1024 * 1024;

/// The part of an image that its events carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Inline {
    /// Addresses only.
    None,
    /// The thumbnail.
    Thumbnail,
    /// The thumbnail, and the image unless it is too large.
    Full,
}

/// The content of one event.
#[derive(Debug)]
pub(crate) enum EventContent<'a> {
    /// There is no image.
    Absent {
        /// The id.
        id: &'a ImageId,
    },
    /// There is an image.
    Present {
        /// The id.
        id: &'a ImageId,
        /// The version.
        version: Version,
        /// The part of the image that the stream wants.
        inline: Inline,
        /// The thumbnail, if it is wanted and can be made.
        thumbnail: Option<Representation>,
        /// The original, if it is wanted and not too large.
        original: Option<Representation>,
    },
    /// The images with a prefix.
    List {
        /// The prefix.
        prefix: &'a str,
        /// False if there are more than a stream may name.
        complete: bool,
        /// Their ids, in order.
        ids: &'a [ImageId],
    },
}

/// Encodes an event for its stream.
pub(super) type Encode = fn(&EventContent<'_>) -> Bytes;

/// An encoded event, and the version that it tells of; `None` if there is no image.
#[derive(Debug, Clone)]
pub(super) struct Event {
    pub(super) version: Option<Version>,
    pub(super) text: Bytes,
}

/// The state of an image can't be told now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unknown;

/// Identifies an event. Its text is the same whenever it is made.
type EventKey = (ImageId, Version, Inline);

/// Makes events: once for all streams that want the same.
#[derive(Debug)]
pub(super) struct EventMaker {
    reader: Arc<Reader>,
    encode: Encode,
    inline_bytes: usize,
    making: Arc<Flights<EventKey, Result<Event, Unknown>>>,
    made: Mutex<EventCache>,
    /// Bytes of all events of images that are still held by anyone.
    held: Arc<AtomicUsize>,
}

/// The text of an event, counted until its last client has taken it.
#[derive(Debug)]
struct HeldText {
    text: Bytes,
    held: Arc<AtomicUsize>,
}

impl HeldText {
    fn counted(text: Bytes, held: &Arc<AtomicUsize>) -> Bytes {
        held.fetch_add(text.len(), Ordering::Relaxed);
        Bytes::from_owner(HeldText { text, held: Arc::clone(held) })
    }
}

impl AsRef<[u8]> for HeldText {
    fn as_ref(&self) -> &[u8] {
        &self.text
    }
}

impl Drop for HeldText {
    fn drop(&mut self) {
        self.held.fetch_sub(self.text.len(), Ordering::Relaxed);
    }
}

/// Events that were made. The least recently sent leave first.
#[derive(Debug)]
struct EventCache {
    events: LruCache<EventKey, Bytes>,
    bytes: usize,
}

impl EventMaker {
    pub(super) fn new(reader: Arc<Reader>, encode: Encode, inline_bytes: usize) -> EventMaker {
        let made = Mutex::new(EventCache { events: LruCache::unbounded(), bytes: 0 });
        let (making, held) = (Arc::default(), Arc::default());
        EventMaker { reader, encode, inline_bytes, making, made, held }
    }

    /// The event of the current state of an image, unless `sent` is that state.
    pub(super) async fn event(
        self: &Arc<Self>,
        id: &ImageId,
        inline: Inline,
        sent: Option<&Option<Version>>,
    ) -> Result<Option<Event>, Unknown> {
        let version = match self.reader.version(id).await {
            Ok(version) => Some(version),
            Err(failure) => absence(id, &failure.error)?,
        };
        if sent == Some(&version) {
            return Ok(None);
        }
        let Some(version) = version else {
            return Ok(Some(self.absent(id)));
        };
        let is_full = self.held.load(Ordering::Relaxed) > HELD_BYTES;
        let inline = if is_full { Inline::None } else { inline };
        let key = (id.clone(), version, inline);
        if let Some(text) = self.made().events.get(&key).cloned() {
            return Ok(Some(Event { version: Some(version), text }));
        }
        let (making, joined) = self.making.join(key, |_| {
            let (maker, id) = (Arc::clone(self), id.clone());
            async move { maker.make(&id, inline).await }
        });
        let event = making.outcome().await.map_err(|_lost| Unknown)??;
        // A flight that began earlier may have made the event of a version in between. It is read again.
        if joined && event.version != Some(version) {
            return Err(Unknown);
        }
        Ok(Some(event))
    }

    /// The event of the images with a prefix.
    pub(super) fn list(&self, prefix: &str, complete: bool, ids: &[ImageId]) -> Bytes {
        (self.encode)(&EventContent::List { prefix, complete, ids })
    }

    /// Makes the event of the version that is current now.
    async fn make(&self, id: &ImageId, inline: Inline) -> Result<Event, Unknown> {
        let (version, text) = match self.encoded(id, inline).await {
            Ok(made) => made,
            Err(error) => {
                absence(id, &error)?;
                return Ok(self.absent(id));
            }
        };
        self.made().put((id.clone(), version, inline), text.clone());
        Ok(Event { version: Some(version), text })
    }

    async fn encoded(&self, id: &ImageId, inline: Inline) -> Result<(Version, Bytes), ReadError> {
        let snapshot = async {
            match inline {
                // All that the event carries has to be of one version: the bytes come first.
                Inline::Full => self.reader.load(id, None).await,
                Inline::None | Inline::Thumbnail => self.reader.open(id, None).await,
            }
        };
        let mut snapshot = snapshot.await.map_err(|failure| failure.error)?;
        let thumbnail = match inline {
            Inline::None => None,
            Inline::Thumbnail | Inline::Full => {
                match snapshot.thumbnail().await.map_err(|failure| failure.error) {
                    Ok(thumbnail) => thumbnail,
                    // It takes too long now, but not for ever.
                    Err(
                        error @ ReadError::Render(RenderError::Picture(
                            PictureError::TimedOut | PictureError::DecodingTimedOut,
                        )),
                    ) => {
                        return Err(error);
                    }
                    Err(ReadError::Render(RenderError::Picture(_))) => None,
                    Err(error) => return Err(error),
                }
            }
        };
        let original = match inline {
            Inline::Full => {
                let loaded = snapshot.load().await.map_err(|failure| failure.error)?;
                Some(loaded.original).filter(|it| it.body.len() <= self.inline_bytes)
            }
            Inline::None | Inline::Thumbnail => None,
        };
        let version = snapshot.version();
        let of = |it: &Option<Representation>| it.as_ref().map_or(0, |it| it.body.len());
        let length = of(&thumbnail) + of(&original);
        let (id, encode) = (id.clone(), self.encode);
        let encoded = self.reader.cpu.run_on(length, move || {
            encode(&EventContent::Present { id: &id, version, inline, thumbnail, original })
        });
        Ok((version, HeldText::counted(encoded.await, &self.held)))
    }

    fn absent(&self, id: &ImageId) -> Event {
        Event { version: None, text: (self.encode)(&EventContent::Absent { id }) }
    }

    fn made(&self) -> MutexGuard<'_, EventCache> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `None` in place of a version if there is nothing to show; an error if that isn't known.
fn absence(id: &ImageId, error: &ReadError) -> Result<Option<Version>, Unknown> {
    match error {
        ReadError::Absent | ReadError::Corrupt(_) => Ok(None),
        error => {
            tracing::debug!(image.id = %id, %error, "the state of an image can't be told");
            Err(Unknown)
        }
    }
}

impl EventCache {
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
