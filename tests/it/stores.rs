//! The contract of `store::Store`, which both stores have to keep.

use std::time::Duration;

use afterimage::image::ImageId;
use afterimage::store::{Replaced, Store, StoreError};
use bytes::Bytes;

use crate::harness::server::load;
use crate::harness::{RedisServer, until};

const LIMIT: usize = 2 * 1024 * 1024;

async fn keeps_the_contract(store: &Store) {
    let id = |text: &str| ImageId::parse(text).unwrap();
    let minute = Some(Duration::from_mins(1));
    store.ping().await.unwrap();

    // What was never put is absent.
    assert_eq!(store.get(&id("a")).await.unwrap(), None);

    // What was put is read back byte for byte, whatever the bytes are.
    let all_bytes: Bytes = (0..=255).cycle().take(1_000_003).collect::<Vec<u8>>().into();
    for value in [Bytes::new(), Bytes::from("{}"), all_bytes] {
        store.put(&id("a"), value.clone(), minute).await.unwrap();
        assert_eq!(store.get(&id("a")).await.unwrap().unwrap().value, value);
    }

    // Ids that differ are different.
    assert_eq!(store.get(&id("A")).await.unwrap(), None);
    assert_eq!(store.get(&id("a:")).await.unwrap(), None);

    // A put tells creation from replacement, and sets the expiry anew.
    let one = Bytes::from("1");
    assert_eq!(store.put(&id("b"), one.clone(), minute).await.unwrap(), Replaced::Nothing);
    let left = store.get(&id("b")).await.unwrap().unwrap().time_to_live.unwrap();
    assert!(left > Duration::from_secs(50) && left <= Duration::from_mins(1), "{left:?}");
    assert_eq!(store.put(&id("b"), one.clone(), None).await.unwrap(), Replaced::Value);
    assert_eq!(store.get(&id("b")).await.unwrap().unwrap().time_to_live, None);

    // Past its time there is no value, and one put then is new.
    store.put(&id("c"), one.clone(), Some(Duration::from_millis(80))).await.unwrap();
    assert!(store.get(&id("c")).await.unwrap().is_some());
    until("c expires", || async { store.get(&id("c")).await.unwrap().is_none() }).await;
    assert_eq!(store.put(&id("c"), one.clone(), minute).await.unwrap(), Replaced::Nothing);

    // A new life is not cut short by the expiry of the old one.
    store.put(&id("d"), one.clone(), Some(Duration::from_millis(80))).await.unwrap();
    store.put(&id("d"), one.clone(), minute).await.unwrap();
    store.put(&id("e"), one.clone(), Some(Duration::from_millis(80))).await.unwrap();
    until("e expires", || async { store.get(&id("e")).await.unwrap().is_none() }).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(store.get(&id("d")).await.unwrap().is_some());

    // A value over the limit is refused; one at the limit is not.
    store.put(&id("f"), Bytes::from(vec![b'x'; LIMIT + 1]), minute).await.unwrap();
    let refused = store.get(&id("f")).await.unwrap_err();
    assert!(
        matches!(refused, StoreError::TooLarge { size, limit } if size == LIMIT as u64 + 1 && limit == LIMIT)
    );
    store.put(&id("f"), Bytes::from(vec![b'x'; LIMIT]), minute).await.unwrap();
    assert_eq!(store.get(&id("f")).await.unwrap().unwrap().value.len(), LIMIT);

    // Readers see a whole value, the old or the new, while it is replaced.
    let (old, new) = (Bytes::from(vec![b'o'; 100_000]), Bytes::from(vec![b'n'; 100_000]));
    store.put(&id("g"), old.clone(), minute).await.unwrap();
    let writing = async {
        for round in 0..20 {
            let value = if round % 2 == 0 { &new } else { &old };
            store.put(&id("g"), value.clone(), minute).await.unwrap();
        }
    };
    let reading = async {
        for _ in 0..50 {
            let value = store.get(&id("g")).await.unwrap().unwrap().value;
            assert!(value == old || value == new);
        }
    };
    tokio::join!(writing, reading);
}

async fn open(settings: &[(&str, &str)]) -> Store {
    let mut all = vec![("records.max_value", "2MiB")];
    all.extend_from_slice(settings);
    Store::open(&load(&all)).await.unwrap()
}

#[tokio::test]
async fn the_embedded_store_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().to_str().unwrap();
    keeps_the_contract(&open(&[("embedded.dir", dir), ("embedded.sweep_interval", "10ms")]).await)
        .await;
}

#[tokio::test]
async fn redis_keeps_the_contract() {
    let redis = RedisServer::start().await;
    keeps_the_contract(&open(&[("redis.url", &redis.url())]).await).await;
}

#[tokio::test]
async fn redis_keeps_the_contract_over_a_unix_socket_in_another_database() {
    let redis = RedisServer::start().await;
    let url = format!("redis+unix://{}?db=3", redis.socket().display());
    keeps_the_contract(&open(&[("redis.url", &url)]).await).await;
    let (keys,): (String,) = redis::pipe()
        .cmd("INFO")
        .arg("keyspace")
        .query_async(&mut redis.connect().await)
        .await
        .unwrap();
    assert!(keys.contains("db3:") && !keys.contains("db0:"), "{keys}");
}

#[tokio::test]
async fn redis_keeps_the_contract_with_a_user_and_a_password() {
    let redis = RedisServer::start_with(&[
        "--requirepass",
        "hunter2",
        "--user",
        "images",
        "on",
        ">s:cr@t",
        "~image:*",
        "+@all",
    ])
    .await;
    for login in [":hunter2", "images:s%3Acr%40t"] {
        let url = format!("redis://{login}@127.0.0.1:{}", redis.port);
        let store = open(&[("redis.url", &url)]).await;
        store.ping().await.unwrap();
        let id = ImageId::parse("a").unwrap();
        store.put(&id, Bytes::from("1"), None).await.unwrap();
        assert!(store.get(&id).await.unwrap().is_some());
    }
    for login in ["", "images:wrong@"] {
        let url = format!("redis://{login}127.0.0.1:{}", redis.port);
        let refused = open(&[("redis.url", &url)]).await.ping().await.unwrap_err();
        assert!(!refused.to_string().contains("wrong"), "{refused}");
    }
}

#[tokio::test]
async fn redis_keeps_the_contract_over_tls_with_certificates_on_both_sides() {
    let certificates = crate::harness::certificates();
    let dir = certificates.path();
    let path = |name: &str| dir.join(name).to_str().unwrap().to_owned();
    let port = crate::harness::redis::free_port();
    let _redis = RedisServer::start_with(&[
        "--tls-port",
        &port.to_string(),
        "--tls-cert-file",
        &path("server.pem"),
        "--tls-key-file",
        &path("server.key"),
        "--tls-ca-cert-file",
        &path("ca.pem"),
    ])
    .await;
    let url = format!("rediss://localhost:{port}");
    let (ca, certificate, key) = (path("ca.pem"), path("client.pem"), path("client.key"));
    let store = open(&[
        ("redis.url", &url),
        ("redis.tls_ca_file", &ca),
        ("redis.tls_cert_file", &certificate),
        ("redis.tls_key_file", &key),
    ])
    .await;
    keeps_the_contract(&store).await;
    // An authority that isn't known is not trusted.
    let stranger = open(&[("redis.url", &url)]).await;
    assert!(stranger.ping().await.is_err());
}
