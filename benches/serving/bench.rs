//! Shared by all sections: options, a folder, cores, and free ports.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::installed;
use crate::options::{Options, Section};
use crate::process::Cores;

#[derive(Debug, Clone)]
pub(crate) struct Bench {
    pub(crate) options: Options,
    pub(crate) cores: Cores,
    pub(crate) dir: Arc<TempDir>,
    /// The build under test; `against` is the one to compare it with.
    pub(crate) afterimage: PathBuf,
    pub(crate) against: Option<PathBuf>,
    /// Python interpreter with the peers' packages, or the reason why it is missing.
    pub(crate) python: Result<PathBuf, String>,
}

impl Bench {
    pub(crate) fn prepare(options: Options) -> Result<Bench> {
        installed::install();
        // Ten thousand connections need that many files, here and in the server, which inherits the limit.
        let limit = raise_limit_of_files();
        eprintln!("limit of open files: {}", limit.unwrap_or_default());
        let dir = Arc::new(tempfile::tempdir()?);
        fs::write(dir.path().join("one.lua"), include_str!("one.lua"))?;
        let many = [include_str!("many.lua"), include_str!("one.lua")].concat();
        fs::write(dir.path().join("many.lua"), many)?;
        // Copies, since a build may replace the programs while this runs.
        let programs = Path::new(env!("CARGO_TARGET_TMPDIR")).join("serving");
        fs::create_dir_all(&programs)?;
        let copy = |from: &Path, name: &str| -> Result<PathBuf> {
            let to = programs.join(name);
            let _ = fs::remove_file(&to);
            fs::copy(from, &to).with_context(|| format!("{} can't be copied", from.display()))?;
            Ok(to)
        };
        let afterimage = copy(Path::new(env!("CARGO_BIN_EXE_afterimage")), "afterimage")?;
        let against = options.against.as_deref().map(|it| copy(it, "against")).transpose()?;
        let asks_python = |it: &Section| matches!(it, Section::Hit | Section::Cold);
        let python = if options.only.iter().any(asks_python) {
            installed::python().map_err(|error| format!("{error:#}"))
        } else {
            Err("not asked for".to_owned())
        };
        let cores = Cores::split();
        cores.move_this_process()?;
        Ok(Bench { options, cores, dir, afterimage, against, python })
    }

    /// Returns an unused path that begins with this name.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        let mut number = 0;
        loop {
            let file = self.dir.path().join(format!("{name}-{number}"));
            if !file.exists() {
                return file;
            }
            number += 1;
        }
    }

    /// Creates a folder of image files for nginx.
    pub(crate) fn files<'a>(
        &self,
        images: impl Iterator<Item = (String, &'a [u8])>,
    ) -> Result<PathBuf> {
        let folder = self.file("files");
        fs::create_dir_all(folder.join("images"))?;
        for (id, bytes) in images {
            fs::write(folder.join("images").join(id), bytes)?;
        }
        Ok(folder)
    }
}

fn raise_limit_of_files() -> std::io::Result<u64> {
    const WANTED: u64 = 32_768;
    let (_, hard) = rlimit::Resource::NOFILE.get()?;
    if hard < WANTED && rlimit::Resource::NOFILE.set(WANTED, WANTED).is_ok() {
        return Ok(WANTED);
    }
    rlimit::increase_nofile_limit(WANTED)
}

/// Returns an address with a port that is free at this moment.
pub(crate) fn free_port() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}
