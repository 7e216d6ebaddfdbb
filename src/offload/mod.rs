//! Images in an object store (S3, R2, `MinIO`, GCS, Azure, a folder) instead of in their records.
//!
//! An object is named after the image's id, the version of the record that it came in, and the upload. The object under a
//! name never changes, and no name is used twice. Otherwise an object could not be removed without a lock over two stores,
//! because the same image might be written again in that moment. `mover` moves what backends wrote, `sweep` removes
//! objects that no record refers to any more.

mod circuit;
mod connector;
mod mover;
mod sweep;

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{
    Attribute, Attributes, ObjectStore, ObjectStoreExt, ObjectStoreScheme, PutOptions, RetryConfig,
};
use sha2::{Digest, Sha256};
use url::Url;

use crate::budget::{FetchBudget, OverBudget};
use crate::cache::Insertion;
use crate::coalesce::{Flights, Lost};
use crate::cpu::Cpu;
use crate::image::record::{self, Corrupt, ObjectRef, Record};
use crate::image::{Image, ImageId, MediaType, Metadata, Version};
use crate::metrics::Metrics;
use crate::originals::Originals;
use crate::peer::PeerKey;
use crate::picture;
use crate::settings::{self, ServeOffloaded};
use crate::trace;

use self::circuit::{Away, Circuit};
use self::connector::TracingConnector;
pub(crate) use self::mover::{MoveTasks, Mover};
use self::sweep::Discarded;

/// Most repetitions of a request within one attempt. Further attempts are the mover's, the probe's and the client's.
const REPETITIONS: usize = 3;

/// Shortest time-out of reads, unless `[offload] timeout` is shorter.
const SHORTEST_READ_TIMEOUT: Duration = Duration::from_secs(2);

/// An object never changes (RFC 8246).
const IMMUTABLE: &str = "public, max-age=31536000, immutable";

/// The object store that images are moved to.
pub struct Offload {
    store: Arc<dyn ObjectStore>,
    /// The part of `url` after the bucket. All objects are beneath it.
    folder: Path,
    /// From the settings, without a slash at its end. It stands in records, like `public_url`.
    url: String,
    public_url: Option<String>,
    serve: ServeOffloaded,
    timeout: Duration,
    /// False for a folder: files have no attributes.
    keeps_attributes: bool,
    circuit: Circuit,
    fetches: Arc<Flights<(ImageId, Version), ObjectFetch>>,
    mover: Arc<Mover>,
    discarded: Discarded,
    parts: Parts,
    max_value: usize,
}

/// The parts that the object store needs to bring images into memory.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The way of fetched images into the cache.
    pub originals: Originals,
    /// Memory for images that are being fetched.
    pub budget: Arc<FetchBudget>,
    /// Hashes images.
    pub cpu: Cpu,
    /// Counts moves and fetches.
    pub metrics: Arc<Metrics>,
}

/// An image in the object store, according to its record.
#[derive(Debug)]
pub struct RemoteImage {
    /// The version of the record.
    pub version: Version,
    /// The metadata of the original, once the image has been here.
    pub metadata: OnceLock<Arc<Metadata>>,
    offload: Arc<Offload>,
    path: Path,
    /// The public address.
    public_url: Option<String>,
    declared_type: Option<MediaType>,
    declared_length: Option<usize>,
    /// Set once the object was not what the record says: then the record isn't relied upon for the length.
    is_damaged: AtomicBool,
    sha256: Option<[u8; 32]>,
    created_at: Option<SystemTime>,
}

/// An image that was fetched from the object store.
#[derive(Debug, Clone)]
pub struct FetchedObject {
    /// The image.
    pub image: Image,
    /// Tells if it is in the cache now.
    pub insertion: Insertion,
    /// Time that the fetch took.
    pub time: Duration,
}

/// The outcome of a fetch, for all who wait for it.
type ObjectFetch = Result<FetchedObject, OffloadError>;

