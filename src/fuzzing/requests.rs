//! The beginning of a connection: heads of HTTP/1, and the PROXY header.

use std::convert::Infallible;
use std::io::Cursor;
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Mutex;
use std::task::{Context, Waker};

use axum::body::Body;
use axum::http::{Request, Response};
use futures_util::FutureExt;
use http_body::Body as HttpBody;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;

use super::settings::{proxies, value};
use crate::http::fast_path::FastRequest;
use crate::http::forwarded;
use crate::http::host::check_host;
use crate::http::service::trace_fields;
use crate::image::ImageId;
use crate::limit::HeadLimits;
use crate::peer::Peer;
use crate::server::h1::{LARGEST_HEAD, MOST_FIELDS, fast_request, mend_request_line};
use crate::server::{builder, proxy_protocol as proxy};
use crate::trace::TraceContext;

/// The limits of the library.
const LIMITS: &str = "{ fetch_bytes = '1MiB', write_bytes = '1MiB', waiters = 1, renders = 1, connections = 1, \
                      h2_streams = 1, requests = 1, answers = 1, header_bytes = '32KiB' }";

/// The request behind the one that is looked at.
const NEXT: &[u8] = b"GET /next HTTP/1.1\r\nHost: next\r\n\r\n";

/// A request that the fast loop takes means the same to the HTTP library, which goes on with the connection behind it.
pub fn h1_head(data: &[u8]) {
    let mut bytes = data[..data.len().min(LARGEST_HEAD)].to_vec();
    let mut fields = [const { MaybeUninit::uninit() }; MOST_FIELDS];
    if matches!(fast_request(&bytes, &mut fields), Err(httparse::Error::Version)) {
        mend_request_line(&mut bytes);
    }
    let mut fields = [const { MaybeUninit::uninit() }; MOST_FIELDS];
    let Ok(Some((fast, fields, length))) = fast_request(&bytes, &mut fields) else { return };
    let routed = fast.to_request(fields);
    if fast.image().is_some_and(|it| ImageId::parse(it.id).is_ok()) {
        assert!(routed.is_some(), "a cached head answers what the router can't be asked");
    }
    let Some(routed) = routed else { return };

    // As it is handed over.
    let mut head = bytes[..length].to_vec();
    mend_request_line(&mut head);
    let mut requests = by_library(&[&head, NEXT].concat()).into_iter();
    let (request, has_body) = requests.next().expect("the library refuses a fast request");
    let (next, _) = requests.next().expect("the library ends the connection behind a fast request");
    assert_eq!(next.uri(), "/next", "the library sees another end of the head");
    assert!(!has_body, "the library sees a body");
    assert_eq!(request.method(), routed.method());
    assert_eq!(request.uri(), routed.uri());
    assert_eq!(request.version(), routed.version());
    assert_eq!(request.headers(), routed.headers());
    check_checked(&fast, &request);
}

/// Compares a fast request with the same one of the library's, in everything that an answer depends on.
fn check_checked(fast: &FastRequest<'_>, request: &Request<Body>) {
    let (any, proxies) = (value("[]"), proxies());
    assert_eq!(fast.has_answered_host(&any), check_host(request).is_ok(), "one refuses the host");
    let checked = FastRequest::of_checked(request).expect("the library's request is no fast one");
    // The index knows no others.
    if let Some(image) = fast.image().filter(|it| ImageId::parse(it.id).is_ok()) {
        assert_eq!(format!("{image:?}"), format!("{:?}", checked.image().expect("an image")));
    }
    assert_eq!(fast.validator(), checked.validator());
    assert_eq!(fast.request_id, checked.request_id);
    assert_eq!((fast.referer, fast.user_agent), (checked.referer, checked.user_agent));
    let trace = fast.traceparent.and_then(TraceContext::parse);
    assert_eq!(trace, trace_fields(request.headers()).0);
    for address in ["127.0.0.1:9", "192.0.2.1:9"] {
        let peer = Peer::Tcp(address.parse().expect("an address"));
        if let Some(client) = fast.client(peer, &proxies) {
            assert_eq!(client, forwarded::client(peer, &proxies, request.headers()));
        }
    }
}

/// Reads requests by the HTTP library. Tells of each whether it has a body.
fn by_library(bytes: &[u8]) -> Vec<(Request<Body>, bool)> {
    let requests = Mutex::new(Vec::new());
    let service = service_fn(|request: Request<Incoming>| {
        let has_body = !request.body().is_end_stream();
        let request = (request.map(|_| Body::empty()), has_body);
        requests.lock().expect("no thread panics").push(request);
        async { Ok::<_, Infallible>(Response::new(Body::empty())) }
    });
    let io = tokio::io::join(Cursor::new(bytes.to_vec()), tokio::io::sink());
    let library = builder(&HeadLimits::new(&value(LIMITS)));
    let mut connection = pin!(library.serve_connection(TokioIo::new(io), service));
    let mut context = Context::from_waker(Waker::noop());
    // It yields now and then, but waits for nothing.
    for _ in 0..64 {
        if connection.as_mut().poll(&mut context).is_ready() {
            break;
        }
    }
    let mut requests = requests.lock().expect("no thread panics");
    std::mem::take(&mut requests)
}

/// A PROXY header is read to its end and no further, and names the client that it was written for.
pub fn proxy_protocol(data: &[u8]) {
    let Some((client, length)) = read_proxy(data) else { return };
    for cut in [0, 1, length / 2, length - 1] {
        assert!(read_proxy(&data[..cut]).is_none(), "a part of a header is no header");
    }
    assert_eq!(read_proxy(&[&data[..length], b"\r\n"].concat()), Some((client, length)));
    let Some(client) = client else { return };
    let family = if client.is_ipv4() { "TCP4" } else { "TCP6" };
    let (ip, port) = (client.ip(), client.port());
    let line = format!("PROXY {family} {ip} {ip} {port} 443\r\n");
    assert_eq!(read_proxy(line.as_bytes()), Some((Some(client), line.len())));
}

/// Reads a PROXY header. Returns the client that it names, if it names one, and its length.
fn read_proxy(data: &[u8]) -> Option<(Option<SocketAddr>, usize)> {
    let mut rest = data;
    let client = proxy::read(&mut rest).now_or_never().expect("bytes are read at once").ok()?;
    Some((client, data.len() - rest.len()))
}
