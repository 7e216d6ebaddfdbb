//! The life of a read: from an id to a snapshot of its image, and from the snapshot to an answer.

mod answer;
mod choose;
mod decode;
mod fetch;
mod listing;
mod snapshot;

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

pub use self::answer::{Answer, ImageRequest, Want};
pub(crate) use self::answer::{AnswerContent, ReadError, ReadFailure, Timing};
pub(crate) use self::decode::CorruptLog;
use self::fetch::Fetched;
pub(crate) use self::fetch::Outcome;
pub(crate) use self::listing::{ListedImage, ListedState};
pub(crate) use self::snapshot::Snapshot;
use self::snapshot::Source;
use crate::budget::FetchBudget;
use crate::cache::Cache;
use crate::cache_status::CacheStatus;
use crate::cpu::Cpu;
use crate::image::variant::Transform;
use crate::image::{ImageId, Metadata, Representation, Version};
use crate::index::{Admission, Index, Known, LastKnown, Lookup};
use crate::limit::Turns;
use crate::metrics::Metrics;
use crate::offload::Offload;
use crate::originals::Originals;
use crate::peer::PeerKey;
use crate::picture::Preview;
use crate::render::Renderer;
use crate::spans::Step;
use crate::store::{Store, StoreError};

/// Longest time for which a request waits for the next heartbeat, before it asks the store all the same.
const RENEWAL: Duration = Duration::from_secs(2);

/// Fetches of one client that run at the same time; further ones wait for these. More than the store's connections need to
/// be busy, and so few that the fetch of somebody else doesn't wait long behind them.
pub(crate) const FETCHES_EACH: usize = 64;

/// The parts that a read needs.
#[derive(Debug)]
pub struct Reader {
    /// The known content of the store.
    pub index: Arc<Index<Outcome>>,
    /// The store of records.
    pub store: Arc<Store>,
    /// The object store that images are moved to, if one is configured.
    pub offload: Option<Arc<Offload>>,
    /// The bytes in memory.
    pub cache: Arc<Cache>,
    /// The way of decoded images into the cache.
    pub originals: Originals,
    /// Renders variants.
    pub renderer: Renderer,
    /// Longest time for which a request waits for the store.
    pub patience: Duration,
    /// Memory for values that are being fetched.
    pub budget: Arc<FetchBudget>,
    /// Hashes and decodes.
    pub cpu: Cpu,
    /// Counts reads.
    pub metrics: Arc<Metrics>,
    /// Corrupt records that were logged.
    pub corrupt_log: CorruptLog,
    /// The turns of clients to fetch.
    pub(crate) turns: Turns<PeerKey>,
}

/// The metadata of an image, and a small picture of it.
#[derive(Debug)]
pub struct Info {
    /// The metadata of the original.
    pub metadata: Arc<Metadata>,
    /// Pixel size and `ThumbHash`, if the image can be decoded.
    pub preview: Option<Arc<Preview>>,
    /// The thumbnail, if the image can be decoded.
    pub thumbnail: Option<Representation>,
    /// Time until the record expires; `None` if it never does.
    pub time_to_live: Option<Duration>,
    /// The source of the image.
    pub cache_status: CacheStatus,
    /// Time spent on the parts of the read.
    pub timing: Timing,
}

impl Reader {
    /// Answers a request for an image.
    pub async fn image(self: &Arc<Self>, request: ImageRequest) -> Result<Answer, ReadFailure> {
        let answer = async {
            let snapshot = self.open(&request.id, request.client).await?;
            let original = snapshot.metadata().map(Arc::clone);
            let answer = snapshot.answer(&request).await?;
            if answer.cache_status == CacheStatus::Hit
                && request.transform != Some(Transform::THUMBNAIL)
                && let Some(original) = original
            {
                original.count_hit();
            }
            Ok(answer)
        };
        let answer = answer.await;
        self.count(answer.as_ref().map(|answer| answer.cache_status));
        answer
    }

    /// The metadata and a small picture of an image.
    pub async fn info(
        self: &Arc<Self>,
        id: &ImageId,
        client: PeerKey,
    ) -> Result<Info, ReadFailure> {
        let mut snapshot = self.load(id, Some(client)).await?;
        let (cache_status, timing) = (snapshot.cache_status(), snapshot.timing());
        let preview = snapshot.preview().await?;
        let thumbnail = snapshot.thumbnail().await?;
        let metadata = snapshot.load().await?.original.metadata;
        let time_to_live = self.index.time_to_live(id, metadata.version);
        Ok(Info { metadata, preview, thumbnail, time_to_live, cache_status, timing })
    }

    /// The current version of an image.
    pub async fn version(self: &Arc<Self>, id: &ImageId) -> Result<Version, ReadFailure> {
        let opened = self.open(id, None).await;
        self.count(opened.as_ref().map(Snapshot::cache_status));
        opened.map(|snapshot| snapshot.version())
    }

    /// A snapshot of an image with its bytes.
    pub async fn load(
        self: &Arc<Self>,
        id: &ImageId,
        client: Option<PeerKey>,
    ) -> Result<Snapshot, ReadFailure> {
        let loaded = async {
            let mut snapshot = self.open(id, client).await?;
            snapshot.load().await?;
            Ok(snapshot)
        };
        let loaded = loaded.await;
        self.count(loaded.as_ref().map(Snapshot::cache_status));
        loaded
    }

