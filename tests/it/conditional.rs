//! Conditional requests and ranges (RFC 9110 §13 and §14): one table, over both protocols.

use bytes::Bytes;
use hyper::Method;

use crate::harness::{Answer, Client, Protocol, RedisServer, Server, etag, png, record};
use crate::variants::{encoded, picture};

const LENGTH: usize = 1000;

/// Creation time of the dated image, in Unix seconds; below as an HTTP date, with its neighbours.
const MADE: i64 = 1_761_998_400;
const DATE: &str = "Sat, 01 Nov 2025 12:00:00 GMT";
const EARLIER: &str = "Sat, 01 Nov 2025 11:59:59 GMT";
const LATER: &str = "Sat, 01 Nov 2025 12:00:01 GMT";
/// `DATE` in the two obsolete formats (§5.6.7).
const DATE_RFC850: &str = "Saturday, 01-Nov-25 12:00:00 GMT";
const DATE_ASCTIME: &str = "Sat Nov  1 12:00:00 2025";

/// A row: RFC section, method, image, header fields, expected response. `dated` has `created_at`, `plain` has none,
/// `drawn` is an SVG that is sent as br; `corrupt` and `absent` are as named.
type Case = (
    // Section of RFC 9110.
    &'static str,
    &'static str,
    &'static str,
    // Header fields; `{E}` stands for the image's entity-tag without its quotes.
    &'static [(&'static str, &'static str)],
    Expected,
);

#[derive(Debug, Clone, Copy)]
enum Expected {
    Whole,
    /// First and last byte.
    Part(usize, usize),
    NotModified,
    PreconditionFailed,
    Unsatisfiable,
    Status(u16),
}

use Expected::{NotModified, Part, PreconditionFailed, Status, Unsatisfiable, Whole};

