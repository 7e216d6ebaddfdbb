//! A snapshot of an image: one version, its metadata, and where its bytes are.

use std::sync::Arc;

use super::Reader;
use super::answer::{Answer, AnswerContent, ImageRequest, ReadError, ReadFailure, Timing, Want};
use super::choose::{Choice, Unsuited, choose, is_not_smaller, without_body};
use crate::cache::Insertion;
use crate::cache_status::CacheStatus;
use crate::image::preconditions::Verdict;
use crate::image::variant::{NotAcceptable, Transform};
use crate::image::{Image, ImageId, Metadata, Representation, RepresentationKind, Version};
use crate::offload::RemoteImage;
use crate::peer::PeerKey;
use crate::picture::Preview;
use crate::render::RenderError;
use crate::spans::Step;

/// One version of an image. Everything that is taken from a snapshot is of that version, whatever is written meanwhile.
///
/// There is one exception: if bytes are needed that have left memory, and the store has another version by then, the
/// snapshot moves on to that version as a whole.
#[derive(Debug)]
pub struct Snapshot {
    reader: Arc<Reader>,
    id: ImageId,
    /// The client that fetches are accounted to.
    client: Option<PeerKey>,
    source: Source,
    cache_status: CacheStatus,
    timing: Timing,
}

/// The place of the bytes of a snapshot.
#[derive(Debug)]
pub(super) enum Source {
    /// In memory, or if they have left it, in the store.
    Known(Arc<Metadata>),
    /// In memory, or nowhere: the store can't be reached. The error is the answer then.
    LastKnown(Arc<Metadata>, ReadError),
    /// In the object store, and perhaps in memory.
    Remote(Arc<RemoteImage>),
    /// Here.
    Image(Image),
}

/// Representations that a request can't get, or shouldn't.
#[derive(Debug, Default)]
struct Tried(Vec<(Version, RepresentationKind, Unsuited)>);

/// `None` for what can't be made of a picture; an error where it can be made later.
fn if_it_can_be_made<T>(made: Result<T, RenderError>) -> Result<Option<T>, RenderError> {
    match made {
        Err(RenderError::Picture(error)) if !error.is_timeout() => Ok(None),
        made => made.map(Some),
    }
}

impl Snapshot {
    pub(super) fn new(
        reader: &Arc<Reader>,
        id: &ImageId,
        client: Option<PeerKey>,
        source: Source,
        cache_status: CacheStatus,
        timing: Timing,
    ) -> Snapshot {
        let (reader, id) = (Arc::clone(reader), id.clone());
        Snapshot { reader, id, client, source, cache_status, timing }
    }

    /// The version.
    #[must_use]
    pub fn version(&self) -> Version {
        match &self.source {
            Source::Known(metadata) | Source::LastKnown(metadata, _) => metadata.version,
            Source::Remote(remote) => remote.version,
            Source::Image(image) => image.original.metadata.version,
        }
    }

    /// The metadata of the original; `None` for an image in the object store that hasn't been here yet.
    #[must_use]
    pub fn metadata(&self) -> Option<&Arc<Metadata>> {
        match &self.source {
            Source::Known(metadata) | Source::LastKnown(metadata, _) => Some(metadata),
            Source::Remote(remote) => remote.metadata.get(),
            Source::Image(image) => Some(&image.original.metadata),
        }
    }

    /// The source of the snapshot.
    #[must_use]
    pub fn cache_status(&self) -> CacheStatus {
        self.cache_status
    }

    /// Time spent on it so far.
    #[must_use]
    pub fn timing(&self) -> Timing {
        self.timing
    }

    /// Answers a request.
    pub async fn answer(mut self, request: &ImageRequest) -> Result<Answer, ReadFailure> {
        // Representations that turned out to be impossible, or no smaller than the original.
        let mut tried = Tried::default();
        loop {
            if let Some(redirect) = self.redirect(request) {
                return Ok(self.into_answer(redirect));
            }
            if let Some(content) =
                self.answer_from_memory(request, &mut tried).map_err(|error| self.failure(error))?
            {
                return Ok(self.into_answer(content));
            }
            let Some(image) = self.bytes().await? else { continue };
            let original = Arc::clone(&image.original.metadata);
            let choice = self.choose(request, &original, &tried);
            let (kind, is_last) = match choice.map_err(|error| self.failure(error))? {
                Choice::Stored(metadata) => {
                    let content = without_body(request, metadata);
                    let content = content.unwrap_or_else(|| {
                        AnswerContent::Image(image.into_representation(metadata))
                    });
                    return Ok(self.into_answer(content));
                }
                Choice::Made { kind, is_last } => (kind, is_last),
            };
            // Metadata that is known only now may make the bytes unnecessary.
            if let Some(content) =
                self.answer_from_memory(request, &mut tried).map_err(|error| self.failure(error))?
            {
                return Ok(self.into_answer(content));
            }
            let made = match self.make(image.original, kind).await {
                Ok(made) => made,
                Err(RenderError::Picture(error)) if !error.is_timeout() => {
                    if is_last {
                        let media_type = original.media_type;
                        return Err(self.failure(ReadError::Impossible { error, media_type }));
                    }
                    tried.0.push((original.version, kind, Unsuited::Impossible));
                    continue;
                }
                Err(error) => return Err(self.failure(error)),
            };
            if self.is_not_smaller(request, &original, &made.metadata) {
                tried.0.push((original.version, kind, Unsuited::NotSmaller));
                continue;
            }
            let content =
                without_body(request, &made.metadata).unwrap_or(AnswerContent::Image(made));
            return Ok(self.into_answer(content));
        }
    }

