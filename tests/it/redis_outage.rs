//! Redis goes away and comes back while requests go on.

use hyper::StatusCode;

use crate::harness::{Client, RedisServer, Server, png, record, until};

#[tokio::test]
async fn redis_stopped_under_requests_is_503_with_retry_after_and_recovers_by_itself() {
    let mut redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let bytes = png(1, 50_000);
    redis.set("a", &record(&bytes)).await;

    let address = server.address;
    let requests = tokio::spawn(async move {
        let mut client = Client::connect(address).await;
        let (mut good, mut refused) = (0, 0);
        // Until it was good, then refused, then good again.
        while refused == 0 || good == 0 {
            let answer = client.get("/images/a", &[]).await;
            match answer.status.as_u16() {
                200 => {
                    assert_eq!(answer.body, bytes);
                    good += usize::from(refused > 0);
                }
                503 => {
                    answer.problem(503, "store-unavailable");
                    assert_eq!(answer.header("retry-after"), "1");
                    refused += 1;
                }
                // Restarted without its data, it has none.
                404 => {}
                _ => panic!("{answer:?}"),
            }
            tokio::task::yield_now().await;
        }
    });

    redis.kill();
    until("requests are refused", || async {
        server.get("/images/a").await.status == StatusCode::SERVICE_UNAVAILABLE
    })
    .await;
    redis.restart().await;
    until("requests are answered", || async {
        server.get("/images/a").await.status == StatusCode::NOT_FOUND
    })
    .await;
    redis.set("a", &record(&png(1, 50_000))).await;
    requests.await.unwrap();
}

#[tokio::test]
async fn a_server_may_start_before_its_redis() {
    let mut redis = RedisServer::start().await;
    redis.kill();
    let server = Server::on(&redis, &[]).await;
    server.get("/images/a").await.problem(503, "store-unavailable");
    redis.restart().await;
    redis.set("a", &record(&png(1, 100))).await;
    until("it recovers", || async { server.get("/images/a").await.status == StatusCode::OK }).await;
}
