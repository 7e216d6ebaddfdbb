//! What a request asks for, if nothing in its head changes how its connection goes on.

use axum::body::Body;
use axum::http::header::HeaderName;
use axum::http::{HeaderValue, Method, Request, Uri, Version};
use http_body::Body as HttpBody;
use httparse::Header;

use super::cached_head::Named;
use crate::http::router::Route;

/// What a plain request asks.
pub(crate) struct PlainRequest<'b> {
    pub(crate) method: Method,
    pub(crate) target: &'b str,
    path: &'b str,
    /// What follows the path: a query, or the fragment that the router leaves out.
    rest: &'b str,
    host: &'b [u8],
    /// Where there is one field of that name.
    pub(crate) if_none_match: Option<&'b [u8]>,
    pub(crate) request_id: Option<&'b [u8]>,
    /// Whether nothing else is said that an answer could depend on, but the codings that are accepted.
    simple: bool,
}

impl<'b> PlainRequest<'b> {
    /// What a head asks, if it is plain.
    pub(crate) fn of(request: &httparse::Request<'_, 'b>) -> Option<PlainRequest<'b>> {
        let fields = request.headers.iter().map(|it| (it.name, it.value));
        let is_http_1_1 = request.version == Some(1);
        PlainRequest::plain(request.method?, request.path?, None, fields).filter(|_| is_http_1_1)
    }

    /// What a request over HTTP/2 asks, if it would be plain over HTTP/1.1.
    pub(crate) fn over_http_2(request: &'b Request<Body>) -> Option<PlainRequest<'b>> {
        if request.version() != Version::HTTP_2 || !request.body().is_end_stream() {
            return None;
        }
        let (uri, headers) = (request.uri(), request.headers());
        let fields = headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes()));
        let host = uri.authority()?.as_str().as_bytes();
        PlainRequest::plain(
            request.method().as_str(),
            uri.path_and_query()?.as_str(),
            Some(host),
            fields,
        )
    }

    fn plain(
        method: &str,
        target: &'b str,
        mut host: Option<&'b [u8]>,
        fields: impl Iterator<Item = (&'b str, &'b [u8])>,
    ) -> Option<PlainRequest<'b>> {
        let method = match method {
            "GET" => Method::GET,
            "HEAD" => Method::HEAD,
            _ => return None,
        };
        let end = target.bytes().position(|byte| matches!(byte, b'?' | b'#'));
        let (path, rest) = target.split_at(end.unwrap_or(target.len()));
        if !Route::of(path).is_of_images() {
            return None;
        }
        let (mut if_none_match, mut request_id, mut simple) = (None, None, true);
        for (name, value) in fields {
            let is = |other: &str| name.eq_ignore_ascii_case(other);
            match name.len() {
                4 if is("host") && host.is_none() => host = Some(value),
                4 if is("host") => return None,
                10 if is("connection") && value.eq_ignore_ascii_case(b"keep-alive") => {}
                10 if is("connection") => return None,
                13 if is("if-none-match") => {
                    simple &= if_none_match.replace(value).is_none();
                }
                12 if is("x-request-id") => simple &= request_id.replace(value).is_none(),
                // What comes after the head, or instead of HTTP.
                6 if is("expect") => return None,
                7 if is("upgrade") => return None,
                14 if is("content-length") || is("http2-settings") => return None,
                17 if is("transfer-encoding") => return None,
                // What the router's answer depends on (`http::conditional`, `http::cors`).
                5 if is("range") => simple = false,
                6 if is("origin") => simple = false,
                8 if is("if-match") || is("if-range") => simple = false,
                17 if is("if-modified-since") => simple = false,
                19 if is("if-unmodified-since") => simple = false,
                _ => {}
            }
        }
        let host = host?;
        Some(PlainRequest { method, target, path, rest, host, if_none_match, request_id, simple })
    }

    /// The id in the address of an image, and whether the address names its version, where nothing but the image as it is
    /// is asked for.
    pub(crate) fn as_it_is(&self) -> Option<(&'b str, bool)> {
        // Only whole ids are found in the index: one with an escape, a slash or a format at its end isn't.
        let id = self.path.strip_prefix("/images/")?;
        let versioned = match self.version() {
            Some(version) if version.len() == 32 && !version.contains('#') => true,
            None if self.rest.is_empty() => false,
            Some(_) | None => return None,
        };
        let plain = self.simple && self.method == Method::GET && is_host(self.host);
        plain.then_some((id, versioned))
    }

    /// To whom the answer may be said again: who names the same version, or none, where nothing else is asked for.
    pub(crate) fn learns(&self) -> Option<Named> {
        self.as_it_is()?;
        match self.version() {
            None => Some(None),
            Some(version) => version.as_bytes().try_into().ok().map(Some),
        }
    }

    /// The version that the address names.
    pub(crate) fn version(&self) -> Option<&'b str> {
        self.rest.strip_prefix("?v=")
    }

    pub(crate) fn to_request(&self, fields: &[Header<'_>]) -> Option<Request<Body>> {
        let mut request = Request::new(Body::empty());
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = Uri::try_from(self.target).ok()?;
        *request.version_mut() = Version::HTTP_11;
        let headers = request.headers_mut();
        headers.reserve(fields.len());
        for Header { name, value } in fields {
            let name = HeaderName::from_bytes(name.as_bytes()).ok()?;
            headers.append(name, HeaderValue::from_bytes(value).ok()?);
        }
        Some(request)
    }
}

/// `uri-host [ ":" port ]` (RFC 3986 §3.2.2), without the characters that only a sub-delimiter of something else
/// would have.
pub(crate) fn is_host(text: &[u8]) -> bool {
    let end = match text.first() {
        Some(b'[') => text.iter().position(|&byte| byte == b']').map(|bracket| bracket + 1),
        _ => text.iter().position(|&byte| byte == b':'),
    };
    let (host, port) = text.split_at(end.unwrap_or(text.len()));
    let named =
        |it: &u8| it.is_ascii_alphanumeric() || matches!(it, b'-' | b'.' | b'_' | b'~' | b'%');
    let is_name_or_address = match host {
        [b'[', address @ .., b']'] => {
            str::from_utf8(address).is_ok_and(|it| it.parse::<std::net::Ipv6Addr>().is_ok())
        }
        name => !name.is_empty() && name.iter().all(named),
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
    fn a_host_is_a_name_or_an_address_with_or_without_a_port() {
        for good in ["a", "a.example", "127.0.0.1:80", "[::1]", "[::1]:8000", "a_b:", "xn--a"] {
            assert!(is_host(good.as_bytes()), "{good}");
        }
        for bad in [
            "", ":80", "a,b", "a b", "u@a", "a:b", "a:99999", "a:+1", "::1", "[::1", "[a]",
            "[::1]80", "a/b",
        ] {
            assert!(!is_host(bad.as_bytes()), "{bad}");
        }
    }
}
