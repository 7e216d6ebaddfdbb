//! `/openapi.json` against the service, and the service against testers that know the standards.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use afterimage::image::MediaType;
use afterimage::{ProblemKind, Route};
use bytes::Bytes;
use hyper::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{RedisServer, Server, get, record};
use crate::variants::{encoded, picture};

long_tests! {
    #[tokio::test(flavor = "multi_thread")] the_description_and_the_server_accept_the_same_ids
    #[tokio::test(flavor = "multi_thread")] schemathesis_finds_no_failure
    #[tokio::test(flavor = "multi_thread")] redbot_finds_no_fault_in_an_image_its_304_and_its_206
    #[tokio::test(flavor = "multi_thread")] redbot_finds_no_fault_in_errors_and_operator_routes
}

/// Configuration of schemathesis: statuses that are right and that it can't derive from the description.
const CONFIG: &str = r#"
# Every other request is for a stored image, and some clients have it already.
[dictionaries.stored]
values = ["picture", "drawing", "corrupt", "offloaded"]
[dictionaries.any]
values = ["*"]

[[operations]]
include-operation-id = ["getImage", "headImage", "getThumbnail", "headThumbnail", "getInfo", "headInfo"]
parameters."path.id" = { dictionary = "stored", probability = 0.5 }
parameters."header.If-None-Match" = { dictionary = "any", probability = 0.3 }
# 502 is right for the corrupt record and for the offloaded one without an object; any other 5xx is a failure.
checks.not_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", 502]
# A valid request may be for an absent image, or its preconditions or range may not match; 400 is a failure.
checks.positive_data_acceptance.expected-statuses = ["2xx", 304, 404, 406, 412, 416, 502]

[[operations]]
include-operation-id = "getPlaceholder"
# Its range may not match.
checks.positive_data_acceptance.expected-statuses = ["2xx", 304, 416]

[[operations]]
include-operation-id = ["putImage", "postImage"]
# JSON Schema describes base64, but neither that an image is inside nor the syntax of a duration.
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 412]

[[operations]]
include-operation-id = "deleteImage"
parameters."header.If-None-Match" = { dictionary = "any", probability = 0.3 }
checks.positive_data_acceptance.expected-statuses = ["2xx", 404, 412]
"#;

/// The whole of what is described: with the gallery, and with a token that may do everything.
const WHOLE: [(&str, &str); 2] =
    [("gallery.enabled", "true"), ("writes.tokens", r#"["a-token-of-some-length"]"#)];

/// Accepted warning of `REDbot` about `public`, which it finds unnecessary.
///
/// `public` lets shared caches store the response to a request with `Authorization`, which a browser sends if the site
/// around the images asks for a password (RFC 9111 §3.5). `REDbot`'s requests have none.
const PUBLIC: &str = "warning STORE_PUBLIC_UNNECESSARY";
/// Accepted warning of `REDbot` about inline scripts. It looks for `'unsafe-inline'` in every directive; here it is in
/// `style-src` only, which drawings need, and `default-src 'none'` and `sandbox` forbid scripts.
const INLINE_STYLE: &str = "warning CSP_UNSAFE_INLINE";
/// Accepted warning of `REDbot` about every 400, which is right for a bad id.
const BAD_REQUEST: &str = "warning STATUS_BAD_REQUEST";

/// A picture that can be rendered.
fn drawable() -> Vec<u8> {
    encoded(&picture(1, 64, 48), image::ImageFormat::Png)
}

#[tokio::test]
async fn the_description_is_json_and_names_the_crate_version() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let answer = server.get("/openapi.json").await;
    assert_eq!(answer.status, StatusCode::OK);
    assert_eq!(answer.header("content-type"), "application/json");
    assert_eq!(answer.header("cache-control"), "max-age=3600");
    let description = described(&server).await;
    assert!(description["openapi"].as_str().unwrap().starts_with("3.1."));
    assert_eq!(description["info"]["version"], env!("CARGO_PKG_VERSION"));
}

#[tokio::test]
async fn the_description_has_every_route_with_its_methods_and_no_other() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &WHOLE).await;
    redis.set("a", &record(&drawable())).await;
    let description = described(&server).await;

    let paths = description["paths"].as_object().unwrap();
    let table = source("src/http/router.rs");
    assert_eq!(paths.len(), table.matches(".route(").count(), "routes in src/http/router.rs");
    for (path, item) in paths {
        assert_eq!(Route::of(path).pattern(), path);
        let methods = methods(item);
        for method in ["GET", "HEAD", "PUT", "POST", "DELETE", "PATCH", "OPTIONS", "TRACE", "QUERY"]
        {
            let sent = Method::from_bytes(method.as_bytes()).unwrap();
            let answer = server
                .send(
                    sent,
                    &path.replace("{id}", "a").replace("{size}", "64x64"),
                    &[],
                    Bytes::new(),
                )
                .await;
            if method == "DELETE" {
                redis.set("a", &record(&drawable())).await;
            }
            let is_described = methods.contains(method);
            assert_ne!(answer.status, StatusCode::NOT_FOUND, "{method} {path}");
            let is_taken = answer.status != StatusCode::METHOD_NOT_ALLOWED;
            assert_eq!(is_taken, is_described, "{method} {path}: {answer:?}");
            if !is_taken {
                if method != "HEAD" {
                    answer.problem(405, "method-not-allowed");
                }
                let allowed: BTreeSet<_> =
                    answer.header("allow").split(',').map(str::trim).collect();
                assert_eq!(allowed, methods.iter().map(String::as_str).collect(), "{path}");
            }
        }
    }
}

