//! The right to write, by a bearer token or by being on this machine.

use std::fmt;
use std::path::Path;

use anyhow::Context;
use axum::body::Body;
use axum::http::header::{AUTHORIZATION, FORWARDED, HOST, ORIGIN, VIA};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, Request};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::problem::{Problem, ProblemKind};
use crate::server::Peer;
use crate::settings;

/// The right to write: that of clients with one of the tokens (RFC 6750), or, without tokens, of programs on this
/// machine.
///
/// Tokens are kept and compared as their SHA-256, and always all of them: the time of a comparison tells nothing about
/// a token, not even its length.
pub struct WriteAccess {
    enabled: bool,
    tokens: Vec<[u8; 32]>,
}

impl WriteAccess {
    /// Reads the tokens of the settings and of the file that they name.
    pub fn load(settings: &settings::WriteSettings) -> anyhow::Result<WriteAccess> {
        let tokens = tokens(settings)?;
        let tokens = tokens.iter().map(|token| Sha256::digest(token.reveal()).into()).collect();
        Ok(WriteAccess { enabled: settings.enabled, tokens })
    }

    /// Refuses a request that may not write.
    pub(crate) fn check(&self, peer: Peer, request: &Request<Body>) -> Result<(), Problem> {
        if !self.enabled {
            let detail = "writes are switched off ([writes] enabled)";
            return Err(Problem::new(ProblemKind::ReadOnly, detail));
        }
        if !self.tokens.is_empty() {
            let (kind, detail) = match bearer(request.headers()) {
                Some(token) if self.has(token) => return Ok(()),
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

    fn has(&self, token: &[u8]) -> bool {
        let given: [u8; 32] = Sha256::digest(token).into();
        self.tokens.iter().fold(Choice::from(0), |found, it| found | it.ct_eq(&given)).into()
    }
}

/// Shows the number of tokens, not the tokens.
impl fmt::Debug for WriteAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteAccess")
            .field("enabled", &self.enabled)
            .field("tokens", &self.tokens.len())
            .finish()
    }
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

/// Reads the tokens of the settings and of the file that they name.
pub fn tokens(settings: &settings::WriteSettings) -> anyhow::Result<Vec<settings::Token>> {
    let mut tokens = settings.tokens.clone();
    if !settings.tokens_file.as_os_str().is_empty() {
        tokens.extend(read(&settings.tokens_file)?);
        anyhow::ensure!(
            !tokens.is_empty(),
            "{} must have at least one token ([writes] tokens_file)",
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
