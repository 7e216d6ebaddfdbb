//! Records, base64, types of images, and metadata in files.

use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig};

use crate::image::record::{self, Content, Record};
use crate::image::{Embedded, MediaType};
use crate::picture::sniff::sniff;
use crate::picture::strip::traits;
use crate::picture::{self, RenderLimits, decode};

/// A record that was parsed is written again with the same content.
pub fn record(data: &[u8]) {
    let parsed = Record::parse(data);
    if !data.starts_with("\u{feff}".as_bytes()) {
        let marked = ["\u{feff}".as_bytes(), data].concat();
        assert_eq!(Record::parse(&marked).is_ok(), parsed.is_ok(), "a byte order mark is skipped");
    }
    let Ok(Record { content, created_at, .. }) = parsed else { return };
    let sha256 = [0xa5; 32];
    let moved = record::moved(data, "s3://b/o", "o", MediaType::Png, 7, &sha256);
    let moved = Record::parse(&moved).expect("the record of a moved image is one");
    assert_eq!(moved.created_at, created_at);
    let Content::Offloaded(object) = moved.content else { panic!("a moved image is offloaded") };
    assert_eq!((&*object.url, object.object.as_deref()), ("s3://b/o", Some("o")));
    assert_eq!((object.size, object.sha256), (Some(7), Some(sha256)));

    let Content::Inline(text) = content else { return };
    let Ok(decoded) = record::decode(&text) else { return };
    let written = record::encode(&decoded.bytes, decoded.media_type, created_at);
    let again = Record::parse(&written).expect("a written record is one");
    assert_eq!(again.created_at, created_at);
    assert_eq!(again.declared_type.as_deref(), Some(decoded.media_type.as_str()));
    let Content::Inline(text) = again.content else { panic!("a written image is inline") };
    let again = record::decode(&text).expect("a written image is one");
    assert_eq!(again.bytes[..], decoded.bytes[..]);
    assert_eq!((again.media_type, again.traits), (decoded.media_type, decoded.traits));
}

/// The fast decoder of base64 agrees with the one of the crate `base64`.
pub fn base64(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let bytes = record::decode_bytes(text).ok();
    let trimmed = text.trim_matches(|it| it <= ' ');
    if trimmed.get(..5).is_some_and(|it| it.eq_ignore_ascii_case("data:")) {
        return;
    }
    let compact: Vec<u8> = trimmed.bytes().filter(|it| !it.is_ascii_whitespace()).collect();
    let is_url_safe = compact.iter().any(|it| matches!(it, b'-' | b'_'));
    let alphabet =
        if is_url_safe { base64::alphabet::URL_SAFE } else { base64::alphabet::STANDARD };
    let config =
        GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    // One sign of two is neither padding nor none.
    let is_cut = compact.ends_with(b"=") && !compact.len().is_multiple_of(4);
    let decoded = GeneralPurpose::new(&alphabet, config).decode(&compact);
    let expected = decoded.ok().filter(|_| !is_cut);
    assert_eq!(bytes.as_deref(), expected.as_deref(), "{text:?}");
    // The same in a data URL, where it has no character that means something there.
    if bytes.is_some() && !trimmed.contains(['#', '%']) {
        let in_url = record::decode_bytes(&format!("data:image/png;base64,{trimmed}")).ok();
        assert_eq!(in_url.as_deref(), expected.as_deref(), "{text:?} in a data URL");
    }
}

/// The type is told from the beginning of a file.
pub fn sniffing(data: &[u8]) {
    let media_type = sniff(data);
    assert_eq!(sniff(data), media_type);
    if let Some(media_type) = media_type {
        let _ = traits(data, media_type);
    }
    let is_told_by_beginning = match media_type {
        // An icon is told by its first picture, which may be anywhere; the whole of an SVG is text.
        None | Some(MediaType::Ico | MediaType::Svg) => false,
        Some(_) => true,
    };
    if is_told_by_beginning {
        let longer = [data, b"\0\xff<svg>"].concat();
        assert_eq!(sniff(&longer), media_type, "what follows changes the type");
    }
    let is_told_by_16_bytes = matches!(
        media_type,
        Some(MediaType::Png | MediaType::Jpeg | MediaType::Gif | MediaType::WebP | MediaType::Tiff)
    );
    if is_told_by_16_bytes {
        assert_eq!(sniff(&data[..data.len().min(16)]), media_type);
    }
}

/// A file without its metadata is of the same type, shows the same picture, and has nothing left to be removed.
pub fn strip(data: &[u8]) {
    let Some(media_type) = sniff(data) else { return };
    let before = traits(data, media_type);
    let Some(stripped) = picture::strip::strip(data, media_type) else { return };
    assert_eq!(sniff(&stripped), Some(media_type));
    let after = traits(&stripped, media_type);
    assert_eq!(after.animated, before.animated);
    assert_ne!(after.embedded, Embedded::Removable);
    assert_eq!(picture::strip::strip(&stripped, media_type).as_ref(), Some(&stripped));
    if cfg!(fuzzing) && media_type == MediaType::Png {
        // The crate png checks no sums under libFuzzer, and so heeds metadata that it otherwise ignores.
        return;
    }
    let deadline = Some(Instant::now() + Duration::from_secs(2));
    let limits = RenderLimits { pixels: 65_536, deadline };
    if let Ok(shown) = decode::decode(data, media_type, limits) {
        match decode::decode(&stripped, media_type, limits) {
            Ok(same) => {
                assert!(shown == same, "{media_type:?}: the stripped file shows another picture");
            }
            Err(error) => assert!(error.is_timeout(), "{media_type:?}: {error}"),
        }
    }
}
