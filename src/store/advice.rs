//! The log of a Redis that can't be relied on: what is wrong with which one, and what to try. Repeated, since people look at the
//! end of a log.

use std::time::Duration;

use tokio::time::Instant;

use super::Coherence;

/// Interval at which the same reason is logged again.
const REPEATED: Duration = Duration::from_mins(1);

/// Advice to operators, by a text in the reason.
const ADVICE: [(&[&str], &str); 11] = [
    (
        &["Connection refused", "No such file"],
        "start Redis there, or set [redis] url (REDIS_URL, --redis) to where it runs",
    ),
    (
        &["lookup", "Name or service not known", "nodename"],
        "check the name of the host in [redis] url (REDIS_URL)",
    ),
    (
        &["WRONGPASS", "NOAUTH", "AuthenticationFailed", "Password authentication"],
        "put user and password into [redis] url: redis://user:password@host:6379",
    ),
    (
        &["DB index"],
        "the number at the end of [redis] url must be below the `databases` of that Redis, 16 by default",
    ),
    (
        &["DENIED", "protected mode"],
        "Redis takes no other machines: set a password there (requirepass) or bind it to the right address",
    ),
    (
        &["max number of clients", "MISCONF", "OOM"],
        "look into Redis: its own limit or its disk is in the way",
    ),
    (
        &["NOPERM", "doesn't permit", "must be allowed"],
        "give the user the rights that docs/coherence.md lists (ACL SETUSER)",
    ),
    (
        &["certificate", "TLS", "tls", "UnknownIssuer"],
        "check [redis] tls_ca_file, and that rediss:// is right for this port",
    ),
    (
        &["loading", "LOADING", "BUSY"],
        "wait: Redis answers once it has loaded its data or ended its script",
    ),
    (&["replica", "READONLY", "primary"], "set [redis] url to the primary: replicas may be behind"),
    (
        &["in time", "timed out", "TimedOut", "No route to host", "unreachable network"],
        "check the host and port in [redis] url, firewalls between, and whether Redis is overloaded",
    ),
];

/// Logs why a Redis can't be relied on: each reason once, and again while it lasts.
#[derive(Debug)]
pub(super) struct OutageLog {
    /// The address of the Redis, without its password.
    address: String,
    /// Set if it is expected to push its changes.
    is_on: bool,
    last: Option<(Coherence, Instant)>,
}

impl OutageLog {
    pub(super) fn new(address: String, is_on: bool) -> OutageLog {
        OutageLog { address, is_on, last: None }
    }

    /// Logs the state, unless it was logged just now.
    pub(super) fn tell(&mut self, coherence: &Coherence, now: Instant) {
        if !self.is_news(coherence, now) {
            return;
        }
        let (redis, state, reason) = (&self.address, coherence.name(), coherence.reason());
        let try_this = advice(reason.unwrap_or_default());
        match coherence {
            Coherence::Unreachable(_) => {
                tracing::warn!(redis, state, reason, try_this, "redis can't be used");
            }
            _ if self.is_on => {
                tracing::warn!(
                    redis,
                    state,
                    reason,
                    try_this,
                    "not coherent: every request asks redis"
                );
            }
            _ => tracing::info!(redis, state, reason, "not coherent: every request asks redis"),
        }
        self.last = Some((coherence.clone(), now));
    }

    fn is_news(&self, coherence: &Coherence, now: Instant) -> bool {
        self.last.as_ref().is_none_or(|(last, at)| {
            last != coherence || (self.is_on && now.duration_since(*at) >= REPEATED)
        })
    }

    /// The Redis can be relied on.
    pub(super) fn end(&mut self) {
        self.last = None;
    }
}

fn advice(reason: &str) -> Option<&'static str> {
    let of = |(texts, _): &&(&[&str], &str)| texts.iter().any(|text| reason.contains(text));
    ADVICE.iter().find(of).map(|(_, advice)| *advice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_told_again_after_a_minute() {
        let mut log = OutageLog::new("redis://127.0.0.1".to_owned(), true);
        let state = Coherence::Unreachable("Connection refused".into());
        let began = Instant::now();
        assert!(log.is_news(&state, began));
        log.tell(&state, began);
        assert!(!log.is_news(&state, began + REPEATED / 2));
        assert!(log.is_news(&state, began + REPEATED));
        assert!(log.is_news(&Coherence::Unreachable("NOAUTH".into()), began));
        log.end();
        assert!(log.is_news(&state, began));
    }

    #[test]
    fn there_is_advice_for_the_usual_mistakes() {
        assert!(advice("Connection refused (os error 111)").unwrap().contains("start Redis"));
        assert!(advice("WRONGPASS invalid username-password pair").unwrap().contains("password"));
        assert_eq!(advice("something new"), None);
    }
}