#[tokio::test]
async fn the_description_marks_the_routes_that_move_to_the_admin_listener() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[("admin.listen", "127.0.0.1:0")]).await;
    redis.set("a", &record(&drawable())).await;
    let description = described(&server).await;

    let mut for_operators = 0;
    for (path, item) in description["paths"].as_object().unwrap() {
        // With the gallery, which this server doesn't have, the admin listener has everything.
        let is_of_gallery = |it: &Value| it["tags"] == json!(["gallery"]);
        if item.as_object().unwrap().values().any(is_of_gallery) {
            continue;
        }
        let moves = item["get"]["tags"] == json!(["operations"]);
        for_operators += usize::from(moves);
        let (here, elsewhere) =
            if moves { (server.admin, server.address) } else { (server.address, server.admin) };
        let path = path.replace("{id}", "a").replace("{size}", "64x64");
        // `/events` without ids is 400 at once in place of an endless stream.
        let status = match path.as_str() {
            "/events" => StatusCode::BAD_REQUEST,
            _ => StatusCode::OK,
        };
        assert_eq!(get(here, &path, &[]).await.status, status, "{path}");
        get(elsewhere, &path, &[]).await.problem(404, "unknown-address");
    }
    assert_eq!(for_operators, 3);
}

#[tokio::test]
async fn the_description_has_every_type_of_problem_and_no_other() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let description = described(&server).await;
    let types = |schema: &Value| -> BTreeSet<String> {
        let urns = schema["properties"]["type"]["enum"].as_array().unwrap();
        urns.iter().map(|urn| urn.as_str().unwrap().to_owned()).collect()
    };
    let described = types(&description["components"]["schemas"]["Problem"]);

    let known = ProblemKind::ALL.iter().map(|kind| kind.as_str());
    let known: BTreeSet<String> =
        known.map(|kind| format!("urn:problem:afterimage:{kind}")).collect();
    assert_eq!(described, known);
    assert_eq!(known.len(), ProblemKind::ALL.len());

    // Each type belongs to a described response or is not specific to an operation.
    let mut answered: BTreeSet<String> = ["method-not-allowed", "unknown-address"]
        .map(|it| format!("urn:problem:afterimage:{it}"))
        .into();
    for response in description["components"]["responses"].as_object().unwrap().values() {
        let schema = &response["content"]["application/problem+json"]["schema"]["allOf"][1];
        if !schema.is_null() {
            let status = &schema["properties"]["status"]["const"];
            for urn in types(schema) {
                let name = urn.strip_prefix("urn:problem:afterimage:");
                let kind = ProblemKind::ALL.iter().find(|kind| Some(kind.as_str()) == name);
                assert_eq!(*status, kind.unwrap().status().as_u16(), "{urn}");
                answered.insert(urn);
            }
        }
    }
    assert_eq!(answered, described);
}

#[tokio::test]
async fn the_description_has_every_type_of_image_and_no_other() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let description = described(&server).await;
    let known: BTreeSet<&str> = MediaType::ALL.iter().map(|it| it.as_str()).collect();
    for response in ["Image", "ImagePart"] {
        let content = &description["components"]["responses"][response]["content"];
        let described: BTreeSet<&str> =
            content.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(described, known, "{response}");
    }
}

