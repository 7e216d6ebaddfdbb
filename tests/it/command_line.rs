//! The command line: its arguments, environment variables, exit statuses and messages.

use std::process::Output;

use crate::harness::server::program;
use crate::harness::{Process, RedisServer, get, png, redis::free_port, until};

fn run(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    program().args(arguments).envs(variables.iter().copied()).output().unwrap()
}

fn error(output: &Output) -> String {
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_wrong_setting_stops_the_start_with_its_name_place_and_expected_value() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("my.toml");
    std::fs::write(&file, "[cache]\nimages = 5\nimage = 5\n").unwrap();
    let file = file.to_str().unwrap();
    let stopped = error(&run(&["--config", file], &[]));
    assert_eq!(
        stopped,
        format!(
            "afterimage: {file}:3: there is no setting `cache.image`; config/afterimage.toml lists all settings\n"
        )
    );
    assert_eq!(error(&run(&[], &[("AFTERIMAGE_CONFIG", file)])), stopped);
    let stopped = error(&run(&["health"], &[("AFTERIMAGE_CACHE_BYTES", "lots")]));
    assert!(stopped.contains("AFTERIMAGE_CACHE_BYTES: bad value for `cache.bytes`: "), "{stopped}");
    let stopped = error(&run(&["--http-header-timeout", "soon"], &[]));
    assert!(
        stopped.contains("--http-header-timeout: bad value for `http.header_timeout`"),
        "{stopped}"
    );
    let stopped = error(&run(&[], &[("REDIS_URL", "http://u:hunter2@h")]));
    assert!(stopped.contains("REDIS_URL") && !stopped.contains("hunter2"), "{stopped}");
    assert!(error(&run(&["--no-such-flag"], &[])).contains("--no-such-flag"));
    assert_eq!(
        error(&run(&["--cache-known", "5"], &[])),
        "afterimage: --cache-known: the setting `cache.known` is now called `cache.index_entries`\n"
    );
    assert!(error(&run(&["put", "../x", "file"], &[])).contains("the id"));
    assert!(error(&run(&["--config", "/no/such/file"], &[])).contains("/no/such/file"));
}

#[test]
fn help_names_every_setting() {
    let output = run(&["--help"], &[]);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    for setting in afterimage::settings::described() {
        assert!(text.contains(&format!("--{}", setting.flag())), "{}", setting.key);
    }
}

#[tokio::test]
async fn a_first_start_logs_no_warning() {
    let redis = RedisServer::start().await;
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut on_redis = program();
    on_redis.env("REDIS_URL", redis.url());
    let mut embedded = program();
    embedded.env("XDG_DATA_HOME", dir.path());
    for (mut command, coherent) in [(on_redis, "coherent: "), (embedded, "")] {
        command.stderr(std::fs::File::create(&log).unwrap());
        let process = Process::start(command);
        let written = || std::fs::read_to_string(&log).unwrap();
        until("the start is over", || async {
            get(process.address, "/readyz", &[]).await.status == 200 && written().contains(coherent)
        })
        .await;
        let log = written();
        assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    }
}

#[tokio::test]
async fn redis_url_and_port_are_honoured_and_health_queries_the_running_server() {
    let redis = RedisServer::start().await;
    let port = free_port().to_string();
    assert!(error(&run(&["health"], &[("PORT", &port)])).contains("no answer from a server"));

    let mut command = program();
    command.env("REDIS_URL", redis.url());
    let process = Process::start(command);
    let address = process.address.to_string();
    assert!(run(&["health", "--http-listen", &address], &[]).status.success());

    // `put` writes the same record as a backend.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("picture");
    std::fs::write(&file, png(3, 1000)).unwrap();
    let put = run(&["put", "a", file.to_str().unwrap()], &[("REDIS_URL", &redis.url())]);
    assert!(put.status.success(), "{put:?}");
    assert_eq!(get(process.address, "/images/a", &[]).await.body, png(3, 1000));
    let (seconds,): (u64,) = redis::pipe()
        .cmd("TTL")
        .arg("image:a")
        .query_async(&mut redis.connect().await)
        .await
        .unwrap();
    assert!((7100..=7200).contains(&seconds), "{seconds}");

    std::fs::write(&file, "no image").unwrap();
    let refused =
        error(&run(&["put", "a", file.to_str().unwrap()], &[("REDIS_URL", &redis.url())]));
    assert!(refused.contains("not an image of a type that is served"), "{refused}");
}

#[tokio::test]
async fn sigterm_ends_the_program_with_success() {
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::embedded(dir.path());
    let pid = process.child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    assert!(process.child.wait().unwrap().success());
}
