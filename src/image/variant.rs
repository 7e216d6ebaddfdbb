//! A variant: an image in another size, format or quality.
//!
//! The meaning of an address ([`Transform`]) may depend on the image and on the client; a [`Variant`] depends on
//! neither. It is canonical: two addresses that mean the same bytes mean the same variant, so these are rendered once,
//! kept once, and have one entity-tag.

use std::fmt;

use super::bounds::{Bounds, Fit};
use crate::image::MediaType;

/// A part of the entity-tag of each variant. It must be raised when a new library or algorithm renders the same variant
/// to other bytes, as `coding::GENERATION` must.
pub const GENERATION: u8 = 2;

/// A format that can be encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Format {
    Avif,
    WebP,
    Jpeg,
    Png,
}

impl Format {
    /// All formats, in the order of preference for a client that has none: the smallest first.
    pub const ALL: [Format; 4] = [Format::Avif, Format::WebP, Format::Jpeg, Format::Png];

    /// The name in addresses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Format::Avif => "avif",
            Format::WebP => "webp",
            Format::Jpeg => "jpg",
            Format::Png => "png",
        }
    }

    /// The media type.
    #[must_use]
    pub const fn media_type(self) -> MediaType {
        match self {
            Format::Avif => MediaType::Avif,
            Format::WebP => MediaType::WebP,
            Format::Jpeg => MediaType::Jpeg,
            Format::Png => MediaType::Png,
        }
    }

    /// The format of an image of which only the size changes: its own, or else PNG, which is lossless.
    fn kept_by(media_type: MediaType) -> Format {
        match media_type {
            MediaType::Jpeg => Format::Jpeg,
            MediaType::WebP => Format::WebP,
            _ => Format::Png,
        }
    }
}

/// An image in another size, format or quality.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Variant {
    bounds: Bounds,
    format: Format,
    /// 1 to 100; 0 for lossless formats.
    quality: u8,
    effort: u8,
}

impl Variant {
    /// The bounds that the image is fitted into.
    #[must_use]
    pub fn bounds(self) -> Bounds {
        self.bounds
    }

    /// The format of the bytes.
    #[must_use]
    pub fn format(self) -> Format {
        self.format
    }

    /// The quality, 1 to 100; 0 for lossless formats.
    #[must_use]
    pub fn quality(self) -> u8 {
        self.quality
    }

    /// The effort to make the bytes fewer, 0 to 6 (libwebp's method).
    #[must_use]
    pub fn effort(self) -> u8 {
        self.effort
    }

    fn new(bounds: Bounds, format: Format, quality: u8, effort: u8) -> Variant {
        // Values without a meaning are normalised.
        let bounds = match (bounds.width, bounds.height) {
            (Some(_), Some(_)) => bounds,
            _ => Bounds { fit: Fit::Contain, ..bounds },
        };
        let (quality, effort) = match format {
            Format::WebP => (quality, effort),
            Format::Avif | Format::Jpeg => (quality, 0),
            Format::Png => (0, 0),
        };
        Variant { bounds, format, quality, effort }
    }
}

/// The part of an entity-tag that names the variant.
impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Bounds { width, height, fit, enlarge } = self.bounds;
        if let Some(width) = width {
            write!(f, "w{width}-")?;
        }
        if let Some(height) = height {
            write!(f, "h{height}-")?;
        }
        match fit {
            Fit::Contain => {}
            Fit::Cover => f.write_str("cover-")?,
            Fit::Fill => f.write_str("fill-")?,
        }
        if enlarge {
            f.write_str("enlarged-")?;
        }
        if self.quality > 0 {
            write!(f, "q{}-", self.quality)?;
        }
        if self.effort > 0 {
            write!(f, "m{}-", self.effort)?;
        }
        write!(f, "{}{GENERATION}", self.format.name())
    }
}

/// The size, format and quality that an address asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transform {
    /// The size.
    pub bounds: Bounds,
    /// The format.
    pub format: RequestedFormat,
    /// The quality, 1 to 100, if the address has one.
    pub quality: Option<u8>,
    /// The quality otherwise.
    pub default_quality: u8,
    /// The effort to make the bytes fewer, 0 to 6 (libwebp's method).
    pub effort: u8,
}

/// The format that an address asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestedFormat {
    /// The image's own, or else PNG.
    Kept,
    /// The one that the client prefers.
    Negotiated(AcceptedTypes),
    /// This one.
    Exactly(Format),
}

