//! The reasons for relying on a tracking connection, and when they end.

use std::time::Duration;

use super::Lease;
use crate::clock::BootInstant;

/// Interval of heartbeats.
const HEARTBEAT: Duration = Duration::from_millis(250);

/// Validity of a heartbeat, counted from when it was sent: the next one must have been answered by then.
const LEASE: Duration = Duration::from_millis(500);

/// Time after which the connection is given up, if heartbeats aren't answered. A server that only paused for less answers
/// behind its pushes, so nothing known has to be fetched again.
pub(super) const GIVEN_UP: Duration = Duration::from_secs(1);

/// Longest pause of this process that goes unnoticed. After a longer one pushes may lie in the socket unread, so nothing is
/// current until a heartbeat that was sent afterwards has been answered: its answer lies behind them.
const PAUSE: Duration = Duration::from_millis(100);

/// Interval at which a new connection to the address is compared with the tracked server.
const VERIFY: Duration = Duration::from_secs(2);

/// Validity of a comparison. It is long, for where no new connection can be opened: a Redis that has too many clients goes on
/// serving those that it has.
const VERIFIED: Duration = Duration::from_mins(1);

/// Standing of a tracking connection: the reasons for relying on it, each with its time.
#[derive(Debug)]
pub(super) struct Standing {
    /// Time of the last tick.
    ticked: BootInstant,
    /// Time at which the last answered heartbeat was sent, and the earliest that counts.
    heard: BootInstant,
    heard_from: BootInstant,
    /// The same of the last comparison with where the address leads.
    verified: BootInstant,
    verified_from: BootInstant,
    /// Beginning of the time without a lease, if there is none.
    without_lease: Option<BootInstant>,
    not_verified: Option<String>,
}

impl Standing {
    pub(super) fn new(now: BootInstant) -> Standing {
        Standing {
            ticked: now,
            heard: now,
            heard_from: now,
            verified: now,
            verified_from: now,
            without_lease: None,
            not_verified: None,
        }
    }

    pub(super) fn heard(&mut self, sent: BootInstant) {
        self.heard = sent;
    }

    pub(super) fn verified(&mut self, began: BootInstant) {
        self.verified = began;
        self.not_verified = None;
    }

    pub(super) fn not_verified(&mut self, reason: String) {
        self.not_verified = Some(reason);
    }

    /// Notes that this process runs. An error says why the connection is given up.
    pub(super) fn tick(&mut self, now: BootInstant) -> Result<(), String> {
        let pause = now.since(self.ticked);
        self.ticked = now;
        if pause > PAUSE {
            self.heard_from = now;
            self.without_lease = Some(now);
        }
        // Long enough for the server to be replaced.
        if pause > GIVEN_UP {
            self.verified_from = now;
        }
        if self.lease(now).is_some() {
            self.without_lease = None;
            return Ok(());
        }
        let since = *self.without_lease.get_or_insert(now);
        if now.since(since) < GIVEN_UP {
            return Ok(());
        }
        Err(if now < self.heard + LEASE {
            let reason = self.not_verified.as_deref().unwrap_or("it doesn't answer");
            format!("no new connection to the address could be checked: {reason}")
        } else {
            format!("no heartbeat was answered within {GIVEN_UP:?}")
        })
    }

    /// The lease to announce, if the connection may be relied upon.
    pub(super) fn lease(&self, now: BootInstant) -> Option<Lease> {
        let is_heard = self.heard >= self.heard_from && now < self.heard + LEASE;
        let is_verified = self.verified >= self.verified_from && now < self.verified + VERIFIED;
        let end = (self.ticked + PAUSE).min(self.heard + LEASE);
        (is_heard && is_verified && now < end).then_some(Lease::Until(end))
    }

    pub(super) fn wants_heartbeat(&self, now: BootInstant, sent: BootInstant) -> bool {
        self.heard < self.heard_from || now.since(sent) >= HEARTBEAT
    }

    pub(super) fn wants_verification(&self, now: BootInstant, began: BootInstant) -> bool {
        now.since(began) >= VERIFY
            || (self.verified < self.verified_from && now.since(began) >= HEARTBEAT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;

    const MOMENT: Duration = Duration::from_millis(1);

    fn start() -> (Standing, BootInstant) {
        let now = Clock::default().now();
        (Standing::new(now), now)
    }

    /// Ticks every 20 ms for a while, without any other event.
    fn tick(standing: &mut Standing, mut now: BootInstant, duration: Duration) -> BootInstant {
        let end = now + duration;
        while now < end {
            now = now + Duration::from_millis(20);
            standing.tick(now).unwrap();
        }
        now
    }

    #[test]
    fn a_lease_ends_with_the_heartbeat_or_soon_after_the_last_tick() {
        let (mut standing, begin) = start();
        standing.tick(begin + MOMENT).unwrap();
        assert_eq!(standing.lease(begin + MOMENT), Some(Lease::Until(begin + MOMENT + PAUSE)));
        let now = tick(&mut standing, begin, Duration::from_millis(450));
        assert_eq!(standing.lease(now), Some(Lease::Until(begin + LEASE)));
        assert_eq!(standing.lease(begin + LEASE), None);
    }

    #[test]
    fn after_a_pause_only_a_later_heartbeat_counts() {
        let (mut standing, begin) = start();
        let awake = begin + PAUSE + MOMENT;
        standing.tick(awake).unwrap();
        assert_eq!(standing.lease(awake), None);
        // The answer to a heartbeat from before the pause proves nothing: pushes may lie behind it.
        standing.heard(begin + MOMENT);
        assert_eq!(standing.lease(awake), None);
        assert!(standing.wants_heartbeat(awake, begin + MOMENT));
        standing.heard(awake);
        assert!(standing.lease(awake + MOMENT).is_some());
    }

    #[test]
    fn after_a_long_pause_the_address_has_to_be_looked_at_again() {
        let (mut standing, begin) = start();
        let awake = begin + 2 * GIVEN_UP;
        standing.tick(awake).unwrap();
        standing.heard(awake);
        assert_eq!(standing.lease(awake), None);
        assert!(standing.wants_verification(awake, begin));
        standing.verified(awake);
        assert!(standing.lease(awake).is_some());
    }

    #[test]
    fn a_late_answer_renews_the_lease() {
        let (mut standing, begin) = start();
        let now = tick(&mut standing, begin, LEASE + Duration::from_millis(300));
        assert_eq!(standing.lease(now), None);
        standing.heard(begin + Duration::from_millis(600));
        assert!(standing.lease(now).is_some());
    }

    #[test]
    fn a_connection_without_answers_is_given_up() {
        let (mut standing, begin) = start();
        let now = tick(&mut standing, begin, Duration::from_millis(1440));
        let given_up = standing.tick(now + Duration::from_millis(80));
        assert!(given_up.unwrap_err().contains("no heartbeat"));
    }

    #[test]
    fn a_long_pause_of_this_process_is_not_the_servers_fault() {
        let (mut standing, begin) = start();
        standing.tick(begin + 100 * GIVEN_UP).unwrap();
    }

    #[test]
    fn an_address_that_cannot_be_looked_at_is_relied_upon_for_a_minute() {
        let (mut standing, mut now) = start();
        let begin = now;
        loop {
            now = now + Duration::from_millis(20);
            standing.heard(now);
            standing.not_verified("refused".to_owned());
            if let Err(reason) = standing.tick(now) {
                assert!(reason.contains("refused"), "{reason}");
                break;
            }
        }
        assert!(now.since(begin) >= VERIFIED && now.since(begin) < VERIFIED + 2 * GIVEN_UP);
    }
}
