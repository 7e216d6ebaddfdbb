//! Access lines in the combined format of Apache and nginx, which log analysers read.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::http::{Method, StatusCode, Version};
use time::OffsetDateTime;

use crate::peer::Client;

/// The longest field of a request in a line, in bytes: lines wait in memory for their reader.
const LONGEST_FIELD: usize = 1024;

/// The longest method in a line, in bytes.
const LONGEST_METHOD: usize = 32;

const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// The fields of a request that no other format has.
#[derive(Debug)]
pub(crate) struct CombinedFields {
    referer: Option<Box<[u8]>>,
    user_agent: Option<Box<[u8]>>,
}

impl CombinedFields {
    pub(crate) fn new(referer: Option<&[u8]>, user_agent: Option<&[u8]>) -> CombinedFields {
        let kept = |value: &[u8]| value[..value.len().min(LONGEST_FIELD)].into();
        let [referer, user_agent] =
            [referer, user_agent].map(|it| it.filter(|value| !value.is_empty()).map(kept));
        CombinedFields { referer, user_agent }
    }
}

/// The other parts of a line.
#[derive(Debug)]
pub(crate) struct CombinedLine<'a> {
    pub(crate) client: Client,
    pub(crate) time: SystemTime,
    pub(crate) method: &'a Method,
    pub(crate) path: &'a str,
    pub(crate) version: Version,
    pub(crate) status: StatusCode,
    pub(crate) bytes: u64,
    pub(crate) fields: &'a CombinedFields,
}

impl CombinedLine<'_> {
    /// Formats the line as nginx does.
    pub(crate) fn format(&self) -> String {
        let mut line = String::with_capacity(256);
        match self.client.forwarded().or(self.client.peer().ip()) {
            Some(address) => line += &address.to_string(),
            None => line += "unix:",
        }
        line += " - - [";
        write_time(&mut line, self.time);
        line += "] \"";
        let method = self.method.as_str().as_bytes();
        escape(&mut line, &method[..method.len().min(LONGEST_METHOD)]);
        line.push(' ');
        escape(&mut line, self.path.as_bytes());
        let (version, status, bytes) = (self.version, self.status.as_u16(), self.bytes);
        let _ = write!(line, " {version:?}\" {status} {bytes}");
        for field in [&self.fields.referer, &self.fields.user_agent] {
            line += " \"";
            escape(&mut line, field.as_deref().unwrap_or(b"-"));
            line.push('"');
        }
        line
    }
}

/// Writes a time as `27/Nov/2026:20:00:00 +0000`.
fn write_time(line: &mut String, time: SystemTime) {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let seconds = i64::try_from(seconds).unwrap_or_default();
    let time = OffsetDateTime::from_unix_timestamp(seconds).unwrap_or(OffsetDateTime::UNIX_EPOCH);
    let month = MONTHS[usize::from(u8::from(time.month())) - 1];
    let (day, year, (hour, minute, second)) = (time.day(), time.year(), time.to_hms());
    let _ = write!(line, "{day:02}/{month}/{year:04}:{hour:02}:{minute:02}:{second:02} +0000");
}

/// Writes text of a client's, as nginx does: bytes that would end the field or the line, or that aren't ASCII, as `\xHH`.
fn escape(line: &mut String, text: &[u8]) {
    for &byte in text {
        match byte {
            b'"' | b'\\' | ..0x20 | 0x7f.. => {
                let _ = write!(line, "\\x{byte:02X}");
            }
            plain => line.push(char::from(plain)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::peer::Peer;

    /// 2026-11-27T20:00:00Z.
    const TIME: Duration = Duration::from_hours(498_836);

    #[test]
    fn a_line_is_one_as_of_nginx_whatever_the_client_sends() {
        let peer = Peer::Tcp("192.0.2.1:5".parse().unwrap());
        let fields =
            CombinedFields::new(Some(b"https://a.example/\"\\\r\n"), Some("é\t\x7f".as_bytes()));
        let line = CombinedLine {
            client: peer.into(),
            time: UNIX_EPOCH + TIME,
            method: &Method::GET,
            path: "/images/a?v=\"1\"",
            version: Version::HTTP_2,
            status: StatusCode::OK,
            bytes: 1234,
            fields: &fields,
        };
        assert_eq!(
            line.format(),
            r#"192.0.2.1 - - [27/Nov/2026:20:00:00 +0000] "GET /images/a?v=\x221\x22 HTTP/2.0" 200 1234 "https://a.example/\x22\x5C\x0D\x0A" "\xC3\xA9\x09\x7F""#
        );
        let proxied = Client::behind(peer, "2001:db8::7".parse().unwrap());
        let (long, method) =
            ("x".repeat(9000), Method::from_bytes("M".repeat(99).as_bytes()).unwrap());
        let fields = CombinedFields::new(None, Some(long.as_bytes()));
        let line = CombinedLine { client: proxied, method: &method, fields: &fields, ..line };
        let text = line.format();
        assert!(text.starts_with("2001:db8::7 - - [") && text.contains(" \"-\" \"xxx"), "{text}");
        assert!(text.contains(&format!("\"{} /", "M".repeat(LONGEST_METHOD))), "{text}");
        assert!(text.len() < LONGEST_FIELD + 200, "{text}");
        let unix = CombinedLine { client: Peer::Unix.into(), ..line };
        assert!(unix.format().starts_with("unix: - - ["));
    }
}