/// The weight that a client gives to each image type, from 0 (refused) to 1000 (RFC 9110 §12.5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcceptedTypes {
    /// The weight of each of [`Format::ALL`]; `None` if the client doesn't name it, or the server doesn't make it.
    pub named: [Option<u16>; Format::ALL.len()],
    /// The weight of all other types: that of `image/*`, or else `*/*`.
    pub rest: u16,
}

/// The representation that a transform means for an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolved {
    /// The image as it was stored.
    Original,
    /// This variant.
    Variant(Variant),
}

/// The error for an image that can't be had in a format that the client accepts, or the address names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the image is {}, which can't be had in a format that the request accepts", .0.as_str())]
pub struct NotAcceptable(pub MediaType);

impl Transform {
    /// Method 4 has half of the gain of method 6 in a quarter of the time.
    pub const EFFORT: u8 = 4;

    /// The thumbnail: 64×64 pixels of WebP, in as few bytes as possible.
    pub const THUMBNAIL: Transform = Transform {
        bounds: Bounds { width: Some(64), height: Some(64), fit: Fit::Cover, enlarge: true },
        format: RequestedFormat::Exactly(Format::WebP),
        quality: Some(85),
        default_quality: 85,
        effort: 6,
    };

    /// The representation that this means for an image of some type.
    ///
    /// An image of a type that can't be decoded here is sent as it is, unless the address names another format.
    pub fn resolve(self, media_type: MediaType) -> Result<Resolved, NotAcceptable> {
        let kept = Format::kept_by(media_type);
        let is_original = |format: Format| format.media_type() == media_type;
        let decodable = media_type.is_decodable();
        let format = match self.format {
            RequestedFormat::Kept => None,
            RequestedFormat::Exactly(format) => Some(format),
            RequestedFormat::Negotiated(accepted) => match accepted.best(media_type, decodable) {
                Preferred::Own => None,
                Preferred::Other(format) => Some(format),
                Preferred::None => return Err(NotAcceptable(media_type)),
            },
        };
        let resized = self.is_resized();
        match format {
            Some(format) if !decodable && !is_original(format) => Err(NotAcceptable(media_type)),
            _ if !decodable => Ok(Resolved::Original),
            None if !resized && self.quality.is_none() => Ok(Resolved::Original),
            Some(format) if !resized && self.quality.is_none() && is_original(format) => {
                Ok(Resolved::Original)
            }
            format => {
                let quality = self.quality.unwrap_or(self.default_quality);
                Ok(Resolved::Variant(Variant::new(
                    self.bounds,
                    format.unwrap_or(kept),
                    quality,
                    self.effort,
                )))
            }
        }
    }

    /// True if the address asks for a size.
    #[must_use]
    pub fn is_resized(&self) -> bool {
        self.bounds.width.is_some() || self.bounds.height.is_some()
    }

    /// True if the answer depends on `Accept`.
    #[must_use]
    pub fn is_negotiated(&self) -> bool {
        matches!(self.format, RequestedFormat::Negotiated(_))
    }
}

impl AcceptedTypes {
    /// Ignores the weight of a format that the server doesn't make.
    pub fn forget(&mut self, format: Format) {
        for (it, weight) in Format::ALL.into_iter().zip(&mut self.named) {
            if it == format {
                *weight = None;
            }
        }
    }

    /// The format with the highest weight. Only formats that the client names compete with the original: a client that
    /// accepts anything gets the original.
    fn best(self, media_type: MediaType, decodable: bool) -> Preferred {
        let own = Format::ALL.iter().position(|it| it.media_type() == media_type);
        let own = own.and_then(|index| self.named[index]).unwrap_or(self.rest);
        let mut best = (if own > 0 { Preferred::Own } else { Preferred::None }, own);
        for (format, weight) in Format::ALL.into_iter().zip(self.named) {
            let weight = weight.filter(|_| decodable && format.media_type() != media_type);
            let Some(weight) = weight else { continue };
            // At equal weights AVIF and WebP win, since they are smaller. The others are no better than the original.
            let smaller =
                matches!((format, &best.0), (Format::Avif | Format::WebP, Preferred::Own));
            let wins = weight > best.1 || (weight == best.1 && weight > 0 && smaller);
            if wins {
                best = (Preferred::Other(format), weight);
            }
        }
        best.0
    }
}

