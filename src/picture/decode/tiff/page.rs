//! Reads the tags of the first page of a TIFF.

use std::io::Cursor;

use image::metadata::Orientation;
use tiff::decoder::Decoder;
use tiff::decoder::ifd::Value;
use tiff::tags::{ByteOrder, Tag};

use super::super::super::{PictureError, RenderLimits};
use super::super::{broken, check_pixels};
use super::{cut_off, refused};

/// The colours of a page (TIFF 6.0, `PhotometricInterpretation`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Colours {
    /// Grey of which the least value is white.
    WhiteIsZero,
    BlackIsZero,
    Rgb,
    Palette,
    Cmyk,
    YCbCr,
}

impl Colours {
    /// Samples of a pixel, without the extra ones.
    fn samples(self) -> usize {
        match self {
            Colours::WhiteIsZero | Colours::BlackIsZero | Colours::Palette => 1,
            Colours::Rgb | Colours::YCbCr => 3,
            Colours::Cmyk => 4,
        }
    }

    pub(super) fn is_grey(self) -> bool {
        matches!(self, Colours::WhiteIsZero | Colours::BlackIsZero)
    }
}

/// The kind of numbers that samples are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Numbers {
    Unsigned,
    Signed,
    Float,
}

/// The first page of a TIFF.
#[expect(clippy::struct_excessive_bools, reason = "each is a tag of its own")]
#[derive(Debug)]
pub(super) struct Page {
    pub(super) size: (u32, u32),
    pub(super) orientation: Orientation,
    pub(super) colours: Colours,
    /// Samples of a pixel, with the extra ones.
    pub(super) samples: usize,
    /// Bits of each sample.
    pub(super) bits: usize,
    pub(super) numbers: Numbers,
    /// The sample that is alpha, and true if the colours are multiplied by it.
    pub(super) alpha: Option<(usize, bool)>,
    pub(super) compression: u16,
    pub(super) predictor: u16,
    pub(super) is_big_endian: bool,
    /// True if the first pixel of a byte is its lowest bit (`FillOrder`).
    pub(super) is_reversed: bool,
    /// True if each sample has chunks of its own (`PlanarConfiguration`).
    pub(super) is_planar: bool,
    /// The size of a strip or tile.
    pub(super) chunk: (u32, u32),
    is_tiled: bool,
    offsets: Vec<u64>,
    lengths: Vec<u64>,
    /// Columns and rows of pixels that share colours.
    pub(super) subsampling: (usize, usize),
    /// The weights of red and of blue in brightness.
    pub(super) weights: (f64, f64),
    pub(super) palette: Vec<u16>,
    pub(super) fax_options: u32,
    pub(super) jpeg_tables: Vec<u8>,
    pub(super) profile: Option<Vec<u8>>,
}

