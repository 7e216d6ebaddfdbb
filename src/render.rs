//! Schedules renders: identical ones are collapsed, one runs per core, queue and duration are bounded.

use std::hash::Hash;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lru::LruCache;
use tokio::sync::Semaphore;

use crate::budget::{FetchBudget, OverBudget};
use crate::cache::{Cache, CacheKey};
use crate::cache_status::CacheStatus;
use crate::coalesce::{Flights, Lost};
use crate::decoder::Decoder;
use crate::image::variant::{GENERATION, Transform, Variant};
use crate::image::{
    ImageId, MediaType, Metadata, Representation, RepresentationKind as Kind, Version,
};
use crate::limit::{Shares, Turns};
use crate::metrics::{Metrics, Shed};
use crate::peer::PeerKey;
use crate::picture::placeholder::{self, Placeholder};
use crate::picture::{self, AnimationLimits, PictureError, Preview, Product, RenderLimits};
use crate::settings::Settings;

/// Entries in each of the two memories below.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");

/// Time after which a render is tried again that took too long.
const RETRIED_AFTER: Duration = Duration::from_mins(1);

/// Renders variants, previews and placeholders.
#[derive(Debug, Clone)]
pub struct Renderer(Arc<RenderParts>);

#[derive(Debug)]
struct RenderParts {
    cache: Arc<Cache>,
    metrics: Arc<Metrics>,
    budget: Arc<FetchBudget>,
    pictures: Arc<Flights<(CacheKey, Kind), RenderOutcome<Representation>>>,
    previewing: Arc<Flights<ImageVersion, RenderOutcome<Arc<Preview>>>>,
    previews: Mutex<LruCache<ImageVersion, Arc<Preview>>>,
    failed: Mutex<LruCache<FailureKey, Failure>>,
    /// Variants at full size that have as many bytes as their original, or more.
    not_smaller: Mutex<LruCache<(ImageVersion, Kind), ()>>,
    /// One permit per core.
    permits: Arc<Semaphore>,
    /// A place for each render that is running or queued.
    queue: Shares<PeerKey>,
    /// The turns of clients in the queue. A page with more pictures than that waits for its own.
    turns: Turns<PeerKey>,
    timeout: Duration,
    max_pixels: u64,
    animations: AnimationLimits,
    decoder: Decoder,
}

type ImageVersion = (ImageId, Version);

type RenderOutcome<T> = Result<Rendered<T>, RenderError>;

/// Names what can't be rendered: one form of an image, or with `None` all of them.
type FailureKey = (ImageVersion, Option<Kind>);

/// A failure that the next render would repeat.
#[derive(Debug)]
struct Failure {
    error: PictureError,
    /// `None` for a failure that is due to the image: a version never changes, so nobody tries it again.
    until: Option<Instant>,
}

/// A render, and the memory that it takes.
struct Job<M, W> {
    /// Tells the bytes that the work takes at most, in less time than it takes.
    memory: M,
    work: W,
}

/// The product of a render.
#[derive(Debug, Clone)]
pub struct Rendered<T> {
    /// The product.
    pub product: T,
    /// Time that the render took, without the queue. Zero if the product was in memory.
    pub time: Duration,
}

impl<T> Rendered<T> {
    fn from_memory(product: T) -> Rendered<T> {
        Rendered { product, time: Duration::ZERO }
    }

    /// The source of the product.
    #[must_use]
    pub fn cache_status(&self) -> CacheStatus {
        if self.time.is_zero() { CacheStatus::Hit } else { CacheStatus::Rendered }
    }
}

