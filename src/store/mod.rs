//! Stores of records: Redis, or a database of the program's own. One contract holds for both.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::clock::Clock;
use crate::image::ImageId;
use crate::settings::Settings;

mod advice;
mod bulk;
mod change;
mod condition;
mod connection;
mod connector;
mod database;
mod database_file;
pub(crate) mod embedded;
mod error;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod redis;
mod server;
#[cfg(test)]
mod simulation;
mod standing;
mod tracking;

pub use self::change::{Change, ChangeListener, Coherence, Lease};
pub use self::condition::{Condition, Expiry, Replaced, ValuePredicate, Written};
use self::embedded::EmbeddedStore;
pub use self::error::StoreError;
use self::redis::RedisStore;

/// A store of records.
///
/// # The contract
///
/// `tests/it/stores.rs` holds both stores to it.
///
/// - Every `get` after a `put` returns the same bytes, until the time to live has passed or the value is replaced or
///   removed. A `put` replaces value and expiry at once.
/// - Conditional writes are atomic: no other write happens between check and write; of several racing writes with the
///   same condition exactly one succeeds.
/// - If a value has an expiry, `get` returns the time that is left; past it there is no value.
/// - A value over the size limit is refused and never returned.
/// - A watched store announces every change: between [`Change::TrackingStarted`] and [`Change::TrackingLost`], each
///   write, removal and expiry of a key is announced after it happened, in order, whoever made it.
/// - Each method may be cancelled at any await: a write is then made or not, never by half. Over a network it ends
///   within the store's timeouts.
#[derive(Debug)]
pub enum Store {
    /// Redis or Valkey.
    Redis(Box<RedisStore>),
    /// A database file in the data directory.
    Embedded(EmbeddedStore),
}

/// Most keys that one part of a listing looks at. One `SCAN` of as many holds up other commands for about a millisecond.
pub const LISTED_KEYS: usize = 1000;

/// A value and its remaining time to live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// The record, as written.
    pub value: Bytes,
    /// Time until it expires; `None` if it never does.
    pub time_to_live: Option<Duration>,
}

impl Stored {
    /// A value with the answer to `PTTL`: -1 for a key without expiry, -2 for a key that is gone since.
    fn with_pttl(value: Bytes, pttl: i64) -> Stored {
        Stored { value, time_to_live: time_to_live(pttl) }
    }
}

/// Reads the answer to `PTTL`, of a key that was there just before.
fn time_to_live(pttl: i64) -> Option<Duration> {
    match pttl {
        -1 => None,
        // Gone: it expired between the two.
        ..-1 => Some(Duration::ZERO),
        0.. => Some(Duration::from_millis(pttl.unsigned_abs())),
    }
}

/// Position from which a listing goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor(String);

impl Cursor {
    /// Parses a position that was handed out as text. Another text is no error: it leads to some other part, or to none.
    #[must_use]
    pub fn parse(text: &str) -> Cursor {
        Cursor(text.to_owned())
    }

    /// The position as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The size of a value and its remaining time to live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredSize {
    /// The bytes of the record; `None` for a key of another type than a string.
    pub bytes: Option<u64>,
    /// Time until it expires; `None` if it never does.
    pub time_to_live: Option<Duration>,
}

/// Part of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// The ids. Keys that aren't a valid id are left out.
    pub ids: Vec<ImageId>,
    /// Position of the next part; `None` after the last.
    pub next: Option<Cursor>,
}

impl Store {
    /// Opens the store that the settings name: Redis if it has an address, the embedded store otherwise.
    ///
    /// An unreachable Redis is not an error: it may come back at any time.
    pub async fn open(settings: &Settings) -> anyhow::Result<Store> {
        match settings.redis.url.get() {
            Some(url) => {
                let store = RedisStore::open(url, settings)?;
                store.refuse_cluster().await?;
                Ok(Store::Redis(Box::new(store)))
            }
            None => Ok(Store::Embedded(EmbeddedStore::open(settings).await?)),
        }
    }

    /// Announces changes from now on. Call it once, before the store is shared.
    pub fn watch(&mut self, clock: Clock, listener: ChangeListener) {
        match self {
            Store::Redis(store) => store.watch(clock, listener),
            Store::Embedded(store) => store.watch(listener),
        }
    }

    /// Returns the size of an image's value in bytes, so that memory can be reserved for it; 0 if there is none.
    pub async fn size(&self, id: &ImageId) -> Result<u64, StoreError> {
        match self {
            Store::Redis(store) => store.size(id).await,
            Store::Embedded(store) => store.size(id).await,
        }
    }

    /// Returns the value of an image. The size that [`Store::size`] returned only decides over which connection it is
    /// fetched.
    pub async fn get(&self, id: &ImageId, size: u64) -> Result<Option<Stored>, StoreError> {
        match self {
            Store::Redis(store) => store.get(id, size).await,
            Store::Embedded(store) => store.get(id).await,
        }
    }

    /// Writes a value if the condition holds.
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

    /// True if an unconditional write of a large value makes no copy of it.
    #[must_use]
    pub fn sends_in_place(&self) -> bool {
        match self {
            Store::Redis(store) => store.sends_in_place(),
            Store::Embedded(_) => false,
        }
    }

    /// Removes a value if the condition holds.
    pub async fn remove(&self, id: &ImageId, condition: &Condition) -> Result<Written, StoreError> {
        match self {
            Store::Redis(store) => store.remove(id, condition).await,
            Store::Embedded(store) => store.remove(id, condition).await,
        }
    }

    /// Lists some of the ids that begin with a text, from the position at which an earlier part ended. An id that is
    /// present during the whole listing appears at least once; the order is undefined. About `count` keys are looked at,
    /// [`LISTED_KEYS`] at most.
    pub async fn list(
        &self,
        beginning: &str,
        from: Option<Cursor>,
        count: usize,
    ) -> Result<Page, StoreError> {
        let count = count.clamp(1, LISTED_KEYS);
        match self {
            Store::Redis(store) => store.list(beginning, from, count).await,
            Store::Embedded(store) => store.list(beginning, from, count).await,
        }
    }

    /// Returns the sizes of some images' values, in their order, `None` for those that have none. Reads no value.
    pub async fn sizes(&self, ids: &[ImageId]) -> Result<Vec<Option<StoredSize>>, StoreError> {
        match self {
            Store::Redis(store) => store.sizes(ids).await,
            Store::Embedded(store) => store.sizes(ids).await,
        }
    }

    /// Checks that the store answers.
    pub async fn ping(&self) -> Result<(), StoreError> {
        match self {
            Store::Redis(store) => store.ping().await,
            Store::Embedded(store) => store.ping().await,
        }
    }

    /// Returns the reason why the last write failed because of the store's own disk; `None` once one has succeeded. Costs
    /// nothing.
    #[must_use]
    pub fn write_failure(&self) -> Option<Arc<str>> {
        match self {
            // A Redis that can't be written says so to each write.
            Store::Redis(_) => None,
            Store::Embedded(store) => store.write_failure(),
        }
    }
}

/// Installs the TLS provider that the clients of Redis and of object stores require from the process. An error means that
/// one is installed already, which is as good.
pub(crate) fn install_tls_provider() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_expires_between_get_and_pttl_has_expired() {
        let time_to_live = |pttl| Stored::with_pttl(Bytes::new(), pttl).time_to_live;
        assert_eq!(time_to_live(-2), Some(Duration::ZERO));
        assert_eq!(time_to_live(-1), None);
        assert_eq!(time_to_live(1500), Some(Duration::from_millis(1500)));
    }
}
