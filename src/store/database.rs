//! The database of the embedded store: opened, and opened again after a failure of its disk.

use std::any::Any;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use redb::{
    Database, Error, ReadTransaction, ReadableDatabase, StorageBackend, TableDefinition,
    WriteTransaction,
};

use super::StoreError;
use super::database_file::DatabaseFile;

/// Memory that redb may use for pages of the file. Decoded images are cached elsewhere.
const PAGE_CACHE_BYTES: usize = 16 * 1024 * 1024;

/// Most attempts of a read that fails because another operation's failure has made redb refuse everything.
const ATTEMPTS: usize = 10;

/// A value that is written to learn that the disk takes writes again.
pub(super) const PROBE: TableDefinition<(), &[u8]> = TableDefinition::new("probe");

/// A redb database that outlives failures of its disk.
///
/// After an error of the disk, such as a full one, redb refuses everything, reads included, until the database is closed and
/// opened again. That is done at once. redb writes the header to open a database; where the disk doesn't take even that, the
/// database is opened to be read, and each write tries again to open it to be written.
///
/// ```text
///   Writable ── an error of the disk ──▶ opened again ── the header can't be written ──▶ ReadOnly
///      ▲                                      │                                             │
///      └──────────────────────────────────────┴───────── the next write opens it ───────────┘
/// ```
///
/// Every method blocks.
#[derive(Debug)]
pub(super) struct ReopeningDatabase {
    path: PathBuf,
    file: DatabaseFile,
    /// Locked exclusively only while the database is opened again.
    opened: RwLock<Opened>,
    /// Held from the beginning of a write until the database is opened again if it failed, so that no write fails because
    /// of the one before it. redb makes one write at a time anyway.
    turn: Mutex<()>,
    failure: Mutex<Option<WriteFailure>>,
}

#[derive(Debug)]
struct Opened {
    state: State,
    /// Counts the openings, so that a failure is followed by one, however many operations it failed.
    number: u64,
}

#[derive(Debug)]
enum State {
    Writable(Database),
    ReadOnly(Database),
    /// It can't even be read.
    Closed,
}

/// A write that failed, with no successful one since.
#[derive(Debug)]
struct WriteFailure {
    reason: Arc<str>,
    /// Size of the value that was to be written.
    size: usize,
}

/// End of a write transaction.
pub(super) enum End<T> {
    Commit(T),
    Abort(T),
}

impl ReopeningDatabase {
    /// Opens the database in a file, or creates one in an empty file.
    ///
    /// redb trusts a file that it has written, and panics over some of what isn't as it was; the check that prevents it
    /// reads the whole file. So a panic is caught here, as everywhere in this file, and becomes an error.
    pub(super) fn open(path: &Path, file: DatabaseFile) -> Result<ReopeningDatabase, Error> {
        let state = match open(file.clone()) {
            Ok(database) => State::Writable(database),
            Err(error) if !is_damage(&error) => match open(file.unwritten()) {
                Ok(database) => State::ReadOnly(database),
                Err(_) => return Err(error),
            },
            Err(error) => return Err(error),
        };
        Ok(ReopeningDatabase {
            path: path.to_owned(),
            file,
            opened: RwLock::new(Opened { state, number: 0 }),
            turn: Mutex::default(),
            failure: Mutex::default(),
        })
    }

    /// Runs a read transaction.
    pub(super) fn read<T>(
        &self,
        work: impl Fn(&ReadTransaction) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut left = ATTEMPTS;
        loop {
            let opened = self.opened();
            let number = opened.number;
            let outcome = catch(|| match &opened.state {
                State::Writable(database) | State::ReadOnly(database) => {
                    work(&database.begin_read()?)
                }
                State::Closed => Err(Error::DatabaseClosed),
            });
            drop(opened);
            match outcome {
                Err(error) if left > 0 && needs_reopening(&error) => {
                    self.reopen(number);
                    // A failure of its own is repeated once.
                    left = if matches!(error, Error::PreviousIo) { left - 1 } else { 0 };
                }
                outcome => return outcome,
            }
        }
    }

