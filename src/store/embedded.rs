//! The embedded store: a database file of the program's own, for machines without Redis.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use bytes::Bytes;
use etcetera::AppStrategy;
use redb::{
    Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction,
};

use super::{
    Change, ChangeListener, Condition, Cursor, Expiry, Lease, Page, Replaced, StoreError, Stored,
    Written,
};
use crate::image::ImageId;
use crate::settings::Settings;
use crate::task::Task;

/// Key → expiry in milliseconds since 1970 (8 bytes, big-endian; 0 for never), then the value.
const RECORDS: TableDefinition<&str, &[u8]> = TableDefinition::new("records");

/// (expiry, key), in order of expiry. Every record that expires has one entry.
const EXPIRIES: TableDefinition<(u64, &str), ()> = TableDefinition::new("expiries");

/// Marks of things done once to this database.
const MARKS: TableDefinition<&str, ()> = TableDefinition::new("marks");

const HEADER: usize = 8;
const NEVER: u64 = 0;

/// Memory that redb may use for pages of the file. Decoded images are cached elsewhere.
const PAGE_CACHE_BYTES: usize = 16 * 1024 * 1024;

/// Smallest file that is worth compacting.
const COMPACTED_FROM: u64 = 8 * 1024 * 1024;

/// Most expired records that one transaction removes, so that a write never waits long behind it.
const SWEEP_BATCH: usize = 256;

/// Records in a redb database.
///
/// A `put` is on the disk when it returns: redb ends each transaction with an fsync, so neither `kill -9` nor a power cut
/// undoes an acknowledged write. The space of removed records is reused; a file that is mostly empty is compacted when
/// it is opened.
#[derive(Debug)]
pub struct EmbeddedStore {
    database: Arc<Database>,
    path: PathBuf,
    key_prefix: String,
    max_value: usize,
    sweep_interval: Duration,
    listener: Option<ChangeListener>,
    sweeper: Option<Task>,
}

/// Another process has the store open, which can be asked to write.
#[derive(Debug, thiserror::Error)]
#[error("the store {} is in use by another process, such as a running afterimage", .0.display())]
pub(crate) struct InUse(pub PathBuf);

impl EmbeddedStore {
    /// Opens the database in the data directory; creates both if they are missing.
    pub async fn open(settings: &Settings) -> anyhow::Result<EmbeddedStore> {
        let dir = data_dir(&settings.embedded.dir)?;
        let path = dir.join("records.redb");
        let database = {
            let path = path.clone();
            tokio::task::spawn_blocking(move || open_database(&dir, &path)).await??
        };
        Ok(EmbeddedStore {
            database: Arc::new(database),
            path,
            key_prefix: settings.records.key_prefix.clone(),
            max_value: settings.records.max_value,
            sweep_interval: settings.embedded.sweep_interval,
            listener: None,
            sweeper: None,
        })
    }

    /// Every change is made in this process, and is announced by the thread that made it: a caller that stops waiting
    /// suppresses no announcement.
    pub(super) fn watch(&mut self, listener: ChangeListener) {
        listener.notify(Change::TrackingStarted { connection: 1, lease: Lease::Endless });
        let database = Arc::downgrade(&self.database);
        let sweeper =
            Sweeper { database, key_prefix: self.key_prefix.clone(), listener: listener.clone() };
        self.sweeper = Some(Task::start("sweeper", sweeper.run(self.sweep_interval)));
        self.listener = Some(listener);
    }

    pub(super) async fn size(&self, id: &ImageId) -> Result<u64, StoreError> {
        let (key, limit) = (self.key(id), self.max_value);
        self.blocking(move |database| {
            let records = database.begin_read()?.open_table(RECORDS)?;
            let record = records.get(key.as_str())?;
            let size = record.map_or(0, |record| match split(record.value()) {
                (expiry, _) if expiry != NEVER && expiry <= now() => 0,
                (_, value) => value.len(),
            });
            Ok(if size > limit {
                Err(StoreError::TooLarge { size: size as u64, limit })
            } else {
                Ok(size as u64)
            })
        })
        .await?
    }