/// Reasons for a failed render.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RenderError {
    /// The queue is full.
    #[error("too many pictures are being rendered ([limits] renders)")]
    Busy,
    /// Nobody waited for the render any more.
    #[error("the render was given up, since nobody waited for it")]
    GivenUp,
    /// Memory is full of images that are being fetched, rendered and sent.
    #[error(transparent)]
    OverBudget(#[from] OverBudget),
    /// The picture can't be made.
    #[error(transparent)]
    Picture(PictureError),
    /// The picture can't be made now.
    #[error("{0}")]
    Unavailable(String),
    /// The render ended without an outcome.
    #[error(transparent)]
    Lost(#[from] Lost),
}

impl From<PictureError> for RenderError {
    fn from(error: PictureError) -> RenderError {
        match error {
            PictureError::NoDecoder(_) => RenderError::Unavailable(error.to_string()),
            error => RenderError::Picture(error),
        }
    }
}

/// The renders that one client has at a time.
fn turns(renders: NonZeroUsize) -> usize {
    renders.get().div_ceil(4)
}

impl Renderer {
    /// Renders on as many threads as there are cores, within the limits of the settings.
    #[must_use]
    pub fn new(
        cores: usize,
        settings: &Settings,
        cache: Arc<Cache>,
        budget: Arc<FetchBudget>,
        metrics: Arc<Metrics>,
    ) -> Renderer {
        Renderer(Arc::new(RenderParts {
            cache,
            metrics,
            budget,
            pictures: Arc::default(),
            previewing: Arc::default(),
            previews: Mutex::new(LruCache::new(REMEMBERED)),
            failed: Mutex::new(LruCache::new(REMEMBERED)),
            not_smaller: Mutex::new(LruCache::new(REMEMBERED)),
            permits: Arc::new(Semaphore::new(cores)),
            queue: Shares::new(settings.limits.renders.get()),
            turns: Turns::new(turns(settings.limits.renders)),
            timeout: settings.pictures.timeout,
            max_pixels: settings.pictures.max_pixels,
            animations: AnimationLimits {
                frames: settings.pictures.max_animation_frames,
                pixels: settings.pictures.max_animation_pixels,
            },
            decoder: Decoder::new(&settings.pictures.program),
        }))
    }

    /// Changes how many renders may run or wait.
    pub(crate) fn resize(&self, renders: NonZeroUsize) {
        self.0.queue.resize(renders.get());
        self.0.turns.resize(turns(renders));
    }

    /// True for a representation that is known to be impossible.
    #[must_use]
    pub fn is_impossible(&self, id: &ImageId, version: Version, kind: Kind) -> bool {
        let failed = self.check_failed(&(id.clone(), version), Some(kind));
        failed.is_err_and(|error| !error.is_timeout())
    }

    /// True for a variant that was remembered to be no smaller than its original.
    #[must_use]
    pub fn is_not_smaller(&self, id: &ImageId, version: Version, kind: Kind) -> bool {
        lock(&self.0.not_smaller).get(&((id.clone(), version), kind)).is_some()
    }

    /// Remembers a variant that is no smaller than its original.
    pub fn remember_not_smaller(&self, id: &ImageId, version: Version, kind: Kind) {
        lock(&self.0.not_smaller).put(((id.clone(), version), kind), ());
    }

    /// An image without its embedded metadata. It is in the cache before anyone gets it.
    pub async fn stripped(
        &self,
        id: &ImageId,
        client: Option<PeerKey>,
        original: Representation,
    ) -> Result<Rendered<Representation>, RenderError> {
        let source = (id.clone(), original.metadata.version);
        self.check_failed(&source, Some(Kind::Stripped))?;
        let key = CacheKey::Image(source.0.clone(), source.1);
        let cache = Arc::clone(&self.0.cache);
        let needed = original.body.len() as u64;
        let memory = move |_limits| Ok(needed);
        let work = move |_limits| {
            let metadata = &original.metadata;
            let bytes = picture::strip::strip(&original.body, metadata.media_type);
            let bytes = bytes.ok_or(PictureError::NotStripped)?;
            let metadata = Arc::new(metadata.stripped(bytes.len()));
            Ok(Representation { metadata, body: cache.count(bytes) })
        };
        self.picture(key, Kind::Stripped, client, Some(source), Job { memory, work }).await
    }

    /// A variant of an image. It is in the cache before anyone gets it.
    pub async fn variant(
        &self,
        id: &ImageId,
        client: Option<PeerKey>,
        original: Representation,
        variant: Variant,
    ) -> Result<Rendered<Representation>, RenderError> {
        let source = (id.clone(), original.metadata.version);
        self.check_failed(&source, Some(Kind::Variant(variant)))?;
        let key = CacheKey::Image(source.0.clone(), source.1);
        let cache = Arc::clone(&self.0.cache);
        let (body, media_type) = (original.body.clone(), original.metadata.media_type);
        let is_thumbnail = Transform::THUMBNAIL.variant(media_type) == Some(variant);
        let most = self.0.animations;
        let memory = move |limits| {
            if variant.is_animated() {
                return picture::animation_memory(&body, media_type, variant, limits, most);
            }
            let needed = picture::memory(&body, media_type, variant, limits)?;
            if !is_thumbnail {
                return Ok(needed);
            }
            Ok(needed.max(picture::preview_memory(&body, media_type, limits)?))
        };
        let (shared, previewed) = (Arc::clone(&self.0), source.clone());
        let work = move |limits| {
            let metadata = &original.metadata;
            let frames = || picture::frames(&original.body, media_type, limits);
            let frames = is_thumbnail.then(frames).flatten();
            let (body, media_type) = shared.decoder.readable(&original.body, media_type, limits)?;
            let product = if is_thumbnail {
                // Whoever wants the one mostly wants the other as well.
                let (product, preview) =
                    picture::render_with_preview(&body, media_type, variant, frames, limits)?;
                lock(&shared.previews).put(previewed, Arc::new(preview));
                product
            } else if variant.is_animated() {
                picture::render_animation(&body, media_type, variant, limits, most)?
            } else {
                picture::render(&body, media_type, variant, limits)?
            };
            let Product { bytes, at_full_size } = product;
            let metadata = Metadata { at_full_size, ..metadata.variant(variant, bytes.len()) };
            Ok(Representation { metadata: Arc::new(metadata), body: cache.count(bytes) })
        };
        let kind = Kind::Variant(variant);
        self.picture(key, kind, client, Some(source), Job { memory, work }).await
    }

    /// A drawn placeholder as WebP.
    pub async fn placeholder(
        &self,
        client: Option<PeerKey>,
        placeholder: Placeholder,
    ) -> Result<Rendered<Representation>, RenderError> {
        let version = Version::of(format!("{placeholder:?} {GENERATION}").as_bytes());
        let key = CacheKey::Placeholder(version);
        if let Some(drawn) = self.0.cache.get_placeholder(version) {
            return Ok(Rendered::from_memory(drawn));
        }
        let cache = Arc::clone(&self.0.cache);
        let needed = placeholder::memory(&placeholder);
        let memory = move |_limits| Ok(needed);
        let work = move |limits| {
            let bytes = placeholder::webp(&placeholder, limits)?;
            let metadata = Arc::new(Metadata::new(version, MediaType::WebP, bytes.len(), None));
            Ok(Representation { metadata, body: cache.count(bytes) })
        };
        self.picture(key, Kind::Original, client, None, Job { memory, work }).await
    }

    /// The pixel size and `ThumbHash` of an image, if they were made before. Counts as no use.
    #[must_use]
    pub fn known_preview(&self, id: &ImageId, version: Version) -> Option<Arc<Preview>> {
        lock(&self.0.previews).peek(&(id.clone(), version)).map(Arc::clone)
    }

    /// The pixel size and `ThumbHash` of an image.
    pub async fn preview(
        &self,
        id: &ImageId,
        client: Option<PeerKey>,
        original: Representation,
    ) -> Result<Arc<Preview>, RenderError> {
        let source = (id.clone(), original.metadata.version);
        if let Some(preview) = lock(&self.0.previews).get(&source) {
            return Ok(Arc::clone(preview));
        }
        self.check_failed(&source, None)?;
        let shared = Arc::clone(&self.0);
        let preview = self.join(&self.0.previewing, source.clone(), client, move || async move {
            let (body, media_type) = (original.body.clone(), original.metadata.media_type);
            let memory = move |limits| picture::preview_memory(&body, media_type, limits);
            let decoder = shared.decoder.clone();
            let work = move |limits| {
                let frames = picture::frames(&original.body, media_type, limits);
                let (body, media_type) = decoder.readable(&original.body, media_type, limits)?;
                picture::preview(&body, media_type, frames, limits).map(Arc::new)
            };
            let rendered = shared.run(client, Some((&source, None)), Job { memory, work }).await?;
            lock(&shared.previews).put(source, Arc::clone(&rendered.product));
            Ok(rendered)
        });
        Ok(preview.await?.product)
    }

    /// A picture for the cache. `source` is the image that it is made of.
    async fn picture(
        &self,
        key: CacheKey,
        kind: Kind,
        client: Option<PeerKey>,
        source: Option<ImageVersion>,
        job: Job<
            impl FnOnce(RenderLimits) -> Result<u64, PictureError> + Send + 'static,
            impl FnOnce(RenderLimits) -> Result<Representation, PictureError> + Send + 'static,
        >,
    ) -> Result<Rendered<Representation>, RenderError> {
        let shared = Arc::clone(&self.0);
        self.join(&self.0.pictures, (key.clone(), kind), client, move || async move {
            // Another render may have ended between this request's look at the cache and now.
            if let Some(kept) = shared.cache.get_derived(key.clone(), kind) {
                return Ok(Rendered::from_memory(kept));
            }
            let source = source.as_ref().map(|source| (source, Some(kind)));
            let rendered = shared.run(client, source, job).await?;
            shared.cache.insert_variant(key, rendered.product.clone());
            Ok(rendered)
        })
        .await
    }

    /// Joins the render under way, or begins one. Nobody waits longer than a render may take.
    async fn join<K, T, W>(
        &self,
        flights: &Arc<Flights<K, RenderOutcome<T>>>,
        key: K,
        client: Option<PeerKey>,
        work: impl FnOnce() -> W + Send + 'static,
    ) -> Result<Rendered<T>, RenderError>
    where
        K: Clone + Eq + Hash + Send + Sync + 'static,
        T: Clone + Send + Sync + 'static,
        W: Future<Output = RenderOutcome<T>> + Send + 'static,
    {
        let shared = Arc::clone(&self.0);
        let (flight, _joined) = flights.join(key, move |interest| async move {
            let _turn = match client {
                Some(client) => Some(shared.turns.take(client).await),
                None => None,
            };
            if interest.give_up_if_unwanted() {
                return Err(RenderError::GivenUp);
            }
            let Ok(_place) = shared.queue.try_take(client) else {
                shared.metrics.count_shed(Shed::Renders);
                return Err(RenderError::Busy);
            };
            work().await
        });
        let outcome = tokio::time::timeout(self.0.timeout, flight.outcome()).await;
        outcome.map_err(|_elapsed| PictureError::TimedOut)??
    }

    /// Fails as the last render of this form did, or of any form if the image can't be rendered at all. Metadata are removed
    /// without rendering.
    fn check_failed(&self, source: &ImageVersion, form: Option<Kind>) -> Result<(), PictureError> {
        let mut failed = lock(&self.0.failed);
        let any = (form != Some(Kind::Stripped)).then_some(None);
        for form in form.map(Some).into_iter().chain(any) {
            let key = (source.clone(), form);
            let Some(failure) = failed.get(&key) else { continue };
            if failure.until.is_none_or(|until| Instant::now() < until) {
                return Err(failure.error.clone());
            }
            failed.pop(&key);
        }
        Ok(())
    }
}

impl RenderParts {
    /// Runs a render when a core is free for it, and memory.
    async fn run<T: Send + 'static>(
        &self,
        client: Option<PeerKey>,
        source: Option<(&ImageVersion, Option<Kind>)>,
        job: Job<
            impl FnOnce(RenderLimits) -> Result<u64, PictureError> + Send + 'static,
            impl FnOnce(RenderLimits) -> Result<T, PictureError> + Send + 'static,
        >,
    ) -> RenderOutcome<T> {
        let patience = Instant::now() + self.timeout;
        let limits = RenderLimits { pixels: self.max_pixels, deadline: Some(patience) };
        let permit = Arc::clone(&self.permits).acquire_owned().await;
        // Past the deadline nobody waits for it any more.
        limits.check_time()?;
        let Job { memory, work } = job;
        let (needed, permit) = on_blocking_thread(move || (memory(limits), permit)).await?;
        let needed = needed.and_then(|needed| match self.budget.bytes() {
            limit if needed > limit => Err(PictureError::TooMuchMemory { needed, limit }),
            _ => Ok(needed),
        });
        let needed = needed.inspect_err(|error| self.remember(source, error, Duration::ZERO))?;
        let left = patience.saturating_duration_since(Instant::now());
        let reservation = self.budget.reserve_within(client, needed, left).await?;
        limits.check_time()?;
        let began = Instant::now();
        let rendered = on_blocking_thread(move || {
            let _permit = permit;
            work(limits)
        });
        let rendered = rendered.await.flatten();
        drop(reservation);
        self.metrics.renders.inc();
        let time = began.elapsed();
        let product = rendered.inspect_err(|error| self.remember(source, error, time))?;
        Ok(Rendered { product, time })
    }

    /// Remembers a failure that the next render of the same would repeat, which took some time.
    fn remember(
        &self,
        source: Option<(&ImageVersion, Option<Kind>)>,
        error: &PictureError,
        time: Duration,
    ) {
        let Some((source, form)) = source else { return };
        let (form, until) = match error {
            PictureError::TooManyPixels { .. }
            | PictureError::Broken(_)
            | PictureError::Unsupported(_) => (None, None),
            PictureError::TooMuchMemory { .. }
            | PictureError::TooManyFrames { .. }
            | PictureError::BrokenAnimation(_)
            | PictureError::TooLong { .. }
            | PictureError::Encoding(_)
            | PictureError::NotSmaller(_)
            | PictureError::NotStripped => (form, None),
            // It takes as long again, unless it began late.
            PictureError::TimedOut if time >= self.timeout / 2 => (form, Some(RETRIED_AFTER)),
            PictureError::DecodingTimedOut if time >= self.timeout / 2 => {
                (None, Some(RETRIED_AFTER))
            }
            PictureError::SlowAnimation if time.is_zero() => (form, None),
            PictureError::SlowAnimation if time >= self.timeout / 4 => (form, Some(RETRIED_AFTER)),
            PictureError::TimedOut
            | PictureError::DecodingTimedOut
            | PictureError::SlowAnimation
            | PictureError::NoDecoder(_)
            | PictureError::Opaque(_) => return,
        };
        let until = until.map(|pause| Instant::now() + pause);
        let failure = Failure { error: error.clone(), until };
        lock(&self.failed).put((source.clone(), form), failure);
    }
}

/// Runs work on a blocking thread. Decoders' panics are caught where they decode. Another panic has nothing to do with the
/// image, so the image isn't remembered as failed.
async fn on_blocking_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, PictureError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|_panicked| PictureError::Encoding("the encoder panicked".to_owned()))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
