//! Images in an object store (S3, R2, `MinIO`, GCS, Azure, a folder) in place of the records: where they are, how they get
//! there and back.
//!
//! An image's object is named after its id, the version of the record that it came in, and the upload. What is under a
//! name never changes, and no name is used twice: otherwise an object could not be removed without a lock over two
//! stores, since the same image might be written again in that moment. `mover` moves what backends wrote, `sweep` removes
//! what no record refers to any more.

mod mover;
mod sweep;

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use bytes::Bytes;
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

use crate::app::{App, OverBudget};
use crate::coalesce::{Flights, Lost};
use crate::image::record::{self, Corrupt, ObjectRef, Record};
use crate::image::{ImageId, MediaType, Metadata, Representation, Version};
use crate::picture::decode::is_animated;
use crate::settings::{self, ServeOffloaded};
use crate::task::Task;

pub(crate) use self::mover::Mover;
pub(crate) use self::sweep::discard;

/// What is under a name never changes (RFC 8246).
const IMMUTABLE: &str = "public, max-age=31536000, immutable";

/// The object store that images are moved to.
pub struct Offload {
    store: Arc<dyn ObjectStore>,
    /// The part of `url` after the bucket: everything is beneath it.
    folder: Path,
    /// As the settings have it, without a slash at its end. It stands in records, like `public_url`.
    url: String,
    public_url: Option<String>,
    serve: ServeOffloaded,
    timeout: Duration,
    /// A folder keeps no attributes with its files.
    keeps_attributes: bool,
    fetches: Arc<Flights<(ImageId, Version), ObjectFetch>>,
    mover: Arc<Mover>,
    tasks: OnceLock<Vec<Task>>,
}

/// An image that is elsewhere, as its record says.
#[derive(Debug)]
pub struct RemoteImage {
    /// Of the record.
    pub version: Version,
    path: Path,
    /// Where a client may be sent.
    public_url: Option<String>,
    declared_type: Option<MediaType>,
    sha256: Option<[u8; 32]>,
    created_at: Option<SystemTime>,
    /// What is known of the image since it was here.
    pub metadata: OnceLock<Arc<Metadata>>,
}

/// What a fetch from the object store brings to all who wait for it: the image, and how long it took.
type ObjectFetch = Result<(crate::image::Image, crate::cache::Kept, Duration), OffloadError>;

/// Why the object store has no answer, or not the right one. Its text is for the log: it may name hosts.
#[derive(Debug, Clone, thiserror::Error)]
pub enum OffloadError {
    /// There is no such object.
    #[error("the object {0} is gone")]
    Gone(Path),
    /// It is another one than the record says.
    #[error("the object {0} isn't what its record says")]
    Damaged(Path),
    /// It is no image, or too large a one.
    #[error("the object {0}: {1}")]
    Unusable(Path, Corrupt),
    /// The store refused or can't be reached.
    #[error("the object store failed: {0}")]
    Failed(String),
    /// It took too long (`[offload] timeout`).
    #[error("the object store didn't answer in time")]
    TimedOut,
    /// Memory is full of images that are being fetched and sent.
    #[error(transparent)]
    OverBudget(#[from] OverBudget),
    /// The fetch failed in a way that it should not.
    #[error(transparent)]
    Lost(#[from] Lost),
}

impl Offload {
    /// The one that the settings name, if they name one.
    pub fn open(settings: &settings::OffloadSettings) -> anyhow::Result<Option<Offload>> {
        if settings.url.is_empty() {
            return Ok(None);
        }
        crate::store::install_tls_provider();
        let public_url = (!settings.public_url.is_empty())
            .then(|| base("[offload] public_url", &settings.public_url))
            .transpose()?;
        anyhow::ensure!(
            public_url.is_some() || settings.serve == ServeOffloaded::Stream,
            "[offload] serve = \"redirect\" needs public_url"
        );
        let url = base("[offload] url", &settings.url)?;
        let (scheme, store, folder) = open_store(&url, settings).context("[offload] url")?;
        Ok(Some(Offload {
            store,
            folder,
            url,
            public_url,
            serve: settings.serve,
            timeout: settings.timeout,
            keeps_attributes: scheme != ObjectStoreScheme::Local,
            fetches: Arc::default(),
            mover: Arc::default(),
            tasks: OnceLock::new(),
        }))
    }

    /// Begins to move and to sweep for an app, which owns this.
    pub fn start(&self, app: &Arc<App>, settings: &settings::OffloadSettings) {
        let listing =
            mover::list(Arc::downgrade(app), Arc::clone(&self.mover), settings.sweep_interval);
        let mut tasks = vec![
            Task::start("offload list", listing),
            Task::start("offload sweep", sweep::run(Arc::downgrade(app), settings.clone())),
        ];
        for _ in 0..settings.concurrency.get() {
            let work = mover::work(Arc::downgrade(app), Arc::clone(&self.mover));
            tasks.push(Task::start("offload move", work));
        }
        // Whoever starts it twice has it once all the same.
        let _ = self.tasks.set(tasks);
    }

    pub(crate) fn mover(&self) -> &Arc<Mover> {
        &self.mover
    }

    /// Where the image of a record is, if that is beneath one of the two addresses in the settings: no other place is
    /// ever asked, or a client sent there.
    #[must_use]
    pub fn locate(
        &self,
        version: Version,
        record: &Record<'_>,
        elsewhere: &ObjectRef<'_>,
    ) -> Option<RemoteImage> {
        let bases = self.public_url.iter().chain([&self.url]);
        let mut rests =
            bases.filter_map(|base| elsewhere.url.strip_prefix(base)?.strip_prefix('/'));
        // The name alone outlives a change of the public address.
        let rest = elsewhere.object.as_deref().or_else(|| rests.next());
        let rest = rest.filter(|rest| is_plain(rest))?;
        let name = Path::parse(rest).ok()?;
        let public_url = self.public_url.as_ref().map(|base| format!("{base}/{rest}"));
        Some(RemoteImage {
            version,
            path: self.folder.parts().chain(name.parts()).collect(),
            public_url,
            declared_type: record.declared_type.as_deref().and_then(MediaType::named),
            sha256: elsewhere.sha256,
            created_at: record.created_at,
            metadata: OnceLock::new(),
        })
    }

    /// Where a client that wants the image as it is should go, if it should. Not for SVG, which is sent from here, in its
    /// sandbox.
    #[must_use]
    pub fn redirect<'a>(&self, remote: &'a RemoteImage) -> Option<&'a str> {
        let redirects = self.serve == ServeOffloaded::Redirect
            && remote.declared_type.is_some_and(|it| it != MediaType::Svg);
        remote.public_url.as_deref().filter(|_| redirects)
    }

