//! The record: the JSON value in the store that has an image in base64, or refers to an offloaded one.

mod json;

use std::borrow::Cow;
use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64_turbo::{Engine, STANDARD, STANDARD_PAD_INDIFFERENT, URL_SAFE_PAD_INDIFFERENT};
use percent_encoding::percent_decode;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;
use time::format_description::well_known::{Iso8601, Rfc3339};
use time::{OffsetDateTime, PrimitiveDateTime};

use crate::image::buffer::Buffer;
use crate::image::{MAX_HTTP_DATE, MediaType, Traits, hex};
use crate::picture::sniff::sniff;
use crate::picture::strip::traits;

/// The reason for which a value is no record of an image. The text may be shown to clients: no part of the value is in
/// it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Corrupt {
    /// Not JSON, or not UTF-8.
    #[error("the value isn't JSON (line {line}, column {column})")]
    NotJson {
        /// Counted from 1.
        line: usize,
        /// Counted from 1.
        column: usize,
    },
    /// JSON, but no object, or one whose `base64_data` or `url` is no string.
    #[error("the value isn't a record: {0}")]
    NotARecord(&'static str),
    /// An object with neither field.
    #[error("the record has neither base64_data nor url")]
    NoImage,
    /// A character, a length or a padding that base64 doesn't allow.
    #[error("base64_data isn't base64")]
    NotBase64,
    /// A `data:` URL without a comma.
    #[error("base64_data is a data URL without a comma, which must stand before the data")]
    NotADataUrl,
    /// Base64 of no bytes.
    #[error("the image is empty")]
    Empty,
    /// Bytes of no known image type.
    #[error("the bytes are no image of a known type")]
    NotAnImage,
    /// The key holds a list, a hash or another type.
    #[error("the key doesn't hold a string")]
    WrongType,
    /// A `url` that isn't beneath one of the two addresses in the settings.
    #[error("the record's url must be beneath [offload] url or public_url")]
    ForeignUrl,
    /// The value is larger than may be read.
    #[error("the value has {size} bytes, the limit is {limit} ([records] max_value)")]
    TooLarge {
        /// In bytes.
        size: u64,
        /// In bytes.
        limit: usize,
    },
}

/// A parsed value, from which it borrows.
#[derive(Debug)]
pub struct Record<'a> {
    /// The image, or a reference to it.
    pub content: Content<'a>,
    /// The type that the writer declared. Advisory.
    pub declared_type: Option<Cow<'a, str>>,
    /// The time at which the image was made according to the writer, in whole seconds. `None` if it can't be parsed.
    pub created_at: Option<SystemTime>,
}

/// The image of a record, or a reference to it.
#[derive(Debug)]
pub enum Content<'a> {
    /// The image in base64.
    Inline(Cow<'a, str>),
    /// A reference to an offloaded image.
    Offloaded(ObjectRef<'a>),
}

/// A reference to an offloaded image.
#[derive(Debug)]
pub struct ObjectRef<'a> {
    /// The address of the image.
    pub url: Cow<'a, str>,
    /// The name of its object, if the record has it.
    pub object: Option<Cow<'a, str>>,
    /// The SHA-256 of its bytes, if the record has it.
    pub sha256: Option<[u8; 32]>,
    /// The number of its bytes, if the record has it.
    pub size: Option<usize>,
}

/// An image decoded from a record.
#[derive(Debug)]
pub struct Decoded {
    /// The image, byte for byte.
    pub bytes: Buffer,
    /// Its type.
    pub media_type: MediaType,
    /// Its traits.
    pub traits: Traits,
}

/// The fields as they stand in JSON. Names and advisory values stay raw, so that none, however odd, makes the record
/// corrupt: JavaScript and Python write half a surrogate pair where they cut a string. Of a duplicate field the last value
/// counts, as in Python.
#[derive(Default)]
struct Fields<'a> {
    base64_data: Option<Cow<'a, str>>,
    url: Option<&'a RawValue>,
    mime_type: Option<&'a RawValue>,
    content_type: Option<&'a RawValue>,
    created_at: Option<&'a RawValue>,
    object: Option<&'a RawValue>,
    sha256: Option<&'a RawValue>,
    size_bytes: Option<&'a RawValue>,
}

