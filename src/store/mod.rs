//! Where records live: Redis, or a database of the program's own. One contract for both.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use crate::image::ImageId;
use crate::settings::Settings;

mod bulk;
mod connection;
pub mod embedded;
pub mod redis;
mod tracking;

use self::embedded::EmbeddedStore;
use self::redis::RedisStore;

/// A store of records.
///
/// # The contract
///
/// `tests/it/stores.rs` holds both stores to it.
///
/// - What was put is read back byte for byte by every later `get`, until its time to live has passed, it
///   is replaced or it is removed. A `put` replaces value and expiry at once.
/// - A condition is looked at and the write made as one: nobody else's write comes between the two, and of several that
///   make the same thing their condition one alone is made.
/// - Where a value has an expiry, `get` gives the time that is left; past it there is no value.
/// - A value over the limit is refused, and not handed out.
/// - A watched store tells of every change: after [`Change::TrackingStarted`] and until [`Change::TrackingLost`], each write,
///   removal and expiry of a key is announced after it happened, in order, whoever caused it.
/// - Each method may be cancelled at any await: a write is then done or not, and never by half. Over a network
///   it ends within the store's time-outs.
#[derive(Debug)]
pub enum Store {
    /// Redis or Valkey.
    Redis(Box<RedisStore>),
    /// A database file in the data directory.
    Embedded(EmbeddedStore),
}

/// A value and what is left of its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// The record, as written.
    pub value: Bytes,
    /// Until it expires; `None` where it never does.
    pub time_to_live: Option<Duration>,
}

impl Stored {
    /// What Redis says of a value that was there: PTTL is -1 for a key without expiry, and -2 for one that is gone since.
    fn of(value: Bytes, pttl: i64) -> Stored {
        Stored { value, time_to_live: u64::try_from(pttl).ok().map(Duration::from_millis) }
    }
}

/// Why a store has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// No connection, or one that broke.
    #[error("the store can't be reached: {0}")]
    Unreachable(String),
    /// Connected, but no answer in time.
    #[error("the store didn't answer in time")]
    TimedOut,
    /// The store answered with an error of its own: loading, no permission, out of memory.
    #[error("the store refused: {0}")]
    Refused(String),
    /// The key holds something else than a string.
    #[error("the key doesn't hold a string")]
    WrongType,
    /// The value is larger than may be read. It was not.
    #[error("the value has {size} bytes, the limit is {limit}")]
    TooLarge {
        /// In bytes.
        size: u64,
        /// In bytes.
        limit: usize,
    },
}

impl StoreError {
    /// The kinds that are counted: what a record is refused for says nothing of the store.
    pub const KINDS: [&'static str; 3] = ["unreachable", "timeout", "refused"];

    /// Its kind in one word, if it is one of those.
    #[must_use]
    pub fn kind(&self) -> Option<&'static str> {
        let [unreachable, timeout, refused] = StoreError::KINDS;
        match self {
            StoreError::Unreachable(_) => Some(unreachable),
            StoreError::TimedOut => Some(timeout),
            StoreError::Refused(_) => Some(refused),
            StoreError::WrongType | StoreError::TooLarge { .. } => None,
        }
    }
}

impl Store {
    /// Opens the store that the settings name: Redis where it has an address, the embedded one otherwise.
    ///
    /// A Redis that can't be reached is no error: it may come back at any time.
    pub async fn open(settings: &Settings) -> anyhow::Result<Store> {
        match settings.redis.url.get() {
            Some(url) => Ok(Store::Redis(Box::new(RedisStore::open(url, settings)?))),
            None => Ok(Store::Embedded(EmbeddedStore::open(settings).await?)),
        }
    }

    /// Tells of changes from now on. To be called once, before the store is shared.
    pub fn watch(&mut self, listener: ChangeListener) {
        match self {
            Store::Redis(store) => store.watch(listener),
            Store::Embedded(store) => store.watch(listener),
        }
    }

    /// How many bytes the value of an image has, so that room can be made for it; 0 where there is none.
    pub async fn size(&self, id: &ImageId) -> Result<u64, StoreError> {
        match self {
            Store::Redis(store) => store.size(id).await,
            Store::Embedded(store) => store.size(id).await,
        }
    }

    /// The value of an image, which had so many bytes when it was asked for its size: how it is fetched depends on that,
    /// and nothing else does.
    pub async fn get(&self, id: &ImageId, size: u64) -> Result<Option<Stored>, StoreError> {
        match self {
            Store::Redis(store) => store.get(id, size).await,
            Store::Embedded(store) => store.get(id).await,
        }
    }

    /// Writes a value, if the condition holds.
    pub async fn put(
        &self,
        id: &ImageId,
        value: Bytes,
        expiry: Expiry,
        condition: &Condition,
    ) -> Result<Written, StoreError> {
        match self {
            Store::Redis(store) => store.put(id, value, expiry, condition).await,
            Store::Embedded(store) => store.put(id, value, expiry, condition).await,
        }
    }

    /// Removes a value, if the condition holds.
    pub async fn remove(&self, id: &ImageId, condition: &Condition) -> Result<Written, StoreError> {
        match self {
            Store::Redis(store) => store.remove(id, condition).await,
            Store::Embedded(store) => store.remove(id, condition).await,
        }
    }

