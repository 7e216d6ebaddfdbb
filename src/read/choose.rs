//! Chooses the representation that a request gets, and evaluates its preconditions.

use std::sync::Arc;

use super::answer::{AnswerContent, ImageRequest, Want};
use crate::image::preconditions::Verdict;
use crate::image::variant::{NotAcceptable, Resolved, Variant};
use crate::image::{self, Metadata};

/// The representation that a request gets.
pub(super) enum Choice<'a> {
    /// The original, or a content coding of it.
    Stored(&'a Arc<Metadata>),
    /// A variant that is rendered.
    Rendered(Variant),
}

/// Chooses among the representations of an original.
pub(super) fn choose<'a>(
    request: &ImageRequest,
    original: &'a Arc<Metadata>,
) -> Result<Choice<'a>, NotAcceptable> {
    let resolved = request.transform.map(|it| it.resolve(original.media_type)).transpose()?;
    Ok(match resolved {
        Some(Resolved::Variant(variant)) if !keeps_moving(request, original) => {
            Choice::Rendered(variant)
        }
        _ => Choice::Stored(image::select(original, request.accepts)),
    })
}

/// True for a moving picture whose format alone is left to the server: another format would only stop it.
fn keeps_moving(request: &ImageRequest, original: &Metadata) -> bool {
    original.animated && request.transform.is_some_and(|it| it.is_negotiated() && !it.is_resized())
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
