//! Unpacks the strips and tiles of a TIFF to rows of samples.

use std::borrow::Cow;
use std::io::Read;

use flate2::read::ZlibDecoder;
use hayro_ccitt::{DecodeSettings, DecoderContext, EncodingMode};
use weezl::{BitOrder, LzwStatus};

use super::super::super::{PictureError, RenderLimits};
use super::super::deadline::DeadlineReader;
use super::super::{broken, jpeg};
use super::page::{Colours, Numbers, Page};
use super::{cut_off, refused};

/// Decompresses a strip or tile of some rows to rows that begin with a byte each.
pub(super) fn unpack<'a>(
    page: &Page,
    chunk: &'a [u8],
    rows: u32,
    limits: RenderLimits,
) -> Result<Cow<'a, [u8]>, PictureError> {
    let row = size(page.row_bytes())?;
    let length = match page.subsampling {
        (1, 1) => row * rows as usize,
        (across, down) => {
            let units = (page.chunk.0 as usize).div_ceil(across) * (rows as usize).div_ceil(down);
            units * (across * down + 2)
        }
    };
    let mut source = Cow::Borrowed(chunk);
    if page.is_reversed {
        for byte in source.to_mut() {
            *byte = byte.reverse_bits();
        }
    }
    let mut unpacked = match page.compression {
        1 => match source {
            Cow::Borrowed(source) => Cow::Borrowed(source.get(..length).ok_or_else(cut)?),
            Cow::Owned(mut source) => {
                source.truncate(length);
                Cow::Owned(source)
            }
        },
        2..=4 => Cow::Owned(fax(page, &source, rows)?),
        5 => Cow::Owned(lzw(&source, length)?),
        7 => return Ok(Cow::Owned(jpeg_chunk(page, &source, rows, limits)?)),
        8 | 32946 => {
            let mut unpacked = vec![0; length];
            let mut decoder = ZlibDecoder::new(DeadlineReader::new(&source, limits));
            decoder.read_exact(&mut unpacked).map_err(|error| broken(&error, limits))?;
            Cow::Owned(unpacked)
        }
        32773 => Cow::Owned(pack_bits(&source, length)?),
        _ => return Err(refused("TIFFs of such a compression aren't decoded")),
    };
    if unpacked.len() != length {
        return Err(cut());
    }
    // Only these have a predictor (TIFF 6.0, section 14).
    if page.predictor != 1 && matches!(page.compression, 5 | 8 | 32946) {
        if page.subsampling != (1, 1) {
            return Err(refused("TIFFs of such a predictor aren't decoded"));
        }
        for row in unpacked.to_mut().chunks_exact_mut(row) {
            add_up(page, row)?;
        }
    }
    Ok(match page.subsampling {
        (1, 1) => unpacked,
        _ => Cow::Owned(spread(page, &unpacked, rows as usize)),
    })
}

fn cut() -> PictureError {
    cut_off("a strip or tile has too few pixels")
}

fn size(bytes: u64) -> Result<usize, PictureError> {
    usize::try_from(bytes).ok().ok_or_else(cut)
}

/// Modified Huffman, T.4 and T.6 (TIFF 6.0, sections 10 and 11). Black is 1.
fn fax(page: &Page, source: &[u8], rows: u32) -> Result<Vec<u8>, PictureError> {
    struct Rows {
        bits: Vec<u8>,
        row: usize,
        pushed: u32,
    }
    impl hayro_ccitt::Decoder for Rows {
        fn push_row(&mut self, changes: &[u32]) {
            let row = self.pushed as usize * self.row;
            self.pushed += 1;
            let Some(row) = self.bits.get_mut(row..row + self.row) else {
                return;
            };
            let end = u32::try_from(8 * self.row).unwrap_or(u32::MAX);
            for black in changes.chunks(2) {
                for bit in black[0]..black.get(1).copied().unwrap_or(end).min(end) {
                    row[bit as usize / 8] |= 0x80 >> (bit % 8);
                }
            }
        }
    }
    if (page.bits, page.samples) != (1, 1) {
        return Err(refused("a fax must have one bit a pixel"));
    }
    let encoding = match page.compression {
        4 => EncodingMode::Group4,
        3 if page.fax_options & 1 == 1 => EncodingMode::Group3_2D,
        _ => EncodingMode::Group3_1D,
    };
    let row = size(page.row_bytes())?;
    let mut unpacked = Rows { bits: vec![0; row * rows as usize], row, pushed: 0 };
    let mut context = DecoderContext::new(DecodeSettings {
        columns: page.chunk.0,
        rows,
        end_of_block: true,
        end_of_line: false,
        rows_are_byte_aligned: page.compression == 2,
        encoding,
        strict: true,
    });
    hayro_ccitt::decode(source, &mut unpacked, &mut context)
        .map_err(|_invalid| refused("the fax has an invalid code"))?;
    if unpacked.pushed < rows {
        return Err(cut());
    }
    Ok(unpacked.bits)
}

