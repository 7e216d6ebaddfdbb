//! Records: every form that a backend may write, and every kind of corruption.

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE, URL_SAFE_NO_PAD};
use hyper::StatusCode;
use redis::AsyncTypedCommands;

use crate::harness::{RedisServer, Server, etag, png};

#[tokio::test]
async fn every_form_of_record_gives_the_same_image() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    // Two lengths: the short value is decoded on the async worker, the long one on a blocking thread.
    for length in [1000, 200_000] {
        let bytes = png(7, length);
        let standard = STANDARD.encode(&bytes);
        let lines: Vec<&str> =
            standard.as_bytes().chunks(76).map(|line| std::str::from_utf8(line).unwrap()).collect();
        for (name, text) in [
            ("standard", standard.clone()),
            ("unpadded", STANDARD_NO_PAD.encode(&bytes)),
            ("url_safe", URL_SAFE.encode(&bytes)),
            ("url_safe_unpadded", URL_SAFE_NO_PAD.encode(&bytes)),
            ("lines", lines.join("\r\n")),
            ("data_url", format!("data:image/png;base64,{standard}")),
            (
                "encoded_data_url",
                format!(
                    "data:image/png;base64,{}",
                    standard.replace('+', "%2B").replace('/', "%2F").replace('=', "%3D")
                ),
            ),
        ] {
            let json = serde_json::json!({"base64_data": text, "model": {"n": 1}}).to_string();
            for value in [json.clone(), json.replace('/', "\\/"), format!(" {json}\n")] {
                redis.set(name, value.as_bytes()).await;
                let answer = server.get(&format!("/images/{name}")).await;
                assert_eq!(answer.status, StatusCode::OK, "{name}: {answer:?}");
                assert_eq!(answer.body, bytes, "{name}");
                assert_eq!(answer.header("etag"), etag(value.as_bytes()));
            }
        }
    }
}