/// A string, borrowed unless it has escapes: JavaScript writers may escape `/`.
#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Deserialize<'de> for Fields<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldsVisitor;

        impl<'de> Visitor<'de> for FieldsVisitor {
            type Value = Fields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
                let mut fields = Fields::default();
                let text = |value: Option<Text<'de>>| value.map(|text| text.0);
                while let Some(name) = map.next_key::<&RawValue>()? {
                    match advisory_text(name).as_deref().unwrap_or_default() {
                        "base64_data" => fields.base64_data = text(map.next_value()?),
                        "url" => fields.url = map.next_value()?,
                        "mime_type" => fields.mime_type = Some(map.next_value()?),
                        "content_type" => fields.content_type = Some(map.next_value()?),
                        "created_at" => fields.created_at = Some(map.next_value()?),
                        "object" => fields.object = Some(map.next_value()?),
                        "sha256" => fields.sha256 = Some(map.next_value()?),
                        "size_bytes" => fields.size_bytes = Some(map.next_value()?),
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                Ok(fields)
            }
        }

        deserializer.deserialize_map(FieldsVisitor)
    }
}

fn advisory_text(raw: &RawValue) -> Option<Cow<'_, str>> {
    serde_json::from_str::<Text<'_>>(raw.get()).ok().map(|text| text.0)
}

/// Parses a date and time, or seconds since 1970. A time in the future is ignored: `Last-Modified` must not be later than the
/// answer (RFC 9110 §8.8.2.1).
fn advisory_time(raw: &RawValue) -> Option<SystemTime> {
    let seconds = if let Some(text) = advisory_text(raw) {
        u64::try_from(date_time(&text)?.unix_timestamp()).ok()?
    } else {
        let seconds: f64 = serde_json::from_str(raw.get()).ok()?;
        Duration::try_from_secs_f64(seconds).ok()?.as_secs()
    };
    let since_epoch = Duration::from_secs(seconds);
    let time = (since_epoch <= MAX_HTTP_DATE).then(|| UNIX_EPOCH + since_epoch)?;
    (time <= SystemTime::now()).then_some(time)
}

/// Parses RFC 3339 with any character for `T`, and ISO 8601: Jackson writes offsets without a colon, Java leaves out
/// seconds that are zero. A time without an offset is UTC.
fn date_time(text: &str) -> Option<OffsetDateTime> {
    if let Ok(time) = OffsetDateTime::parse(text, &Rfc3339) {
        return Some(time);
    }
    let text = text.replacen(' ', "T", 1);
    OffsetDateTime::parse(&text, &Iso8601::PARSING).ok().or_else(|| {
        PrimitiveDateTime::parse(&text, &Iso8601::PARSING).ok().map(PrimitiveDateTime::assume_utc)
    })
}

