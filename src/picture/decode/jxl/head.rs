//! The head of a JPEG XL (ISO/IEC 18181-1, annex D): what is needed to measure it, without its colour profile, which may be
//! unpacked to any size.

/// The beginning of a codestream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    /// Width and height as shown, with the orientation applied.
    pub(super) size: (u32, u32),
    /// Alpha, depth and the like.
    pub(super) extra_channels: u32,
    pub(super) is_animated: bool,
}

impl Head {
    /// Reads the head of a bare codestream, or of one in a container. `None` if it is cut off, or isn't in the first box of a codestream.
    pub(super) fn read(bytes: &[u8]) -> Option<Head> {
        let mut bits = Bits { bytes: codestream(bytes)?.strip_prefix(b"\xff\x0a")?, at: 0 };
        let size = bits.size()?;
        if bits.flag()? {
            // All of it is as usual: 8 bits, no further channels.
            return Some(Head { size, extra_channels: 0, is_animated: false });
        }
        let (mut is_turned, mut is_animated) = (false, false);
        if bits.flag()? {
            is_turned = bits.number(3)? >= 4;
            // The size that the picture was made for.
            if bits.flag()? {
                bits.size()?;
            }
            if bits.flag()? {
                bits.skip_preview()?;
            }
            is_animated = bits.flag()?;
            if is_animated {
                bits.skip_animation()?;
            }
        }
        if bits.flag()? {
            bits.choice([(32, 0), (16, 0), (24, 0), (1, 6)])?;
            bits.number(4)?;
        } else {
            bits.choice([(8, 0), (10, 0), (12, 0), (1, 6)])?;
        }
        // Sixteen bits are enough for its samples.
        bits.flag()?;
        let extra_channels = bits.choice([(0, 0), (1, 0), (2, 4), (1, 12)])?;
        let size = if is_turned { (size.1, size.0) } else { size };
        Some(Head { size, extra_channels, is_animated })
    }
}

/// The codestream, or its first part.
fn codestream(bytes: &[u8]) -> Option<&[u8]> {
    if bytes.starts_with(b"\xff\x0a") {
        return Some(bytes);
    }
    for found in super::boxes(bytes) {
        match found? {
            (b"jxlc", content) => return Some(content),
            // The parts are numbered.
            (b"jxlp", content) => return content.get(4..),
            _ => {}
        }
    }
    None
}

/// Bits, the lowest of each byte first.
struct Bits<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Bits<'_> {
    fn number(&mut self, bits: u32) -> Option<u32> {
        let mut number = 0;
        for shift in 0..bits {
            let byte = self.bytes.get(self.at / 8)?;
            number |= u32::from((byte >> (self.at % 8)) & 1) << shift;
            self.at += 1;
        }
        Some(number)
    }

    fn flag(&mut self) -> Option<bool> {
        Some(self.number(1)? == 1)
    }

    /// A number in one of four forms, each with a least value and some bits.
    fn choice(&mut self, forms: [(u32, u32); 4]) -> Option<u32> {
        let (least, bits) = forms[self.number(2)? as usize];
        least.checked_add(self.number(bits)?)
    }

    fn size(&mut self) -> Option<(u32, u32)> {
        const FORMS: [(u32, u32); 4] = [(1, 9), (1, 13), (1, 18), (1, 30)];
        let is_small = self.flag()?;
        let length = |bits: &mut Self| {
            if is_small { Some(8 * (bits.number(5)? + 1)) } else { bits.choice(FORMS) }
        };
        let height = length(self)?;
        let ratio = self.number(3)?;
        let width = if ratio == 0 { length(self)? } else { by_ratio(height, ratio)? };
        Some((width, height))
    }

    fn skip_preview(&mut self) -> Option<()> {
        let is_small = self.flag()?;
        let forms = if is_small {
            [(16, 0), (32, 0), (1, 5), (33, 9)]
        } else {
            [(1, 6), (65, 8), (321, 10), (1345, 12)]
        };
        self.choice(forms)?;
        if self.number(3)? == 0 {
            self.choice(forms)?;
        }
        Some(())
    }

    fn skip_animation(&mut self) -> Option<()> {
        self.choice([(100, 0), (1000, 0), (1, 10), (1, 30)])?;
        self.choice([(1, 0), (1001, 0), (1, 8), (1, 10)])?;
        self.choice([(0, 0), (0, 3), (0, 16), (0, 32)])?;
        self.flag()?;
        Some(())
    }
}