/// Reasons for a failure of the object store. The text is for the log: it may name hosts.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OffloadError {
    /// There is no such object.
    #[error("the object {0} is gone")]
    Gone(Path),
    /// The object's hash or length isn't the one in the record, or the one that was told before.
    #[error("the object {0} is not what its record says")]
    Damaged(Path),
    /// The object is no image, or too large.
    #[error("the object {path} can't be served: {source}")]
    Unusable {
        /// Its name.
        path: Path,
        /// The reason.
        source: Corrupt,
    },
    /// The store refused or can't be reached.
    #[error("the object store failed: {}", circuit::explain(.0))]
    Failed(#[source] Arc<object_store::Error>),
    /// The answer took too long.
    #[error("the object store didn't answer in time ([offload] timeout)")]
    TimedOut,
    /// The store is known to be away, and wasn't asked.
    #[error(transparent)]
    Away(#[from] Away),
    /// Memory is full of images that are being fetched and sent.
    #[error(transparent)]
    OverBudget(#[from] OverBudget),
    /// The fetch panicked.
    #[error(transparent)]
    Lost(#[from] Lost),
}

impl OffloadError {
    /// Time after which the same request may succeed, if the store is to blame and not the object.
    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            OffloadError::Away(away) => Some(away.retry_after()),
            OffloadError::TimedOut | OffloadError::Failed(_) => Some(Duration::ZERO),
            OffloadError::Gone(_)
            | OffloadError::Damaged(_)
            | OffloadError::Unusable { .. }
            | OffloadError::OverBudget(_)
            | OffloadError::Lost(_) => None,
        }
    }
}

impl Offload {
    /// The object store of the settings, if one is configured. `max_value` is the largest object that is fetched.
    pub fn open(
        settings: &settings::OffloadSettings,
        max_value: usize,
        mover: Arc<Mover>,
        parts: Parts,
    ) -> anyhow::Result<Option<Arc<Offload>>> {
        if settings.url.is_empty() {
            return Ok(None);
        }
        crate::store::install_tls_provider();
        let public_url = (!settings.public_url.is_empty())
            .then(|| base("[offload] public_url", &settings.public_url))
            .transpose()?;
        anyhow::ensure!(
            public_url.is_some() || settings.serve == ServeOffloaded::Stream,
            "[offload] serve = \"redirect\" needs [offload] public_url"
        );
        let url = base("[offload] url", &settings.url)?;
        let (scheme, store, folder) = open_store(&url, settings).context("[offload] url")?;
        Ok(Some(Arc::new(Offload {
            store,
            folder,
            circuit: Circuit::new(url.clone()),
            url,
            public_url,
            serve: settings.serve,
            timeout: settings.timeout,
            keeps_attributes: scheme != ObjectStoreScheme::Local,
            fetches: Arc::default(),
            mover,
            discarded: Discarded::default(),
            parts,
            max_value,
        })))
    }

    /// Returns the reason for which the object store can't be used, unless it can. Names no host.
    #[must_use]
    pub fn unavailability(&self) -> Option<Arc<str>> {
        self.circuit.away().map(|away| away.reason)
    }

    /// Longest time for an answer to a reader, and between two parts of an image.
    fn read_timeout(&self) -> Duration {
        (self.timeout / 6).max(SHORTEST_READ_TIMEOUT).min(self.timeout)
    }

    /// The image that a record refers to, if its address is beneath one of the two in the settings. No other address is
    /// ever requested, and no client is sent to another one.
    #[must_use]
    pub fn locate(
        self: &Arc<Self>,
        version: Version,
        record: &Record<'_>,
        object_ref: &ObjectRef<'_>,
    ) -> Option<RemoteImage> {
        let (path, public_url) = self.resolve(object_ref)?;
        Some(RemoteImage {
            version,
            offload: Arc::clone(self),
            path,
            public_url,
            declared_type: record.declared_type.as_deref().and_then(MediaType::named),
            declared_length: object_ref.size,
            is_damaged: AtomicBool::new(false),
            sha256: object_ref.sha256,
            created_at: record.created_at,
            metadata: OnceLock::new(),
        })
    }

    /// The object that a record refers to, and its public address.
    fn resolve(&self, object_ref: &ObjectRef<'_>) -> Option<(Path, Option<String>)> {
        let bases = self.public_url.iter().chain([&self.url]);
        let mut rests =
            bases.filter_map(|base| object_ref.url.strip_prefix(base)?.strip_prefix('/'));
        // The object's name outlives a change of the public address.
        let rest = object_ref.object.as_deref().or_else(|| rests.next());
        let rest = rest.filter(|rest| is_plain(rest))?;
        let name = Path::parse(rest).ok()?;
        let public_url = self.public_url.as_ref().map(|base| format!("{base}/{rest}"));
        Some((self.folder.parts().chain(name.parts()).collect(), public_url))
    }

    /// Uploads an image, and gives the record that refers to it, made of the record that the image was in.
    async fn upload(
        &self,
        id: &ImageId,
        record: &Bytes,
        version: Version,
        media_type: MediaType,
        bytes: &Bytes,
    ) -> Result<Moved, OffloadError> {
        let upload = fastrand::u64(..);
        let name = format!("{id}/{version}-{upload:016x}.{}", media_type.extension());
        let path: Path = self.folder.parts().chain(parsed(&name)?.parts()).collect();
        let put = self.put(&path, media_type, bytes).await;
        self.circuit.note_upload(put.is_ok());
        put?;
        let url = format!("{}/{name}", self.public_url.as_ref().unwrap_or(&self.url));
        let (value, image) = (record.clone(), bytes.clone());
        let moved = move || {
            let sha256 = Sha256::digest(&image).into();
            let value = record::moved(&value, &url, &name, media_type, image.len(), &sha256);
            let version = Version::of(&value);
            Moved { value: value.into(), version }
        };
        tokio::task::spawn_blocking(moved).await.map_err(|_panicked| OffloadError::Lost(Lost))
    }

    async fn put(
        &self,
        path: &Path,
        media_type: MediaType,
        bytes: &Bytes,
    ) -> Result<(), OffloadError> {
        let mut options = PutOptions::default();
        if self.keeps_attributes {
            options.attributes = Attributes::from_iter([
                (Attribute::ContentType, media_type.as_str()),
                (Attribute::CacheControl, IMMUTABLE),
            ]);
        }
        let put = self.store.put_opts(path, bytes.clone().into(), options);
        self.in_time(self.timeout, put).await?;
        Ok(())
    }

    /// Waits for the object store, for no longer than `limit`, and not at all while it is known to be away.
    async fn in_time<T>(
        &self,
        limit: Duration,
        work: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, OffloadError> {
        let answer = tokio::select! {
            biased;
            away = self.circuit.until_away() => return Err(away.into()),
            answer = tokio::time::timeout(limit, work) => answer,
        };
        match answer {
            Ok(Ok(done)) => {
                self.circuit.note_answer();
                Ok(done)
            }
            Ok(Err(error)) => {
                self.circuit.note_failure();
                Err(match error {
                    // Not the object is missing, but its bucket.
                    error if error.to_string().contains("NoSuchBucket") => {
                        OffloadError::Failed(Arc::new(error))
                    }
                    object_store::Error::NotFound { path, .. } => {
                        OffloadError::Gone(Path::from(path))
                    }
                    error => OffloadError::Failed(Arc::new(error)),
                })
            }
            Err(_elapsed) => {
                self.circuit.note_silence(limit);
                Err(OffloadError::TimedOut)
            }
        }
    }
}

/// An uploaded image.
pub(crate) struct Moved {
    /// The record that refers to it.
    pub(crate) value: Bytes,
    /// The version of that record.
    pub(crate) version: Version,
}

impl Offload {
    /// Uploads an image that is about to be written, and gives the record to write instead of the one with the bytes.
    /// Gives `None` if the image has to stay in its record: the object store fails, or the new record would be too large.
    pub(crate) async fn on_write(
        &self,
        id: &ImageId,
        record: &Bytes,
        metadata: &Metadata,
        bytes: &Bytes,
    ) -> Option<Moved> {
        if self.circuit.failed_uploads() > 0 {
            // No writer waits for a store that may be away. The mover finds out when it is back.
            return None;
        }
        match self.upload(id, record, metadata.version, metadata.media_type, bytes).await {
            Ok(moved) => Some(moved).filter(|it| it.value.len() <= self.max_value),
            Err(error) => {
                self.parts.metrics.offload_errors.inc();
                // That it is away was logged.
                if !matches!(error, OffloadError::Away(_)) {
                    tracing::warn!(image.id = %id, %error, "a written image can't be moved yet");
                }
                None
            }
        }
    }

    /// Queues an image that was written as it is because uploads fail. Nothing else would, where the store doesn't push.
    pub(crate) fn move_later(&self, id: &ImageId) {
        if self.circuit.failed_uploads() > 0 {
            self.mover.add(id.clone());
        }
    }

    /// Keeps an image that was moved in memory, under the version of its new record, so that the next reader doesn't fetch
    /// it.
    pub(crate) fn keep(&self, id: &ImageId, moved: &Moved, metadata: &Metadata, bytes: Bytes) {
        self.parts.metrics.offloaded.inc();
        let metadata = metadata.of_version(moved.version);
        self.parts.originals.keep_written(id, metadata, bytes);
    }

    async fn bring(
        &self,
        id: &ImageId,
        client: Option<PeerKey>,
        remote: &RemoteImage,
    ) -> ObjectFetch {
        let began = Instant::now();
        let (path, timeout) = (&remote.path, self.read_timeout());
        let object = self.in_time(timeout, self.store.get(path)).await?;
        let (size, limit) = (object.meta.size, self.max_value);
        let Some(length) = usize::try_from(size).ok().filter(|length| *length <= limit) else {
            let source = Corrupt::TooLarge { size, limit };
            return Err(OffloadError::Unusable { path: path.clone(), source });
        };
        let told = remote.told_length();
        let check_length = |length: usize| match told {
            Some(told) if told != length => Err(OffloadError::Damaged(path.clone())),
            _ => Ok(()),
        };
        check_length(length)?;
        let _reservation = self.parts.budget.reserve(client, size).await?;
        let bytes = async {
            let (mut parts, mut bytes) = (object.into_stream(), Vec::with_capacity(length));
            while let Some(part) = self.in_time(timeout, parts.try_next()).await? {
                bytes.extend_from_slice(&part);
            }
            Ok::<_, OffloadError>(bytes)
        };
        let bytes = tokio::time::timeout(self.timeout, bytes).await;
        let bytes = bytes.map_err(|_elapsed| OffloadError::TimedOut)??;
        check_length(bytes.len())?;
        self.parts.metrics.offload_fetches.inc();
        let (path, sha256) = (path.clone(), remote.sha256);
        let (version, created_at) = (remote.version, remote.created_at);
        let checked = self.parts.cpu.run_on(bytes.len(), move || {
            if sha256.is_some_and(|it| it != <[u8; 32]>::from(Sha256::digest(&bytes))) {
                return Err(OffloadError::Damaged(path));
            }
            let media_type = record::sniffed(&bytes)
                .map_err(|source| OffloadError::Unusable { path, source })?;
            let metadata = Metadata::new(version, media_type, bytes.len(), created_at);
            let traits = picture::strip::traits(&bytes, media_type);
            Ok((Metadata { traits, ..metadata }, bytes))
        });
        let (metadata, bytes) = checked.await?;
        let original = self.parts.originals.counted(metadata, bytes);
        let (image, insertion) = self.parts.originals.admit(id, original).await;
        let _ = remote.metadata.set(Arc::clone(&image.original.metadata));
        Ok(FetchedObject { image, insertion, time: began.elapsed() })
    }
}

impl RemoteImage {
    /// The address that clients are redirected to for the original, if they are, and the metadata of that answer. SVG is
    /// sent from here, in its sandbox.
    #[must_use]
    pub fn redirect(&self) -> Option<(&str, Arc<Metadata>)> {
        let redirects = self.offload.serve == ServeOffloaded::Redirect;
        let location = self.public_url.as_deref().filter(|_| redirects)?;
        let media_type = self.declared_type.filter(|it| *it != MediaType::Svg)?;
        Some((location, Arc::new(Metadata::new(self.version, media_type, 0, self.created_at))))
    }

    /// The metadata of the original according to its record, for answers without a body. `None` if the record isn't one
    /// that the mover writes, and for SVG, which may be sent compressed.
    #[must_use]
    pub fn declared(&self) -> Option<Arc<Metadata>> {
        let media_type = self.declared_type.filter(|it| *it != MediaType::Svg)?;
        let length = self.declared_length.filter(|_| self.sha256.is_some())?;
        let is_relied_upon = !self.is_damaged.load(Ordering::Relaxed);
        is_relied_upon
            .then(|| Arc::new(Metadata::new(self.version, media_type, length, self.created_at)))
    }

    /// The length that answers without a body have told, or may have.
    fn told_length(&self) -> Option<usize> {
        let declared = self.declared_length.filter(|_| self.sha256.is_some());
        self.metadata.get().map(|it| it.length).or(declared)
    }

    /// Fetches the image, or joins a fetch that another request leads. Tells if it joined. The version is known, so the
    /// image can't be out of date.
    pub async fn fetch(
        self: &Arc<Self>,
        id: &ImageId,
        client: Option<PeerKey>,
    ) -> (Result<FetchedObject, OffloadError>, bool) {
        let key = (id.clone(), self.version);
        let (flight, collapsed) = self.offload.fetches.join(key, |_| {
            let (id, remote) = (id.clone(), Arc::clone(self));
            // The flight is a task of its own, in the name of the request that began it.
            trace::within(trace::current(), async move {
                let offload = &remote.offload;
                let fetched = offload.bring(&id, client, &remote).await;
                if fetched.is_err() {
                    offload.parts.metrics.offload_errors.inc();
                }
                let is_damaged = matches!(fetched, Err(OffloadError::Damaged(_)));
                if is_damaged || fetched.is_ok() {
                    remote.is_damaged.store(is_damaged, Ordering::Relaxed);
                }
                fetched
            })
        });
        (flight.outcome().await.unwrap_or_else(|lost| Err(lost.into())), collapsed)
    }
}

impl fmt::Debug for Offload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Offload").field(&self.url).finish()
    }
}