/// LZW (TIFF 6.0, section 13).
fn lzw(source: &[u8], length: usize) -> Result<Vec<u8>, PictureError> {
    // Before TIFF 5.0 the codes began with their lowest bits.
    if let [0, second, ..] = source
        && second & 1 == 1
    {
        return Err(refused("TIFFs of the old LZW aren't decoded"));
    }
    let mut decoder = weezl::decode::Decoder::with_tiff_size_switch(BitOrder::Msb, 8);
    let mut unpacked = vec![0; length];
    let (mut read, mut written) = (0, 0);
    while written < length {
        let result = decoder.decode_bytes(&source[read..], &mut unpacked[written..]);
        read += result.consumed_in;
        written += result.consumed_out;
        let is_stuck = result.consumed_in == 0 && result.consumed_out == 0;
        match result.status {
            Ok(LzwStatus::Ok) if !is_stuck => {}
            _ if written == length => {}
            _ => return Err(cut()),
        }
    }
    Ok(unpacked)
}

/// `PackBits` (TIFF 6.0, section 9).
fn pack_bits(mut source: &[u8], length: usize) -> Result<Vec<u8>, PictureError> {
    let mut unpacked = Vec::with_capacity(length);
    while unpacked.len() < length {
        let (head, rest) = source.split_first().ok_or_else(cut)?;
        source = match *head {
            128 => rest,
            head @ 0..128 => {
                let (literal, rest) =
                    rest.split_at_checked(usize::from(head) + 1).ok_or_else(cut)?;
                unpacked.extend(literal);
                rest
            }
            head => {
                let (byte, rest) = rest.split_first().ok_or_else(cut)?;
                unpacked.resize(unpacked.len() + 257 - usize::from(head), *byte);
                rest
            }
        };
    }
    unpacked.truncate(length);
    Ok(unpacked)
}

/// A JPEG that may lack its tables (TIFF technical note 2).
fn jpeg_chunk(
    page: &Page,
    source: &[u8],
    rows: u32,
    limits: RenderLimits,
) -> Result<Vec<u8>, PictureError> {
    let tables = page.jpeg_tables.strip_suffix(b"\xff\xd9").unwrap_or(&page.jpeg_tables);
    let whole = match source.strip_prefix(b"\xff\xd8") {
        Some(rest) if !tables.is_empty() => &[tables, rest].concat(),
        _ => source,
    };
    let is_ycbcr = page.colours == Colours::YCbCr;
    let (size, mut pixels) = jpeg::decode_chunk(whole, page.chunk, is_ycbcr, limits)?;
    let samples = page.samples * size.0 as usize * size.1 as usize;
    if size != (page.chunk.0, rows) || pixels.len() != samples {
        return Err(refused("a JPEG must have the size and samples of its strip or tile"));
    }
    if page.colours == Colours::Cmyk {
        // jpeg-decoder takes all inks for inverted, as those of Adobe are.
        for ink in &mut pixels {
            *ink = 255 - *ink;
        }
    }
    Ok(pixels)
}

