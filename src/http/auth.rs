//! Authorisation: the peer of a connection, the bearer tokens of the settings, and the right to write.

use std::path::Path;

use anyhow::Context;
use axum::body::Body;
use axum::http::header::{AUTHORIZATION, FORWARDED, HOST, ORIGIN, VIA};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Request, StatusCode};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::problem::Problem;
use crate::app::App;
use crate::server::Peer;
use crate::settings;

/// Whether a request may write: by a bearer token (RFC 6750) where there are some; otherwise if it comes from a program
/// on this machine.
pub(crate) fn may_write(app: &App, peer: Peer, request: &Request<Body>) -> Result<(), Problem> {
    if !app.settings.writes.enabled {
        let detail = "writes are switched off ([writes] enabled)";
        return Err(Problem::new(StatusCode::FORBIDDEN, "read-only", "read only", detail));
    }
    if !app.writers.is_empty() {
        return match bearer(request.headers()) {
            Some(token) if app.writers.have(token) => Ok(()),
            Some(_) => Err(Problem::invalid_token("the token is none of those in [writes] tokens")),
            None => Err(Problem::unauthorised("writes need Authorization: Bearer and a token")),
        };
    }
    if is_from_this_machine(peer, request) {
        return Ok(());
    }
    let detail =
        "without [writes] tokens, writes are taken from programs on the server's own machine only";
    Err(Problem::new(StatusCode::FORBIDDEN, "not-from-here", "writes are local", detail))
}

/// The token of the one `Authorization` there is.
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let mut lines = headers.get_all(AUTHORIZATION).iter();
    let (Some(line), None) = (lines.next(), lines.next()) else {
        return None;
    };
    let (scheme, token) = line.as_bytes().split_at_checked("Bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then_some(token.trim_ascii())
}

/// A connection from this machine, for this machine: a page of another state that was made to resolve to
/// it still names itself in `Host` and `Origin`, and what came through a proxy came from anywhere.
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

/// The tokens of those who may write.
///
/// They are kept and compared as their SHA-256, all of them each time: how long that takes tells nothing of a token, not
/// even its length.
#[derive(Default)]
pub struct Writers(Vec<[u8; 32]>);

impl Writers {
    /// Those of the settings and of the file that they name.
    pub fn load(settings: &settings::WriteSettings) -> anyhow::Result<Writers> {
        let tokens = tokens(settings)?;
        Ok(Writers(tokens.iter().map(|token| Sha256::digest(token.reveal()).into()).collect()))
    }

    /// Whether there are none, so that only programs on this machine may write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a token is one of theirs.
    #[must_use]
    pub fn have(&self, token: &[u8]) -> bool {
        let given: [u8; 32] = Sha256::digest(token).into();
        self.0.iter().fold(Choice::from(0), |found, it| found | it.ct_eq(&given)).into()
    }
}

/// Says how many there are.
impl std::fmt::Debug for Writers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Writers({})", self.0.len())
    }
}

/// The tokens of the settings and of the file that they name.
pub fn tokens(settings: &settings::WriteSettings) -> anyhow::Result<Vec<settings::Token>> {
    let mut tokens = settings.tokens.clone();
    if !settings.tokens_file.as_os_str().is_empty() {
        tokens.extend(read(&settings.tokens_file)?);
        anyhow::ensure!(
            !tokens.is_empty(),
            "{} has no token ([writes] tokens_file)",
            settings.tokens_file.display()
        );
    }
    Ok(tokens)
}

fn read(file: &Path) -> anyhow::Result<Vec<settings::Token>> {
    let place = || format!("{} ([writes] tokens_file)", file.display());
    let text = std::fs::read_to_string(file).with_context(place)?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines
        .map(|line| settings::Token::parse(line).map_err(anyhow::Error::msg))
        .collect::<Result<_, _>>()
        .with_context(place)
}