    /// Some of the ids that begin with a text, from where a listing before it ended. One that is there from the
    /// beginning of a listing to its end is in it at least once; in no order.
    pub async fn list(&self, beginning: &str, from: Option<Cursor>) -> Result<Page, StoreError> {
        match self {
            Store::Redis(store) => store.list(beginning, from).await,
            Store::Embedded(store) => store.list(beginning, from).await,
        }
    }

    /// Asks whether the store answers.
    pub async fn ping(&self) -> Result<(), StoreError> {
        match self {
            Store::Redis(store) => store.ping().await,
            Store::Embedded(store) => store.ping().await,
        }
    }
}

/// When a written value expires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// After this time.
    In(Duration),
    /// Never.
    Never,
    /// With the value that it replaces.
    Kept,
    /// After this time, or with the value that it replaces, whichever is later.
    AtLeast(Duration),
}

/// On what a write depends.
///
/// A value that may not be read, since it is too large or no string, is there all the same: to a condition on what is
/// there it is empty.
#[derive(Clone)]
pub enum Condition {
    /// Nothing.
    Always,
    /// There is no value.
    Absent,
    /// There is one.
    Present,
    /// What is there, if anything, is as this says. It may take milliseconds.
    Is(Arc<Is>),
}

/// What a [`Condition`] says of a value.
pub type Is = dyn Fn(Option<&[u8]>) -> bool + Send + Sync;

impl Condition {
    /// A condition on what is there.
    pub fn is(condition: impl Fn(Option<&[u8]>) -> bool + Send + Sync + 'static) -> Condition {
        Condition::Is(Arc::new(condition))
    }

    /// Whether it holds of what is there.
    pub(crate) fn holds(&self, value: Option<&[u8]>) -> bool {
        match self {
            Condition::Always => true,
            Condition::Absent => value.is_none(),
            Condition::Present => value.is_some(),
            Condition::Is(condition) => condition(value),
        }
    }
}

impl fmt::Debug for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Condition::Always => "Always",
            Condition::Absent => "Absent",
            Condition::Present => "Present",
            Condition::Is(_) => "Is(..)",
        })
    }
}

/// What became of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// It is done.
    Done(Replaced),
    /// Its condition doesn't hold, and nothing is changed.
    ConditionFailed,
}

/// Where a listing goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor(String);

/// A part of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Keys that no id can name are left out.
    pub ids: Vec<ImageId>,
    /// None where it was the last part.
    pub next: Option<Cursor>,
}

/// Installs the provider that the clients of Redis and of object stores ask the process for, and panic without. An
/// error means that one is installed, which is as good.
pub(crate) fn install_tls_provider() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// What stood under a key before a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replaced {
    /// Nothing.
    Nothing,
    /// A value that had not expired.
    Value,
}

/// How far a store can be relied upon to tell of changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Coherence {
    /// Every change is told: what is known is current until then.
    Coherent,
    /// It answers, but doesn't tell, for this reason: it has to be asked each time.
    Unverified(Arc<str>),
    /// It doesn't answer, for this reason.
    Unreachable(Arc<str>),
}

impl Coherence {
    /// The names of all states.
    pub const NAMES: [&'static str; 3] = ["coherent", "unverified", "unreachable"];

    /// Its name, for people and machines.
    #[must_use]
    pub fn name(&self) -> &'static str {
        let [coherent, unverified, unreachable] = Coherence::NAMES;
        match self {
            Coherence::Coherent => coherent,
            Coherence::Unverified(_) => unverified,
            Coherence::Unreachable(_) => unreachable,
        }
    }

    /// Why it isn't coherent.
    #[must_use]
    pub fn reason(&self) -> Option<&str> {
        match self {
            Coherence::Coherent => None,
            Coherence::Unverified(reason) | Coherence::Unreachable(reason) => Some(reason),
        }
    }
}

/// What a watched store tells.
#[derive(Debug, Clone)]
pub enum Change {
    /// From now on every change is told, over the connection with this number. Numbers only grow.
    TrackingStarted {
        /// Counted from 1.
        connection: u64,
        /// For how long.
        lease: Lease,
    },
    /// Every change up to now has been told over this connection.
    Heartbeat {
        /// Its number.
        connection: u64,
        /// For how long that may be relied upon.
        lease: Lease,
        /// How long the store took to say so.
        round_trip: Duration,
    },
    /// While nothing is told: whether the store answers at all.
    Probed(Coherence),
    /// From now on nothing is told over this connection.
    TrackingLost {
        /// Its number.
        connection: u64,
        /// When it was last certain that everything had been told.
        last_heard: Instant,
        /// What is left.
        coherence: Coherence,
    },
    /// This key was written, removed or has expired.
    Invalidated(ImageId),
    /// Any key may have been.
    Flushed,
}

/// For how long it may be relied upon that changes are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lease {
    /// They are made in this process.
    Endless,
    /// Until then, unless there is a new sign of life.
    Until(Instant),
}

/// Where a store tells of changes: one door for every store. It must not block.
#[derive(Clone)]
pub struct ChangeListener(Arc<dyn Fn(Change) + Send + Sync>);

impl ChangeListener {
    /// Announces to a function.
    pub fn new(apply: impl Fn(Change) + Send + Sync + 'static) -> ChangeListener {
        ChangeListener(Arc::new(apply))
    }

    fn notify(&self, change: Change) {
        (self.0)(change);
    }
}

impl fmt::Debug for ChangeListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChangeListener")
    }
}
