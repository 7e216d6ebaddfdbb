//! Chooses the representation that a request gets, and evaluates its preconditions.

use std::sync::Arc;

use super::answer::{AnswerContent, ImageRequest, Want};
use crate::image::preconditions::Verdict;
use crate::image::variant::{NotAcceptable, Resolved, Transform};
use crate::image::{self, Embedded, Metadata, RepresentationKind};

/// The representation that a request gets.
pub(super) enum Choice<'a> {
    /// The original, or a content coding of it.
    Stored(&'a Arc<Metadata>),
    /// One that is made of the original.
    Made {
        /// Names it: a variant, or the stripped original.
        kind: RepresentationKind,
        /// True if there is nothing else to fall back to.
        is_last: bool,
    },
}

/// The reason for which a representation isn't chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unsuited {
    /// It can't be made.
    Impossible,
    /// It has as many bytes as the original, and as many pixels, or it doesn't move. That says the same of the other formats,
    /// well enough.
    NotSmaller,
}

/// Chooses among the representations of an original: the first that suits, or else the last.
pub(super) fn choose<'a>(
    request: &ImageRequest,
    original: &'a Arc<Metadata>,
    unsuited: impl Fn(RepresentationKind) -> Option<Unsuited>,
) -> Result<Choice<'a>, NotAcceptable> {
    let stored = || Ok(Choice::Stored(image::select(original, request.accepts)));
    let Some(transform) = request.transform else { return stored() };
    let mut candidates =
        transform.candidates(original.media_type, original.traits)?.into_iter().peekable();
    let mut wants_original = false;
    while let Some(candidate) = candidates.next() {
        let is_last = candidates.peek().is_none();
        let kind = match candidate {
            Resolved::Original => return stored(),
            Resolved::Stripped => RepresentationKind::Stripped,
            Resolved::Variant(_) if wants_original && !is_last => continue,
            Resolved::Variant(variant) => RepresentationKind::Variant(variant),
        };
        match unsuited(kind).filter(|_| !is_last) {
            None => return Ok(Choice::Made { kind, is_last }),
            Some(Unsuited::NotSmaller) => wants_original = true,
            Some(Unsuited::Impossible) => {}
        }
    }
    stored()
}

/// True for a variant that has as many bytes as the original at the same size, or fewer frames, where the client takes the
/// original too and the address leaves the choice to the server.
pub(super) fn is_not_smaller(
    request: &ImageRequest,
    original: &Metadata,
    variant: &Metadata,
) -> bool {
    variant.at_full_size
        && (variant.length >= original.length || variant.is_stopped)
        // The original is shown otherwise, or gives metadata away.
        && original.traits.embedded != Embedded::Inseparable
        && request.transform.filter(Transform::is_negotiated).is_some_and(|transform| {
            let candidates = transform.candidates(original.media_type, original.traits);
            candidates.is_ok_and(|it| it.contains(&Resolved::Original))
        })
}

/// The answer about a representation, if none of its bytes are needed.
pub(super) fn without_body(
    request: &ImageRequest,
    metadata: &Arc<Metadata>,
) -> Option<AnswerContent> {
    match (request.preconditions.evaluate(metadata), request.want) {
        (Verdict::NotModified, _) => Some(AnswerContent::NotModified(Arc::clone(metadata))),
        (Verdict::Failed, _) => Some(AnswerContent::PreconditionFailed(Arc::clone(metadata))),
        (Verdict::Proceed, Want::Metadata) => Some(AnswerContent::Metadata(Arc::clone(metadata))),
        (Verdict::Proceed, Want::Body | Want::BodyNoRedirect) => None,
    }
}