async fn the_description_and_the_server_accept_the_same_ids() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let long = ["x".repeat(128), "x".repeat(129)];
    let mut ids = vec!["a", "_", "0", "Z9._:~-", "a.webp.x", "awebp", "a.PNG", "a.jpeg", &*long[0]];
    ids.extend([".a", ":a", "~a", "-a", "a@", "a+b", "a,b", "a*", "a.webp", "a.avif", "a.jpg"]);
    ids.extend([".png", "a.png", &*long[1]]);

    // Schemathesis validates values with this library.
    let script = "import json, jsonschema_rs, sys; schema, *ids = map(json.loads, sys.argv[1:]); \
        json.dump([jsonschema_rs.is_valid(schema, id) for id in ids], sys.stdout)";
    let schema = &described(&server).await["components"]["schemas"]["ImageId"];
    let mut command = Command::new(python("python"));
    command.args(["-c", script, &schema.to_string()]);
    command.args(ids.iter().map(|id| json!(id).to_string()));
    let valid: Vec<bool> = serde_json::from_slice(&output(command).await).unwrap();

    for (id, valid) in ids.iter().zip(valid) {
        // An address without a format extension.
        let answer = server.get(&format!("/images/{id}/info")).await;
        let (status, kind) = if valid { (404, "absent") } else { (400, "bad-id") };
        answer.problem(status, kind);
    }
}

async fn schemathesis_finds_no_failure() {
    let program = python("schemathesis");
    let redis = RedisServer::start().await;
    let server = with_images(&redis).await;
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("schemathesis.toml");
    std::fs::write(&config, CONFIG).unwrap();

    let mut command = Command::new(program);
    command.current_dir(dir.path()).arg("--no-color").arg("--config-file").arg(config);
    command.args(["run", &format!("http://{}/openapi.json", server.address)]);
    // Every check, every phase; the same requests each time.
    command.args(["--seed", "20261122", "--max-examples", "30", "--generation-database", "none"]);
    command.args(["--request-timeout", "10", "--continue-on-failure"]);
    command.args(["--header", "Authorization: Bearer a-token-of-some-length"]);
    // An event stream never ends.
    command.args(["--exclude-path", "/events"]);
    output(command).await;

    // Its requests have reached the interesting cases.
    let page = server.get("/metrics").await;
    let counted = std::str::from_utf8(&page.body).unwrap();
    for (method, statuses) in [
        ("GET", &[200, 304, 400, 412][..]),
        ("HEAD", &[200, 304, 400, 412][..]),
        ("PUT", &[200, 201, 400, 412][..]),
        ("DELETE", &[204, 404, 412][..]),
    ] {
        for status in statuses {
            let name = format!(
                r#"afterimage_requests_total{{route="/images/{{id}}",method="{method}",status="{status}"}}"#
            );
            assert!(counted.contains(&name), "{name} isn't in:\n{counted}");
        }
    }
}

async fn redbot_finds_no_fault_in_an_image_its_304_and_its_206() {
    let redis = RedisServer::start().await;
    let server = with_images(&redis).await;
    let known = format!("If-None-Match:{}", server.get("/images/picture").await.header("etag"));
    let picture = "/images/picture";
    for (path, fields, answers) in [
        // REDbot repeats the request compressed, for a range, and with each validator.
        (
            picture,
            &[][..],
            &["200", "conneg 200", "range 206", "etag_validate 304", "lm_validate 304"][..],
        ),
        (picture, &[&*known][..], &["304", "conneg 304"][..]),
        (picture, &["Range:bytes=0-99"][..], &["206", "etag_validate 304", "lm_validate 304"][..]),
    ] {
        let expected = answers.iter().map(|it| ((*it).to_owned(), set(&[PUBLIC]))).collect();
        assert_eq!(objections(&server, path, fields).await, expected, "{path} {fields:?}");
    }

    let drawing = objections(&server, "/images/drawing", &[]).await;
    let whole = set(&[PUBLIC, INLINE_STYLE]);
    assert_eq!(
        drawing,
        BTreeMap::from([
            ("200".into(), whole.clone()),
            ("conneg 200".into(), whole.clone()),
            ("range 206".into(), whole),
            // A 304 repeats no Content-Security-Policy: the stored response has it.
            ("etag_validate 304".into(), set(&[PUBLIC])),
        ])
    );
}

