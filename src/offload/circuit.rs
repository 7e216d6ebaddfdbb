//! The object store's availability. It is known in one place: writes, reads, moves and sweeps ask it, and whoever finds the
//! store away tells all others.
//!
//! ```text
//!   no answer within the time-out, and none to anybody else since ──▶ away
//!   any other failure: perhaps of this object alone ──▶ probe fails ──▶ away
//!   away: everything fails at once, what was waiting too; a probe after 0.5 s, 1 s, … 10 s succeeds ──▶ back
//! ```
//!
//! A probe lists, which may work while uploads don't. So uploads that fail are counted as well: while the last one
//! has failed, only the mover uploads, and no writer waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use super::Offload;
use crate::task::jittered;

/// Pauses between probes while the store is away: the first, doubled with each failure up to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LAST_PAUSE: Duration = Duration::from_secs(10);

/// Least time between two probes of a store that answers.
const BETWEEN_PROBES: Duration = Duration::from_secs(1);

/// The object store is known to be away.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the object store is away: {reason}")]
pub struct Away {
    /// Names no host and no secret.
    pub(super) reason: Arc<str>,
    since: Instant,
    /// Time of the next probe.
    retry_at: Instant,
}

impl Away {
    /// Time until the next probe.
    pub(super) fn retry_after(&self) -> Duration {
        self.retry_at.saturating_duration_since(Instant::now())
    }
}

/// Availability of the object store.
#[derive(Debug)]
pub(super) struct Circuit {
    /// The address of the store, for the log.
    url: String,
    state: watch::Sender<State>,
    /// Notified when a failure calls for a probe.
    suspected: Notify,
    /// Failed uploads since the last one that succeeded.
    failed_uploads: AtomicU32,
}

#[derive(Debug)]
struct State {
    away: Option<Away>,
    /// Time of the last success.
    answered: Instant,
}

impl Circuit {
    pub(super) fn new(url: String) -> Circuit {
        let state = State { away: None, answered: Instant::now() };
        Circuit {
            url,
            state: watch::Sender::new(state),
            suspected: Notify::new(),
            failed_uploads: AtomicU32::new(0),
        }
    }

    /// Returns the reason for which the store can't be used, unless it can.
    pub(super) fn away(&self) -> Option<Away> {
        self.state.borrow().away.clone()
    }

    /// Waits until the store is known to be away.
    pub(super) async fn until_away(&self) -> Away {
        let mut state = self.state.subscribe();
        loop {
            if let Some(away) = state.borrow_and_update().away.clone() {
                return away;
            }
            // The sender lives as long as `self`.
            let _ = state.changed().await;
        }
    }

    /// Waits while the store is known to be away.
    pub(super) async fn until_back(&self) {
        let _ = self.state.subscribe().wait_for(|state| state.away.is_none()).await;
    }

    /// Notes a success.
    pub(super) fn note_answer(&self) {
        self.state.send_if_modified(|state| {
            state.answered = Instant::now();
            false
        });
    }

    /// Notes a failure that may be one of the store or of one object. A probe will tell.
    pub(super) fn note_failure(&self) {
        self.suspected.notify_one();
    }

    /// Notes that no answer came within `limit`.
    pub(super) fn note_silence(&self, limit: Duration) {
        if let Some(reason) = self.silence(limit) {
            self.open(&reason, FIRST_PAUSE);
        }
        self.suspected.notify_one();
    }

    /// Describes a silence of `limit`, unless somebody else was answered meanwhile.
    fn silence(&self, limit: Duration) -> Option<String> {
        let is_silent = self.state.borrow().answered.elapsed() >= limit;
        is_silent.then(|| format!("it didn't answer within {limit:?}"))
    }