    /// The bytes of the original, with its content codings.
    pub async fn load(&mut self) -> Result<Image, ReadFailure> {
        loop {
            if let Some(image) = self.bytes().await? {
                return Ok(image);
            }
        }
    }

    /// The thumbnail; `None` for images that can't be decoded.
    pub async fn thumbnail(&mut self) -> Result<Option<Representation>, ReadFailure> {
        if self.metadata().is_none() {
            self.load().await?;
        }
        let media_type = self.metadata().map(|metadata| metadata.media_type);
        let variant = media_type.and_then(|media_type| Transform::THUMBNAIL.variant(media_type));
        let Some(variant) = variant else { return Ok(None) };
        let kind = RepresentationKind::Variant(variant);
        if let Some(kept) = self.reader.cache.get(&self.id, self.version(), kind) {
            return Ok(Some(kept));
        }
        let original = self.load().await?.original;
        // The snapshot may have moved on to a version of another type.
        if !original.metadata.media_type.is_decodable() {
            return Ok(None);
        }
        let thumbnail = if_it_can_be_made(self.make(original, kind).await);
        thumbnail.map_err(|error| self.failure(error))
    }

    /// Pixel size and `ThumbHash`; `None` for images that can't be decoded.
    pub async fn preview(&mut self) -> Result<Option<Arc<Preview>>, ReadFailure> {
        if let Some(known) = self.reader.renderer.known_preview(&self.id, self.version()) {
            return Ok(Some(known));
        }
        let original = self.load().await?.original;
        if !original.metadata.media_type.is_decodable() {
            return Ok(None);
        }
        let _step = Step::begin("render");
        let preview = self.reader.renderer.preview(&self.id, self.client, original).await;
        if_it_can_be_made(preview).map_err(|error| self.failure(error))
    }

    /// The redirect to the object store, if clients are sent there for this request.
    fn redirect(&self, request: &ImageRequest) -> Option<AnswerContent> {
        let Source::Remote(remote) = &self.source else { return None };
        let as_it_is = request.transform.is_none() && request.want != Want::BodyNoRedirect;
        let (location, metadata) = remote.redirect().filter(|_| as_it_is)?;
        // A redirect may be revalidated like an image. `If-Match` is for what has bytes (RFC 9110 §13.2.1).
        let not_modified = request.preconditions.evaluate(&metadata) == Verdict::NotModified;
        Some(AnswerContent::Redirect { metadata, location: location.to_owned(), not_modified })
    }

    /// The answer, if none of its bytes are needed or they are in memory.
    fn answer_from_memory(
        &self,
        request: &ImageRequest,
        tried: &mut Tried,
    ) -> Result<Option<AnswerContent>, NotAcceptable> {
        let Some(original) = self.metadata().map(Arc::clone).or_else(|| self.declared(request))
        else {
            return Ok(None);
        };
        let cache = &self.reader.cache;
        loop {
            let kind = match self.choose(request, &original, tried)? {
                Choice::Stored(metadata) => {
                    return Ok(without_body(request, metadata).or_else(|| {
                        let kept = cache.get(&self.id, metadata.version, metadata.kind);
                        kept.map(AnswerContent::Image)
                    }));
                }
                Choice::Made { kind, .. } => kind,
            };
            let Some(kept) = cache.get(&self.id, original.version, kind) else {
                // The entity-tag is known before the rest; the length isn't.
                let metadata = Arc::new(original.derived(kind, 0));
                return Ok(without_body(request, &metadata)
                    .filter(|content| !matches!(content, AnswerContent::Metadata(_))));
            };
            if !self.is_not_smaller(request, &original, &kept.metadata) {
                let known = without_body(request, &kept.metadata);
                return Ok(Some(known.unwrap_or(AnswerContent::Image(kept))));
            }
            tried.0.push((original.version, kind, Unsuited::NotSmaller));
        }
    }

