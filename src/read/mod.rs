//! The life of a read, from a parsed request to an answer that HTTP only has to dress.

use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use lru::LruCache;

use crate::app::{App, OverBudget};
use crate::cache::Kept;
use crate::coalesce::Lost;
use crate::image::coding::{AcceptedCodings, Coding};
use crate::image::preconditions::{Preconditions, Verdict};
use crate::image::record::{self, Corrupt, Record};
use crate::image::variant::{NotAcceptable, Resolved, Transform, Variant};
use crate::image::{
    self, Image, ImageId, MediaType, Metadata, Representation, RepresentationKind, Version,
};
use crate::index::{self, Admission, Digest, FetchLease, Known, LastKnown, Lookup};
use crate::metrics::Shed;
use crate::offload::{self, OffloadError, RemoteImage};
use crate::picture::{self, Preview};
use crate::render::{self, RenderError, Rendered};
use crate::store::StoreError;

/// Values up to this many bytes are hashed and decoded where they are: it takes under a fifth of a
/// millisecond, and a trip to another thread costs its share of that.
const INLINE_LIMIT: usize = 64 * 1024;

/// A read of an image, parsed and valid.
#[derive(Debug)]
pub struct ImageRequest {
    /// Which image.
    pub id: ImageId,
    /// Whether the bytes are asked for, or only what is known of them.
    pub want: Want,
    /// What the client makes it depend on.
    pub preconditions: Preconditions,
    /// How the bytes may be coded.
    pub accepts: AcceptedCodings,
    /// The size, format and quality, if not the image's own.
    pub asked: Option<Transform>,
}

/// How much of an image a request is after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// The bytes, or where they are.
    Body,
    /// The bytes, wherever they are.
    BodyNoRedirect,
    /// Only what is known of them.
    Metadata,
}

/// What a read found, and where it came from.
#[derive(Debug)]
pub struct Answer {
    /// What to send.
    pub content: AnswerContent,
    /// What it took.
    pub served: CacheStatus,
    /// How long the parts of that took.
    pub times: Timing,
}

/// What to send.
#[derive(Debug)]
pub enum AnswerContent {
    /// The image.
    Image(Representation),
    /// What a GET would send, without its bytes.
    Metadata(Arc<Metadata>),
    /// The image is elsewhere, and so should the client go.
    Redirect(Arc<RemoteImage>),
    /// The client has it already.
    NotModified(Arc<Metadata>),
    /// The client doesn't want what there is.
    PreconditionFailed(Arc<Metadata>),
}

/// What an answer took, in the terms of RFC 9211.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheStatus {
    /// Nothing but memory.
    Hit,
    /// Memory, and a rendering of what was there.
    Rendered,
    /// A fetch.
    Fetched {
        /// Led by another request.
        collapsed: bool,
        /// Whether the bytes are in memory now.
        kept: bool,
    },
    /// A fetch that found the version in memory to be the one in the store.
    Revalidated {
        /// Led by another request.
        collapsed: bool,
    },
    /// The last known version, since the store can't be reached.
    Stale {
        /// For how long nobody has vouched for it.
        age: Duration,
    },
}

/// How long the parts of a fetch took; none where there was none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timing {
    /// Asking the store and reading its answer, with the wait for room.
    pub store: Duration,
    /// Fetching an image that isn't in the store.
    pub origin: Duration,
    /// Telling which version the value is.
    pub hash: Duration,
    /// Making an image of it.
    pub decode: Duration,
    /// Making a variant of that.
    pub render: Duration,
}

/// A read without an image.
#[derive(Debug)]
pub struct ReadFailure {
    /// Why.
    pub error: ReadError,
    /// Where that is known from; `None` where it isn't known what the store holds.
    pub served: Option<CacheStatus>,
    /// How long the parts of the fetch took.
    pub times: Timing,
}

impl ReadFailure {
    fn new(error: ReadError, served: Option<CacheStatus>, times: Timing) -> ReadFailure {
        ReadFailure { error, served, times }
    }
}

