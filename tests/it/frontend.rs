//! What pages are made with: the package for front ends, the example with Vite, and the snippets of the guide, in Chromium.

use crate::browser::passes_checks;
use crate::harness::{RedisServer, Server};

long_tests! {
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
