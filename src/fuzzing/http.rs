//! Fields and addresses of requests, and events.

use ::base64::Engine;
use ::base64::engine::general_purpose::STANDARD;
use axum::body::Body;
use axum::extract::Query;
use axum::http::header::{
    ACCEPT, ACCEPT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, FORWARDED, HOST, IF_MATCH,
    IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, RANGE,
};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Uri};
use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::settings::{hosts as own_hosts, pictures, proxies};
use crate::events::{EventContent, Followed};
use crate::http::conditional::{Part, part, preconditions};
use crate::http::digest::Digests;
use crate::http::events::{EventParams, encode, followed};
use crate::http::fast_path::FastRequest;
use crate::http::negotiation::{accepted_codings, accepted_exposition, accepted_types};
use crate::http::representation::requested_part;
use crate::http::router::Route;
use crate::http::{forwarded as forwarding, host as hosts, params};
use crate::image::coding::Coding;
use crate::image::preconditions::{EntityTags, Preconditions, Verdict};
use crate::image::variant::{RequestedFormat, Resolved, Transform};
use crate::image::{Embedded, ImageId, MAX_ID_LENGTH, MediaType, Metadata, Traits, Version};
use crate::peer::Peer;

/// Reads field lines, each a name and a value with a colon between. Malformed ones are left out: the HTTP library refuses
/// their request.
fn fields(data: &[u8]) -> HeaderMap {
    let mut fields = HeaderMap::new();
    for line in data.split(|&byte| byte == b'\n').take(64) {
        let Some(colon) = line.iter().position(|&byte| byte == b':') else { continue };
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(name), HeaderValue::from_bytes(value))
        {
            fields.append(name, value);
        }
    }
    fields
}

/// Joins the lines of a field, which means the same (RFC 9110 §5.3). `None` for lines that are no text.
fn joined(fields: &HeaderMap, name: &HeaderName) -> Option<HeaderMap> {
    let lines = fields.get_all(name).iter().map(HeaderValue::to_str);
    let lines = lines.collect::<Result<Vec<_>, _>>().ok()?;
    let mut joined = HeaderMap::new();
    if !lines.is_empty() {
        joined.insert(name, HeaderValue::try_from(lines.join(", ")).ok()?);
    }
    Some(joined)
}

/// An image of a length, made at 2026-01-02T03:04:05Z.
fn metadata(length: usize) -> Metadata {
    let made = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_767_323_045);
    Metadata::new(Version::of(b"{}"), MediaType::Png, length, Some(made))
}

/// Preconditions are read as they are written, and the stronger one of two wins (RFC 9110 §13.2.2).
pub fn conditional(data: &[u8]) {
    let fields = fields(data);
    let (parsed, metadata) = (preconditions(&fields), metadata(7));
    for (name, tags) in [(&IF_MATCH, &parsed.if_match), (&IF_NONE_MATCH, &parsed.if_none_match)] {
        assert_eq!(tags.is_some(), fields.contains_key(name));
        if let Some(tags) = tags {
            check_tags(name, tags);
            assert!(tags.match_weakly(&metadata.etag) || !tags.match_strongly(&metadata.etag));
            let version = metadata.version;
            assert!(tags.name_weakly(version) || !tags.name_strongly(version));
        }
    }
    for (name, date) in [
        (&IF_MODIFIED_SINCE, parsed.if_modified_since),
        (&IF_UNMODIFIED_SINCE, parsed.if_unmodified_since),
    ] {
        if let Some(date) = date {
            let text = httpdate::fmt_http_date(date);
            let written = HeaderMap::from_iter([(name.clone(), text.parse().expect("a date"))]);
            let again = preconditions(&written);
            assert!([again.if_modified_since, again.if_unmodified_since].contains(&Some(date)));
        }
    }
    let verdict = parsed.evaluate(&metadata);
    let without_weaker = Preconditions {
        if_modified_since: parsed.if_modified_since.filter(|_| parsed.if_none_match.is_none()),
        if_unmodified_since: parsed.if_unmodified_since.filter(|_| parsed.if_match.is_none()),
        ..parsed.clone()
    };
    assert_eq!(without_weaker.evaluate(&metadata), verdict);
    if !fields.contains_key(IF_MATCH) && !fields.contains_key(IF_UNMODIFIED_SINCE) {
        assert_ne!(verdict, Verdict::Failed);
    }
    if !fields.contains_key(IF_NONE_MATCH) && !fields.contains_key(IF_MODIFIED_SINCE) {
        assert_ne!(verdict, Verdict::NotModified);
    }
}

