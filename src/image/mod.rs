//! The values that everything else speaks of: an image's id, its version, its type, and what is
//! answered for it.

pub mod buffer;
pub mod coding;
pub mod preconditions;
pub mod record;
pub mod variant;

use std::any::Any;
use std::borrow::Borrow;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use hyper::header::HeaderValue;
use md5::{Digest, Md5};

use crate::image::coding::{AcceptedCodings, Coding, GENERATION};
use crate::image::variant::Variant;

/// The longest id, in bytes.
pub const MAX_ID_LENGTH: usize = 128;

/// Ends of an id that are reserved for the addresses of variants, such as `/images/{id}.webp`.
const RESERVED_ENDS: [&str; 4] = [".webp", ".avif", ".jpg", ".png"];

/// The id of an image: 1 to 128 of `A-Z a-z 0-9 . _ : ~ -`, the first a letter, digit or underscore,
/// not ending in `.webp`, `.avif`, `.jpg` or `.png`.
///
/// An id that exists is safe in a Redis key, a path and a log line. Cloning shares it.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ImageId(Arc<str>);

/// So that one can be looked up by its text. An id is hashed as that is.
impl Borrow<str> for ImageId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// Why a text is no [`ImageId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidId {
    /// Nothing there.
    #[error("the id is empty")]
    Empty,
    /// More than [`MAX_ID_LENGTH`] bytes.
    #[error("the id has {0} bytes, the limit is {MAX_ID_LENGTH}")]
    TooLong(usize),
    /// The first character may only be a letter, a digit or an underscore.
    #[error("the id must begin with a letter, a digit or an underscore")]
    Beginning,
    /// A character outside the alphabet, at a position counted in bytes from 0.
    #[error("the id may hold only A-Z a-z 0-9 . _ : ~ - and has something else at position {0}")]
    Character(usize),
    /// An end that is the address of a variant.
    #[error("the id must not end in {0}, which asks for a variant")]
    Reserved(&'static str),
}

impl ImageId {
    /// Takes a text that is an id, after percent-decoding.
    pub fn parse(text: &str) -> Result<ImageId, InvalidId> {
        let first = *text.as_bytes().first().ok_or(InvalidId::Empty)?;
        if text.len() > MAX_ID_LENGTH {
            return Err(InvalidId::TooLong(text.len()));
        }
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._:~-".contains(&byte);
        if let Some(position) = text.bytes().position(|byte| !allowed(byte)) {
            return Err(InvalidId::Character(position));
        }
        if !(first.is_ascii_alphanumeric() || first == b'_') {
            return Err(InvalidId::Beginning);
        }
        match RESERVED_ENDS.iter().find(|end| text.ends_with(**end)) {
            Some(end) => Err(InvalidId::Reserved(end)),
            None => Ok(ImageId(text.into())),
        }
    }

    /// The id of an image that is named after its bytes: their SHA-256, so that nobody can make another image with the
    /// same id.
    #[must_use]
    pub fn of_content(sha256: &[u8; 32]) -> ImageId {
        ImageId(hex(sha256).into())
    }

