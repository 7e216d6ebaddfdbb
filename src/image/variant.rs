//! A variant: an image in another size, format or quality.
//!
//! The meaning of an address ([`Transform`]) may depend on the image and on the client; a [`Variant`] depends on
//! neither. It is canonical: two addresses that mean the same bytes mean the same variant, so these are rendered once,
//! kept once, and have one entity-tag.

use std::cmp::Reverse;
use std::fmt;

use super::bounds::{Bounds, Fit};
use crate::image::{Embedded, MediaType, Traits};

/// A part of the entity-tag of each variant. It must be raised when a new library or algorithm renders the same variant
/// to other bytes, as `coding::GENERATION` must.
pub const GENERATION: u8 = 4;

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

    /// The format of an image of which only the size changes: its own, or WebP for what is as small, or else PNG, which is
    /// lossless.
    fn kept_by(media_type: MediaType) -> Format {
        match media_type {
            MediaType::Jpeg => Format::Jpeg,
            MediaType::WebP | MediaType::Avif | MediaType::JpegXl => Format::WebP,
            _ => Format::Png,
        }
    }

    /// True if animations of a type are rendered as animations in this format.
    fn moves(self, media_type: MediaType) -> bool {
        self == Format::WebP && matches!(media_type, MediaType::Gif | MediaType::WebP)
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
    is_animated: bool,
    only_if_smaller: bool,
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

    /// True if it has all frames of an animation, otherwise it has the first.
    #[must_use]
    pub fn is_animated(self) -> bool {
        self.is_animated
    }

    /// True for AVIF that the server chose and may replace by WebP: then there is none of a picture that is larger so.
    #[must_use]
    pub fn only_if_smaller(self) -> bool {
        self.only_if_smaller
    }

    /// True if it has the first frame of an image alone, and its format has room for all.
    #[must_use]
    pub fn is_stopped(self, media_type: MediaType, traits: Traits) -> bool {
        let moves = traits.animated && self.format.moves(media_type);
        moves && !self.is_animated && Transform::THUMBNAIL.variant(media_type) != Some(self)
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
        Variant { bounds, format, quality, effort, is_animated: false, only_if_smaller: false }
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
        if self.is_animated {
            f.write_str("animated-")?;
        }
        if self.only_if_smaller {
            f.write_str("smaller-")?;
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
    /// The weight of each of [`MediaType::ALL`]; `None` if the client doesn't name it.
    pub named: [Option<u16>; MediaType::ALL.len()],
    /// The weight of all other types: that of `image/*`, or else `*/*`.
    pub rest: u16,
    /// True if the server makes AVIF.
    pub makes_avif: bool,
}

/// A representation that a transform may mean for an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolved {
    /// The image as it was stored.
    Original,
    /// The image without its embedded metadata.
    Stripped,
    /// This variant.
    Variant(Variant),
}

/// The error for an image that can't be had in a format that the client accepts, or the address names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the image is {own}, and can't be had in a format that the request accepts: accept {own}, or ask for the image without a \
     format", own = .0.as_str()
)]
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

    /// The representations that this may mean for an image, the preferred one first. The next one is for the case that one
    /// can't be made: a limit, or a picture that can't be decoded here.
    ///
    /// The last one is the image in full, unless the request excludes its type. So only an address that names another
    /// format, or a client that refuses the image's own, gets an error.
    pub fn candidates(
        self,
        media_type: MediaType,
        traits: Traits,
    ) -> Result<Vec<Resolved>, NotAcceptable> {
        let (list, takes_own) = (Vec::new(), false);
        let mut candidates = Candidates { transform: self, media_type, traits, list, takes_own };
        match self.format {
            RequestedFormat::Kept => candidates.push_own(|_| true),
            // The whole picture is no thumbnail.
            RequestedFormat::Exactly(format) if self == Transform::THUMBNAIL => {
                candidates.push_made(format);
            }
            RequestedFormat::Exactly(format) if format.media_type() == media_type => {
                candidates.push_own(|it| it == format);
            }
            RequestedFormat::Exactly(format) => candidates.push_made(format),
            RequestedFormat::Negotiated(accepted) => candidates.negotiate(accepted),
        }
        if candidates.takes_own && !candidates.list.contains(&Resolved::Original) {
            candidates.push_full();
        }
        if candidates.list.is_empty() {
            return Err(NotAcceptable(media_type));
        }
        Ok(candidates.list)
    }

    /// The variant that this means for a picture that is decoded, if it is one.
    #[must_use]
    pub fn variant(self, media_type: MediaType) -> Option<Variant> {
        match self.candidates(media_type, Traits::default()).ok()?.first()? {
            Resolved::Variant(variant) => Some(*variant),
            Resolved::Original | Resolved::Stripped => None,
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
    /// The weight of a type.
    fn weight(&self, media_type: MediaType) -> u16 {
        self.weight_by_name(media_type).unwrap_or(self.rest)
    }

    /// The weight of a type that the client names.
    fn weight_by_name(&self, media_type: MediaType) -> Option<u16> {
        let index = MediaType::ALL.iter().position(|it| *it == media_type);
        index.and_then(|index| self.named[index])
    }
}

/// Collects the representations that a transform may mean for an image.
struct Candidates {
    transform: Transform,
    media_type: MediaType,
    traits: Traits,
    list: Vec<Resolved>,
    /// True if the request doesn't exclude the image's own type.
    takes_own: bool,
}

impl Candidates {
    /// Adds what an address that leaves the format to the server means. A client that accepts anything gets the image's own
    /// type: only formats that it names compete with that, and AVIF and WebP win at equal weights if they are smaller.
    fn negotiate(&mut self, accepted: AcceptedTypes) {
        let own = accepted.weight(self.media_type);
        // No format is smaller than these. Not every client shows them that accepts `image/*`.
        let is_small = matches!(self.media_type, MediaType::Avif | MediaType::JpegXl)
            && accepted.weight_by_name(self.media_type).is_some()
            && !self.encodes_own();
        let mut ranked: Vec<(u16, Option<Format>)> = vec![(own, None)];
        for format in Format::ALL {
            let is_made = format != Format::Avif || accepted.makes_avif;
            let weight = accepted.weight_by_name(format.media_type());
            if let Some(weight) = weight
                && is_made
                && format.media_type() != self.media_type
                && !(own > 0 && self.keeps_moving() && self.stops(Some(format)))
            {
                let at = ranked.iter().position(|(other, it)| {
                    let is_smaller =
                        it.is_none() && matches!(format, Format::Avif | Format::WebP) && !is_small;
                    weight > *other || (weight == *other && is_smaller)
                });
                ranked.insert(at.unwrap_or(ranked.len()), (weight, Some(format)));
            }
        }
        if self.traits.animated {
            // Of formats with equal weights, those come first in which it moves.
            ranked.sort_by_key(|(weight, format)| (Reverse(*weight), self.stops(*format)));
        }
        for (_, format) in ranked.into_iter().filter(|(weight, _)| *weight > 0) {
            match format {
                Some(format) => self.push_made(format),
                None => self.push_own(|it| accepted.weight(it.media_type()) > 0),
            }
        }
        if own == 0 {
            // The client refuses the own type alone: PNG and JPEG can be shown everywhere.
            let others = [Format::Png, Format::Jpeg].into_iter();
            let is_taken = |it: &Format| accepted.weight(it.media_type()) > 0;
            for format in others.filter(is_taken) {
                let variant = self.variant(format);
                if !self.list.contains(&Resolved::Variant(variant)) {
                    self.push_made(format);
                }
            }
        }
    }

    /// True for a moving picture whose format alone is left to the server: none that stops it is better than its own.
    fn keeps_moving(&self) -> bool {
        self.traits.animated && !self.transform.is_resized()
    }

    /// True for a format in which only the first frame is shown. `None` is the image's own.
    fn stops(&self, format: Option<Format>) -> bool {
        let own = || self.encodes_own().then(|| Format::kept_by(self.media_type));
        format.or_else(own).is_some_and(|format| !format.moves(self.media_type))
    }

    /// Adds the image in another format: if it moves, with all of its frames, or else with the first one.
    fn push_made(&mut self, format: Format) {
        if !self.media_type.is_decodable() {
            return;
        }
        let first_frame = self.variant(format);
        if first_frame.is_stopped(self.media_type, self.traits) {
            self.list.push(Resolved::Variant(Variant { is_animated: true, ..first_frame }));
            if self.takes_original() && self.keeps_moving() {
                return;
            }
        }
        self.list.push(Resolved::Variant(first_frame));
    }

    /// True if the server may answer with the image as it is.
    fn takes_original(&self) -> bool {
        match self.transform.format {
            RequestedFormat::Kept => true,
            RequestedFormat::Negotiated(accepted) => accepted.weight(self.media_type) > 0,
            RequestedFormat::Exactly(format) => format.media_type() == self.media_type,
        }
    }

    /// Adds the image in its own format, or if only its pixels can be kept, as PNG. `accepts` says which formats may be taken.
    fn push_own(&mut self, accepts: impl Fn(Format) -> bool) {
        self.takes_own = true;
        if !self.encodes_own() {
            self.push_full();
            return;
        }
        let kept = Format::kept_by(self.media_type);
        for format in [Some(kept), Some(Format::Png).filter(|it| *it != kept)].into_iter().flatten()
        {
            if accepts(format) {
                self.push_made(format);
            }
        }
    }

    /// True if the image can't stay as it is in its own format.
    fn encodes_own(&self) -> bool {
        let is_unchanged = !self.transform.is_resized() && self.transform.quality.is_none();
        match self.traits.embedded {
            _ if !self.media_type.is_decodable() => false,
            Embedded::Nothing | Embedded::Removable => !is_unchanged,
            Embedded::Inseparable => !(is_unchanged && self.traits.animated),
        }
    }

    /// Adds the image in full, without the metadata in it.
    fn push_full(&mut self) {
        if self.traits.embedded != Embedded::Nothing {
            self.list.push(Resolved::Stripped);
        }
        self.list.push(Resolved::Original);
    }

    fn variant(&self, format: Format) -> Variant {
        let Transform { bounds, quality, default_quality, effort, .. } = self.transform;
        let variant = Variant::new(bounds, format, quality.unwrap_or(default_quality), effort);
        let only_if_smaller = match self.transform.format {
            RequestedFormat::Negotiated(accepted) => {
                format == Format::Avif && accepted.weight(MediaType::WebP) > 0
            }
            RequestedFormat::Kept | RequestedFormat::Exactly(_) => false,
        };
        Variant { only_if_smaller, ..variant }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn transform(width: u32, format: RequestedFormat) -> Transform {
        let width = Some(width).filter(|it| *it > 0);
        let bounds = Bounds { width, height: None, fit: Fit::Cover, enlarge: false };
        Transform { bounds, format, quality: None, default_quality: 80, effort: Transform::EFFORT }
    }

    fn name(resolved: &Resolved) -> String {
        match resolved {
            Resolved::Original => "original".to_owned(),
            Resolved::Stripped => "stripped".to_owned(),
            Resolved::Variant(variant) => variant.to_string(),
        }
    }

    fn text(transform: Transform, media_type: MediaType) -> String {
        name(&transform.candidates(media_type, Traits::default()).unwrap()[0])
    }

    /// All candidates by their formats.
    fn list(transform: Transform, media_type: MediaType, traits: Traits) -> String {
        let candidates = transform.candidates(media_type, traits).unwrap_or_default();
        let names = candidates.iter().map(|it| match it {
            Resolved::Variant(variant) => variant.format().name().to_owned(),
            other => name(other),
        });
        names.collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn addresses_that_mean_the_same_bytes_mean_the_same_variant() {
        let png = |format| text(transform(256, format), MediaType::Png);
        assert_eq!(png(RequestedFormat::Kept), "w256-png4");
        assert_eq!(png(RequestedFormat::Exactly(Format::Png)), "w256-png4");
        assert_eq!(png(RequestedFormat::Exactly(Format::WebP)), "w256-q80-m4-webp4");
        assert_eq!(text(transform(256, RequestedFormat::Kept), MediaType::Gif), "w256-png4");
        assert_eq!(text(transform(256, RequestedFormat::Kept), MediaType::Jpeg), "w256-q80-jpg4");
        let quality = Transform { quality: Some(80), ..transform(256, RequestedFormat::Kept) };
        assert_eq!(text(quality, MediaType::Jpeg), "w256-q80-jpg4");
        assert_eq!(
            text(Transform::THUMBNAIL, MediaType::WebP),
            "w64-h64-cover-enlarged-q85-m6-webp4"
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
        for opaque in MediaType::ALL.into_iter().filter(|it| !it.is_decodable()) {
            assert_eq!(text(transform(256, RequestedFormat::Kept), opaque), "original");
            let webp = transform(0, RequestedFormat::Exactly(Format::WebP));
            let webp = webp.candidates(opaque, Traits::default());
            assert_eq!(webp, Err(NotAcceptable(opaque)));
        }
    }

    /// Accepts some types with their weights, and all others with another.
    fn accepting(named: &[(MediaType, u16)], rest: u16) -> RequestedFormat {
        let weight = |it: &MediaType| named.iter().find(|(other, _)| other == it).map(|it| it.1);
        let named = MediaType::ALL.map(|it| weight(&it));
        RequestedFormat::Negotiated(AcceptedTypes { named, rest, makes_avif: true })
    }

    #[test]
    fn a_client_gets_the_format_that_it_names_and_likes_best() {
        use MediaType::{Avif, Gif, Heic, Jpeg, JpegXl, Png, Svg, WebP};
        for (named, rest, media_type, expected) in [
            // A browser; curl.
            (&[(WebP, 1000), (Svg, 1000)][..], 1000, Png, "webp original"),
            (&[], 1000, Png, "original"),
            (&[(Avif, 1000), (WebP, 1000)], 1000, Png, "avif webp original"),
            (&[(WebP, 500)], 800, Png, "original webp"),
            (&[(WebP, 0)], 1000, Png, "original"),
            // The original is refused, or not named among what is.
            (&[(Jpeg, 1000)], 0, Png, "jpg"),
            (&[(Jpeg, 1000), (Png, 1000)], 0, Png, "original jpg"),
            (&[(WebP, 900), (Jpeg, 1000)], 0, Jpeg, "original webp"),
            (&[], 0, Png, ""),
            (&[(WebP, 1000)], 0, Avif, "webp"),
            (&[(WebP, 1000)], 800, Avif, "webp original"),
            (&[(Avif, 1000), (WebP, 1000)], 1000, JpegXl, "avif webp original"),
            (&[(JpegXl, 1000), (WebP, 1000)], 800, JpegXl, "original webp"),
            (&[(WebP, 1000)], 0, Heic, ""),
            (&[(WebP, 1000)], 1000, Svg, "original"),
            // Its own type, which isn't encoded here.
            (&[(Gif, 1000)], 0, Gif, "original"),
            (&[(Gif, 1000), (Jpeg, 500)], 0, Gif, "original jpg"),
            (&[(Gif, 0)], 1000, Gif, "png jpg"),
            (&[(Jpeg, 0)], 1000, Jpeg, "png"),
            (&[(Gif, 500), (Jpeg, 1000)], 0, Gif, "jpg original"),
            (&[(Svg, 1000)], 0, Svg, "original"),
            (&[(Avif, 1000), (WebP, 1000)], 0, Avif, "original webp"),
        ] {
            let transform = transform(0, accepting(named, rest));
            let formats = list(transform, media_type, Traits::default());
            assert_eq!(formats, expected, "{named:?} {rest} {media_type:?}");
        }
    }

    #[test]
    fn a_smaller_picture_is_the_whole_one_only_if_no_format_is_accepted_that_can_be_made() {
        use MediaType::{Gif, Jpeg, Png, Svg, WebP};
        for (named, rest, media_type, expected) in [
            (&[(WebP, 1000)][..], 1000, Jpeg, "webp jpg png original"),
            (&[], 1000, Gif, "png original"),
            (&[(Gif, 1000)], 0, Gif, "original"),
            (&[(Gif, 1000), (Jpeg, 500)], 0, Gif, "jpg original"),
            (&[(Png, 1000)], 0, Gif, "png"),
            (&[], 1000, Svg, "original"),
        ] {
            let transform = transform(64, accepting(named, rest));
            let formats = list(transform, media_type, Traits::default());
            assert_eq!(formats, expected, "{named:?} {rest} {media_type:?}");
        }
        assert_eq!(
            list(transform(64, RequestedFormat::Kept), Png, Traits::default()),
            "png original"
        );
    }

    #[test]
    fn metadata_are_dropped_from_an_image_in_its_own_format() {
        let traits = |embedded| Traits { embedded, animated: false };
        let (removable, inseparable) = (traits(Embedded::Removable), traits(Embedded::Inseparable));
        let jpeg = |format, traits| list(transform(0, format), MediaType::Jpeg, traits);
        for format in [RequestedFormat::Exactly(Format::Jpeg), accepting(&[], 1000)] {
            assert_eq!(jpeg(format, Traits::default()), "original");
            assert_eq!(jpeg(format, removable), "stripped original");
        }
        let exactly = RequestedFormat::Exactly(Format::Jpeg);
        assert_eq!(jpeg(exactly, inseparable), "jpg stripped original");
        assert_eq!(jpeg(accepting(&[], 1000), inseparable), "jpg png stripped original");
        let only = accepting(&[(MediaType::Jpeg, 1000)], 0);
        assert_eq!(jpeg(only, inseparable), "jpg stripped original");
        let webp = accepting(&[(MediaType::WebP, 1000)], 1000);
        assert_eq!(jpeg(webp, removable), "webp stripped original");
        // A moving picture would stop.
        let moving = Traits { animated: true, ..inseparable };
        let jpeg = accepting(&[(MediaType::Jpeg, 1000)], 1000);
        assert_eq!(list(transform(0, jpeg), MediaType::Gif, moving), "stripped original");
        assert_eq!(list(transform(0, webp), MediaType::Png, moving), "stripped original");
    }

    #[test]
    fn a_moving_picture_keeps_moving_in_webp_and_is_stopped_only_where_it_must_be() {
        use MediaType::{Avif, Gif, Jpeg, Png, WebP};
        let moving = Traits { animated: true, ..Traits::default() };
        let names = |width, format, media_type| {
            let candidates = transform(width, format).candidates(media_type, moving).unwrap();
            let names = candidates.iter().map(|it| match it {
                Resolved::Variant(variant) if variant.is_animated() => "all".to_owned(),
                Resolved::Variant(variant) => variant.format().name().to_owned(),
                other => name(other),
            });
            names.collect::<Vec<_>>().join(" ")
        };
        let exactly = RequestedFormat::Exactly;
        let browser = || accepting(&[(Avif, 1000), (WebP, 1000)], 800);
        for (width, format, media_type, expected) in [
            (0, browser(), Gif, "all original"),
            (64, browser(), Gif, "all webp avif png original"),
            (0, browser(), WebP, "original"),
            (64, browser(), WebP, "all webp png avif original"),
            (0, browser(), Png, "original"),
            (64, browser(), Png, "avif webp png original"),
            // What the client likes best is given to it.
            (64, accepting(&[(WebP, 500), (Jpeg, 900)], 100), Gif, "jpg all webp png original"),
            (0, accepting(&[(WebP, 1000), (Gif, 0)], 0), Gif, "all webp"),
            (0, accepting(&[], 1000), Gif, "original"),
            (64, accepting(&[], 1000), Gif, "png original"),
            (0, exactly(Format::WebP), Gif, "all webp"),
            (64, exactly(Format::WebP), Gif, "all webp"),
            (0, exactly(Format::WebP), WebP, "original"),
            (64, exactly(Format::WebP), WebP, "all webp original"),
            (64, exactly(Format::Jpeg), Gif, "jpg"),
            (64, RequestedFormat::Kept, Gif, "png original"),
            (64, RequestedFormat::Kept, WebP, "all webp png original"),
        ] {
            assert_eq!(names(width, format, media_type), expected, "{width} {format:?}");
        }
        let thumbnail = Transform::THUMBNAIL.candidates(Gif, moving).unwrap();
        let [Resolved::Variant(thumbnail)] = thumbnail[..] else { panic!("{thumbnail:?}") };
        assert!(!thumbnail.is_animated() && !thumbnail.is_stopped(Gif, moving));
        let all = transform(64, exactly(Format::WebP)).candidates(Gif, moving).unwrap();
        let [Resolved::Variant(all), Resolved::Variant(first)] = all[..] else { panic!("{all:?}") };
        assert_eq!(all.to_string(), "w64-q80-m4-animated-webp4");
        assert_eq!(first.to_string(), "w64-q80-m4-webp4");
        assert!(first.is_stopped(Gif, moving) && !first.is_stopped(Gif, Traits::default()));
        assert!(!first.is_stopped(Png, moving) && !all.is_stopped(Gif, moving));
    }
}
