//! Decodes JPEG.

use image::{DynamicImage, ImageFormat};

use super::super::{PictureError, RenderLimits};
use super::{Measure, by_image};

pub(super) fn measure(bytes: &[u8], limits: RenderLimits) -> Result<Measure, PictureError> {
    if jpeg_is_in_scans(bytes).unwrap_or(false) {
        return Err(PictureError::Broken(
            "a baseline JPEG with a scan for each component can't be decoded".to_owned(),
        ));
    }
    by_image::measure(bytes, ImageFormat::Jpeg, limits, |pixels, _| {
        // The coefficients of all scans.
        if jpeg_is_progressive(bytes).unwrap_or(false) { 6 * pixels() } else { 0 }
    })
}

pub(super) fn decode(bytes: &[u8], limits: RenderLimits) -> Result<DynamicImage, PictureError> {
    by_image::decode(bytes, ImageFormat::Jpeg, limits)
}

/// True for a progressive JPEG, whose coefficients are all kept until its last scan.
fn jpeg_is_progressive(bytes: &[u8]) -> Option<bool> {
    let mut at = 2;
    loop {
        while bytes.get(at..at + 2)? == [0xff, 0xff] {
            at += 1;
        }
        let (marker, segment) = (*bytes.get(at + 1)?, bytes.get(at + 2..)?);
        match marker {
            0xc2 | 0xc6 | 0xca | 0xce => return Some(true),
            0xc0 | 0xc1 | 0xda => return Some(false),
            _ => at += 2 + usize::from(u16::from_be_bytes(*segment.first_chunk()?)),
        }
    }
}

/// True for a JPEG that isn't progressive but has a scan for each component. Such files are rare. If their colour has
/// half the resolution, zune-jpeg decodes them to stripes without an error (zune-image#419, mended after 0.5.15).
fn jpeg_is_in_scans(bytes: &[u8]) -> Option<bool> {
    let (mut at, mut components) = (2, 0);
    loop {
        // A marker (ITU-T T.81, annex B) is 0xff, perhaps repeated, and its code.
        while bytes.get(at..at + 2)? == [0xff, 0xff] {
            at += 1;
        }
        let (marker, segment) = (*bytes.get(at + 1)?, bytes.get(at + 2..)?);
        let length = usize::from(u16::from_be_bytes(*segment.first_chunk()?));
        match marker {
            // Baseline and extended sequential: the number of components, if they differ in resolution.
            0xc0 | 0xc1 => {
                let all = *segment.get(7)?;
                let (each, _) = segment.get(8..)?.get(..3 * usize::from(all))?.as_chunks::<3>();
                let differ = each.iter().any(|it| it[1] != each[0][1]);
                components = if differ { all } else { 0 };
            }
            // The first scan: its number of components.
            0xda => return Some(components > *segment.get(2)?),
            0xc2..=0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf => return Some(false),
            _ => {}
        }
        at += 2 + length;
    }
}

#[cfg(test)]
mod tests {
    use jpeg_encoder::{ColorType, Encoder, SamplingFactor};

    use super::super::decode;
    use super::*;
    use crate::image::MediaType;

    #[test]
    fn a_jpeg_that_would_come_out_in_stripes_is_refused() {
        let pixels: Vec<u8> = (0..48 * 32 * 3).map(|it| u8::try_from(it % 251).unwrap()).collect();
        let decoded = |sampling, in_scans| {
            let mut bytes = Vec::new();
            let mut encoder = Encoder::new(&mut bytes, 90);
            encoder.set_sampling_factor(sampling);
            encoder.set_optimized_huffman_tables(in_scans);
            encoder.encode(&pixels, 48, 32, ColorType::Rgb).unwrap();
            decode(&bytes, MediaType::Jpeg, RenderLimits { pixels: 10_000, deadline: None })
        };
        assert!(decoded(SamplingFactor::F_2_2, false).is_ok());
        assert!(decoded(SamplingFactor::F_1_1, true).is_ok());
        let refused = decoded(SamplingFactor::F_2_2, true).unwrap_err();
        assert!(refused.to_string().contains("a scan for each component"), "{refused}");
    }
}
