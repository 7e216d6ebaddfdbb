//! The representations of an image (RFC 9110 §3.2): their bytes, and their metadata, which outlive the bytes in memory.

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use bytes::Bytes;
use hyper::header::HeaderValue;

use crate::image::coding::{AcceptedCodings, Coding, GENERATION};
use crate::image::variant::Variant;
use crate::image::{MediaType, Traits, Version};

/// A part of the entity-tag of a file without its metadata. It must be raised when the same file becomes other bytes, as
/// `variant::GENERATION` must.
const STRIPPED_GENERATION: u8 = 1;

/// Names one of the representations of a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RepresentationKind {
    /// The bytes of the record.
    Original,
    /// The original, compressed.
    Coded(Coding),
    /// Another size, format or quality.
    Variant(Variant),
    /// The original without its embedded metadata.
    Stripped,
}

/// Everything about a representation but its bytes: enough for a 304 and a HEAD.
///
/// The validators are `HeaderValue`s, made once and ready to be sent: the one exception to the rule that nothing below
/// `http/` knows of headers.
#[derive(Debug)]
pub struct Metadata {
    /// The version of the stored value.
    pub version: Version,
    /// The representation that this describes.
    pub kind: RepresentationKind,
    /// The type of the bytes.
    pub media_type: MediaType,
    /// The number of bytes.
    pub length: usize,
    /// `created_at` of the record, in whole seconds.
    pub last_modified: Option<SystemTime>,
    /// The strong entity-tag (RFC 9110 §8.8.3): the version in double quotes. Representations other than the original
    /// have their own name added, so that no tag ever validates other bytes.
    pub etag: HeaderValue,
    /// `last_modified` as an HTTP date.
    pub last_modified_value: Option<HeaderValue>,
    /// The coded representations of this original, the preferred one first.
    pub coded: Vec<Arc<Metadata>>,
    /// Traits of an original.
    pub traits: Traits,
    /// True for a variant with as many pixels as the original.
    pub at_full_size: bool,
    /// True for the first frame of an animation that could be shown as one in this format.
    pub is_stopped: bool,
    /// The place for cached response heads.
    pub attachment: Attachment,
    /// Number of requests for the image that were answered from memory.
    pub hits: AtomicU64,
}

/// A place for one value of another layer, which leaves with its owner. `http` keeps cached response heads there.
#[derive(Default)]
pub struct Attachment(OnceLock<Box<dyn Any + Send + Sync>>);

impl Attachment {
    /// The value, if there is one of this type.
    #[must_use]
    pub fn get<T: Any>(&self) -> Option<&T> {
        self.0.get()?.downcast_ref()
    }

    /// The value, which is made if there is none. Panics if the value has another type.
    pub fn get_or_default<T: Any + Default + Send + Sync>(&self) -> &T {
        let value = self.0.get_or_init(|| Box::new(T::default()));
        value.downcast_ref().expect("one layer uses it, with one type")
    }
}

impl fmt::Debug for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attachment").finish_non_exhaustive()
    }
}

impl Metadata {
    /// Describes an original of one frame without coded representations.
    #[must_use]
    pub fn new(
        version: Version,
        media_type: MediaType,
        length: usize,
        last_modified: Option<SystemTime>,
    ) -> Metadata {
        Metadata {
            version,
            kind: RepresentationKind::Original,
            media_type,
            length,
            last_modified,
            etag: ascii(format!("\"{version}\"")),
            last_modified_value: last_modified.map(|time| ascii(httpdate::fmt_http_date(time))),
            coded: Vec::new(),
            traits: Traits::default(),
            at_full_size: false,
            is_stopped: false,
            attachment: Attachment::default(),
            hits: AtomicU64::new(0),
        }
    }

    /// Counts a request that was answered from memory.
    pub fn count_hit(&self) {
        self.hits.fetch_add(1, Ordering::Relaxed);
    }

    /// Describes the same original under the version of another record that has it.
    #[must_use]
    pub fn of_version(&self, version: Version) -> Metadata {
        Metadata {
            traits: self.traits,
            ..Metadata::new(version, self.media_type, self.length, self.last_modified)
        }
    }