    /// Puts an image where its version belongs, and gives the record that refers to it, made of the one that it was in.
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
        self.put(&path, media_type, bytes).await?;
        self.mover.succeed();
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
        self.in_time(put).await?;
        Ok(())
    }

    /// Waits for the object store, but not for ever.
    async fn in_time<T>(
        &self,
        work: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, OffloadError> {
        match tokio::time::timeout(self.timeout, work).await {
            Ok(Ok(done)) => Ok(done),
            Ok(Err(object_store::Error::NotFound { path, .. })) => {
                Err(OffloadError::Gone(Path::from(path)))
            }
            Ok(Err(error)) => Err(OffloadError::Failed(error.to_string())),
            Err(_elapsed) => Err(OffloadError::TimedOut),
        }
    }
}

/// An image that was put into the object store, and the record that refers to it.
pub(crate) struct Moved {
    pub(crate) value: Bytes,
    /// Of that value.
    pub(crate) version: Version,
}

/// Moves an image on its way into the store: gives the record to be stored in place of the one with the image. Nothing
/// where it stays there: the object store fails, or the record would be too large.
pub(crate) async fn on_write(
    app: &App,
    id: &ImageId,
    record: &Bytes,
    metadata: &Metadata,
    bytes: &Bytes,
) -> Option<Moved> {
    let offload = app.offload.as_ref()?;
    if offload.mover.is_failing() {
        // No writer should wait for what is known to be away.
        return None;
    }
    match offload.upload(id, record, metadata.version, metadata.media_type, bytes).await {
        Ok(moved) => Some(moved).filter(|it| it.value.len() <= app.settings.records.max_value),
        Err(error) => {
            app.metrics.offload_errors.inc();
            tracing::warn!(image.id = %id, %error, "a written image can't be moved yet");
            None
        }
    }
}

/// Keeps an image in memory under the version of the record that refers to it now, so that the next reader doesn't
/// fetch it. SVG is kept by its first reader, who has it compressed.
pub(crate) fn keep(app: &App, id: &ImageId, moved: &Moved, metadata: &Metadata, bytes: Bytes) {
    if metadata.media_type != MediaType::Svg {
        let metadata = metadata.of_version(moved.version);
        let body = app.cache.count(bytes);
        app.cache.insert(id, Representation { metadata: Arc::new(metadata), body }.into());
    }
}