/// Checks that entity-tags are parsed again after they were written as a list.
fn check_tags(name: &HeaderName, tags: &EntityTags) {
    let text = match tags {
        EntityTags::Any => "*".to_owned(),
        EntityTags::List(tags) => {
            let write =
                |weak: bool, opaque: &str| format!("{}{opaque}", if weak { "W/" } else { "" });
            let tags: Vec<_> = tags.iter().map(|it| write(it.weak, &it.opaque)).collect();
            tags.join(", ")
        }
    };
    let value = HeaderValue::from_bytes(text.as_bytes()).expect("parts of a value");
    let again = preconditions(&HeaderMap::from_iter([(name.clone(), value)]));
    assert_eq!([again.if_match, again.if_none_match].iter().flatten().next(), Some(tags));
}

/// A part is inside of the image, and is the answer to a request for exactly this part. The first two bytes are the length.
pub fn range(data: &[u8]) {
    let Some((length, lines)) = data.split_first_chunk::<2>() else { return };
    let length = usize::from(u16::from_le_bytes(*length));
    let (fields, metadata) = (fields(lines), metadata(length));
    let part_of = |text: &str, metadata: &Metadata| {
        part(&HeaderMap::from_iter([(RANGE, text.parse().expect("ASCII"))]), metadata)
    };
    let asked = part(&fields, &metadata);
    if let Part::Bytes { first, last } = asked {
        assert!(first <= last && last < length, "{asked:?} of {length}");
        assert_eq!(part_of(&format!("bytes={first}-{last}"), &metadata), asked);
        assert_eq!(
            part_of(&format!("bytes=-{}", length - first), &metadata),
            Part::Bytes { first, last: length - 1 }
        );
    }
    if !fields.contains_key(RANGE) {
        assert_eq!(asked, Part::Whole);
    }
    if fields.contains_key(IF_RANGE) && asked != Part::Whole {
        assert_eq!(fields.get(IF_RANGE), Some(&metadata.etag), "a part of another representation");
    }
    let response = requested_part(&fields, &metadata, Bytes::from(vec![7; length]));
    let header = |name| response.headers().get(name).and_then(|it| it.to_str().ok());
    match asked {
        Part::Whole => {
            assert_eq!(response.status(), StatusCode::OK);
            assert_eq!(header(CONTENT_LENGTH), Some(&*length.to_string()));
        }
        Part::Bytes { first, last } => {
            assert_eq!(response.status(), StatusCode::PARTIAL_CONTENT);
            assert_eq!(header(CONTENT_LENGTH), Some(&*(last - first + 1).to_string()));
            assert_eq!(header(CONTENT_RANGE), Some(&*format!("bytes {first}-{last}/{length}")));
        }
        Part::Unsatisfiable => {
            assert_eq!(response.status(), StatusCode::RANGE_NOT_SATISFIABLE);
            assert_eq!(header(CONTENT_RANGE), Some(&*format!("bytes */{length}")));
        }
    }
}