/// Why a read has no image.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// There is no such key.
    #[error("there is no image with this id")]
    Absent,
    /// There is a value, and it is no image.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The object store that has the image had no answer, or not the right one.
    #[error(transparent)]
    Offload(Box<OffloadError>),
    /// The store had no answer.
    #[error(transparent)]
    Store(StoreError),
    /// As many requests wait for this image, or as many images are fetched, as may.
    #[error("too many requests are waiting for this image, or for others")]
    Busy,
    /// Memory is full of images that are being fetched and sent.
    #[error(transparent)]
    OverBudget(#[from] OverBudget),
    /// It isn't there in any format that the client or the address asks for.
    #[error(transparent)]
    NotAcceptable(#[from] NotAcceptable),
    /// It can't be rendered.
    #[error(transparent)]
    Render(#[from] RenderError),
    /// The fetch failed in a way that it should not.
    #[error("the image can't be fetched")]
    Lost(#[from] Lost),
}

/// What one fetch brings to all who wait for it.
pub type Outcome = Result<FetchOutcome, FetchError>;

/// What a fetch found.
#[derive(Debug, Clone)]
pub struct FetchOutcome {
    fetched: Fetched,
    /// When that will have expired.
    expires: Option<Instant>,
    times: Timing,
}

/// Why a fetch found nothing out.
#[derive(Debug, Clone)]
pub enum FetchError {
    /// The store had no answer.
    Store(StoreError),
    /// Memory is full.
    OverBudget(OverBudget),
}

impl From<StoreError> for FetchError {
    fn from(error: StoreError) -> FetchError {
        FetchError::Store(error)
    }
}

impl From<OffloadError> for ReadError {
    fn from(error: OffloadError) -> ReadError {
        match error {
            OffloadError::OverBudget(over_budget) => ReadError::OverBudget(over_budget),
            error => ReadError::Offload(Box::new(error)),
        }
    }
}

impl From<OverBudget> for FetchError {
    fn from(error: OverBudget) -> FetchError {
        FetchError::OverBudget(error)
    }
}

impl From<FetchError> for ReadError {
    fn from(error: FetchError) -> ReadError {
        match error {
            FetchError::Store(error) => ReadError::Store(error),
            FetchError::OverBudget(error) => ReadError::OverBudget(error),
        }
    }
}

/// What is under a key.
#[derive(Debug, Clone)]
enum Fetched {
    /// An image.
    Present(Image, Source),
    /// Nothing.
    Absent,
    /// A value that is no image.
    Corrupt(Corrupt),
    /// An image that is elsewhere.
    Offloaded(Arc<RemoteImage>),
}

/// Where the bytes of a fetched version came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// They were in memory already.
    Memory,
    /// They were decoded, and kept or not.
    Decoded(Kept),
}

/// Answers a request for an image.
pub async fn image(app: &Arc<App>, request: ImageRequest) -> Result<Answer, ReadFailure> {
    let answer = answer(app, &request).await;
    let served = answer.as_ref().map_or_else(|failure| failure.served, |it| Some(it.served));
    match served {
        Some(status) => app.metrics.count_read(status),
        None => app.metrics.count_failed_read(),
    }
    if let Err(ReadFailure { error: ReadError::Corrupt(_), .. }) = &answer {
        app.metrics.corrupt_records.inc();
    }
    answer
}

async fn answer(app: &Arc<App>, request: &ImageRequest) -> Result<Answer, ReadFailure> {
    // 1 index
    let admission = match app.index.look_up(&request.id) {
        Lookup::Current(known) => {
            let hit = |error| ReadFailure::new(error, Some(CacheStatus::Hit), Timing::default());
            match known {
                Known::Present(metadata) => {
                    match from_memory(app, request, &metadata, CacheStatus::Hit).await {
                        Some(answer) => return answer,
                        None => app.index.ask(&request.id),
                    }
                }
                Known::Offloaded(remote) => {
                    return from_elsewhere(
                        app,
                        request,
                        &remote,
                        CacheStatus::Hit,
                        Timing::default(),
                    )
                    .await;
                }
                Known::Absent => return Err(hit(ReadError::Absent)),
                Known::Corrupt(corrupt) => return Err(hit(ReadError::Corrupt(corrupt))),
            }
        }
        Lookup::Stale(known) => {
            if let Some(answer) = stale(app, request, &known).await {
                return answer;
            }
            let reason = app.index.coherence().reason().unwrap_or_default().to_owned();
            let error = ReadError::Store(StoreError::unreachable(reason));
            return Err(ReadFailure::new(error, None, Timing::default()));
        }
        Lookup::Ask(admission) => admission,
    };

    // 2 store and 5 decode, together with whoever asks for the same; or the last known version, as soon as the
    // store is known to be unreachable
    let mut fetch = pin!(fetch(app, &request.id, admission));
    let fetched = tokio::select! {
        fetched = &mut fetch => fetched,
        () = app.index.until_unreachable() => match last_known(app, request).await {
            Some(answer) => return answer,
            None => fetch.await,
        },
    };
    match fetched {
        Ok((Found::Image(image), served, times)) => {
            from_image(app, request, image, served, times).await
        }
        Ok((Found::ObjectRef(remote), served, times)) => {
            from_elsewhere(app, request, &remote, served, times).await
        }
        Err(failure) => match failure.error {
            ReadError::Store(StoreError::Unreachable(_) | StoreError::TimedOut) => {
                last_known(app, request).await.unwrap_or(Err(failure))
            }
            _ => Err(failure),
        },
    }
}

/// The answer with the last known version, if there is one.
async fn last_known(app: &Arc<App>, request: &ImageRequest) -> Option<Result<Answer, ReadFailure>> {
    stale(app, request, &app.index.last_known(&request.id)?).await
}

/// The answer with a version that may be out of date, if its bytes are in memory or not needed.
async fn stale(
    app: &Arc<App>,
    request: &ImageRequest,
    known: &LastKnown,
) -> Option<Result<Answer, ReadFailure>> {
    let served = CacheStatus::Stale { age: known.age };
    match &known.known {
        Known::Present(metadata) => from_memory(app, request, metadata, served).await,
        Known::Offloaded(remote) => {
            Some(from_elsewhere(app, request, remote, served, Timing::default()).await)
        }
        Known::Absent | Known::Corrupt(_) => None,
    }
}

/// The answer about an image that is elsewhere: where that is, or what is there, from memory or from the object store.
/// Its version is known, so nothing here can be out of date.
async fn from_elsewhere(
    app: &Arc<App>,
    request: &ImageRequest,
    remote: &Arc<RemoteImage>,
    served: CacheStatus,
    mut times: Timing,
) -> Result<Answer, ReadFailure> {
    let Some(offload) = &app.offload else {
        let error = ReadError::Corrupt(Corrupt::ForeignUrl);
        return Err(ReadFailure::new(error, Some(served), times));
    };
    let as_it_is = request.asked.is_none() && request.want != Want::BodyNoRedirect;
    if as_it_is && offload.redirect(remote).is_some() {
        return Ok(Answer { content: AnswerContent::Redirect(Arc::clone(remote)), served, times });
    }
    if let Some(metadata) = remote.metadata.get() {
        if let Some(answer) = from_memory(app, request, metadata, served).await {
            return answer;
        }
    } else if let Some(image) = app.cache.get_image(&request.id, remote.version) {
        let _ = remote.metadata.set(Arc::clone(&image.original.metadata));
        return from_image(app, request, image, served, times).await;
    }
    let (fetched, collapsed) = offload::fetch(app, offload, &request.id, remote).await;
    let (image, kept, time) =
        fetched.map_err(|error| ReadFailure::new(ReadError::from(error), None, times))?;
    times.origin = time;
    let served = match served {
        CacheStatus::Stale { .. } => served,
        _ => CacheStatus::Fetched { collapsed, kept: kept == Kept::Yes },
    };
    from_image(app, request, image, served, times).await
}

/// The answer about a known version, unless its bytes are needed and have left.
async fn from_memory(
    app: &Arc<App>,
    request: &ImageRequest,
    original: &Arc<Metadata>,
    served: CacheStatus,
) -> Option<Result<Answer, ReadFailure>> {
    let times = Timing::default();
    // 3 validators, 4 LRU
    match known_form(app, request, original) {
        Ok(Some(content)) => return Some(Ok(Answer { content, served, times })),
        Ok(None) => {}
        Err(error) => return Some(Err(ReadFailure::new(error, Some(served), times))),
    }
    // Without a variant to render, what is in memory has been looked at.
    request.asked?;
    // 5 render
    let image = app.cache.get_image(&request.id, original.version)?;
    let served = if served == CacheStatus::Hit { CacheStatus::Rendered } else { served };
    Some(from_image(app, request, image, served, times).await)
}

/// The answer about a version, where none of its bytes are needed, or they are in memory.
fn known_form(
    app: &App,
    request: &ImageRequest,
    original: &Arc<Metadata>,
) -> Result<Option<AnswerContent>, ReadError> {
    let metadata = match choose(request, original)? {
        Choice::Stored(metadata) => metadata,
        Choice::Rendered(variant) => {
            let form = RepresentationKind::Variant(variant);
            if let Some(kept) = app.cache.get(&request.id, original.version, form) {
                let known = without_bytes(request, &kept.metadata);
                return Ok(known.or(Some(AnswerContent::Image(kept))));
            }
            // Its entity-tag is known before it is rendered; its length is not.
            let metadata = Arc::new(original.variant(variant, 0));
            return Ok(without_bytes(request, &metadata)
                .filter(|content| !matches!(content, AnswerContent::Metadata(_))));
        }
    };
    Ok(without_bytes(request, metadata).or_else(|| {
        app.cache.get(&request.id, metadata.version, metadata.kind).map(AnswerContent::Image)
    }))
}

/// The answer with an image whose bytes are here.
async fn from_image(
    app: &Arc<App>,
    request: &ImageRequest,
    image: Image,
    served: CacheStatus,
    mut times: Timing,
) -> Result<Answer, ReadFailure> {
    let failure = |error: ReadError, times| ReadFailure::new(error, Some(served), times);
    if keeps_moving(request) && image.original.metadata.animated.get().is_none() {
        let Representation { metadata, body } = image.original.clone();
        let look = move || picture::decode::is_animated(&body, metadata.media_type);
        let moves = on_blocking_thread(app, look).await;
        // Whoever was first has said the same.
        let _ = image.original.metadata.animated.set(moves);
    }
    let variant = match choose(request, &image.original.metadata) {
        Ok(Choice::Stored(metadata)) => {
            let metadata = Arc::clone(metadata);
            let content = without_bytes(request, &metadata)
                .unwrap_or_else(|| AnswerContent::Image(image.into_form(&metadata)));
            return Ok(Answer { content, served, times });
        }
        Ok(Choice::Rendered(variant)) => variant,
        Err(error) => return Err(failure(error, times)),
    };
    match known_form(app, request, &image.original.metadata) {
        Ok(Some(content)) => return Ok(Answer { content, served, times }),
        Ok(None) => {}
        Err(error) => return Err(failure(error, times)),
    }
    let rendered = variant_of(app, &request.id, image.original, variant).await;
    let rendered = rendered.map_err(|error| failure(error.into(), times))?;
    times.render = rendered.time;
    let metadata = &rendered.representation.metadata;
    let content =
        without_bytes(request, metadata).unwrap_or(AnswerContent::Image(rendered.representation));
    Ok(Answer { content, served, times })
}

/// Renders a variant of an image.
async fn variant_of(
    app: &Arc<App>,
    id: &ImageId,
    original: Representation,
    variant: Variant,
) -> Result<Rendered, RenderError> {
    let (version, cache) = (original.metadata.version, Arc::clone(app));
    render::render(app, id, version, RepresentationKind::Variant(variant), move |limits| {
        let metadata = &original.metadata;
        let bytes = picture::render(&original.body, metadata.media_type, variant, limits)?;
        let metadata = Arc::new(metadata.variant(variant, bytes.len()));
        Ok(Representation { metadata, body: cache.cache.count(bytes) })
    })
    .await
}

/// What is known of an image, and a small picture of it.
#[derive(Debug)]
pub struct Info {
    /// Of the original.
    pub metadata: Arc<Metadata>,
    /// Size and ThumbHash, where the image can be decoded.
    pub preview: Option<Preview>,
    /// The thumbnail, where it can.
    pub thumbnail: Option<Representation>,
    /// When the store will drop it.
    pub expires: Option<Instant>,
    /// What it took to get the image.
    pub served: CacheStatus,
    /// How long the parts of that took.
    pub times: Timing,
}

/// What is known of an image.
pub async fn info(app: &Arc<App>, id: &ImageId) -> Result<Info, ReadFailure> {
    let request = ImageRequest {
        id: id.clone(),
        want: Want::BodyNoRedirect,
        preconditions: Preconditions::default(),
        accepts: AcceptedCodings::UNSAID,
        asked: None,
    };
    let answer = image(app, request).await?;
    let AnswerContent::Image(original) = answer.content else {
        return Err(ReadFailure::new(ReadError::Absent, Some(answer.served), answer.times));
    };
    let failure =
        |error: RenderError| ReadFailure::new(error.into(), Some(answer.served), answer.times);
    let metadata = Arc::clone(&original.metadata);
    let info = Info {
        metadata: Arc::clone(&metadata),
        preview: None,
        thumbnail: None,
        expires: app.index.expiry(id),
        served: answer.served,
        times: answer.times,
    };
    let Ok(Resolved::Variant(thumbnail)) = Transform::THUMBNAIL.resolve(metadata.media_type) else {
        return Ok(info);
    };
    let preview = match app.cache.get(id, metadata.version, RepresentationKind::Preview) {
        Some(preview) => preview,
        None => outline_of(app, id, original.clone()).await.map_err(failure)?,
    };
    let preview = serde_json::from_slice(&preview.body).ok();
    let kept = app.cache.get(id, metadata.version, RepresentationKind::Variant(thumbnail));
    let thumbnail = if let Some(kept) = kept {
        kept
    } else {
        variant_of(app, id, original, thumbnail).await.map_err(failure)?.representation
    };
    Ok(Info { preview, thumbnail: Some(thumbnail), ..info })
}

async fn outline_of(
    app: &Arc<App>,
    id: &ImageId,
    original: Representation,
) -> Result<Representation, RenderError> {
    let (version, cache) = (original.metadata.version, Arc::clone(app));
    let rendered = render::render(app, id, version, RepresentationKind::Preview, move |limits| {
        let metadata = &original.metadata;
        let preview = picture::preview(&original.body, metadata.media_type, limits)?;
        let json = serde_json::to_vec(&preview).unwrap_or_default();
        let metadata = Arc::new(metadata.preview(json.len()));
        Ok(Representation { metadata, body: cache.cache.count(json) })
    });
    Ok(rendered.await?.representation)
}

/// Whether a request takes moving pictures as they are: where the format is left to the server, and the size too.
fn keeps_moving(request: &ImageRequest) -> bool {
    request.asked.is_some_and(|asked| asked.is_negotiated() && !asked.is_resized())
}

/// Which representation a request gets.
enum Choice<'a> {
    /// One that comes with the image.
    Stored(&'a Arc<Metadata>),
    /// One that is made of it.
    Rendered(Variant),
}

fn choose<'a>(
    request: &ImageRequest,
    original: &'a Arc<Metadata>,
) -> Result<Choice<'a>, ReadError> {
    let resolved = request.asked.map(|asked| asked.resolve(original.media_type)).transpose()?;
    let moves = original.animated.get() == Some(&true);
    Ok(match resolved {
        // Another format alone would only stop it.
        Some(Resolved::Variant(_)) if moves && keeps_moving(request) => {
            Choice::Stored(image::select(original, request.accepts))
        }
        Some(Resolved::Variant(variant)) => Choice::Rendered(variant),
        Some(Resolved::Original) | None => Choice::Stored(image::select(original, request.accepts)),
    })
}