/// An image that is elsewhere: fetched by this request, or together with whoever asked for it before. Tells which.
pub(crate) async fn fetch(
    app: &Arc<App>,
    offload: &Offload,
    id: &ImageId,
    remote: &Arc<RemoteImage>,
) -> (ObjectFetch, bool) {
    let key = (id.clone(), remote.version);
    let (flight, collapsed) = offload.fetches.join(key, || {
        let (app, id, remote) = (Arc::clone(app), id.clone(), Arc::clone(remote));
        async move {
            let Some(offload) = &app.offload else { return Err(OffloadError::Lost(Lost)) };
            let began = Instant::now();
            let fetched = offload.bring(&app, &id, &remote).await;
            if fetched.is_err() {
                app.metrics.offload_errors.inc();
            }
            fetched.map(|(image, kept)| (image, kept, began.elapsed()))
        }
    });
    (flight.outcome().await.unwrap_or_else(|lost| Err(lost.into())), collapsed)
}

impl Offload {
    async fn bring(
        &self,
        app: &Arc<App>,
        id: &ImageId,
        remote: &RemoteImage,
    ) -> Result<(crate::image::Image, crate::cache::Kept), OffloadError> {
        let path = &remote.path;
        let object = self.in_time(self.store.get(path)).await?;
        let (size, limit) = (object.meta.size, app.settings.records.max_value);
        if size > limit as u64 {
            return Err(OffloadError::Unusable(path.clone(), Corrupt::TooLarge { size, limit }));
        }
        let _room = app.reserve(size).await?;
        let bytes = self.in_time(object.bytes()).await?;
        app.metrics.offload_fetches.inc();
        let (path, sha256) = (path.clone(), remote.sha256);
        let (version, created_at) = (remote.version, remote.created_at);
        let checked = crate::read::off_worker(app, bytes.len(), move || {
            if sha256.is_some_and(|it| it != <[u8; 32]>::from(Sha256::digest(&bytes))) {
                return Err(OffloadError::Damaged(path));
            }
            let media_type =
                record::sniffed(&bytes).map_err(|corrupt| OffloadError::Unusable(path, corrupt))?;
            let animated = is_animated(&bytes, media_type);
            let metadata = Metadata::new(version, media_type, bytes.len(), created_at);
            Ok((Metadata { animated, ..metadata }, bytes))
        });
        let (metadata, bytes) = checked.await?;
        // A small one may be a part of a larger buffer of the connection's, which it would keep.
        let body = app.cache.count(Vec::from(bytes));
        let original = Representation { metadata: Arc::new(metadata), body };
        let image = crate::read::with_coded_forms(app, original).await;
        let _ = remote.metadata.set(Arc::clone(&image.original.metadata));
        let kept = app.cache.insert(id, image.clone());
        Ok((image, kept))
    }
}

impl fmt::Debug for Offload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Offload").field(&self.url).finish()
    }
}

/// An address without query, fragment, user or password, and without a slash at its end.
fn base(name: &str, text: &str) -> anyhow::Result<String> {
    let url = Url::parse(text).with_context(|| format!("{name} is no address"))?;
    anyhow::ensure!(
        url.query().is_none() && url.fragment().is_none() && url.password().is_none(),
        "{name} has more than a scheme, a host and a folder"
    );
    let text = text.trim_end_matches('/');
    let rest = text.split_once("://").map(|(_, rest)| rest).unwrap_or_default();
    anyhow::ensure!(
        rest.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._:~-/@".contains(&byte)),
        "{name} may hold only A-Z a-z 0-9 . _ : ~ - / @"
    );
    Ok(text.to_owned())
}

/// Whether a text can stand in an address and in a name of an object as it is.
fn is_plain(text: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_alphanumeric() || b"._:~-/".contains(&byte);
    text.bytes().all(known)
        && text.split('/').all(|part| !part.is_empty() && !part.starts_with('.'))
}

fn parsed(name: &str) -> Result<Path, OffloadError> {
    Path::parse(name).map_err(|error| OffloadError::Failed(error.to_string()))
}

fn open_store(
    url: &str,
    settings: &settings::OffloadSettings,
) -> anyhow::Result<(ObjectStoreScheme, Arc<dyn ObjectStore>, Path)> {
    const EXPECTED: &str = "expected s3://, gs://, az:// or file:///";
    let (scheme, folder) = ObjectStoreScheme::parse(&Url::parse(url)?).context(EXPECTED)?;
    let retry = RetryConfig { retry_timeout: settings.timeout, ..RetryConfig::default() };
    // The three have the same methods, and no trait that says so.
    macro_rules! built {
        ($builder:ty) => {{
            let mut builder = <$builder>::from_env().with_url(url).with_retry(retry);
            for (name, value) in settings.options.iter() {
                let key = name.parse().map_err(|_unknown| {
                    anyhow::anyhow!("`{name}` is no option of this store ([offload] options)")
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
        // What was acknowledged survives a power cut, as in the other stores.
        ObjectStoreScheme::Local => {
            Arc::new(LocalFileSystem::new().with_fsync(true).with_automatic_cleanup(true))
        }
        _ => anyhow::bail!(EXPECTED),
    };
    Ok((scheme, store, folder))
}