async fn redbot_finds_no_fault_in_errors_and_operator_routes() {
    let redis = RedisServer::start().await;
    let server = with_images(&redis).await;
    for (path, fields, status, against) in [
        ("/images/missing", &[][..], "404", &[][..]),
        ("/images/-bad", &[][..], "400", &[BAD_REQUEST][..]),
        ("/images/picture", &["If-Match:\"another\""][..], "412", &[][..]),
        ("/images/picture", &["Range:bytes=100000-"][..], "416", &[][..]),
        ("/images/offloaded", &[][..], "502", &[][..]),
        ("/images/corrupt", &[][..], "502", &[][..]),
        ("/nothing", &[][..], "404", &[][..]),
        ("/openapi.json", &[][..], "200", &[][..]),
        ("/healthz", &[][..], "200", &[][..]),
        ("/readyz", &[][..], "200", &[][..]),
        ("/metrics", &[][..], "200", &[][..]),
    ] {
        let expected =
            [status.to_owned(), format!("conneg {status}")].map(|answer| (answer, set(against)));
        assert_eq!(objections(&server, path, fields).await, expected.into(), "{path} {fields:?}");
    }
}

/// Starts a server with a dated picture, an SVG that compresses, and two records without an image.
async fn with_images(redis: &RedisServer) -> Server {
    use base64::Engine;
    let coded = |bytes: &[u8]| base64::engine::general_purpose::STANDARD.encode(bytes);
    let svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9">{}</svg>"#,
        r#"<path d="M0 0L9 9"/>"#.repeat(100)
    );
    for (id, value) in [
        (
            "picture",
            json!({"base64_data": coded(&drawable()), "created_at": "2026-01-02T03:04:05Z"}),
        ),
        ("drawing", json!({"base64_data": coded(svg.as_bytes())})),
        ("corrupt", json!({"base64_data": "?"})),
        ("offloaded", json!({"url": "https://cdn.example/a.png"})),
    ] {
        redis.set(id, value.to_string().as_bytes()).await;
    }
    Server::on(redis, &WHOLE).await.coherent().await
}

/// `REDbot`'s warnings and errors about the response to a request and to its own further requests. The keys are the name
/// of the check, empty for the request itself, and the status.
async fn objections(
    server: &Server,
    path: &str,
    fields: &[&str],
) -> BTreeMap<String, BTreeSet<String>> {
    let mut command = Command::new(python("python"));
    assert!(
        python("redbot").exists(),
        "redbot is needed in target/python: run tests/run.sh, which installs it"
    );
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/description/redbot_notes.py"));
    command.arg(format!("http://{}{path}", server.address)).args(fields);
    let answers: Vec<Value> = serde_json::from_slice(&output(command).await).unwrap();
    answers
        .iter()
        .map(|answer| {
            let key = format!("{} {}", answer["check"].as_str().unwrap(), answer["status"]);
            let notes = answer["notes"].as_array().unwrap().iter();
            let against = notes
                .map(|note| {
                    [&note["level"], &note["name"]].map(|it| it.as_str().unwrap()).join(" ")
                })
                .filter(|note| note.starts_with("warning ") || note.starts_with("bad "));
            (key.trim_start_matches("default ").to_owned(), against.collect())
        })
        .collect()
}

/// Runs a program and returns its standard output. Fails with all its output if the program fails.
async fn output(mut command: Command) -> Vec<u8> {
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = String::from_utf8_lossy;
    let printed = || format!("{}\n{}", text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{}", printed());
    output.stdout
}

/// Path of a program in the Python environment.
fn python(name: &str) -> PathBuf {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/python/bin").join(name);
    assert!(
        program.exists(),
        "{name} is needed in target/python: run tests/run.sh, which installs it"
    );
    program
}

async fn described(server: &Server) -> Value {
    serde_json::from_slice(&server.get("/openapi.json").await.body).unwrap()
}

/// Methods of a described path, in capitals.
fn methods(item: &Value) -> BTreeSet<String> {
    let operations =
        item.as_object().unwrap().iter().filter(|(_, it)| it.get("responses").is_some());
    operations.map(|(method, _)| method.to_uppercase()).collect()
}

fn set(notes: &[&str]) -> BTreeSet<String> {
    notes.iter().map(|&note| note.to_owned()).collect()
}

fn source(path: &str) -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}