/// The answer about a representation, where none of its bytes are needed.
fn without_bytes(request: &ImageRequest, metadata: &Arc<Metadata>) -> Option<AnswerContent> {
    match (request.preconditions.evaluate(metadata), request.want) {
        (Verdict::NotModified, _) => Some(AnswerContent::NotModified(Arc::clone(metadata))),
        (Verdict::Failed, _) => Some(AnswerContent::PreconditionFailed(Arc::clone(metadata))),
        (Verdict::Proceed, Want::Metadata) => Some(AnswerContent::Metadata(Arc::clone(metadata))),
        (Verdict::Proceed, Want::Body | Want::BodyNoRedirect) => None,
    }
}

/// What there is under a key.
enum Found {
    /// An image, with its bytes.
    Image(Image),
    /// One that is elsewhere.
    ObjectRef(Arc<RemoteImage>),
}

/// Waits for the fetch that this request joins or leads.
async fn fetch(
    app: &Arc<App>,
    id: &ImageId,
    mut admission: Admission<Outcome>,
) -> Result<(Found, CacheStatus, Timing), ReadFailure> {
    let unknown = |error: ReadError| ReadFailure::new(error, None, Timing::default());
    let (outcome, collapsed) = loop {
        let (flight, collapsed) = match admission {
            Admission::Join(flight) => {
                app.metrics.collapsed.inc();
                (flight, true)
            }
            Admission::Lead(lease) => {
                let flight = lease.flight();
                // A task of its own: it ends by itself, within the store's time-outs, whoever still waits.
                // Should it panic, its lease is dropped and those who wait are told.
                tokio::spawn(lead(Arc::clone(app), lease));
                (flight, false)
            }
            Admission::Full => {
                app.metrics.count_shed(Shed::Waiters);
                return Err(unknown(ReadError::Busy));
            }
        };
        let outcome = flight.outcome().await.map_err(|lost| unknown(lost.into()))?;
        let outcome = outcome.map_err(|error| unknown(error.into()))?;
        // Who joined late may have begun after the expiry of what the store handed out before it.
        if collapsed && outcome.expires.is_some_and(|expires| Instant::now() >= expires) {
            admission = app.index.ask(id);
        } else {
            break (outcome, collapsed);
        }
    };
    let times = outcome.times;
    let error = match outcome.fetched {
        Fetched::Present(image, Source::Memory) => {
            return Ok((Found::Image(image), CacheStatus::Revalidated { collapsed }, times));
        }
        Fetched::Present(image, Source::Decoded(kept)) => {
            let served = CacheStatus::Fetched { collapsed, kept: kept == Kept::Yes };
            return Ok((Found::Image(image), served, times));
        }
        Fetched::Offloaded(remote) => {
            let served = CacheStatus::Fetched { collapsed, kept: false };
            return Ok((Found::ObjectRef(remote), served, times));
        }
        Fetched::Absent => ReadError::Absent,
        Fetched::Corrupt(corrupt) => ReadError::Corrupt(corrupt),
    };
    Err(ReadFailure::new(error, Some(CacheStatus::Fetched { collapsed, kept: false }), times))
}

