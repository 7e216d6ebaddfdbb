//! The index, rule by rule.

use futures_util::FutureExt;

use super::*;
use crate::image::MediaType;

type TestIndex = Arc<Index<u32>>;

fn limits() -> IndexLimits {
    IndexLimits {
        entries: NonZeroUsize::new(3).unwrap(),
        absent: NonZeroUsize::new(2).unwrap(),
        waiters: 2,
        fetches: 1000,
        serve_stale_for: Duration::from_mins(10),
    }
}

fn index() -> TestIndex {
    Arc::new(Index::new(limits()))
}

fn coherent() -> TestIndex {
    let index = index();
    index.apply(tracked(1));
    index
}

fn now() -> BootInstant {
    Clock::default().now()
}

fn id(text: &str) -> ImageId {
    ImageId::parse(text).unwrap()
}

fn tracked(connection: u64) -> Change {
    Change::TrackingStarted { connection, lease: Lease::Endless }
}

fn lost(connection: u64, coherence: Coherence) -> Change {
    Change::TrackingLost { connection, last_heard: now(), coherence }
}

fn unverified() -> Coherence {
    Coherence::Unverified("test".into())
}

fn unreachable() -> Coherence {
    Coherence::Unreachable("test".into())
}

fn present(version: &str) -> FetchResult {
    let metadata = Metadata::new(Version::of(version.as_bytes()), MediaType::Png, 1, None);
    FetchResult {
        known: Known::Present(Arc::new(metadata)),
        digest: Some(Digest::of(version.as_bytes())),
        expires: None,
    }
}

fn look_up(index: &TestIndex, name: &str) -> Lookup<u32> {
    index.look_up(&id(name)).expect("the lease holds")
}

fn lead(index: &TestIndex, name: &str) -> FetchLease<u32> {
    match look_up(index, name) {
        Lookup::Ask(Admission::Lead(lease)) => lease,
        other => panic!("expected to lead: {other:?}"),
    }
}

fn fetch(index: &TestIndex, name: &str, found: FetchResult) {
    let mut lease = lead(index, name);
    lease.keep(found);
    lease.complete(0);
}

fn is_current(index: &TestIndex, name: &str, version: &str) -> bool {
    matches!(look_up(index, name), Lookup::Current(Known::Present(metadata))
        if metadata.version == Version::of(version.as_bytes()))
}

#[test]
fn what_was_fetched_while_coherent_is_current() {
    let index = coherent();
    fetch(&index, "a", present("1"));
    assert!(is_current(&index, "a", "1"));
    fetch(&index, "b", FetchResult { known: Known::Absent, digest: None, expires: None });
    assert!(matches!(look_up(&index, "b"), Lookup::Current(Known::Absent)));
}

#[tokio::test]
async fn without_a_sign_of_life_nothing_is_current_until_the_next_one() {
    let index = index();
    let over = Lease::Until(now());
    let later = Lease::Until(now() + Duration::from_mins(1));
    index.apply(Change::TrackingStarted { connection: 1, lease: later });
    fetch(&index, "a", present("1"));
    assert!(is_current(&index, "a", "1"));
    index.apply(Change::Heartbeat { connection: 1, lease: over, round_trip: Duration::ZERO });
    let renewal = index.look_up(&id("a")).expect_err("the lease is over");
    index.apply(Change::Heartbeat { connection: 1, lease: later, round_trip: Duration::ZERO });
    renewal.await;
    assert!(is_current(&index, "a", "1"));
    // Of another connection, it says nothing.
    index.apply(Change::Heartbeat { connection: 0, lease: over, round_trip: Duration::ZERO });
    assert!(is_current(&index, "a", "1"));
}

#[test]
fn a_fetch_that_is_not_kept_still_tells_that_an_older_entry_is_out_of_date() {
    let index = coherent();
    fetch(&index, "a", present("1"));
    fetch(&index, "b", present("1"));
    index.apply(lost(1, unverified()));
    let (mut new, mut same) = (lead(&index, "a"), lead(&index, "b"));
    index.apply(tracked(2));
    new.keep(present("2"));
    same.keep(present("1"));
    index.apply(lost(2, unreachable()));
    assert!(index.last_known(&id("a")).is_none());
    assert!(index.last_known(&id("b")).is_some());
}

