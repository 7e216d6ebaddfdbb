//! A snapshot of an image: one version, its metadata, and where its bytes are.

use std::sync::Arc;

use super::Reader;
use super::answer::{Answer, AnswerContent, ImageRequest, ReadError, ReadFailure, Timing, Want};
use super::choose::{Choice, choose, without_body};
use crate::cache::Insertion;
use crate::cache_status::CacheStatus;
use crate::image::preconditions::Verdict;
use crate::image::variant::{NotAcceptable, Resolved, Transform, Variant};
use crate::image::{Image, ImageId, Metadata, Representation, RepresentationKind, Version};
use crate::offload::RemoteImage;
use crate::peer::PeerKey;
use crate::picture::Preview;
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
        loop {
            if let Some(redirect) = self.redirect(request) {
                return Ok(self.into_answer(redirect));
            }
            if let Some(content) =
                self.answer_from_memory(request).map_err(|error| self.failure(error))?
            {
                return Ok(self.into_answer(content));
            }
            let Some(image) = self.bytes().await? else { continue };
            let original = Arc::clone(&image.original.metadata);
            let choice = choose(request, &original).map_err(|error| self.failure(error))?;
            let variant = match choice {
                Choice::Stored(metadata) => {
                    let content = without_body(request, metadata);
                    let content = content.unwrap_or_else(|| {
                        AnswerContent::Image(image.into_representation(metadata))
                    });
                    return Ok(self.into_answer(content));
                }
                Choice::Rendered(variant) => variant,
            };
            // Metadata that is known only now may make the bytes unnecessary.
            if let Some(content) =
                self.answer_from_memory(request).map_err(|error| self.failure(error))?
            {
                return Ok(self.into_answer(content));
            }
            let rendered = self.render(image.original, variant).await?;
            let content =
                without_body(request, &rendered.metadata).unwrap_or(AnswerContent::Image(rendered));
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

    /// The thumbnail; `None` for images of a type that isn't decoded.
    pub async fn thumbnail(&mut self) -> Result<Option<Representation>, ReadFailure> {
        if self.metadata().is_none() {
            self.load().await?;
        }
        let media_type = self.metadata().map(|metadata| metadata.media_type);
        let resolved = media_type.map(|media_type| Transform::THUMBNAIL.resolve(media_type));
        let Some(Ok(Resolved::Variant(variant))) = resolved else { return Ok(None) };
        let kind = RepresentationKind::Variant(variant);
        if let Some(kept) = self.reader.cache.get(&self.id, self.version(), kind) {
            return Ok(Some(kept));
        }
        let original = self.load().await?.original;
        // The snapshot may have moved on to a version of another type.
        if !original.metadata.media_type.is_decodable() {
            return Ok(None);
        }
        self.render(original, variant).await.map(Some)
    }

    /// Pixel size and `ThumbHash`; `None` for images of a type that isn't decoded.
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
        preview.map(Some).map_err(|error| self.failure(error))
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
    ) -> Result<Option<AnswerContent>, NotAcceptable> {
        let Some(original) = self.metadata().map(Arc::clone).or_else(|| self.declared(request))
        else {
            return Ok(None);
        };
        let cache = &self.reader.cache;
        Ok(match choose(request, &original)? {
            Choice::Stored(metadata) => without_body(request, metadata).or_else(|| {
                let kept = cache.get(&self.id, metadata.version, metadata.kind);
                kept.map(AnswerContent::Image)
            }),
            Choice::Rendered(variant) => {
                let kind = RepresentationKind::Variant(variant);
                match cache.get(&self.id, original.version, kind) {
                    Some(kept) => {
                        let known = without_body(request, &kept.metadata);
                        Some(known.unwrap_or(AnswerContent::Image(kept)))
                    }
                    // A variant's entity-tag is known before it is rendered; its length isn't.
                    None => without_body(request, &Arc::new(original.variant(variant, 0)))
                        .filter(|content| !matches!(content, AnswerContent::Metadata(_))),
                }
            }
        })
    }

    /// The metadata according to the record, for an image in the object store that hasn't been here yet. The record doesn't
    /// say if a picture moves, on which negotiation depends.
    fn declared(&self, request: &ImageRequest) -> Option<Arc<Metadata>> {
        let Source::Remote(remote) = &self.source else { return None };
        let is_negotiated = request.transform.is_some_and(|it| it.is_negotiated());
        remote.declared().filter(|_| !is_negotiated)
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
                    remote.fetch(&self.id).await
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

    async fn render(
        &mut self,
        original: Representation,
        variant: Variant,
    ) -> Result<Representation, ReadFailure> {
        if self.cache_status == CacheStatus::Hit {
            self.cache_status = CacheStatus::Rendered;
        }
        let rendered = {
            let (renderer, _step) = (&self.reader.renderer, Step::begin("render"));
            renderer.variant(&self.id, self.client, original, variant).await
        };
        let rendered = rendered.map_err(|error| self.failure(error))?;
        self.timing.render = rendered.time;
        Ok(rendered.product)
    }

    fn into_answer(self, content: AnswerContent) -> Answer {
        Answer { content, cache_status: self.cache_status, timing: self.timing }
    }

    fn failure(&self, error: impl Into<ReadError>) -> ReadFailure {
        let cache_status = Some(self.cache_status);
        ReadFailure { error: error.into(), cache_status, timing: self.timing }
    }
}
