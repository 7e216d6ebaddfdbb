//! What was said of an image in memory, to be said again: its head as text, but for what differs each time. HTTP/1.1
//! sends the text itself, HTTP/2 the fields of it.

use std::io::Write as _;
use std::sync::OnceLock;

use axum::http::header::{CONTENT_LENGTH, DATE, HeaderName};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use bytes::Bytes;

use crate::http::REQUEST_ID;
use crate::image::{Metadata, RepresentationKind, Said};

/// Where it is kept what was said of an image.
pub(crate) fn slot(
    metadata: &Metadata,
    status: StatusCode,
    versioned: bool,
) -> Option<&OnceLock<Bytes>> {
    // A coded form depends on what is accepted.
    if metadata.kind != RepresentationKind::Original || !metadata.coded.is_empty() {
        return None;
    }
    let Said { whole, not_modified } = &metadata.said;
    match status {
        StatusCode::OK => Some(&whole[usize::from(versioned)]),
        StatusCode::NOT_MODIFIED => Some(&not_modified[usize::from(versioned)]),
        _ => None,
    }
}

/// What an address names as the version of an image, if it names one.
pub(crate) type Named = Option<[u8; 32]>;

/// Keeps what is said now, if it is to be said again. Of a version that isn't the image's something else is said.
pub(crate) fn keep(
    metadata: &Metadata,
    status: StatusCode,
    named: Named,
    text: impl FnOnce() -> Vec<u8>,
) {
    let is_its = |named: &[u8]| str::from_utf8(named).is_ok_and(|it| metadata.version.is_named(it));
    if named.is_some_and(|named| !is_its(&named)) {
        return;
    }
    if let Some(slot) = slot(metadata, status, named.is_some()) {
        slot.get_or_init(|| Bytes::from(text().into_boxed_slice()));
    }
}

/// A head without what differs each time, and without the empty line.
pub(crate) fn text(status: StatusCode, headers: &HeaderMap, length: Option<u64>) -> Vec<u8> {
    let mut text = Vec::with_capacity(1024);
    let reason = status.canonical_reason().unwrap_or_default();
    let _ = write!(text, "HTTP/1.1 {} {reason}\r\n", status.as_u16());
    for (name, value) in headers {
        if name != REQUEST_ID && name != DATE {
            field(&mut text, name, value.as_bytes());
        }
    }
    if let Some(length) = length
        && !headers.contains_key(CONTENT_LENGTH)
    {
        field(&mut text, &CONTENT_LENGTH, HeaderValue::from(length).as_bytes());
    }
    text
}

/// The fields of such a text. Their values are parts of it.
pub(crate) fn fields(text: &Bytes) -> Option<HeaderMap> {
    let mut headers = HeaderMap::with_capacity(20);
    let mut rest = text.slice(line_end(text)? + 2..);
    while let Some(end) = line_end(&rest) {
        let colon = rest.iter().position(|&byte| byte == b':')?;
        let name = HeaderName::from_bytes(rest.get(..colon)?).ok()?;
        // `field` has written a space behind the colon.
        let value = HeaderValue::from_maybe_shared(rest.slice(colon + 2..end)).ok()?;
        headers.append(name, value);
        rest = rest.slice(end + 2..);
    }
    Some(headers)
}

fn line_end(text: &[u8]) -> Option<usize> {
    text.iter().position(|&byte| byte == b'\r')
}

/// Writes a field.
pub(crate) fn field(head: &mut Vec<u8>, name: &HeaderName, value: &[u8]) {
    head.extend_from_slice(name.as_str().as_bytes());
    head.extend_from_slice(b": ");
    head.extend_from_slice(value);
    head.extend_from_slice(b"\r\n");
}
