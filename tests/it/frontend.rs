//! The front end: the package, the example with Vite, and the snippets of the guide, in Chromium.

use std::path::Path;
use std::process::Command;

use crate::browser::{browser_folder, passes_checks};
use crate::harness::{RedisServer, Server};

long_tests! {
    #[tokio::test] the_package_is_typed_small_and_right_in_its_pure_parts
    #[tokio::test(flavor = "multi_thread")]
    the_package_follows_images_in_many_tabs_and_through_failures
    #[tokio::test(flavor = "multi_thread")]
    the_example_and_the_snippets_of_the_guide_work_as_they_stand
}

const TOKEN: &str = "a-token-of-some-length";

async fn start(redis: &RedisServer) -> Server {
    let settings = [("writes.tokens", r#"["a-token-of-some-length"]"#)];
    Server::on(redis, &settings).await.coherent().await
}

/// Runs a program in a folder, and fails if it does.
fn run(program: &str, arguments: &[&str], folder: &Path) {
    let run = Command::new(program).args(arguments).current_dir(folder).output().unwrap();
    let [out, err] = [&run.stdout, &run.stderr].map(|it| String::from_utf8_lossy(it));
    print!("{out}");
    assert!(run.status.success(), "{program} {arguments:?}: {out}\n{err}");
}

async fn the_package_is_typed_small_and_right_in_its_pure_parts() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // Below the folder with the packages, where Node finds them.
    let copy = browser_folder().join("package");
    let _ = std::fs::remove_dir_all(&copy);
    std::fs::create_dir(&copy).unwrap();
    let package = root.join("clients/web");
    for part in ["src", "test", "package.json", "tsconfig.json"] {
        run("cp", &["-r", package.join(part).to_str().unwrap(), "."], &copy);
    }
    run("node", &["../node_modules/typescript/bin/tsc"], &copy);
    run("npm", &["test"], &copy);
    run("npm", &["run", "size"], &copy);
    std::fs::remove_dir_all(&copy).unwrap();
}

async fn the_package_follows_images_in_many_tabs_and_through_failures() {
    let redis = RedisServer::start().await;
    let server = start(&redis).await;
    passes_checks("web.mjs", &[&format!("http://{}", server.address), TOKEN]).await;
}

async fn the_example_and_the_snippets_of_the_guide_work_as_they_stand() {
    let redis = RedisServer::start().await;
    let server = start(&redis).await;
    passes_checks("vite-example.mjs", &[&format!("http://{}", server.address), TOKEN]).await;
}