    /// Under which the drawn placeholders are kept. No address and no key can name it.
    #[must_use]
    pub fn of_placeholders() -> ImageId {
        ImageId("/placeholders".into())
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// The version of a stored value: the MD5 of its bytes, as a Python backend gets it from
/// `hashlib.md5(value).hexdigest()`.
///
/// MD5 tells versions apart; it guards against nothing. Whoever can write to the store can replace an
/// image anyway.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Version([u8; 16]);

impl Version {
    /// The version of a value. Takes about 2.4 ms a megabyte: not for an async worker.
    #[must_use]
    pub fn of(value: &[u8]) -> Version {
        Version(Md5::digest(value).into())
    }

    /// Whether a text names this version: as it is written, or as it stands in the entity-tag of any form.
    #[must_use]
    pub fn is_named(&self, text: &str) -> bool {
        let text = text.trim_matches('"');
        let version = text.split_once('-').map_or(text, |(version, _form)| version);
        version.len() == 2 * self.0.len()
            && version.as_bytes().chunks_exact(2).zip(&self.0).all(|(two, it)| two == digits(*it))
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The types of image that are served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it")]
pub enum MediaType {
    Png,
    Jpeg,
    Gif,
    WebP,
    Avif,
    Heic,
    JpegXl,
    Bmp,
    Ico,
    Tiff,
    Svg,
}

impl MediaType {
    /// All of them.
    pub const ALL: [MediaType; 11] = [
        MediaType::Png,
        MediaType::Jpeg,
        MediaType::Gif,
        MediaType::WebP,
        MediaType::Avif,
        MediaType::Heic,
        MediaType::JpegXl,
        MediaType::Bmp,
        MediaType::Ico,
        MediaType::Tiff,
        MediaType::Svg,
    ];

    /// The type that a name means, if it is one of these.
    #[must_use]
    pub fn named(name: &str) -> Option<MediaType> {
        MediaType::ALL.into_iter().find(|it| it.is_named(name))
    }

    /// The registered name (IANA media types).
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            MediaType::Png => "image/png",
            MediaType::Jpeg => "image/jpeg",
            MediaType::Gif => "image/gif",
            MediaType::WebP => "image/webp",
            MediaType::Avif => "image/avif",
            MediaType::Heic => "image/heic",
            MediaType::JpegXl => "image/jxl",
            MediaType::Bmp => "image/bmp",
            MediaType::Ico => "image/vnd.microsoft.icon",
            MediaType::Tiff => "image/tiff",
            MediaType::Svg => "image/svg+xml",
        }
    }

    /// What the names of its files end in.
    #[must_use]
    pub const fn extension(self) -> &'static str {
        match self {
            MediaType::Png => "png",
            MediaType::Jpeg => "jpg",
            MediaType::Gif => "gif",
            MediaType::WebP => "webp",
            MediaType::Avif => "avif",
            MediaType::Heic => "heic",
            MediaType::JpegXl => "jxl",
            MediaType::Bmp => "bmp",
            MediaType::Ico => "ico",
            MediaType::Tiff => "tiff",
            MediaType::Svg => "svg",
        }
    }

    /// Whether a name that a writer gave means this type. Parameters, case and the well-known aliases
    /// don't matter.
    #[must_use]
    pub fn is_named(self, name: &str) -> bool {
        let name = name.split(';').next().unwrap_or_default().trim();
        let aliases: &[&str] = match self {
            MediaType::Jpeg => &["image/jpg", "image/pjpeg"],
            MediaType::Heic => &["image/heif", "image/heic-sequence", "image/heif-sequence"],
            MediaType::Bmp => &["image/x-ms-bmp", "image/x-bmp"],
            MediaType::Ico => &["image/x-icon", "image/ico"],
            MediaType::Png => &["image/x-png", "image/apng"],
            _ => &[],
        };
        std::iter::once(&self.as_str()).chain(aliases).any(|known| known.eq_ignore_ascii_case(name))
    }
}

/// Which of the representations of a version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RepresentationKind {
    /// The bytes of the record.
    Original,
    /// The same, compressed.
    Coded(Coding),
    /// Another size, format or quality.
    Variant(Variant),
    /// Not bytes to be sent, but what is to be known of the picture, as JSON.
    Preview,
}

/// What is known of a representation without its bytes: enough for a 304 and a HEAD. The header values
/// are ready to be sent.
#[derive(Debug)]
pub struct Metadata {
    /// The version of the stored value.
    pub version: Version,
    /// Which representation of it.
    pub kind: RepresentationKind,
    /// What the bytes are.
    pub media_type: MediaType,
    /// How many bytes there are.
    pub length: usize,
    /// When the writer says it was made, in whole seconds.
    pub last_modified: Option<SystemTime>,
    /// The strong entity-tag (RFC 9110 §8.8.3): the version in double quotes; in another form than the
    /// original with that form's name in it, so that it never validates other bytes.
    pub etag: HeaderValue,
    /// `last_modified` as an HTTP date.
    pub last_modified_value: Option<HeaderValue>,
    /// The coded forms that this original has, the preferred first.
    pub coded: Vec<Arc<Metadata>>,
    /// Whether this original moves; looked up when somebody first needs to know.
    pub animated: OnceLock<bool>,
    /// The place for cached response heads.
    pub attachment: Attachment,
}

