//! The bytes of RESP: commands in, replies out.

use bytes::{Buf, BytesMut};

/// Takes a whole command off the front of a buffer, if there is one.
pub(super) fn take_command(buffer: &mut BytesMut) -> Option<Vec<String>> {
    let mut at = 0;
    let count = number_after(buffer, &mut at, b'*')?;
    let mut parts = Vec::with_capacity(count);
    for _ in 0..count {
        let length = number_after(buffer, &mut at, b'$')?;
        let part = buffer.get(at..at + length)?;
        parts.push(String::from_utf8_lossy(part).into_owned());
        at += length + 2;
    }
    if at > buffer.len() {
        return None;
    }
    buffer.advance(at);
    Some(parts)
}

/// Reads a line such as `*3`.
fn number_after(buffer: &[u8], at: &mut usize, sign: u8) -> Option<usize> {
    let line = buffer.get(*at..)?;
    let end = line.windows(2).position(|it| it == b"\r\n")?;
    assert_eq!(line[0], sign, "the client sends arrays of bulk strings");
    *at += end + 2;
    std::str::from_utf8(&line[1..end]).unwrap().parse().ok()
}

pub(super) fn bulk(text: &str) -> String {
    format!("${}\r\n{text}\r\n", text.len())
}

pub(super) fn array(parts: &[String]) -> String {
    format!("*{}\r\n{}", parts.len(), parts.concat())
}

/// A map over RESP3, and over RESP2 an array of names and values.
pub(super) fn map(is_resp3: bool, fields: &[(&str, String)]) -> String {
    let sign = if is_resp3 { '%' } else { '*' };
    let count = if is_resp3 { fields.len() } else { 2 * fields.len() };
    let fields: String = fields.iter().map(|(name, value)| bulk(name) + value).collect();
    format!("{sign}{count}\r\n{fields}")
}

/// A push that names keys; none for all of them.
pub(super) fn push(keys: &[String]) -> String {
    let keys: Vec<String> = keys.iter().map(|it| bulk(it)).collect();
    let keys = if keys.is_empty() { "_\r\n".to_owned() } else { array(&keys) };
    format!(">2\r\n{}{keys}", bulk("invalidate"))
}