/// The width that one of the usual ratios gives.
fn by_ratio(height: u32, ratio: u32) -> Option<u32> {
    let (across, down) = match ratio {
        1 => (1, 1),
        2 => (12, 10),
        3 => (4, 3),
        4 => (3, 2),
        5 => (16, 9),
        6 => (5, 4),
        _ => (2, 1),
    };
    u32::try_from(u64::from(height) * across / down).ok()
}

#[cfg(test)]
mod tests {
    use super::super::{RenderLimits, Source};
    use super::*;

    /// Bits of numbers, each with its count.
    fn codestream(numbers: &[(u32, u32)]) -> Vec<u8> {
        let mut bytes = b"\xff\x0a".to_vec();
        let bits =
            numbers.iter().flat_map(|(number, bits)| (0..*bits).map(move |at| number >> at & 1));
        let bits: Vec<u8> = bits.map(|bit| u8::from(bit == 1)).collect();
        bytes.extend(
            bits.chunks(8).map(|bits| bits.iter().rev().fold(0, |byte, bit| byte << 1 | bit)),
        );
        bytes
    }

    #[test]
    fn every_form_of_a_head_is_read() {
        let head =
            |size, extra_channels, is_animated| Some(Head { size, extra_channels, is_animated });
        // 40×32 pixels by their eighths; all else as usual.
        let small = codestream(&[(1, 1), (3, 5), (0, 3), (4, 5), (1, 1)]);
        assert_eq!(Head::read(&small), head((40, 32), 0, false));
        // 9 rows, 16 by 9.
        let wide = codestream(&[(0, 1), (0, 2), (8, 9), (5, 3), (1, 1)]);
        assert_eq!(Head::read(&wide), head((16, 9), 0, false));
        // 70,000 rows of 300, turned, with all further fields, 10 bits, and three further channels.
        let full = [
            [(0, 1), (2, 2), (69_999, 18), (0, 3), (0, 2), (299, 9), (0, 1)].as_slice(),
            // Orientation, the size it was made for, a preview, an animation.
            &[(1, 1), (5, 3), (1, 1), (1, 1), (0, 5), (1, 3)],
            &[(1, 1), (1, 1), (2, 2), (7, 5), (0, 3), (0, 2), (1, 1)],
            &[(2, 2), (24, 10), (1, 2), (2, 2), (9, 16), (0, 1)],
            &[(0, 1), (1, 2), (1, 1), (2, 2), (1, 4)],
        ];
        let full = codestream(&full.concat());
        assert_eq!(Head::read(&full), head((70_000, 300), 3, true));
        for end in 0..full.len() - 1 {
            assert_eq!(Head::read(&full[..end]), None, "{end}");
        }
        let container = |kind: &[u8], content: &[u8]| {
            let length = u32::try_from(8 + content.len()).unwrap().to_be_bytes();
            [b"\0\0\0\x0cJXL \x0d\x0a\x87\x0a", &length[..], kind, content].concat()
        };
        assert_eq!(Head::read(&container(b"jxlc", &small)), head((40, 32), 0, false));
        let part = [b"\0\0\0\0", &small[..]].concat();
        assert_eq!(Head::read(&container(b"jxlp", &part)), head((40, 32), 0, false));
        assert_eq!(Head::read(&container(b"Exif", &small)), None);
    }

    #[test]
    fn the_decoder_reads_the_same_head() {
        let limits = RenderLimits { pixels: 1_000_000, deadline: None };
        for bytes in [
            &include_bytes!("../../../../tests/cases/jxl-alpha.jxl")[..],
            include_bytes!("../../../../tests/cases/jxl-container.jxl"),
            include_bytes!("../../../../tests/cases/jxl-grey.jxl"),
            include_bytes!("../../../../tests/cases/jxl-of-turned-jpeg.jxl"),
            include_bytes!("../../../../tests/cases/jxl-turned.jxl"),
        ] {
            let (head, source) = (Head::read(bytes).unwrap(), Source::open(bytes, limits).unwrap());
            assert_eq!((head.size, head.is_animated), (source.size, false));
            assert_eq!(head.extra_channels as usize, source.info.extra_channels.len());
        }
    }
}
