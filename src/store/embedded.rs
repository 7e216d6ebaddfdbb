//! The store in a database file of the program's own, for machines without Redis.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use bytes::Bytes;
use etcetera::AppStrategy;
use redb::{
    Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction,
};
use tokio::task::JoinHandle;

use super::{Replaced, StoreError, Stored};
use crate::image::ImageId;
use crate::settings::Settings;

/// Key → expiry in milliseconds since 1970 (8 bytes, big-endian; 0 for never), then the value.
const RECORDS: TableDefinition<&str, &[u8]> = TableDefinition::new("records");

/// (expiry, key), in the order in which they expire. Every record that expires has one entry.
const EXPIRIES: TableDefinition<(u64, &str), ()> = TableDefinition::new("expiries");

const HEADER: usize = 8;
const NEVER: u64 = 0;

/// What redb may keep of the file in memory. Decoded images are cached elsewhere.
const PAGE_CACHE_BYTES: usize = 16 * 1024 * 1024;

/// How many expired records one transaction removes, so that a write never waits long behind it.
const SWEEP_BATCH: usize = 256;

/// Records in a redb database.
///
/// A `put` is on the disk when it returns: redb ends each transaction with an fsync, so neither `kill
/// -9` nor a power cut takes back what was acknowledged. Space of removed records is used again; the
/// file gives back what it can at each opening.
#[derive(Debug)]
pub struct EmbeddedStore {
    database: Arc<Database>,
    path: PathBuf,
    key_prefix: String,
    max_value: usize,
    new: bool,
    sweeper: JoinHandle<()>,
}

/// Why the store can't be opened, where a caller has another way.
#[derive(Debug, thiserror::Error)]
#[error("the store {} is in use by another process, such as a running afterimage", .0.display())]
pub struct InUse(pub PathBuf);

impl EmbeddedStore {
    /// Opens the database in the data directory, and makes both where they are missing.
    pub async fn open(settings: &Settings) -> anyhow::Result<EmbeddedStore> {
        let dir = data_dir(&settings.embedded.dir)?;
        let path = dir.join("records.redb");
        let (database, new) = {
            let path = path.clone();
            tokio::task::spawn_blocking(move || open_database(&dir, &path)).await??
        };
        let database = Arc::new(database);
        let sweeper =
            tokio::spawn(sweep(Arc::downgrade(&database), settings.embedded.sweep_interval));
        Ok(EmbeddedStore {
            database,
            path,
            key_prefix: settings.records.key_prefix.clone(),
            max_value: settings.records.max_value,
            new,
            sweeper,
        })
    }

    /// Whether this opening made the database.
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.new
    }

    /// Where the database is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) async fn get(&self, id: &ImageId) -> Result<Option<Stored>, StoreError> {
        let (key, limit) = (self.key(id), self.max_value);
        self.blocking(move |database| {
            let records = database.begin_read()?.open_table(RECORDS)?;
            let Some(record) = records.get(key.as_str())? else {
                return Ok(Ok(None));
            };
            let (expiry, value) = split(record.value());
            let now = now();
            Ok(if expiry != NEVER && expiry <= now {
                Ok(None)
            } else if value.len() > limit {
                Err(StoreError::TooLarge { size: value.len() as u64, limit })
            } else {
                let time_to_live = (expiry != NEVER).then(|| Duration::from_millis(expiry - now));
                Ok(Some(Stored { value: Bytes::copy_from_slice(value), time_to_live }))
            })
        })
        .await?
    }

    pub(super) async fn put(
        &self,
        id: &ImageId,
        value: Bytes,
        time_to_live: Option<Duration>,
    ) -> Result<Replaced, StoreError> {
        let key = self.key(id);
        self.blocking(move |database| {
            let now = now();
            let expiry = time_to_live.map_or(NEVER, |time_to_live| {
                let millis = u64::try_from(time_to_live.as_millis()).unwrap_or(u64::MAX);
                now.saturating_add(millis.max(1))
            });
            let transaction = begin_write(database)?;
            let before = remove(&transaction, &key)?;
            {
                let mut records = transaction.open_table(RECORDS)?;
                let mut slot = records.insert_reserve(key.as_str(), HEADER + value.len())?;
                slot.as_mut()[..HEADER].copy_from_slice(&expiry.to_be_bytes());
                slot.as_mut()[HEADER..].copy_from_slice(&value);
            }
            if expiry != NEVER {
                transaction.open_table(EXPIRIES)?.insert((expiry, key.as_str()), ())?;
            }
            transaction.commit()?;
            Ok(match before {
                Some(expiry) if expiry == NEVER || expiry > now => Replaced::Value,
                _ => Replaced::Nothing,
            })
        })
        .await
    }

    fn key(&self, id: &ImageId) -> String {
        format!("{}{id}", self.key_prefix)
    }

    /// Runs a transaction where it may block.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error> + Send + 'static,
    ) -> Result<T, StoreError> {
        let database = Arc::clone(&self.database);
        tokio::task::spawn_blocking(move || work(&database))
            .await
            .map_err(|error| StoreError::Unreachable(error.to_string()))?
            .map_err(|error| StoreError::Unreachable(error.to_string()))
    }
}

