//! The values that everything else works with: ids, versions, and what the submodules add to them.

pub mod bounds;
pub(crate) mod buffer;
pub mod coding;
mod media_type;
pub mod preconditions;
pub mod record;
mod representation;
mod traits;
pub mod variant;

use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use md5::{Digest, Md5};

pub use self::media_type::MediaType;
pub use self::representation::{Image, Metadata, Representation, RepresentationKind, select};
pub use self::traits::{Embedded, Traits};

/// The longest id, in bytes.
pub const MAX_ID_LENGTH: usize = 128;

/// Endings that no id has: they are the addresses of variants, such as `/images/{id}.webp`.
const RESERVED_ENDS: [&str; 4] = [".webp", ".avif", ".jpg", ".png"];

/// The id of an image: 1 to 128 of `A-Z a-z 0-9 . _ : ~ -`, the first a letter, digit or underscore,
/// not ending in `.webp`, `.avif`, `.jpg` or `.png`.
///
/// Every value of this type is safe in a Redis key, a path and a log line. Cloning shares it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageId(Arc<str>);

/// Lets a map look an id up by its text: both hash alike.
impl Borrow<str> for ImageId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// The reason for which a text is no [`ImageId`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidId {
    /// The text is empty.
    #[error("the id is empty")]
    Empty,
    /// More than [`MAX_ID_LENGTH`] bytes.
    #[error("the id has {0} bytes, the limit is {MAX_ID_LENGTH}")]
    TooLong(usize),
    /// The first character is no letter, digit or underscore.
    #[error("the id must begin with a letter, a digit or an underscore")]
    Beginning,
    /// A character is outside the alphabet, at a position counted in bytes from 0.
    #[error("the id may hold only A-Z a-z 0-9 . _ : ~ - and has another character at position {0}")]
    Character(usize),
    /// The ending is that of a variant's address.
    #[error("the id must not end in {0}, which asks for a variant")]
    Reserved(&'static str),
}

impl ImageId {
    /// Parses an id that is already percent-decoded.
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

    /// The id of an image that is stored under the SHA-256 of its bytes, so that nobody can make another image with
    /// the same id.
    #[must_use]
    pub fn of_content(sha256: &[u8; 32]) -> ImageId {
        ImageId(hex(sha256).into())
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
/// MD5 tells versions apart; it protects nothing. A writer who can forge a version can replace the image anyway.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Version([u8; 16]);

impl Version {
    /// The version of a value. Takes about 2.4 ms a megabyte: not for an async worker.
    #[must_use]
    pub fn of(value: &[u8]) -> Version {
        Version(Md5::digest(value).into())
    }

    /// Tells whether a text names this version: in plain digits, or as the entity-tag of any representation.
    #[must_use]
    pub fn is_named(&self, text: &str) -> bool {
        let text = text.trim_matches('"');
        let version = text.split_once('-').map_or(text, |(version, _kind)| version);
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

/// Bytes as hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| digits(*byte)).collect();
    String::from_utf8(digits).expect("digits are ASCII")
}

/// The two digits of a byte.
pub(crate) fn digits(byte: u8) -> [u8; 2] {
    [byte >> 4, byte & 15].map(|digit| b"0123456789abcdef"[usize::from(digit)])
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
}
