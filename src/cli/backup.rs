//! `export` and `import`: backups of a store.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Context;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, BufReader, BufWriter};
use tokio::signal::unix::{SignalKind, signal};

use super::client::ServerAddress;
use super::images::{Access, Images, Life, Put};
use super::new_file::NewFile;
use super::{Failures, is_dash, say};
use crate::backup::{BackupRecord, Line};
use crate::image::ImageId;
use crate::settings::Settings;

/// Bytes of a line that is left out, in memory at a time.
const PART: u64 = 64 * 1024;

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
    let store = Images::open(settings, options.server, Access::Read).await?;
    if is_dash(&options.file) {
        return store.export(&options.prefix, BufWriter::new(tokio::io::stdout())).await;
    }
    let file = &options.file;
    let written = async {
        let new = NewFile::beside(file)?;
        let to = tokio::fs::File::from_std(new.file.try_clone()?);
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            exported = store.export(&options.prefix, BufWriter::new(to)) => exported?,
            // The part that was written is removed with `new`.
            _ = tokio::signal::ctrl_c() => anyhow::bail!("interrupted"),
            _ = terminate.recv() => anyhow::bail!("interrupted"),
        }
        anyhow::Ok(new.keep()?)
    };
    written.await.with_context(|| format!("no backup was written to {}", file.display()))?;
    if file.is_file() { report(file).await } else { Ok(()) }
}

/// Reads a backup again, and tells what was left out.
async fn report(file: &Path) -> anyhow::Result<()> {
    let reader = BufReader::new(tokio::fs::File::open(file).await?);
    let (mut failures, mut lines) = (Failures::default(), Lines::new(reader, u64::MAX));
    while let Some((_, line)) = lines.next().await? {
        if let Line::LeftOut { id, left_out } = line? {
            failures.tell(&anyhow::anyhow!("{id} was left out: {left_out}"));
        }
    }
    lines.check_end()?;
    say(&format!("{} records are in {}", lines.records, file.display()))?;
    failures.end()
}

pub(super) async fn import(settings: &Settings, options: Import) -> anyhow::Result<()> {
    let file = &options.file;
    let store = Images::open(settings, options.server, Access::Write).await?;
    let reader: Box<dyn AsyncBufRead + Unpin> = if is_dash(file) {
        Box::new(BufReader::new(tokio::io::stdin()))
    } else {
        let opened = tokio::fs::File::open(file).await;
        Box::new(BufReader::new(opened.with_context(|| format!("can't read {}", file.display()))?))
    };
    // A record as JSON in a string, where each byte may take six.
    let mut lines = Lines::new(reader, 6 * settings.records.max_value as u64 + 4096);
    let (mut failures, mut counts) = (Failures::default(), Counts::default());
    while let Some((number, line)) = lines.next().await? {
        let result = match line {
            Ok(Line::Record(record)) => {
                let id = record.id.clone();
                let stored =
                    store_record(settings, &store, record, options.replaces, &mut counts).await;
                stored.with_context(|| format!("line {number}, {id}"))
            }
            Ok(Line::LeftOut { id, left_out }) => {
                Err(anyhow::anyhow!("{id} isn't in the backup: {left_out}"))
            }
            Ok(Line::End { .. }) => Ok(()),
            Err(error) if number == 1 => {
                let name = file.display();
                return Err(error.context(format!("{name} isn't a backup of `afterimage export`")));
            }
            Err(error) => Err(error.context(format!("line {number}"))),
        };
        if let Err(error) = result {
            failures.tell(&error);
        }
    }
    say(&format!("{counts} in {}", store.place()))?;
    if let Err(error) = lines.check_end() {
        failures.tell(&error);
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
    settings: &Settings,
    store: &Images,
    record: BackupRecord,
    replaces: bool,
    counts: &mut Counts,
) -> anyhow::Result<()> {
    let id = ImageId::parse(&record.id)?;
    let Some(expiry) = record.expiry(SystemTime::now())? else {
        counts.expired += 1;
        return Ok(());
    };
    let (value, limit) = (record.into_value()?, settings.records.max_value);
    anyhow::ensure!(
        value.len() <= limit,
        "the record has {} bytes; the limit is {limit} ([records] max_value)",
        value.len()
    );
    match store.put(settings, &id, value, Life::Restored(expiry), replaces).await? {
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
    records: u64,
    /// The number of records according to the end line, if that is the line that was read last.
    told: Option<u64>,
}

impl<R: AsyncBufRead + Unpin> Lines<R> {
    fn new(reader: R, longest: u64) -> Lines<R> {
        Lines { reader, longest, number: 0, records: 0, told: None }
    }

    /// Reads the next line; `None` after the last.
    async fn next(&mut self) -> anyhow::Result<Option<(u64, anyhow::Result<Line>)>> {
        self.number += 1;
        let mut text = Vec::new();
        (&mut self.reader).take(self.longest).read_until(b'\n', &mut text).await?;
        if text.is_empty() {
            return Ok(None);
        }
        self.told = None;
        if text.len() as u64 == self.longest && !text.ends_with(b"\n") {
            self.skip_line().await?;
            self.records += 1;
            let line = Err(anyhow::anyhow!("the line is longer than a record may be"));
            return Ok(Some((self.number, line)));
        }
        let line = serde_json::from_slice(&text).context("expected a line of `afterimage export`");
        match &line {
            Ok(Line::Record(_)) => self.records += 1,
            Ok(Line::End { records }) => self.told = Some(*records),
            Ok(Line::LeftOut { .. }) | Err(_) => {}
        }
        Ok(Some((self.number, line)))
    }

    /// Reads on to the end of a line, and keeps none of it.
    async fn skip_line(&mut self) -> anyhow::Result<()> {
        loop {
            let mut part = Vec::new();
            (&mut self.reader).take(PART).read_until(b'\n', &mut part).await?;
            if part.is_empty() || part.ends_with(b"\n") {
                return Ok(());
            }
        }
    }

    /// Checks that the last line was there, and all records before it.
    fn check_end(&self) -> anyhow::Result<()> {
        let told = self.told.context("the backup was cut off: its last line is missing")?;
        anyhow::ensure!(
            told == self.records,
            "the backup is damaged: it should have {told} records, and has {}",
            self.records
        );
        Ok(())
    }
}