/// An address without query, fragment and password. A slash at its end is left out.
fn base(name: &str, text: &str) -> anyhow::Result<String> {
    let url = Url::parse(text).with_context(|| {
        format!("{name} must be an address, such as https://images.example/folder")
    })?;
    anyhow::ensure!(
        url.query().is_none() && url.fragment().is_none() && url.password().is_none(),
        "{name} must be a scheme, a host and a folder, without query, fragment and password"
    );
    let text = text.trim_end_matches('/');
    let rest = text.split_once("://").map(|(_, rest)| rest).unwrap_or_default();
    anyhow::ensure!(
        rest.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._:~-/@".contains(&byte)),
        "{name} must consist of A-Z a-z 0-9 . _ : ~ - / @"
    );
    Ok(text.to_owned())
}

/// True for a text that needs no escape in an address, nor in the name of an object.
fn is_plain(text: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"._:~-/".contains(&byte);
    text.bytes().all(known)
        && text.split('/').all(|part| !part.is_empty() && !part.starts_with('.'))
}

fn parsed(name: &str) -> Result<Path, OffloadError> {
    Path::parse(name).map_err(|error| OffloadError::Failed(Arc::new(error.into())))
}

fn open_store(
    url: &str,
    settings: &settings::OffloadSettings,
) -> anyhow::Result<(ObjectStoreScheme, Arc<dyn ObjectStore>, Path)> {
    const EXPECTED: &str = "expected s3://, gs://, az:// or file:///";
    let (scheme, folder) = ObjectStoreScheme::parse(&Url::parse(url)?).context(EXPECTED)?;
    let retry = RetryConfig {
        max_retries: REPETITIONS,
        retry_timeout: settings.timeout,
        ..RetryConfig::default()
    };
    // The three builders have the same methods, but no common trait.
    macro_rules! built {
        ($builder:ty) => {{
            let mut builder = <$builder>::from_env()
                .with_url(url)
                .with_retry(retry)
                .with_http_connector(TracingConnector::default());
            for (name, value) in settings.options.iter() {
                let key = name.parse().map_err(|_unknown| {
                    anyhow::anyhow!("[offload] options: this kind of store has no option `{name}`")
                })?;
                builder = builder.with_config(key, value);
            }
            Arc::new(builder.build()?) as Arc<dyn ObjectStore>
        }};
    }
    let store = match scheme {
        ObjectStoreScheme::AmazonS3 => built!(AmazonS3Builder),
        ObjectStoreScheme::GoogleCloudStorage => built!(GoogleCloudStorageBuilder),
        ObjectStoreScheme::MicrosoftAzure => built!(MicrosoftAzureBuilder),
        // With fsync, so that acknowledged images survive a power cut, as in the other stores.
        ObjectStoreScheme::Local => {
            Arc::new(LocalFileSystem::new().with_fsync(true).with_automatic_cleanup(true))
        }
        _ => anyhow::bail!(EXPECTED),
    };
    Ok((scheme, store, folder))
}
