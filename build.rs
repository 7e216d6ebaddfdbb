//! Names the commit in the version of the program, where it is known.

use std::path::Path;
use std::process::Command;

fn main() {
    // Packagers who build from an archive set it.
    println!("cargo:rerun-if-env-changed=AFTERIMAGE_COMMIT");
    println!("cargo:rerun-if-changed=build.rs");
    // The last line of the log is the present commit, whatever the branch.
    let log = ".git/logs/HEAD";
    if Path::new(log).exists() {
        println!("cargo:rerun-if-changed={log}");
    }
    let commit = std::env::var("AFTERIMAGE_COMMIT").ok().or_else(|| {
        let arguments = ["log", "-1", "--format=%h %cs"];
        let output = Command::new("git").args(arguments).output().ok()?;
        let is_ours = Path::new(".git").exists() && output.status.success();
        is_ours.then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    });
    if let Some(commit) = commit.filter(|it| !it.is_empty()) {
        println!("cargo:rustc-env=PROGRAM_VERSION={} ({commit})", env!("CARGO_PKG_VERSION"));
    }
}