/// A place for one value of another layer's, which leaves with its owner. `http` keeps cached response heads there.
#[derive(Default)]
pub struct Attachment(OnceLock<Box<dyn Any + Send + Sync>>);

impl Attachment {
    /// Returns the value, if there is one of this type.
    #[must_use]
    pub fn get<T: Any>(&self) -> Option<&T> {
        self.0.get()?.downcast_ref()
    }

    /// Returns the value, which is made if there is none. Panics if the value has another type.
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
    /// The metadata of an original without coded forms.
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
            animated: OnceLock::new(),
            attachment: Attachment::default(),
        }
    }

    /// The metadata of a variant of this original.
    #[must_use]
    pub fn variant(&self, variant: Variant, length: usize) -> Metadata {
        Metadata {
            kind: RepresentationKind::Variant(variant),
            etag: ascii(format!("\"{}-{variant}\"", self.version)),
            ..Metadata::new(self.version, variant.format().media_type(), length, self.last_modified)
        }
    }

    /// The metadata of the preview of this original.
    #[must_use]
    pub fn preview(&self, length: usize) -> Metadata {
        Metadata {
            kind: RepresentationKind::Preview,
            ..Metadata::new(self.version, self.media_type, length, self.last_modified)
        }
    }

    /// The metadata of a coded form of this original.
    #[must_use]
    pub fn coded(&self, coding: Coding, length: usize) -> Metadata {
        Metadata {
            kind: RepresentationKind::Coded(coding),
            etag: ascii(format!("\"{}-{}{GENERATION}\"", self.version, coding.as_str())),
            ..Metadata::new(self.version, self.media_type, length, self.last_modified)
        }
    }
}

/// The metadata of the form of an original that a client likes best.
#[must_use]
pub fn select(original: &Arc<Metadata>, accepts: AcceptedCodings) -> &Arc<Metadata> {
    let coding = |metadata: &Arc<Metadata>| match metadata.kind {
        RepresentationKind::Coded(coding) => Some(coding),
        RepresentationKind::Original
        | RepresentationKind::Variant(_)
        | RepresentationKind::Preview => None,
    };
    let best = accepts.best(original.coded.iter().filter_map(coding));
    let coded = original.coded.iter().find(|metadata| best.is_some() && coding(metadata) == best);
    coded.unwrap_or(original)
}

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| digits(*byte)).collect();
    String::from_utf8(digits).expect("digits are ASCII")
}

/// The two digits of a byte.
pub(crate) fn digits(byte: u8) -> [u8; 2] {
    [byte >> 4, byte & 15].map(|digit| b"0123456789abcdef"[usize::from(digit)])
}

fn ascii(text: String) -> HeaderValue {
    HeaderValue::from_maybe_shared(Bytes::from(text)).expect("hex digits and dates are ASCII")
}

/// Bytes that can be sent, and what is known of them. Cloning shares the bytes.
#[derive(Debug, Clone)]
pub struct Representation {
    /// What is known of the bytes.
    pub metadata: Arc<Metadata>,
    /// The bytes.
    pub body: Bytes,
}

/// An image, decoded, in all the forms that come with it.
#[derive(Debug, Clone)]
pub struct Image {
    /// As it was stored.
    pub original: Representation,
    /// Its coded forms.
    pub coded: Vec<Representation>,
}

impl From<Representation> for Image {
    /// An image whose original is all there is of it.
    fn from(original: Representation) -> Image {
        Image { original, coded: Vec::new() }
    }
}

