//! Removes objects that no record refers to: those of images that were replaced, removed or have expired, and those of
//! moves that were not finished.
//!
//! A name is used once: each upload makes a new one. So an object that no record refers to a while after it was written
//! is one that none ever will, and looking and removing need not be one step.
//!
//! A record may have been copied or renamed in Redis, so an object's own record is looked at first, and then all of them.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStoreExt};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::mover::MOST;
use super::{Offload, OffloadError};
use crate::image::record::{Content, Record};
use crate::image::{ImageId, MediaType};
use crate::settings::OffloadSettings;
use crate::store::{LISTED_KEYS, Store, StoreError};

/// The object that a record refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Reference {
    /// This object.
    To(Path),
    /// An address outside of the settings. They have changed, or are about to. The object would be this one.
    Unknown(Path),
    /// None.
    Nothing,
}

/// Objects of images that were deleted here. They are removed soon, without the grace of other objects.
#[derive(Debug, Default)]
pub(super) struct Discarded {
    paths: Mutex<HashSet<Path>>,
    more: Notify,
}

impl Discarded {
    fn add(&self, path: Path) {
        let mut paths = self.paths.lock().unwrap_or_else(PoisonError::into_inner);
        // The sweep finds others.
        if paths.len() < MOST {
            paths.insert(path);
        }
        drop(paths);
        self.more.notify_one();
    }

    fn take(&self) -> HashSet<Path> {
        std::mem::take(&mut *self.paths.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Reasons for a sweep that removed nothing.
#[derive(Debug, thiserror::Error)]
enum SweepError {
    #[error("the objects can't be listed: {0}")]
    Objects(#[from] OffloadError),
    #[error("the records can't be read: {0}")]
    Records(#[from] StoreError),
    #[error(
        "no record refers to {unreferenced} of {seen} objects: the database must be the one that [offload] url belongs to. \
         Where it is, remove objects of that age by hand"
    )]
    MostWouldGo { unreferenced: usize, seen: usize },
}

/// Sweeps from time to time, and removes the objects of deleted images.
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
    // Servers of one site sweep at different times.
    let next =
        || Instant::now() + settings.sweep_interval.mul_f64(fastrand::f64().mul_add(0.2, 0.9));
    let mut due = next();
    loop {
        let discarded = tokio::time::timeout_at(due, offload.discarded.more.notified()).await;
        if discarded.is_ok() {
            let began = Instant::now();
            offload.remove_discarded(store).await;
            // All records are read for it: for a tenth of the time at most.
            tokio::time::sleep(10 * began.elapsed()).await;
            continue;
        }
        match offload.sweep(store, grace).await {
            // That it is away was logged.
            Ok(0) | Err(SweepError::Objects(OffloadError::Away(_))) => {}
            Ok(removed) => tracing::info!(removed, "objects without a record were removed"),
            Err(error) => tracing::warn!(%error, "no object is swept"),
        }
        due = next();
    }
}

impl Offload {
    /// Removes the object of a removed record soon, unless another record refers to it.
    pub(crate) fn discard(&self, value: &[u8]) {
        if let Reference::To(path) = self.reference(value) {
            self.discarded.add(path);
        }
    }

    async fn remove_discarded(&self, store: &Store) {
        self.circuit.until_back().await;
        match self.unreferenced(store, self.discarded.take()).await {
            Ok(paths) => drop(self.remove(paths).await),
            // The sweep finds them.
            Err(error) => tracing::debug!(%error, "objects of deleted images aren't removed yet"),
        }
    }

    /// Removes objects that are older than `grace` and that no record refers to. Returns their number.
    async fn sweep(&self, store: &Store, grace: Duration) -> Result<usize, SweepError> {
        let mut objects = self.store.list(Some(&self.folder));
        let mut paths = HashSet::new();
        let (mut seen, mut candidates) = (0, 0);
        while let Some(object) = self.in_time(self.timeout, objects.try_next()).await? {
            let path = object.location.clone();
            let Some(id) = self.owner(&path) else { continue };
            seen += 1;
            if !is_older(&object, grace) {
                continue;
            }
            match self.reference_of(store, &id).await {
                Ok(Reference::To(other)) if other == path => {}
                Ok(Reference::Unknown(_)) => {}
                Ok(Reference::To(_) | Reference::Nothing) => {
                    candidates += 1;
                    // The next sweep finds others.
                    if paths.len() < MOST {
                        paths.insert(path);
                    }
                }
                // In doubt nothing is removed.
                Err(error) => {
                    tracing::debug!(image.id = %id, %error, "an object isn't swept yet");
                }
            }
        }
        let looked_at = paths.len();
        let paths = self.unreferenced(store, paths).await?;
        let unreferenced = candidates - (looked_at - paths.len());
        // An empty or a wrong database looks like this. Young objects count as well: in an hour, an hour's images expire.
        if 3 * unreferenced > 2 * seen {
            return Err(SweepError::MostWouldGo { unreferenced, seen });
        }
        let removed = self.remove(paths).await;
        self.parts.metrics.swept.inc_by(removed as u64);
        Ok(removed)
    }

    /// Leaves those objects that no record refers to. All records are read twice, since one that is renamed meanwhile may be
    /// missed once.
    async fn unreferenced(
        &self,
        store: &Store,
        mut paths: HashSet<Path>,
    ) -> Result<HashSet<Path>, StoreError> {
        for _ in 0..2 {
            let mut from = None;
            while !paths.is_empty() {
                let page = store.list("", from, LISTED_KEYS).await?;
                for id in &page.ids {
                    if let Reference::To(path) | Reference::Unknown(path) =
                        self.reference_of(store, id).await?
                    {
                        paths.remove(&path);
                    }
                }
                from = page.next;
                if from.is_none() {
                    break;
                }
            }
        }
        Ok(paths)
    }

    /// Removes objects. Returns the number of those that were there.
    async fn remove(&self, paths: HashSet<Path>) -> usize {
        let mut removed = 0;
        for path in paths {
            match self.in_time(self.timeout, self.store.delete(&path)).await {
                Ok(()) => removed += 1,
                Err(OffloadError::Gone(_)) => {}
                // The next sweep finds it, and the others.
                Err(error @ OffloadError::Away(_)) => {
                    tracing::debug!(%error, "objects can't be removed yet");
                    break;
                }
                Err(error) => tracing::warn!(%path, %error, "an object can't be removed"),
            }
        }
        removed
    }

    /// The object that the record of an id refers to.
    async fn reference_of(&self, store: &Store, id: &ImageId) -> Result<Reference, StoreError> {
        let stored = match store.size(id).await {
            // Such a value refers to nothing.
            Err(StoreError::WrongType | StoreError::TooLarge { .. }) | Ok(0) => None,
            size => store.get(id, size?).await?,
        };
        Ok(stored.map_or(Reference::Nothing, |stored| self.reference(&stored.value)))
    }

    fn reference(&self, value: &[u8]) -> Reference {
        let Ok(record) = Record::parse(value) else { return Reference::Nothing };
        let Content::Offloaded(object_ref) = &record.content else { return Reference::Nothing };
        if let Some((path, _public_url)) = self.resolve(object_ref) {
            return Reference::To(path);
        }
        // Our objects' names have two parts, whatever address is before them.
        let name = object_ref.url.rsplit('/').take(2).collect::<Vec<_>>();
        let parts = name.into_iter().rev().map(Into::into);
        Reference::Unknown(self.folder.parts().chain(parts).collect())
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
