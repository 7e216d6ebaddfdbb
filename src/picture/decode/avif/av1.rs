//! AV1 images: the sequence header (AV1 §5.5), and the decoder.

use re_rav1d::dav1d::{Decoder, Error, Picture, PixelLayout, PlanarImageComponent, Settings};

use super::super::super::{PictureError, RenderLimits};
use super::super::pixels;
use super::source::Cell;
use super::{broken, unsupported};

/// The subsampling of the colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    Grey,
    /// 4:2:0.
    Quarters,
    /// 4:2:2.
    Halves,
    /// 4:4:4.
    Full,
}

impl Layout {
    /// Width and height of a plane: the first one has the brightness.
    pub(super) fn plane(self, number: usize, (width, height): (u32, u32)) -> (u32, u32) {
        match self {
            _ if number == 0 => (width, height),
            Layout::Grey => (0, 0),
            Layout::Quarters => (width.div_ceil(2), height.div_ceil(2)),
            Layout::Halves => (width.div_ceil(2), height),
            Layout::Full => (width, height),
        }
    }

    /// The number of planes.
    pub(super) fn planes(self) -> usize {
        if self == Layout::Grey { 1 } else { 3 }
    }

    /// Samples of all planes of four pixels.
    fn samples(self) -> u64 {
        match self {
            Layout::Grey => 4,
            Layout::Quarters => 6,
            Layout::Halves => 8,
            Layout::Full => 12,
        }
    }
}

/// The part of a sequence header that counts here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) depth: u8,
    pub(super) layout: Layout,
    pub(super) is_full_range: bool,
    /// Code points of the primaries, the curve and the matrix (ITU-T H.273 §8).
    pub(super) points: [u8; 3],
    /// Frames in the data.
    frames: u64,
}

impl Header {
    /// True if pictures of both headers can stand side by side.
    pub(super) fn is_like(&self, other: &Header) -> bool {
        Header { frames: 0, ..*self } == Header { frames: 0, ..*other }
    }

    /// Bytes of a sample.
    pub(super) fn sample(&self) -> usize {
        if self.depth > 8 { 2 } else { 1 }
    }

    /// Bytes of the planes of a picture.
    pub(super) fn planes(&self, size: (u32, u32)) -> u64 {
        let (width, height) = size;
        let aligned = (width.next_multiple_of(2), height.next_multiple_of(2));
        pixels(aligned) * self.sample() as u64 * self.layout.samples() / 4
    }

    /// Bytes that the decoder takes at most for a picture of a size, beside a copy of its data.
    pub(super) fn memory(&self, size: (u32, u32)) -> u64 {
        /// Tables, and the state of the decoder.
        const FIXED: u64 = 8 << 20;
        // Superblocks have 128 pixels, and a picture may grow by a block on each side.
        let (width, height) = size;
        let block = |it: u32| it.saturating_add(128).next_multiple_of(128);
        let aligned = (block(width), block(height));
        // One that is decoded, one with grain; later ones refer to up to eight others.
        let pictures = if self.frames <= 1 { 2 } else { self.frames.min(8) + 2 };
        // Beside each picture there are its blocks, and what the filters need of it.
        pictures * (self.planes(aligned) + 2 * pixels(aligned)) + 4 * pixels(aligned) + FIXED
    }
}

/// A unit of an AV1 stream (AV1 §5.3).
struct Unit<'a> {
    kind: u8,
    layer: u16,
    whole: &'a [u8],
    payload: &'a [u8],
}

/// Units that follow each other.
struct Units<'a>(&'a [u8]);

impl<'a> Iterator for Units<'a> {
    type Item = Result<Unit<'a>, PictureError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let rest = std::mem::take(&mut self.0);
        Some(unit(rest).ok_or_else(|| broken("its AV1 data is cut off")).inspect(|unit| {
            self.0 = &rest[unit.whole.len()..];
        }))
    }
}

fn unit(bytes: &[u8]) -> Option<Unit<'_>> {
    let flags = *bytes.first()?;
    let mut at = 1;
    let mut layer = 0;
    if flags & 4 != 0 {
        layer = u16::from(bytes.get(1)? >> 3 & 3);
        at = 2;
    }
    let mut length = 0;
    if flags & 2 != 0 {
        for group in 0..8 {
            let byte = *bytes.get(at)?;
            at += 1;
            length |= usize::from(byte & 0x7f).checked_shl(7 * group)?;
            if byte & 0x80 == 0 {
                break;
            }
        }
    } else {
        length = bytes.len().checked_sub(at)?;
    }
    let whole = bytes.get(..at.checked_add(length)?)?;
    Some(Unit { kind: flags >> 3 & 15, layer, whole, payload: &whole[at..] })
}

