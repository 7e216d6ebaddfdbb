//! Metrics in operators' tools: Prometheus, its alerts, and the queries of the dashboard.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use bytes::Bytes;
use hyper::Method;
use serde_json::{Value, json};

use crate::harness::redis::free_port;
use crate::harness::{Answer, Client, PATIENCE, RedisServer, Server, get, png, record, until};

#[test]
fn promtool_accepts_the_shipped_configuration() {
    promtool("check config", &[&shipped("prometheus.yml")], "");
    promtool("check rules", &[&shipped("prometheus-rules.yml")], "");
}

#[tokio::test]
async fn promtool_accepts_the_metrics_in_the_text_format() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    traffic(&server, &redis, 0).await;
    let page = server.get("/metrics").await;
    assert_eq!(page.header("content-type"), "text/plain; version=0.0.4; charset=utf-8");
    promtool("check metrics", &[], std::str::from_utf8(&page.body).unwrap());
}

#[tokio::test]
async fn metrics_are_in_the_format_that_accept_prefers_and_both_have_the_same_samples() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    traffic(&server, &redis, 0).await;
    let (text, open) = (
        "text/plain; version=0.0.4; charset=utf-8",
        "application/openmetrics-text; version=1.0.0; charset=utf-8",
    );
    for (accept, expected) in [
        (None, text),
        (Some("*/*"), text),
        (Some("application/openmetrics-text"), open),
        (
            Some(
                "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1",
            ),
            open,
        ),
        (Some("application/openmetrics-text;q=0.2,text/plain;q=0.5"), text),
    ] {
        let fields: Vec<_> = accept.map(|it| ("accept", it)).into_iter().collect();
        for method in [Method::GET, Method::HEAD] {
            let page = server.send(method, "/metrics", &fields, Bytes::new()).await;
            assert_eq!(page.header("content-type"), expected, "{accept:?}");
            assert_eq!(page.header("vary"), "Accept", "{accept:?}");
        }
    }
    let page = async |accept: &str| {
        let page = get(server.address, "/metrics", &[("accept", accept)]).await;
        String::from_utf8(page.body.into()).unwrap()
    };
    let (text, open) = (page(text).await, page(open).await);
    assert!(open.ends_with("\n# EOF\n") && open.contains("\n# UNIT "), "{open}");
    assert!(!text.contains("# EOF") && !text.contains("# UNIT "), "{text}");
    let series = |page: &str| -> BTreeSet<String> {
        let samples = page.lines().filter(|line| !line.starts_with('#'));
        samples.map(|line| line.rsplit_once(' ').unwrap().0.to_owned()).collect()
    };
    assert_eq!(series(&text), series(&open));
}

#[tokio::test]
async fn the_dashboard_shows_every_metric_and_alerts_use_only_existing_ones() {
    let mut redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    // A family with labels appears on the page once it has counted something.
    traffic(&server, &redis, 0).await;
    redis.kill();
    let page = RefCell::new(String::new());
    until("a store error is counted", || async {
        server.get("/images/lost").await;
        let body = open_metrics(&server).await.body;
        *page.borrow_mut() = String::from_utf8(body.into()).unwrap();
        page.borrow().contains("afterimage_store_errors_total{")
    })
    .await;
    let families = families(&page.take());

    let dashboard = names(&read("grafana.json"));
    let rules = names(&read("prometheus-rules.yml"));
    let exposed: BTreeSet<&String> = families.values().flatten().collect();
    let unknown: Vec<_> = dashboard.union(&rules).filter(|it| !exposed.contains(it)).collect();
    assert!(unknown.is_empty(), "no such metrics: {unknown:?}");
    for (family, samples) in &families {
        let shown = samples.iter().any(|sample| dashboard.contains(sample));
        assert!(shown, "the dashboard doesn't show {family}");
    }
}