/// Nothing is chosen that the client refuses, and a list means the same in one line and in several.
pub fn negotiation(data: &[u8]) {
    let fields = fields(data);
    let codings = accepted_codings(&fields);
    let weights = [codings.brotli, codings.gzip, codings.identity];
    assert!(weights.into_iter().all(|it| it <= 1000));
    let weight = |coding| match coding {
        Some(Coding::Brotli) => codings.brotli,
        Some(Coding::Gzip) => codings.gzip,
        None => codings.identity,
    };
    let best = codings.best(Coding::ALL.into_iter());
    assert!(best.is_none() || weight(best) > 0);
    let most = weights.into_iter().max();
    assert!(Some(weight(best)) == most, "{codings:?}: {best:?}");
    if let Some(joined) = joined(&fields, &ACCEPT_ENCODING) {
        assert_eq!(accepted_codings(&joined), codings);
    }
    for makes_avif in [false, true] {
        let types = accepted_types(&fields, makes_avif);
        if let Some(joined) = joined(&fields, &ACCEPT) {
            assert_eq!(accepted_types(&joined, makes_avif), types);
            assert_eq!(accepted_exposition(&joined), accepted_exposition(&fields));
        }
        let weight = |media_type: MediaType| {
            let index = MediaType::ALL.iter().position(|it| *it == media_type).expect("a type");
            types.named[index].unwrap_or(types.rest)
        };
        let format = RequestedFormat::Negotiated(types);
        let transform = Transform { format, quality: None, ..Transform::THUMBNAIL };
        let as_it_is =
            crate::image::bounds::Bounds { width: None, height: None, ..transform.bounds };
        for bounds in [transform.bounds, as_it_is] {
            for media_type in MediaType::ALL {
                for (animated, embedded) in [
                    (false, Embedded::Nothing),
                    (true, Embedded::Removable),
                    (true, Embedded::Inseparable),
                ] {
                    let traits = Traits { animated, embedded };
                    let transform = Transform { bounds, ..transform };
                    let Ok(list) = transform.candidates(media_type, traits) else {
                        assert_eq!(weight(media_type), 0, "the image's own type is accepted");
                        continue;
                    };
                    for resolved in list {
                        let made = match resolved {
                            Resolved::Original | Resolved::Stripped => media_type,
                            Resolved::Variant(variant) => variant.format().media_type(),
                        };
                        assert!(
                            weight(made) > 0,
                            "{media_type:?} as {resolved:?}, which is refused"
                        );
                    }
                }
            }
        }
    }
}

/// A digest is that of one body alone. What follows the first empty line is the body.
pub fn digests(data: &[u8]) {
    let at = data.windows(2).position(|it| it == b"\n\n").unwrap_or(data.len());
    let (head, body) = (&data[..at], data.get(at + 2..).unwrap_or_default());
    let mut fields = fields(head);
    let Ok(digests) = Digests::of(&fields) else { return };
    let contradiction = digests.contradiction(body);
    let longer = [body, b"x"].concat();
    if digests == Digests::default() {
        assert_eq!(contradiction, None);
    } else {
        assert!(contradiction.or(digests.contradiction(&longer)).is_some(), "it fits two bodies");
    }
    // The right digest beside them changes nothing, a wrong one does.
    let right = format!("sha-256=:{}:", STANDARD.encode(Sha256::digest(body)));
    fields.append("repr-digest", HeaderValue::try_from(right).expect("ASCII"));
    if let Ok(digests) = Digests::of(&fields) {
        assert_eq!(digests.contradiction(body).is_some(), contradiction.is_some());
        assert!(digests.contradiction(&longer).is_some());
    }
}

/// An id is written in addresses as it is, and is found there by the fast path and by the router.
pub fn image_ids(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let Ok(id) = ImageId::parse(text) else { return };
    assert_eq!(id.as_str(), text);
    assert!(text.len() <= MAX_ID_LENGTH);
    let allowed = &pictures();
    for (end, route) in
        [("", Route::Image), ("/thumbnail", Route::Thumbnail), ("/info", Route::Info)]
    {
        let path = format!("/images/{text}{end}");
        let uri: Uri = path.parse().expect("an id has no escapes");
        assert_eq!(uri.path(), path);
        assert!(Route::of(&path) == route, "{path}");
    }
    for end in ["", ".webp", ".jpg", ".png"] {
        let name = format!("{text}{end}");
        let split = params::split_format(&name, allowed).map(|(id, format)| (id, format.is_some()));
        assert!(
            matches!(split, Ok((it, has_format)) if it == text && has_format != end.is_empty()),
            "{name}"
        );
        let head = format!("GET /images/{name}?v=1 HTTP/1.1\r\nHost: a\r\n\r\n");
        with_fast_request(&head, |fast| {
            let image = fast.and_then(|it| it.image()).expect("a plain address");
            assert_eq!((image.id, image.rest), (text, &*format!("{end}?v=1")));
        });
    }
}

