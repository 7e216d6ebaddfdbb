//! The right to write, by a bearer token or by being on this machine.

use axum::body::Body;
use axum::http::header::{AUTHORIZATION, FORWARDED, HOST, ORIGIN, VIA};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Request};

use super::problem::{Problem, ProblemKind};
use crate::app::App;
use crate::server::peer::Peer;

/// Refuses a request that may not write. Clients with one of the tokens may (RFC 6750), or, without tokens, programs on
/// this machine.
pub(crate) fn check_write(app: &App, peer: Peer, request: &Request<Body>) -> Result<(), Problem> {
    if !app.settings.writes.enabled {
        let detail = "writes are switched off ([writes] enabled)";
        return Err(Problem::new(ProblemKind::ReadOnly, detail));
    }
    if !app.tokens.is_empty() {
        let (kind, detail) = match bearer(request.headers()) {
            Some(token) if app.tokens.contain(token) => return Ok(()),
            Some(_) => {
                (ProblemKind::InvalidToken, "the token must be one of those in [writes] tokens")
            }
            None => (
                ProblemKind::Unauthorised,
                "a write must have `Authorization: Bearer` and a token of [writes] tokens",
            ),
        };
        return Err(Problem::new(kind, detail));
    }
    if is_from_this_machine(peer, request) {
        return Ok(());
    }
    let detail = "without [writes] tokens, only programs on the server's own machine may write";
    Err(Problem::new(ProblemKind::NotFromHere, detail))
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

/// True for a connection from this machine to this machine. A page whose host name was made to resolve to this machine
/// still names itself in `Host` and `Origin` (DNS rebinding), and a proxy's clients may be anywhere.
fn is_from_this_machine(peer: Peer, request: &Request<Body>) -> bool {
    let headers = request.headers();
    // HTTP/2 names the host in `:authority`, HTTP/1 in `Host`.
    let host = headers.get(HOST).and_then(|host| host.to_str().ok()?.parse::<Authority>().ok());
    let local = host
        .as_ref()
        .or_else(|| request.uri().authority())
        .is_some_and(|host| matches!(host.host(), "localhost" | "127.0.0.1" | "[::1]"));
    let proxied = [FORWARDED.as_str(), VIA.as_str(), "x-forwarded-for", "x-real-ip"]
        .iter()
        .any(|name| headers.contains_key(*name));
    peer.is_loopback() && local && !proxied && !headers.contains_key(ORIGIN)
}
