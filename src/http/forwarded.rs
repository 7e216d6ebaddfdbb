//! The client that trusted proxies name: `X-Forwarded-For`, and `Forwarded` (RFC 7239).

use std::iter;
use std::net::{IpAddr, SocketAddr};

use axum::http::header::FORWARDED;
use axum::http::{HeaderMap, HeaderName, HeaderValue};

use crate::peer::{Client, Peer};
use crate::settings::TrustedProxies;

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");

/// Returns the client of a request.
pub(crate) fn client(peer: Peer, proxies: &TrustedProxies, headers: &HeaderMap) -> Client {
    // Looked for only if the peer is trusted.
    let lines = |name: HeaderName| {
        let lines = iter::once_with(move || headers.get_all(name)).flatten();
        lines.map(HeaderValue::as_bytes).rev()
    };
    client_of(peer, proxies, lines(X_FORWARDED_FOR), lines(FORWARDED))
}

/// Returns the client of a request with these lines, the last one first.
///
/// Each proxy adds the address that it was reached from at the end. So the last one that is no trusted proxy is the client's,
/// and what stands before it was the client's to choose. A proxy adds to one of the two fields and may pass on what a client
/// put into the other: where they don't agree, the peer is all that is known.
pub(crate) fn client_of<'a>(
    peer: Peer,
    proxies: &TrustedProxies,
    x_forwarded_for: impl Iterator<Item = &'a [u8]>,
    forwarded: impl Iterator<Item = &'a [u8]>,
) -> Client {
    if !proxies.contain(peer.ip()) {
        return peer.into();
    }
    let first = last_untrusted(proxies, x_forwarded_for.flat_map(addresses));
    let second = last_untrusted(proxies, forwarded.flat_map(elements));
    match (first, second) {
        (Named::Client(address), Named::Nothing) | (Named::Nothing, Named::Client(address)) => {
            Client::behind(peer, address)
        }
        (Named::Client(one), Named::Client(other)) if one == other => Client::behind(peer, one),
        _ => peer.into(),
    }
}

/// The thing that a field says about the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Named {
    /// The field isn't there.
    Nothing,
    /// It isn't an address.
    Malformed,
    Client(IpAddr),
}

/// Returns the first of the entries, which come from the end, that is no trusted proxy; or the last, if all are.
fn last_untrusted(
    proxies: &TrustedProxies,
    entries: impl Iterator<Item = Option<IpAddr>>,
) -> Named {
    let mut farthest = Named::Nothing;
    for entry in entries {
        let Some(address) = entry else { return Named::Malformed };
        farthest = Named::Client(address);
        if !proxies.contain(Some(address)) {
            break;
        }
    }
    farthest
}

/// Returns the addresses of a line of `X-Forwarded-For`, from its end.
fn addresses(line: &[u8]) -> impl Iterator<Item = Option<IpAddr>> {
    line.rsplit(|&byte| byte == b',').map(|entry| address(entry.trim_ascii()))
}

/// Returns the addresses of a line of `Forwarded`, from its end; `None` for an element without one.
fn elements(line: &[u8]) -> impl Iterator<Item = Option<IpAddr>> {
    // A quote that a client left open would hide what the proxy wrote behind it.
    let elements = split_outside_quotes(line, b',').unwrap_or(vec![b""]);
    let addresses = elements.into_iter().map(|element| {
        let mut found = None;
        for pair in split_outside_quotes(element, b';')? {
            let equals = pair.iter().position(|&byte| byte == b'=')?;
            let (name, value) = (pair[..equals].trim_ascii(), pair[equals + 1..].trim_ascii());
            if name.eq_ignore_ascii_case(b"for") {
                let value = match value {
                    [b'"', inside @ .., b'"'] => inside,
                    token => token,
                };
                // Twice is malformed (RFC 7239 §4).
                if found.replace(address(value)?).is_some() {
                    return None;
                }
            }
        }
        found
    });
    addresses.rev().collect::<Vec<_>>().into_iter()
}

/// Splits a text at a separator that stands in no quoted string. An escape is a part of one. `None` if a string doesn't end.
fn split_outside_quotes(text: &[u8], separator: u8) -> Option<Vec<&[u8]>> {
    let (mut quoted, mut escaped) = (false, false);
    let parts: Vec<_> = text
        .split(|&byte| {
            let ends = byte == separator && !quoted;
            match byte {
                _ if escaped => escaped = false,
                b'\\' if quoted => escaped = true,
                b'"' => quoted = !quoted,
                _ => {}
            }
            ends
        })
        .collect();
    (!quoted).then_some(parts)
}

