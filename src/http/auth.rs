//! The rights to write and to list, by a bearer token, and what else may stand in for one: the session of the gallery, or the
//! address of a client on this machine.

use axum::body::Body;
use axum::http::header::{AUTHORIZATION, COOKIE, FORWARDED, HOST, ORIGIN, VIA};
use axum::http::{HeaderMap, HeaderValue, Request};

use super::host;
use super::problem::{Problem, ProblemKind};
use crate::app::App;
use crate::peer::Peer;
use crate::settings::PrefixAccess;

/// The token that a request shows (RFC 6750).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shown {
    Nothing,
    Valid,
    Invalid,
}

/// Refuses a request that may not write. Clients with a token may; with `[writes] local`, and without tokens in the settings,
/// programs on this machine as well.
///
/// No address, no `Host` and no missing header proves anything by itself: a proxy or a forwarder on this machine makes
/// everybody's requests look local.
pub(crate) fn check_write(app: &App, peer: Peer, request: &Request<Body>) -> Result<(), Problem> {
    if !app.settings.writes.enabled {
        let detail = "writes are switched off ([writes] enabled)";
        return Err(Problem::new(ProblemKind::ReadOnly, detail));
    }
    let shown = shown(app, request);
    let is_local_enough = app.settings.writes.local && !app.tokens.are_configured();
    if shown == Shown::Valid || (is_local_enough && is_from_this_machine(peer, request)) {
        return Ok(());
    }
    if is_local_enough && shown == Shown::Nothing {
        let detail = "without [writes] tokens, only programs on the server's own machine may write";
        return Err(Problem::new(ProblemKind::NotFromHere, detail));
    }
    Err(without_token(shown, "a write"))
}

/// Refuses a request that may not list the ids with a prefix.
///
/// A token is proof enough under any name. Everybody else must name a host of the server's own: a page whose name was made to
/// lead here could read what only this machine or this network should.
pub(crate) fn check_list(app: &App, request: &Request<Body>, prefix: &str) -> Result<(), Problem> {
    let access = app.settings.events.prefix;
    if access == PrefixAccess::Off {
        let detail = "images are followed by their ids alone ([events] prefix)";
        return Err(Problem::new(ProblemKind::ListingOff, detail));
    }
    let shown = shown(app, request);
    if shown == Shown::Valid {
        return Ok(());
    }
    if access == PrefixAccess::Open && !prefix.is_empty() {
        let host = host::host_of(request);
        let is_own = host.is_some_and(|host| host::is_own(host, &app.settings.http.hosts));
        return if is_own { Ok(()) } else { Err(Problem::misdirected()) };
    }
    Err(without_token(shown, "a prefix"))
}

/// Refuses a request that may not see what only those see who look after the images.
pub(crate) fn check_operator(app: &App, request: &Request<Body>) -> Result<(), Problem> {
    match shown(app, request) {
        Shown::Valid => Ok(()),
        shown => Err(without_token(shown, "this address")),
    }
}

/// Returns the session that belongs to the bearer token of a request.
pub(crate) fn begin_session(app: &App, request: &Request<Body>) -> Result<String, Problem> {
    let session = bearer(request.headers()).and_then(|token| app.tokens.session(token));
    session.ok_or_else(|| without_token(shown(app, request), "a session"))
}

fn without_token(shown: Shown, what: &str) -> Problem {
    let kind = match shown {
        Shown::Invalid => ProblemKind::InvalidToken,
        Shown::Nothing | Shown::Valid => ProblemKind::Unauthorised,
    };
    let detail = format!(
        "{what} needs `Authorization: Bearer` with a token: one of [writes] tokens, or else that of the file that the server names at its start"
    );
    Problem::new(kind, detail)
}

fn shown(app: &App, request: &Request<Body>) -> Shown {
    match bearer(request.headers()) {
        Some(token) if app.tokens.contain(token) => Shown::Valid,
        // Nobody has a valid one.
        Some(_) if app.tokens.is_empty() => Shown::Nothing,
        Some(_) => Shown::Invalid,
        None if has_session(app, request) => Shown::Valid,
        None => Shown::Nothing,
    }
}

/// Returns whether a request comes from the gallery of somebody with a token.
///
/// The cookie isn't sent by pages of another site, but by those of another port of the same host. So a request that changes
/// something must come from a page of this very origin.
fn has_session(app: &App, request: &Request<Body>) -> bool {
    let headers = request.headers();
    let name = session_cookie(headers);
    let session = headers.get_all(COOKIE).iter().find_map(|line| cookie(line, &name));
    let is_from_here = match headers.get("sec-fetch-site").map(HeaderValue::as_bytes) {
        Some(b"same-origin") => true,
        // Typed, or a link that somebody opened.
        Some(b"none") => request.method().is_safe(),
        Some(_) => false,
        // Browsers send it to addresses that they trust: over TLS, and on this machine.
        None => request.method().is_safe() || is_of_same_origin(headers),
    };
    is_from_here && session.is_some_and(|session| app.tokens.contain_session(session))
}

fn is_of_same_origin(headers: &HeaderMap) -> bool {
    let (Some(origin), Some(host)) = (headers.get(ORIGIN), headers.get(HOST)) else {
        return false;
    };
    let authority = origin.to_str().ok().and_then(|it| it.split_once("://"));
    authority.is_some_and(|(_, authority)| authority.as_bytes() == host.as_bytes())
}

/// Returns the name of the cookie with the session. Browsers send cookies to all ports of a host, and there may be a server on
/// several.
pub(crate) fn session_cookie(headers: &HeaderMap) -> String {
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
    let port = host
        .rsplit_once(':')
        .map(|(_, port)| port)
        .filter(|port| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()));
    port.map_or_else(|| "afterimage".to_owned(), |port| format!("afterimage_{port}"))
}

/// Returns the value of a cookie (RFC 6265 §4.2).
fn cookie<'a>(line: &'a HeaderValue, name: &str) -> Option<&'a [u8]> {
    let mut pairs = line.as_bytes().split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
    pairs.find_map(|pair| pair.strip_prefix(name.as_bytes())?.strip_prefix(b"="))
}

/// The bearer token, unless there is none or more than one `Authorization`.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut lines = headers.get_all(AUTHORIZATION).iter();
    let (Some(line), None) = (lines.next(), lines.next()) else {
        return None;
    };
    let (scheme, token) = line.as_bytes().split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then_some(token.trim_ascii())
}

/// True for a connection from this machine to this machine, as far as that can be told. A page whose host name was made to
/// resolve to this machine still names itself in `Host` and `Origin` (DNS rebinding), and a proxy's clients may be anywhere.
fn is_from_this_machine(peer: Peer, request: &Request<Body>) -> bool {
    let headers = request.headers();
    let local = host::host_of(request)
        .is_some_and(|host| matches!(host, "localhost" | "127.0.0.1" | "[::1]"));
    let proxied = [FORWARDED.as_str(), VIA.as_str(), "x-forwarded-for", "x-real-ip"]
        .iter()
        .any(|name| headers.contains_key(*name));
    peer.is_loopback() && local && !proxied && !headers.contains_key(ORIGIN)
}