#[rustfmt::skip]
const TABLE: &[Case] = &[
    // If-None-Match: lists, weak comparison, `*`, and malformed values.
    ("9.3.1", "GET", "dated", &[], Whole),
    ("9.3.2", "HEAD", "dated", &[], Whole),
    ("13.1.2", "GET", "dated", &[("if-none-match", "\"{E}\"")], NotModified),
    ("13.1.2", "HEAD", "dated", &[("if-none-match", "\"{E}\"")], NotModified),
    ("13.1.2", "GET", "plain", &[("if-none-match", "\"{E}\"")], NotModified),
    ("8.8.3.2", "GET", "dated", &[("if-none-match", "W/\"{E}\"")], NotModified),
    ("13.1.2", "GET", "dated", &[("if-none-match", "*")], NotModified),
    ("13.1.2", "HEAD", "dated", &[("if-none-match", "*")], NotModified),
    ("13.1.2", "GET", "dated", &[("if-none-match", "\"x\", \"{E}\"")], NotModified),
    ("8.8.3", "GET", "dated", &[("if-none-match", "\"a,b\",\"{E}\"")], NotModified),
    ("8.8.3", "GET", "dated", &[("if-none-match", "\"a,\\\", \"{E}\"")], NotModified),
    ("5.6.1", "GET", "dated", &[("if-none-match", ",, ,\"{E}\" , ")], NotModified),
    ("5.3", "GET", "dated", &[("if-none-match", "\"x\""), ("if-none-match", "\"{E}\"")], NotModified),
    ("13.1.2", "GET", "dated", &[("if-none-match", "\"x\", W/\"y\"")], Whole),
    ("13.1.2", "HEAD", "dated", &[("if-none-match", "\"x\"")], Whole),
    ("8.8.3", "GET", "dated", &[("if-none-match", "{E}")], Whole),
    ("8.8.3", "GET", "dated", &[("if-none-match", "w/\"{E}\"")], Whole),
    ("8.8.3", "GET", "dated", &[("if-none-match", "\"{E}")], Whole),
    ("13.1.2", "GET", "dated", &[("if-none-match", "")], Whole),
    ("13.1.2", "GET", "dated", &[("if-none-match", "*, \"x\"")], Whole),
    ("13.1.2", "GET", "dated", &[("if-none-match", "\"{E}-br1\"")], Whole),
    // If-Match: strong comparison.
    ("13.1.1", "GET", "dated", &[("if-match", "\"{E}\"")], Whole),
    ("13.1.1", "HEAD", "dated", &[("if-match", "\"{E}\"")], Whole),
    ("13.1.1", "GET", "dated", &[("if-match", "*")], Whole),
    ("13.1.1", "GET", "dated", &[("if-match", "\"x\", \"{E}\"")], Whole),
    ("13.1.1", "GET", "dated", &[("if-match", "\"x\"")], PreconditionFailed),
    ("13.1.1", "HEAD", "dated", &[("if-match", "\"x\"")], PreconditionFailed),
    ("8.8.3.2", "GET", "dated", &[("if-match", "W/\"{E}\"")], PreconditionFailed),
    ("13.1.1", "GET", "dated", &[("if-match", "{E}")], PreconditionFailed),
    ("13.1.1", "GET", "dated", &[("if-match", "")], PreconditionFailed),
    // If-Modified-Since: only for an image with a date; three date formats; a repeated field is ignored.
    ("13.1.3", "GET", "dated", &[("if-modified-since", DATE)], NotModified),
    ("13.1.3", "HEAD", "dated", &[("if-modified-since", DATE)], NotModified),
    ("13.1.3", "GET", "dated", &[("if-modified-since", LATER)], NotModified),
    ("13.1.3", "GET", "dated", &[("if-modified-since", EARLIER)], Whole),
    ("5.6.7", "GET", "dated", &[("if-modified-since", DATE_RFC850)], NotModified),
    ("5.6.7", "GET", "dated", &[("if-modified-since", DATE_ASCTIME)], NotModified),
    ("13.1.3", "GET", "dated", &[("if-modified-since", "yesterday")], Whole),
    ("13.1.3", "GET", "dated", &[("if-modified-since", DATE), ("if-modified-since", DATE)], Whole),
    ("13.1.3", "GET", "plain", &[("if-modified-since", DATE)], Whole),
    // If-Unmodified-Since.
    ("13.1.4", "GET", "dated", &[("if-unmodified-since", DATE)], Whole),
    ("13.1.4", "GET", "dated", &[("if-unmodified-since", LATER)], Whole),
    ("13.1.4", "GET", "dated", &[("if-unmodified-since", EARLIER)], PreconditionFailed),
    ("13.1.4", "HEAD", "dated", &[("if-unmodified-since", EARLIER)], PreconditionFailed),
    ("13.1.4", "GET", "dated", &[("if-unmodified-since", "never")], Whole),
    ("13.1.4", "GET", "plain", &[("if-unmodified-since", EARLIER)], Whole),
    // Precedence.
    ("13.2.2", "GET", "dated", &[("if-match", "\"x\""), ("if-none-match", "\"{E}\"")], PreconditionFailed),
    ("13.2.2", "GET", "dated", &[("if-match", "\"{E}\""), ("if-none-match", "\"{E}\"")], NotModified),
    ("13.2.2", "GET", "dated", &[("if-match", "\"{E}\""), ("if-unmodified-since", EARLIER)], Whole),
    ("13.2.2", "GET", "dated", &[("if-none-match", "\"x\""), ("if-modified-since", DATE)], Whole),
    ("13.2.2", "GET", "dated", &[("if-none-match", "\"{E}\""), ("if-modified-since", EARLIER)], NotModified),
    ("13.2.2", "GET", "dated", &[("if-unmodified-since", EARLIER), ("if-none-match", "\"{E}\"")], PreconditionFailed),
    ("13.2.2", "GET", "dated", &[("range", "bytes=0-9"), ("if-none-match", "\"{E}\"")], NotModified),
    ("13.2.2", "GET", "dated", &[("range", "bytes=2000-"), ("if-match", "\"x\"")], PreconditionFailed),
    // §13.2.1: without preconditions the response would be an error, so they are ignored.
    ("13.2.1", "GET", "absent", &[("if-match", "*")], Status(404)),
    ("13.2.1", "GET", "absent", &[("if-none-match", "*")], Status(404)),
    ("13.2.1", "HEAD", "absent", &[("if-match", "\"x\"")], Status(404)),
    ("13.2.1", "GET", "corrupt", &[("if-match", "\"x\"")], Status(502)),
    ("14.2", "GET", "absent", &[("range", "bytes=0-9")], Status(404)),
    // Range.
    ("14.1.2", "GET", "dated", &[("range", "bytes=0-9")], Part(0, 9)),
    ("14.1.2", "GET", "plain", &[("range", "bytes=999-999")], Part(999, 999)),
    ("14.1.2", "GET", "dated", &[("range", "bytes=990-5000")], Part(990, 999)),
    ("14.1.2", "GET", "dated", &[("range", "bytes=500-")], Part(500, 999)),
    ("14.1.2", "GET", "dated", &[("range", "bytes=-1")], Part(999, 999)),
    ("14.1.2", "GET", "dated", &[("range", "bytes=-5000")], Part(0, 999)),
    ("14.1", "GET", "dated", &[("range", "Bytes=1-2")], Part(1, 2)),
    ("14.2", "HEAD", "dated", &[("range", "bytes=0-9")], Whole),
    ("15.5.17", "GET", "dated", &[("range", "bytes=1000-")], Unsatisfiable),
    ("15.5.17", "GET", "dated", &[("range", "bytes=1000-2000")], Unsatisfiable),
    ("14.1.2", "GET", "dated", &[("range", "bytes=-0")], Unsatisfiable),
    ("15.5.17", "GET", "dated", &[("range", "bytes=1000-,2000-")], Unsatisfiable),
    ("14.2", "GET", "dated", &[("range", "bytes=0-1,4-5")], Whole),
    ("14.2", "GET", "dated", &[("range", "bytes=9-2")], Whole),
    ("14.2", "GET", "dated", &[("range", "bytes=x-")], Whole),
    ("14.2", "GET", "dated", &[("range", "bytes")], Whole),
    ("14.2", "GET", "dated", &[("range", "rows=0-9")], Whole),
    ("14.2", "GET", "dated", &[("range", "bytes=0-1"), ("range", "bytes=2-3")], Whole),
    // If-Range: strong, and never by a date.
    ("13.1.5", "GET", "dated", &[("range", "bytes=0-9"), ("if-range", "\"{E}\"")], Part(0, 9)),
    ("13.1.5", "GET", "dated", &[("range", "bytes=0-9"), ("if-range", "\"x\"")], Whole),
    ("13.1.5", "GET", "dated", &[("range", "bytes=0-9"), ("if-range", "W/\"{E}\"")], Whole),
    ("8.8.2.2", "GET", "dated", &[("range", "bytes=0-9"), ("if-range", DATE)], Whole),
    ("13.1.5", "GET", "dated", &[("range", "bytes=0-9"), ("if-range", "\"{E}\", \"x\"")], Whole),
    ("13.1.5", "GET", "dated", &[("range", "bytes=2000-"), ("if-range", "\"x\"")], Whole),
    ("13.1.5", "GET", "dated", &[("if-range", "\"x\"")], Whole),
    ("13.1.5", "HEAD", "dated", &[("range", "bytes=0-9"), ("if-range", "\"{E}\"")], Whole),
    // A compressed representation has its own validators and ranges.
    ("8.8.3.3", "GET", "drawn", &[("accept-encoding", "br"), ("if-none-match", "\"{E}-br1\"")], NotModified),
    ("8.8.3.3", "GET", "drawn", &[("accept-encoding", "br"), ("if-none-match", "\"{E}\"")], Whole),
    ("8.8.3.3", "GET", "drawn", &[("accept-encoding", "br"), ("if-match", "\"{E}\"")], PreconditionFailed),
    ("14.2", "GET", "drawn", &[("accept-encoding", "br"), ("range", "bytes=0-4")], Part(0, 4)),
    ("13.1.5", "GET", "drawn", &[("accept-encoding", "br"), ("range", "bytes=0-4"), ("if-range", "\"{E}\"")], Whole),
];