    /// Runs a write transaction that needs room for a value of this size. After an error of the disk it may have been made
    /// or not.
    pub(super) fn write<T>(
        &self,
        size: usize,
        work: impl FnOnce(&WriteTransaction) -> Result<End<T>, Error>,
    ) -> Result<T, Error> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut reopened = false;
        loop {
            let opened = self.writable().inspect_err(|error| self.note_failure(error, size))?;
            let State::Writable(database) = &opened.state else { continue };
            let number = opened.number;
            match catch(|| begin_write(database)) {
                Ok(transaction) => {
                    let outcome = catch(|| match work(&transaction)? {
                        End::Commit(value) => {
                            transaction.commit()?;
                            Ok((value, true))
                        }
                        End::Abort(value) => {
                            transaction.abort()?;
                            Ok((value, false))
                        }
                    });
                    drop(opened);
                    let (value, committed) =
                        outcome.inspect_err(|error| self.failed(number, error, size))?;
                    if committed {
                        self.note_success();
                    }
                    return Ok(value);
                }
                Err(error) => {
                    drop(opened);
                    // Nothing is written yet, and perhaps a read has failed.
                    if reopened || !needs_reopening(&error) {
                        self.failed(number, &error, size);
                        return Err(error);
                    }
                    self.reopen(number);
                    reopened = true;
                }
            }
        }
    }

    /// Compacts the file if it is larger than `from` and at least halved by that.
    ///
    /// Compacting moves pages from the end into the gaps and truncates the file. It needs the database to itself, and reads
    /// all records.
    pub(super) fn compact_from(&self, from: u64) -> Result<(), Error> {
        let used = self.write(0, |transaction| {
            let stats = transaction.stats()?;
            Ok(End::Abort(stats.allocated_pages() * stats.page_size() as u64))
        })?;
        let length = StorageBackend::len(&self.file)?;
        if length <= 2 * used || length <= from {
            return Ok(());
        }
        let mut opened = self.opened_exclusively();
        let number = opened.number;
        if let State::Writable(database) = &mut opened.state {
            let compacted = catch(|| Ok(database.compact()?));
            drop(opened);
            compacted.inspect_err(|error| self.failed(number, error, 0))?;
        }
        Ok(())
    }

    /// Returns the reason why the last write failed; `None` once one has succeeded.
    pub(super) fn write_failure(&self) -> Option<Arc<str>> {
        self.failure().as_ref().map(|failure| Arc::clone(&failure.reason))
    }

    /// Writes as much as the last write wanted to, if that failed, and removes it again.
    pub(super) fn probe_writes(&self) {
        let Some(size) = self.failure().as_ref().map(|failure| failure.size) else { return };
        let written = self.write(size, |transaction| {
            transaction.open_table(PROBE)?.insert_reserve((), size)?;
            Ok(End::Commit(()))
        });
        if written.is_ok() {
            self.remove_probe();
        }
    }

    /// Removes what a probe left, if the process ended in the midst of one.
    pub(super) fn remove_probe(&self) {
        let removed = self.write(0, |transaction| {
            transaction.delete_table(PROBE)?;
            Ok(End::Commit(()))
        });
        if let Err(error) = removed {
            tracing::debug!(%error, "can't remove the probe of the embedded store");
        }
    }

    /// Follows up a failed write.
    fn failed(&self, number: u64, error: &Error, size: usize) {
        if needs_reopening(error) {
            self.reopen(number);
            self.note_failure(error, size);
        }
    }

    fn note_failure(&self, error: &Error, size: usize) {
        let mut failure = self.failure();
        if failure.is_none() {
            let path = self.path.display();
            tracing::error!(%path, %error, "the embedded store can't be written");
        }
        *failure = Some(WriteFailure { reason: reason(error).into(), size });
    }

    fn note_success(&self) {
        if self.failure().take().is_some() {
            let path = self.path.display();
            tracing::info!(%path, "the embedded store can be written again");
        }
    }

    /// The database, to be written. Opens it if it could only be read up to now.
    fn writable(&self) -> Result<RwLockReadGuard<'_, Opened>, Error> {
        loop {
            let opened = self.opened();
            if matches!(opened.state, State::Writable(_)) {
                return Ok(opened);
            }
            drop(opened);
            let mut opened = self.opened_exclusively();
            if !matches!(opened.state, State::Writable(_)) {
                // Meanwhile the other one goes on being read, if this fails. It never writes to the file.
                let database = open(self.file.clone())?;
                opened.replace(State::Writable(database));
            }
        }
    }

    /// Opens the database again, unless that was done since the opening with this number.
    fn reopen(&self, failed: u64) {
        let mut opened = self.opened_exclusively();
        if opened.number != failed {
            return;
        }
        // redb reads and writes as it closes.
        opened.replace(State::Closed);
        let state = match open(self.file.clone()) {
            Ok(database) => State::Writable(database),
            Err(error) => open(self.file.unwritten()).map_or_else(
                |_| {
                    let path = self.path.display();
                    tracing::error!(%path, %error, "the embedded store can't be opened again");
                    State::Closed
                },
                State::ReadOnly,
            ),
        };
        opened.replace(state);
    }

    fn opened(&self) -> RwLockReadGuard<'_, Opened> {
        self.opened.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn opened_exclusively(&self) -> RwLockWriteGuard<'_, Opened> {
        self.opened.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn failure(&self) -> MutexGuard<'_, Option<WriteFailure>> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Opened {
    fn replace(&mut self, state: State) {
        self.number += 1;
        let replaced = std::mem::replace(&mut self.state, state);
        let _ = catch_unwind(AssertUnwindSafe(|| drop(replaced)));
    }
}

