//! Boxes of an ISO base media file (ISO/IEC 14496-12 §4.2), and numbers in them.

use super::super::super::PictureError;
use super::broken;

/// A box without its header.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part<'a> {
    pub(super) kind: [u8; 4],
    pub(super) payload: &'a [u8],
}

/// Boxes that follow each other. Ends with an error at one that is cut off.
#[derive(Debug, Clone)]
pub(super) struct Boxes<'a>(pub(super) &'a [u8]);

impl<'a> Iterator for Boxes<'a> {
    type Item = Result<Part<'a>, PictureError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let rest = std::mem::take(&mut self.0);
        Some(split(rest).map(|(part, after)| {
            self.0 = after;
            part
        }))
    }
}

/// The first box, and the bytes after it.
fn split(bytes: &[u8]) -> Result<(Part<'_>, &[u8]), PictureError> {
    let mut reader = Reader(bytes);
    let (length, kind) = (reader.u32()?, reader.kind()?);
    let length = match length {
        // To the end of the file.
        0 => bytes.len(),
        1 => usize::try_from(reader.number(8)?).map_err(|_long| cut_off())?,
        length => length as usize,
    };
    if kind == *b"uuid" {
        reader.take(16)?;
    }
    let header = bytes.len() - reader.0.len();
    let (whole, after) = bytes.split_at_checked(length).ok_or_else(cut_off)?;
    Ok((Part { kind, payload: whole.get(header..).ok_or_else(cut_off)? }, after))
}

/// The first box of a kind.
pub(super) fn find(bytes: &[u8], kind: [u8; 4]) -> Result<Option<&[u8]>, PictureError> {
    for part in Boxes(bytes) {
        let part = part?;
        if part.kind == kind {
            return Ok(Some(part.payload));
        }
    }
    Ok(None)
}

/// The first box of a kind, without which there is no picture.
pub(super) fn expect(bytes: &[u8], kind: [u8; 4]) -> Result<&[u8], PictureError> {
    let missing = || broken(&format!("it has no box {}", kind.escape_ascii()));
    find(bytes, kind)?.ok_or_else(missing)
}

/// Reads big-endian numbers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take(&mut self, count: usize) -> Result<&'a [u8], PictureError> {
        let (taken, rest) = self.0.split_at_checked(count).ok_or_else(cut_off)?;
        self.0 = rest;
        Ok(taken)
    }

    /// A number of 0 to 8 bytes.
    pub(super) fn number(&mut self, bytes: usize) -> Result<u64, PictureError> {
        Ok(self.take(bytes)?.iter().fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }

    pub(super) fn u8(&mut self) -> Result<u8, PictureError> {
        Ok(self.take(1)?[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16, PictureError> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    pub(super) fn u32(&mut self) -> Result<u32, PictureError> {
        let bytes = self.take(4)?;
        Ok(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    pub(super) fn kind(&mut self) -> Result<[u8; 4], PictureError> {
        Ok(self.u32()?.to_be_bytes())
    }

    /// Version and flags, with which a full box begins.
    pub(super) fn version(&mut self) -> Result<(u8, u32), PictureError> {
        let [version, flags @ ..] = self.kind()?;
        Ok((version, u32::from_be_bytes([0, flags[0], flags[1], flags[2]])))
    }
}

fn cut_off() -> PictureError {
    broken("it is cut off")
}