#[tokio::test]
async fn who_waits_is_told_when_the_store_is_unreachable() {
    let index = coherent();
    let waiting = tokio::spawn({
        let index = Arc::clone(&index);
        async move { index.until_unreachable().await }
    });
    index.apply(lost(1, unverified()));
    tokio::task::yield_now().await;
    assert!(!waiting.is_finished());
    index.apply(Change::Probed(unreachable()));
    waiting.await.unwrap();
}

#[test]
fn what_was_fetched_while_unverified_is_never_current() {
    let index = index();
    fetch(&index, "a", present("1"));
    lead(&index, "a");
    index.apply(tracked(1));
    lead(&index, "a");
}

#[test]
fn a_change_drops_what_is_known_of_its_key_alone() {
    let index = coherent();
    fetch(&index, "a", present("1"));
    fetch(&index, "b", present("1"));
    index.apply(Change::Invalidated(id("a")));
    lead(&index, "a");
    assert!(is_current(&index, "b", "1"));
}

#[test]
fn a_change_voids_and_detaches_the_fetch_under_way() {
    let index = coherent();
    let mut first = lead(&index, "a");
    index.apply(Change::Invalidated(id("a")));
    // A request after the change doesn't join the fetch from before.
    let mut second = lead(&index, "a");
    second.keep(present("new"));
    second.complete(2);
    assert!(is_current(&index, "a", "new"));
    // And its outcome, arriving last, isn't kept.
    first.keep(present("new"));
    first.complete(1);
    assert!(is_current(&index, "a", "new"));
}

/// Two GETs over two connections may be executed in either order. Who has seen the newer result must not be given the older.
#[test]
fn a_result_that_is_not_kept_ends_another_one_that_is_or_will_be() {
    let index = coherent();
    for later in [false, true] {
        let mut first = lead(&index, "a");
        first.mark_sent().now_or_never().unwrap();
        index.apply(Change::Invalidated(id("a")));
        let mut second = lead(&index, "a");
        second.mark_sent().now_or_never().unwrap();
        if later {
            second.keep(present("old"));
            second.complete(2);
            first.keep(present("new"));
            first.complete(1);
        } else {
            first.keep(present("new"));
            first.complete(1);
            // Nobody joins the second from now on, and it isn't kept.
            let mut third = lead(&index, "a");
            second.keep(present("old"));
            second.complete(2);
            third.mark_sent().now_or_never().unwrap();
        }
        lead(&index, "a");
        index.apply(Change::Flushed);
    }
}

#[test]
fn without_the_guard_the_old_value_stays_for_ever() {
    let index: TestIndex = Arc::new(Index::with_rules(
        limits(),
        Rules::without(Rule::PushInvalidatesFetch),
        Clock::default(),
    ));
    index.apply(tracked(1));
    let mut first = lead(&index, "a");
    index.apply(Change::Invalidated(id("a")));
    first.keep(present("old"));
    first.complete(1);
    assert!(is_current(&index, "a", "old"));
}

#[test]
fn a_change_of_everything_drops_all_and_voids_all() {
    let index = coherent();
    fetch(&index, "a", present("1"));
    let mut under_way = lead(&index, "b");
    index.apply(Change::Flushed);
    under_way.keep(present("1"));
    under_way.complete(1);
    lead(&index, "a");
    lead(&index, "b");
    assert!(index.is_empty());
}

#[test]
fn epochs_in_which_nothing_was_kept_do_not_push_out_the_end_of_a_real_one() {
    let index = coherent();
    fetch(&index, "a", present("1"));
    for connection in 2..200 {
        index.apply(lost(connection - 1, unverified()));
        index.apply(tracked(connection));
    }
    index.apply(lost(199, unreachable()));
    let long_ago = index.state.lock().unwrap().ended.front().map(|(epoch, _)| *epoch);
    assert_eq!(long_ago, Some(1));
    assert!(index.last_known(&id("a")).is_some());
}

