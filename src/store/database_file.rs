//! The file of the embedded store's database, and the two views of it that redb gets.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use redb::StorageBackend;
use redb::backends::FileBackend;

/// Another process has the store open, which can be asked to write.
#[derive(Debug, thiserror::Error)]
#[error("the store {} is in use by another process, such as a running afterimage", .0.display())]
pub(crate) struct InUse(pub PathBuf);

/// The file of a database, locked until it is dropped.
///
/// redb locks a file only while it has a database open in it. This lock spans the time in which a failed database is closed
/// and opened again: otherwise another process could get the file and change it, which the index wouldn't learn. So redb is
/// told that it can't lock the file itself.
#[derive(Debug, Clone)]
pub(super) struct DatabaseFile {
    backend: Arc<FileBackend>,
    #[cfg(test)]
    pub(super) disk: Arc<tests::Disk>,
}

impl DatabaseFile {
    /// Opens and locks a file; creates it if it is missing.
    pub(super) fn open(path: &Path) -> anyhow::Result<DatabaseFile> {
        let found = path.exists();
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let file = file.with_context(|| format!("can't open the store {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(InUse(path.to_owned()).into()),
            // As redb does it: a file system without locks is no reason not to serve.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {
                tracing::warn!(path = %path.display(), "the store's file can't be locked");
            }
            Err(TryLockError::Error(error)) => {
                let what = format!("can't lock the store {}", path.display());
                return Err(anyhow::Error::new(error).context(what));
            }
        }
        log_new_store(path, &file, found)?;
        let backend = Arc::new(FileBackend::new(file)?);
        Ok(DatabaseFile {
            backend,
            #[cfg(test)]
            disk: Arc::default(),
        })
    }

    /// A view in which writes stay in memory.
    pub(super) fn unwritten(&self) -> UnwrittenFile {
        UnwrittenFile { file: self.clone(), writes: Mutex::default() }
    }
}

/// An empty file may be all that is left of a store, so it is not passed over.
fn log_new_store(path: &Path, file: &File, found: bool) -> io::Result<()> {
    let path = path.display();
    if file.metadata()?.len() > 0 {
        return Ok(());
    }
    if found {
        tracing::warn!(%path, "the store's file is empty: a new store begins in it");
    } else {
        tracing::info!(%path, "there is no store yet: a new one begins");
    }
    Ok(())
}

impl StorageBackend for DatabaseFile {
    fn len(&self) -> io::Result<u64> {
        self.backend.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.backend.read(offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        #[cfg(test)]
        self.disk.check(len)?;
        self.backend.set_len(len)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.backend.sync_data()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        #[cfg(test)]
        self.disk.check(offset + data.len() as u64)?;
        self.backend.write(offset, data)
    }
}

/// A database's file on a disk that takes no writes. What redb writes to open the database, its header, stays in memory.
#[derive(Debug)]
pub(super) struct UnwrittenFile {
    file: DatabaseFile,
    /// Offset and content of each write, in order.
    writes: Mutex<Vec<(u64, Vec<u8>)>>,
}

impl StorageBackend for UnwrittenFile {
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read(offset, out)?;
        let writes = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        for (start, data) in &*writes {
            let (first, last) = (offset.max(*start), end(offset, out).min(end(*start, data)));
            if first < last {
                let within = |base: u64| position(first - base)..position(last - base);
                out[within(offset)].copy_from_slice(&data[within(*start)]);
            }
        }
        Ok(())
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        /// Far more than opening writes. A repair of a whole database would write as much as there is.
        const MOST_BYTES: usize = 1024 * 1024;
        let mut writes = self.writes.lock().unwrap_or_else(PoisonError::into_inner);
        let held: usize = writes.iter().map(|(_, data)| data.len()).sum();
        if held + data.len() > MOST_BYTES {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        writes.retain(|(start, it)| (*start, it.len()) != (offset, data.len()));
        writes.push((offset, data.to_vec()));
        Ok(())
    }
}

fn end(start: u64, data: &[u8]) -> u64 {
    start + data.len() as u64
}

/// A position within bytes in memory.
fn position(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// A disk that can be full: writes past a length of the file fail, all of them where it is 0.
    #[derive(Debug)]
    pub(in crate::store) struct Disk(AtomicU64);

    impl Default for Disk {
        fn default() -> Disk {
            Disk(AtomicU64::new(u64::MAX))
        }
    }

    impl Disk {
        pub(in crate::store) fn limit(&self, length: u64) {
            self.0.store(length, Ordering::SeqCst);
        }

        pub(super) fn check(&self, end: u64) -> io::Result<()> {
            let full = end > self.0.load(Ordering::SeqCst);
            if full { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        }
    }

    #[test]
    fn an_unwritten_file_shows_its_writes_and_leaves_the_file_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, b"0123456789").unwrap();
        let file = DatabaseFile::open(&path).unwrap();
        let view = file.unwritten();
        view.write(2, b"abc").unwrap();
        view.write(4, b"xy").unwrap();
        view.write(2, b"ABC").unwrap();
        let read = |offset, length| {
            let mut out = vec![0; length];
            view.read(offset, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(read(0, 10), "01ABCy6789");
        assert_eq!(read(3, 2), "BC");
        assert_eq!(read(5, 3), "y67");
        assert_eq!(read(7, 3), "789");
        assert!(view.set_len(20).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"0123456789");
    }
}
