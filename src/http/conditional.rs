//! Parses preconditions and ranges out of header fields (RFC 9110 §13 and §14).

use std::time::SystemTime;

use axum::http::header::{
    IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, RANGE,
};
use axum::http::{HeaderMap, HeaderName};

use crate::image::Metadata;
use crate::image::preconditions::{EntityTag, EntityTags, Preconditions};

/// The preconditions of a GET or HEAD.
pub(crate) fn preconditions(headers: &HeaderMap) -> Preconditions {
    Preconditions {
        if_match: entity_tags(headers, &IF_MATCH),
        if_none_match: entity_tags(headers, &IF_NONE_MATCH),
        if_modified_since: date(headers, &IF_MODIFIED_SINCE),
        if_unmodified_since: date(headers, &IF_UNMODIFIED_SINCE),
    }
}

/// Parses `*`, or entity-tags in one or several field lines. Anything else is skipped together with the rest of its
/// line. So a malformed `If-None-Match` gets the image, and a malformed `If-Match` gets 412: neither counts as a match.
fn entity_tags(headers: &HeaderMap, name: &HeaderName) -> Option<EntityTags> {
    let mut lines = headers.get_all(name).iter();
    let first = lines.next()?.as_bytes().trim_ascii();
    if first == b"*" && lines.next().is_none() {
        return Some(EntityTags::Any);
    }
    let mut tags = Vec::new();
    for line in headers.get_all(name) {
        parse_line(line.as_bytes(), &mut tags);
    }
    Some(EntityTags::List(tags))
}

/// Parses `#entity-tag` (§5.6.1 and §8.8.3). A tag may have commas inside its quotes, so the line can't be split at
/// commas. Empty elements are allowed.
fn parse_line(mut rest: &[u8], tags: &mut Vec<EntityTag>) {
    loop {
        while let [b',' | b' ' | b'\t', tail @ ..] = rest {
            rest = tail;
        }
        let Some((tag, tail)) = entity_tag(rest) else {
            return;
        };
        tags.extend(tag);
        rest = tail;
        if !matches!(rest.trim_ascii_start(), [] | [b',', ..]) {
            return;
        }
    }
}

/// Splits a text after the entity-tag that it begins with. A tag that isn't UTF-8 can't be one of ours and is `None`.
fn entity_tag(text: &[u8]) -> Option<(Option<EntityTag>, &[u8])> {
    let (weak, quoted) = match text.strip_prefix(b"W/") {
        Some(quoted) => (true, quoted),
        None => (false, text),
    };
    let inside = quoted.strip_prefix(b"\"")?;
    let length = inside.iter().position(|byte| *byte == b'"')?;
    let opaque = std::str::from_utf8(&quoted[..length + 2]).ok();
    Some((opaque.map(|opaque| EntityTag { weak, opaque: opaque.into() }), &inside[length + 1..]))
}

/// Parses a date in any of the three formats of §5.6.7. A malformed date, or several, must be ignored (§13.1.3 and
/// §13.1.4).
fn date(headers: &HeaderMap, name: &HeaderName) -> Option<SystemTime> {
    httpdate::parse_http_date(single(headers, name)?).ok()
}

fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut lines = headers.get_all(name).iter();
    match (lines.next(), lines.next()) {
        (Some(only), None) => only.to_str().ok().map(str::trim_ascii),
        _ => None,
    }
}

/// The part of a representation that is to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// All of it.
    Whole,
    /// From the first byte to the last one, both counted from 0 and both included.
    Bytes { first: usize, last: usize },
    /// Nothing: no requested byte exists. 416.
    Unsatisfiable,
}

/// The part that a GET asks for (§14.2). A range is ignored if it is malformed, in another unit, or wanted of another
/// representation only. Several ranges are answered with the whole, which §14.2 allows.
pub(crate) fn part(headers: &HeaderMap, metadata: &Metadata) -> Part {
    if !headers.contains_key(RANGE) || !is_still_wanted(headers, metadata) {
        return Part::Whole;
    }
    single(headers, &RANGE).map_or(Part::Whole, |range| resolve(range, metadata.length))
}

/// Evaluates `If-Range` (§13.1.5) by strong comparison. A date gets the whole: two records may have the same
/// `created_at`, so it never proves that the bytes are the same (§8.8.2.2).
fn is_still_wanted(headers: &HeaderMap, metadata: &Metadata) -> bool {
    if !headers.contains_key(IF_RANGE) {
        return true;
    }
    let validator = single(headers, &IF_RANGE).and_then(|text| entity_tag(text.as_bytes()));
    matches!(validator, Some((Some(tag), [])) if tag.is(&metadata.etag))
}

fn resolve(range: &str, length: usize) -> Part {
    let Some((unit, set)) = range.split_once('=') else {
        return Part::Whole;
    };
    if !unit.eq_ignore_ascii_case("bytes") {
        return Part::Whole;
    }
    let mut parts = set.split(',').map(str::trim_ascii).filter(|spec| !spec.is_empty());
    let Some(first) = parts.next() else {
        return Part::Whole;
    };
    let Some(mut part) = resolve_one(first, length) else {
        return Part::Whole;
    };
    for spec in parts {
        match resolve_one(spec, length) {
            Some(Part::Unsatisfiable) if part == Part::Unsatisfiable => {}
            Some(_) => part = Part::Whole,
            None => return Part::Whole,
        }
    }
    part
}

