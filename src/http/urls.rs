//! The addresses that answers and events carry.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use crate::image::{ImageId, Representation, Version};

/// The address of an image, whatever its version.
pub(crate) fn image(id: &ImageId) -> String {
    format!("/images/{id}")
}

/// The address of a version of an image.
pub(crate) fn versioned(id: &ImageId, version: Version) -> String {
    format!("/images/{id}?v={version}")
}

/// The address of the thumbnail of a version of an image.
pub(crate) fn thumbnail(id: &ImageId, version: Version) -> String {
    format!("/images/{id}/thumbnail?v={version}")
}

/// A representation as a `data:` URL (RFC 2397).
pub(crate) fn data(representation: &Representation) -> String {
    let media_type = representation.metadata.media_type.as_str();
    format!("data:{media_type};base64,{}", STANDARD.encode(&representation.body))
}