/// Reads a head as the fast loop does.
fn with_fast_request(head: &str, check: impl FnOnce(Option<FastRequest<'_>>)) {
    let mut fields = [httparse::EMPTY_HEADER; 4];
    let mut request = httparse::Request::new(&mut fields);
    let is_whole = request.parse(head.as_bytes()).is_ok_and(|it| it.is_complete());
    check(FastRequest::of(&request).filter(|_| is_whole));
}

/// Parameters are those that the settings allow, and the fast path agrees on what depends on `Accept`.
pub fn parameters(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    let (name, query) =
        text.split_once('?').map_or((text, None), |(name, query)| (name, Some(query)));
    let target = query.map_or(format!("/images/{name}"), |query| format!("/images/{name}?{query}"));
    let Ok(uri) = target.parse::<Uri>() else { return };
    if Route::of(uri.path()) != Route::Image {
        return;
    }
    let allowed = &pictures();
    let Ok((id, extension)) = params::split_format(name, allowed) else { return };
    let is_negotiated = params::is_negotiated(&uri);
    let parsed = params::parse(&uri, extension, &HeaderMap::new(), allowed);
    if let Ok(parsed) = &parsed {
        let transform = parsed.transform.as_ref();
        assert_eq!(transform.is_some_and(Transform::is_negotiated), is_negotiated);
        if let Some(transform) = transform {
            let is_allowed = |length: Option<u32>, lengths: &[u32]| {
                length.is_none_or(|length| {
                    let dprs = allowed.dprs.iter().chain(&[1]);
                    dprs.into_iter()
                        .any(|dpr| length % dpr == 0 && lengths.contains(&(length / dpr)))
                })
            };
            assert!(is_allowed(transform.bounds.width, &allowed.widths));
            assert!(is_allowed(transform.bounds.height, &allowed.heights));
            assert!(transform.quality.is_none_or(|it| allowed.qualities.contains(&it.into())));
        }
        if let Some(version) = &parsed.version {
            let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'"');
            assert!(version.bytes().all(is_plain), "{version:?}");
        }
    }
    let head = format!("GET {target} HTTP/1.1\r\nHost: a\r\n\r\n");
    with_fast_request(&head, |fast| {
        let Some(image) = fast.as_ref().and_then(FastRequest::image) else { return };
        if image.is_thumbnail() || ImageId::parse(image.id).is_err() {
            return;
        }
        assert_eq!(image.id, id, "the fast path finds another id than the router");
        if is_negotiated {
            assert!(image.is_negotiated(), "a cached head would be replayed to any Accept");
        }
    });
}

/// Nothing that a client sends makes a trusted proxy's word about it mean another client.
pub fn forwarded(data: &[u8]) {
    let proxies = proxies();
    let (peer, stranger) = ("127.0.0.1:9", "192.0.2.9:9");
    let [peer, stranger] = [peer, stranger].map(|it| Peer::Tcp(it.parse().expect("an address")));
    let fields = fields(data);
    assert_eq!(forwarding::client(stranger, &proxies, &fields), stranger.into());
    let client = forwarding::client(peer, &proxies, &fields);
    if let Some(address) = client.forwarded() {
        assert_eq!(address, address.to_canonical());
    }
    // A proxy adds the address of its client at the end of the last line.
    for (name, address) in [("x-forwarded-for", "192.0.2.1"), (FORWARDED.as_str(), "for=192.0.2.1")]
    {
        let mut lines: Vec<HeaderValue> = fields.get_all(name).iter().cloned().collect();
        let Some(last) = lines.pop() else { continue };
        let line = [last.as_bytes(), b", ", address.as_bytes()].concat();
        lines.push(HeaderValue::from_bytes(&line).expect("parts of values"));
        let fields: HeaderMap =
            lines.into_iter().map(|line| (name.parse().expect("a name"), line)).collect();
        let named = forwarding::client(peer, &proxies, &fields).forwarded();
        assert!(
            named.is_none_or(|it| it.to_string() == "192.0.2.1"),
            "the client named itself: {named:?} by {fields:?}"
        );
    }
}

