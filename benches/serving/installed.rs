//! Programs that the bench needs besides Afterimage: found, or installed as root.

use std::env;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::process::run;

/// A program and its Debian package.
const NEEDED: [(&str, &str); 7] = [
    ("redis-server", "redis-server"),
    ("nginx", "nginx"),
    ("varnishd", "varnish"),
    ("wrk", "wrk"),
    ("h2load", "nghttp2-client"),
    ("taskset", "util-linux"),
    ("python3", "python3"),
];

/// Finds a program in `PATH` and in the folders for administrators, which may not be on it.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    folders.map(|folder| folder.join(program)).find(|file| file.is_file())
}

/// Finds a program, or fails with the command that installs it.
pub(crate) fn need(program: &str) -> Result<PathBuf> {
    find(program).with_context(|| {
        let package = NEEDED.iter().find(|it| it.0 == program).map_or(program, |it| it.1);
        format!("{program} is missing: apt-get install {package}")
    })
}

pub(crate) fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|it| it.uid() == 0)
}

/// Installs missing programs. Without one, the part that needs it fails.
pub(crate) fn install() {
    let missing: Vec<&str> =
        NEEDED.iter().filter(|it| find(it.0).is_none()).map(|it| it.1).collect();
    if missing.is_empty() || !is_root() || find("apt-get").is_none() {
        return;
    }
    eprintln!("installing {}", missing.join(", "));
    if let Err(error) = packages(&missing) {
        eprintln!("{error:#}");
    }
}

fn packages(names: &[&str]) -> Result<()> {
    let mut update = Command::new("apt-get");
    update.args(["update", "-q"]);
    run("apt-get update", update, Duration::from_mins(5))?;
    let mut install = Command::new("apt-get");
    // No service: the bench starts servers of its own.
    install.env("DEBIAN_FRONTEND", "noninteractive").env("RUNLEVEL", "1");
    install.args(["install", "-qy", "--no-install-recommends"]).args(names);
    run("apt-get install", install, Duration::from_mins(10)).map(drop)
}

/// Finds a Python with the packages of its peers: that of the tests, or a new environment.
pub(crate) fn python() -> Result<PathBuf> {
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    let wanted = wanted()?;
    let own = target.join("serving/python");
    for folder in [target.join("python"), own.clone()] {
        let python = folder.join("bin/python");
        if has(&python, &wanted) {
            return Ok(python);
        }
    }
    eprintln!("making a Python with {}", wanted.join(", "));
    let mut make = Command::new(need("python3")?);
    make.args(["-m", "venv", "--clear"]).arg(&own);
    if run("python3 -m venv", make, Duration::from_mins(2)).is_err() {
        ensure!(is_root() && find("apt-get").is_some(), "apt-get install python3-venv");
        packages(&["python3-venv"])?;
        let mut again = Command::new(need("python3")?);
        again.args(["-m", "venv", "--clear"]).arg(&own);
        run("python3 -m venv", again, Duration::from_mins(2))?;
    }
    let mut pip = Command::new(own.join("bin/pip"));
    pip.args(["install", "--quiet", "--disable-pip-version-check"]).args(&wanted);
    run("pip install", pip, Duration::from_mins(5))?;
    let python = own.join("bin/python");
    ensure!(has(&python, &wanted), "pip has installed other versions than {}", wanted.join(", "));
    Ok(python)
}

/// Packages in the versions that the tests pin.
fn wanted() -> Result<Vec<String>> {
    const PINNED: &str = include_str!("../../tests/it/requirements.txt");
    ["fastapi", "uvicorn", "redis"]
        .iter()
        .map(|name| {
            let line = PINNED.lines().find(|line| line.split("==").next() == Some(name));
            line.map(String::from).with_context(|| format!("no version of {name} is pinned"))
        })
        .collect()
}

fn has(python: &Path, wanted: &[String]) -> bool {
    const ASK: &str = "import importlib.metadata as m, sys\n\
        sys.exit(any(m.version(n) != v for n, v in (it.split('==') for it in sys.argv[1:])))";
    let mut ask = Command::new(python);
    ask.args(["-c", ASK]).args(wanted);
    python.exists() && run("python", ask, Duration::from_secs(20)).is_ok()
}

/// First line that a program prints about its version.
pub(crate) fn version(program: &str, argument: &str) -> String {
    let printed = || -> Result<String> {
        let output = Command::new(need(program)?).arg(argument).output()?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        match text.lines().next() {
            Some(line) => Ok(line.trim().to_owned()),
            None => bail!("{program} prints no version"),
        }
    };
    printed().unwrap_or_else(|error| format!("{error:#}"))
}
