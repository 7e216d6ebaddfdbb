//! Listings: the images in the store, with what is known of them without reading any.

use std::sync::Arc;
use std::time::Duration;

use super::Reader;
use crate::image::record::Corrupt;
use crate::image::{ImageId, Metadata};
use crate::index::Known;
use crate::picture::Preview;
use crate::store::{Cursor, StoreError};

/// Most parts of the store's listing that are read for one page: with a prefix that few keys have, most are empty.
const MAX_PARTS: usize = 10;

/// Part of a listing, in no order.
#[derive(Debug)]
pub(crate) struct ListingPage {
    pub(crate) images: Vec<ListedImage>,
    /// Position of the next part; `None` after the last.
    pub(crate) next: Option<Cursor>,
}

/// A key in the store.
#[derive(Debug)]
pub(crate) struct ListedImage {
    pub(crate) id: ImageId,
    /// Bytes of the record; `None` for a key of another type than a string.
    pub(crate) record_bytes: Option<u64>,
    /// Time until it expires; `None` if it never does.
    pub(crate) time_to_live: Option<Duration>,
    pub(crate) state: ListedState,
}

/// The state of a key, as far as it is known.
#[derive(Debug)]
pub(crate) enum ListedState {
    /// Nobody has asked for the record since it was written.
    Unread,
    /// An image.
    Present {
        metadata: Arc<Metadata>,
        /// The preview, if it was made.
        preview: Option<Arc<Preview>>,
        /// True if the bytes of the original are in memory.
        in_memory: bool,
    },
    /// A record that is no image.
    Corrupt(Corrupt),
}

impl Reader {
    /// Lists some of the images whose ids begin with a text. About `count` keys are looked at, in the store's order. Reads no
    /// value, and is no use of an image.
    pub(crate) async fn list(
        &self,
        beginning: &str,
        mut from: Option<Cursor>,
        count: usize,
    ) -> Result<ListingPage, StoreError> {
        let mut ids = Vec::new();
        for _ in 0..MAX_PARTS {
            let page = self.store.list(beginning, from, count).await?;
            ids.extend(page.ids);
            from = page.next;
            if !ids.is_empty() || from.is_none() {
                break;
            }
        }
        let sizes = self.store.sizes(&ids).await?;
        // After the sizes: a state that is older than they are would be that of another value.
        let known = self.index.peek(&ids);
        let images = ids.into_iter().zip(sizes).zip(known);
        let images = images.filter_map(|((id, size), known)| {
            let size = size?;
            let state = match size.bytes {
                Some(_) => self.listed_state(&id, known),
                None => ListedState::Corrupt(Corrupt::WrongType),
            };
            let (record_bytes, time_to_live) = (size.bytes, size.time_to_live);
            Some(ListedImage { id, record_bytes, time_to_live, state })
        });
        Ok(ListingPage { images: images.collect(), next: from })
    }

    fn listed_state(&self, id: &ImageId, known: Option<Known>) -> ListedState {
        let metadata = match known {
            Some(Known::Present(metadata)) => Some(metadata),
            Some(Known::Offloaded(remote)) => {
                remote.metadata.get().map(Arc::clone).or_else(|| remote.declared())
            }
            Some(Known::Corrupt(corrupt)) => return ListedState::Corrupt(corrupt),
            // Written since.
            Some(Known::Absent) | None => None,
        };
        let Some(metadata) = metadata else { return ListedState::Unread };
        let preview = self.renderer.known_preview(id, metadata.version);
        let in_memory = self.cache.contains(id, metadata.version);
        ListedState::Present { metadata, preview, in_memory }
    }
}