    /// Notes the outcome of an upload.
    pub(super) fn note_upload(&self, is_done: bool) {
        if is_done {
            self.failed_uploads.store(0, Ordering::Relaxed);
        } else {
            self.failed_uploads.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns the number of uploads that failed since the last one that succeeded.
    pub(super) fn failed_uploads(&self) -> u32 {
        self.failed_uploads.load(Ordering::Relaxed)
    }

    fn open(&self, reason: &str, pause: Duration) {
        let now = Instant::now();
        let mut is_new = false;
        self.state.send_modify(|state| {
            is_new = state.away.is_none();
            let since = state.away.as_ref().map_or(now, |away| away.since);
            state.away = Some(Away { reason: reason.into(), since, retry_at: now + pause });
        });
        if is_new {
            let url = &self.url;
            tracing::warn!(
                url,
                "the object store can't be used, so images stay in their records: {reason}"
            );
        }
    }

    fn close(&self) {
        let mut ended = None;
        self.state.send_if_modified(|state| {
            state.answered = Instant::now();
            ended = state.away.take();
            ended.is_some()
        });
        if let Some(away) = ended {
            let away_s = away.since.elapsed().as_secs_f64();
            tracing::info!(url = self.url, away_s, "the object store can be used again");
        }
    }
}

/// Probes the store: at the start, after a failure, and while it is away.
pub(super) async fn run(offload: &Offload) {
    let circuit = &offload.circuit;
    let mut failures = 0;
    loop {
        match offload.probe().await {
            Ok(()) => {
                failures = 0;
                circuit.close();
                tokio::time::sleep(BETWEEN_PROBES).await;
                circuit.suspected.notified().await;
            }
            Err(reason) => {
                let pause = pause(FIRST_PAUSE, failures, LAST_PAUSE);
                failures += 1;
                circuit.open(&reason, pause);
                tokio::time::sleep(pause).await;
            }
        }
    }
}

/// Returns the pause after a number of failures, with some chance in it.
pub(super) fn pause(first: Duration, failures: u32, last: Duration) -> Duration {
    jittered(first.saturating_mul(2_u32.saturating_pow(failures)).min(last))
}

impl Offload {
    /// Lists a folder that has nothing, which costs nobody anything. Returns what is wrong and what would be right.
    async fn probe(&self) -> Result<(), String> {
        let limit = self.read_timeout();
        // No id begins with a dot.
        let nothing = self.folder.clone().join(".probe");
        let mut objects = self.store.list(Some(&nothing));
        match tokio::time::timeout(limit, objects.next()).await {
            Ok(Some(Err(error))) => Err(explain(&error)),
            Ok(Some(Ok(_)) | None) => Ok(()),
            Err(_elapsed) => self.circuit.silence(limit).map_or(Ok(()), Err),
        }
    }
}

/// Explains an error without the answer's body and the address: a body may repeat the access key, and strangers may read
/// the text in `/readyz`.
pub(super) fn explain(error: &object_store::Error) -> String {
    let text = error.to_string();
    let between = |start: &str, end: char| {
        let (_, rest) = text.split_once(start)?;
        let (found, _) = rest.split_once(end)?;
        Some(found.trim())
    };
    // As the object_store crate writes it: kinds of errors get lost when a bucket is listed.
    let status = between("status code: ", ':');
    let is_word =
        |code: &&str| code.len() <= 64 && code.bytes().all(|it| it.is_ascii_alphanumeric());
    let code = between("<Code>", '<').filter(is_word);
    let said = [status, code].into_iter().flatten().collect::<Vec<_>>().join(", ");
    let number = status.and_then(|it| it.get(..3)).unwrap_or_default();
    match (number, code) {
        (_, Some("AuthorizationHeaderMalformed" | "PermanentRedirect")) | ("301" | "307", _) => {
            format!("the bucket is in another region ({said}): set `region` in [offload] options")
        }
        (_, Some("NoSuchBucket" | "ContainerNotFound")) | ("404", _) => {
            format!("there is no such bucket ({said}): create it, or correct [offload] url")
        }
        ("401" | "403", _) => format!(
            "the credentials are refused ({said}): they must be valid, and may list, read, write and delete beneath [offload] url"
        ),
        ("", _) if text.contains("redirect without LOCATION") => {
            "the bucket is in another region: set `region` in [offload] options".to_owned()
        }
        ("", _) => {
            let innermost =
                std::iter::successors(Some(error as &dyn std::error::Error), |it| it.source());
            let innermost = innermost.last().map(ToString::to_string).unwrap_or_default();
            // An error of the crate's own may have the address in it.
            let cause = Some(innermost).filter(|it| it.len() <= 100 && !it.contains("://"));
            let cause = cause.map(|it| format!(" ({it})")).unwrap_or_default();
            format!(
                "it can't be reached{cause}: check [offload] url, and `endpoint` in [offload] options"
            )
        }
        _ => format!("it answers {said}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(text: &str) -> object_store::Error {
        object_store::Error::Generic { store: "S3", source: text.into() }
    }

    #[test]
    fn an_explanation_has_no_address_and_no_key() {
        let body =
            "<Error><Code>InvalidAccessKeyId</Code><AWSAccessKeyId>AKIA1</AWSAccessKeyId></Error>";
        for (text, explained) in [
            (
                format!("Error performing GET http://s3.example/b in 1ms - Server returned non-2xx status code: 403 Forbidden: {body}"),
                "the credentials are refused (403 Forbidden, InvalidAccessKeyId)",
            ),
            (
                "Server returned non-2xx status code: 404 Not Found: <Code>NoSuchBucket</Code>".into(),
                "there is no such bucket (404 Not Found, NoSuchBucket)",
            ),
            (
                "Server returned non-2xx status code: 400 Bad Request: <Code>AuthorizationHeaderMalformed</Code>".into(),
                "the bucket is in another region (400 Bad Request, AuthorizationHeaderMalformed)",
            ),
            ("Server returned non-2xx status code: 500 Internal Server Error: ".into(), "it answers 500"),
            ("error sending request for url (http://s3.example/b)".into(), "it can't be reached:"),
            ("Connection refused".into(), "it can't be reached (Connection refused):"),
        ] {
            let text = explain(&failed(&text));
            assert!(text.starts_with(explained), "{text}");
            assert!(!text.contains("AKIA") && !text.contains("s3.example"), "{text}");
        }
    }

    #[test]
    fn silence_counts_only_if_nobody_else_was_answered_meanwhile() {
        let circuit = Circuit::new("s3://a".into());
        circuit.note_silence(Duration::from_mins(1));
        assert!(circuit.away().is_none());
        circuit.note_silence(Duration::ZERO);
        assert!(circuit.away().is_some());
        circuit.close();
        assert!(circuit.away().is_none());
    }
}