const SEQUENCE_HEADER: u8 = 1;
const FRAME_HEADER: u8 = 3;
const FRAME: u8 = 6;

/// Reads the sequence header of an image.
pub(super) fn header(data: &[u8]) -> Result<Header, PictureError> {
    let mut header: Option<Header> = None;
    let mut frames = 0;
    for unit in Units(data) {
        let unit = unit?;
        match unit.kind {
            SEQUENCE_HEADER => {
                let next = sequence_header(&mut Bits { bytes: unit.payload, at: 0 })?;
                if header.is_some_and(|header| !header.is_like(&next)) {
                    return Err(unsupported("AVIF with several AV1 sequences"));
                }
                header = Some(next);
            }
            FRAME_HEADER | FRAME => frames += 1,
            _ => {}
        }
    }
    let header = header.ok_or_else(|| broken("it has no AV1 sequence header"))?;
    Ok(Header { frames, ..header })
}

/// Reads bits, the highest one first.
struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Bits<'_> {
    fn flag(&mut self) -> Result<bool, PictureError> {
        let byte = self.bytes.get(self.at / 8);
        let byte = byte.ok_or_else(|| broken("its AV1 sequence header is cut off"))?;
        let bit = byte >> (7 - self.at % 8) & 1;
        self.at += 1;
        Ok(bit == 1)
    }

    /// A number of 32 bits at most.
    fn number(&mut self, bits: u32) -> Result<u32, PictureError> {
        let mut number = 0;
        for _ in 0..bits {
            number = number << 1 | u32::from(self.flag()?);
        }
        Ok(number)
    }

    /// A small number.
    fn byte(&mut self) -> Result<u8, PictureError> {
        let number = self.number(8)?;
        Ok(number.to_le_bytes()[0])
    }

    fn skip(&mut self, bits: u32) -> Result<(), PictureError> {
        (0..bits).try_for_each(|_| self.flag().map(|_| ()))
    }
}

/// Reads a sequence header (AV1 §5.5.1).
fn sequence_header(bits: &mut Bits) -> Result<Header, PictureError> {
    let profile = bits.number(3)?;
    let _still_picture = bits.flag()?;
    let is_reduced = bits.flag()?;
    if is_reduced {
        bits.skip(5)?;
    } else {
        operating_points(bits)?;
    }
    let (width, height) = (bits.number(4)? + 1, bits.number(4)? + 1);
    bits.skip(width + height)?;
    if !is_reduced && bits.flag()? {
        // Numbers of frames.
        bits.skip(7)?;
    }
    // Superblocks, filters of intra blocks, and of their edges.
    bits.skip(3)?;
    if !is_reduced {
        bits.skip(4)?;
        let has_order = bits.flag()?;
        if has_order {
            bits.skip(2)?;
        }
        let has_screen_tools = bits.flag()? || bits.flag()?;
        if has_screen_tools && !bits.flag()? {
            bits.skip(1)?;
        }
        if has_order {
            bits.skip(3)?;
        }
    }
    // Super-resolution, CDEF and restoration.
    bits.skip(3)?;
    colour_config(bits, profile)
}

/// Skips the time and the operating points of a sequence header.
fn operating_points(bits: &mut Bits) -> Result<(), PictureError> {
    let mut delay = None;
    if bits.flag()? {
        bits.skip(64)?;
        if bits.flag()? {
            let mut zeros = 0;
            while !bits.flag()? {
                zeros += 1;
            }
            bits.skip(if zeros < 32 { zeros } else { 0 })?;
        }
        if bits.flag()? {
            delay = Some(bits.number(5)? + 1);
            bits.skip(32 + 10)?;
        }
    }
    let has_display_delay = bits.flag()?;
    for _ in 0..=bits.number(5)? {
        bits.skip(12)?;
        if bits.number(5)? > 7 {
            bits.skip(1)?;
        }
        if let Some(delay) = delay
            && bits.flag()?
        {
            bits.skip(2 * delay + 1)?;
        }
        if has_display_delay && bits.flag()? {
            bits.skip(4)?;
        }
    }
    Ok(())
}

