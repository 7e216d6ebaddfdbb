//! Reads as values: a request for an image, and the answer or the failure.

use std::sync::Arc;
use std::time::Duration;

use crate::budget::OverBudget;
use crate::cache_status::CacheStatus;
use crate::coalesce::Lost;
use crate::image::coding::AcceptedCodings;
use crate::image::preconditions::Preconditions;
use crate::image::record::Corrupt;
use crate::image::variant::{Format, NotAcceptable, Transform};
use crate::image::{ImageId, MediaType, Metadata, Representation};
use crate::offload::OffloadError;
use crate::peer::PeerKey;
use crate::picture::PictureError;
use crate::render::RenderError;
use crate::store::StoreError;

/// A parsed and valid request for an image.
#[derive(Debug)]
pub struct ImageRequest {
    /// The image.
    pub id: ImageId,
    /// The client that asks, if it isn't the server itself.
    pub client: Option<PeerKey>,
    /// The part of it that is asked for.
    pub want: Want,
    /// The client's preconditions.
    pub preconditions: Preconditions,
    /// The content codings that the client accepts.
    pub accepts: AcceptedCodings,
    /// The size, format and quality, if not the image's own.
    pub transform: Option<Transform>,
}

/// The part of an image that a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// The bytes, or a redirect to them.
    Body,
    /// The bytes, even if they are in an object store that clients are redirected to.
    BodyNoRedirect,
    /// The metadata.
    Metadata,
}

/// An answer, and where it came from.
#[derive(Debug)]
pub struct Answer {
    /// The answer itself.
    pub content: AnswerContent,
    /// The source of the answer.
    pub cache_status: CacheStatus,
    /// Time spent on its parts.
    pub timing: Timing,
}

/// The content of an answer.
#[derive(Debug)]
pub enum AnswerContent {
    /// A representation.
    Image(Representation),
    /// The metadata of the representation that a GET would send.
    Metadata(Arc<Metadata>),
    /// A redirect to the object store.
    Redirect {
        /// The metadata of the redirect: the image's validators, and no length.
        metadata: Arc<Metadata>,
        /// The public address.
        location: String,
        /// True if the client has this redirect already.
        not_modified: bool,
    },
    /// The client has the representation already.
    NotModified(Arc<Metadata>),
    /// A precondition excludes the representation.
    PreconditionFailed(Arc<Metadata>),
}

/// Time spent on the parts of a read. Zero for parts that weren't needed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Timing {
    /// Waiting for memory, asking the store and reading its answer.
    pub store: Duration,
    /// Fetching an image from the object store.
    pub origin: Duration,
    /// Hashing the value.
    pub hash: Duration,
    /// Decoding the image from the record, and compressing it if it is text.
    pub decode: Duration,
    /// Rendering a variant.
    pub render: Duration,
}

/// A read without an answer.
#[derive(Debug)]
pub struct ReadFailure {
    /// The reason.
    pub error: ReadError,
    /// The source of the failure; `None` if the content of the store isn't known.
    pub cache_status: Option<CacheStatus>,
    /// Time spent on the parts of the read.
    pub timing: Timing,
}

impl ReadFailure {
    /// A failure to find out what the store holds.
    pub(super) fn unknown(error: impl Into<ReadError>) -> ReadFailure {
        ReadFailure { error: error.into(), cache_status: None, timing: Timing::default() }
    }
}

/// Reasons for a failed read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// There is no such key.
    #[error("there is no image with this id")]
    Absent,
    /// The value is no image.
    #[error(transparent)]
    Corrupt(#[from] Corrupt),
    /// The object store that has the image didn't answer, or not with that image.
    #[error(transparent)]
    Offload(Box<OffloadError>),
    /// The store didn't answer.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Too many requests wait for this image, or too many images are being fetched.
    #[error("too many requests are waiting for this image, or for others ([limits] waiters)")]
    Busy,
    /// Memory is full of images that are being fetched and sent.
    #[error(transparent)]
    OverBudget(#[from] OverBudget),
    /// The image can't be had in a format that the client or the address asks for.
    #[error(transparent)]
    NotAcceptable(#[from] NotAcceptable),
    /// The image can't be made in a format that the address names.
    #[error("{error}: the image can be had {}", alternatives(.error, *.media_type))]
    Impossible {
        /// The reason.
        #[source]
        error: PictureError,
        /// The type of the image.
        media_type: MediaType,
    },
    /// The image can't be rendered.
    #[error(transparent)]
    Render(#[from] RenderError),
    /// The fetch panicked.
    #[error("the image can't be fetched")]
    Lost(#[from] Lost),
}

impl ReadError {
    /// The type of an image that can't be shown otherwise than as it is.
    #[must_use]
    pub fn unconverted_type(&self) -> Option<MediaType> {
        match self {
            ReadError::Impossible { media_type, .. }
            | ReadError::NotAcceptable(NotAcceptable(media_type)) => Some(*media_type),
            _ => None,
        }
    }
}

/// The formats in which an image can be had, in words.
fn alternatives(error: &PictureError, media_type: MediaType) -> String {
    let as_it_is = format!("as it is ({}) without a format", media_type.as_str());
    match error {
        PictureError::TooLong { format: Format::WebP | Format::Avif, .. } => {
            format!("as jpg or png, and {as_it_is}")
        }
        PictureError::TooLong { .. } => format!("as png, and {as_it_is}"),
        _ => as_it_is,
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
