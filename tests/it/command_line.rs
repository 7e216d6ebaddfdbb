//! The command line: its arguments, environment variables, exit statuses and messages.

use std::collections::HashSet;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use redis::AsyncTypedCommands;

use crate::harness::server::{program, program_with_rights};
use crate::harness::{Process, RedisServer, etag, get, png, record, redis::free_port, until};

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
            "afterimage: {file}:3: there is no setting `cache.image`; did you mean `cache.images`?\n"
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
fn help_has_every_setting_and_fits_into_80_columns() {
    let help = |arguments: &[&str]| {
        let output = run(arguments, &[("COLUMNS", "80")]);
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let (long, short) = (help(&["--help"]), help(&["-h"]));
    for setting in afterimage::settings::described() {
        let (section, _) = setting.key.split_once('.').unwrap();
        assert!(long.contains(&format!("--{}", setting.flag())), "{}", setting.key);
        assert!(long.contains(&format!("[{section}]")), "{}", setting.key);
    }
    for usual in ["--config", "--listen", "--port", "--redis", "--dir", "--memory"] {
        assert!(short.contains(usual), "{short}");
    }
    assert!(short.lines().count() <= 40, "{short}");
    let of_commands = ["put", "get", "rm", "list", "export", "import"].map(|it| help(&[it, "-h"]));
    for text in &of_commands {
        // Of a server that is to be started.
        assert!(text.contains("--redis") && !text.contains("--memory"), "{text}");
        assert!(text.lines().count() <= 25, "{text}");
    }
    for line in [long, short].iter().chain(&of_commands).flat_map(|text| text.lines()) {
        assert!(line.chars().count() <= 80, "{line}");
    }
    let version = String::from_utf8(run(&["--version"], &[]).stdout).unwrap();
    assert!(version.starts_with(concat!("afterimage ", env!("CARGO_PKG_VERSION"))), "{version}");
}

#[test]
fn config_prints_a_file_with_all_settings_that_can_be_used() {
    let printed = run(&["config"], &[]);
    assert!(printed.status.success());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("afterimage.toml");
    std::fs::write(&file, &printed.stdout).unwrap();
    let again = run(&["--config", file.to_str().unwrap(), "config"], &[]);
    assert_eq!(again.stdout, printed.stdout);
}

#[test]
fn a_misspelt_name_is_answered_with_the_nearest_one() {
    for (arguments, variables, nearest) in [
        (&["--cache-image", "5"][..], &[][..], "--cache-images"),
        (&["serv"], &[], "serve"),
        (&[], &[("AFTERIMAGE_HTTP_MAXAGE", "5")], "did you mean `AFTERIMAGE_HTTP_MAX_AGE`?"),
    ] {
        let told = error(&run(arguments, variables));
        assert!(told.contains(nearest), "{told}");
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("my.toml");
    for (text, nearest) in [
        ("[http]\nlistn = 1", "`http.listen`?"),
        // The right name in the wrong section.
        ("[http]\nheader_bytes = 1", "`limits.header_bytes`?"),
        ("[redis]\npassword = 'x'", "`afterimage config` prints all settings"),
    ] {
        std::fs::write(&file, text).unwrap();
        let told = error(&run(&["--config", file.to_str().unwrap()], &[]));
        assert!(told.contains(nearest), "{told}");
    }
}

#[tokio::test]
async fn ports_and_seconds_may_be_bare_and_the_usual_settings_have_short_names() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().to_str().unwrap();
    let file = Path::new(dir).join("my.toml");
    let [port, other] = [free_port(), free_port()];
    std::fs::write(&file, format!("[http]\nlisten = {port}\nidle_timeout = 9\n")).unwrap();
    let (file, on_all) = (file.to_str().unwrap(), format!(":{port}"));
    let (local, other_port) = (format!("localhost:{port}"), other.to_string());
    for (arguments, port) in [
        (vec!["--listen", &local], port),
        (vec!["--listen", &on_all], port),
        (vec!["--config", file], port),
        (vec!["--config", file, "--port", &other_port], other),
        (vec!["--port", &other_port, "--http-idle-timeout", "75", "--memory", "1MiB"], other),
    ] {
        let mut command = program();
        command.args(&arguments).args(["--dir", dir]).stdout(Stdio::null());
        let mut child = command.spawn().unwrap();
        let address = ([127, 0, 0, 1], port).into();
        until(
            "it answers",
            || async move { tokio::net::TcpStream::connect(address).await.is_ok() },
        )
        .await;
        assert_eq!(get(address, "/healthz", &[]).await.status, 200, "{arguments:?}");
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

/// Runs the program with the rights of its defaults, with the files of running servers below a folder.
fn call(runtime_dir: &Path, arguments: &[&str], input: &[u8]) -> Output {
    let mut command = program_with_rights(runtime_dir);
    command.args(arguments).env("XDG_DATA_HOME", runtime_dir.join("data"));
    let mut child = piped(&mut command).spawn().unwrap();
    // A command that doesn't read it may have ended.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

fn piped(command: &mut Command) -> &mut Command {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped())
}

fn printed(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Stores, lists, reads and removes images by the command line.
fn works_on_images(runtime_dir: &Path, arguments: &[&str]) {
    let files = tempfile::tempdir().unwrap();
    let paths = ["one.png", "my hero.png"].map(|name| files.path().join(name));
    for (seed, path) in [1, 2].into_iter().zip(&paths) {
        std::fs::write(path, png(seed, 1000)).unwrap();
    }
    let broken = files.path().join("text.txt");
    std::fs::write(&broken, "no image").unwrap();
    let run =
        |command: &[&str], input: &[u8]| call(runtime_dir, &[command, arguments].concat(), input);
    let [one, hero] = paths.each_ref().map(|path| path.to_str().unwrap());

    let told = printed(&run(&["put", "from-stdin", "-", "--ttl", "90"], &png(3, 1000)));
    assert!(told.contains("image/png, 1000 bytes, for 1m 30s, in "), "{told}");
    assert!(told.contains("/images/from-stdin?v="), "{told}");
    // Each file that can be stored is, and the other one is named.
    let stored = run(&["put", one, broken.to_str().unwrap(), hero], b"");
    assert!(error(&stored).contains("text.txt is not an image of a type that is served"));

    let ids = printed(&run(&["list", "--ids"], b""));
    let ids: HashSet<_> = ids.lines().collect();
    assert_eq!(ids, HashSet::from(["from-stdin", "one", "my-hero"]));
    let listed = printed(&run(&["list", "--prefix", "from"], b""));
    assert!(listed.contains("from-stdin  ") && !listed.contains("my-hero"), "{listed}");

    assert_eq!(run(&["get", "my-hero"], b"").stdout, png(2, 1000));
    let copy = files.path().join("copy.png");
    printed(&run(&["get", "one", copy.to_str().unwrap()], b""));
    assert_eq!(std::fs::read(&copy).unwrap(), png(1, 1000));
    assert!(error(&run(&["get", "none"], b"")).contains("there is no image none"));

    let removed = run(&["rm", "one", "none", "my-hero"], b"");
    assert!(error(&removed).contains("there is no image none"), "{removed:?}");
    assert_eq!(printed(&run(&["list", "from", "--ids"], b"")), "from-stdin\n");
    assert_eq!(run(&["list", "none"], b"").stdout, b"");
    // A reader that has seen enough stops no work, and a full disk is told.
    let piped = format!(
        "{} rm from-stdin none {} | true",
        program().get_program().to_str().unwrap(),
        arguments.join(" ")
    );
    let mut command = program_with_rights(runtime_dir);
    command.env("XDG_DATA_HOME", runtime_dir.join("data"));
    let environment: Vec<_> = command
        .get_envs()
        .map(|(name, value)| (name.to_owned(), value.map(ToOwned::to_owned)))
        .collect();
    let mut shell = Command::new("bash");
    shell.args(["-o", "pipefail", "-c", &piped]);
    for (name, value) in environment {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    let output = shell.output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(error(&output).contains("there is no image none"));
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_work_on_redis_on_the_embedded_store_and_through_a_running_server() {
    let runtime = tempfile::tempdir().unwrap();
    let redis = RedisServer::start().await;
    works_on_images(runtime.path(), &["--redis", &redis.url()]);
    let dir = tempfile::tempdir().unwrap();
    works_on_images(runtime.path(), &["--dir", dir.path().to_str().unwrap()]);

    // A server has the store to itself. It is found, on whatever port.
    let dir = tempfile::tempdir().unwrap();
    let mut command = program_with_rights(runtime.path());
    command.arg("--dir").arg(dir.path()).args(["--embedded-demo", "false"]);
    let process = Process::start(command);
    works_on_images(runtime.path(), &["--dir", dir.path().to_str().unwrap()]);
    let server = format!("http://{}", process.address);
    works_on_images(runtime.path(), &["--server", &server, "--dir", dir.path().to_str().unwrap()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_store_of_its_own_a_command_finds_the_running_server_whatever_its_port() {
    let runtime = tempfile::tempdir().unwrap();
    let [redis, other] = [RedisServer::start().await, RedisServer::start().await];
    let start = |redis: &RedisServer| {
        let mut command = program_with_rights(runtime.path());
        command.env("REDIS_URL", redis.url());
        Process::start(command)
    };
    let process = start(&redis);
    let told = printed(&call(runtime.path(), &["put", "a", "-"], &png(1, 1000)));
    assert!(told.contains(&format!("in the server at http://{}", process.address)), "{told}");
    assert_eq!(get(process.address, "/images/a", &[]).await.body, png(1, 1000));
    assert!(!runtime.path().join("data/afterimage/records.redb").exists());

    // Of two, one has to be named.
    let second = start(&other);
    let told = error(&call(runtime.path(), &["list"], b""));
    assert!(told.contains("several servers run: name one of them"), "{told}");
    let server = second.address.to_string();
    assert!(told.contains(&format!("--server {server}")), "{told}");
    printed(&call(runtime.path(), &["put", "b", "-", "--server", &server], &png(2, 1000)));
    assert_eq!(get(second.address, "/images/b", &[]).await.body, png(2, 1000));

    // So has one of a Redis beside one on an embedded store.
    drop(second);
    let mut command = program_with_rights(runtime.path());
    command.env("XDG_DATA_HOME", runtime.path().join("data")).args(["--embedded-demo", "false"]);
    let embedded = Process::start(command);
    let told = error(&call(runtime.path(), &["list"], b""));
    assert!(told.contains("several servers run"), "{told}");
    drop(embedded);
    let second = start(&other);

    // One that was killed is not asked.
    drop(process);
    printed(&call(runtime.path(), &["put", "c", "-"], &png(3, 1000)));
    assert_eq!(get(second.address, "/images/c", &[]).await.body, png(3, 1000));
    // `--port` names a server, too.
    let port = second.address.port().to_string();
    assert_eq!(
        printed(&call(runtime.path(), &["list", "c", "--ids", "--port", &port], b"")),
        "c\n"
    );
    let wrong = error(&call(runtime.path(), &["list", "--port", "1"], b""));
    assert!(wrong.contains("no answer from a server at 127.0.0.1:1"), "{wrong}");
}

#[test]
fn without_a_server_and_a_store_nothing_is_listed_and_none_is_made() {
    let runtime = tempfile::tempdir().unwrap();
    for command in [&["list"][..], &["rm", "a"], &["get", "a", "x"], &["export", "x"]] {
        let told = error(&call(runtime.path(), command, b""));
        assert!(told.contains("no server of this user runs, and there is no store "), "{told}");
    }
    assert!(!runtime.path().join("data").exists());
}

/// Accepts connections, and returns what the first one sent until it paused.
fn overheard(listener: &std::net::TcpListener) -> String {
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
    let mut text = Vec::new();
    let _ = std::io::Read::read_to_end(&mut stream, &mut text);
    String::from_utf8_lossy(&text).into_owned()
}

#[tokio::test]
async fn the_token_that_a_server_made_is_sent_to_no_other_machine() {
    let runtime = tempfile::tempdir().unwrap();
    let redis = RedisServer::start().await;
    let mut command = program_with_rights(runtime.path());
    command.env("REDIS_URL", redis.url());
    let process = Process::start(command);
    let port = process.address.port();
    // An address of this machine that isn't the loopback one stands for another machine.
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.connect("192.0.2.1:9").unwrap();
    let other = std::net::SocketAddr::new(socket.local_addr().unwrap().ip(), port);
    let listener = std::net::TcpListener::bind(other).unwrap();
    let url = redis.url();
    let runtime_path = runtime.path().to_owned();
    let calling = std::thread::spawn(move || {
        let server = format!("http://{other}");
        call(&runtime_path, &["rm", "a", "--server", &server, "--redis", &url], b"")
    });
    let request = tokio::task::spawn_blocking(move || overheard(&listener)).await.unwrap();
    assert!(request.starts_with("DELETE /images/a "), "{request}");
    assert!(!request.to_lowercase().contains("authorization"), "{request}");
    drop(calling);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_brings_every_record_back_byte_for_byte_with_its_expiry() {
    let runtime = tempfile::tempdir().unwrap();
    let [redis, other] = [RedisServer::start().await, RedisServer::start().await];
    let mut connection = redis.connect().await;
    let value = record(&png(1, 100_000));
    connection.set_ex("image:expires", &value, 1000).await.unwrap();
    connection.set("image:stays", record(&png(2, 1000))).await.unwrap();
    connection.set("image:broken", b"\xff\x00").await.unwrap();
    connection.rpush("image:list", "x").await.unwrap();
    connection.pset_ex("image:gone", &value, 1).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    let backup = dir.path().join("backup.jsonl");
    let file = backup.to_str().unwrap();

    // What can't be a record is named, and everything else is there.
    let exported = call(runtime.path(), &["export", file, "--redis", &redis.url()], b"");
    assert!(error(&exported).contains("list was left out: the key doesn't hold a string"));
    assert!(String::from_utf8_lossy(&exported.stdout).starts_with("3 records are in "));
    let imported = call(runtime.path(), &["import", file, "--redis", &other.url()], b"");
    assert!(String::from_utf8_lossy(&imported.stdout).starts_with("3 records are stored in "));
    let mut there = other.connect().await;
    for id in ["expires", "stays", "broken"] {
        let key = format!("image:{id}");
        let [before, after]: [Vec<u8>; 2] = [
            redis::cmd("GET").arg(&key).query_async(&mut connection).await.unwrap(),
            redis::cmd("GET").arg(&key).query_async(&mut there).await.unwrap(),
        ];
        assert_eq!(before, after, "{id}");
    }
    let ttl: i64 = redis::cmd("TTL").arg("image:expires").query_async(&mut there).await.unwrap();
    assert!((900..=1000).contains(&ttl), "{ttl}");
    let ttl: i64 = redis::cmd("TTL").arg("image:stays").query_async(&mut there).await.unwrap();
    assert_eq!(ttl, -1);

    // Images that are there stay, unless they are to be replaced.
    there.set("image:stays", "newer").await.unwrap();
    let again = call(runtime.path(), &["import", file, "--redis", &other.url()], b"");
    let told = String::from_utf8_lossy(&again.stdout).into_owned();
    assert!(told.starts_with("0 records are stored, 3 were there and are kept"), "{told}");
    call(runtime.path(), &["import", file, "--replace", "--redis", &other.url()], b"");
    assert_eq!(there.get("image:stays").await.unwrap().unwrap().as_bytes(), record(&png(2, 1000)));

    // Through a server that has its store to itself, in both directions.
    let store = dir.path().join("store");
    let store = store.to_str().unwrap();
    printed(&call(runtime.path(), &["import", "-", "--dir", store], &only_records(&backup)));
    let mut command = program_with_rights(runtime.path());
    command.args(["--dir", store, "--embedded-demo", "false"]);
    let process = Process::start(command);
    assert_eq!(get(process.address, "/images/expires", &[]).await.header("etag"), etag(&value));
    let exported = call(runtime.path(), &["export", "-", "--dir", store], b"");
    let lines = printed(&exported);
    assert_eq!(lines.lines().count(), 4, "{lines}");
    assert!(lines.ends_with("{\"records\":3}\n"));
    printed(&call(runtime.path(), &["rm", "expires", "stays", "--dir", store], b""));
    let imported = call(runtime.path(), &["import", "-", "--dir", store], lines.as_bytes());
    // The broken one is refused, as a write always is.
    assert!(error(&imported).contains("broken: "), "{imported:?}");
    assert!(String::from_utf8_lossy(&imported.stdout).starts_with("2 records are stored"));
    assert_eq!(get(process.address, "/images/expires", &[]).await.header("etag"), etag(&value));

    // A backup that was cut off brings what it has, and says so.
    let half = &lines.as_bytes()[..lines.len() - 20];
    let cut = call(runtime.path(), &["import", "-", "--dir", store], half);
    assert!(error(&cut).contains("the backup was cut off"), "{cut:?}");
    // So does one with a gap, or with something behind its end.
    let gap: String = lines.split_inclusive('\n').skip(1).collect();
    let behind = lines.clone() + lines.lines().next().unwrap() + "\n";
    for (damaged, told) in [(gap, "it should have 3 records, and has 2"), (behind, "was cut off")] {
        let output =
            call(runtime.path(), &["import", "-", "--redis", &other.url()], damaged.as_bytes());
        assert!(error(&output).contains(told), "{output:?}");
    }
    for (line, told) in [
        (r#"{"id":"x","record":"{}"}"#, "isn't a backup"),
        ("not JSON", "isn't a backup"),
        (
            "{\"records\":0}\n{\"id\":\"x\",\"expires_at\":1e300,\"record\":\"\"}",
            "line 2, x: `expires_at` must be",
        ),
        ("{\"records\":0}\n{\"id\":\"\\u001b]0;\",\"left_out\":\"\\u0007\"}", "\\u{1b}]0;"),
    ] {
        let output =
            call(runtime.path(), &["import", "-", "--redis", &other.url()], line.as_bytes());
        assert!(error(&output).contains(told), "{output:?}");
        assert!(!output.stderr.contains(&0x1b), "{output:?}");
    }
    // One that can't be written leaves the one before.
    let before = std::fs::read(&backup).unwrap();
    let failed = call(runtime.path(), &["export", file, "--server", "127.0.0.1:1"], b"");
    assert!(error(&failed).contains("no backup was written to "), "{failed:?}");
    assert_eq!(std::fs::read(&backup).unwrap(), before);
}

/// A backup without what was left out of it.
fn only_records(backup: &Path) -> Vec<u8> {
    let text = std::fs::read_to_string(backup).unwrap();
    let lines = text.split_inclusive('\n').filter(|line| !line.contains("left_out"));
    lines.collect::<String>().into_bytes()
}

#[tokio::test]
async fn a_wrong_redis_is_named_with_what_is_wrong_and_what_to_try() {
    let protected = RedisServer::start_with(&["--requirepass", "hunter2"]).await;
    let closed = format!("redis://user:hunter2@127.0.0.1:{}/3", free_port());
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    for (url, wrong, to_try) in [
        (closed.as_str(), "Connection refused", "start Redis there"),
        (&protected.url(), "NOAUTH", "put user and password into [redis] url"),
        ("redis://no-such-host.invalid", "lookup", "check the name of the host"),
    ] {
        let mut command = program();
        command.args(["--port", "0", "--redis", url]);
        command.stdout(Stdio::piped()).stderr(std::fs::File::create(&log).unwrap());
        let mut child = command.spawn().unwrap();
        let mut first = String::new();
        let mut lines = std::io::BufReader::new(child.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut lines, &mut first).unwrap();
        let written = || std::fs::read_to_string(&log).unwrap();
        until("it is logged", || async { written().contains("redis can't be used") }).await;
        child.kill().unwrap();
        child.wait().unwrap();
        let log = written();
        let address = url.replace("user:hunter2@", "");
        assert!(first.starts_with("afterimage listens on http://127.0.0.1:"), "{first}");
        assert!(first.contains(&format!("waits for Redis at {address} (")), "{first}");
        assert!(first.contains(wrong), "{first}");
        let line = log.lines().find(|line| line.contains("redis can't be used")).expect(&log);
        for part in [&address, wrong, to_try] {
            assert!(line.contains(part), "{line}");
        }
        assert!(!(first + &log).contains("hunter2"));
    }
}

#[tokio::test]
async fn the_address_of_redis_may_be_in_a_file() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&png(1, 1000))).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("redis-url");
    std::fs::write(&file, format!("{}\n", redis.url())).unwrap();
    let mut command = program();
    command.env("REDIS_URL_FILE", &file);
    let process = Process::start(command);
    assert_eq!(get(process.address, "/images/a", &[]).await.body, png(1, 1000));

    let path = file.to_str().unwrap();
    let both = error(&run(&["list"], &[("REDIS_URL_FILE", path), ("REDIS_URL", &redis.url())]));
    assert!(both.contains("`redis.url` is given as well; set one of the two"), "{both}");
    // A later layer wins.
    let later = run(&["list", "--redis", &redis.url()], &[("REDIS_URL_FILE", path)]);
    assert!(printed(&later).contains("a  "), "{later:?}");
    std::fs::write(&file, "http://:hunter2@example").unwrap();
    let wrong = error(&run(&["list"], &[("REDIS_URL_FILE", path)]));
    assert!(wrong.contains("([redis] url_file)") && !wrong.contains("hunter2"), "{wrong}");
    let missing = error(&run(&["list"], &[("REDIS_URL_FILE", "/no/such/file")]));
    assert!(missing.contains("/no/such/file ([redis] url_file)"), "{missing}");
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
