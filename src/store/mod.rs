//! Where records live: Redis, or a database of the program's own. One contract for both.

use std::time::Duration;

use bytes::Bytes;

use crate::image::ImageId;
use crate::settings::Settings;

pub mod embedded;
pub mod redis;

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
/// - Where a value has an expiry, `get` gives the time that is left; past it there is no value.
/// - A value over the limit is refused without being read.
/// - Each method ends within the store's time-outs, and may be cancelled at any await.
#[derive(Debug)]
pub enum Store {
    /// Redis or Valkey.
    Redis(RedisStore),
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

impl Store {
    /// Opens the store that the settings name: Redis where it has an address, the embedded one otherwise.
    ///
    /// A Redis that can't be reached is no error: it may come back at any time.
    pub async fn open(settings: &Settings) -> anyhow::Result<Store> {
        match settings.redis.url.get() {
            Some(url) => Ok(Store::Redis(RedisStore::open(url, settings)?)),
            None => Ok(Store::Embedded(EmbeddedStore::open(settings).await?)),
        }
    }

    /// The value of an image.
    pub async fn get(&self, id: &ImageId) -> Result<Option<Stored>, StoreError> {
        match self {
            Store::Redis(store) => store.get(id).await,
            Store::Embedded(store) => store.get(id).await,
        }
    }

    /// Writes a value that lives for `time_to_live`, or for ever. Tells whether the key was there before.
    pub async fn put(
        &self,
        id: &ImageId,
        value: Bytes,
        time_to_live: Option<Duration>,
    ) -> Result<Replaced, StoreError> {
        match self {
            Store::Redis(store) => store.put(id, value, time_to_live).await,
            Store::Embedded(store) => store.put(id, value, time_to_live).await,
        }
    }

    /// Asks whether the store answers.
    pub async fn ping(&self) -> Result<(), StoreError> {
        match self {
            Store::Redis(store) => store.ping().await,
            Store::Embedded(_) => Ok(()),
        }
    }
}

/// What stood under a key before a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replaced {
    /// Nothing.
    Nothing,
    /// A value that had not expired.
    Value,
}
