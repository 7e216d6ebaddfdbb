//! The bearer tokens of those who may write and list.

use std::fmt;
use std::path::Path;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use anyhow::Context;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::image::hex;
use crate::settings;

/// The tokens of the settings and of the file that they name, or else the one that the server made.
pub(crate) struct Tokens {
    made: Option<settings::Token>,
    current: RwLock<TokenSet>,
}

/// Some tokens.
///
/// They are kept and compared as their SHA-256, and always all of them: the time of a comparison tells nothing about a
/// token, not even its length.
struct TokenSet {
    digests: Vec<[u8; 32]>,
    are_configured: bool,
}

/// Precedes the digest of a token in what a session is the digest of.
const SESSION: &[u8] = b"afterimage session\0";

impl Tokens {
    /// Reads the tokens. The one that the server made counts only without any other.
    pub(crate) fn load(
        settings: &settings::WriteSettings,
        made: Option<settings::Token>,
    ) -> anyhow::Result<Tokens> {
        let current = RwLock::new(TokenSet::read(settings, made.as_ref())?);
        Ok(Tokens { made, current })
    }

    /// Reads the tokens again. If they can't be read, or all are gone, those before stay: a file that is just being written is
    /// empty for a moment.
    pub(crate) fn reload(&self, settings: &settings::WriteSettings) -> anyhow::Result<()> {
        let read = TokenSet::read(settings, self.made.as_ref())?;
        anyhow::ensure!(
            read.are_configured || !self.are_configured(),
            "[writes] must still have a token: only a restart takes the last one away"
        );
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = read;
        Ok(())
    }

    /// True without any token.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        self.current().digests.is_empty()
    }

    /// True if the settings have tokens: then nobody may write without one.
    #[must_use]
    pub(crate) fn are_configured(&self) -> bool {
        self.current().are_configured
    }

    /// True for one of the tokens.
    #[must_use]
    pub(crate) fn contain(&self, token: &[u8]) -> bool {
        self.current().contains(token)
    }

    /// Makes the session of a token, for a browser's cookie; `None` if the token isn't one of these. A session doesn't tell
    /// its token, and lasts as long as that.
    pub(crate) fn session(&self, token: &[u8]) -> Option<String> {
        let digest = Sha256::digest(token).into();
        self.contain(token).then(|| hex(&session(&digest)))
    }

    /// True for the session of one of the tokens.
    #[must_use]
    pub(crate) fn contain_session(&self, text: &[u8]) -> bool {
        let current = self.current();
        let sessions: Vec<String> = current.digests.iter().map(|it| hex(&session(it))).collect();
        is_among(text, sessions.iter().map(String::as_bytes))
    }

    fn current(&self) -> RwLockReadGuard<'_, TokenSet> {
        self.current.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TokenSet {
    fn read(
        settings: &settings::WriteSettings,
        made: Option<&settings::Token>,
    ) -> anyhow::Result<TokenSet> {
        let mut tokens = read(settings)?;
        let are_configured = !tokens.is_empty();
        if !are_configured {
            tokens.extend(made.cloned());
        }
        let digests = tokens.iter().map(|token| Sha256::digest(token.reveal()).into()).collect();
        Ok(TokenSet { digests, are_configured })
    }

    fn contains(&self, token: &[u8]) -> bool {
        let given: [u8; 32] = Sha256::digest(token).into();
        is_among(&given, self.digests.iter())
    }
}

fn session(digest: &[u8; 32]) -> [u8; 32] {
    Sha256::new().chain_update(SESSION).chain_update(digest).finalize().into()
}

/// Compares with all of them, in a time that doesn't depend on them.
fn is_among<T: AsRef<[u8]>>(given: &[u8], all: impl Iterator<Item = T>) -> bool {
    all.fold(Choice::from(0), |found, it| found | it.as_ref().ct_eq(given)).into()
}

/// Shows the number of tokens, not the tokens.
impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokens({})", self.current().digests.len())
    }
}

/// Reads the tokens of the settings and of the file that they name.
pub(crate) fn read(settings: &settings::WriteSettings) -> anyhow::Result<Vec<settings::Token>> {
    let mut tokens = settings.tokens.clone();
    if !settings.tokens_file.as_os_str().is_empty() {
        tokens.extend(read_file(&settings.tokens_file)?);
        anyhow::ensure!(
            !tokens.is_empty(),
            "{} must have at least one token ([writes] tokens_file)",
            settings.tokens_file.display()
        );
    }
    Ok(tokens)
}

fn read_file(file: &Path) -> anyhow::Result<Vec<settings::Token>> {
    let place = || format!("{} ([writes] tokens_file)", file.display());
    let text = std::fs::read_to_string(file).with_context(place)?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines
        .map(|line| settings::Token::parse(line).map_err(anyhow::Error::msg))
        .collect::<Result<_, _>>()
        .with_context(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_belongs_to_its_token_and_does_not_tell_it() {
        let digest = |token: &str| Sha256::digest(token).into();
        let of = |digests| Tokens {
            made: None,
            current: RwLock::new(TokenSet { digests, are_configured: true }),
        };
        let tokens = of(vec![digest("one"), digest("two")]);
        assert!(tokens.contain(b"two") && !tokens.contain(b"three"));
        let session = tokens.session(b"two").unwrap();
        assert!(tokens.contain_session(session.as_bytes()));
        assert!(!tokens.contain(session.as_bytes()) && !tokens.contain_session(b"two"));
        assert!(!tokens.contain_session(b"") && tokens.session(b"three").is_none());
        let others = of(vec![digest("one")]);
        assert!(!others.contain_session(session.as_bytes()));
    }
}
