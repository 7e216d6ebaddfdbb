//! The contract of `store::Store`, which Redis and the embedded store keep.

use std::time::Duration;

use afterimage::image::ImageId;
use afterimage::store::{Condition, Expiry, Replaced, Store, StoreError, StoredSize, Written};
use bytes::Bytes;

use crate::harness::server::load;
use crate::harness::{RedisServer, until};

long_tests! {
    #[tokio::test] the_embedded_store_keeps_the_contract
}

const LIMIT: usize = 2 * 1024 * 1024;

/// Expected size of a value that is fetched in a batch with others.
const SMALL: u64 = 0;

/// Expected size of a value that is fetched alone.
const LARGE: u64 = u64::MAX;

/// Asserts the contract, fetching values with the given expected size.
async fn keeps_the_contract(store: &Store, size: u64) {
    let id = |text: &str| ImageId::parse(text).unwrap();
    let minute = Expiry::In(Duration::from_mins(1));
    let soon = Expiry::In(Duration::from_millis(80));
    let put = async |name: &str, value: Bytes, expiry| match store
        .put(&id(name), value, expiry, &Condition::Always)
        .await
        .unwrap()
    {
        Written::Done(replaced) => replaced,
        Written::ConditionFailed => panic!("there is no condition"),
    };
    store.ping().await.unwrap();

    // A key that was never put is absent.
    assert_eq!(store.get(&id("a"), size).await.unwrap(), None);

    // Any value is read back byte for byte.
    let all_bytes: Bytes = (0..=255).cycle().take(1_000_003).collect::<Vec<u8>>().into();
    for value in [Bytes::new(), Bytes::from("{}"), all_bytes] {
        put("a", value.clone(), minute).await;
        assert_eq!(store.get(&id("a"), size).await.unwrap().unwrap().value, value);
    }

    // Ids are distinguished by case and by every character.
    assert_eq!(store.get(&id("A"), size).await.unwrap(), None);
    assert_eq!(store.get(&id("a:"), size).await.unwrap(), None);

    // A put reports creation or replacement, and sets a new expiry.
    let one = Bytes::from("1");
    assert_eq!(put("b", one.clone(), minute).await, Replaced::Nothing);
    let left = store.get(&id("b"), size).await.unwrap().unwrap().time_to_live.unwrap();
    assert!(left > Duration::from_secs(50) && left <= Duration::from_mins(1), "{left:?}");
    assert_eq!(put("b", one.clone(), Expiry::Never).await, Replaced::Value);
    assert_eq!(store.get(&id("b"), size).await.unwrap().unwrap().time_to_live, None);

    // An expired value is absent, and the next put creates it.
    put("c", one.clone(), soon).await;
    assert!(store.get(&id("c"), size).await.unwrap().is_some());
    until("c expires", || async { store.get(&id("c"), size).await.unwrap().is_none() }).await;
    assert_eq!(put("c", one.clone(), minute).await, Replaced::Nothing);

    // A new expiry replaces the old one: `d` lives on past the first. The passage of time is what is tested.
    put("d", one.clone(), soon).await;
    put("d", one.clone(), minute).await;
    put("e", one.clone(), soon).await;
    until("e expires", || async { store.get(&id("e"), size).await.unwrap().is_none() }).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(store.get(&id("d"), size).await.unwrap().is_some());

    // A value over the limit is refused; one at the limit is not.
    put("f", Bytes::from(vec![b'x'; LIMIT + 1]), minute).await;
    let refused = store.get(&id("f"), size).await.unwrap_err();
    assert!(
        matches!(refused, StoreError::TooLarge { size, limit } if size == LIMIT as u64 + 1 && limit == LIMIT)
    );
    put("f", Bytes::from(vec![b'x'; LIMIT]), minute).await;
    assert_eq!(store.get(&id("f"), size).await.unwrap().unwrap().value.len(), LIMIT);

    // Readers see the old or the new value as a whole during a replacement.
    let (old, new) = (Bytes::from(vec![b'o'; 100_000]), Bytes::from(vec![b'n'; 100_000]));
    put("g", old.clone(), minute).await;
    let writing = async {
        for round in 0..20 {
            let value = if round % 2 == 0 { &new } else { &old };
            put("g", value.clone(), minute).await;
        }
    };
    let reading = async {
        for _ in 0..50 {
            let value = store.get(&id("g"), size).await.unwrap().unwrap().value;
            assert!(value == old || value == new);
        }
    };
    tokio::join!(writing, reading);

    writes_on_conditions_and_lists(store, size).await;
}