/// Fetches an image for all who wait, and keeps what was found before they are told.
async fn lead(app: Arc<App>, mut lease: FetchLease<Outcome>) {
    app.metrics.fetches.inc();
    lease.mark_sent().await;
    let outcome = ask_store(&app, lease.id()).await.map(|(outcome, digest)| {
        let known = match &outcome.fetched {
            Fetched::Present(image, _) => Known::Present(Arc::clone(&image.original.metadata)),
            Fetched::Absent => Known::Absent,
            Fetched::Corrupt(corrupt) => Known::Corrupt(corrupt.clone()),
            Fetched::Offloaded(remote) => Known::Offloaded(Arc::clone(remote)),
        };
        let found = index::FetchResult { known, digest, expires: outcome.expires };
        if let Some(version) = lease.keep(found) {
            app.cache.remove(lease.id(), version);
        }
        outcome
    });
    if let Err(FetchError::Store(error)) = &outcome {
        app.metrics.count_store_error(error);
    }
    lease.complete(outcome);
}

/// Asks the store, and makes an image of its answer.
async fn ask_store(
    app: &Arc<App>,
    id: &ImageId,
) -> Result<(FetchOutcome, Option<Digest>), FetchError> {
    let began = Instant::now();
    let value = async {
        let size = app.store.size(id).await?;
        // The room that the value takes until it is decoded and dropped.
        let room = app.reserve(size).await?;
        // An expiry is counted from before the question, so that it is never later here than there.
        let asked = Instant::now();
        let stored = app.store.get(id, size).await?;
        Ok::<_, FetchError>((stored, asked, room))
    };
    let value = value.await;
    let mut times = Timing { store: began.elapsed(), ..Timing::default() };
    let nothing = |fetched| Ok((FetchOutcome { fetched, expires: None, times }, None));
    let (stored, asked, _room) = match value {
        Ok(value) => value,
        Err(FetchError::Store(StoreError::WrongType)) => {
            return nothing(unreadable(app, id, Corrupt::WrongType));
        }
        Err(FetchError::Store(StoreError::TooLarge { size, limit })) => {
            return nothing(unreadable(app, id, Corrupt::TooLarge { size, limit }));
        }
        Err(error) => return Err(error),
    };
    let Some(stored) = stored else {
        return nothing(Fetched::Absent);
    };
    let expires = stored.time_to_live.and_then(|left| asked.checked_add(left));
    let (opened, digest, opening) = open(app, id, stored.value).await;
    times.hash = opening.hash;
    times.decode = opening.decode;
    let fetched = match opened {
        Opened::Known(image) => Fetched::Present(image, Source::Memory),
        Opened::Decoded(original) => {
            let began = Instant::now();
            let image = with_coded_forms(app, original).await;
            times.decode += began.elapsed();
            let kept = app.cache.insert(id, image.clone());
            Fetched::Present(image, Source::Decoded(kept))
        }
        Opened::Offloaded(remote) => Fetched::Offloaded(Arc::new(remote)),
        Opened::Corrupt(corrupt) => Fetched::Corrupt(corrupt),
    };
    Ok((FetchOutcome { fetched, expires, times }, Some(digest)))
}