/// The preference of a client among the formats of an image.
enum Preferred {
    /// The image's own format.
    Own,
    /// Another format.
    Other(Format),
    /// None of them.
    None,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transform(width: u32, format: RequestedFormat) -> Transform {
        let width = Some(width).filter(|it| *it > 0);
        let bounds = Bounds { width, height: None, fit: Fit::Cover, enlarge: false };
        Transform { bounds, format, quality: None, default_quality: 80, effort: Transform::EFFORT }
    }

    fn text(transform: Transform, media_type: MediaType) -> String {
        match transform.resolve(media_type).unwrap() {
            Resolved::Original => "original".to_owned(),
            Resolved::Variant(variant) => variant.to_string(),
        }
    }

    #[test]
    fn addresses_that_mean_the_same_bytes_mean_the_same_variant() {
        let png = |format| text(transform(256, format), MediaType::Png);
        assert_eq!(png(RequestedFormat::Kept), "w256-png2");
        assert_eq!(png(RequestedFormat::Exactly(Format::Png)), "w256-png2");
        assert_eq!(png(RequestedFormat::Exactly(Format::WebP)), "w256-q80-m4-webp2");
        assert_eq!(text(transform(256, RequestedFormat::Kept), MediaType::Gif), "w256-png2");
        assert_eq!(text(transform(256, RequestedFormat::Kept), MediaType::Jpeg), "w256-q80-jpg2");
        let quality = Transform { quality: Some(80), ..transform(256, RequestedFormat::Kept) };
        assert_eq!(text(quality, MediaType::Jpeg), "w256-q80-jpg2");
        assert_eq!(
            text(Transform::THUMBNAIL, MediaType::WebP),
            "w64-h64-cover-enlarged-q85-m6-webp2"
        );
    }

    #[test]
    fn what_changes_nothing_is_the_original() {
        assert_eq!(text(transform(0, RequestedFormat::Kept), MediaType::Png), "original");
        assert_eq!(
            text(transform(0, RequestedFormat::Exactly(Format::Png)), MediaType::Png),
            "original"
        );
        assert_ne!(
            text(transform(0, RequestedFormat::Exactly(Format::Png)), MediaType::Gif),
            "original"
        );
        for opaque in [MediaType::Avif, MediaType::Heic, MediaType::JpegXl, MediaType::Svg] {
            assert_eq!(text(transform(256, RequestedFormat::Kept), opaque), "original");
            let webp = transform(0, RequestedFormat::Exactly(Format::WebP)).resolve(opaque);
            assert_eq!(webp, Err(NotAcceptable(opaque)));
        }
    }

    #[test]
    fn a_client_gets_the_format_that_it_names_and_likes_best() {
        let negotiated = |named: [Option<u16>; 4], rest, media_type| {
            let accepted = AcceptedTypes { named, rest };
            transform(0, RequestedFormat::Negotiated(accepted)).resolve(media_type).map(|it| {
                match it {
                    Resolved::Original => "original".to_owned(),
                    Resolved::Variant(variant) => variant.format().name().to_owned(),
                }
            })
        };
        let (png, jpeg) = (MediaType::Png, MediaType::Jpeg);
        // A browser; curl.
        assert_eq!(negotiated([None, Some(1000), None, None], 1000, png).unwrap(), "webp");
        assert_eq!(negotiated([None; 4], 1000, png).unwrap(), "original");
        let browser = [Some(1000), Some(1000), None, None];
        assert_eq!(negotiated(browser, 1000, png).unwrap(), "avif");
        assert_eq!(negotiated([None, Some(500), None, None], 800, png).unwrap(), "original");
        assert_eq!(negotiated([None, Some(0), None, None], 1000, png).unwrap(), "original");
        // The original is refused, or not named among what is.
        assert_eq!(negotiated([None, None, Some(1000), None], 0, png).unwrap(), "jpg");
        assert_eq!(negotiated([None, None, Some(1000), Some(1000)], 0, png).unwrap(), "original");
        assert_eq!(negotiated([None, Some(900), Some(1000), None], 0, jpeg).unwrap(), "original");
        assert_eq!(negotiated([None; 4], 0, png), Err(NotAcceptable(png)));
        assert_eq!(
            negotiated([None, Some(1000), None, None], 0, MediaType::Avif),
            Err(NotAcceptable(MediaType::Avif))
        );
        assert_eq!(
            negotiated([None, Some(1000), None, None], 1000, MediaType::Svg).unwrap(),
            "original"
        );
    }
}
