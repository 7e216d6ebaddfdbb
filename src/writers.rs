//! Who may write: the bearer tokens of the settings.

use std::path::Path;

use anyhow::Context;
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use crate::settings;

/// The tokens of those who may write.
///
/// They are kept and compared as their SHA-256, all of them each time: how long that takes tells nothing of a token, not
/// even its length.
#[derive(Default)]
pub struct Writers(Vec<[u8; 32]>);

impl Writers {
    /// Those of the settings and of the file that they name.
    pub fn load(settings: &settings::Writes) -> anyhow::Result<Writers> {
        let tokens = tokens(settings)?;
        Ok(Writers(tokens.iter().map(|token| Sha256::digest(token.reveal()).into()).collect()))
    }

    /// Whether there are none, so that only programs on this machine may write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a token is one of theirs.
    #[must_use]
    pub fn have(&self, token: &[u8]) -> bool {
        let given: [u8; 32] = Sha256::digest(token).into();
        self.0.iter().fold(Choice::from(0), |found, it| found | it.ct_eq(&given)).into()
    }
}

/// Says how many there are.
impl std::fmt::Debug for Writers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Writers({})", self.0.len())
    }
}

/// The tokens of the settings and of the file that they name.
pub fn tokens(settings: &settings::Writes) -> anyhow::Result<Vec<settings::Token>> {
    let mut tokens = settings.tokens.clone();
    if !settings.tokens_file.as_os_str().is_empty() {
        tokens.extend(read(&settings.tokens_file)?);
        anyhow::ensure!(
            !tokens.is_empty(),
            "{} has no token ([writes] tokens_file)",
            settings.tokens_file.display()
        );
    }
    Ok(tokens)
}

fn read(file: &Path) -> anyhow::Result<Vec<settings::Token>> {
    let place = || format!("{} ([writes] tokens_file)", file.display());
    let text = std::fs::read_to_string(file).with_context(place)?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines
        .map(|line| settings::Token::parse(line).map_err(anyhow::Error::msg))
        .collect::<Result<_, _>>()
        .with_context(place)
}
