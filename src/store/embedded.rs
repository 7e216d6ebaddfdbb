//! The embedded store: a database file of the program's own, for machines without Redis.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context;
use bytes::Bytes;
use etcetera::AppStrategy;
use redb::{ReadableTable, TableDefinition, TableError, TableHandle, WriteTransaction};

use super::database::{End, PROBE, ReopeningDatabase, is_damage};
use super::database_file::DatabaseFile;
pub(crate) use super::database_file::InUse;
use super::{
    Change, ChangeListener, Condition, Cursor, Expiry, Lease, Page, Replaced, StoreError, Stored,
    StoredSize, Written,
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

/// Smallest file that is worth compacting.
const COMPACTED_FROM: u64 = 8 * 1024 * 1024;

/// Most expired records that one transaction removes, so that a write never waits long behind it.
const SWEEP_BATCH: usize = 256;

/// Records in a redb database.
///
/// A `put` is on the disk when it returns: redb ends each transaction with an fsync, so neither `kill -9` nor a power cut
/// undoes an acknowledged write. The space of removed records is reused; a file that is mostly empty is compacted when
/// it is opened.
///
/// While the disk is full, reads go on and writes fail with [`StoreError::DiskFull`]; the first write for which there is room
/// succeeds.
#[derive(Debug)]
pub struct EmbeddedStore {
    database: Arc<ReopeningDatabase>,
    path: PathBuf,
    key_prefix: String,
    max_value: usize,
    sweep_interval: Duration,
    listener: Option<ChangeListener>,
    sweeper: Option<Task>,
}

impl EmbeddedStore {
    /// Opens the database in the data directory; creates both if they are missing.
    pub async fn open(settings: &Settings) -> anyhow::Result<EmbeddedStore> {
        let dir = data_dir(&settings.embedded.dir)?;
        let path = data_file(&settings.embedded.dir)?;
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
            database.read(|transaction| {
                let records = transaction.open_table(RECORDS)?;
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
        })
        .await?
    }

    pub(super) async fn sizes(
        &self,
        ids: &[ImageId],
    ) -> Result<Vec<Option<StoredSize>>, StoreError> {
        let keys: Vec<String> = ids.iter().map(|id| self.key(id)).collect();
        self.blocking(move |database| {
            database.read(|transaction| {
                let (records, now) = (transaction.open_table(RECORDS)?, now());
                let size = |key: &String| {
                    let Some(record) = records.get(key.as_str())? else { return Ok(None) };
                    let (expiry, value) = split(record.value());
                    let time_to_live = (expiry != NEVER)
                        .then(|| Duration::from_millis(expiry.saturating_sub(now)));
                    let is_there = time_to_live.is_none_or(|left| !left.is_zero());
                    let bytes = Some(value.len() as u64);
                    Ok(is_there.then_some(StoredSize { bytes, time_to_live }))
                };
                keys.iter().map(size).collect()
            })
        })
        .await
    }

    /// Marks the database as started; returns true the first time.
    pub(crate) async fn is_first_start(&self) -> Result<bool, StoreError> {
        self.blocking(|database| {
            let started = database.read(|transaction| match transaction.open_table(MARKS) {
                Err(TableError::TableDoesNotExist(_)) => Ok(false),
                marks => Ok(marks?.get("started")?.is_some()),
            })?;
            if started {
                return Ok(false);
            }
            database.write(0, |transaction| {
                transaction.open_table(MARKS)?.insert("started", ())?;
                Ok(End::Commit(true))
            })
        })
        .await
    }

    /// Checks that the database can be read. Nothing is written: this is asked often.
    pub(super) async fn ping(&self) -> Result<(), StoreError> {
        self.blocking(|database| {
            database.read(|transaction| {
                transaction.open_table(RECORDS)?;
                Ok(())
            })
        })
        .await
    }

    /// Returns the reason why the last write failed, such as a full disk; `None` once one has succeeded. While there is a
    /// reason, the sweeper tries at each interval whether there is room again.
    pub(super) fn write_failure(&self) -> Option<Arc<str>> {
        self.database.write_failure()
    }

    /// The path of the database file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) async fn get(&self, id: &ImageId) -> Result<Option<Stored>, StoreError> {
        let (key, limit) = (self.key(id), self.max_value);
        self.blocking(move |database| {
            database.read(|transaction| {
                let records = transaction.open_table(RECORDS)?;
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
                    let left = (expiry != NEVER).then(|| Duration::from_millis(expiry - now));
                    Ok(Some(Stored { value: Bytes::copy_from_slice(value), time_to_live: left }))
                })
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
        self.change(id, condition, value.len(), move |transaction, key, before| {
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
        self.change(id, condition, 0, |_transaction, _key, _before| Ok(())).await
    }

    /// Removes a record if the condition holds, and lets `put` write a value of this size in its place. redb has one write
    /// transaction at a time, so check and write are atomic.
    async fn change(
        &self,
        id: &ImageId,
        condition: &Condition,
        size: usize,
        put: impl FnOnce(&WriteTransaction, &str, Option<u64>) -> Result<(), redb::Error>
        + Send
        + 'static,
    ) -> Result<Written, StoreError> {
        let (key, id, listener) = (self.key(id), id.clone(), self.listener.clone());
        let (condition, limit) = (condition.clone(), self.max_value);
        let value_fits = move |value: &[u8]| value.len() <= limit;
        self.blocking(move |database| {
            let written = database.write(size, |transaction| {
                let (holds, before) = {
                    let records = transaction.open_table(RECORDS)?;
                    let record = records.get(key.as_str())?;
                    let present = record.as_ref().map(|record| split(record.value()));
                    let present = present.filter(|(expiry, _)| *expiry == NEVER || *expiry > now());
                    let readable =
                        |(_, value): (u64, _)| if value_fits(value) { value } else { &[] };
                    (condition.holds(present.map(readable)), present.map(|(expiry, _)| expiry))
                };
                if !holds {
                    return Ok(End::Abort(Written::ConditionFailed));
                }
                remove(transaction, &key)?;
                put(transaction, &key, before)?;
                Ok(End::Commit(Written::Done(match before {
                    Some(_) => Replaced::Value,
                    None => Replaced::Nothing,
                })))
            });
            // After an error, too: the disk may have failed once the write was made.
            if let Some(listener) = listener
                && !matches!(written, Ok(Written::ConditionFailed))
            {
                listener.notify(Change::Invalidated(id));
            }
            written
        })
        .await
    }

    pub(super) async fn list(
        &self,
        beginning: &str,
        from: Option<Cursor>,
        count: usize,
    ) -> Result<Page, StoreError> {
        let prefix_length = self.key_prefix.len();
        let beginning = format!("{}{beginning}", self.key_prefix);
        let from = from.map_or_else(|| beginning.clone(), |cursor| cursor.0);
        self.blocking(move |database| {
            database.read(|transaction| {
                let records = transaction.open_table(RECORDS)?;
                let (mut ids, mut next, now) = (Vec::new(), None, now());
                for (number, record) in records.range(from.as_str()..)?.enumerate() {
                    let (key, record) = record?;
                    let key = key.value();
                    if !key.starts_with(&beginning) {
                        break;
                    }
                    if number == count {
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
        })
        .await
    }

    fn key(&self, id: &ImageId) -> String {
        format!("{}{id}", self.key_prefix)
    }

    /// Runs a transaction on a thread that may block.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&ReopeningDatabase) -> Result<T, redb::Error> + Send + 'static,
    ) -> Result<T, StoreError> {
        let database = Arc::clone(&self.database);
        let done = tokio::task::spawn_blocking(move || work(&database)).await;
        Ok(done.map_err(StoreError::unreachable)??)
    }
}

fn open_database(dir: &Path, path: &Path) -> anyhow::Result<ReopeningDatabase> {
    std::fs::create_dir_all(dir).with_context(|| format!("can't create {}", dir.display()))?;
    let file = DatabaseFile::open(path)?;
    let opened = ReopeningDatabase::open(path, file);
    opened.and_then(|database| prepare(&database).map(|()| database)).map_err(|error| {
        let path = path.display();
        if is_damage(&error) {
            anyhow::anyhow!(
                "the store {path} is damaged, or another program's file ({error}): restore it from a backup, or move it \
                 away to begin with a new store"
            )
        } else {
            anyhow::Error::new(error).context(format!("can't open the store {path}"))
        }
    })
}

/// Creates the tables, removes expired records and compacts the file, as far as each is due. A disk that is full now is no
/// reason not to start: what is there can be read.
fn prepare(database: &ReopeningDatabase) -> Result<(), redb::Error> {
    let (created, probed) = database.read(|transaction| {
        let tables: Vec<String> =
            transaction.list_tables()?.map(|it| it.name().to_owned()).collect();
        let has = |name: &str| tables.iter().any(|it| it == name);
        Ok((has(RECORDS.name()) && has(EXPIRIES.name()), has(PROBE.name())))
    })?;
    if !created {
        database.write(0, |transaction| {
            transaction.open_table(RECORDS)?;
            transaction.open_table(EXPIRIES)?;
            Ok(End::Commit(()))
        })?;
    }
    if probed {
        database.remove_probe();
    }
    let tidied = loop {
        match remove_expired(database, &|_| {}) {
            Ok(SWEEP_BATCH) => {}
            Ok(_) => break database.compact_from(COMPACTED_FROM),
            Err(error) => break Err(error),
        }
    };
    match tidied {
        Err(error) if is_damage(&error) => Err(error),
        Err(error) => {
            tracing::warn!(%error, "can't remove expired records and compact the store");
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// Returns the file with the records, in that directory.
pub(crate) fn data_file(dir: &Path) -> anyhow::Result<PathBuf> {
    Ok(data_dir(dir)?.join("records.redb"))
}

/// Returns the directory of the settings, or else the platform's own place for application data.
pub(crate) fn data_dir(dir: &Path) -> anyhow::Result<PathBuf> {
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
fn remove_expired(
    database: &ReopeningDatabase,
    announce: &dyn Fn(&str),
) -> Result<usize, redb::Error> {
    let due: Vec<String> = database.read(|transaction| {
        let expiries = transaction.open_table(EXPIRIES)?;
        let due = expiries.range(..(now(), ""))?.take(SWEEP_BATCH);
        due.map(|entry| Ok(entry?.0.value().1.to_owned())).collect()
    })?;
    if due.is_empty() {
        return Ok(0);
    }
    let removed = database.write(0, |transaction| {
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
                remove(transaction, key)?;
            }
        }
        Ok(End::Commit(()))
    });
    // After an error, too: the disk may have failed once they were removed.
    for key in &due {
        announce(key);
    }
    removed?;
    Ok(due.len())
}

/// Removes expired records, until the store is dropped.
#[derive(Clone)]
struct Sweeper {
    database: Weak<ReopeningDatabase>,
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

    /// Removes batch by batch, so that writes get in between, until nothing is due. Then sees if failed writes would succeed
    /// again.
    fn sweep(&self) -> Result<(), redb::Error> {
        let announce = |key: &str| {
            let id = key.strip_prefix(&self.key_prefix).map(ImageId::parse);
            if let Some(Ok(id)) = id {
                self.listener.notify(Change::Invalidated(id));
            }
        };
        while let Some(database) = self.database.upgrade() {
            let removed = remove_expired(&database, &announce);
            if !matches!(removed, Ok(SWEEP_BATCH)) {
                database.probe_writes();
                return removed.map(|_| ());
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
        let left = store.database.read(|transaction| {
            let records = transaction.open_table(RECORDS)?.len()?;
            Ok((records, transaction.open_table(EXPIRIES)?.len()?))
        });
        assert_eq!(left.unwrap(), (1, 0));
        assert_eq!(announced.lock().unwrap().len(), due);
    }
}
