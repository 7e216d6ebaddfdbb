//! Python: a backend that writes with redis-py, the package, the files for operators, and the documents.

use std::path::Path;
use std::process::Command;

use crate::harness::server::program;
use crate::harness::{RedisServer, Server};

/// The output of a script that failed. A test returns it, so that it is printed last; a panic would print a backtrace behind it.
struct Failed(String);

impl std::fmt::Debug for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Runs a script of the project with the Python that the tests install. It starts servers of its own.
async fn runs(script: &str, arguments: &[&str]) -> Result<(), Failed> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = root.join("target/python/bin/python");
    assert!(
        python.exists(),
        "Python is needed in target/python: run tests/run.sh, which installs it"
    );
    let mut command = Command::new(python);
    command.current_dir(root).arg(root.join(script)).args(arguments);
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        return Err(Failed(format!("{script} ended with {}\n{out}\n{err}", output.status)));
    }
    println!("{out}");
    Ok(())
}

/// Runs a script that starts the program.
async fn runs_with_program(script: &str) -> Result<(), Failed> {
    let command = program();
    runs(script, &[command.get_program().to_str().unwrap()]).await
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_gets_the_images_that_a_python_backend_writes() -> Result<(), Failed> {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let base = format!("http://{}", server.address);
    runs("tests/it/backend.py", &[&redis.url(), &base]).await
}

#[tokio::test]
async fn the_wheel_brings_the_program_and_its_module_stores_images() -> Result<(), Failed> {
    runs_with_program("clients/python/tests/run.py").await
}

#[tokio::test]
async fn the_units_are_hardened_and_the_package_has_what_they_need() -> Result<(), Failed> {
    runs_with_program("tests/ops/service.py").await
}

#[tokio::test]
async fn compose_kubernetes_chart_and_container_files_are_valid() -> Result<(), Failed> {
    runs_with_program("tests/ops/manifests.py").await
}

#[tokio::test]
async fn caddy_haproxy_and_traefik_pass_images_and_refuse_writes() -> Result<(), Failed> {
    runs_with_program("tests/ops/proxies.py").await
}

#[tokio::test]
async fn the_reference_says_what_the_program_is_built_of() -> Result<(), Failed> {
    let command = program();
    runs("docs/generate.py", &["--check", command.get_program().to_str().unwrap()]).await
}

#[tokio::test]
async fn every_block_in_the_documents_runs_or_says_why_not() -> Result<(), Failed> {
    runs_with_program("tests/docs.py").await
}