#[test]
fn a_fetch_from_before_tracking_is_not_kept() {
    let index = index();
    let mut early = lead(&index, "a");
    index.apply(tracked(1));
    early.keep(present("1"));
    early.complete(1);
    lead(&index, "a");
}

#[test]
fn losing_the_connection_makes_everything_unverified_at_once_and_for_good() {
    let index = coherent();
    fetch(&index, "a", present("1"));
    let mut under_way = lead(&index, "b");
    index.apply(lost(1, unverified()));
    lead(&index, "a");
    index.apply(tracked(2));
    lead(&index, "a");
    under_way.keep(present("1"));
    under_way.complete(1);
    lead(&index, "b");
}

#[test]
fn a_connection_that_was_lost_before_it_was_announced_makes_nothing_coherent() {
    let index = index();
    index.apply(lost(1, unverified()));
    index.apply(tracked(1));
    assert_eq!(index.coherence(), unverified());
    index.apply(tracked(2));
    assert_eq!(index.coherence(), Coherence::Coherent);
}

#[test]
fn the_late_loss_of_an_old_connection_means_nothing() {
    let index = coherent();
    index.apply(tracked(2));
    fetch(&index, "a", present("1"));
    index.apply(lost(1, unverified()));
    assert!(is_current(&index, "a", "1"));
}

#[test]
fn requests_join_a_fetch_up_to_the_bound() {
    let index = coherent();
    let lease = lead(&index, "a");
    let _leader = lease.flight();
    let Lookup::Ask(Admission::Join(_one)) = look_up(&index, "a") else { panic!() };
    assert!(matches!(look_up(&index, "a"), Lookup::Ask(Admission::Full)));
}

#[tokio::test]
async fn unverified_requests_join_only_a_fetch_that_has_not_departed() {
    let index = index();
    let mut first = lead(&index, "a");
    let Lookup::Ask(Admission::Join(joined)) = look_up(&index, "a") else { panic!() };
    first.mark_sent().await;
    // Too late for that one: the next, which all who come now share.
    let mut second = lead(&index, "a");
    assert!(matches!(look_up(&index, "a"), Lookup::Ask(Admission::Join(_))));
    // It waits for the first, so that outcomes settle in their order.
    let departing = tokio::spawn(async move {
        second.mark_sent().await;
        second
    });
    tokio::task::yield_now().await;
    assert!(!departing.is_finished());
    first.complete(1);
    assert_eq!(joined.outcome().await, Ok(1));
    departing.await.unwrap().complete(2);
    lead(&index, "a");
}

#[tokio::test]
async fn a_fetch_that_another_has_taken_the_place_of_is_not_kept() {
    let index = coherent();
    let mut first = lead(&index, "a");
    first.mark_sent().await;
    // No sign of life: the next request can't join it, though the epoch goes on.
    index.apply(Change::Heartbeat {
        connection: 1,
        lease: Lease::Until(now()),
        round_trip: Duration::ZERO,
    });
    let Admission::Lead(mut second) = index.ask(&id("a")) else { panic!() };
    // The push finds only the second; the first must not settle on what it read before.
    index.apply(Change::Invalidated(id("a")));
    index.apply(Change::Heartbeat {
        connection: 1,
        lease: Lease::Endless,
        round_trip: Duration::ZERO,
    });
    first.keep(present("old"));
    first.complete(1);
    second.keep(present("old"));
    second.complete(2);
    lead(&index, "a");
}

#[test]
fn a_ticket_that_is_dropped_leaves_nothing_to_join() {
    let index = coherent();
    drop(lead(&index, "a"));
    lead(&index, "a");
}

#[test]
fn nothing_is_current_past_its_expiry() {
    let index = coherent();
    let expires = |after| Some(now() + Duration::from_millis(after));
    fetch(&index, "a", FetchResult { expires: expires(0), ..present("1") });
    lead(&index, "a");
    fetch(&index, "b", FetchResult { expires: expires(60_000), ..present("1") });
    assert!(is_current(&index, "b", "1"));
}

