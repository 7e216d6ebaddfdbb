//! The bearer tokens of those who may write and list.

use std::fmt;
use std::path::Path;

use anyhow::Context;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::settings;

/// The tokens of the settings and of the file that they name, or else the one that the server made.
///
/// They are kept and compared as their SHA-256, and always all of them: the time of a comparison tells nothing about a
/// token, not even its length.
pub(crate) struct Tokens {
    digests: Vec<[u8; 32]>,
    are_configured: bool,
}

impl Tokens {
    /// Reads the tokens. The one that the server made counts only without any other.
    pub(crate) fn load(
        settings: &settings::WriteSettings,
        made: Option<settings::Token>,
    ) -> anyhow::Result<Tokens> {
        let mut tokens = read(settings)?;
        let are_configured = !tokens.is_empty();
        if !are_configured {
            tokens.extend(made);
        }
        let digests = tokens.iter().map(|token| Sha256::digest(token.reveal()).into()).collect();
        Ok(Tokens { digests, are_configured })
    }

    /// True without any token.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        self.digests.is_empty()
    }

    /// True if the settings have tokens: then nobody may write without one.
    #[must_use]
    pub(crate) fn are_configured(&self) -> bool {
        self.are_configured
    }

    /// True for one of the tokens.
    #[must_use]
    pub(crate) fn contain(&self, token: &[u8]) -> bool {
        let given: [u8; 32] = Sha256::digest(token).into();
        self.digests.iter().fold(Choice::from(0), |found, it| found | it.ct_eq(&given)).into()
    }
}

/// Shows the number of tokens, not the tokens.
impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokens({})", self.digests.len())
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
