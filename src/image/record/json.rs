//! Reads JSON as writers make it: with a byte order mark, and with Python's `NaN`, `Infinity` and `-Infinity`.

use std::ops::Range;

/// The byte order mark of UTF-8, which a reader may skip (RFC 8259 §8.1).
const MARK: &[u8] = b"\xef\xbb\xbf";

/// The text after its byte order mark.
pub(super) fn without_mark(value: &[u8]) -> &[u8] {
    value.strip_prefix(MARK).unwrap_or(value)
}

/// A copy of a value, without its byte order mark, that has `null` for each number that JSON lacks. `None` if there is
/// none.
pub(super) fn with_nulls(value: &[u8]) -> Option<Vec<u8>> {
    let text = without_mark(value);
    let mut numbers = foreign_numbers(text).peekable();
    numbers.peek()?;
    let mut copy = Vec::with_capacity(text.len() + NULL.len());
    let mut copied = 0;
    for number in numbers {
        copy.extend_from_slice(&text[copied..number.start]);
        copy.extend_from_slice(NULL);
        copied = number.end;
    }
    copy.extend_from_slice(&text[copied..]);
    Some(copy)
}

/// The column in a value that a column in the text of [`with_nulls`] stands for. Lines and columns count from 1, columns
/// in bytes.
pub(super) fn column(value: &[u8], line: usize, column: usize) -> usize {
    let text = without_mark(value);
    let lines = text.split_inclusive(|byte| *byte == b'\n');
    let start: usize = lines.take(line.saturating_sub(1)).map(<[u8]>::len).sum();
    let mut at = start + column;
    for number in foreign_numbers(text).skip_while(|number| number.start < start) {
        if number.start + NULL.len() > at {
            break;
        }
        at = at - NULL.len() + number.len();
    }
    let mark = if line <= 1 { value.len() - text.len() } else { 0 };
    at - start + mark
}

/// The members of an object, name and value as they are written. The value must have been parsed before.
pub(super) fn members(value: &[u8]) -> impl Iterator<Item = (&[u8], &[u8])> {
    let text = without_mark(value);
    let (mut depth, mut start, mut name) = (0_usize, 0, None);
    lexemes(text).filter_map(move |lexeme| {
        let before = text[start..lexeme.start].trim_ascii();
        let part = &text[lexeme.clone()];
        let ends_member = depth == 1 && matches!(part, b"," | b"}");
        let member = if ends_member { name.take().map(|name| (name, before)) } else { None };
        if depth == 1 && part == b":" {
            name = Some(before);
        }
        match part {
            b"{" | b"[" => depth += 1,
            b"}" | b"]" => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth == 1 && matches!(part, b"{" | b":" | b",") {
            start = lexeme.end;
        }
        member
    })
}

const NULL: &[u8] = b"null";

/// Places of the numbers that Python writes, and other libraries if they are told to, but JSON lacks (RFC 8259 §6).
fn foreign_numbers(text: &[u8]) -> impl Iterator<Item = Range<usize>> {
    lexemes(text).filter(|it| matches!(&text[it.clone()], b"NaN" | b"Infinity" | b"-Infinity"))
}

/// Places of the lexemes of JSON text: strings with their quotes, single bytes of punctuation and white space, and the
/// runs between these, which are numbers and literals.
fn lexemes(text: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let separates = |byte: &u8| b"{}[]:,\" \t\r\n".contains(byte);
    let mut start = 0;
    std::iter::from_fn(move || {
        let (first, rest) = text.get(start..)?.split_first()?;
        let length = match first {
            b'"' => length_of_string(rest),
            first if separates(first) => 0,
            _ => rest.iter().position(separates).unwrap_or(rest.len()),
        };
        let lexeme = start..start + 1 + length;
        start = lexeme.end;
        Some(lexeme)
    })
}

/// The length of a string after its opening quote, with the closing one.
fn length_of_string(text: &[u8]) -> usize {
    let mut escaped = false;
    let closes = |byte: &u8| {
        let closes = *byte == b'"' && !escaped;
        escaped = *byte == b'\\' && !escaped;
        closes
    };
    text.iter().position(closes).map_or(text.len(), |at| at + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_json_lacks_become_null_outside_of_strings() {
        for (value, copy) in [
            (r#"{"a":NaN}"#, Some(r#"{"a":null}"#)),
            ("\u{feff}[Infinity,-Infinity\n, NaN ]", Some("[null,null\n, null ]")),
            (r#"{"NaN \"":"NaN, \\", "b":NaN}"#, Some(r#"{"NaN \"":"NaN, \\", "b":null}"#)),
            ("NaN", Some("null")),
            (r#"{"a":"NaN"}"#, None),
            ("[nan, NAN, +Infinity, --Infinity, NaN1, NaN.0]", None),
            ("", None),
            ("\"NaN", None),
            ("\"NaN\\", None),
        ] {
            let got = with_nulls(value.as_bytes());
            assert_eq!(got.as_deref(), copy.map(str::as_bytes), "{value}");
        }
    }

    #[test]
    fn a_column_is_that_of_the_value() {
        for (value, line, at) in [
            ("[NaN, x", 1, 7),
            ("[Infinity, NaN, -Infinity, x, NaN]", 1, 28),
            ("[NaN,\nNaN, Infinity x", 2, 15),
            ("\u{feff}[NaN x", 1, 9),
            ("\u{feff}[NaN,\n x", 2, 2),
        ] {
            let copy = with_nulls(value.as_bytes()).unwrap();
            let error = serde_json::from_slice::<serde_json::Value>(&copy).unwrap_err();
            assert_eq!(error.line(), line, "{value}");
            assert_eq!(column(value.as_bytes(), line, error.column()), at, "{value}");
        }
        assert_eq!(column(b"\xef\xbb\xbfx", 1, 1), 4);
        assert_eq!(column(b"", 1, 0), 0);
        assert_eq!(column(b"", 7, 3), 3);
    }

    #[test]
    fn members_are_split_as_they_are_written() {
        let value =
            "\u{feff} { \"a\" : [1, {\"b\":2}] ,\n\"\\ud83d,:}\":\"}\\\"\" , \"c\":NaN,\"c\":{}} ";
        let members: Vec<_> = members(value.as_bytes())
            .map(|(name, value)| [name, value].map(|it| std::str::from_utf8(it).unwrap()))
            .collect();
        let expected = [
            ["\"a\"", "[1, {\"b\":2}]"],
            ["\"\\ud83d,:}\"", "\"}\\\"\""],
            ["\"c\"", "NaN"],
            ["\"c\"", "{}"],
        ];
        assert_eq!(members, expected);
        for value in ["", "{}", " { } ", "[]", "}", "\"", "{\"a\"", "7"] {
            assert_eq!(super::members(value.as_bytes()).count(), 0, "{value}");
        }
    }
}
