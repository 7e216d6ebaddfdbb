//! The host that a request names.

use std::net::Ipv4Addr;

use axum::body::Body;
use axum::http::header::HOST;
use axum::http::{Request, Version};

use crate::settings::HostNames;

/// Checks that a request names its host once and well-formed (RFC 9112 §3.2, RFC 9113 §8.3.1). Otherwise another server
/// in front may have understood another host.
pub(crate) fn check_host(request: &Request<Body>) -> Result<(), &'static str> {
    let mut lines = request.headers().get_all(HOST).iter();
    let (host, authority) = (lines.next(), request.uri().authority());
    if lines.next().is_some() {
        return Err("there is more than one Host");
    }
    let multiplexed = request.version() >= Version::HTTP_2;
    // Without the user and password that it may have: they are an error (RFC 9110 §4.2.4), and nobody should guess the host.
    if authority.is_some_and(|it| !multiplexed && !is_host(it.as_str().as_bytes())) {
        return Err("the host of the target is malformed");
    }
    let host = match host {
        Some(host) if is_host(host.as_bytes()) => host.as_bytes(),
        Some(_) => return Err("Host is malformed"),
        None => match authority {
            Some(it) if multiplexed && is_host(it.as_str().as_bytes()) => return Ok(()),
            Some(_) if multiplexed => return Err(":authority is malformed"),
            _ if request.version() == Version::HTTP_10 => return Ok(()),
            _ => return Err("Host is missing"),
        },
    };
    match authority {
        Some(it) if multiplexed && !it.as_str().as_bytes().eq_ignore_ascii_case(host) => {
            Err("Host and :authority differ")
        }
        _ => Ok(()),
    }
}

/// Returns the name or address of the host that a request is for, without its port: that of the target, if it has one, and
/// otherwise that of `Host` (RFC 9112 §3.2.2, RFC 9113 §8.3.1).
pub(crate) fn host_of(request: &Request<Body>) -> Option<&str> {
    match request.uri().authority() {
        Some(authority) => Some(authority.host()),
        None => str::from_utf8(without_port(request.headers().get(HOST)?.as_bytes())).ok(),
    }
}

/// Cuts the port off a well-formed host.
fn without_port(host: &[u8]) -> &[u8] {
    let end = match host.first() {
        Some(b'[') => host.iter().position(|&byte| byte == b']').map(|bracket| bracket + 1),
        _ => host.iter().position(|&byte| byte == b':'),
    };
    &host[..end.unwrap_or(host.len())]
}

/// Returns whether this is a host of the server's own: an IP address, `localhost`, or one that is listed.
///
/// A page whose own name was made to lead here (DNS rebinding) still names that in its requests. Nobody can do that with an
/// address, and browsers resolve `localhost` themselves (RFC 6761 §6.3).
pub(crate) fn is_own(host: &str, listed: &HostNames) -> bool {
    if host.starts_with('[') || host.parse::<Ipv4Addr>().is_ok() {
        return true;
    }
    let name = host.strip_suffix('.').unwrap_or(host);
    let top = name.rsplit_once('.').map_or(name, |(_, top)| top);
    top.eq_ignore_ascii_case("localhost") || listed.contain(name)
}

/// Returns whether a well-formed `Host` is answered with images: any, unless the settings list some.
pub(crate) fn is_answered(host: &[u8], listed: &HostNames) -> bool {
    listed.is_empty() || str::from_utf8(without_port(host)).is_ok_and(|host| is_own(host, listed))
}

/// The bytes that a name or an IPv4 address has.
const IN_NAME: &[bool; 256] = &{
    let mut table = [false; 256];
    let mut byte = 0_usize;
    while byte < 256 {
        let it = byte.to_le_bytes()[0];
        table[byte] = it.is_ascii_alphanumeric() || matches!(it, b'-' | b'.' | b'_' | b'~' | b'%');
        byte += 1;
    }
    table
};

