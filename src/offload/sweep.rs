//! Removes objects that no record refers to: those of images that were replaced, removed or have expired, and those of
//! moves that were not finished.
//!
//! Whether a record refers to an object and that it is removed are two steps in two stores. So it is taken aside first:
//!
//! ```text
//!   no record refers to it ─▶ copied aside ─▶ removed ─▶ does one refer to it now? ── yes ─▶ copied back
//!                                                        (the copy stays until the next sweep, which looks again)
//! ```
//!
//! A record that begins to refer to it before the last look is seen by that look. One that does so afterwards was written
//! by somebody who then looks for the object ([`after_write`](super::after_write)), finds it gone and puts it there again.

use std::sync::Weak;
use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use object_store::path::{Path, PathPart};
use object_store::{ObjectMeta, ObjectStoreExt};

use super::{Offload, OffloadError};
use crate::app::App;
use crate::image::{ImageId, Version};
use crate::record::{Content, Record};
use crate::settings;
use crate::store::StoreError;

/// Where objects are taken aside. No id begins with a dot.
const ASIDE: &str = ".swept";

#[derive(Debug, thiserror::Error)]
enum SweepError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Offload(#[from] OffloadError),
}

/// Sweeps from time to time, for as long as the app lives.
pub(super) async fn run(app: Weak<App>, settings: settings::Offload) {
    loop {
        // Servers of one site do it at different times.
        let pause = settings.sweep_interval.mul_f64(fastrand::f64().mul_add(0.2, 0.9));
        tokio::time::sleep(pause).await;
        let Some(app) = app.upgrade() else { return };
        let Some(offload) = &app.offload else { return };
        match offload.sweep(&app, settings.grace).await {
            Ok(0) => {}
            Ok(removed) => tracing::info!(removed, "objects that no record refers to were removed"),
            Err(error) => tracing::warn!(%error, "objects can't be swept"),
        }
    }
}

/// Removes the object of an image that was removed, as far as no record refers to it again.
pub(crate) async fn discard(app: &App, offload: &Offload, id: &ImageId, path: &Path) {
    if let Err(error) = offload.remove(app, id, path).await {
        // The sweep gets it.
        tracing::warn!(image.id = %id, %error, "the object of a removed image can't be removed yet");
    }
}

impl Offload {
    /// Removes what is older than `grace` and what no record refers to. Gives how many objects that were.
    async fn sweep(&self, app: &App, grace: Duration) -> Result<u64, SweepError> {
        let mut objects = self.store.list(Some(&self.folder));
        let mut removed = 0;
        while let Some(object) = self.in_time(async { objects.next().await.transpose() }).await? {
            match self.name(&object.location) {
                Name::Object(id) if is_older(&object, grace) => {
                    if !self.is_referred_to(app, &id, &object.location).await? {
                        self.remove(app, &id, &object.location).await?;
                        removed += 1;
                    }
                }
                Name::Aside(id, original) => {
                    self.restore(app, &id, &object.location, &original).await?;
                    self.in_time(self.store.delete(&object.location)).await?;
                }
                Name::Object(_) | Name::Foreign => {}
            }
        }
        app.metrics.swept.inc_by(removed);
        Ok(removed)
    }

    /// Takes an object aside, and back again if a record refers to it by then.
    async fn remove(&self, app: &App, id: &ImageId, path: &Path) -> Result<(), SweepError> {
        let aside = self.aside(path);
        match self.in_time(self.store.copy(path, &aside)).await {
            // Somebody else was quicker.
            Err(OffloadError::Gone(_)) => return Ok(()),
            copied => copied?,
        }
        match self.in_time(self.store.delete(path)).await {
            Ok(()) | Err(OffloadError::Gone(_)) => {}
            Err(error) => return Err(error.into()),
        }
        self.restore(app, id, &aside, path).await
    }

    /// Copies an object back that is missing.
    async fn restore(
        &self,
        app: &App,
        id: &ImageId,
        aside: &Path,
        path: &Path,
    ) -> Result<(), SweepError> {
        if self.is_referred_to(app, id, path).await?
            && matches!(self.in_time(self.store.head(path)).await, Err(OffloadError::Gone(_)))
        {
            self.in_time(self.store.copy(aside, path)).await?;
        }
        Ok(())
    }

    /// Whether the record of an id has the address of an object.
    async fn is_referred_to(
        &self,
        app: &App,
        id: &ImageId,
        path: &Path,
    ) -> Result<bool, StoreError> {
        let stored = match app.store.get(id).await {
            // Such a value has no address.
            Err(StoreError::WrongType | StoreError::TooLarge { .. }) | Ok(None) => {
                return Ok(false);
            }
            stored => stored?,
        };
        Ok(stored.is_some_and(|stored| self.refers(&stored.value).as_ref() == Some(path)))
    }

    /// The object that a value has the address of.
    pub(crate) fn refers(&self, value: &[u8]) -> Option<Path> {
        let record = Record::parse(value).ok()?;
        let Content::Offloaded(elsewhere) = &record.content else {
            return None;
        };
        // The version plays no part in the place.
        self.locate(Version::of(b""), &record, elsewhere).map(|remote| remote.path)
    }

    fn aside(&self, path: &Path) -> Path {
        let name = path.parts().skip(self.folder.parts().count());
        self.folder.parts().chain([PathPart::from(ASIDE)]).chain(name).collect()
    }

    /// What an object is, by its name.
    fn name(&self, path: &Path) -> Name {
        let Some(parts) = path.prefix_match(&self.folder) else { return Name::Foreign };
        let parts: Vec<PathPart<'_>> = parts.collect();
        let parts: Vec<&str> = parts.iter().map(AsRef::as_ref).collect();
        match parts[..] {
            [ASIDE, id, file] => match ImageId::parse(id) {
                Ok(id) => {
                    let name = [id.as_str(), file].map(ToOwned::to_owned);
                    let name = name.iter().filter_map(|part| PathPart::parse(part).ok());
                    let original = self.folder.parts().chain(name).collect();
                    Name::Aside(id.clone(), original)
                }
                Err(_) => Name::Foreign,
            },
            [id, _file] => ImageId::parse(id).map_or(Name::Foreign, Name::Object),
            _ => Name::Foreign,
        }
    }
}

enum Name {
    /// Of an image.
    Object(ImageId),
    /// One that was taken aside, and where from.
    Aside(ImageId, Path),
    /// None of ours.
    Foreign,
}

fn is_older(object: &ObjectMeta, grace: Duration) -> bool {
    let age = SystemTime::now().duration_since(SystemTime::from(object.last_modified));
    age.is_ok_and(|age| age >= grace)
}
