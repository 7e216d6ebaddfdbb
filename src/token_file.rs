//! The token that the server makes at its start where none is configured, in a file that only its user reads.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::Context;
use etcetera::BaseStrategy;
use sha2::{Digest, Sha256};

use crate::image::hex;
use crate::settings::{ListenOn, PrefixAccess, Settings, Token};
use crate::store::embedded;

/// Bytes of a new token, half as many as it has characters.
const TOKEN_BYTES: usize = 32;

/// Longest file that is read.
const MAX_LENGTH: u64 = 1024;

/// The place of the token that a server makes.
#[derive(Debug)]
pub(crate) struct TokenFile(PathBuf);

/// A token file that can't be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenFileError {
    /// Others may have read it or written it. Whoever made it so has to decide.
    #[error(
        "{} must be a file of this user with mode 0600, since it has the token that may write, but it {found}; remove it to get a new one",
        path.display()
    )]
    Unsafe {
        /// Its path.
        path: PathBuf,
        /// Describes what it is instead.
        found: String,
    },
    /// It has something else than a token.
    #[error("{} must have a token and nothing else ({expected}); remove it to get a new one", path.display())]
    Malformed {
        /// Its path.
        path: PathBuf,
        /// Describes a token.
        expected: String,
    },
    /// It can't be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The path of the file, or of its folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// Returns whether somebody needs a token, to write or to list, and none is configured.
pub(crate) fn is_needed(settings: &Settings) -> bool {
    let writes = &settings.writes;
    let configured = !writes.tokens.is_empty() || !writes.tokens_file.as_os_str().is_empty();
    let to_write = writes.enabled && !writes.local;
    let to_list = settings.gallery.enabled || settings.events.prefix == PrefixAccess::Token;
    !configured && (to_write || to_list)
}

impl TokenFile {
    /// Returns the place of the token of a server with these settings that listens there.
    pub(crate) fn of(settings: &Settings, listen: &ListenOn) -> anyhow::Result<TokenFile> {
        let name = format!("write-token-{}", name_of(listen));
        let dir = match settings.redis.url.get() {
            Some(_) => runtime_dir()?,
            None => embedded::data_dir(&settings.embedded.dir)?,
        };
        Ok(TokenFile(dir.join(name)))
    }

    /// The place that a running server names.
    pub(crate) fn at(path: PathBuf) -> TokenFile {
        TokenFile(path)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Reads the token, or makes one where there is none.
    pub(crate) fn read_or_make(&self) -> Result<Token, TokenFileError> {
        match self.read()? {
            Some(token) => Ok(token),
            None => self.make(),
        }
    }

    /// Reads the token; `None` where there is no file.
    pub(crate) fn read(&self) -> Result<Option<Token>, TokenFileError> {
        let io_error = |source| TokenFileError::Io { path: self.0.clone(), source };
        let unsafe_file = |found: String| TokenFileError::Unsafe { path: self.0.clone(), found };
        let found = match self.0.symlink_metadata() {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error(error)),
        };
        if !found.is_file() {
            return Err(unsafe_file("is no plain file".to_owned()));
        }
        let file = File::open(&self.0).map_err(io_error)?;
        let opened = file.metadata().map_err(io_error)?;
        if (opened.dev(), opened.ino()) != (found.dev(), found.ino()) {
            return Err(unsafe_file("was replaced while it was read".to_owned()));
        }
        let (owner, mode) = (opened.uid(), opened.mode() & 0o7777);
        if owner != rustix::process::geteuid().as_raw() {
            return Err(unsafe_file(format!("belongs to the user {owner}")));
        }
        if mode & 0o077 != 0 {
            return Err(unsafe_file(format!("has the mode {mode:04o}")));
        }
        let mut text = String::new();
        file.take(MAX_LENGTH).read_to_string(&mut text).map_err(io_error)?;
        let token = Token::parse(text.trim_end());
        token
            .map(Some)
            .map_err(|expected| TokenFileError::Malformed { path: self.0.clone(), expected })
    }

