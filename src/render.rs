//! Who renders, and when: one render for all who want the same bytes, as many at a time as there are cores, and no
//! more in the queue than may be.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use image::DynamicImage;
use tokio::sync::Semaphore;

use crate::app::App;
use crate::collapse::{Flight, Lost};
use crate::image::{Facts, Form, ImageId, MediaType, Representation, Version};
use crate::picture::placeholder::{self, Placeholder};
use crate::picture::{PictureError, encode};
use crate::read::Served;
use crate::telemetry::Shed;
use crate::variant::GENERATION;

/// The renders under way.
#[derive(Debug)]
pub struct Renderer {
    flights: Mutex<HashMap<Key, Arc<Flight<Outcome>>>>,
    permits: Arc<Semaphore>,
    most: usize,
}

/// What is rendered. A version and a form always mean the same bytes, so nothing here can be out of date.
type Key = (ImageId, Version, Form);

type Outcome = Result<(Representation, Duration), PictureError>;

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
    /// Renders on as many threads as there are cores, with so many renders under way or waiting.
    #[must_use]
    pub fn new(cores: usize, most: usize) -> Renderer {
        let permits = Arc::new(Semaphore::new(cores));
        Renderer { flights: Mutex::default(), permits, most }
    }

    fn flights(&self) -> MutexGuard<'_, HashMap<Key, Arc<Flight<Outcome>>>> {
        self.flights.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A form of a version of an image: rendered by this request, or together with whoever asked for it before. It is kept
/// in the cache before anyone is told.
pub async fn render(
    app: &Arc<App>,
    id: &ImageId,
    version: Version,
    form: Form,
    work: impl FnOnce() -> Result<Representation, PictureError> + Send + 'static,
) -> Result<Rendered, RenderError> {
    let key = (id.clone(), version, form);
    let flight = {
        let mut flights = app.renderer.flights();
        if let Some(flight) = flights.get(&key) {
            Arc::clone(flight)
        } else if flights.len() >= app.renderer.most {
            drop(flights);
            app.metrics.count_shed(Shed::Renders);
            return Err(RenderError::Busy);
        } else {
            let (flight, landing) = Flight::new();
            flights.insert(key.clone(), Arc::clone(&flight));
            let place = Place { app: Arc::clone(app), key };
            // A task of its own, as a fetch has: who asked first may leave.
            tokio::spawn(async move {
                let outcome = lead(&place, work).await;
                drop(place);
                landing.land(outcome);
            });
            flight
        }
    };
    let (representation, time) = flight.outcome().await??;
    Ok(Rendered { representation, time })
}

async fn lead(
    place: &Place,
    work: impl FnOnce() -> Result<Representation, PictureError> + Send + 'static,
) -> Outcome {
    let app = &place.app;
    let permit = Arc::clone(&app.renderer.permits).acquire_owned().await;
    let began = Instant::now();
    let done = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        work()
    });
    // A decoder that panics has met bytes that it doesn't know what to do with.
    let rendered = done.await.unwrap_or_else(|_panicked| {
        Err(PictureError::Broken("the decoder gave up on it".to_owned()))
    });
    app.metrics.renders.inc();
    let representation = rendered?;
    app.cache.insert_form(&place.key.0, representation.clone());
    Ok((representation, began.elapsed()))
}

/// A drawn placeholder as lossy WebP, and what it took to get it.
pub async fn placeholder(
    app: &Arc<App>,
    placeholder: Placeholder,
) -> Result<(Rendered, Served), RenderError> {
    let id = ImageId::of_placeholders();
    let version = Version::of(format!("{placeholder:?} {GENERATION}").as_bytes());
    if let Some(representation) = app.cache.get(&id, version, Form::Original) {
        return Ok((Rendered { representation, time: Duration::ZERO }, Served::Hit));
    }
    let cache = Arc::clone(app);
    let rendered = render(app, &id, version, Form::Original, move || {
        /// As thumbnails: small rather than quick, since it is made once.
        const QUALITY: u8 = 85;
        const EFFORT: u8 = 6;
        let picture = DynamicImage::ImageRgb8(placeholder::draw(&placeholder));
        let bytes = encode::webp(&picture, QUALITY, EFFORT)?;
        let facts = Arc::new(Facts::new(version, MediaType::WebP, bytes.len(), None));
        Ok(Representation { facts, body: cache.cache.count(bytes) })
    });
    Ok((rendered.await?, Served::Rendered))
}

/// A place among the renders under way, which is left whatever happens.
struct Place {
    app: Arc<App>,
    key: Key,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.app.renderer.flights().remove(&self.key);
    }
}