impl Page {
    /// Reads the tags, and refuses what would not be decoded to the right pixels.
    pub(super) fn read(bytes: &[u8], limits: RenderLimits) -> Result<Page, PictureError> {
        let mut tags = Tags::read(bytes, limits)?;
        let size = tags.decoder.dimensions().map_err(|error| broken(&error, limits))?;
        check_pixels(size, limits)?;
        let compression = tags.number(259, 1)?;
        let is_jpeg = compression == 7;
        let colours = match tags.number(262, u16::MAX)? {
            0 => Colours::WhiteIsZero,
            1 => Colours::BlackIsZero,
            2 => Colours::Rgb,
            3 => Colours::Palette,
            5 if tags.number(332, 1)? == 1 => Colours::Cmyk,
            6 => Colours::YCbCr,
            _ => return Err(refused("TIFFs of such colours aren't decoded")),
        };
        let samples = usize::from(tags.number::<u16>(277, 1)?);
        let extras: Vec<u16> = tags.numbers(338)?;
        let alpha = alpha(colours, samples, &extras)?;
        let bits = tags.numbers::<usize>(258)?.first().copied().unwrap_or(1);
        let numbers = match tags.numbers::<u16>(339)?.first() {
            // 4 is for no numbers at all.
            None | Some(1 | 4) => Numbers::Unsigned,
            Some(2) => Numbers::Signed,
            Some(3) => Numbers::Float,
            Some(_) => return Err(refused("TIFFs of such numbers aren't decoded")),
        };
        // Grey of great numbers is shown as Pillow and libvips show it. They disagree on all others.
        let is_shown = match (numbers, bits) {
            (Numbers::Unsigned, 1..=16) => true,
            (Numbers::Float, 32 | 64) => colours.is_grey() && samples == 1,
            _ => false,
        };
        let is_8_bits = bits == 8 && numbers == Numbers::Unsigned;
        if !is_shown || (!is_8_bits && (is_jpeg || colours == Colours::YCbCr)) {
            return Err(refused("TIFFs of such numbers aren't decoded"));
        }
        let palette: Vec<u16> = tags.numbers(320)?;
        if colours == Colours::Palette && (bits > 8 || palette.len() < 3 << bits) {
            return Err(refused(
                "a palette must have three values for each of at most 256 colours",
            ));
        }
        let is_planar = samples > 1 && tags.number(284, 1)? == 2;
        let subsampling = match (colours, is_jpeg, &tags.numbers::<u16>(530)?[..]) {
            (Colours::YCbCr, false, []) => (2, 2),
            (Colours::YCbCr, false, [h @ (1 | 2 | 4), v @ (1 | 2 | 4)]) => {
                (usize::from(*h), usize::from(*v))
            }
            (Colours::YCbCr, false, _) => return Err(refused("such a subsampling isn't decoded")),
            _ => (1, 1),
        };
        let has_own_planes = is_planar && (is_jpeg || subsampling != (1, 1));
        if has_own_planes || (subsampling != (1, 1) && samples != 3) {
            return Err(refused("TIFFs of subsampled planes aren't decoded"));
        }
        let is_tiled = tags.has(324);
        let (offsets, lengths) = if is_tiled { (324, 325) } else { (273, 279) };
        let chunk = if is_tiled {
            (tags.number(322, 0)?, tags.number(323, 0)?)
        } else {
            (size.0, tags.number(278, size.1)?.min(size.1))
        };
        if chunk.0 == 0 || chunk.1 == 0 {
            return Err(refused("a strip or tile must have pixels"));
        }
        let page = Page {
            size,
            orientation: Orientation::from_exif(tags.number(274, 1).unwrap_or(1))
                .unwrap_or(Orientation::NoTransforms),
            colours,
            samples,
            bits,
            numbers,
            alpha,
            compression,
            predictor: tags.number(317, 1)?,
            is_big_endian: tags.decoder.byte_order() == ByteOrder::BigEndian,
            is_reversed: tags.number(266, 1)? == 2,
            is_planar,
            chunk,
            is_tiled,
            offsets: tags.numbers(offsets)?,
            lengths: tags.numbers(lengths)?,
            subsampling,
            weights: tags.weights()?,
            palette,
            fax_options: tags.number(292, 0)?,
            jpeg_tables: tags.numbers(347)?,
            profile: tags.numbers(34675).ok().filter(|profile| !profile.is_empty()),
        };
        page.check_memory(limits)?;
        Ok(page)
    }

    /// Strips and tiles in a row and in a column of them.
    pub(super) fn chunks(&self) -> (u32, u32) {
        (self.size.0.div_ceil(self.chunk.0), self.size.1.div_ceil(self.chunk.1))
    }

    /// The bytes of a strip or tile in the file, and the rows in it. `nth` counts all those of a plane, and then the next's.
    pub(super) fn chunk_in<'a>(
        &self,
        bytes: &'a [u8],
        nth: usize,
        row: u32,
    ) -> Result<(&'a [u8], u32), PictureError> {
        let number = |of: &[u64]| usize::try_from(*of.get(nth)?).ok();
        let chunk = number(&self.offsets)
            .zip(number(&self.lengths))
            .and_then(|(offset, length)| bytes.get(offset..)?.get(..length));
        // Only the last strip is shorter; a tile is always whole.
        let rows = if self.is_tiled { self.chunk.1 } else { self.chunk.1.min(self.size.1 - row) };
        Ok((chunk.ok_or_else(|| cut_off("the file ends before its last pixels"))?, rows))
    }

    /// Bytes of a row of a strip or tile: of all samples, or of one plane.
    pub(super) fn row_bytes(&self) -> u64 {
        let samples = if self.is_planar { 1 } else { self.samples as u64 };
        (u64::from(self.chunk.0) * samples * self.bits as u64).div_ceil(8)
    }

    /// Bytes of a strip or tile with all its planes.
    pub(super) fn chunk_bytes(&self) -> u64 {
        let planes = if self.is_planar { self.samples as u64 } else { 1 };
        self.row_bytes().saturating_mul(u64::from(self.chunk.1)).saturating_mul(planes)
    }

    /// Refuses strips and tiles that take more memory than a picture of the most pixels.
    fn check_memory(&self, limits: RenderLimits) -> Result<(), PictureError> {
        /// Room for a tile of a tiny picture.
        const SMALL: u64 = 16 << 20;
        if self.chunk_bytes() > limits.pixels.saturating_mul(16).max(SMALL) {
            return Err(refused("a strip or tile is larger than all pictures may be"));
        }
        Ok(())
    }
}

