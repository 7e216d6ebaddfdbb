//! The image types that are served, and their names.

/// A type of image that is served.
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

    /// The type that a name stands for, by [`MediaType::is_named`].
    #[must_use]
    pub fn named(name: &str) -> Option<MediaType> {
        MediaType::ALL.into_iter().find(|it| it.is_named(name))
    }

    /// True for types that `picture` decodes.
    ///
    /// AVIF and JPEG XL need the features `read-avif` and `read-jxl`. HEIC is served as it is, and so is SVG, which has no
    /// pixels.
    #[must_use]
    pub const fn is_decodable(self) -> bool {
        match self {
            MediaType::Png
            | MediaType::Jpeg
            | MediaType::Gif
            | MediaType::WebP
            | MediaType::Bmp
            | MediaType::Ico
            | MediaType::Tiff => true,
            MediaType::Avif => cfg!(feature = "read-avif"),
            MediaType::JpegXl => cfg!(feature = "read-jxl"),
            MediaType::Heic | MediaType::Svg => false,
        }
    }

    /// True for types that `decoder` decodes in a process of its own.
    #[must_use]
    pub const fn is_decoded_apart(self) -> bool {
        matches!(self, MediaType::Avif | MediaType::JpegXl)
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

    /// The usual file name extension, without the dot.
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

    /// Tells whether a declared name stands for this type. Case and parameters are ignored, and well-known aliases
    /// count.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_is_known_by_its_aliases_case_and_parameters() {
        assert!(MediaType::Jpeg.is_named("IMAGE/JPG; q=1"));
        assert!(MediaType::Svg.is_named("image/svg+xml;charset=utf-8"));
        assert!(!MediaType::Png.is_named("image/jpeg"));
        assert!(!MediaType::Png.is_named(""));
    }
}