/// Parses an address with or without a port; an IPv6 address may have its brackets.
fn address(text: &[u8]) -> Option<IpAddr> {
    let text = str::from_utf8(text).ok()?;
    let bare = text.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
    let address = match bare {
        Some(inside) => inside.parse().ok().map(IpAddr::V6),
        None => text.parse().ok(),
    };
    let address = address.or_else(|| text.parse::<SocketAddr>().ok().map(|it| it.ip()));
    address.map(|it| it.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::{Settings, described};

    fn proxies(text: &str) -> TrustedProxies {
        let setting = described().into_iter().find(|it| it.key == "http.trusted_proxies").unwrap();
        Settings::load(&[setting.overridden(text, "test".into())]).unwrap().http.trusted_proxies
    }

    /// Returns the address that a request of a trusted proxy names.
    fn named(headers: &[(&'static str, &'static str)]) -> Option<String> {
        let proxies = proxies(r#"["127.0.0.1", "10.0.0.0/8", "fd00::/8"]"#);
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, value.parse().unwrap());
        }
        let peer = Peer::Tcp("127.0.0.1:9".parse().unwrap());
        client(peer, &proxies, &map).forwarded().map(|it| it.to_string())
    }

    #[test]
    fn the_last_address_that_is_no_trusted_proxy_is_the_client() {
        for (line, expected) in [
            ("192.0.2.1", Some("192.0.2.1")),
            ("1.1.1.1, 192.0.2.1", Some("192.0.2.1")),
            ("1.1.1.1, 192.0.2.1 ,10.1.2.3,10.0.0.1", Some("192.0.2.1")),
            ("192.0.2.1:4711", Some("192.0.2.1")),
            ("[2001:db8::1]:4711", Some("2001:db8::1")),
            ("[2001:db8::1]", Some("2001:db8::1")),
            ("2001:db8::1", Some("2001:db8::1")),
            ("::ffff:192.0.2.1", Some("192.0.2.1")),
            // All are proxies: the farthest.
            ("10.0.0.2, 10.0.0.1", Some("10.0.0.2")),
            ("rubbish, 192.0.2.1", Some("192.0.2.1")),
            ("192.0.2.1, rubbish", None),
            ("192.0.2.1, rubbish, 10.0.0.1", None),
            ("unknown", None),
            ("192.0.2.1,", None),
            ("", None),
            ("[192.0.2.1]", None),
        ] {
            let named = named(&[("x-forwarded-for", line)]);
            assert_eq!(named.as_deref(), expected, "{line}");
        }
        let lines = [("x-forwarded-for", "1.1.1.1, 192.0.2.1"), ("x-forwarded-for", "10.0.0.1")];
        assert_eq!(named(&lines).as_deref(), Some("192.0.2.1"));
    }

    #[test]
    fn forwarded_is_read_as_rfc_7239_writes_it() {
        for (line, expected) in [
            ("for=192.0.2.1", Some("192.0.2.1")),
            ("For=\"[2001:db8:cafe::17]:4711\"", Some("2001:db8:cafe::17")),
            // The client's own part leaves a quote open.
            ("for=1.1.1.1;host=\", for=192.0.2.1", None),
            ("for=1.1.1.1;host=\"a\\\", for=192.0.2.1", None),
            ("for=\"1.1.1.1, for=\", for=192.0.2.1", Some("192.0.2.1")),
            ("for=192.0.2.60;proto=http;by=203.0.113.43", Some("192.0.2.60")),
            (
                "for=1.1.1.1, for=192.0.2.1;host=\"a,b;for=2.2.2.2\", for=10.0.0.1",
                Some("192.0.2.1"),
            ),
            ("host=\"\\\"\";for=192.0.2.1", Some("192.0.2.1")),
            ("for=_hidden", None),
            ("for=unknown", None),
            ("proto=http", None),
            ("for=192.0.2.1;for=192.0.2.2", None),
            ("for=\"192.0.2.1", None),
            ("for", None),
        ] {
            assert_eq!(named(&[("forwarded", line)]).as_deref(), expected, "{line}");
        }
    }

    #[test]
    fn fields_that_do_not_agree_name_nobody() {
        let same = [("forwarded", "for=192.0.2.1"), ("x-forwarded-for", "192.0.2.1")];
        assert_eq!(named(&same).as_deref(), Some("192.0.2.1"));
        for other in ["for=192.0.2.2", "for=_x", "rubbish"] {
            assert_eq!(named(&[("forwarded", other), ("x-forwarded-for", "192.0.2.1")]), None);
        }
    }

    /// Changes good lines at random places, as a fuzzer would.
    #[test]
    fn no_line_makes_it_panic() {
        let mut random = fastrand::Rng::with_seed(7);
        let proxies = proxies(r#"["127.0.0.1", "10.0.0.0/8"]"#);
        let peer = Peer::Tcp("127.0.0.1:9".parse().unwrap());
        let good: [&[u8]; 3] = [
            b"1.1.1.1, [2001:db8::1]:80 ,10.0.0.1",
            b"for=\"[2001:db8::1]:4711\";by=_x;host=\"a,b\\\"\", for=10.0.0.1",
            b"for=192.0.2.1;proto=http",
        ];
        for round in 0..100_000 {
            let mut line = good[round % good.len()].to_vec();
            for _ in 0..random.usize(1..4) {
                let place = random.usize(..line.len());
                match random.u8(..3) {
                    0 => line[place] = random.u8(..),
                    1 => line.truncate(place.max(1)),
                    _ => line.insert(place, *b"\",;=[]:\\".get(random.usize(..8)).unwrap()),
                }
            }
            let client = client_of(peer, &proxies, [&*line].into_iter(), [&*line].into_iter());
            assert_eq!(client.peer(), peer);
        }
    }

    #[test]
    fn nobody_else_is_believed() {
        let mut headers = HeaderMap::new();
        headers.insert("x-forwarded-for", "192.0.2.1".parse().unwrap());
        for (trusted, peer, believed) in [
            ("[]", Peer::Tcp("127.0.0.1:9".parse().unwrap()), false),
            (r#"["unix"]"#, Peer::Tcp("127.0.0.1:9".parse().unwrap()), false),
            (r#"["127.0.0.1"]"#, Peer::Tcp("127.0.0.2:9".parse().unwrap()), false),
            (r#"["127.0.0.1"]"#, Peer::Unix, false),
            (r#"["127.0.0.1"]"#, Peer::Tcp("[::ffff:127.0.0.1]:9".parse().unwrap()), true),
            (r#"["unix"]"#, Peer::Unix, true),
            (r#"["10.0.0.0/8"]"#, Peer::Proxied("10.9.9.9:1".parse().unwrap()), true),
        ] {
            let client = client(peer, &proxies(trusted), &headers);
            assert_eq!(client.forwarded().is_some(), believed, "{trusted} {peer}");
        }
    }
}
