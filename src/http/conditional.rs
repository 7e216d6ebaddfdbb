//! Preconditions as they stand in header fields (RFC 9110 §13).

use axum::http::header::IF_NONE_MATCH;
use axum::http::{HeaderMap, HeaderName};

use crate::image::EntityTags;

/// `If-None-Match`: `*`, or entity-tags in one or several field lines. What isn't an entity-tag is
/// passed over, and with it the rest of its line: a client that has nothing gets the image.
pub(crate) fn if_none_match(headers: &HeaderMap) -> Option<EntityTags> {
    entity_tags(headers, &IF_NONE_MATCH)
}

fn entity_tags(headers: &HeaderMap, name: &HeaderName) -> Option<EntityTags> {
    let mut lines = headers.get_all(name).iter().peekable();
    lines.peek()?;
    let mut tags = Vec::new();
    for line in lines {
        let line = line.as_bytes().trim_ascii();
        if line == b"*" {
            return Some(EntityTags::Any);
        }
        parse_line(line, &mut tags);
    }
    Some(EntityTags::List(tags))
}

/// `#entity-tag` (RFC 9110 §5.6.1 and §8.8.3): a tag may have commas inside its quotes, so the line
/// can't be split at them; empty elements are allowed.
fn parse_line(mut rest: &[u8], tags: &mut Vec<Box<str>>) {
    loop {
        while let [b',' | b' ' | b'\t', tail @ ..] = rest {
            rest = tail;
        }
        let quoted = rest.strip_prefix(b"W/").unwrap_or(rest);
        let [b'"', inside @ ..] = quoted else {
            return;
        };
        let Some(length) = inside.iter().position(|byte| *byte == b'"') else {
            return;
        };
        // A tag with bytes outside ASCII can't be one of ours.
        if let Ok(tag) = std::str::from_utf8(&quoted[..length + 2]) {
            tags.push(tag.into());
        }
        rest = &inside[length + 1..];
        if !matches!(rest.trim_ascii_start(), [] | [b',', ..]) {
            return;
        }
    }
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
        if_none_match(&headers)
    }

    #[expect(clippy::unnecessary_wraps, reason = "it stands beside what may be none")]
    fn list(tags: &[&str]) -> Option<EntityTags> {
        Some(EntityTags::List(tags.iter().map(|tag| (*tag).into()).collect()))
    }

    #[test]
    fn a_list_is_read_with_its_weak_tags_commas_and_empty_elements() {
        assert_eq!(parsed(&[]), None);
        assert_eq!(parsed(&["\"a\""]), list(&["\"a\""]));
        assert_eq!(parsed(&["W/\"a\", \"b,c\" ,, \"\""]), list(&["\"a\"", "\"b,c\"", "\"\""]));
        assert_eq!(parsed(&["\"a\"", "\"b\""]), list(&["\"a\"", "\"b\""]));
        assert_eq!(parsed(&[" * "]), Some(EntityTags::Any));
    }

    #[test]
    fn what_is_no_tag_matches_nothing() {
        assert_eq!(parsed(&[""]), list(&[]));
        assert_eq!(parsed(&["a"]), list(&[]));
        assert_eq!(parsed(&["\"a"]), list(&[]));
        assert_eq!(parsed(&["w/\"a\""]), list(&[]));
        assert_eq!(parsed(&["\"a\"b, \"c\""]), list(&["\"a\""]));
        assert_eq!(parsed(&["*, \"a\""]), list(&[]));
    }
}