/// Returns whether a text is `uri-host [ ":" port ]` (RFC 3986 §3.2.2). Sub-delimiters are refused: no host has them.
pub(crate) fn is_host(text: &[u8]) -> bool {
    // By far the most are a name and a port of digits: one look at each byte.
    let name = text.iter().position(|&byte| !IN_NAME[usize::from(byte)]).unwrap_or(text.len());
    match &text[name..] {
        [] if name > 0 => return true,
        [b':', port @ ..] if name > 0 && port.len() < 5 => {
            return port.iter().all(u8::is_ascii_digit);
        }
        _ => {}
    }
    let end = match text.first() {
        Some(b'[') => text.iter().position(|&byte| byte == b']').map(|bracket| bracket + 1),
        _ => text.iter().position(|&byte| byte == b':'),
    };
    let (host, port) = text.split_at(end.unwrap_or(text.len()));
    let is_name_or_address = match host {
        [b'[', address @ .., b']'] => {
            str::from_utf8(address).is_ok_and(|it| it.parse::<std::net::Ipv6Addr>().is_ok())
        }
        name => !name.is_empty() && name.iter().all(|it| IN_NAME[usize::from(*it)]),
    };
    let number = |number: u16, digit: &u8| {
        let digit = char::from(*digit).to_digit(10)?;
        number.checked_mul(10)?.checked_add(u16::try_from(digit).ok()?)
    };
    is_name_or_address
        && match port {
            [b':', digits @ ..] => digits.iter().try_fold(0, number).is_some(),
            _ => port.is_empty(),
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_localhost_and_listed_names_are_the_servers_own() {
        let listed = crate::settings::described().into_iter().find(|it| it.key == "http.hosts");
        let listed = listed.unwrap().overridden(r#"["Images.Example"]"#, "test".into());
        let listed = crate::settings::Settings::load(&[listed]).unwrap().http.hosts;
        for own in [
            "127.0.0.1",
            "192.0.2.7",
            "[::1]",
            "localhost",
            "LOCALHOST",
            "localhost.",
            "a.localhost",
            "images.example",
            "IMAGES.example.",
        ] {
            assert!(is_own(own, &listed), "{own}");
            assert!(is_answered(format!("{own}:8000").as_bytes(), &listed), "{own}");
        }
        for foreign in [
            "evil.example",
            "a.images.example",
            "localhost.evil.example",
            "notlocalhost",
            "127.1",
            "afterimage",
        ] {
            assert!(!is_own(foreign, &listed), "{foreign}");
            assert!(!is_answered(foreign.as_bytes(), &listed), "{foreign}");
        }
    }

    #[test]
    fn the_host_of_the_target_counts() {
        let host = |target: &str| {
            let request = Request::builder().uri(target).header(HOST, "127.0.0.1:80");
            host_of(&request.body(Body::empty()).unwrap()).map(str::to_owned)
        };
        assert_eq!(host("/images/a").as_deref(), Some("127.0.0.1"));
        assert_eq!(host("http://evil.example:80/images/a").as_deref(), Some("evil.example"));
        assert_eq!(host("http://127.0.0.1@evil.example/").as_deref(), Some("evil.example"));
        for bad in ["http://127.0.0.1@evil.example/", "http://[evil.example]/"] {
            let request = Request::builder().uri(bad).header(HOST, "127.0.0.1:80");
            assert!(check_host(&request.body(Body::empty()).unwrap()).is_err(), "{bad}");
        }
        assert_eq!(host("http://[::1]:80/").as_deref(), Some("[::1]"));
    }

    #[test]
    fn a_host_is_a_name_or_an_address_with_or_without_a_port() {
        for good in [
            "a",
            "a.example",
            "127.0.0.1:80",
            "[::1]",
            "[::1]:8000",
            "a_b:",
            "xn--a",
            "a:9999",
            "a:65535",
        ] {
            assert!(is_host(good.as_bytes()), "{good}");
        }
        for bad in [
            "", ":80", "a,b", "a b", "u@a", "a:b", "a:99999", "a:+1", "::1", "[::1", "[a]",
            "[::1]80", "a/b", "a:65536", "a:80x", ":", "a:80:80",
        ] {
            assert!(!is_host(bad.as_bytes()), "{bad}");
        }
    }
}