#[test]
fn an_unreachable_store_leaves_the_last_known_versions_but_not_what_is_known_to_be_gone() {
    let index = coherent();
    fetch(&index, "a", present("1"));
    fetch(&index, "b", present("1"));
    fetch(&index, "c", FetchResult { expires: Some(now()), ..present("1") });
    index.apply(Change::Invalidated(id("b")));
    index.apply(lost(1, unreachable()));
    assert!(matches!(look_up(&index, "a"), Lookup::Stale(_)));
    assert!(index.last_known(&id("a")).is_some());
    lead(&index, "b");
    lead(&index, "c");
    index.apply(tracked(2));
    index.apply(Change::Flushed);
    index.apply(lost(2, unreachable()));
    lead(&index, "a");
}

#[test]
fn a_version_is_stale_from_the_last_moment_in_which_it_was_certain() {
    let limits = IndexLimits { serve_stale_for: Duration::from_millis(40), ..limits() };
    let index: TestIndex = Arc::new(Index::new(limits));
    index.apply(tracked(1));
    fetch(&index, "a", present("1"));
    let fetched = now();
    while now().since(fetched) < Duration::from_millis(50) {
        std::hint::spin_loop();
    }
    // Long fetched, but certain until now.
    index.apply(lost(1, unreachable()));
    assert!(matches!(look_up(&index, "a"), Lookup::Stale(_)));
    let lost = now();
    while now().since(lost) < Duration::from_millis(50) {
        std::hint::spin_loop();
    }
    lead(&index, "a");
}

#[test]
fn a_value_written_again_is_recognised_even_after_its_change() {
    let index = coherent();
    fetch(&index, "a", present("1"));
    index.apply(Change::Invalidated(id("a")));
    assert!(index.recognise(&id("a"), Digest::of(b"1")).is_some());
    assert!(index.recognise(&id("a"), Digest::of(b"2")).is_none());
    assert!(index.recognise(&id("b"), Digest::of(b"1")).is_none());
}

#[test]
fn a_replaced_version_is_named_so_that_its_bytes_can_go() {
    let index = coherent();
    fetch(&index, "a", present("1"));
    index.apply(Change::Invalidated(id("a")));
    let mut lease = lead(&index, "a");
    assert_eq!(lease.keep(present("2")), Some(Version::of(b"1")));
    assert_eq!(lease.keep(present("2")), None);
}

#[test]
fn absent_keys_push_out_no_images() {
    let index = coherent();
    let absent = || FetchResult { known: Known::Absent, digest: None, expires: None };
    let is_absent = |name| matches!(look_up(&index, name), Lookup::Current(Known::Absent));
    fetch(&index, "a", present("1"));
    for number in 0..10 {
        fetch(&index, &format!("i{number}"), absent());
    }
    assert!(is_current(&index, "a", "1"));
    assert!(is_absent("i9") && index.len() == 3);
    // A key is known once, whichever way it goes.
    index.apply(Change::Invalidated(id("a")));
    fetch(&index, "a", absent());
    assert!(is_absent("a"));
    index.apply(Change::Invalidated(id("a")));
    fetch(&index, "a", present("2"));
    assert!(is_current(&index, "a", "2"));
    assert_eq!(index.len(), 2);
    index.apply(Change::Flushed);
    assert!(index.is_empty());
}

#[test]
fn a_fetch_that_nobody_waits_for_is_given_up_and_cannot_be_joined() {
    let index = coherent();
    let lease = lead(&index, "a");
    let waiting = lease.flight();
    assert!(!lease.give_up_if_unwanted());
    let Lookup::Ask(Admission::Join(joined)) = look_up(&index, "a") else { panic!() };
    drop(waiting);
    assert!(!lease.give_up_if_unwanted());
    drop(joined);
    assert!(lease.give_up_if_unwanted());
    let _next = lead(&index, "a");
    drop(lease);
    assert!(matches!(look_up(&index, "a"), Lookup::Ask(Admission::Join(_))));
}

#[test]
fn never_more_entries_than_the_bound() {
    let index = coherent();
    for number in 0..10 {
        fetch(&index, &format!("i{number}"), present("1"));
    }
    assert_eq!(index.len(), 3);
}