impl<'a> Record<'a> {
    /// Parses a value. If it has both fields, `base64_data` counts unless it is empty.
    pub fn parse(value: &'a [u8]) -> Result<Record<'a>, Corrupt> {
        match serde_json::from_slice(json::without_mark(value)) {
            Ok(fields) => Record::of(fields),
            Err(error) => match json::with_nulls(value) {
                Some(copy) => match serde_json::from_slice(&copy) {
                    Ok(fields) => Record::of(fields).map(Record::into_owned),
                    Err(error) => Err(not_a_record(&error, value)),
                },
                None => Err(not_a_record(&error, value)),
            },
        }
    }

    fn of(fields: Fields<'a>) -> Result<Record<'a>, Corrupt> {
        let sha256 = fields.sha256.and_then(advisory_text).and_then(|text| from_hex(&text));
        let object = fields.object.and_then(advisory_text);
        let size = fields.size_bytes.and_then(|raw| serde_json::from_str(raw.get()).ok());
        let content = match (fields.base64_data, fields.url) {
            (None, Some(url)) => {
                let url = advisory_text(url).ok_or(Corrupt::NotARecord(NO_STRING))?;
                Content::Offloaded(ObjectRef { url, object, sha256, size })
            }
            // Some backends empty the field when they move the image.
            (Some(base64), Some(url)) if base64.is_empty() => match advisory_text(url) {
                Some(url) => Content::Offloaded(ObjectRef { url, object, sha256, size }),
                None => Content::Inline(base64),
            },
            (Some(base64), _) => Content::Inline(base64),
            (None, None) => return Err(Corrupt::NoImage),
        };
        let declared_type = fields.mime_type.or(fields.content_type);
        Ok(Record {
            content,
            declared_type: declared_type.and_then(advisory_text),
            created_at: fields.created_at.and_then(advisory_time),
        })
    }

    fn into_owned(self) -> Record<'static> {
        let owned = |text: Cow<'_, str>| Cow::Owned(text.into_owned());
        Record {
            content: match self.content {
                Content::Inline(base64) => Content::Inline(owned(base64)),
                Content::Offloaded(ObjectRef { url, object, sha256, size }) => {
                    let (url, object) = (owned(url), object.map(owned));
                    Content::Offloaded(ObjectRef { url, object, sha256, size })
                }
            },
            declared_type: self.declared_type.map(owned),
            created_at: self.created_at,
        }
    }
}

/// The text of [`Corrupt::NotARecord`].
const NO_STRING: &str = "expected an object whose base64_data or url is a string";

/// The reason for which a value wasn't parsed, even with `null` for what JSON lacks.
fn not_a_record(error: &serde_json::Error, value: &[u8]) -> Corrupt {
    if error.is_data() {
        Corrupt::NotARecord(NO_STRING)
    } else {
        let (line, column) = (error.line(), error.column());
        Corrupt::NotJson { line, column: json::column(value, line, column) }
    }
}

/// Decodes `base64_data`: standard or URL-safe alphabet, padded or not, with white space anywhere, or a data URL.
pub fn decode(text: &str) -> Result<Decoded, Corrupt> {
    let bytes = decode_bytes(text)?;
    let media_type = sniffed(&bytes)?;
    let traits = traits(&bytes, media_type);
    Ok(Decoded { bytes, media_type, traits })
}

/// Decodes `base64_data` of any content.
pub(crate) fn decode_bytes(text: &str) -> Result<Buffer, Corrupt> {
    // Nearly every writer stores this, and it decodes ten times as fast as the general case.
    decoded(STANDARD, text.as_bytes()).or_else(|_why| decode_leniently(text))
}

/// The type of an image, told from its bytes.
pub fn sniffed(bytes: &[u8]) -> Result<MediaType, Corrupt> {
    if bytes.is_empty() {
        return Err(Corrupt::Empty);
    }
    sniff(bytes).ok_or(Corrupt::NotAnImage)
}

fn decoded(engine: Engine, text: &[u8]) -> Result<Buffer, base64_turbo::Error> {
    let mut bytes = Buffer::zeroed(engine.decoded_len_estimate(text.len()));
    let length = engine.decode_slice(text, &mut bytes)?;
    bytes.truncate(length);
    Ok(bytes)
}

fn decode_leniently(text: &str) -> Result<Buffer, Corrupt> {
    let text = text.trim_matches(is_c0_or_space);
    let is_url = text.get(..5).is_some_and(|start| start.eq_ignore_ascii_case("data:"));
    if is_url { decode_data_url(&text[5..]) } else { decode_base64(text.as_bytes()) }
}

/// A C0 control or space, as the URL standard calls it.
const fn is_c0_or_space(character: char) -> bool {
    character <= ' '
}

/// Decodes a data URL, given without its scheme, as a browser fetches it (WHATWG Fetch, "data: URL processor"). Its
/// media type is ignored. Tabs and line ends stay, as in Chromium: the URL standard removes them, and with them the
/// space between attributes.
fn decode_data_url(url: &str) -> Result<Buffer, Corrupt> {
    // The fragment isn't fetched.
    let url = url.split_once('#').map_or(url, |(url, _fragment)| url);
    let (media_type, data) = url.split_once(',').ok_or(Corrupt::NotADataUrl)?;
    let data: Cow<'_, [u8]> = percent_decode(data.as_bytes()).into();
    let encoding = media_type.rsplit_once(';').map(|(_, encoding)| encoding.trim());
    if encoding.is_some_and(|encoding| encoding.eq_ignore_ascii_case("base64")) {
        return decode_base64(&data);
    }
    let mut bytes = Buffer::zeroed(data.len());
    bytes.copy_from_slice(&data);
    Ok(bytes)
}

fn decode_base64(text: &[u8]) -> Result<Buffer, Corrupt> {
    let mut compact = Vec::with_capacity(text.len());
    compact.extend(text.iter().filter(|byte| !byte.is_ascii_whitespace()));
    let engine = if compact.iter().any(|byte| matches!(byte, b'-' | b'_')) {
        URL_SAFE_PAD_INDIFFERENT
    } else {
        STANDARD_PAD_INDIFFERENT
    };
    decoded(engine, &compact).map_err(|_why| Corrupt::NotBase64)
}

/// The record of an image after it was offloaded: the other fields stay as they were.
#[must_use]
pub fn moved(
    value: &[u8],
    url: &str,
    object: &str,
    media_type: MediaType,
    length: usize,
    sha256: &[u8; 32],
) -> Vec<u8> {
    const REPLACED: [&str; 7] =
        ["base64_data", "mime_type", "content_type", "url", "object", "size_bytes", "sha256"];
    let own = [
        ("url", url.into()),
        ("object", object.into()),
        ("mime_type", media_type.as_str().into()),
        ("size_bytes", length.into()),
        ("sha256", hex(sha256).into()),
    ];
    let own = own.map(|(name, value): (&str, serde_json::Value)| format!("\"{name}\":{value}"));
    // The other fields aren't parsed: they may have `NaN` in them, or a name that no string can hold.
    let is_replaced = |name: &[u8]| {
        serde_json::from_slice::<Text<'_>>(name).is_ok_and(|Text(name)| REPLACED.contains(&&*name))
    };
    let mut json = vec![b'{'];
    for (name, value) in json::members(value).filter(|(name, _)| !is_replaced(name)) {
        for part in [name, b":", value, b","] {
            json.extend_from_slice(part);
        }
    }
    json.extend(own.join(",").as_bytes());
    json.push(b'}');
    json
}

/// Parses 64 hexadecimal digits.
fn from_hex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    let digits = text.as_bytes();
    let (pairs, []) = digits.as_chunks::<2>() else { return None };
    if pairs.len() != bytes.len() {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(pairs) {
        *byte = hex_digit(pair[0])? << 4 | hex_digit(pair[1])?;
    }
    Some(bytes)
}

fn hex_digit(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|it| u8::try_from(it).ok())
}