/// What is in a value.
enum Opened {
    /// An image that is still in memory.
    Known(Image),
    /// An image that was not.
    Decoded(Representation),
    /// An image that is elsewhere.
    Offloaded(RemoteImage),
    /// No image.
    Corrupt(Corrupt),
}

/// Opens a value. One that was only written again is known by its digest, without a new hash, and where its
/// bytes are still in memory, without a new decoding. Any other is hashed and decoded at the same time: nine tenths of
/// the work is its MD5, which one core alone can do.
async fn open(app: &Arc<App>, id: &ImageId, value: Bytes) -> (Opened, Digest, Timing) {
    let mut times = Timing::default();
    let mut digest = None;
    if app.index.has_seen(id) {
        let value = value.clone();
        let (seen, time) = off_worker(app, value.len(), move || timed(|| Digest::of(&value))).await;
        (digest, times.hash) = (Some(seen), time);
    }
    let known = digest.and_then(|digest| app.index.recognise(id, digest));
    if let (Some(metadata), Some(digest)) = (&known, digest)
        && let Some(image) = app.cache.get_image(id, metadata.version)
    {
        return (Opened::Known(image), digest, times);
    }
    let hashing = async {
        if let Some(metadata) = known {
            return (metadata.version, Duration::ZERO);
        }
        app.metrics.hashes.inc();
        let value = value.clone();
        off_worker(app, value.len(), move || timed(|| Version::of(&value))).await
    };
    let decoding = {
        let value = value.clone();
        let length = value.len();
        let decode = move || (digest.unwrap_or_else(|| Digest::of(&value)), decode(&value));
        off_worker(app, length, move || timed(decode))
    };
    let ((version, hash), ((digest, decoded), decode)) = tokio::join!(hashing, decoding);
    times.hash += hash;
    times.decode = decode;
    if let Some(image) = app.cache.get_image(id, version) {
        return (Opened::Known(image), digest, times);
    }
    let opened = decoded.and_then(|decoded| with_version(app, id, version, &value, decoded));
    let opened = opened.unwrap_or_else(|corrupt| {
        app.corrupt_log.report(id, Some(version), &corrupt);
        Opened::Corrupt(corrupt)
    });
    (opened, digest, times)
}