    /// Tells whether an address names this representation: by its version, or by its entity-tag, each with its quotes or
    /// without. An original is also named by the tags of its codings, between which the client's `Accept-Encoding` decides.
    #[must_use]
    pub fn is_named(&self, text: &str) -> bool {
        let quoted = text.strip_prefix('"').and_then(|it| it.strip_suffix('"'));
        let text = quoted.unwrap_or(text);
        let is_tag_of = |etag: &HeaderValue| {
            let etag = etag.as_bytes();
            etag.len() == text.len() + 2 && &etag[1..etag.len() - 1] == text.as_bytes()
        };
        if text == self.version.to_string() || is_tag_of(&self.etag) {
            return true;
        }
        match self.kind {
            RepresentationKind::Original => self.coded.iter().any(|it| is_tag_of(&it.etag)),
            RepresentationKind::Coded(_) => {
                Coding::ALL.iter().any(|coding| is_tag_of(&self.coding_tag(*coding)))
            }
            RepresentationKind::Variant(_) | RepresentationKind::Stripped => false,
        }
    }

    fn coding_tag(&self, coding: Coding) -> HeaderValue {
        ascii(format!("\"{}-{}{GENERATION}\"", self.version, coding.as_str()))
    }

    /// Describes a representation of this original.
    #[must_use]
    pub fn derived(&self, kind: RepresentationKind, length: usize) -> Metadata {
        match kind {
            RepresentationKind::Original => Metadata { length, ..self.of_version(self.version) },
            RepresentationKind::Coded(coding) => self.coded(coding, length),
            RepresentationKind::Variant(variant) => self.variant(variant, length),
            RepresentationKind::Stripped => self.stripped(length),
        }
    }

    /// Describes this original without its embedded metadata.
    #[must_use]
    pub fn stripped(&self, length: usize) -> Metadata {
        Metadata {
            kind: RepresentationKind::Stripped,
            etag: ascii(format!("\"{}-stripped{STRIPPED_GENERATION}\"", self.version)),
            ..Metadata::new(self.version, self.media_type, length, self.last_modified)
        }
    }

    /// Describes a variant of this original.
    #[must_use]
    pub fn variant(&self, variant: Variant, length: usize) -> Metadata {
        Metadata {
            kind: RepresentationKind::Variant(variant),
            is_stopped: variant.is_stopped(self.media_type, self.traits),
            etag: ascii(format!("\"{}-{variant}\"", self.version)),
            ..Metadata::new(self.version, variant.format().media_type(), length, self.last_modified)
        }
    }

    /// Describes a coded representation of this original.
    #[must_use]
    pub fn coded(&self, coding: Coding, length: usize) -> Metadata {
        Metadata {
            kind: RepresentationKind::Coded(coding),
            etag: self.coding_tag(coding),
            ..Metadata::new(self.version, self.media_type, length, self.last_modified)
        }
    }
}

/// Selects the coding of an original that a client prefers, or the original itself.
#[must_use]
pub fn select(original: &Arc<Metadata>, accepts: AcceptedCodings) -> &Arc<Metadata> {
    let coding = |metadata: &Arc<Metadata>| match metadata.kind {
        RepresentationKind::Coded(coding) => Some(coding),
        RepresentationKind::Original
        | RepresentationKind::Variant(_)
        | RepresentationKind::Stripped => None,
    };
    let best = accepts.best(original.coded.iter().filter_map(coding));
    let coded = original.coded.iter().find(|metadata| best.is_some() && coding(metadata) == best);
    coded.unwrap_or(original)
}

fn ascii(text: String) -> HeaderValue {
    HeaderValue::from_maybe_shared(Bytes::from(text)).expect("hex digits and dates are ASCII")
}

/// A representation with its bytes. Cloning shares them.
#[derive(Debug, Clone)]
pub struct Representation {
    /// Describes the bytes.
    pub metadata: Arc<Metadata>,
    /// The bytes.
    pub body: Bytes,
}

/// A decoded image with the representations that are made together with it.
#[derive(Debug, Clone)]
pub struct Image {
    /// The image as it was stored.
    pub original: Representation,
    /// Its coded representations.
    pub coded: Vec<Representation>,
}

