//! The processes that decode AVIF and JPEG XL.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use afterimage::App;
use hyper::StatusCode;

use crate::harness::server::load;
use crate::harness::{RedisServer, Server, record};

const AVIF: &[u8] = include_bytes!("../cases/avif-8-bits.avif");

/// A server whose decoder processes run another program.
async fn server(redis: &RedisServer, program: &Path, further: &[(&str, &str)]) -> Server {
    let url = redis.url();
    let mut all = vec![("redis.url", url.as_str())];
    all.extend_from_slice(further);
    let mut settings = load(&all);
    settings.pictures.program = program.to_owned();
    Server::serve(App::build(settings).await.unwrap()).coherent().await
}

/// A program of a line of shell.
fn script(dir: &tempfile::TempDir, line: &str) -> PathBuf {
    let path = dir.path().join("decoder");
    std::fs::write(&path, format!("#!/bin/sh\n{line}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[tokio::test]
async fn an_avif_is_shown_in_other_sizes_and_formats() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    redis.set("a", &record(AVIF)).await;
    for (path, media_type, size) in [
        ("a?w=32", "image/webp", (32, 24)),
        ("a.png", "image/png", (64, 48)),
        ("a?format=jpg&w=16", "image/jpeg", (16, 12)),
        ("a/thumbnail", "image/webp", (64, 64)),
    ] {
        let answer = server.get(&format!("/images/{path}")).await;
        assert_eq!(answer.header("content-type"), media_type, "{path}");
        let picture = image::load_from_memory(&answer.body).unwrap();
        assert_eq!((picture.width(), picture.height()), size, "{path}");
    }
    let info = server.get("/images/a/info").await;
    let info: serde_json::Value = serde_json::from_slice(&info.body).unwrap();
    assert_eq!((&info["width"], &info["height"]), (&64.into(), &48.into()));
    assert_eq!(server.get("/images/a").await.body, AVIF);
}

#[tokio::test]
async fn a_decoder_that_cannot_be_started_is_no_fault_of_the_picture() {
    let (redis, dir) = (RedisServer::start().await, tempfile::tempdir().unwrap());
    let program = dir.path().join("decoder");
    let server = server(&redis, &program, &[]).await;
    redis.set("a", &record(AVIF)).await;
    assert_eq!(server.get("/images/a").await.body, AVIF);
    server.get("/images/a.png").await.problem(503, "busy");
    // It is tried again, without a wait.
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_afterimage"), &program).unwrap();
    assert_eq!(server.get("/images/a.png").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_decoder_that_crashes_costs_only_its_picture() {
    let (redis, dir) = (RedisServer::start().await, tempfile::tempdir().unwrap());
    let server = server(&redis, &script(&dir, "kill -6 $$"), &[]).await;
    redis.set("a", &record(AVIF)).await;
    let refused = server.get("/images/a.png").await;
    assert_eq!(refused.status, StatusCode::NOT_ACCEPTABLE);
    let text = String::from_utf8_lossy(&refused.body).into_owned();
    assert!(text.contains("the decoder ended with signal: 6"), "{text}");
    assert_eq!(server.get("/images/a?format=auto").await.body, AVIF);
    assert_eq!(server.get("/healthz").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_decoder_that_hangs_is_killed_at_the_deadline() {
    let (redis, dir) = (RedisServer::start().await, tempfile::tempdir().unwrap());
    let pid = dir.path().join("pid");
    let line = format!("echo $$ > {}; exec sleep 600", pid.display());
    let server = server(&redis, &script(&dir, &line), &[("pictures.timeout", "1s")]).await;
    redis.set("a", &record(AVIF)).await;
    server.get("/images/a.png").await.problem(503, "render-timeout");
    let pid = std::fs::read_to_string(pid).unwrap();
    let process = format!("/proc/{}", pid.trim());
    crate::harness::until("it is gone", || async { !Path::new(&process).exists() }).await;
}

/// Runs a decoder process as a server does, with room for some bytes.
fn decode(bytes: &[u8], memory: u64) -> Output {
    let (length, memory) = (bytes.len().to_string(), memory.to_string());
    let mut child = Command::new(env!("CARGO_BIN_EXE_afterimage"))
        .args(["decode-picture", "image/avif", &length, "10000000", &memory, "60000"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _ = child.stdin.take().unwrap().write_all(bytes);
    child.wait_with_output().unwrap()
}

#[test]
fn a_decoder_takes_no_more_memory_than_it_was_given() {
    // Six megapixels of one colour.
    let large = include_bytes!("../cases/avif-six-megapixels.avif");
    let output = decode(large, 200_000_000);
    assert!(output.status.success() && output.stdout.starts_with(b"\x89PNG"), "{output:?}");
    let output = decode(large, 1000);
    assert_eq!(output.status.signal(), Some(6), "{:?}", output.status);
    assert!(decode(AVIF, 1000).status.success());
}
