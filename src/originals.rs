//! Admits decoded originals to memory: counts their bytes, compresses SVG, and inserts them into the cache.

use std::sync::Arc;

use crate::cache::{Cache, Insertion};
use crate::cpu::Cpu;
use crate::image::coding::Coding;
use crate::image::{Image, ImageId, MediaType, Metadata, Representation};

/// The way of an original into memory, wherever it came from.
#[derive(Debug, Clone)]
pub struct Originals {
    cache: Arc<Cache>,
    cpu: Cpu,
}

impl Originals {
    /// Admits to a cache.
    #[must_use]
    pub fn new(cache: Arc<Cache>, cpu: Cpu) -> Originals {
        Originals { cache, cpu }
    }

    /// An original whose bytes are counted from now on.
    pub fn counted(
        &self,
        metadata: Metadata,
        bytes: impl AsRef<[u8]> + Send + 'static,
    ) -> Representation {
        Representation { metadata: Arc::new(metadata), body: self.cache.count(bytes) }
    }

    /// Inserts an original into the cache, with its content codings. Text is compressed here, once, so that each length
    /// and entity-tag is known from the start; pixels are compressed already.
    pub async fn admit(&self, id: &ImageId, original: Representation) -> (Image, Insertion) {
        let image = match original.metadata.media_type {
            MediaType::Svg => {
                let cache = Arc::clone(&self.cache);
                self.cpu.run(move || encode(&cache, original)).await
            }
            _ => original.into(),
        };
        let insertion = self.cache.insert(id, image.clone());
        self.release_in_time();
        (image, insertion)
    }

    /// Inserts the original of a version that was just written, so that its first reader doesn't fetch it. SVG is left to
    /// that reader, who compresses it.
    pub fn keep_written(&self, id: &ImageId, metadata: Metadata, bytes: bytes::Bytes) {
        if metadata.media_type != MediaType::Svg {
            self.cache.insert(id, self.counted(metadata, bytes).into());
            self.release_in_time();
        }
    }

    /// Gives the memory of images that are in memory for a moment back after it, even if no other request comes. The task
    /// ends with the last of them.
    fn release_in_time(&self) {
        let Some(mut end) = self.cache.begin_to_release() else { return };
        let cache = Arc::downgrade(&self.cache);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep_until(end).await;
                let Some(next) = cache.upgrade().and_then(|cache| cache.release_recent()) else {
                    return;
                };
                end = next;
            }
        });
    }
}

/// An original with those of its content codings that are shorter.
fn encode(cache: &Cache, original: Representation) -> Image {
    let metadata = &original.metadata;
    let encode = |coding: Coding| {
        let body = coding.encode(&original.body)?;
        let metadata = Arc::new(metadata.coded(coding, body.len()));
        Some(Representation { metadata, body: cache.count(body) })
    };
    let coded: Vec<Representation> = Coding::ALL.into_iter().filter_map(encode).collect();
    let metadata = Metadata {
        coded: coded.iter().map(|it| Arc::clone(&it.metadata)).collect(),
        ..Metadata::new(
            metadata.version,
            metadata.media_type,
            metadata.length,
            metadata.last_modified,
        )
    };
    Image { original: Representation { metadata: Arc::new(metadata), body: original.body }, coded }
}
