//! Removes objects that no record refers to: those of images that were replaced, removed or have expired, and those of
//! moves that were not finished.
//!
//! A name is used once: each upload makes a new one. So an object that no record refers to a while after it was written
//! is one that none ever will, and looking and removing need not be one step.

use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStoreExt};

use super::{Offload, OffloadError};
use crate::image::record::{Content, Record};
use crate::image::{ImageId, MediaType};
use crate::settings::OffloadSettings;
use crate::store::{Store, StoreError};

/// The object that a record refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Reference {
    /// This object.
    To(Path),
    /// An address outside of the settings. They have changed, or are about to.
    Unknown,
    /// None.
    Nothing,
}

/// Sweeps from time to time.
pub(super) async fn run(
    store: &Store,
    offload: &Offload,
    settings: &OffloadSettings,
    settling: Duration,
) {
    // The record of an upload is written a moment after it, by the clock of the object store, whose times have whole
    // seconds.
    let until_written = settings.timeout + settling;
    let grace = settings.grace.max(2 * until_written + Duration::from_secs(1));
    loop {
        // Servers of one site sweep at different times.
        let pause = settings.sweep_interval.mul_f64(fastrand::f64().mul_add(0.2, 0.9));
        tokio::time::sleep(pause).await;
        match offload.sweep(store, grace).await {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "objects without a record were removed"),
            Err(error) => tracing::warn!(%error, "objects can't be listed"),
        }
    }
}

impl Offload {
    /// Removes the object of an image whose record was removed.
    pub(crate) async fn discard(&self, id: &ImageId, value: &[u8]) {
        // A record that was copied from another id's may refer to that one's object.
        let Reference::To(path) = self.reference(value) else { return };
        if self.owner(&path).as_ref() != Some(id) {
            return;
        }
        match self.in_time(self.timeout, self.store.delete(&path)).await {
            Ok(()) | Err(OffloadError::Gone(_)) => {}
            // The sweep finds it.
            Err(error) => {
                tracing::warn!(image.id = %id, %error, "a removed image's object isn't removed yet");
            }
        }
    }

    /// Removes objects that are older than `grace` and that no record refers to. Gives their number.
    async fn sweep(&self, store: &Store, grace: Duration) -> Result<u64, OffloadError> {
        let mut objects = self.store.list(Some(&self.folder));
        let mut removed = 0;
        while let Some(object) =
            self.in_time(self.timeout, async { objects.next().await.transpose() }).await?
        {
            let path = &object.location;
            let Some(id) = self.owner(path).filter(|_| is_older(&object, grace)) else { continue };
            match self.is_referred_to(store, &id, path).await {
                Ok(true) => continue,
                Ok(false) => {}
                // In doubt nothing is removed.
                Err(error) => {
                    tracing::debug!(image.id = %id, %error, "an object isn't swept yet");
                    continue;
                }
            }
            match self.in_time(self.timeout, self.store.delete(path)).await {
                Ok(()) => removed += 1,
                Err(OffloadError::Gone(_)) => {}
                Err(error) => tracing::warn!(%path, %error, "an object can't be swept"),
            }
        }
        self.parts.metrics.swept.inc_by(removed);
        Ok(removed)
    }

    /// True if the record of an id refers to an object, or may.
    async fn is_referred_to(
        &self,
        store: &Store,
        id: &ImageId,
        path: &Path,
    ) -> Result<bool, StoreError> {
        let stored = match store.size(id).await {
            // Such a value refers to nothing.
            Err(StoreError::WrongType | StoreError::TooLarge { .. }) => return Ok(false),
            size => match size? {
                0 => None,
                size => store.get(id, size).await?,
            },
        };
        Ok(match stored.map(|stored| self.reference(&stored.value)) {
            Some(Reference::To(other)) => other == *path,
            Some(Reference::Unknown) => true,
            Some(Reference::Nothing) | None => false,
        })
    }

    fn reference(&self, value: &[u8]) -> Reference {
        let Ok(record) = Record::parse(value) else { return Reference::Nothing };
        let Content::Offloaded(object_ref) = &record.content else { return Reference::Nothing };
        match self.resolve(object_ref) {
            Some((path, _public_url)) => Reference::To(path),
            None => Reference::Unknown,
        }
    }

    /// The id of the image that an object belongs to, if its name is one that [`Offload`] makes. No other file in the folder
    /// is touched.
    fn owner(&self, path: &Path) -> Option<ImageId> {
        let rest = path.as_ref().strip_prefix(self.folder.as_ref())?.trim_start_matches('/');
        let (id, file) = rest.split_once('/')?;
        let (name, extension) = file.split_once('.')?;
        let (version, upload) = name.split_once('-')?;
        let is_hex = |text: &str, length: usize| {
            text.len() == length && text.bytes().all(|it| it.is_ascii_hexdigit())
        };
        let is_ours = is_hex(version, 32)
            && is_hex(upload, 16)
            && MediaType::ALL.iter().any(|it| it.extension() == extension);
        ImageId::parse(id).ok().filter(|_| is_ours)
    }
}

fn is_older(object: &ObjectMeta, grace: Duration) -> bool {
    let age = SystemTime::now().duration_since(SystemTime::from(object.last_modified));
    age.is_ok_and(|age| age >= grace)
}
