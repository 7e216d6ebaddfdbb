//! Test images: incompressible bytes with a PNG signature, and their records.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;

/// An image size that is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) name: &'static str,
    pub(crate) id: &'static str,
    pub(crate) bytes: usize,
}

pub(crate) const SIZES: [Size; 4] = [
    Size { name: "2 KB", id: "2kb", bytes: 2_000 },
    Size { name: "50 KB", id: "50kb", bytes: 50_000 },
    Size { name: "200 KB", id: "200kb", bytes: 200_000 },
    Size { name: "1 MB", id: "1mb", bytes: 1_000_000 },
];

/// Path of an image on every server.
pub(crate) fn path(id: &str) -> String {
    format!("/images/{id}")
}

/// Creates an image, different for each seed.
pub(crate) fn png(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = b"\x89PNG\r\n\x1a\n".to_vec();
    let mut random = fastrand::Rng::with_seed(seed);
    bytes.resize(length, 0);
    random.fill(&mut bytes[8..]);
    bytes
}

/// Creates the record of an image as a backend does.
pub(crate) fn record(image: &[u8]) -> Vec<u8> {
    json!({"mime_type": "image/png", "base64_data": STANDARD.encode(image)})
        .to_string()
        .into_bytes()
}
