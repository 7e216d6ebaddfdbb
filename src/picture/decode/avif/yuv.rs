//! From planes of brightness and colours to RGB.

use super::av1::{Header, Layout};

/// A plane of samples.
#[derive(Clone, Copy)]
pub(super) struct Plane<'a> {
    pub(super) bytes: &'a [u8],
    /// Bytes from row to row.
    pub(super) stride: usize,
    pub(super) size: (u32, u32),
    /// Bytes of a sample.
    pub(super) sample: usize,
}

impl Plane<'_> {
    /// Reads a row.
    pub(super) fn read(&self, row: u32, samples: &mut Vec<u16>) {
        let start = row as usize * self.stride;
        let bytes = &self.bytes[start..start + self.size.0 as usize * self.sample];
        samples.clear();
        if self.sample == 1 {
            samples.extend(bytes.iter().map(|it| u16::from(*it)));
        } else {
            let (pairs, _) = bytes.as_chunks::<2>();
            samples.extend(pairs.iter().map(|it| u16::from_ne_bytes(*it)));
        }
    }
}

/// The matrix between brightness with colours and RGB (ITU-T H.273 §8.3).
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Matrix {
    /// The planes are green, blue and red.
    Identity,
    YCgCo,
    /// The weights of red and blue in the brightness.
    Weights(f32, f32),
}

impl Matrix {
    /// The matrix of a code point. `None` for one that isn't converted here.
    pub(super) fn of(point: u8) -> Option<Matrix> {
        match point {
            0 => Some(Matrix::Identity),
            1 => Some(Matrix::Weights(0.2126, 0.0722)),
            4 => Some(Matrix::Weights(0.30, 0.11)),
            // BT.601, which also stands for an unspecified one.
            2 | 5 | 6 => Some(Matrix::Weights(0.299, 0.114)),
            7 => Some(Matrix::Weights(0.212, 0.087)),
            8 => Some(Matrix::YCgCo),
            9 => Some(Matrix::Weights(0.2627, 0.0593)),
            _ => None,
        }
    }
}

/// Ranges of samples as factors of their distance from zero.
#[derive(Clone, Copy)]
pub(super) struct Range {
    black: f32,
    bright: f32,
    neutral: f32,
    colour: f32,
}

impl Range {
    pub(super) fn of(header: &Header) -> Range {
        let scale = f32::from(1_u16 << (header.depth - 8));
        let neutral = 128.0 * scale;
        if header.is_full_range {
            let most = f32::from(u16::MAX >> (16 - header.depth));
            return Range { black: 0.0, bright: 1.0 / most, neutral, colour: 1.0 / most };
        }
        let (bright, colour) = (1.0 / (219.0 * scale), 1.0 / (224.0 * scale));
        Range { black: 16.0 * scale, bright, neutral, colour }
    }

    /// A sample of brightness as a part of one.
    pub(super) fn bright(self, sample: f32) -> f32 {
        (sample - self.black) * self.bright
    }

    /// A sample of a colour, from minus a half to a half.
    fn colour(self, sample: f32) -> f32 {
        (sample - self.neutral) * self.colour
    }
}

/// Converts rows of planes to RGB of 16 bits.
pub(super) struct Converter<'a> {
    planes: &'a [Plane<'a>],
    layout: Layout,
    matrix: Matrix,
    range: Range,
    bright: Vec<u16>,
    colours: [Vec<f32>; 2],
    near: Vec<u16>,
    far: Vec<u16>,
}

impl<'a> Converter<'a> {
    pub(super) fn new(planes: &'a [Plane<'a>], header: &Header, matrix: Matrix) -> Converter<'a> {
        Converter {
            planes,
            layout: header.layout,
            matrix,
            range: Range::of(header),
            bright: Vec::new(),
            colours: [Vec::new(), Vec::new()],
            near: Vec::new(),
            far: Vec::new(),
        }
    }

    /// Converts a row.
    pub(super) fn convert(&mut self, row: u32, converted: &mut Vec<u16>) {
        self.planes[0].read(row, &mut self.bright);
        converted.clear();
        let range = self.range;
        if self.layout == Layout::Grey {
            let greys = self.bright.iter().map(|it| deep(range.bright(f32::from(*it))));
            converted.extend(greys.flat_map(|grey| [grey; 3]));
            return;
        }
        self.widen(row, 0);
        self.widen(row, 1);
        let [us, vs] = &self.colours;
        let samples = self.bright.iter().zip(us).zip(vs);
        for ((y, u), v) in samples {
            let bright = range.bright(f32::from(*y));
            let rgb = match self.matrix {
                // All planes have the range of brightness.
                Matrix::Identity => [range.bright(*v), bright, range.bright(*u)],
                Matrix::YCgCo => {
                    let (green, orange) = (range.colour(*u), range.colour(*v));
                    let rest = bright - green;
                    [rest + orange, bright + green, rest - orange]
                }
                Matrix::Weights(red, blue) => {
                    let (u, v) = (range.colour(*u), range.colour(*v));
                    let (r, b) = (bright + 2.0 * (1.0 - red) * v, bright + 2.0 * (1.0 - blue) * u);
                    [r, (bright - red * r - blue * b) / (1.0 - red - blue), b]
                }
            };
            converted.extend(rgb.map(deep));
        }
    }

    /// Fits a row of colours to the row of brightness. A sample lies amidst the pixels that share it, as in libyuv and libavif, whatever
    /// the stream says.
    fn widen(&mut self, row: u32, number: usize) {
        let plane = self.planes[number + 1];
        let colours = &mut self.colours[number];
        colours.clear();
        let (columns, rows) = plane.size;
        let last = columns as usize - 1;
        // The nearest row counts three times as much as the one beyond.
        let (near, far) = match self.layout {
            Layout::Quarters if row.is_multiple_of(2) => (row / 2, (row / 2).saturating_sub(1)),
            Layout::Quarters => (row / 2, (row / 2 + 1).min(rows - 1)),
            _ => (row, row),
        };
        plane.read(near, &mut self.near);
        plane.read(far, &mut self.far);
        if self.layout == Layout::Full {
            colours.extend(self.near.iter().map(|it| f32::from(*it)));
            return;
        }
        let at = |at: usize| f32::from(self.near[at]) * 3.0 + f32::from(self.far[at]);
        for column in 0..self.planes[0].size.0 as usize {
            let near = column / 2;
            let far = if column % 2 == 0 { near.saturating_sub(1) } else { (near + 1).min(last) };
            colours.push((3.0 * at(near) + at(far)) / 16.0);
        }
    }
}

/// A part of one in 16 bits.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "it is within the bounds"
)]
pub(super) fn deep(part: f32) -> u16 {
    (part.clamp(0.0, 1.0) * 65535.0 + 0.5) as u16
}