impl From<Representation> for Image {
    /// An image without coded representations.
    fn from(original: Representation) -> Image {
        Image { original, coded: Vec::new() }
    }
}

impl Image {
    /// The original and its coded representations.
    pub fn representations(&self) -> impl Iterator<Item = &Representation> {
        std::iter::once(&self.original).chain(&self.coded)
    }

    /// The representation of a kind.
    #[must_use]
    pub fn representation(&self, kind: RepresentationKind) -> Option<&Representation> {
        self.representations().find(|it| it.metadata.kind == kind)
    }

    /// The representation that some metadata describe, or else the original.
    #[must_use]
    pub fn into_representation(self, metadata: &Metadata) -> Representation {
        let coded = self.coded.into_iter().find(|it| it.metadata.kind == metadata.kind);
        coded.unwrap_or(self.original)
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use super::*;

    #[test]
    fn an_original_under_another_version_has_everything_but_the_entity_tag() {
        let metadata = Metadata::new(Version::of(b"1"), MediaType::Gif, 100, Some(UNIX_EPOCH));
        let traits = Traits { animated: true, ..Traits::default() };
        let metadata = Metadata { traits, ..metadata };
        let other = metadata.of_version(Version::of(b"2"));
        assert_eq!(other.etag, format!("\"{}\"", Version::of(b"2")));
        assert!(
            other.traits == traits && other.media_type == MediaType::Gif && other.length == 100
        );
        assert_eq!(other.last_modified, Some(UNIX_EPOCH));
    }

    #[test]
    fn a_representation_is_named_by_the_tags_that_it_has_and_by_no_others() {
        use crate::image::variant::Transform;
        let version = Version::of(b"{}").to_string();
        let mut svg = Metadata::new(Version::of(b"{}"), MediaType::Svg, 100, None);
        let coded = svg.coded(Coding::Gzip, 50);
        svg.coded.push(Arc::new(svg.coded(Coding::Gzip, 50)));
        let png = Metadata::new(Version::of(b"{}"), MediaType::Png, 100, None);
        let thumbnail = Transform::THUMBNAIL.variant(MediaType::Png).unwrap();
        let thumbnail = png.variant(thumbnail, 10);
        let tag = thumbnail.etag.to_str().unwrap().trim_matches('"').to_owned();
        let gzip = format!("{version}-gzip1");
        for (metadata, named) in [
            (&png, vec![&version]),
            (&svg, vec![&version, &gzip]),
            (&coded, vec![&version, &gzip]),
            (&thumbnail, vec![&version, &tag]),
        ] {
            let endless = [format!("{version}-x"), format!("{version}-"), format!("\"{version}")];
            for text in [&version, &gzip, &tag].into_iter().chain(&endless) {
                assert_eq!(metadata.is_named(text), named.contains(&text), "{text}");
                let quoted = format!("\"{text}\"");
                assert_eq!(metadata.is_named(&quoted), named.contains(&text), "{text}");
            }
        }
    }

    #[test]
    fn each_representation_has_an_entity_tag_of_its_own() {
        let version = Version::of(b"{}");
        let mut metadata = Metadata::new(version, MediaType::Svg, 100, None);
        let coded = Coding::ALL.map(|coding| Arc::new(metadata.coded(coding, 50)));
        assert_eq!(metadata.etag, "\"99914b932bd37a50b983c5e7c90ae93b\"");
        assert_eq!(coded[0].etag, "\"99914b932bd37a50b983c5e7c90ae93b-br1\"");
        assert_eq!(coded[1].etag, "\"99914b932bd37a50b983c5e7c90ae93b-gzip1\"");

        metadata.coded = coded.to_vec();
        let metadata = Arc::new(metadata);
        let kind =
            |brotli, gzip| select(&metadata, AcceptedCodings { brotli, gzip, identity: 1 }).kind;
        assert_eq!(kind(1000, 1000), RepresentationKind::Coded(Coding::Brotli));
        assert_eq!(kind(0, 1000), RepresentationKind::Coded(Coding::Gzip));
        assert_eq!(kind(0, 0), RepresentationKind::Original);
    }
}
