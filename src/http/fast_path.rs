//! The fast path: requests that a cached response head may answer.

use axum::body::Body;
use axum::http::header::HeaderName;
use axum::http::{HeaderValue, Method, Request, Uri, Version};
use http_body::Body as HttpBody;
use httparse::Header;

use super::cached_head::{HeadKey, Validator};
use super::forwarded::client_of;
use super::host::{is_answered, is_host};
use crate::http::router::Route;
use crate::image::Metadata;
use crate::image::variant::Format;
use crate::peer::{Client, Peer};
use crate::settings::{HostNames, TrustedProxies};

/// The longest rest of an address behind the id that has a cached head.
const MAX_ADDRESS: usize = 128;

/// The longest `Accept` or `Accept-Encoding` that is a part of a cached head's key.
const MAX_FIELD: usize = 256;

/// The beginning of an image's addresses.
const IMAGES: &str = "/images/";

/// A GET or HEAD with nothing in its head that changes how its connection goes on.
#[derive(Debug)]
pub(crate) struct FastRequest<'b> {
    pub(crate) method: Method,
    pub(crate) target: &'b str,
    host: &'b [u8],
    if_none_match: Option<&'b [u8]>,
    accept: Option<&'b [u8]>,
    accept_encoding: Option<&'b [u8]>,
    pub(crate) request_id: Option<&'b [u8]>,
    x_forwarded_for: Option<&'b [u8]>,
    forwarded: Option<&'b [u8]>,
    /// Empty, which is malformed, if it was sent more than once.
    pub(crate) traceparent: Option<&'b [u8]>,
    /// For the log.
    pub(crate) referer: Option<&'b [u8]>,
    pub(crate) user_agent: Option<&'b [u8]>,
    /// Set if one of these two has more than one line.
    has_more_lines: bool,
    /// Set if the answer depends on nothing else in the head.
    is_simple: bool,
}

/// A request for an image that a cached head may answer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ImageAddress<'b> {
    /// A whole id, if the index knows it: one with an escape or a slash isn't there.
    pub(crate) id: &'b str,
    /// The rest of the target.
    pub(crate) rest: &'b str,
    accept: Option<&'b [u8]>,
    accept_encoding: Option<&'b [u8]>,
}

/// An [`ImageAddress`] that outlives its request.
#[derive(Debug)]
pub(crate) struct OwnedAddress {
    id: Box<str>,
    rest: Box<str>,
    accept: Option<Box<[u8]>>,
    accept_encoding: Option<Box<[u8]>>,
}

impl OwnedAddress {
    pub(crate) fn borrow(&self) -> ImageAddress<'_> {
        ImageAddress {
            id: &self.id,
            rest: &self.rest,
            accept: self.accept.as_deref(),
            accept_encoding: self.accept_encoding.as_deref(),
        }
    }
}

