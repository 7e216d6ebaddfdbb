//! The content of events, and the events that were made.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use lru::LruCache;

use crate::coalesce::Flights;
use crate::image::{ImageId, Metadata, Representation, Version};
use crate::picture::Preview;
use crate::read::{ReadError, Reader, Snapshot};
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Mutex, MutexGuard};

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
        /// The reason for which a record is no image, if there is a record.
        corrupt: Option<&'a str>,
    },
    /// There is an image.
    Present {
        /// The id.
        id: &'a ImageId,
        /// The version.
        version: Version,
        /// The metadata of the original; `None` for an image in the object store that hasn't been here yet.
        metadata: Option<Arc<Metadata>>,
        /// Time of its expiry, in seconds since 1970; `None` if it never expires.
        expires_at: Option<u64>,
        /// The part of the image that the stream wants.
        inline: Inline,
        /// Pixel size and `ThumbHash`, if they are wanted and can be made.
        preview: Option<Arc<Preview>>,
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
    /// Changes of images with a prefix may have been missed.
    Resync {
        /// The prefix.
        prefix: &'a str,
    },
}

/// Encodes an event for its stream.
pub(super) type Encode = fn(&EventContent<'_>) -> Bytes;

/// The state of an image that an event tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ImageState {
    /// There is no record.
    Absent,
    /// There is a record that is no image.
    Corrupt,
    /// There is this version.
    Present(Version),
}

impl ImageState {
    pub(super) fn is_present(self) -> bool {
        matches!(self, ImageState::Present(_))
    }
}

/// An encoded event, and the state that it tells.
#[derive(Debug, Clone)]
pub(super) struct Event {
    pub(super) state: ImageState,
    pub(super) text: Bytes,
}

/// The state of an image can't be told now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Unknown;

/// Identifies an event, by the expiry as well. Its text is the same whenever it is made.
type EventKey = (ImageId, Version, Inline, Option<u64>);

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
        sent: Option<ImageState>,
    ) -> Result<Option<Event>, Unknown> {
        let version = match self.reader.version(id).await {
            Ok(version) => version,
            Err(failure) => {
                let event = self.without_image(id, &failure.error)?;
                return Ok(Some(event).filter(|event| sent != Some(event.state)));
            }
        };
        let state = ImageState::Present(version);
        if sent == Some(state) {
            return Ok(None);
        }
        let is_full = self.held.load(Ordering::Relaxed) > HELD_BYTES;
        let inline = if is_full { Inline::None } else { inline };
        let key = (id.clone(), version, inline, self.expires_at(id, version));
        if let Some(text) = self.made().events.get(&key).cloned() {
            return Ok(Some(Event { state, text }));
        }
        let (making, joined) = self.making.join(key, |_| {
            let (maker, id) = (Arc::clone(self), id.clone());
            async move { maker.make(&id, inline).await }
        });
        let event = making.outcome().await.map_err(|_lost| Unknown)??;
        // A flight that began earlier may have made the event of a version in between. It is read again.
        if joined && event.state != state {
            return Err(Unknown);
        }
        Ok(Some(event))
    }

    /// The event of the images with a prefix.
    pub(super) fn list(&self, prefix: &str, complete: bool, ids: &[ImageId]) -> Bytes {
        (self.encode)(&EventContent::List { prefix, complete, ids })
    }

    /// The event for a stream that may have missed changes.
    pub(super) fn resync(&self, prefix: &str) -> Bytes {
        (self.encode)(&EventContent::Resync { prefix })
    }

    /// Makes the event of the version that is current now.
    async fn make(&self, id: &ImageId, inline: Inline) -> Result<Event, Unknown> {
        let (version, expires_at, text) = match self.encoded(id, inline).await {
            Ok(made) => made,
            Err(error) => return self.without_image(id, &error),
        };
        self.made().put((id.clone(), version, inline, expires_at), text.clone());
        Ok(Event { state: ImageState::Present(version), text })
    }

    async fn encoded(
        &self,
        id: &ImageId,
        inline: Inline,
    ) -> Result<(Version, Option<u64>, Bytes), ReadError> {
        let snapshot = async {
            match inline {
                // All that the event carries has to be of one version: the bytes come first.
                Inline::Full => self.reader.load(id, None).await,
                Inline::None | Inline::Thumbnail => self.reader.open(id, None).await,
            }
        };
        let mut snapshot = snapshot.await.map_err(|failure| failure.error)?;
        let (preview, thumbnail) = match inline {
            Inline::None => (None, None),
            Inline::Thumbnail | Inline::Full => pictures(&mut snapshot).await?,
        };
        let original = match inline {
            Inline::Full => {
                let loaded = snapshot.load().await.map_err(|failure| failure.error)?;
                Some(loaded.original).filter(|it| it.body.len() <= self.inline_bytes)
            }
            Inline::None | Inline::Thumbnail => None,
        };
        let (version, metadata) = (snapshot.version(), snapshot.metadata().map(Arc::clone));
        let expires_at = self.expires_at(id, version);
        let of = |it: &Option<Representation>| it.as_ref().map_or(0, |it| it.body.len());
        let length = of(&thumbnail) + of(&original);
        let (id, encode) = (id.clone(), self.encode);
        let encoded = self.reader.cpu.run_on(length, move || {
            encode(&EventContent::Present {
                id: &id,
                version,
                metadata,
                expires_at,
                inline,
                preview,
                thumbnail,
                original,
            })
        });
        Ok((version, expires_at, HeldText::counted(encoded.await, &self.held)))
    }

    /// Time at which a version expires, in seconds since 1970.
    fn expires_at(&self, id: &ImageId, version: Version) -> Option<u64> {
        let left = self.reader.index.time_to_live(id, version)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // To the nearest second: the same expiry, read again, is the same.
        Some(now.saturating_add(left).saturating_add(Duration::from_millis(500)).as_secs())
    }

    /// The event of an id without an image; an error if that isn't known.
    fn without_image(&self, id: &ImageId, error: &ReadError) -> Result<Event, Unknown> {
        let (state, corrupt) = match error {
            ReadError::Absent => (ImageState::Absent, None),
            ReadError::Corrupt(corrupt) => (ImageState::Corrupt, Some(corrupt.to_string())),
            error => {
                tracing::debug!(image.id = %id, %error, "the state of an image can't be told");
                return Err(Unknown);
            }
        };
        let corrupt = corrupt.as_deref();
        Ok(Event { state, text: (self.encode)(&EventContent::Absent { id, corrupt }) })
    }

    fn made(&self) -> MutexGuard<'_, EventCache> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Makes the preview and the thumbnail, both of the version that the snapshot is of afterwards.
async fn pictures(
    snapshot: &mut Snapshot,
) -> Result<(Option<Arc<Preview>>, Option<Representation>), ReadError> {
    loop {
        // In this order: the render of the thumbnail makes the preview as well.
        let thumbnail = snapshot.thumbnail().await.map_err(|failure| failure.error)?;
        let version = snapshot.version();
        let preview = snapshot.preview().await.map_err(|failure| failure.error)?;
        // It may have needed the bytes, and found those of a later version.
        if snapshot.version() == version {
            return Ok((preview, thumbnail));
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
