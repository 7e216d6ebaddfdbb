//! Options of the command line.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// A part of the bench that can be run alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Section {
    Hit,
    Cold,
    Zipf,
    Open,
    Memory,
}

impl Section {
    pub(crate) const ALL: [Section; 5] =
        [Section::Hit, Section::Cold, Section::Zipf, Section::Open, Section::Memory];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Section::Hit => "hit",
            Section::Cold => "cold",
            Section::Zipf => "zipf",
            Section::Open => "open",
            Section::Memory => "memory",
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) quick: bool,
    pub(crate) only: Vec<Section>,
    /// Another build of Afterimage to compare with.
    pub(crate) against: Option<PathBuf>,
}

impl Options {
    pub(crate) fn parse(arguments: impl Iterator<Item = String>) -> Result<Options> {
        let mut options = Options { quick: false, only: Section::ALL.to_vec(), against: None };
        for argument in arguments {
            match argument.split_once('=') {
                None if argument == "quick" => options.quick = true,
                Some(("only", names)) => options.only = sections(names)?,
                Some(("against", path)) => {
                    let path = std::fs::canonicalize(path)
                        .with_context(|| format!("against={path}: there is no such program"))?;
                    options.against = Some(path);
                }
                _ => bail!(
                    "unknown argument {argument:?}: expected quick, only=hit,cold,zipf,open,memory or against=PATH"
                ),
            }
        }
        Ok(options)
    }

    pub(crate) fn rounds(&self) -> usize {
        if self.quick { 2 } else { 5 }
    }

    /// Duration of one measurement, in seconds.
    pub(crate) fn seconds(&self) -> u32 {
        if self.quick { 1 } else { 3 }
    }
}

fn sections(names: &str) -> Result<Vec<Section>> {
    let section = |name: &str| {
        let found = Section::ALL.into_iter().find(|it| it.name() == name);
        found.with_context(|| format!("only={names}: there is no section {name:?}"))
    };
    names.split(',').map(section).collect()
}