/// Resolves one `range-spec` of bytes (§14.1.2). `None` if it is malformed.
fn resolve_one(spec: &str, length: usize) -> Option<Part> {
    let (first, last) = spec.split_once('-')?;
    let number = |digits: &str| match digits {
        "" => None,
        _ if !digits.bytes().all(|byte| byte.is_ascii_digit()) => None,
        // A number that is too large to parse is behind the end of everything.
        _ => Some(digits.parse::<usize>().unwrap_or(usize::MAX)),
    };
    let (first, last) = match (first, last) {
        ("", suffix) => match number(suffix)? {
            0 => return Some(Part::Unsatisfiable),
            suffix => (length.saturating_sub(suffix), usize::MAX),
        },
        (first, "") => (number(first)?, usize::MAX),
        (first, last) => (number(first)?, number(last)?),
    };
    if last < first {
        return None;
    }
    if first >= length {
        return Some(Part::Unsatisfiable);
    }
    Some(Part::Bytes { first, last: last.min(length - 1) })
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn parsed(lines: &[&'static str]) -> Option<EntityTags> {
        let mut headers = HeaderMap::new();
        for line in lines {
            headers.append(IF_NONE_MATCH, HeaderValue::from_static(line));
        }
        entity_tags(&headers, &IF_NONE_MATCH)
    }

    #[expect(clippy::unnecessary_wraps, reason = "it is compared with an `Option`")]
    fn list(tags: &[&str]) -> Option<EntityTags> {
        let tag = |tag: &&str| EntityTag {
            weak: tag.starts_with("W/"),
            opaque: tag.trim_start_matches("W/").into(),
        };
        Some(EntityTags::List(tags.iter().map(tag).collect()))
    }

    #[test]
    fn a_list_is_read_with_its_weak_tags_commas_and_empty_elements() {
        assert_eq!(parsed(&[]), None);
        assert_eq!(parsed(&["\"a\""]), list(&["\"a\""]));
        assert_eq!(parsed(&["W/\"a\", \"b,c\" ,, \"\""]), list(&["W/\"a\"", "\"b,c\"", "\"\""]));
        assert_eq!(parsed(&["\"a\"", "\"b\""]), list(&["\"a\"", "\"b\""]));
        assert_eq!(parsed(&[" * "]), Some(EntityTags::Any));
    }

    #[test]
    fn a_malformed_tag_matches_nothing() {
        assert_eq!(parsed(&[""]), list(&[]));
        assert_eq!(parsed(&["a"]), list(&[]));
        assert_eq!(parsed(&["\"a"]), list(&[]));
        assert_eq!(parsed(&["w/\"a\""]), list(&[]));
        assert_eq!(parsed(&["\"a\"b, \"c\""]), list(&["\"a\""]));
        assert_eq!(parsed(&["*, \"a\""]), list(&[]));
        assert_eq!(parsed(&["*", "\"a\""]), list(&["\"a\""]));
    }

    #[test]
    fn a_range_is_resolved_against_the_length() {
        let bytes = |first, last| Part::Bytes { first, last };
        for (range, part) in [
            ("bytes=0-0", bytes(0, 0)),
            ("bytes=0-99", bytes(0, 99)),
            ("bytes=0-100", bytes(0, 99)),
            ("BYTES=5-", bytes(5, 99)),
            ("bytes=-1", bytes(99, 99)),
            ("bytes=-100", bytes(0, 99)),
            ("bytes=-1000", bytes(0, 99)),
            ("bytes= 1-2 ,", bytes(1, 2)),
            ("bytes=99-99999999999999999999999", bytes(99, 99)),
            ("bytes=-99999999999999999999999", bytes(0, 99)),
            ("bytes=100-", Part::Unsatisfiable),
            ("bytes=99999999999999999999999-", Part::Unsatisfiable),
            ("bytes=-0", Part::Unsatisfiable),
            ("bytes=100-,200-300", Part::Unsatisfiable),
            ("bytes=0-1,2-3", Part::Whole),
            ("bytes=0-1,200-", Part::Whole),
            ("bytes=200-,0-1", Part::Whole),
            ("bytes=2-1", Part::Whole),
            ("bytes=100-,2-1", Part::Whole),
            ("bytes=", Part::Whole),
            ("bytes=-", Part::Whole),
            ("bytes=+1-2", Part::Whole),
            ("bytes=1 - 2", Part::Whole),
            ("bytes=a-b", Part::Whole),
            ("bytes", Part::Whole),
            ("bytes =0-1", Part::Whole),
            ("items=0-1", Part::Whole),
        ] {
            assert_eq!(resolve(range, 100), part, "{range}");
        }
    }
}