impl Drop for EmbeddedStore {
    fn drop(&mut self) {
        self.sweeper.abort();
    }
}

fn open_database(dir: &Path, path: &Path) -> anyhow::Result<(Database, bool)> {
    std::fs::create_dir_all(dir).with_context(|| format!("{} can't be made", dir.display()))?;
    let mut builder = Database::builder();
    builder.set_cache_size(PAGE_CACHE_BYTES);
    let mut database = builder.create(path).map_err(|error| match error {
        DatabaseError::DatabaseAlreadyOpen => anyhow::Error::new(InUse(path.to_owned())),
        error => anyhow::Error::new(error)
            .context(format!("the store {} can't be opened", path.display())),
    })?;
    let transaction = begin_write(&database)?;
    let new = transaction.list_tables()?.next().is_none();
    transaction.open_table(RECORDS)?;
    transaction.open_table(EXPIRIES)?;
    transaction.commit()?;
    while remove_expired(&database)? == SWEEP_BATCH {}
    // Only here has nobody else the database, as compacting needs. It moves pages from the end into
    // the gaps and cuts the file.
    database.compact().context("the store can't be compacted")?;
    Ok((database, new))
}

/// The platform's own place for application data, where the settings name none.
fn data_dir(dir: &Path) -> anyhow::Result<PathBuf> {
    if !dir.as_os_str().is_empty() {
        return Ok(dir.to_owned());
    }
    let strategy = etcetera::choose_app_strategy(etcetera::AppStrategyArgs {
        top_level_domain: "org".to_owned(),
        author: "afterimage".to_owned(),
        app_name: "afterimage".to_owned(),
    })
    .context("there is no home directory: give [embedded] dir, or [redis] url")?;
    Ok(strategy.data_dir())
}

/// With quick repair, opening after a crash takes milliseconds however large the file is.
fn begin_write(database: &Database) -> Result<WriteTransaction, redb::Error> {
    let mut transaction = database.begin_write()?;
    transaction.set_quick_repair(true);
    Ok(transaction)
}

/// Takes a record out with its entry among the expiries; gives the expiry that it had.
fn remove(transaction: &WriteTransaction, key: &str) -> Result<Option<u64>, redb::Error> {
    let mut records = transaction.open_table(RECORDS)?;
    let expiry = records.remove(key)?.map(|record| split(record.value()).0);
    if let Some(expiry) = expiry.filter(|expiry| *expiry != NEVER) {
        transaction.open_table(EXPIRIES)?.remove((expiry, key))?;
    }
    Ok(expiry)
}

/// Removes up to [`SWEEP_BATCH`] expired records and tells how many there were.
fn remove_expired(database: &Database) -> Result<usize, redb::Error> {
    let due: Vec<String> = {
        let expiries = database.begin_read()?.open_table(EXPIRIES)?;
        expiries
            .range(..(now(), ""))?
            .take(SWEEP_BATCH)
            .map(|entry| entry.map(|(key, _)| key.value().1.to_owned()))
            .collect::<Result<_, _>>()?
    };
    if due.is_empty() {
        return Ok(0);
    }
    let transaction = begin_write(database)?;
    for key in &due {
        // Written again since the look above, it may have a new life.
        let expired = {
            let records = transaction.open_table(RECORDS)?;
            let record = records.get(key.as_str())?;
            record.is_some_and(
                |record| matches!(split(record.value()).0, e if e != NEVER && e <= now()),
            )
        };
        if expired {
            remove(&transaction, key)?;
        }
    }
    transaction.commit()?;
    Ok(due.len())
}

/// Removes what expired, until the store is dropped.
async fn sweep(database: Weak<Database>, every: Duration) {
    let mut interval = tokio::time::interval(every);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let Some(database) = database.upgrade() else {
            return;
        };
        match tokio::task::spawn_blocking(move || remove_expired(&database)).await {
            Ok(Ok(0)) => {}
            Ok(Ok(count)) => tracing::debug!(count, "expired records removed"),
            Ok(Err(error)) => tracing::error!(%error, "expired records can't be removed"),
            Err(error) => tracing::error!(%error, "removing expired records failed"),
        }
    }
}

fn split(record: &[u8]) -> (u64, &[u8]) {
    match record.split_first_chunk::<HEADER>() {
        Some((expiry, value)) => (u64::from_be_bytes(*expiry), value),
        None => (NEVER, record),
    }
}

/// Milliseconds since 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