#[tokio::test]
async fn json_may_be_as_python_and_dotnet_write_it() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    for length in [1000, 200_000] {
        let bytes = png(7, length);
        let image = format!(r#""base64_data": "{}""#, STANDARD.encode(&bytes));
        for value in [
            format!(r#"{{{image}, "score": NaN}}"#),
            format!(r#"{{"scores": [Infinity, {{"a": -Infinity}}], {image}, "url": NaN}}"#),
            format!("\u{feff}{{{image}}}"),
            format!("\u{feff}{{\"created_at\": NaN, {image}}}"),
            format!(r#"{{{image}, "\ud83d": "\ud83d"}}"#),
        ] {
            redis.set("a", value.as_bytes()).await;
            let answer = server.get("/images/a").await;
            assert_eq!(answer.status, StatusCode::OK, "{answer:?}");
            assert_eq!(answer.body, bytes);
            assert_eq!(answer.header("etag"), etag(value.as_bytes()));
        }
    }
    redis.set("a", "\u{feff}{\"score\": NaN,\n\"b\": Infinity, nan}".as_bytes()).await;
    let members = server.get("/images/a").await.problem(502, "corrupt-record");
    assert_eq!(members["detail"], "the value isn't JSON (line 2, column 16)");
}

#[tokio::test]
async fn svg_is_told_by_its_root_whatever_comes_before_it() {
    const NAMESPACE: &str = "http://www.w3.org/2000/svg";
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let utf_16 = format!("\u{feff}<?xml version='1.0'?><svg xmlns='{NAMESPACE}'/>");
    let utf_16: Vec<u8> = utf_16.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let entity = format!("<!DOCTYPE svg [<!ENTITY n '{NAMESPACE}'>]><svg xmlns='&n;'/>");
    let documents = [
        format!("<ns0:svg xmlns:ns0='{NAMESPACE}'/>").into_bytes(),
        format!("<!DOCTYPE svg [ <!-- a[0] > --> ]><svg xmlns='{NAMESPACE}'/>").into_bytes(),
        entity.into_bytes(),
        utf_16,
    ];
    for bytes in documents {
        let value = serde_json::json!({ "base64_data": STANDARD.encode(&bytes) });
        redis.set("a", value.to_string().as_bytes()).await;
        let answer = server.get("/images/a").await;
        assert_eq!(answer.header("content-type"), "image/svg+xml");
        assert_eq!(answer.body, bytes);
    }
    let svg = format!("<svg xmlns='{NAMESPACE}' fill='%'/>");
    let encoded = svg.replace('%', "%25").replace('<', "%3C");
    let value = serde_json::json!({ "base64_data": format!("data:image/svg+xml,{encoded}") });
    redis.set("a", value.to_string().as_bytes()).await;
    let answer = server.get("/images/a").await;
    assert_eq!(answer.header("content-type"), "image/svg+xml");
    assert_eq!(answer.body, svg.as_bytes());
    for html in ["<html><svg></svg></html>", "<s:svg xmlns:s='urn:x'/>"] {
        let value = serde_json::json!({ "base64_data": STANDARD.encode(html) });
        redis.set("a", value.to_string().as_bytes()).await;
        server.get("/images/a").await.problem(502, "corrupt-record");
    }
}

#[tokio::test]
async fn the_media_type_is_sniffed_from_the_bytes_whatever_the_record_declares() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let bmp = [b"BM".as_slice(), &[0; 12], &[40, 0, 0, 0], &[0; 40]].concat();
    let cases: [(&str, &[u8]); 11] = [
        ("image/png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"),
        ("image/jpeg", b"\xff\xd8\xff\xe0\0\x10JFIF"),
        ("image/gif", b"GIF89a\x01\0\x01\0"),
        ("image/webp", b"RIFF\x10\0\0\0WEBPVP8L"),
        ("image/avif", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf"),
        ("image/heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        ("image/jxl", b"\xff\x0a\0\0"),
        ("image/bmp", &bmp),
        ("image/vnd.microsoft.icon", &[0, 0, 1, 0, 1, 0, 16, 16, 0, 0, 1, 0]),
        ("image/tiff", b"II\x2a\0\x08\0\0\0"),
        ("image/svg+xml", b"<?xml version='1.0'?><svg xmlns='http://www.w3.org/2000/svg'/>"),
    ];
    for (media_type, bytes) in cases {
        let value = serde_json::json!({
            "base64_data": STANDARD.encode(bytes),
            "content_type": "text/html",
        });
        redis.set("a", value.to_string().as_bytes()).await;
        let answer = server.get("/images/a").await;
        assert_eq!(answer.header("content-type"), media_type);
        assert_eq!(answer.body, bytes);
        let sandboxed = answer.header("content-security-policy").contains("sandbox");
        assert_eq!(sandboxed, media_type == "image/svg+xml");
    }
    assert_eq!(server.metric("afterimage_type_mismatches_total").await, 11);
}

#[tokio::test]
async fn created_at_becomes_last_modified() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let base64_data = STANDARD.encode(png(1, 100));
    for created_at in [
        serde_json::json!("2026-01-02T04:04:05+01:00"),
        1_767_323_045.into(),
        "2026-01-02T03:04:05.123456".into(),
        "2026-01-02 03:04:05".into(),
    ] {
        let value = serde_json::json!({"base64_data": base64_data, "created_at": created_at});
        redis.set("a", value.to_string().as_bytes()).await;
        let answer = server.get("/images/a").await;
        assert_eq!(answer.header("last-modified"), "Fri, 02 Jan 2026 03:04:05 GMT");
    }
}

#[tokio::test]
async fn a_corrupt_record_is_502_counted_and_never_cached() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let values: [&[u8]; 10] = [
        b"",
        b"not json",
        b"\x89PNG\r\n\x1a\n",
        b"[]",
        b"[\"iVBORw0KGgo=\"]",
        b"{}",
        br#"{"base64_data": ""}"#,
        br#"{"base64_data": "R0lG!"}"#,
        br#"{"base64_data": "aGVsbG8="}"#,
        br#"{"base64_data": 5}"#,
    ];
    for value in values {
        redis.set("a", value).await;
        let members = server.get("/images/a").await.problem(502, "corrupt-record");
        assert!(!members["detail"].as_str().unwrap().is_empty());
    }
    assert_eq!(server.metric("afterimage_corrupt_records_total").await, 10);
    assert_eq!(server.metric("afterimage_cache_images").await, 0);
    // A repaired record is served at once.
    redis.set("a", &crate::harness::record(&png(1, 100))).await;
    assert_eq!(server.get("/images/a").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_key_that_holds_a_list_is_a_corrupt_record_and_the_server_goes_on() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    redis.connect().await.rpush("image:a", "x").await.unwrap();
    let members = server.get("/images/a").await.problem(502, "corrupt-record");
    assert_eq!(members["detail"], "the key doesn't hold a string");
    redis.set("b", &crate::harness::record(&png(1, 100))).await;
    assert_eq!(server.get("/images/b").await.status, StatusCode::OK);
}

#[tokio::test]
async fn a_value_of_100_mb_is_refused_without_being_fetched() {
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await;
    let mut connection = redis.connect().await;
    connection.setrange("image:a", 100_000_000, "x").await.unwrap();
    let members = server.get("/images/a").await.problem(502, "corrupt-record");
    let detail = members["detail"].as_str().unwrap();
    assert_eq!(
        detail,
        "the value has 100000001 bytes, the limit is 33554432 ([records] max_value)"
    );
    let stats: String =
        redis::cmd("INFO").arg("commandstats").query_async(&mut connection).await.unwrap();
    assert!(!stats.contains("cmdstat_get:"), "{stats}");
    redis.set("b", &crate::harness::record(&png(1, 100))).await;
    assert_eq!(server.get("/images/b").await.status, StatusCode::OK);
}