    /// Marks the database as started; returns true the first time.
    pub(crate) async fn is_first_start(&self) -> Result<bool, StoreError> {
        self.blocking(|database| {
            let transaction = begin_write(database)?;
            let first = transaction.open_table(MARKS)?.insert("started", ())?.is_none();
            transaction.commit()?;
            Ok(first)
        })
        .await
    }

    /// Writes a mark, since a disk that was full for a moment leaves a database that can only be read.
    pub(super) async fn ping(&self) -> Result<(), StoreError> {
        self.blocking(|database| {
            let transaction = begin_write(database)?;
            transaction.open_table(MARKS)?.insert("pinged", ())?;
            Ok(transaction.commit()?)
        })
        .await
    }

    /// The path of the database file.
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
        expiry: Expiry,
        condition: &Condition,
    ) -> Result<Written, StoreError> {
        self.change(id, condition, move |transaction, key, before| {
            let after = |time_to_live: Duration| {
                let millis = u64::try_from(time_to_live.as_millis()).unwrap_or(u64::MAX);
                now().saturating_add(millis.max(1))
            };
            let expiry = match (expiry, before) {
                (Expiry::Never, _)
                | (Expiry::Kept, None)
                | (Expiry::Kept | Expiry::AtLeast(_), Some(NEVER)) => NEVER,
                (Expiry::Kept, Some(before)) => before,
                (Expiry::AtLeast(time_to_live), Some(before)) => after(time_to_live).max(before),
                (Expiry::In(time_to_live) | Expiry::AtLeast(time_to_live), _) => {
                    after(time_to_live)
                }
            };
            let mut records = transaction.open_table(RECORDS)?;
            let mut slot = records.insert_reserve(key, HEADER + value.len())?;
            slot.as_mut()[..HEADER].copy_from_slice(&expiry.to_be_bytes());
            slot.as_mut()[HEADER..].copy_from_slice(&value);
            if expiry != NEVER {
                transaction.open_table(EXPIRIES)?.insert((expiry, key), ())?;
            }
            Ok(())
        })
        .await
    }

    pub(super) async fn remove(
        &self,
        id: &ImageId,
        condition: &Condition,
    ) -> Result<Written, StoreError> {
        self.change(id, condition, |_transaction, _key, _before| Ok(())).await
    }

    /// Removes a record if the condition holds, and lets `put` write in its place. redb has one write transaction at a time,
    /// so check and write are atomic.
    async fn change(
        &self,
        id: &ImageId,
        condition: &Condition,
        put: impl FnOnce(&WriteTransaction, &str, Option<u64>) -> Result<(), redb::Error>
        + Send
        + 'static,
    ) -> Result<Written, StoreError> {
        let (key, id, listener) = (self.key(id), id.clone(), self.listener.clone());
        let (condition, limit) = (condition.clone(), self.max_value);
        let value_fits = move |value: &[u8]| value.len() <= limit;
        self.blocking(move |database| {
            let transaction = begin_write(database)?;
            let (holds, before) = {
                let records = transaction.open_table(RECORDS)?;
                let record = records.get(key.as_str())?;
                let present = record.as_ref().map(|record| split(record.value()));
                let present = present.filter(|(expiry, _)| *expiry == NEVER || *expiry > now());
                let readable = |(_, value): (u64, _)| if value_fits(value) { value } else { &[] };
                (condition.holds(present.map(readable)), present.map(|(expiry, _)| expiry))
            };
            if !holds {
                transaction.abort()?;
                return Ok(Written::ConditionFailed);
            }
            remove(&transaction, &key)?;
            put(&transaction, &key, before)?;
            transaction.commit()?;
            if let Some(listener) = listener {
                listener.notify(Change::Invalidated(id));
            }
            Ok(Written::Done(match before {
                Some(_) => Replaced::Value,
                None => Replaced::Nothing,
            }))
        })
        .await
    }

    pub(super) async fn list(
        &self,
        beginning: &str,
        from: Option<Cursor>,
    ) -> Result<Page, StoreError> {
        /// Records visited for one part of a listing.
        const VISITED_RECORDS: usize = 1000;
        let prefix_length = self.key_prefix.len();
        let beginning = format!("{}{beginning}", self.key_prefix);
        self.blocking(move |database| {
            let records = database.begin_read()?.open_table(RECORDS)?;
            let from = from.map_or_else(|| beginning.clone(), |cursor| cursor.0);
            let (mut ids, mut next, now) = (Vec::new(), None, now());
            for (number, record) in records.range(from.as_str()..)?.enumerate() {
                let (key, record) = record?;
                let key = key.value();
                if !key.starts_with(&beginning) {
                    break;
                }
                if number == VISITED_RECORDS {
                    next = Some(Cursor(key.to_owned()));
                    break;
                }
                let (expiry, _) = split(record.value());
                if let Ok(id) = ImageId::parse(&key[prefix_length..])
                    && (expiry == NEVER || expiry > now)
                {
                    ids.push(id);
                }
            }
            Ok(Page { ids, next })
        })
        .await
    }

    fn key(&self, id: &ImageId) -> String {
        format!("{}{id}", self.key_prefix)
    }

    /// Runs a transaction on a thread that may block.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Database) -> Result<T, redb::Error> + Send + 'static,
    ) -> Result<T, StoreError> {
        let database = Arc::clone(&self.database);
        tokio::task::spawn_blocking(move || work(&database))
            .await
            .map_err(StoreError::unreachable)?
            .map_err(StoreError::unreachable)
    }
}