impl Image {
    /// The form with these metadata.
    #[must_use]
    pub fn into_form(self, metadata: &Metadata) -> Representation {
        let coded = self.coded.into_iter().find(|it| it.metadata.kind == metadata.kind);
        coded.unwrap_or(self.original)
    }
}

/// The last second that an HTTP date can say, 9999-12-31T23:59:59Z, since the epoch.
pub const MAX_HTTP_DATE: Duration = Duration::from_secs(253_402_300_799);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_parsed_or_says_what_is_wrong() {
        for good in ["a", "_", "hero_abc123", "a:b~c-d.e", "0", &"x".repeat(128), "a.webp2", "webp"]
        {
            assert_eq!(ImageId::parse(good).unwrap().as_str(), good);
        }
        for (bad, why) in [
            ("", InvalidId::Empty),
            (".", InvalidId::Beginning),
            ("..", InvalidId::Beginning),
            ("-a", InvalidId::Beginning),
            ("a/b", InvalidId::Character(1)),
            ("a\0", InvalidId::Character(1)),
            ("a b", InvalidId::Character(1)),
            ("a%2e", InvalidId::Character(1)),
            ("ä", InvalidId::Character(0)),
            ("a\n", InvalidId::Character(1)),
            ("a.png", InvalidId::Reserved(".png")),
            ("a.webp", InvalidId::Reserved(".webp")),
        ] {
            assert_eq!(ImageId::parse(bad), Err(why), "{bad:?}");
        }
        assert_eq!(ImageId::parse(&"x".repeat(129)), Err(InvalidId::TooLong(129)));
    }

    #[test]
    fn a_version_is_what_hashlib_md5_says() {
        // python3 -c 'import hashlib; print(hashlib.md5(b"{}").hexdigest())'
        let version = Version::of(b"{}");
        assert_eq!(version.to_string(), "99914b932bd37a50b983c5e7c90ae93b");
        for named in
            ["99914b932bd37a50b983c5e7c90ae93b", "\"99914b932bd37a50b983c5e7c90ae93b-br1\""]
        {
            assert!(version.is_named(named), "{named}");
        }
        for other in ["", "99914b932bd37a50b983c5e7c90ae93", "99914B932BD37A50B983C5E7C90AE93B"] {
            assert!(!version.is_named(other), "{other}");
        }
    }

    #[test]
    fn a_type_is_known_by_its_aliases_case_and_parameters() {
        assert!(MediaType::Jpeg.is_named("IMAGE/JPG; q=1"));
        assert!(MediaType::Svg.is_named("image/svg+xml;charset=utf-8"));
        assert!(!MediaType::Png.is_named("image/jpeg"));
        assert!(!MediaType::Png.is_named(""));
    }

    #[test]
    fn each_form_has_an_entity_tag_of_its_own() {
        let version = Version::of(b"{}");
        let mut metadata = Metadata::new(version, MediaType::Svg, 100, None);
        let coded = Coding::ALL.map(|coding| Arc::new(metadata.coded(coding, 50)));
        assert_eq!(metadata.etag, "\"99914b932bd37a50b983c5e7c90ae93b\"");
        assert_eq!(coded[0].etag, "\"99914b932bd37a50b983c5e7c90ae93b-br1\"");
        assert_eq!(coded[1].etag, "\"99914b932bd37a50b983c5e7c90ae93b-gzip1\"");

        metadata.coded = coded.to_vec();
        let metadata = Arc::new(metadata);
        let form =
            |brotli, gzip| select(&metadata, AcceptedCodings { brotli, gzip, identity: 1 }).kind;
        assert_eq!(form(1000, 1000), RepresentationKind::Coded(Coding::Brotli));
        assert_eq!(form(0, 1000), RepresentationKind::Coded(Coding::Gzip));
        assert_eq!(form(0, 0), RepresentationKind::Original);
    }
}