fn open(file: impl StorageBackend) -> Result<Database, Error> {
    catch(|| {
        let mut builder = Database::builder();
        builder.set_cache_size(PAGE_CACHE_BYTES);
        Ok(builder.create_with_backend(file)?)
    })
}

/// Begins a write with quick repair, so that opening after a crash takes milliseconds however large the file is.
fn begin_write(database: &Database) -> Result<WriteTransaction, Error> {
    let mut transaction = database.begin_write()?;
    transaction.set_quick_repair(true);
    Ok(transaction)
}

/// Turns a panic into an error.
fn catch<T>(work: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = format!("the database panicked: {}", panic_text(&*panic));
        Err(Error::Corrupted(text))
    })
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("without a message")
}

/// True for an error after which redb refuses everything, or may.
fn needs_reopening(error: &Error) -> bool {
    matches!(
        error,
        Error::Io(_)
            | Error::PreviousIo
            | Error::Backend(_)
            | Error::Corrupted(_)
            | Error::DatabaseClosed
            | Error::LockPoisoned(_)
    )
}

/// True for a file that isn't a database, or no longer.
pub(super) fn is_damage(error: &Error) -> bool {
    match error {
        Error::Corrupted(_) | Error::RepairAborted | Error::UpgradeRequired(_) => true,
        Error::Io(error) => {
            matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
        }
        _ => false,
    }
}

/// The system's own words, where redb only quotes them.
fn reason(error: &Error) -> String {
    if let Error::Io(error) = error { error.to_string() } else { error.to_string() }
}