/// Truncates a time to whole seconds, as records and HTTP dates have them.
#[must_use]
pub fn whole_seconds(time: SystemTime) -> SystemTime {
    let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    UNIX_EPOCH + Duration::from_secs(since_epoch.as_secs())
}

/// The record that a backend would write for an image.
#[must_use]
pub fn encode(bytes: &[u8], media_type: MediaType, created_at: Option<SystemTime>) -> Vec<u8> {
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let created_at = created_at.map(|time| format!(r#""created_at":{},"#, seconds(time)));
    let mut json = Vec::with_capacity(128 + STANDARD.encoded_len(bytes.len()));
    // No character of these values, or of base64, is escaped in JSON.
    for part in [r#"{"mime_type":""#, media_type.as_str(), r#"","#] {
        json.extend_from_slice(part.as_bytes());
    }
    json.extend_from_slice(created_at.unwrap_or_default().as_bytes());
    json.extend_from_slice(br#""base64_data":""#);
    let start = json.len();
    json.resize(start + STANDARD.encoded_len(bytes.len()), 0);
    let length = STANDARD.encode_slice(bytes, &mut json[start..]).expect("there is room for all");
    json.truncate(start + length);
    json.extend_from_slice(b"\"}");
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A GIF whose base64 has `+` and `/`, and needs two `=`.
    const GIF: &[u8] = b"GIF89a\xfb\xff\xbf\xfe";
    const BASE64: &str = "R0lGODlh+/+//g==";

    fn image(value: &str) -> Result<Vec<u8>, Corrupt> {
        match Record::parse(value.as_bytes())?.content {
            Content::Inline(text) => decode(&text).map(|decoded| decoded.bytes.to_vec()),
            Content::Offloaded(object) => panic!("offloaded to {}", object.url),
        }
    }

    #[test]
    fn every_variety_of_base64_gives_the_same_bytes() {
        for text in [
            BASE64,
            "R0lGODlh-_-__g==",
            "R0lGODlh+/+//g",
            "R0lGODlh-_-__g",
            " R0lG\\nODlh\\r\\n\\t+/+//g== \\n",
            "R0lGODlh+\\/+\\/\\/g==",
            "data:image/gif;base64,R0lGODlh+/+//g==",
            "data:image/gif;base64,R0lGODlh-_-__g",
            "DATA:image/gif;charset=x;BASE64, R0lG\\nODlh+/+//g==",
            "data:;base64,R0lGODlh+/+//g==",
            "\\u0052\\u0030lGODlh+/+//g==",
        ] {
            let value = format!(r#"{{"base64_data":"{text}"}}"#);
            assert_eq!(image(&value).as_deref(), Ok(GIF), "{text}");
        }
    }

    #[test]
    fn a_data_url_is_what_a_browser_fetches() {
        for url in [
            "data:image/gif;base64,R0lGODlh%2B/%2b%2F%2Fg%3D%3D",
            "data:image/gif;base64,R0lGODlh%20+/+//g%3D=#fragment",
            "data:image/gif; base64 ,R0lGODlh+/+\t/\n/%0Ag==",
            "\u{1} data:image/gif;charset=utf-8;base64,R0lGODlh+/+//g \r\n",
            "data:image/gif,GIF89a%fb%FF%Bf%fE",
            "data:,G%49F89a%fb%FF%Bf%fE \0",
        ] {
            let value = serde_json::json!({ "base64_data": url }).to_string();
            assert_eq!(image(&value).as_deref(), Ok(GIF), "{url}");
        }
        let svg = "<svg xmlns='http://www.w3.org/2000/svg'><path fill='red'\n\td='M0 0%' id='é+?'/></svg>";
        let encoded = svg.replace('%', "%25").replace('<', "%3C").replace('é', "%C3%A9");
        for url in [
            format!("data:image/svg+xml,{encoded}"),
            format!("data:image/svg+xml,{encoded}#view"),
            format!("data:image/svg+xml;utf8,{svg}"),
            format!("data:;base64;a,{svg}"),
            format!("Data:base64,{svg}\n"),
        ] {
            let value = serde_json::json!({ "base64_data": url }).to_string();
            assert_eq!(image(&value).as_deref(), Ok(svg.as_bytes()), "{url}");
        }
        let twice = decode_data_url(",%2541%zz%4").unwrap();
        assert_eq!(&*twice, b"%41%zz%4");
    }

    #[test]
    fn unknown_and_advisory_fields_never_matter() {
        for rest in [
            "",
            r#","mime_type":"image/gif""#,
            r#","mime_type":7,"content_type":["a"],"created_at":{"a":1}"#,
            r#","mime_type":null,"url":null,"created_at":null"#,
            r#","created_at":1e999,"mime_type":"\ud800","content_type":7,"content_type":"a""#,
            r#","\ud83d":1,"a\udc00b":"\ud83d""#,
            r#","score":NaN,"nested":[{"a":-Infinity}, Infinity],"prompt":"NaN""#,
            r#","url":NaN,"created_at":NaN,"mime_type":-Infinity,"\ud83d":NaN"#,
            r#","huge":1e999999,"digits":12345678901234567890123456789.0e-400"#,
            r#","url":5"#,
            r#","url":"\ud83d""#,
            r#","url":"https://example.org/a","prompt":"\u0000","nested":{"a":[1,2,{"b":null}]}"#,
        ] {
            for mark in ["", "\u{feff}"] {
                let value = format!(r#"{mark} {{"base64_data":"{BASE64}"{rest}}} "#);
                assert_eq!(image(&value).as_deref(), Ok(GIF), "{rest}");
            }
        }
        let deep = ["[".repeat(100_000), "]".repeat(100_000)].concat();
        let value = format!(r#"{{"mime_type":{deep},"x":{deep},"base64_data":"{BASE64}"}}"#);
        assert_eq!(image(&value).as_deref(), Ok(GIF));
    }

    #[test]
    fn the_declared_type_is_mime_type_or_content_type() {
        for (fields, declared) in [
            (r#""mime_type":"a","content_type":"b""#, Some("a")),
            (r#""content_type":"b""#, Some("b")),
            (r#""x":1"#, None),
        ] {
            let value = format!(r#"{{"url":"u",{fields}}}"#);
            let record = Record::parse(value.as_bytes()).unwrap();
            assert_eq!(record.declared_type.as_deref(), declared);
            assert!(matches!(record.content, Content::Offloaded(it) if it.url == "u"));
        }
    }

    #[test]
    fn the_record_of_an_offloaded_image_keeps_its_other_fields() {
        let value = br#"{"prompt": "a \u00e9 \"b\"", "n": 1.50, "base64_data": "R0lG", "content_type": "x", "url": null, "created_at": 5, "tags": ["a"]}"#;
        let sha256 = [0xab; 32];
        let moved = super::moved(value, "s3://b/a.gif", "a.gif", MediaType::Gif, 3, &sha256);
        let expected = format!(
            r#"{{"prompt":"a \u00e9 \"b\"","n":1.50,"created_at":5,"tags":["a"],"url":"s3://b/a.gif","object":"a.gif","mime_type":"image/gif","size_bytes":3,"sha256":"{}"}}"#,
            "ab".repeat(32)
        );
        assert_eq!(String::from_utf8(moved.clone()).unwrap(), expected);
        let record = Record::parse(&moved).unwrap();
        let Content::Offloaded(object) = record.content else { panic!("{record:?}") };
        assert_eq!((&*object.url, object.sha256), ("s3://b/a.gif", Some(sha256)));
        let value = "\u{feff}{\"\\ud83d\":[NaN, -Infinity],\"base64\\u005fdata\":\"R0lG\" , \"n\" :Infinity}";
        let moved = super::moved(value.as_bytes(), "u", "o", MediaType::Gif, 3, &sha256);
        let start =
            r#"{"\ud83d":[NaN, -Infinity],"n":Infinity,"url":"u","object":"o","mime_type":"#;
        assert!(moved.starts_with(start.as_bytes()), "{}", moved.escape_ascii());
        let record = Record::parse(&moved).unwrap();
        let Content::Offloaded(object) = record.content else { panic!("{record:?}") };
        assert_eq!((&*object.url, object.size), ("u", Some(3)));
        for odd in ["5", "\"zz\"", "\"ab\"", "null"] {
            let value = format!(r#"{{"url": "u", "sha256": {odd}}}"#);
            let record = Record::parse(value.as_bytes()).unwrap();
            let Content::Offloaded(object) = record.content else { panic!("{record:?}") };
            assert_eq!(object.sha256, None, "{odd}");
        }
    }

    #[test]
    fn created_at_is_a_time_or_unix_seconds_and_anything_else_is_ignored() {
        let at = |seconds| Some(UNIX_EPOCH + Duration::from_secs(seconds));
        for (text, time) in [
            (r#""2026-01-02T03:04:05Z""#, at(1_767_323_045)),
            (r#""2026-01-02T04:04:05.75+01:00""#, at(1_767_323_045)),
            ("1767323045", at(1_767_323_045)),
            ("1767323045.9", at(1_767_323_045)),
            ("0", at(0)),
            ("-1", None),
            ("253402300800", None),
            ("1e300", None),
            (r#""1969-12-31T23:59:59Z""#, None),
            (r#""yesterday""#, None),
            (r#""2026-01-02T03:04:05""#, at(1_767_323_045)),
            (r#""2026-01-02 03:04:05""#, at(1_767_323_045)),
            (r#""2026-01-02T03:04:05.123456""#, at(1_767_323_045)),
            (r#""2026-01-02 03:04:05.1234567""#, at(1_767_323_045)),
            (r#""2026-01-02 04:04:05.123456+01:00""#, at(1_767_323_045)),
            (r#""2026-01-02T04:04:05.000+0100""#, at(1_767_323_045)),
            (r#""2026-01-02T03:04""#, at(1_767_323_040)),
            (r#""2026-01-02T03:04:05+""#, None),
            (r#""2026-01-02T03:04:05 x""#, None),
            (r#""2026-01-02T25:04:05""#, None),
            (r#""2026-13-02T03:04:05""#, None),
            (r#""2026-01-02""#, None),
            (r#""é""#, None),
            (r#""2026-01-02é03:04:05Z""#, None),
            ("NaN", None),
            ("true", None),
        ] {
            let value = format!(r#"{{"url":"u","created_at":{text}}}"#);
            assert_eq!(Record::parse(value.as_bytes()).unwrap().created_at, time, "{text}");
        }
    }

    #[test]
    fn a_corrupt_record_says_what_is_wrong() {
        let record = Corrupt::NotARecord("expected an object whose base64_data or url is a string");
        for (value, why) in [
            ("", Corrupt::NotJson { line: 1, column: 0 }),
            ("\u{89}PNG", Corrupt::NotJson { line: 1, column: 1 }),
            (r#"{"base64_data":"#, Corrupt::NotJson { line: 1, column: 15 }),
            (r#"{"base64_data":"R0lG"} x"#, Corrupt::NotJson { line: 1, column: 24 }),
            ("\u{feff}", Corrupt::NotJson { line: 1, column: 3 }),
            ("\u{feff}\u{feff}{}", Corrupt::NotJson { line: 1, column: 4 }),
            (r#"{"a":NaN,"b":-Infinity,"c":nan}"#, Corrupt::NotJson { line: 1, column: 29 }),
            ("{\"a\":NaN,\n\"b\":NaN,}", Corrupt::NotJson { line: 2, column: 9 }),
            ("{\"base64_data\":\"R0lG\"}\0", Corrupt::NotJson { line: 1, column: 23 }),
            (r#"{"base64_data":"R0lG",NaN:1}"#, Corrupt::NotJson { line: 1, column: 23 }),
            ("NaN", record.clone()),
            (r#"{"base64_data":NaN}"#, Corrupt::NoImage),
            ("[]", record.clone()),
            ("\"R0lG\"", record.clone()),
            (r#"{"base64_data":7}"#, record.clone()),
            (r#"{"url":[]}"#, record.clone()),
            (r#"{"base64_data":"R0lG","base64_data":{}}"#, record),
            ("{}", Corrupt::NoImage),
            (r#"{"base64_data":null}"#, Corrupt::NoImage),
            (r#"{"base64_data":""}"#, Corrupt::Empty),
            (r#"{"base64_data":" \n"}"#, Corrupt::Empty),
            (r#"{"base64_data":"data:image/gif;base64,"}"#, Corrupt::Empty),
            (r#"{"base64_data":"data:image/gif,"}"#, Corrupt::Empty),
            (r#"{"base64_data":"data:image/gif,abc"}"#, Corrupt::NotAnImage),
            (r#"{"base64_data":"data:image/gif;base64,R0lG%"}"#, Corrupt::NotBase64),
            (r#"{"base64_data":"data:"}"#, Corrupt::NotADataUrl),
            (r#"{"base64_data":"data:image/gif;base64#,R0lG"}"#, Corrupt::NotADataUrl),
            (r#"{"base64_data":"R0lG!"}"#, Corrupt::NotBase64),
            (r#"{"base64_data":"R0lGO"}"#, Corrupt::NotBase64),
            (r#"{"base64_data":"R0lGODlh-/+//g=="}"#, Corrupt::NotBase64),
            (r#"{"base64_data":"R0==lGOD"}"#, Corrupt::NotBase64),
            (r#"{"base64_data":"Bär="}"#, Corrupt::NotBase64),
            (r#"{"base64_data":"aGVsbG8="}"#, Corrupt::NotAnImage),
        ] {
            assert_eq!(image(value), Err(why), "{value}");
        }
        assert!(matches!(Record::parse(b"{\"url\":\"\xff\"}"), Err(Corrupt::NotJson { .. })));
        let deep = format!(r#"{{"x":{}"#, "[".repeat(100_000));
        assert!(matches!(Record::parse(deep.as_bytes()), Err(Corrupt::NotJson { .. })));
    }

    #[test]
    fn an_encoded_record_parses_to_the_same_image() {
        let now = UNIX_EPOCH + Duration::from_secs(1_767_323_045);
        let value = encode(GIF, MediaType::Gif, Some(now));
        let record = Record::parse(&value).unwrap();
        assert_eq!(record.declared_type.as_deref(), Some("image/gif"));
        assert_eq!(record.created_at, Some(now));
        assert_eq!(image(std::str::from_utf8(&value).unwrap()).as_deref(), Ok(GIF));
    }
}