/// What some work gives, and how long it took.
fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let began = Instant::now();
    (work(), began.elapsed())
}

/// What is in a record, before its version is known.
struct DecodedRecord {
    /// None where it is elsewhere.
    image: Option<record::Decoded>,
    /// The type that the writer gave, where it isn't what the bytes are.
    mistaken: Option<String>,
    created_at: Option<SystemTime>,
}

fn decode(value: &[u8]) -> Result<DecodedRecord, Corrupt> {
    let record = Record::parse(value)?;
    let image = match &record.content {
        record::Content::Inline(base64) => Some(record::decode(base64)?),
        record::Content::Offloaded(_) => None,
    };
    let declared = record.declared_type.filter(|declared| {
        image.as_ref().is_some_and(|image| !image.media_type.is_named(declared))
    });
    let mistaken = declared.map(|declared| declared.chars().take(64).collect());
    Ok(DecodedRecord { image, mistaken, created_at: record.created_at })
}

/// What is in a record, now that its version is known.
fn with_version(
    app: &App,
    id: &ImageId,
    version: Version,
    value: &[u8],
    content: DecodedRecord,
) -> Result<Opened, Corrupt> {
    let DecodedRecord { image, mistaken, created_at } = content;
    let Some(record::Decoded { bytes, media_type }) = image else {
        let record = Record::parse(value)?;
        let offload = app.offload.as_ref().ok_or(Corrupt::ForeignUrl)?;
        let remote = match &record.content {
            record::Content::Offloaded(it) => offload.locate(version, &record, it),
            record::Content::Inline(_) => None,
        };
        return remote.map(Opened::Offloaded).ok_or(Corrupt::ForeignUrl);
    };
    app.metrics.decodes.inc();
    if let Some(declared) = mistaken {
        app.metrics.type_mismatches.inc();
        let found = media_type.as_str();
        tracing::warn!(image.id = %id, declared, found, "the declared type is not what the bytes are");
    }
    let metadata = Arc::new(Metadata::new(version, media_type, bytes.len(), created_at));
    Ok(Opened::Decoded(Representation { metadata, body: app.cache.count(bytes) }))
}