    fn choose<'a>(
        &self,
        request: &ImageRequest,
        original: &'a Arc<Metadata>,
        tried: &Tried,
    ) -> Result<Choice<'a>, NotAcceptable> {
        let (id, version, renderer) = (&self.id, original.version, &self.reader.renderer);
        let is_negotiated = request.transform.is_some_and(|it| it.is_negotiated());
        choose(request, original, |kind| {
            let tried = tried.0.iter().find(|it| (it.0, it.1) == (version, kind));
            tried.map(|it| it.2).or_else(|| {
                if is_negotiated && renderer.is_not_smaller(id, version, kind) {
                    return Some(Unsuited::NotSmaller);
                }
                renderer.is_impossible(id, version, kind).then_some(Unsuited::Impossible)
            })
        })
    }

    /// True for a variant that isn't worth it. It is remembered, so that it isn't rendered again.
    fn is_not_smaller(
        &self,
        request: &ImageRequest,
        original: &Metadata,
        variant: &Metadata,
    ) -> bool {
        let is_not_smaller = is_not_smaller(request, original, variant);
        if is_not_smaller {
            let renderer = &self.reader.renderer;
            renderer.remember_not_smaller(&self.id, original.version, variant.kind);
        }
        is_not_smaller
    }

    /// The metadata according to the record, for an image in the object store that hasn't been here yet. The record doesn't
    /// say what is embedded in the file and if a picture moves, on which other representations depend.
    fn declared(&self, request: &ImageRequest) -> Option<Arc<Metadata>> {
        let Source::Remote(remote) = &self.source else { return None };
        remote.declared().filter(|_| request.transform.is_none())
    }

    /// The bytes of the original. Gives `None` if the record had to be read again for them, so that the snapshot may be of
    /// another version now.
    async fn bytes(&mut self) -> Result<Option<Image>, ReadFailure> {
        let cached = match &self.source {
            Source::Image(image) => Some(image.clone()),
            _ => self.reader.cache.get_image(&self.id, self.version()),
        };
        let image = match (&self.source, cached) {
            (Source::Image(_), image) => return Ok(image),
            (Source::Remote(remote), Some(image)) => {
                let _ = remote.metadata.set(Arc::clone(&image.original.metadata));
                image
            }
            (Source::Known(_) | Source::LastKnown(..), Some(image)) => image,
            (Source::Known(_), None) => {
                let reader = Arc::clone(&self.reader);
                let admission = reader.index.ask(&self.id);
                *self = reader.open_by_fetch(&self.id, self.client, admission).await?;
                return Ok(None);
            }
            (Source::LastKnown(_, error), None) => {
                return Err(ReadFailure::unknown(error.clone()));
            }
            (Source::Remote(remote), None) => {
                let (fetched, collapsed) = {
                    let _step = Step::begin("fetch from the object store");
                    remote.fetch(&self.id, self.client).await
                };
                let fetched = fetched.map_err(|error| ReadFailure {
                    timing: self.timing,
                    ..ReadFailure::unknown(error)
                })?;
                self.timing.origin = fetched.time;
                if !matches!(self.cache_status, CacheStatus::Stale { .. }) {
                    let stored = fetched.insertion == Insertion::Stored;
                    self.cache_status = CacheStatus::Fetched { collapsed, stored };
                }
                fetched.image
            }
        };
        self.source = Source::Image(image.clone());
        Ok(Some(image))
    }

    /// Makes a representation of the original.
    async fn make(
        &mut self,
        original: Representation,
        kind: RepresentationKind,
    ) -> Result<Representation, RenderError> {
        let made = {
            let (renderer, _step) = (&self.reader.renderer, Step::begin("render"));
            match kind {
                RepresentationKind::Variant(variant) => {
                    renderer.variant(&self.id, self.client, original, variant).await?
                }
                RepresentationKind::Stripped => {
                    renderer.stripped(&self.id, self.client, original).await?
                }
                RepresentationKind::Original | RepresentationKind::Coded(_) => {
                    return Ok(original);
                }
            }
        };
        if self.cache_status == CacheStatus::Hit {
            self.cache_status = CacheStatus::Rendered;
        }
        self.timing.render = made.time;
        Ok(made.product)
    }

    fn into_answer(self, content: AnswerContent) -> Answer {
        Answer { content, cache_status: self.cache_status, timing: self.timing }
    }

    fn failure(&self, error: impl Into<ReadError>) -> ReadFailure {
        let cache_status = Some(self.cache_status);
        ReadFailure { error: error.into(), cache_status, timing: self.timing }
    }
}