    /// Makes a token. Another server on the same port that makes one at the same moment gets the same.
    fn make(&self) -> Result<Token, TokenFileError> {
        let io_error = |source| TokenFileError::Io { path: self.0.clone(), source };
        let mut bytes = [0; TOKEN_BYTES];
        getrandom::fill(&mut bytes).map_err(|error| io_error(io::Error::other(error)))?;
        let token = hex(&bytes);
        if let Some(dir) = self.0.parent() {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
            made.map_err(|source| TokenFileError::Io { path: dir.to_owned(), source })?;
        }
        // Written whole under another name, so that nobody reads a part of it; a process that was killed leaves at most that.
        let new = self.0.with_extension(format!("{}.new", std::process::id()));
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error(error)),
            _ => {}
        }
        let written = write(&new, &token).and_then(|()| {
            // Unlike a rename, a link replaces nothing. Not every file system has links.
            std::fs::hard_link(&new, &self.0).or_else(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => Ok(()),
                _ => std::fs::rename(&new, &self.0),
            })
        });
        let _ = std::fs::remove_file(&new);
        written.map_err(io_error)?;
        let gone = || io_error(io::ErrorKind::NotFound.into());
        self.read()?.ok_or_else(gone)
    }
}

fn write(path: &Path, token: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    writeln!(file, "{token}")?;
    file.sync_all()
}

/// Returns what tells a server from others of its user: its port, or a digest of its socket's path.
pub(crate) fn name_of(listen: &ListenOn) -> String {
    match listen {
        ListenOn::Tcp(address) => address.port().to_string(),
        ListenOn::Unix(socket) => {
            let socket = std::path::absolute(socket).unwrap_or_else(|_| socket.clone());
            let digest = Sha256::digest(socket.as_os_str().as_encoded_bytes());
            format!("unix-{}", hex(&digest[..8]))
        }
    }
}

/// Returns the folder for what belongs to running servers of this user.
pub(crate) fn runtime_dir() -> anyhow::Result<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let dir = if let Some(dir) = runtime.filter(|dir| dir.is_absolute()) {
        dir
    } else {
        let strategy = etcetera::choose_base_strategy()
            .context("there is no home directory: set XDG_RUNTIME_DIR")?;
        strategy.state_dir().unwrap_or_else(|| strategy.data_dir())
    };
    Ok(dir.join("afterimage"))
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_token_is_made_once_and_only_its_user_may_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = TokenFile(dir.path().join("below/write-token-8000"));
        assert!(file.read().unwrap().is_none());
        let token = file.read_or_make().unwrap();
        assert_eq!(token.reveal().len(), 2 * TOKEN_BYTES);
        assert_eq!(file.path().metadata().unwrap().mode() & 0o7777, 0o600);
        assert!(file.read_or_make().unwrap() == token);
        assert_eq!(std::fs::read_dir(file.path().parent().unwrap()).unwrap().count(), 1);
        std::fs::remove_file(file.path()).unwrap();
        assert!(file.read_or_make().unwrap() != token);
    }

    #[test]
    fn a_file_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = TokenFile(dir.path().join("write-token-8000"));
        file.read_or_make().unwrap();
        for mode in [0o640, 0o604, 0o660] {
            std::fs::set_permissions(file.path(), Permissions::from_mode(mode)).unwrap();
            let error = file.read_or_make().unwrap_err();
            assert!(error.to_string().contains(&format!("has the mode {mode:04o}")), "{error}");
        }
        std::fs::set_permissions(file.path(), Permissions::from_mode(0o600)).unwrap();
        std::fs::write(file.path(), "short").unwrap();
        assert!(matches!(file.read_or_make(), Err(TokenFileError::Malformed { .. })));

        let elsewhere = dir.path().join("elsewhere");
        std::fs::rename(file.path(), &elsewhere).unwrap();
        symlink(&elsewhere, file.path()).unwrap();
        assert!(matches!(file.read_or_make(), Err(TokenFileError::Unsafe { .. })));
    }
}