    /// A snapshot of an image: one version, and where its bytes are. Asks the store only if the index doesn't know, and
    /// accounts the fetch to the client; `None` is the server itself.
    pub async fn open(
        self: &Arc<Self>,
        id: &ImageId,
        client: Option<PeerKey>,
    ) -> Result<Snapshot, ReadFailure> {
        let source = match self.look_up(id).await {
            Lookup::Current(Known::Present(metadata)) => Source::Known(metadata),
            Lookup::Current(Known::Offloaded(remote)) => Source::Remote(remote),
            Lookup::Current(Known::Absent) => return Err(known(ReadError::Absent)),
            Lookup::Current(Known::Corrupt(corrupt)) => return Err(known(corrupt)),
            Lookup::Stale(last_known) => {
                let stale = self.stale(id, client, last_known, self.unreachable());
                return stale.map_err(ReadFailure::unknown);
            }
            Lookup::Ask(admission) => return self.open_by_fetch(id, client, admission).await,
        };
        Ok(Snapshot::new(self, id, client, source, CacheStatus::Hit, Timing::default()))
    }

    /// Looks up an image. After a pause of this process the next heartbeat is a matter of a millisecond, and cheaper than a
    /// fetch for each request that waits.
    async fn look_up(&self, id: &ImageId) -> Lookup<Outcome> {
        let looked_up = async {
            loop {
                match self.index.look_up(id) {
                    Ok(found) => return found,
                    Err(renewal) => renewal.await,
                }
            }
        };
        let looked_up = tokio::time::timeout(RENEWAL, looked_up).await;
        looked_up.unwrap_or_else(|_elapsed| Lookup::Ask(self.index.ask(id)))
    }

    /// A snapshot of what the store holds now; or of the last known version, as soon as the store is known to be
    /// unreachable.
    async fn open_by_fetch(
        self: &Arc<Self>,
        id: &ImageId,
        client: Option<PeerKey>,
        admission: Admission<Outcome>,
    ) -> Result<Snapshot, ReadFailure> {
        let _step = Step::begin("fetch");
        let mut fetch = pin!(self.fetch(id, client, admission));
        let fetched = tokio::select! {
            // First, so that no admission is dropped without having been used.
            biased;
            fetched = &mut fetch => fetched,
            () = self.index.until_unreachable() => match self.index.last_known(id) {
                Some(last_known) if self.can_serve(id, &last_known) => {
                    let stale = self.stale(id, client, last_known, self.unreachable());
                    return stale.map_err(ReadFailure::unknown);
                }
                _ => fetch.await,
            },
        };
        match fetched {
            Ok((fetched, cache_status, timing)) => {
                let source = match fetched {
                    Fetched::Image(image) => Source::Image(image),
                    Fetched::Remote(remote) => Source::Remote(remote),
                };
                Ok(Snapshot::new(self, id, client, source, cache_status, timing))
            }
            Err(failure) => match (&failure.error, self.index.last_known(id)) {
                (ReadError::Store(error), Some(last_known)) if error.is_outage() => {
                    self.stale(id, client, last_known, failure.error).map_err(ReadFailure::unknown)
                }
                _ => Err(failure),
            },
        }
    }

    fn unreachable(&self) -> ReadError {
        let reason = self.index.coherence().reason().unwrap_or_default().to_owned();
        StoreError::unreachable(reason).into()
    }

    /// True if the bytes of a last known version can be had without the store.
    fn can_serve(&self, id: &ImageId, last_known: &LastKnown) -> bool {
        match &last_known.known {
            Known::Present(metadata) => self.cache.contains(id, metadata.version),
            Known::Offloaded(_) => true,
            Known::Absent | Known::Corrupt(_) => false,
        }
    }

    /// A snapshot of the last known version. `error` is the answer to requests that need bytes which have left memory.
    fn stale(
        self: &Arc<Self>,
        id: &ImageId,
        client: Option<PeerKey>,
        last_known: LastKnown,
        error: ReadError,
    ) -> Result<Snapshot, ReadError> {
        let source = match last_known.known {
            Known::Present(metadata) => Source::LastKnown(metadata, error),
            Known::Offloaded(remote) => Source::Remote(remote),
            Known::Absent | Known::Corrupt(_) => return Err(error),
        };
        let cache_status = CacheStatus::Stale { age: last_known.age };
        Ok(Snapshot::new(self, id, client, source, cache_status, Timing::default()))
    }

    fn count(&self, read: Result<CacheStatus, &ReadFailure>) {
        match read.map_or_else(|failure| failure.cache_status, Some) {
            Some(cache_status) => self.metrics.count_read(cache_status),
            None => self.metrics.count_failed_read(),
        }
        if let Err(ReadFailure { error: ReadError::Corrupt(_), .. }) = read {
            self.metrics.corrupt_records.inc();
        }
    }
}

/// A failure that the index knows of.
fn known(error: impl Into<ReadError>) -> ReadFailure {
    let cache_status = Some(CacheStatus::Hit);
    ReadFailure { error: error.into(), cache_status, timing: Timing::default() }
}