impl<'b> FastRequest<'b> {
    /// Takes a head that the fast loop has read.
    pub(crate) fn of(request: &httparse::Request<'_, 'b>) -> Option<FastRequest<'b>> {
        let fields = request.headers.iter().map(|it| (it.name, it.value));
        let is_http_1_1 = request.version == Some(1);
        FastRequest::new(request.method?, request.path?, None, fields).filter(|_| is_http_1_1)
    }

    /// Takes a request of the HTTP library's whose host was checked.
    pub(crate) fn of_checked(request: &'b Request<Body>) -> Option<FastRequest<'b>> {
        let is_http_2 = match request.version() {
            Version::HTTP_11 => false,
            Version::HTTP_2 => true,
            _ => return None,
        };
        if !request.body().is_end_stream() {
            return None;
        }
        let (uri, headers) = (request.uri(), request.headers());
        let fields = headers.iter().map(|(name, value)| (name.as_str(), value.as_bytes()));
        let host = uri.authority().filter(|_| is_http_2).map(|it| it.as_str().as_bytes());
        let target = uri.path_and_query()?.as_str();
        FastRequest::new(request.method().as_str(), target, host, fields)
    }

    fn new(
        method: &str,
        target: &'b str,
        mut host: Option<&'b [u8]>,
        fields: impl Iterator<Item = (&'b str, &'b [u8])>,
    ) -> Option<FastRequest<'b>> {
        let method = match method {
            "GET" => Method::GET,
            "HEAD" => Method::HEAD,
            _ => return None,
        };
        // All addresses of an image; the few others are looked up.
        if !target.starts_with(IMAGES) {
            let path = target.split(['?', '#']).next().unwrap_or_default();
            if !Route::of(path).is_of_images() {
                return None;
            }
        }
        let (mut if_none_match, mut request_id, mut is_simple) = (None, None, true);
        let (mut accept, mut accept_encoding) = (None, None);
        let (mut x_forwarded_for, mut forwarded, mut has_more_lines) = (None, None, false);
        let (mut traceparent, mut referer, mut user_agent) = (None, None, None);
        for (name, value) in fields {
            let is = |other: &str| name.eq_ignore_ascii_case(other);
            match name.len() {
                4 if is("host") && host.is_none() => host = Some(value),
                4 if is("host") => return None,
                10 if is("connection") && value.eq_ignore_ascii_case(b"keep-alive") => {}
                10 if is("connection") => return None,
                10 if is("user-agent") => user_agent = user_agent.or(Some(value)),
                11 if is("traceparent") => {
                    traceparent = Some(if traceparent.is_none() { value } else { b"" });
                }
                7 if is("referer") => referer = referer.or(Some(value)),
                13 if is("if-none-match") => is_simple &= if_none_match.replace(value).is_none(),
                12 if is("x-request-id") => is_simple &= request_id.replace(value).is_none(),
                6 if is("accept") => is_simple &= accept.replace(value).is_none(),
                15 if is("accept-encoding") => {
                    is_simple &= accept_encoding.replace(value).is_none();
                }
                15 if is("x-forwarded-for") => {
                    has_more_lines |= x_forwarded_for.replace(value).is_some();
                }
                9 if is("forwarded") => has_more_lines |= forwarded.replace(value).is_some(),
                // Something comes after the head, or instead of HTTP.
                6 if is("expect") => return None,
                7 if is("upgrade") => return None,
                14 if is("content-length") || is("http2-settings") => return None,
                17 if is("transfer-encoding") => return None,
                // The router's answer depends on it (`http::conditional`, `http::cors`).
                5 if is("range") => is_simple = false,
                6 if is("origin") => is_simple = false,
                8 if is("if-match") || is("if-range") => is_simple = false,
                17 if is("if-modified-since") => is_simple = false,
                19 if is("if-unmodified-since") => is_simple = false,
                _ => {}
            }
        }
        let host = host?;
        Some(FastRequest {
            method,
            target,
            host,
            if_none_match,
            accept,
            accept_encoding,
            request_id,
            x_forwarded_for,
            forwarded,
            traceparent,
            referer,
            user_agent,
            has_more_lines,
            is_simple,
        })
    }

    /// Returns whether its host is well-formed, and answered with images.
    pub(crate) fn has_answered_host(&self, listed: &HostNames) -> bool {
        is_host(self.host) && is_answered(self.host, listed)
    }

    /// Returns its client, unless several lines of a field name it, which are for the router.
    pub(crate) fn client(&self, peer: Peer, proxies: &TrustedProxies) -> Option<Client> {
        if self.has_more_lines && proxies.contain(peer.ip()) {
            return None;
        }
        let (first, second) = (self.x_forwarded_for.into_iter(), self.forwarded.into_iter());
        Some(client_of(peer, proxies, first, second))
    }

    /// Returns the image that it asks for, if a cached head may answer it.
    pub(crate) fn image(&self) -> Option<ImageAddress<'b>> {
        if !self.is_simple {
            return None;
        }
        let path_and_query = self.target.strip_prefix(IMAGES)?;
        let end = path_and_query.bytes().position(|byte| matches!(byte, b'?' | b'#' | b'/'));
        let (name, rest) = path_and_query.split_at(end.unwrap_or(path_and_query.len()));
        if let Some(segment) = rest.strip_prefix('/') {
            let after = segment.strip_prefix("thumbnail")?;
            if !(after.is_empty() || after.starts_with('?')) {
                return None;
            }
        }
        let id = without_format(name);
        let rest = &path_and_query[id.len()..];
        // Without escapes, so that nothing is written in two ways.
        let is_plain = |byte: u8| {
            byte.is_ascii_alphanumeric()
                || matches!(byte, b'?' | b'=' | b'&' | b'.' | b'/' | b'-' | b'_')
        };
        (rest.len() <= MAX_ADDRESS && rest.bytes().all(is_plain)).then_some(ImageAddress {
            id,
            rest,
            accept: self.accept,
            accept_encoding: self.accept_encoding,
        })
    }

    /// Returns its validator, unless only the router understands it: a list, `*` or a malformed one.
    pub(crate) fn validator(&self) -> Option<Validator<'b>> {
        match self.if_none_match.map(|it| it.strip_prefix(b"W/").unwrap_or(it)) {
            None => Some(Validator::None),
            Some(tag @ [b'"', inside @ .., b'"']) if !inside.contains(&b'"') => {
                Some(Validator::Tag(tag))
            }
            Some(_) => None,
        }
    }

    /// Makes it a request for the router. Quotes and angle brackets, which no address may have (RFC 3986 §2) and curl sends
    /// all the same, as of an entity-tag, are written as browsers do. `server::h1::mend_request_line` does so for the HTTP library.
    pub(crate) fn to_request(&self, fields: &[Header<'_>]) -> Option<Request<Body>> {
        let mut request = Request::new(Body::empty());
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = if self.target.contains(['"', '<', '>']) {
            let target = self.target.replace('"', "%22").replace('<', "%3C").replace('>', "%3E");
            Uri::try_from(target).ok()?
        } else {
            Uri::try_from(self.target).ok()?
        };
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

/// Returns the id in the last part of a path, which may end in a format.
fn without_format(name: &str) -> &str {
    // Most have no dot there.
    let end = &name.as_bytes()[name.len().saturating_sub(5)..];
    if !end.contains(&b'.') {
        return name;
    }
    let stem = Format::ALL.into_iter().find_map(|format| {
        name.strip_suffix(format.name()).and_then(|name| name.strip_suffix('.'))
    });
    stem.unwrap_or(name)
}

impl<'b> ImageAddress<'b> {
    /// Returns the key of the head that answers it, and whether it asks for the image under its plain address or the one
    /// with its version. A wrong version under that address has no key, so that its head is never mistaken for the right
    /// one's.
    pub(crate) fn key(&self, original: &Metadata) -> Option<(HeadKey<'b>, bool)> {
        let is_named = match self.rest.strip_prefix("?v=") {
            Some(version) if version.len() == 32 && original.version.is_named(version) => true,
            Some(more) => match more.split_once('&') {
                Some((version, _)) if version.len() == 32 && original.version.is_named(version) => {
                    false
                }
                // Another version, or junk that would push out the heads of other images.
                Some(_) | None => return None,
            },
            None => false,
        };
        let is_long = |field: Option<&[u8]>| field.is_some_and(|it| it.len() > MAX_FIELD);
        let accept = self.accept.filter(|_| self.is_negotiated());
        let accept_encoding = self.accept_encoding.filter(|_| !original.coded.is_empty());
        if is_long(accept) || is_long(accept_encoding) {
            return None;
        }
        let is_primary =
            (self.rest.is_empty() || is_named) && accept.is_none() && accept_encoding.is_none();
        Some((HeadKey { address: self.rest, accept, accept_encoding }, is_primary))
    }

    pub(crate) fn to_owned(self) -> OwnedAddress {
        OwnedAddress {
            id: self.id.into(),
            rest: self.rest.into(),
            accept: self.accept.map(Into::into),
            accept_encoding: self.accept_encoding.map(Into::into),
        }
    }

    pub(crate) fn is_thumbnail(&self) -> bool {
        self.rest.starts_with("/thumbnail")
    }

    /// Returns whether the format depends on `Accept`.
    pub(crate) fn is_negotiated(&self) -> bool {
        self.rest.contains("format=auto")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::{MediaType, Version};

    fn request<'b>(target: &'b str, fields: &[(&'b str, &'b str)]) -> Option<FastRequest<'b>> {
        let fields = fields.iter().map(|(name, value)| (*name, value.as_bytes()));
        FastRequest::new("GET", target, Some(b"a"), fields)
    }

    #[test]
    fn an_image_is_found_in_its_addresses() {
        for (target, expected) in [
            ("/images/a", Some(("a", ""))),
            ("/images/a?v=1", Some(("a", "?v=1"))),
            ("/images/a.webp?w=64", Some(("a", ".webp?w=64"))),
            ("/images/a.b.jpg", Some(("a.b", ".jpg"))),
            ("/images/a/thumbnail", Some(("a", "/thumbnail"))),
            ("/images/a/thumbnail?v=1", Some(("a", "/thumbnail?v=1"))),
            ("/images/a/info", None),
            ("/images/a/thumbnail/b", None),
            ("/images/a#?v=1", None),
            ("/images/a?w=%36%34", None),
            ("/images/a?w=6+4", None),
            ("/placeholders/64x64", None),
        ] {
            let request = request(target, &[]).unwrap();
            let image = request.image().map(|it| (it.id, it.rest));
            assert_eq!(image, expected, "{target}");
        }
    }

    #[test]
    fn a_field_is_a_part_of_the_key_only_where_the_answer_depends_on_it() {
        let png = Metadata::new(Version::of(b"a"), MediaType::Png, 1, None);
        let mut svg = Metadata::new(Version::of(b"a"), MediaType::Svg, 1, None);
        svg.coded.push(svg.coded(crate::image::coding::Coding::Gzip, 1).into());
        let fields = [("accept", "image/webp"), ("accept-encoding", "br")];
        let key = |target: &str, original: &Metadata| {
            let request = request(target, &fields).unwrap();
            let (key, is_primary) = request.image().unwrap().key(original)?;
            Some((key.accept.is_some(), key.accept_encoding.is_some(), is_primary))
        };
        let (right, wrong) = (format!("/images/a?v={}", png.version), "0".repeat(32));
        assert_eq!(key("/images/a", &png), Some((false, false, true)));
        assert_eq!(key(&right, &png), Some((false, false, true)));
        assert_eq!(key(&format!("/images/a?v={wrong}"), &png), None);
        assert_eq!(key("/images/a?w=64", &png), Some((false, false, false)));
        assert_eq!(key("/images/a?format=auto", &png), Some((true, false, false)));
        assert_eq!(key("/images/a", &svg), Some((false, true, false)));
    }

    #[test]
    fn a_request_that_says_more_is_for_the_router() {
        for fields in [
            &[("range", "bytes=0-1")][..],
            &[("origin", "https://app.example")],
            &[("if-match", "\"x\"")],
            &[("if-modified-since", "x")],
            &[("accept", "image/webp"), ("accept", "image/png")],
        ] {
            assert!(request("/images/a", fields).unwrap().image().is_none(), "{fields:?}");
        }
        for (tag, validator) in [
            ("\"x\"", Some(Validator::Tag(b"\"x\""))),
            ("W/\"x\"", Some(Validator::Tag(b"\"x\""))),
            ("\"x\", \"y\"", None),
            ("*", None),
            ("x", None),
            ("\"", None),
        ] {
            let fields = [("if-none-match", tag)];
            assert_eq!(request("/images/a", &fields).unwrap().validator(), validator, "{tag}");
        }
    }
}