/// The image with the coded forms that are worth having: text gets them, at once and once for all, so that
/// every length and entity-tag is known from then on; pixels are compressed already.
pub(crate) async fn with_coded_forms(app: &Arc<App>, original: Representation) -> Image {
    if original.metadata.media_type != MediaType::Svg {
        return original.into();
    }
    let cache = Arc::clone(app);
    on_blocking_thread(app, move || {
        let metadata = &original.metadata;
        let code = |coding: Coding| {
            let body = coding.encode(&original.body)?;
            let metadata = Arc::new(metadata.coded(coding, body.len()));
            Some(Representation { metadata, body: cache.cache.count(body) })
        };
        let coded: Vec<Representation> = Coding::ALL.into_iter().filter_map(code).collect();
        let metadata = Metadata {
            coded: coded.iter().map(|it| Arc::clone(&it.metadata)).collect(),
            ..Metadata::new(
                metadata.version,
                metadata.media_type,
                metadata.length,
                metadata.last_modified,
            )
        };
        let original = Representation { metadata: Arc::new(metadata), body: original.body };
        Image { original, coded }
    })
    .await
}

/// A value that the store wouldn't hand out is a corrupt record.
fn unreadable(app: &App, id: &ImageId, corrupt: Corrupt) -> Fetched {
    app.corrupt_log.report(id, None, &corrupt);
    Fetched::Corrupt(corrupt)
}