#[test]
fn every_panel_has_a_description_and_a_unit() {
    let (dashboard, mut ids, mut taken) = (dashboard(), BTreeSet::new(), BTreeSet::new());
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = panel["title"].as_str().unwrap();
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{title}: its id must be unique");
        let [x, y, w, h] = ["x", "y", "w", "h"].map(|key| panel["gridPos"][key].as_u64().unwrap());
        assert!(x + w <= 24, "{title} must fit into Grafana's grid of 24 columns");
        for cell in (x..x + w).flat_map(|x| (y..y + h).map(move |y| (x, y))) {
            assert!(taken.insert(cell), "{title} covers another panel");
        }
        if panel["type"] != "row" {
            assert!(panel["description"].as_str().unwrap().ends_with('.'), "{title}");
            assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{title}");
            assert_eq!(panel["datasource"]["uid"], "${datasource}", "{title}");
        }
    }
}

#[test]
fn each_alert_fires_for_its_own_fault_and_for_no_other() {
    type Changes = &'static [(&'static str, &'static str)];
    const UNAVAILABLE: &str = r#"requests_total{route="/images/{id}",method="GET",status="503"}"#;
    const COHERENT: &str = r#"coherence{state="coherent"}"#;
    const UNREACHABLE: &str = r#"coherence{state="unreachable"}"#;
    const SHED: &str = r#"shed_total{limit="requests"}"#;
    const TIMEOUTS: &str = r#"store_errors_total{kind="timeout"}"#;
    const STALE: &str = "audit_stale_total";
    const FAST: &str = r#"request_duration_seconds_bucket{route="/images/{id}",le="0.01"}"#;
    const HITS: &str = r#"reads_total{served="hit"}"#;
    // Series of a healthy server: a value for each minute, or the growth of a counter.
    let well = BTreeMap::from([
        ("up", "1+0x30"),
        (COHERENT, "1+0x30"),
        (UNREACHABLE, "0+0x30"),
        (r#"requests_total{route="/images/{id}",method="GET",status="200"}"#, "0+6000x30"),
        // One bad minute.
        (UNAVAILABLE, "0x10 90x20"),
        (TIMEOUTS, "0x10 90x20"),
        (FAST, "0+5990x30"),
        (HITS, "0+5900x30"),
        (SHED, "0+0x30"),
        (STALE, "0+0x30"),
    ]);
    // Deviations from that, and the alerts that fire.
    let cases: [(Changes, &[&str]); 8] = [
        (&[], &[]),
        (&[("up", "0+0x30")], &["Down"]),
        (&[(COHERENT, "0+0x30")], &["NotCoherent"]),
        (&[(TIMEOUTS, "0+1x30")], &["StoreErrors"]),
        (
            &[(r#"requests_total{route="/images/{id}",method="GET",status="502"}"#, "0+90x30")],
            &["Failing"],
        ),
        (&[(SHED, "0+1x30")], &["Sheds"]),
        (&[(STALE, "0x10 1x20")], &["Stale"]),
        // There are fewer fast responses than hits, so some hits are slow. Otherwise all slow ones could be misses.
        (&[(FAST, "0+5800x30")], &["SlowHits"]),
    ];
    let tests = cases.map(|(changes, raised)| {
        let mut series = well.clone();
        series.extend(changes.iter().copied());
        let series = series.into_iter().map(|(name, values)| {
            let name = match name.strip_suffix('}') {
                Some(name) => format!("afterimage_{name},instance=\"a\"}}").replace("{,", "{"),
                None if name == "up" => r#"up{job="afterimage",instance="a"}"#.to_owned(),
                None => format!("afterimage_{name}{{instance=\"a\"}}"),
            };
            json!({"series": name, "values": values})
        });
        let raised = raised.iter().map(
            |name| json!({"labels": format!("{{alertname=\"Afterimage{name}\"}}"), "value": 1}),
        );
        json!({
            "interval": "1m",
            "input_series": series.collect::<Vec<_>>(),
            "promql_expr_test": [{
                "expr": "group by (alertname) (max_over_time(ALERTS{alertstate=\"firing\"}[25m]))",
                "eval_time": "25m",
                "exp_samples": raised.collect::<Vec<_>>(),
            }],
        })
    });
    // JSON is YAML.
    let rules = [shipped("prometheus-rules.yml")];
    let file = json!({"rule_files": rules, "evaluation_interval": "1m", "tests": tests.as_slice()});
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tests.yml");
    std::fs::write(&path, file.to_string()).unwrap();
    promtool("test rules", &[&path], "");
}

#[tokio::test]
async fn prometheus_evaluates_every_expression_of_the_dashboard_and_the_alerts() {
    let mut redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let prometheus = Prometheus::scraping(&server).await;

    // Each panel must have data: those about errors once the store is down, the others under traffic.
    let (mut errors, mut others): (Vec<_>, Vec<_>) =
        panels(&server).into_iter().partition(|panel| panel.expression.contains("store_errors"));
    let (mut round, began) = (0, Instant::now());
    while !others.is_empty() {
        assert!(began.elapsed() < PATIENCE, "no data: {others:#?}");
        traffic(&server, &redis, round).await;
        round += 1;
        others = prometheus.without_data(others).await;
    }
    // There is a corrupt record in the traffic.
    until("the alert about failures is the only one pending", || async {
        prometheus.alerts().await.iter().all(|name| name == "AfterimageFailing")
    })
    .await;

    redis.kill();
    let began = Instant::now();
    while !errors.is_empty() {
        assert!(began.elapsed() < PATIENCE, "no data: {errors:#?}");
        server.get(&format!("/images/lost{round}")).await;
        round += 1;
        errors = prometheus.without_data(errors).await;
    }
    for status in [200, 201, 304, 400, 404, 502, 503] {
        let expression = format!("afterimage_requests_total{{status=\"{status}\"}}");
        until(&expression, || async { !prometheus.query(&expression).await.is_empty() }).await;
    }
    until("an alert about the killed store is pending", || async {
        prometheus.alerts().await.contains("AfterimageNotCoherent")
    })
    .await;

    // Each selector matches a series, so no label and no value is misspelt.
    let rules = prometheus.rules().await;
    let expressions: Vec<String> = rules.into_values().collect();
    let shown = panels(&server).into_iter().map(|panel| panel.expression);
    for selector in shown.chain(expressions).flat_map(|expression| selectors(&expression)) {
        assert!(!prometheus.query(&selector).await.is_empty(), "no series matches {selector}");
    }
}

/// Sends one request of each kind.
async fn traffic(server: &Server, redis: &RedisServer, round: u64) {
    if round == 0 {
        redis.set("corrupt", b"{}").await;
        redis.set("mistyped", &record(b"GIF89a\x01\0\x01\0\0\0\0;")).await;
    }
    let value = record(&png(round, 3000));
    redis.set("a", &value).await;
    for id in ["a", "a", "missing", "corrupt", "mistyped", "-bad"] {
        server.get(&format!("/images/{id}")).await;
    }
    get(server.address, "/images/a", &[("if-none-match", "*")]).await;
    server.send(Method::HEAD, "/images/a", &[], Bytes::new()).await;
    let json = [("content-type", "application/json")];
    server.send(Method::PUT, &format!("/images/put{round}"), &json, value.into()).await;
    server.get("/healthz").await;
    server.get("/readyz").await;
}

/// A Prometheus that is stopped with the test, by its process id.
struct Prometheus {
    child: Child,
    port: u16,
    _folder: tempfile::TempDir,
}

impl Prometheus {
    /// Starts Prometheus with the shipped configuration, except for the target's address and the scrape interval.
    async fn scraping(server: &Server) -> Prometheus {
        let (folder, port) = (tempfile::tempdir().unwrap(), free_port());
        let config = replaced(&read("prometheus.yml"), "127.0.0.1:8000", &address(server));
        let config = replaced(&config, "interval: 15s", "interval: 250ms");
        std::fs::write(folder.path().join("prometheus.yml"), config).unwrap();
        let rules = read("prometheus-rules.yml");
        std::fs::write(folder.path().join("prometheus-rules.yml"), rules).unwrap();
        let child = Command::new("prometheus")
            .current_dir(folder.path())
            .args(["--config.file=prometheus.yml", "--storage.tsdb.path=data"])
            .args([&format!("--web.listen-address=127.0.0.1:{port}"), "--log.level=error"])
            .spawn()
            .expect("prometheus is needed: apt-get install prometheus");
        let prometheus = Prometheus { child, port, _folder: folder };
        until("Prometheus answers", || async {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
                && prometheus.get("/-/ready").await.is_some()
        })
        .await;
        until("Prometheus has scraped Afterimage", || async {
            let up = prometheus.query("up{job=\"afterimage\"} == 1").await;
            let targets = prometheus.get("/api/v1/targets").await.unwrap_or_default();
            let error = targets["data"]["activeTargets"][0]["lastError"].as_str().unwrap_or("");
            // A scrape must end within the interval, which a busy machine may miss.
            let readable = error.is_empty() || error.contains("deadline exceeded");
            assert!(readable, "Prometheus can't parse the page: {error}");
            !up.is_empty()
        })
        .await;
        prometheus
    }

    /// Response of its API; `None` while it isn't ready.
    async fn get(&self, path: &str) -> Option<Value> {
        let answer = Client::connect(([127, 0, 0, 1], self.port).into()).await.get(path, &[]).await;
        let json = serde_json::from_slice(&answer.body).unwrap_or_default();
        answer.status.is_success().then_some(json)
    }

    /// Series that an expression evaluates to now.
    async fn query(&self, expression: &str) -> Vec<Value> {
        let path = format!("/api/v1/query?query={}", encoded(expression));
        let answer =
            self.get(&path).await.unwrap_or_else(|| panic!("the query failed: {expression}"));
        assert_eq!(answer["data"]["resultType"], "vector", "{expression}");
        answer["data"]["result"].as_array().unwrap().clone()
    }

    /// Returns the panels without data so far. Asserts that the others have the labels that their legends name.
    async fn without_data(&self, panels: Vec<Panel>) -> Vec<Panel> {
        let mut without = Vec::new();
        for panel in panels {
            let series = self.query(&panel.expression).await;
            let number = |series: &&Value| series["value"][1] != "NaN";
            match series.iter().find(number) {
                Some(series) => {
                    for label in panel.legend_labels() {
                        assert!(series["metric"][label].is_string(), "no {label}: {panel:?}");
                    }
                }
                None => without.push(panel),
            }
        }
        without
    }

    /// Expressions of the alerts by name, once all have been evaluated without an error.
    async fn rules(&self) -> BTreeMap<String, String> {
        let rules = || async {
            let answer = self.get("/api/v1/rules").await.unwrap();
            answer["data"]["groups"][0]["rules"].as_array().unwrap().clone()
        };
        until("all rules have been evaluated", || async {
            rules().await.iter().all(|rule| {
                assert_eq!(rule["lastError"].as_str().unwrap_or_default(), "", "{rule}");
                rule["health"] == "ok"
            })
        })
        .await;
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        rules().await.iter().map(|rule| (text(&rule["name"]), text(&rule["query"]))).collect()
    }

    /// Names of the alerts that are pending or firing, once all have been evaluated.
    async fn alerts(&self) -> BTreeSet<String> {
        self.rules().await;
        let answer = self.get("/api/v1/alerts").await.unwrap();
        let alerts = answer["data"]["alerts"].as_array().unwrap();
        alerts
            .iter()
            .map(|alert| alert["labels"]["alertname"].as_str().unwrap().to_owned())
            .collect()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One query of a panel, as Grafana sends it.
#[derive(Debug)]
struct Panel {
    #[expect(dead_code, reason = "it names the panel where one fails")]
    title: String,
    expression: String,
    legend: String,
}

impl Panel {
    fn legend_labels(&self) -> impl Iterator<Item = &str> {
        self.legend.split("{{").skip(1).map(|rest| rest.split_once("}}").unwrap().0)
    }
}

fn panels(server: &Server) -> Vec<Panel> {
    let (dashboard, mut panels) = (dashboard(), Vec::new());
    for panel in dashboard["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            let text = |value: &Value| value.as_str().unwrap().to_owned();
            let expression = text(&target["expr"])
                .replace("$__rate_interval", "10s")
                .replace("$instance", &address(server));
            assert!(!expression.contains('$'), "{expression}");
            let (title, legend) = (text(&panel["title"]), text(&target["legendFormat"]));
            panels.push(Panel { title, expression, legend });
        }
    }
    panels
}

fn dashboard() -> Value {
    serde_json::from_str(&read("grafana.json")).unwrap()
}

fn address(server: &Server) -> String {
    server.address.to_string()
}

fn shipped(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name)
}

fn read(name: &str) -> String {
    std::fs::read_to_string(shipped(name)).unwrap()
}

/// Replaces all occurrences of a text, of which there must be one.
fn replaced(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "no {from:?} in {text}");
    text.replace(from, to)
}

/// Names of Afterimage's metrics in a text.
fn names(text: &str) -> BTreeSet<String> {
    let words = text.split(|it: char| !it.is_ascii_alphanumeric() && it != '_');
    words.filter(|word| word.starts_with("afterimage_")).map(str::to_owned).collect()
}

/// Selectors with matchers in an expression: `name{label="value"}`.
fn selectors(expression: &str) -> Vec<String> {
    let is_name = |it: char| it.is_ascii_alphanumeric() || it == '_';
    let mut quoted = false;
    let (mut selectors, mut start) = (Vec::new(), 0);
    for (at, character) in expression.char_indices() {
        match character {
            '"' => quoted = !quoted,
            '{' if !quoted => {
                start = expression[..at].rfind(|it| !is_name(it)).map_or(0, |it| it + 1);
            }
            '}' if !quoted => selectors.push(expression[start..=at].to_owned()),
            _ => {}
        }
    }
    selectors
}

/// Fetches the metrics in the format that has the names of families.
async fn open_metrics(server: &Server) -> Answer {
    get(server.address, "/metrics", &[("accept", "application/openmetrics-text")]).await
}

/// Metric families of such a page, each with the sample names that it may have in Prometheus.
fn families(page: &str) -> BTreeMap<String, BTreeSet<String>> {
    let types = page.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let families = types.map(|(family, kind)| {
        let suffixes: &[&str] = match kind {
            "counter" => &["_total"],
            "gauge" => &[""],
            "histogram" => &["_bucket", "_sum", "_count"],
            "info" => &["_info"],
            _ => panic!("unknown metric type: {kind}"),
        };
        let samples = suffixes.iter().map(|suffix| format!("{family}{suffix}")).collect();
        (family.to_owned(), samples)
    });
    families.collect()
}

/// Percent-encodes a text for a query (RFC 3986 §2.1).
fn encoded(text: &str) -> String {
    let digit = |it: u8| char::from_digit(it.into(), 16).unwrap();
    text.bytes().flat_map(|byte| ['%', digit(byte >> 4), digit(byte & 15)]).collect()
}

/// Runs promtool, which must succeed.
fn promtool(command: &str, files: &[&Path], input: &str) {
    let mut child = Command::new("promtool")
        .args(command.split(' '))
        .args(files)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is needed: apt-get install prometheus");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "promtool {command}: {said}");
}