fn open_database(dir: &Path, path: &Path) -> anyhow::Result<Database> {
    std::fs::create_dir_all(dir).with_context(|| format!("can't create {}", dir.display()))?;
    let mut builder = Database::builder();
    builder.set_cache_size(PAGE_CACHE_BYTES);
    let mut database = builder.create(path).map_err(|error| match error {
        DatabaseError::DatabaseAlreadyOpen => anyhow::Error::new(InUse(path.to_owned())),
        error => {
            anyhow::Error::new(error).context(format!("can't open the store {}", path.display()))
        }
    })?;
    let transaction = begin_write(&database)?;
    transaction.open_table(RECORDS)?;
    transaction.open_table(EXPIRIES)?;
    transaction.commit()?;
    while remove_expired(&database, &|_| {})? == SWEEP_BATCH {}
    // Compacting moves pages from the end into the gaps and truncates the file. It needs the database to itself, which is
    // true only here, and reads all records, so it must at least halve the file.
    let transaction = begin_write(&database)?;
    let used = transaction.stats()?.allocated_pages() * transaction.stats()?.page_size() as u64;
    transaction.abort()?;
    let size = path.metadata().map_or(0, |file| file.len());
    if size > 2 * used && size > COMPACTED_FROM {
        database.compact().context("can't compact the store")?;
    }
    Ok(database)
}

/// Returns the directory of the settings, or else the platform's own place for application data.
fn data_dir(dir: &Path) -> anyhow::Result<PathBuf> {
    if !dir.as_os_str().is_empty() {
        return Ok(dir.to_owned());
    }
    let strategy = etcetera::choose_app_strategy(etcetera::AppStrategyArgs {
        top_level_domain: "org".to_owned(),
        author: "afterimage".to_owned(),
        app_name: "afterimage".to_owned(),
    })
    .context("there is no home directory: set [embedded] dir or [redis] url")?;
    Ok(strategy.data_dir())
}

/// Begins a write with quick repair, so that opening after a crash takes milliseconds however large the file is.
fn begin_write(database: &Database) -> Result<WriteTransaction, redb::Error> {
    let mut transaction = database.begin_write()?;
    transaction.set_quick_repair(true);
    Ok(transaction)
}