/// Reads the colours of a sequence header (AV1 §5.5.2).
fn colour_config(bits: &mut Bits, profile: u32) -> Result<Header, PictureError> {
    /// sRGB without a matrix.
    const RGB: [u8; 3] = [1, 13, 0];
    let is_deep = bits.flag()?;
    let depth = match is_deep {
        true if profile == 2 && bits.flag()? => 12,
        true => 10,
        false => 8,
    };
    let is_grey = profile != 1 && bits.flag()?;
    let mut points = [2; 3];
    if bits.flag()? {
        points = [bits.byte()?, bits.byte()?, bits.byte()?];
    }
    let is_full_range = (!is_grey && points == RGB) || bits.flag()?;
    let layout = match profile {
        _ if is_grey => Layout::Grey,
        _ if points == RGB => Layout::Full,
        0 => Layout::Quarters,
        1 => Layout::Full,
        2 if depth < 12 => Layout::Halves,
        2 if !bits.flag()? => Layout::Full,
        2 if bits.flag()? => Layout::Quarters,
        2 => Layout::Halves,
        _ => return Err(unsupported("AVIF with an unknown AV1 profile")),
    };
    Ok(Header { depth, layout, is_full_range, points, frames: 0 })
}

/// Decodes an image. Fails if it isn't as its header and its item say.
pub(super) fn decode(
    cell: &Cell,
    data: &[u8],
    header: &Header,
    limits: RenderLimits,
) -> Result<Picture, PictureError> {
    limits.check_time()?;
    let mut settings = Settings::new();
    settings.set_n_threads(1);
    settings.set_max_frame_delay(1);
    settings.set_operating_point(cell.point.into());
    settings.set_all_layers(cell.layer.is_some());
    let limit = u32::try_from(pixels(cell.size)).unwrap_or(u32::MAX);
    settings.set_frame_size_limit(limit);
    let mut decoder = Decoder::with_settings(&settings).map_err(failed)?;
    let mut picture = None;
    let mut sent = decoder.send_data(chosen(cell, data)?, None, None, None);
    loop {
        if let Err(error) = sent
            && !error.is_again()
        {
            return Err(failed(error));
        }
        let is_all = sent.is_ok();
        match decoder.get_picture() {
            Ok(next) => picture = Some(next),
            Err(Error::Again) if is_all => break,
            Err(Error::Again) => {}
            Err(error) => return Err(failed(error)),
        }
        // One is enough, but of layers that are chosen the last one counts.
        if picture.is_some() && cell.layer.is_none() {
            break;
        }
        limits.check_time()?;
        sent = decoder.send_pending_data();
    }
    let picture = picture.ok_or_else(|| broken("it has no AV1 frame that is shown"))?;
    let layout = match picture.pixel_layout() {
        PixelLayout::I400 => Layout::Grey,
        PixelLayout::I420 => Layout::Quarters,
        PixelLayout::I422 => Layout::Halves,
        PixelLayout::I444 => Layout::Full,
    };
    let depth = picture.bits_per_component().map(|depth| depth.0);
    if layout != header.layout || depth != Some(header.depth.into()) {
        return Err(broken("its AV1 frame isn't as the sequence header says"));
    }
    if (picture.width(), picture.height()) != cell.size {
        return Err(unsupported("AVIF with an AV1 frame of another size than its item"));
    }
    Ok(picture)
}

/// The data for the decoder: of a layer that is chosen, without those above it.
fn chosen(cell: &Cell, data: &[u8]) -> Result<Vec<u8>, PictureError> {
    let Some(layer) = cell.layer else { return Ok(data.to_vec()) };
    let mut chosen = Vec::with_capacity(data.len());
    let mut is_there = false;
    for unit in Units(data) {
        let unit = unit?;
        if unit.layer <= layer {
            chosen.extend_from_slice(unit.whole);
        }
        is_there |= unit.layer == layer && matches!(unit.kind, FRAME | FRAME_HEADER);
    }
    if !is_there {
        return Err(broken("it has no frame of the AV1 layer that is chosen"));
    }
    Ok(chosen)
}

/// The rows of a plane, with their stride in bytes.
pub(super) fn plane(picture: &Picture, number: usize) -> (re_rav1d::dav1d::Plane, usize) {
    let component = PlanarImageComponent::from(number);
    (picture.plane(component), picture.stride(component) as usize)
}

fn failed(error: Error) -> PictureError {
    match error {
        Error::UnsupportedBitstream => unsupported("AV1 of this kind"),
        error => broken(&format!("its AV1 data can't be decoded: {error}")),
    }
}