impl From<Error> for StoreError {
    fn from(error: Error) -> StoreError {
        use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
        match error {
            Error::Io(error)
                if matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge) =>
            {
                StoreError::DiskFull(Arc::new(error))
            }
            error => StoreError::unreachable(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    const VALUES: TableDefinition<u64, &[u8]> = TableDefinition::new("values");

    struct Subject {
        database: ReopeningDatabase,
        file: DatabaseFile,
        _dir: tempfile::TempDir,
    }

    impl Subject {
        fn new() -> Subject {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("records.redb");
            let file = DatabaseFile::open(&path).unwrap();
            let database = ReopeningDatabase::open(&path, file.clone()).unwrap();
            Subject { database, file, _dir: dir }
        }

        fn put(&self, key: u64, size: usize) -> Result<(), Error> {
            self.database.write(size, |transaction| {
                transaction.open_table(VALUES)?.insert(key, &*vec![1; size])?;
                Ok(End::Commit(()))
            })
        }

        fn size(&self, key: u64) -> Result<Option<usize>, Error> {
            self.database.read(|transaction| {
                let table = transaction.open_table(VALUES)?;
                Ok(table.get(key)?.map(|value| value.value().len()))
            })
        }
    }

    fn is_full(outcome: Result<(), Error>) -> bool {
        matches!(StoreError::from(outcome.unwrap_err()), StoreError::DiskFull(_))
    }

    #[test]
    fn a_full_disk_fails_writes_and_nothing_else_until_there_is_room() {
        // The file can't grow, or it takes no write at all, not even of the header.
        for grows in [true, false] {
            let subject = Subject::new();
            subject.put(1, 1000).unwrap();
            let length = StorageBackend::len(&subject.file).unwrap();
            subject.file.disk.limit(if grows { length } else { 0 });
            for _ in 0..3 {
                assert!(is_full(subject.put(2, 5_000_000)));
                assert_eq!(subject.size(1).unwrap(), Some(1000));
                assert_eq!(subject.size(2).unwrap(), None);
                assert!(subject.database.write_failure().is_some());
            }
            subject.file.disk.limit(u64::MAX);
            subject.put(2, 5_000_000).unwrap();
            assert_eq!(subject.size(2).unwrap(), Some(5_000_000));
            assert_eq!(subject.size(1).unwrap(), Some(1000));
            assert_eq!(subject.database.write_failure(), None);
        }
    }

    #[test]
    fn a_small_write_succeeds_beside_large_ones_that_fail() {
        let subject = Subject::new();
        subject.put(0, 1000).unwrap();
        // The file has room for some.
        subject.put(50, 1_000_000).unwrap();
        subject.put(50, 1).unwrap();
        subject.file.disk.limit(StorageBackend::len(&subject.file).unwrap());
        let start = Barrier::new(4);
        std::thread::scope(|scope| {
            for large in 0..2_u64 {
                let (subject, start) = (&subject, &start);
                scope.spawn(move || {
                    start.wait();
                    for _ in 0..10 {
                        assert!(is_full(subject.put(100 + large, 5_000_000)));
                    }
                });
            }
            scope.spawn(|| {
                start.wait();
                for key in 0..20 {
                    subject.put(key, 1000).unwrap();
                }
            });
            scope.spawn(|| {
                start.wait();
                for _ in 0..200 {
                    assert_eq!(subject.size(0).unwrap(), Some(1000));
                }
            });
        });
        for key in 0..20 {
            assert_eq!(subject.size(key).unwrap(), Some(1000));
        }
    }

    #[test]
    fn a_probe_notices_that_there_is_room_again() {
        let subject = Subject::new();
        subject.put(1, 1000).unwrap();
        subject.file.disk.limit(StorageBackend::len(&subject.file).unwrap());
        assert!(is_full(subject.put(2, 5_000_000)));
        subject.database.probe_writes();
        assert!(subject.database.write_failure().is_some());
        subject.file.disk.limit(u64::MAX);
        subject.database.probe_writes();
        assert_eq!(subject.database.write_failure(), None);
    }

    #[test]
    fn an_error_that_is_not_the_disks_leaves_the_database_as_it_is() {
        let subject = Subject::new();
        let wrong = |transaction: &WriteTransaction| {
            let table = TableDefinition::<&str, u64>::new("values");
            transaction.open_table(table)?;
            Ok(End::Commit(()))
        };
        subject.put(1, 1000).unwrap();
        subject.database.write(0, wrong).unwrap_err();
        assert_eq!(subject.database.write_failure(), None);
        assert_eq!(subject.database.opened().number, 0);
    }

    #[test]
    fn a_panic_in_a_transaction_is_an_error_and_the_next_one_succeeds() {
        let subject = Subject::new();
        subject.put(1, 1000).unwrap();
        let panics = |_: &WriteTransaction| -> Result<End<()>, Error> { panic!("deliberate") };
        let error = subject.database.write(0, panics).unwrap_err();
        assert!(error.to_string().contains("deliberate"), "{error}");
        let panics = |_: &ReadTransaction| -> Result<(), Error> { panic!("deliberate") };
        let error = subject.database.read(panics).unwrap_err();
        assert!(error.to_string().contains("deliberate"), "{error}");
        subject.put(2, 1000).unwrap();
        assert_eq!(subject.size(1).unwrap(), Some(1000));
    }
}