/// Adds the differences of a row up (TIFF 6.0, section 14, and TIFF technical note 3).
fn add_up(page: &Page, row: &mut [u8]) -> Result<(), PictureError> {
    let samples = if page.is_planar { 1 } else { page.samples };
    let bytes = page.bits / 8;
    match (page.predictor, page.bits) {
        (2, 8) => {
            for at in samples..row.len() {
                row[at] = row[at].wrapping_add(row[at - samples]);
            }
        }
        (2, 16 | 32 | 64) => {
            let step = samples * bytes;
            for at in (step..row.len()).step_by(bytes) {
                let mut carry = 0;
                for nth in 0..bytes {
                    // From the lowest byte on.
                    let nth = if page.is_big_endian { bytes - 1 - nth } else { nth };
                    let sum = u16::from(row[at + nth]) + u16::from(row[at + nth - step]) + carry;
                    let [low, high] = sum.to_le_bytes();
                    row[at + nth] = low;
                    carry = u16::from(high);
                }
            }
        }
        (3, 32 | 64) if page.numbers == Numbers::Float => {
            for at in samples..row.len() {
                row[at] = row[at].wrapping_add(row[at - samples]);
            }
            // All first bytes come first, in big-endian order.
            let values = row.len() / bytes;
            let planes = row.to_vec();
            for (nth, value) in row.chunks_exact_mut(bytes).enumerate() {
                for (byte, to) in value.iter_mut().enumerate() {
                    let byte = if page.is_big_endian { byte } else { bytes - 1 - byte };
                    *to = planes[byte * values + nth];
                }
            }
        }
        _ => return Err(refused("TIFFs of such a predictor aren't decoded")),
    }
    Ok(())
}

/// Gives each pixel the colours that it shares (TIFF 6.0, section 21, `YCbCrSubSampling`).
fn spread(page: &Page, units: &[u8], rows: usize) -> Vec<u8> {
    let (across, down) = page.subsampling;
    let width = page.chunk.0 as usize;
    let unit = across * down + 2;
    let mut pixels = vec![0; 3 * width * rows];
    for (y, row) in pixels.chunks_exact_mut(3 * width).enumerate() {
        let units = &units[y / down * width.div_ceil(across) * unit..];
        for (x, pixel) in row.chunks_exact_mut(3).enumerate() {
            let unit = &units[x / across * unit..][..unit];
            pixel.copy_from_slice(&[
                unit[y % down * across + x % across],
                unit[across * down],
                unit[across * down + 1],
            ]);
        }
    }
    pixels
}

/// Reads the values of a row as they are.
pub(super) fn values(page: &Page, row: &[u8], values: &mut Vec<f64>) {
    let (bits, big) = (page.bits, page.is_big_endian);
    values.clear();
    match (page.numbers, bits) {
        (_, 8) => values.extend(row.iter().map(|byte| f64::from(*byte))),
        (_, 16) => {
            let read = if big { u16::from_be_bytes } else { u16::from_le_bytes };
            values.extend(row.as_chunks().0.iter().map(|it| f64::from(read(*it))));
        }
        (Numbers::Unsigned, 32) => {
            let read = if big { u32::from_be_bytes } else { u32::from_le_bytes };
            values.extend(row.as_chunks().0.iter().map(|it| f64::from(read(*it))));
        }
        (Numbers::Signed, 32) => {
            let read = if big { i32::from_be_bytes } else { i32::from_le_bytes };
            values.extend(row.as_chunks().0.iter().map(|it| f64::from(read(*it))));
        }
        (Numbers::Float, 32) => {
            let read = if big { f32::from_be_bytes } else { f32::from_le_bytes };
            values.extend(row.as_chunks().0.iter().map(|it| f64::from(read(*it))));
        }
        (Numbers::Float, 64) => {
            let read = if big { f64::from_be_bytes } else { f64::from_le_bytes };
            values.extend(row.as_chunks().0.iter().map(|it| read(*it)));
        }
        // Other sizes are packed, the highest bit first.
        _ => {
            let (mut held, mut count) = (0_u32, 0);
            for byte in row {
                held = held << 8 | u32::from(*byte);
                count += 8;
                while count >= bits {
                    count -= bits;
                    values.push(f64::from(held >> count & ((1 << bits) - 1)));
                }
                held &= (1 << count) - 1;
            }
        }
    }
}
