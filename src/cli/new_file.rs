//! Files that are written whole under another name, and then take their place.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A file that is being written. Dropped, it leaves what was there before.
pub(super) struct NewFile {
    pub(super) file: File,
    /// The path that is written to, and its place; `None` for what is no plain file, such as a pipe.
    paths: Option<(PathBuf, PathBuf)>,
}

impl NewFile {
    /// Opens a new file beside the one whose place it takes, with the same mode. Without one, only its user may read it.
    pub(super) fn beside(place: &Path) -> io::Result<NewFile> {
        let before = place.metadata();
        if before.as_ref().is_ok_and(|it| !it.is_file()) {
            let file = OpenOptions::new().write(true).open(place)?;
            return Ok(NewFile { file, paths: None });
        }
        // A link stays one: its target is replaced.
        let place = place.canonicalize().unwrap_or_else(|_none| place.to_owned());
        let mut name = std::ffi::OsString::from(".");
        name.push(place.file_name().unwrap_or_default());
        name.push(format!(".{:016x}", fastrand::u64(..)));
        let new = place.with_file_name(name);
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        let paths = Some((new, place));
        let new_file = NewFile { file, paths };
        if let Ok(before) = before {
            new_file
                .file
                .set_permissions(PermissionsExt::from_mode(before.permissions().mode()))?;
        }
        Ok(new_file)
    }

    /// Puts the file in its place.
    pub(super) fn keep(mut self) -> io::Result<()> {
        if let Some((new, place)) = self.paths.take() {
            let kept = self.file.sync_all().and_then(|()| std::fs::rename(&new, place));
            if kept.is_err() {
                let _ = std::fs::remove_file(new);
            }
            return kept;
        }
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some((new, _)) = &self.paths {
            let _ = std::fs::remove_file(new);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_file_takes_its_place_whole_with_its_mode_and_through_a_link() {
        let dir = tempfile::tempdir().unwrap();
        let (place, link) = (dir.path().join("place"), dir.path().join("link"));
        std::fs::write(&place, "before").unwrap();
        std::fs::set_permissions(&place, PermissionsExt::from_mode(0o640)).unwrap();
        std::os::unix::fs::symlink(&place, &link).unwrap();
        let mut new = NewFile::beside(&link).unwrap();
        new.file.write_all(b"half").unwrap();
        drop(new);
        assert_eq!(std::fs::read(&place).unwrap(), b"before");
        let mut new = NewFile::beside(&link).unwrap();
        new.file.write_all(b"after").unwrap();
        new.keep().unwrap();
        assert_eq!(std::fs::read(&place).unwrap(), b"after");
        assert_eq!(place.metadata().unwrap().permissions().mode() & 0o777, 0o640);
        assert!(link.symlink_metadata().unwrap().is_symlink());
        assert_eq!(dir.path().read_dir().unwrap().count(), 2);
        // A device isn't replaced.
        let new = NewFile::beside(Path::new("/dev/null")).unwrap();
        new.keep().unwrap();
        assert!(!Path::new("/dev/null").is_file());
    }
}