/// Runs work on a value of some length: here where it is short, on a blocking thread otherwise.
pub(crate) async fn off_worker<T: Send + 'static>(
    app: &App,
    length: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    if length <= INLINE_LIMIT { work() } else { on_blocking_thread(app, work).await }
}

async fn on_blocking_thread<T: Send + 'static>(
    app: &App,
    work: impl FnOnce() -> T + Send + 'static,
) -> T {
    let permit = Arc::clone(&app.decoding).acquire_owned().await;
    let work = tokio::task::spawn_blocking(move || {
        let _permit = permit;
        work()
    });
    work.await.expect("hashing and decoding don't panic, and the runtime ends after the requests")
}

/// Remembers which corrupt records were logged, so that each is logged once however often it is asked
/// for, and again when it is replaced by another corrupt one.
#[derive(Debug)]
pub struct CorruptLog(Mutex<LruCache<ImageId, (Option<Version>, Corrupt)>>);

impl CorruptLog {
    fn report(&self, id: &ImageId, version: Option<Version>, corrupt: &Corrupt) {
        let reported = (version, corrupt.clone());
        let mut log = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if log.get(id) != Some(&reported) {
            log.put(id.clone(), reported);
            drop(log);
            tracing::warn!(image.id = %id, reason = %corrupt, "corrupt record");
        }
    }
}

impl Default for CorruptLog {
    fn default() -> CorruptLog {
        let kept = NonZeroUsize::new(1024).expect("not zero");
        CorruptLog(Mutex::new(LruCache::new(kept)))
    }
}