#[tokio::test]
async fn conditional_and_range_requests_follow_rfc_9110_over_both_protocols() {
    assert!(TABLE.len() >= 60);
    let redis = RedisServer::start().await;
    let server = Server::on(&redis, &[]).await.coherent().await;
    let plain = record(&png(1, LENGTH));
    let mut dated: serde_json::Value = serde_json::from_slice(&record(&png(2, LENGTH))).unwrap();
    dated["created_at"] = MADE.into();
    let dated = serde_json::to_vec(&dated).unwrap();
    let drawn = record(drawing().as_bytes());
    for (id, value) in [("plain", &plain), ("dated", &dated), ("drawn", &drawn)] {
        redis.set(id, value).await;
    }
    redis.set("corrupt", b"{}").await;

    for protocol in [Protocol::Http1, Protocol::Http2] {
        let mut client = Client::speaking(protocol, server.address).await;
        for case @ (section, method, id, fields, expected) in TABLE {
            let value = match *id {
                "plain" => &plain,
                "drawn" => &drawn,
                _ => &dated,
            };
            let tag = etag(value);
            let sent: Vec<(&str, String)> = fields
                .iter()
                .map(|(name, value)| (*name, value.replace("{E}", tag.trim_matches('"'))))
                .collect();
            let sent: Vec<(&str, &str)> =
                sent.iter().map(|(name, value)| (*name, value.as_str())).collect();
            let path = format!("/images/{id}");
            let method: Method = method.parse().unwrap();
            let coding: Vec<_> =
                sent.iter().filter(|(name, _)| *name == "accept-encoding").copied().collect();
            let whole = client.get(&path, &coding).await;
            let answer = client.send(method.clone(), &path, &sent, Bytes::new()).await.unwrap();
            let what = format!("§{section} over {protocol:?}: {case:?} → {answer:?}");
            check(&answer, &whole, &method, *expected, &what);
        }
    }
}