/// Removes a record and its entry among the expiries; returns the expiry that it had.
fn remove(transaction: &WriteTransaction, key: &str) -> Result<Option<u64>, redb::Error> {
    let mut records = transaction.open_table(RECORDS)?;
    let expiry = records.remove(key)?.map(|record| split(record.value()).0);
    if let Some(expiry) = expiry.filter(|expiry| *expiry != NEVER) {
        transaction.open_table(EXPIRIES)?.remove((expiry, key))?;
    }
    Ok(expiry)
}

/// Removes up to [`SWEEP_BATCH`] expired records, announces each, and returns how many were due.
fn remove_expired(database: &Database, announce: &dyn Fn(&str)) -> Result<usize, redb::Error> {
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
        // It may have been written again since the read above.
        let expired = {
            let records = transaction.open_table(RECORDS)?;
            let record = records.get(key.as_str())?;
            record.is_some_and(|record| {
                let (expiry, _) = split(record.value());
                expiry != NEVER && expiry <= now()
            })
        };
        if expired {
            remove(&transaction, key)?;
        }
    }
    transaction.commit()?;
    for key in &due {
        announce(key);
    }
    Ok(due.len())
}

/// Removes expired records, until the store is dropped.
#[derive(Clone)]
struct Sweeper {
    database: Weak<Database>,
    key_prefix: String,
    listener: ChangeListener,
}

impl Sweeper {
    async fn run(self, every: Duration) {
        let mut interval = tokio::time::interval(every);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            interval.tick().await;
            let sweeper = self.clone();
            match tokio::task::spawn_blocking(move || sweeper.sweep()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::error!(%error, "can't remove expired records"),
                Err(error) => {
                    tracing::error!(%error, "the task that removes expired records failed");
                }
            }
        }
    }

    /// Removes batch by batch, so that writes get in between, until nothing is due.
    fn sweep(&self) -> Result<(), redb::Error> {
        let announce = |key: &str| {
            let id = key.strip_prefix(&self.key_prefix).map(ImageId::parse);
            if let Some(Ok(id)) = id {
                self.listener.notify(Change::Invalidated(id));
            }
        };
        while let Some(database) = self.database.upgrade() {
            if remove_expired(&database, &announce)? < SWEEP_BATCH {
                break;
            }
        }
        Ok(())
    }
}

/// Splits a stored record into expiry and value.
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use redb::ReadableTableMetadata;

    use super::*;
    use crate::settings::{Settings, described};

    #[tokio::test]
    async fn one_sweep_removes_all_that_is_due_and_announces_each() {
        let dir = tempfile::tempdir().unwrap();
        let place = described().into_iter().find(|it| it.key == "embedded.dir").unwrap();
        let place = place.overridden(dir.path().to_str().unwrap(), "test".to_owned());
        let store = EmbeddedStore::open(&Settings::load(&[place]).unwrap()).await.unwrap();
        let due = 2 * SWEEP_BATCH + 1;
        for number in 0..due {
            let id = ImageId::parse(&format!("i{number}")).unwrap();
            let expiry = Expiry::In(Duration::from_millis(1));
            store.put(&id, Bytes::from("1"), expiry, &Condition::Always).await.unwrap();
        }
        let last = ImageId::parse("last").unwrap();
        store.put(&last, Bytes::from("1"), Expiry::Never, &Condition::Always).await.unwrap();
        while store.get(&ImageId::parse("i512").unwrap()).await.unwrap().is_some() {}

        let announced = Arc::new(Mutex::new(Vec::new()));
        let sweeper = Sweeper {
            database: Arc::downgrade(&store.database),
            key_prefix: store.key_prefix.clone(),
            listener: ChangeListener::new({
                let announced = Arc::clone(&announced);
                move |change| announced.lock().unwrap().push(change)
            }),
        };
        sweeper.sweep().unwrap();
        let transaction = store.database.begin_read().unwrap();
        assert_eq!(transaction.open_table(RECORDS).unwrap().len().unwrap(), 1);
        assert_eq!(transaction.open_table(EXPIRIES).unwrap().len().unwrap(), 0);
        assert_eq!(announced.lock().unwrap().len(), due);
    }
}
