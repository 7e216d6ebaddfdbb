//! Cost of rendering pictures, beside libvips in the same run, and size of placeholders as WebP, PNG and JPEG.
//!
//! `cargo bench --bench pictures`, with `-- renders` or `-- placeholders` for one half of it. It prints tables in
//! Markdown. sharp, which is libvips for Node, and a photograph are installed under the target folder when they
//! are missing; without them the rest is measured.

#![expect(clippy::unwrap_used, reason = "a bench whose parts fail has nothing to measure")]

#[path = "pictures/installed.rs"]
mod installed;
#[path = "pictures/peer.rs"]
mod peer;
#[path = "pictures/placeholders.rs"]
mod placeholders;
#[path = "pictures/renders.rs"]
mod renders;
#[path = "pictures/sources.rs"]
mod sources;
#[path = "pictures/table.rs"]
mod table;

fn main() {
    // Cargo adds `--bench`.
    let wanted: Vec<String> = std::env::args().skip(1).filter(|it| !it.starts_with('-')).collect();
    let wants = |part: &str| wanted.is_empty() || wanted.iter().any(|it| it == part);
    if wants("renders") {
        renders::run();
    }
    if wants("placeholders") {
        placeholders::run();
    }
}
