//! `export` and `import`: backups of a store.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Context;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, BufWriter};

use super::client::ServerAddress;
use super::images::{Images, Put};
use super::{Failures, is_dash};
use crate::backup::{BackupRecord, Line};
use crate::image::ImageId;
use crate::settings::Settings;

/// The options of `export`.
#[derive(Debug)]
pub(super) struct Export {
    pub(super) file: PathBuf,
    pub(super) prefix: String,
    pub(super) server: Option<ServerAddress>,
}

/// The options of `import`.
#[derive(Debug)]
pub(super) struct Import {
    pub(super) file: PathBuf,
    pub(super) replaces: bool,
    pub(super) server: Option<ServerAddress>,
}

pub(super) async fn export(settings: &Settings, options: Export) -> anyhow::Result<()> {
    let store = Images::open(settings, options.server).await?;
    if is_dash(&options.file) {
        return store.export(&options.prefix, BufWriter::new(tokio::io::stdout())).await;
    }
    // Under another name until it is whole, so that a failure leaves the backup before as it was.
    let file = &options.file;
    let mut name = file.file_name().context("the backup needs the name of a file")?.to_owned();
    name.push(".new");
    let new = file.with_file_name(name);
    let written = async {
        let mut to = tokio::fs::File::create(&new).await?;
        store.export(&options.prefix, BufWriter::new(&mut to)).await?;
        to.flush().await?;
        to.sync_all().await?;
        tokio::fs::rename(&new, file).await?;
        anyhow::Ok(())
    };
    if let Err(error) = written.await {
        let _ = tokio::fs::remove_file(&new).await;
        return Err(error.context(format!("no backup was written to {}", file.display())));
    }
    report(file).await
}

/// Reads the end of a backup, and tells what was left out.
async fn report(file: &Path) -> anyhow::Result<()> {
    let reader = BufReader::new(tokio::fs::File::open(file).await?);
    let (mut failures, mut lines) =
        (Failures::default(), Lines { reader, longest: u64::MAX, number: 0 });
    let mut whole = None;
    while let Some((_, line)) = lines.next().await? {
        match line? {
            Line::LeftOut { id, left_out } => {
                failures.tell(&anyhow::anyhow!("{id} was left out: {left_out}"));
            }
            Line::End { records } => whole = Some(records),
            Line::Record(_) => {}
        }
    }
    let records = whole.context("the backup was cut off")?;
    println!("{records} records are in {}", file.display());
    failures.end()
}

pub(super) async fn import(settings: &Settings, options: Import) -> anyhow::Result<()> {
    let file = &options.file;
    let store = Images::open(settings, options.server).await?;
    let reader: Box<dyn AsyncBufRead + Unpin> = if is_dash(file) {
        Box::new(BufReader::new(tokio::io::stdin()))
    } else {
        let opened = tokio::fs::File::open(file).await;
        Box::new(BufReader::new(opened.with_context(|| format!("can't read {}", file.display()))?))
    };
    // A record as JSON in a string, where each byte may take six.
    let longest = 6 * settings.records.max_value as u64 + 4096;
    let mut lines = Lines { reader, longest, number: 0 };
    let (mut failures, mut counts) = (Failures::default(), Counts::default());
    let mut whole = false;
    while let Some((number, line)) = lines.next().await? {
        let result = match line {
            Ok(Line::Record(record)) => {
                let stored = store_record(&store, record, options.replaces, &mut counts).await;
                stored.with_context(|| format!("line {number}"))
            }
            Ok(Line::LeftOut { id, left_out }) => {
                Err(anyhow::anyhow!("{id} isn't in the backup: {left_out}"))
            }
            Ok(Line::End { .. }) => {
                whole = true;
                Ok(())
            }
            Err(error) => Err(error.context(format!("line {number}"))),
        };
        if let Err(error) = result {
            failures.tell(&error);
        }
    }
    println!("{counts} in {}", store.place());
    if !whole {
        failures.tell(&anyhow::anyhow!("the backup was cut off: its last line is missing"));
    }
    failures.end()
}

/// The records of an import, by what became of them.
#[derive(Default)]
struct Counts {
    stored: u64,
    kept: u64,
    expired: u64,
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} records are stored", self.stored)?;
        if self.kept > 0 {
            write!(f, ", {} were there and are kept (--replace replaces them)", self.kept)?;
        }
        if self.expired > 0 {
            write!(f, ", {} had expired", self.expired)?;
        }
        Ok(())
    }
}

async fn store_record(
    store: &Images,
    record: BackupRecord,
    replaces: bool,
    counts: &mut Counts,
) -> anyhow::Result<()> {
    let id = ImageId::parse(&record.id)?;
    let Some(expiry) = record.expiry(SystemTime::now()) else {
        counts.expired += 1;
        return Ok(());
    };
    match store.put(&id, record.into_value()?, expiry, replaces).await? {
        Put::Stored { .. } => counts.stored += 1,
        Put::Kept => counts.kept += 1,
    }
    Ok(())
}

/// The lines of a backup, with their numbers.
struct Lines<R> {
    reader: R,
    /// In bytes.
    longest: u64,
    number: u64,
}

impl<R: AsyncBufRead + Unpin> Lines<R> {
    /// Reads the next line; `None` after the last.
    async fn next(&mut self) -> anyhow::Result<Option<(u64, anyhow::Result<Line>)>> {
        self.number += 1;
        let mut text = Vec::new();
        (&mut self.reader).take(self.longest).read_until(b'\n', &mut text).await?;
        if text.is_empty() {
            return Ok(None);
        }
        let is_cut = text.len() as u64 == self.longest && !text.ends_with(b"\n");
        anyhow::ensure!(!is_cut, "line {} is longer than a record may be", self.number);
        let line = serde_json::from_slice(&text).context("expected a line of `afterimage export`");
        Ok(Some((self.number, line)))
    }
}