/// A host is one to every parser, and the same one.
pub fn host(data: &[u8]) {
    let listed = own_hosts();
    if hosts::is_host(data) {
        let text = str::from_utf8(data).expect("a host is ASCII");
        assert!(!text.contains(['@', '/', '?', '#', ',', ' ', '\\']), "{text}");
        let request = request_to("/", Some(data));
        assert_eq!(hosts::check_host(&request), Ok(()));
        let name = hosts::host_of(&request).expect("it names a host");
        assert!(text.starts_with(name));
        // The HTTP library allows no escapes there.
        if !text.contains('%') {
            let authority =
                Authority::try_from(data).unwrap_or_else(|error| panic!("{text}: {error}"));
            assert_eq!(authority.host(), name, "the library finds another host");
        }
        let is_own = hosts::is_own(name, &listed);
        assert_eq!(hosts::is_answered(data, &listed), is_own);
        assert_eq!(hosts::is_own(&name.to_ascii_uppercase(), &listed), is_own);
        if !name.starts_with('[') {
            assert!(!hosts::is_own(&format!("{name}.evil.example"), &listed));
        }
    } else if HeaderValue::from_bytes(data).is_ok() {
        assert!(hosts::check_host(&request_to("/", Some(data))).is_err());
    }
    // An absolute target.
    let target = [b"http://", data, b"/"].concat();
    if let Ok(uri) = Uri::try_from(&target[..])
        && uri.authority().is_some_and(|it| it.as_str().as_bytes() == data)
    {
        let request = request_to(&uri.to_string(), Some(b"a"));
        assert_eq!(hosts::check_host(&request).is_ok(), hosts::is_host(data));
    }
}

fn request_to(target: &str, host: Option<&[u8]>) -> Request<Body> {
    let mut request = Request::builder().uri(target);
    if let Some(host) = host {
        request = request.header(HOST, host);
    }
    request.body(Body::empty()).expect("parts of a request")
}

/// A stream follows valid ids, no more than are allowed; and an event is one event, whatever its texts are.
pub fn events(data: &[u8]) {
    let Ok(text) = str::from_utf8(data) else { return };
    if let Ok(uri) = format!("/events?{text}").parse::<Uri>()
        && let Ok(Query(parameters)) = Query::<EventParams>::try_from_uri(&uri)
    {
        match followed(&parameters, 5) {
            Ok(Followed::Ids(ids)) => {
                assert!((1..=5).contains(&ids.len()));
                assert!(ids.iter().all(|it| ImageId::parse(it.as_str()).is_ok()));
            }
            Ok(Followed::Prefix(prefix) | Followed::Changes(prefix)) => {
                assert!(prefix.len() <= MAX_ID_LENGTH && prefix.is_ascii());
            }
            Err(_problem) => {}
        }
    }
    let id = ImageId::parse(text).or(ImageId::parse("a")).expect("an id");
    let data = event_data(&encode(&EventContent::Absent { id: &id, corrupt: Some(text) }));
    assert_eq!((&data["concept_id"], &data["reason"]), (&id.as_str().into(), &text.into()));
    let ids = [id];
    let data = event_data(&encode(&EventContent::List { prefix: text, complete: true, ids: &ids }));
    assert_eq!((&data["prefix"], &data["concept_ids"][0]), (&text.into(), &ids[0].as_str().into()));
    let data = event_data(&encode(&EventContent::Resync { prefix: text }));
    assert_eq!(data["prefix"], text);
}

/// Reads an event as a browser does (HTML, §9.2.6), and returns the data in its JSON.
fn event_data(event: &[u8]) -> serde_json::Value {
    let text = str::from_utf8(event).expect("events are UTF-8");
    let lines: Vec<&str> = text.split(['\r', '\n']).collect();
    let [name, id, data, "", ""] = lines[..] else { panic!("not one event: {text:?}") };
    let name = name.strip_prefix("event: ").expect("a name");
    assert!(id.starts_with("id: "));
    let json = data.strip_prefix("data: ").expect("data");
    let mut message: serde_json::Value = serde_json::from_str(json).expect("JSON");
    assert_eq!(message["type"], name);
    message["data"].take()
}