async fn writes_on_conditions_and_lists(store: &Store, size: u64) {
    let id = |text: &str| ImageId::parse(text).unwrap();
    let minute = Expiry::In(Duration::from_mins(1));
    let soon = Expiry::In(Duration::from_millis(80));
    let one = Bytes::from("1");
    let put = async |name: &str, value: Bytes, expiry| {
        store.put(&id(name), value, expiry, &Condition::Always).await.unwrap();
    };

    // Conditional writes are atomic, and change nothing if the condition fails.
    let write = async |condition: Condition| {
        store.put(&id("h"), one.clone(), minute, &condition).await.unwrap()
    };
    let is = |wanted: &'static [u8]| Condition::is(move |value| value == Some(wanted));
    assert_eq!(write(Condition::Present).await, Written::ConditionFailed);
    assert_eq!(write(is(b"1")).await, Written::ConditionFailed);
    assert_eq!(store.get(&id("h"), size).await.unwrap(), None);
    assert_eq!(write(Condition::Absent).await, Written::Done(Replaced::Nothing));
    assert_eq!(write(Condition::Absent).await, Written::ConditionFailed);
    assert_eq!(write(Condition::Present).await, Written::Done(Replaced::Value));
    assert_eq!(write(is(b"2")).await, Written::ConditionFailed);
    assert_eq!(write(is(b"1")).await, Written::Done(Replaced::Value));
    assert_eq!(write(Condition::is(|_| true)).await, Written::Done(Replaced::Value));

    // A write can keep the expiry, or the absence of one.
    let left = async |name: &str| {
        store.get(&id(name), size).await.unwrap().unwrap().time_to_live.map(|it| it.as_secs())
    };
    put("h", Bytes::from("2"), Expiry::Kept).await;
    assert!(left("h").await.is_some_and(|left| (50..=60).contains(&left)));
    put("i", Bytes::from("1"), Expiry::Never).await;
    put("i", Bytes::from("2"), Expiry::Kept).await;
    assert_eq!(left("i").await, None);
    put("i", Bytes::from("2"), minute).await;
    assert_eq!(write(is(b"2")).await, Written::Done(Replaced::Value));

    // A removed value is absent. A failed condition removes nothing.
    let remove = async |condition: Condition| store.remove(&id("h"), &condition).await.unwrap();
    assert_eq!(remove(is(b"2")).await, Written::ConditionFailed);
    assert_eq!(remove(Condition::Absent).await, Written::ConditionFailed);
    assert_eq!(remove(is(b"1")).await, Written::Done(Replaced::Value));
    assert_eq!(store.get(&id("h"), size).await.unwrap(), None);
    assert_eq!(remove(Condition::Present).await, Written::ConditionFailed);
    assert_eq!(remove(Condition::Always).await, Written::Done(Replaced::Nothing));
    put("h", one.clone(), Expiry::Never).await;
    assert_eq!(remove(Condition::Always).await, Written::Done(Replaced::Value));
    put("h", one.clone(), Expiry::Never).await;
    assert_eq!(remove(Condition::Present).await, Written::Done(Replaced::Value));
    assert_eq!(store.get(&id("h"), size).await.unwrap(), None);

    // A listing has every id with the prefix, and no expired one.
    for number in 0..2500 {
        put(&format!("list_{number}"), one.clone(), Expiry::Never).await;
    }
    put("lisp", one.clone(), Expiry::Never).await;
    put("list_soon", one.clone(), soon).await;
    until("list_soon expires", || async {
        store.get(&id("list_soon"), size).await.unwrap().is_none()
    })
    .await;
    // Sizes come in the order of the ids, without those that have no value.
    put("list_ttl", one.clone(), minute).await;
    let ids = ["list_0", "list_soon", "list_ttl", "absent"].map(id);
    let sizes = store.sizes(&ids).await.unwrap();
    let bytes = Some(one.len() as u64);
    assert_eq!(sizes[0], Some(StoredSize { bytes, time_to_live: None }));
    assert_eq!((sizes[1], sizes[3]), (None, None));
    let left = sizes[2].unwrap().time_to_live.unwrap();
    assert!(left <= Duration::from_mins(1) && left > Duration::from_secs(30), "{left:?}");
    assert!(store.sizes(&[]).await.unwrap().is_empty());
    store.remove(&ids[2], &Condition::Always).await.unwrap();
    let few = store.list("list_", None, 10).await.unwrap();
    assert!(few.ids.len() < 100 && few.next.is_some());
    for (beginning, number) in [("list_", 2500), ("list_1", 1111), ("list_77", 11), ("lis", 2501)] {
        let (mut found, mut from) = (std::collections::HashSet::new(), None);
        loop {
            let page = store.list(beginning, from, 1000).await.unwrap();
            found.extend(page.ids);
            from = page.next;
            if from.is_none() {
                break;
            }
        }
        assert_eq!(found.len(), number, "{beginning}");
        assert!(found.iter().all(|id| id.as_str().starts_with(beginning)));
    }

    // Of several racing writes with the same condition exactly one succeeds.
    for round in 0..50 {
        put("j", Bytes::from("0"), minute).await;
        let mut writers = Vec::new();
        for writer in 1..=4_u8 {
            let id = id("j");
            writers.push(async move {
                let condition = Condition::is(|value| value == Some(b"0"));
                let value = Bytes::from(vec![writer]);
                match store.put(&id, value, minute, &condition).await.unwrap() {
                    Written::Done(_) => Some(writer),
                    Written::ConditionFailed => None,
                }
            });
        }
        let [a, b, c, d] = <[_; 4]>::try_from(writers).ok().unwrap();
        let (a, b, c, d) = tokio::join!(a, b, c, d);
        let won: Vec<u8> = [a, b, c, d].into_iter().flatten().collect();
        assert_eq!(won.len(), 1, "round {round}");
        assert_eq!(store.get(&id("j"), size).await.unwrap().unwrap().value, won);
    }
}

