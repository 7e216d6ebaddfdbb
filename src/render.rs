//! Who renders, and when: one render for all who want the same bytes, as many at a time as there are cores, and no
//! more in the queue, and none for longer, than may be.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use lru::LruCache;
use tokio::sync::Semaphore;

use crate::app::App;
use crate::coalesce::{Flights, Lost};
use crate::image::variant::GENERATION;
use crate::image::{ImageId, MediaType, Metadata, Representation, RepresentationKind, Version};
use crate::metrics::Shed;
use crate::picture::placeholder::{self, Placeholder};
use crate::picture::{PictureError, RenderLimits};
use crate::read::CacheStatus;
use crate::settings::Settings;

/// The renders under way.
#[derive(Debug)]
pub struct Renderer {
    flights: Arc<Flights<RenderKey, RenderOutcome>>,
    permits: Arc<Semaphore>,
    /// What can't be made a picture of, so that nobody tries again: a version never becomes another one.
    hopeless: Mutex<LruCache<(ImageId, Version), PictureError>>,
    most: usize,
    timeout: Duration,
    pixels: u64,
}

/// What is rendered. A version and a form always mean the same bytes, so nothing here can be out of date.
type RenderKey = (ImageId, Version, RepresentationKind);

type RenderOutcome = Result<(Representation, Duration), PictureError>;

/// A representation that was rendered.
#[derive(Debug)]
pub struct Rendered {
    /// It.
    pub representation: Representation,
    /// How long that took, the queue left out.
    pub time: Duration,
}

/// Why nothing was rendered.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RenderError {
    /// As many renders as may are under way or waiting.
    #[error("too many pictures are being rendered")]
    Busy,
    /// It can't be.
    #[error(transparent)]
    Picture(#[from] PictureError),
    /// The work ended without an outcome.
    #[error(transparent)]
    Lost(#[from] Lost),
}

impl Renderer {
    /// Renders on as many threads as there are cores, within the limits of the settings.
    #[must_use]
    pub fn new(cores: usize, settings: &Settings) -> Renderer {
        const REMEMBERED: NonZeroUsize = NonZeroUsize::new(4096).expect("not zero");
        Renderer {
            flights: Arc::default(),
            permits: Arc::new(Semaphore::new(cores)),
            hopeless: Mutex::new(LruCache::new(REMEMBERED)),
            most: settings.limits.renders.get(),
            timeout: settings.pictures.timeout,
            pixels: settings.pictures.max_pixels,
        }
    }

    fn hopeless(&self) -> MutexGuard<'_, LruCache<(ImageId, Version), PictureError>> {
        self.hopeless.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers a failure that is due to the image, whatever is asked for of it.
    fn remember(&self, id: &ImageId, version: Version, error: &PictureError) {
        match error {
            PictureError::TooManyPixels { .. } | PictureError::Broken(_) => {
                self.hopeless().put((id.clone(), version), error.clone());
            }
            PictureError::Opaque(_) | PictureError::Encoding(_) | PictureError::TimedOut => {}
        }
    }
}

/// A form of a version of an image: rendered by this request, or together with whoever asked for it before. It is kept
/// in the cache before anyone is told. Nobody waits longer than a render may take.
pub async fn render(
    app: &Arc<App>,
    id: &ImageId,
    version: Version,
    form: RepresentationKind,
    work: impl FnOnce(RenderLimits) -> Result<Representation, PictureError> + Send + 'static,
) -> Result<Rendered, RenderError> {
    if let Some(error) = app.renderer.hopeless().get(&(id.clone(), version)) {
        return Err(error.clone().into());
    }
    let Renderer { flights, most, .. } = &app.renderer;
    let joined = flights.join_within((id.clone(), version, form), *most, || {
        lead(Arc::clone(app), id.clone(), version, form, work)
    });
    let Some((flight, _joined)) = joined else {
        app.metrics.count_shed(Shed::Renders);
        return Err(RenderError::Busy);
    };
    let outcome = tokio::time::timeout(app.renderer.timeout, flight.outcome()).await;
    let (representation, time) = outcome.map_err(|_elapsed| PictureError::TimedOut)???;
    Ok(Rendered { representation, time })
}

async fn lead(
    app: Arc<App>,
    id: ImageId,
    version: Version,
    form: RepresentationKind,
    work: impl FnOnce(RenderLimits) -> Result<Representation, PictureError> + Send + 'static,
) -> RenderOutcome {
    // Another may have ended between this one's look at the cache and its beginning.
    if let Some(representation) = app.cache.get(&id, version, form) {
        return Ok((representation, Duration::ZERO));
    }
    let deadline = Instant::now().checked_add(app.renderer.timeout);
    let limits = RenderLimits { pixels: app.renderer.pixels, deadline };
    let permit = Arc::clone(&app.renderer.permits).acquire_owned().await;
    // Nobody waits for it any more.
    limits.check_time()?;
    let began = Instant::now();
    let done = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        work(limits)
    });
    // Decoding catches its own panics. This one is of no image in particular, so it isn't held against it.
    let rendered = done.await.unwrap_or_else(|_panicked| {
        Err(PictureError::Encoding("the encoder gave up on it".to_owned()))
    });
    app.metrics.renders.inc();
    let representation =
        rendered.inspect_err(|error| app.renderer.remember(&id, version, error))?;
    app.cache.insert_form(&id, representation.clone());
    Ok((representation, began.elapsed()))
}

/// A drawn placeholder as WebP, and what it took to get it.
pub async fn placeholder(
    app: &Arc<App>,
    placeholder: Placeholder,
) -> Result<(Rendered, CacheStatus), RenderError> {
    let id = ImageId::of_placeholders();
    let version = Version::of(format!("{placeholder:?} {GENERATION}").as_bytes());
    if let Some(representation) = app.cache.get(&id, version, RepresentationKind::Original) {
        return Ok((Rendered { representation, time: Duration::ZERO }, CacheStatus::Hit));
    }
    let cache = Arc::clone(app);
    let rendered = render(app, &id, version, RepresentationKind::Original, move |limits| {
        let bytes = placeholder::webp(&placeholder, limits)?;
        let metadata = Arc::new(Metadata::new(version, MediaType::WebP, bytes.len(), None));
        Ok(Representation { metadata, body: cache.cache.count(bytes) })
    });
    Ok((rendered.await?, CacheStatus::Rendered))
}
