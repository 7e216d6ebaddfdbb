//! Removes objects that no record refers to: those of images that were replaced, removed or have expired, and those of
//! moves that were not finished.
//!
//! A name is used once: each upload makes a new one. So an object that no record refers to a while after it was written
//! is one that none ever will, and looking and removing need not be one step.

use std::sync::Weak;
use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStoreExt};

use super::{Offload, OffloadError};
use crate::app::App;
use crate::image::record::{Content, Record};
use crate::image::{ImageId, MediaType, Version};
use crate::settings;
use crate::store::StoreError;

/// What a record says of an object.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Reference {
    /// It refers to this one.
    To(Path),
    /// It refers to something that isn't known here: the settings have changed, or are about to.
    Unknown,
    /// It refers to none.
    Nothing,
}

/// Sweeps from time to time, for as long as the app lives.
pub(super) async fn run(app: Weak<App>, settings: settings::OffloadSettings) {
    loop {
        // Servers of one site do it at different times.
        let pause = settings.sweep_interval.mul_f64(fastrand::f64().mul_add(0.2, 0.9));
        tokio::time::sleep(pause).await;
        let Some(app) = app.upgrade() else { return };
        let Some(offload) = &app.offload else { return };
        // An upload's record is stored a moment after it, by the clock of the object store, whose times have whole seconds.
        let until_stored = settings.timeout + app.settings.redis.response_timeout;
        let grace = settings.grace.max(2 * until_stored + Duration::from_secs(1));
        match offload.sweep(&app, grace).await {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "objects that no record refers to were removed"),
            Err(error) => tracing::warn!(%error, "objects can't be listed"),
        }
    }
}

/// Removes the object of an image whose record was removed.
pub(crate) async fn discard(offload: &Offload, id: &ImageId, value: &[u8]) {
    // A record that was copied from another id's may refer to that one's.
    let Reference::To(path) = offload.reference(value) else { return };
    if offload.owner(&path).as_ref() != Some(id) {
        return;
    }
    match offload.in_time(offload.store.delete(&path)).await {
        Ok(()) | Err(OffloadError::Gone(_)) => {}
        // The sweep gets it.
        Err(error) => {
            tracing::warn!(image.id = %id, %error, "a removed image's object isn't removed yet");
        }
    }
}

impl Offload {
    /// Removes what is older than `grace` and what no record refers to. Gives how many objects that were.
    async fn sweep(&self, app: &App, grace: Duration) -> Result<u64, OffloadError> {
        let mut objects = self.store.list(Some(&self.folder));
        let mut removed = 0;
        while let Some(object) = self.in_time(async { objects.next().await.transpose() }).await? {
            let path = &object.location;
            let Some(id) = self.owner(path).filter(|_| is_older(&object, grace)) else { continue };
            match self.is_referred_to(app, &id, path).await {
                Ok(true) => continue,
                Ok(false) => {}
                // What isn't known isn't removed.
                Err(error) => {
                    tracing::debug!(image.id = %id, %error, "an object isn't swept yet");
                    continue;
                }
            }
            match self.in_time(self.store.delete(path)).await {
                Ok(()) => removed += 1,
                Err(OffloadError::Gone(_)) => {}
                Err(error) => tracing::warn!(%path, %error, "an object can't be swept"),
            }
        }
        app.metrics.swept.inc_by(removed);
        Ok(removed)
    }

    /// Whether the record of an id refers to an object, as far as can be said.
    async fn is_referred_to(
        &self,
        app: &App,
        id: &ImageId,
        path: &Path,
    ) -> Result<bool, StoreError> {
        let stored = match app.store.size(id).await {
            // Such a value refers to nothing.
            Err(StoreError::WrongType | StoreError::TooLarge { .. }) => return Ok(false),
            size => match size? {
                0 => None,
                size => app.store.get(id, size).await?,
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
        let Content::Offloaded(elsewhere) = &record.content else { return Reference::Nothing };
        // The version plays no part in the place.
        match self.locate(Version::of(b""), &record, elsewhere) {
            Some(remote) => Reference::To(remote.path),
            None => Reference::Unknown,
        }
    }

    /// The id of the image whose object has a name, if it is a name as [`Offload`] makes them: nothing else in the folder
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