async fn open(settings: &[(&str, &str)]) -> Store {
    let mut all = vec![("records.max_value", "2MiB")];
    all.extend_from_slice(settings);
    Store::open(&load(&all)).await.unwrap()
}

async fn the_embedded_store_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().to_str().unwrap();
    let store = open(&[("embedded.dir", dir), ("embedded.sweep_interval", "10ms")]).await;
    keeps_the_contract(&store, SMALL).await;
}

#[tokio::test]
async fn redis_keeps_the_contract() {
    for size in [SMALL, LARGE] {
        let redis = RedisServer::start().await;
        keeps_the_contract(&open(&[("redis.url", &redis.url())]).await, size).await;
    }
}

#[tokio::test]
async fn values_are_read_after_redis_closed_idle_connections() {
    let redis = RedisServer::start().await;
    let store = open(&[("redis.url", &redis.url())]).await;
    let id = ImageId::parse("a").unwrap();
    let value = Bytes::from(vec![b'x'; 100_000]);
    store.put(&id, value.clone(), Expiry::Never, &Condition::Always).await.unwrap();
    for _ in 0..3 {
        for size in [LARGE, LARGE, SMALL] {
            assert_eq!(store.get(&id, size).await.unwrap().unwrap().value, value);
        }
        let mut kill = redis::cmd("CLIENT");
        kill.arg("KILL").arg("TYPE").arg("normal").arg("SKIPME").arg("yes");
        let killed: u64 = kill.query_async(&mut redis.connect().await).await.unwrap();
        assert!(killed >= 2, "{killed}");
    }
}

#[tokio::test]
async fn values_are_read_while_redis_takes_no_more_connections() {
    let redis = RedisServer::start().await;
    let store = open(&[("redis.url", &redis.url()), ("redis.connections", "1")]).await;
    let id = ImageId::parse("a").unwrap();
    let value = Bytes::from(vec![b'x'; 100_000]);
    store.put(&id, value.clone(), Expiry::Never, &Condition::Always).await.unwrap();
    let mut connection = redis.connect().await;
    let clients: String =
        redis::cmd("INFO").arg("clients").query_async(&mut connection).await.unwrap();
    let connected = clients.lines().find_map(|line| line.strip_prefix("connected_clients:"));
    let mut limit = redis::cmd("CONFIG");
    limit.arg("SET").arg("maxclients").arg(connected.unwrap());
    limit.exec_async(&mut connection).await.unwrap();
    assert_eq!(store.get(&id, LARGE).await.unwrap().unwrap().value, value);
}

#[tokio::test]
async fn redis_keeps_the_contract_over_a_unix_socket_in_another_database() {
    for size in [SMALL, LARGE] {
        let redis = RedisServer::start().await;
        let url = format!("redis+unix://{}?db=3", redis.socket().display());
        keeps_the_contract(&open(&[("redis.url", &url)]).await, size).await;
        let (keys,): (String,) = redis::pipe()
            .cmd("INFO")
            .arg("keyspace")
            .query_async(&mut redis.connect().await)
            .await
            .unwrap();
        assert!(keys.contains("db3:") && !keys.contains("db0:"), "{keys}");
    }
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
        store.put(&id, Bytes::from("1"), Expiry::Never, &Condition::Always).await.unwrap();
        for size in [SMALL, LARGE] {
            assert!(store.get(&id, size).await.unwrap().is_some());
        }
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
    keeps_the_contract(&store, LARGE).await;
    // A certificate by an unknown authority is not trusted.
    let stranger = open(&[("redis.url", &url)]).await;
    assert!(stranger.ping().await.is_err());
}