/// The alpha channel (TIFF 6.0, `ExtraSamples`). Without that tag, what follows the colours is alpha, as in Pillow.
fn alpha(
    colours: Colours,
    samples: usize,
    extras: &[u16],
) -> Result<Option<(usize, bool)>, PictureError> {
    let first = colours.samples();
    if samples < first || samples > first + 8 {
        return Err(refused("a TIFF must have a sample for each of its colours, and few more"));
    }
    if extras.is_empty() && samples == first + 1 && colours != Colours::Cmyk {
        return Ok(Some((first, false)));
    }
    // 0 is for samples that nobody knows, 1 for alpha that the colours are multiplied by, 2 for alpha that they aren't.
    let nth = extras.iter().take(samples - first).position(|extra| matches!(extra, 1 | 2));
    Ok(nth.map(|nth| (first + nth, extras[nth] == 1)))
}

/// The tags of the first page.
struct Tags<'a> {
    decoder: Decoder<Cursor<&'a [u8]>>,
    limits: RenderLimits,
}

impl<'a> Tags<'a> {
    fn read(bytes: &'a [u8], limits: RenderLimits) -> Result<Tags<'a>, PictureError> {
        // Values may have a megabyte each; nothing else is read by this decoder.
        let decoder = Decoder::new(Cursor::new(bytes)).map_err(|error| broken(&error, limits))?;
        Ok(Tags { decoder, limits })
    }

    fn has(&mut self, tag: u16) -> bool {
        self.decoder.image_ifd().directory().contains(Tag::from_u16_exhaustive(tag))
    }

    fn numbers<T: TryFrom<u64>>(&mut self, tag: u16) -> Result<Vec<T>, PictureError> {
        let numbers = self.decoder.find_tag_unsigned_vec(Tag::from_u16_exhaustive(tag));
        Ok(numbers.map_err(|error| broken(&error, self.limits))?.unwrap_or_default())
    }

    fn number<T: TryFrom<u64>>(&mut self, tag: u16, default: T) -> Result<T, PictureError> {
        Ok(self.numbers(tag)?.into_iter().next().unwrap_or(default))
    }

    fn fractions(&mut self, tag: u16) -> Vec<f64> {
        let values = match self.decoder.find_tag(Tag::from_u16_exhaustive(tag)) {
            Ok(Some(Value::List(values))) => values,
            _ => Vec::new(),
        };
        let fraction = |value| match value {
            Value::Rational(part, whole) => Some(f64::from(part) / f64::from(whole)),
            value => value.into_f64().ok(),
        };
        values.into_iter().filter_map(fraction).collect()
    }

    /// The weights of red and of blue (TIFF 6.0, `YCbCrCoefficients`), if the values have their whole range.
    fn weights(&mut self) -> Result<(f64, f64), PictureError> {
        let is = |it: &[f64], full: &[f64]| {
            it.len() == full.len() && it.iter().zip(full).all(|(it, full)| (it - full).abs() < 0.5)
        };
        let range = self.fractions(532);
        let full = [0.0, 255.0, 128.0, 255.0, 128.0, 255.0];
        let is_full = range.is_empty() || is(&range, &full) || is(&range, &[0.0, 255.0].repeat(3));
        match self.fractions(529)[..] {
            _ if !is_full => Err(refused("TIFFs of a range of brightness aren't decoded")),
            [] => Ok((0.299, 0.114)),
            [red, green, blue]
                if [red, green, blue].iter().all(|it| (0.01..1.0).contains(it))
                    && (red + green + blue - 1.0).abs() < 0.01 =>
            {
                Ok((red, blue))
            }
            _ => Err(refused("the weights of the colours must be one together")),
        }
    }
}