/// Checks a response against the expectation and the 200 response to the same request without conditions.
fn check(answer: &Answer, whole: &Answer, method: &Method, expected: Expected, what: &str) {
    let same = |names: &[&str]| {
        for name in names {
            assert_eq!(answer.header(name), whole.header(name), "{name} of {what}");
        }
    };
    let length = whole.body.len();
    let body = |status: u16, body: &[u8]| {
        assert_eq!(answer.status, status, "{what}");
        let sent: &[u8] = if method == Method::HEAD { b"" } else { body };
        assert!(answer.body == sent, "{what}");
    };
    // Sent with every status (§12.5.5).
    assert_eq!(answer.header("vary"), "Accept-Encoding", "{what}");
    assert!(!answer.header("date").is_empty(), "{what}");
    match expected {
        Whole => {
            body(200, &whole.body);
            same(&["content-type", "content-encoding", "accept-ranges"]);
            same(&["etag", "last-modified", "cache-control"]);
            assert_eq!(answer.header("content-length"), length.to_string(), "{what}");
            assert_eq!(answer.header("content-range"), "", "{what}");
        }
        Part(first, last) => {
            // §15.3.7: a 206 repeats the representation fields of the 200.
            body(206, &whole.body[first..=last]);
            same(&["content-type", "content-encoding", "etag", "last-modified", "cache-control"]);
            let range = format!("bytes {first}-{last}/{length}");
            assert_eq!(answer.header("content-range"), range, "{what}");
            let partial = (last - first + 1).to_string();
            assert_eq!(answer.header("content-length"), partial, "{what}");
        }
        NotModified => {
            // §15.4.5; §8.6: Content-Length is that of the 200, or absent.
            body(304, b"");
            same(&["etag", "last-modified", "cache-control"]);
            assert_eq!(answer.header("content-type"), "", "{what}");
            assert!(["", &length.to_string()].contains(&answer.header("content-length")), "{what}");
        }
        PreconditionFailed => {
            assert_eq!(answer.status, 412, "{what}");
            same(&["etag"]);
        }
        Unsatisfiable => {
            assert_eq!(answer.status, 416, "{what}");
            assert_eq!(answer.header("content-range"), format!("bytes */{length}"), "{what}");
        }
        Status(status) => assert_eq!(answer.status, status, "{what}"),
    }
    if answer.status.as_u16() >= 400 {
        assert_eq!(answer.header("cache-control"), "no-store", "{what}");
        assert_eq!(answer.header("content-type"), "application/problem+json", "{what}");
    }
}

#[tokio::test]
async fn a_304_of_a_variant_that_is_not_rendered_yet_has_its_length_or_none() {
    let redis = RedisServer::start().await;
    redis.set("a", &record(&encoded(&picture(1, 100, 50), image::ImageFormat::Png))).await;
    for path in ["/images/a?w=64", "/images/a.webp", "/images/a/thumbnail"] {
        let known = Server::on(&redis, &[]).await.coherent().await;
        let whole = known.get(path).await;
        let (tag, length) = (whole.header("etag"), whole.header("content-length"));
        for protocol in [Protocol::Http1, Protocol::Http2] {
            // A server that has rendered nothing yet; then one that knows the image; then the cached head.
            let server = Server::on(&redis, &[]).await.coherent().await;
            let mut client = Client::speaking(protocol, server.address).await;
            for _ in 0..3 {
                for (fields, status) in
                    [(vec![("if-none-match", tag)], 304), (vec![("if-match", "\"x\"")], 412)]
                {
                    let head =
                        client.send(Method::HEAD, path, &fields, Bytes::new()).await.unwrap();
                    assert_eq!(head.status, status, "{path}");
                    assert_ne!(head.header("content-length"), "0", "{path} {head:?}");
                    if status == 304 {
                        assert!(["", length].contains(&head.header("content-length")), "{head:?}");
                    }
                }
            }
            let fields = [("if-none-match", "\"other\"")];
            let head = client.send(Method::HEAD, path, &fields, Bytes::new()).await.unwrap();
            assert_eq!((head.status.as_u16(), head.header("content-length")), (200, length));
        }
    }
}

/// An SVG that compresses well.
pub(crate) fn drawing() -> String {
    let circles = "<circle cx='50' cy='50' r='40' fill='#888'/>".repeat(50);
    format!("<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 100 100'>{circles}</svg>")
}
