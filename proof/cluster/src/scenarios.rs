//! All scenarios, and the one in which each rule is needed.

use crate::rules::Rule;
use crate::scenario::{Bound, Scenario, Step};
use crate::state::{Id, LEASE, Set};

use Id::{A, B, C, D};

const CLUSTER: Scenario = Scenario::CLUSTER;
const PAIR: Scenario = Scenario::PAIR;
const NEWCOMER: Scenario = Scenario::NEWCOMER;
const SINGLE: Scenario = Scenario::SINGLE;

const WRITES: Scenario =
    Scenario { name: "writes at the owner", writes: 3, deletes: true, fetches: 2, ..SINGLE };
const FLUSH: Scenario =
    Scenario { name: "FLUSHALL at the owner", writes: 2, steps: &[Step::Flush(A)], ..SINGLE };
const LOSSES: Scenario =
    Scenario { name: "connections that break", writes: 2, fetches: 2, losses: 2, ..SINGLE };

const DEATH: Scenario = Scenario {
    name: "the owner dies",
    losses: 1,
    steps: &[Step::Die(A), Step::Promote(B)],
    bound: Bound::OnePush,
    ..CLUSTER
};
const RESTART: Scenario = Scenario {
    name: "the owner dies and starts again empty",
    losses: 1,
    steps: &[Step::Die(A), Step::RestartEmpty(A)],
    bound: Bound::Ticks(LEASE),
    ..SINGLE
};
const CUT: Scenario = Scenario {
    name: "the owner is cut off from us",
    losses: 1,
    steps: &[Step::Cut(Set::of(&[A])), Step::Rejoin],
    served_by: A,
    ..CLUSTER
};
const GONE: Scenario = Scenario {
    name: "the owner is cut off from everybody",
    steps: &[
        Step::Cut(Set::of(&[A])),
        Step::Isolate(Set::of(&[A])),
        Step::Promote(B),
        Step::Rejoin,
    ],
    ..CLUSTER
};
const MINORITY: Scenario = Scenario {
    name: "we are in the owner's minority",
    writes: 2,
    steps: &[Step::IsolateWithUs(Set::of(&[A])), Step::Promote(B)],
    bound: Bound::OnePush,
    serves_again: false,
    ..CLUSTER
};
const MINORITY_ENDS: Scenario = Scenario {
    name: "the owner's minority, with us in it, joins the others again",
    writes: 2,
    steps: &[Step::IsolateWithUs(Set::of(&[A])), Step::Promote(B), Step::Rejoin],
    ..CLUSTER
};
const ISOLATED: Scenario = Scenario {
    name: "the owner is cut off from its peers, not from us",
    late: Set::of(&[C]),
    steps: &[Step::Isolate(Set::of(&[A])), Step::Promote(B), Step::Rejoin],
    ..CLUSTER
};
const ISOLATED_LOST: Scenario = Scenario {
    name: "the owner is cut off from its peers and takes a write that is lost",
    writes: 2,
    late: Set::NONE,
    ..ISOLATED
};
const TWO_VOTERS: Scenario = Scenario {
    name: "the owner is cut off from its peers, and one of them from us",
    nodes: Set::of(&[A, B, C, D]),
    tracked: Set::of(&[A, C, D]),
    votes: [0, 0, 1, 1],
    steps: &[Step::Cut(Set::of(&[D])), Step::Isolate(Set::of(&[A])), Step::Promote(B)],
    ..CLUSTER
};
const HOLE: Scenario = Scenario {
    name: "a view with a hole",
    steps: &[Step::Isolate(Set::of(&[A])), Step::Promote(B), Step::Hole(C)],
    ..CLUSTER
};

const FAILOVER: Scenario = Scenario {
    name: "CLUSTER FAILOVER",
    late: Set::of(&[C]),
    steps: &[Step::Failover(B)],
    ..CLUSTER
};
const TAKEOVER: Scenario = Scenario {
    name: "TAKEOVER: an acknowledged write is lost",
    writes: 2,
    steps: &[Step::Takeover(B)],
    ..CLUSTER
};
const RESYNC: Scenario = Scenario {
    name: "TAKEOVER, then a full resynchronisation",
    writes: 2,
    steps: &[Step::Takeover(B)],
    full_resync: true,
    ..CLUSTER
};
const FAILOVER_BACK: Scenario = Scenario {
    name: "CLUSTER FAILOVER to the replica and back",
    steps: &[Step::Failover(B), Step::Failover(A)],
    served_by: A,
    ..CLUSTER
};
const REPLICA_OF: Scenario = Scenario {
    name: "REPLICAOF of a single server in place",
    nodes: Set::of(&[A, B]),
    plain: true,
    steps: &[Step::ReplicaOf(B)],
    bound: Bound::Ticks(LEASE),
    ..SINGLE
};
const SENTINEL: Scenario = Scenario {
    name: "Sentinel: the primary is cut off from the Sentinels, not from us",
    plain: true,
    slow: Set::of(&[A]),
    steps: &[Step::Isolate(Set::of(&[A])), Step::Promote(B), Step::Rejoin],
    ..CLUSTER
};
const SENTINEL_MINORITY: Scenario = Scenario {
    name: "Sentinel: we are cut off with the primary",
    plain: true,
    slow: Set::of(&[A]),
    steps: &[Step::IsolateWithUs(Set::of(&[A])), Step::Promote(B)],
    bound: Bound::OnePush,
    serves_again: false,
    ..CLUSTER
};

const KEY_BY_KEY: Scenario = Scenario {
    name: "migration key by key",
    writes: 2,
    steps: &[Step::Migrate(B), Step::Finish(B)],
    ..PAIR
};
const KEY_BY_KEY_ABSENT: Scenario =
    Scenario { name: "migration key by key, of an absent key", ..KEY_BY_KEY.absent() };
const KEY_BY_KEY_BACK: Scenario = Scenario {
    name: "migration key by key, there and back",
    writes: 1,
    steps: &[Step::Migrate(B), Step::Finish(B), Step::Migrate(A), Step::Finish(A)],
    served_by: A,
    ..PAIR
};
const ATOMIC: Scenario = Scenario {
    name: "atomic migration",
    writes: 2,
    late: Set::of(&[B]),
    silent_import: true,
    steps: &[Step::HandOver(B)],
    ..PAIR
};
const ATOMIC_SLOTLESS: Scenario =
    Scenario { name: "atomic migration to a primary without slots", votes: [2, 0, 0, 0], ..ATOMIC };
const ATOMIC_BACK: Scenario = Scenario {
    name: "atomic migration, there and back",
    writes: 1,
    late: Set::NONE,
    steps: &[Step::HandOver(B), Step::HandOver(A)],
    bound: Bound::Ticks(LEASE),
    served_by: A,
    ..ATOMIC
};
const ATOMIC_FLUSH: Scenario = Scenario {
    name: "atomic migration, then FLUSHALL at the target",
    writes: 1,
    late: Set::NONE,
    steps: &[Step::HandOver(B), Step::Flush(B)],
    bound: Bound::Ticks(LEASE),
    ..ATOMIC
};
const ATOMIC_LOSSES: Scenario = Scenario {
    name: "atomic migration while connections break",
    writes: 1,
    losses: 2,
    bound: Bound::Ticks(LEASE),
    ..ATOMIC
};

const NEW_KEY_BY_KEY: Scenario = Scenario {
    name: "migration key by key to a new node",
    writes: 2,
    steps: &[Step::Migrate(B), Step::Finish(B)],
    bound: Bound::OnePush,
    ..NEWCOMER
};
const NEW_KEY_BY_KEY_ABSENT: Scenario = Scenario {
    name: "migration key by key to a new node, of an absent key",
    bound: Bound::Ticks(LEASE),
    ..NEW_KEY_BY_KEY.absent()
};
const NEW_ATOMIC: Scenario = Scenario {
    name: "atomic migration to a new node",
    writes: 2,
    late: Set::of(&[A]),
    silent_import: true,
    steps: &[Step::HandOver(B)],
    ..NEWCOMER
};
const NEW_ATOMIC_BACK: Scenario = Scenario {
    name: "atomic migration to a new node and back",
    writes: 1,
    late: Set::NONE,
    steps: &[Step::HandOver(B), Step::HandOver(A)],
    served_by: A,
    ..NEW_ATOMIC
};
const NEW_ATOMIC_BACK_ABSENT: Scenario = Scenario {
    name: "atomic migration to a new node and back, of an absent key",
    ..NEW_ATOMIC_BACK.absent()
};
const LEFT_BEHIND: Scenario = Scenario {
    name: "a slot given away with its keys",
    silent_leftovers: true,
    steps: &[Step::Migrate(B), Step::Give(B)],
    bound: Bound::Ticks(LEASE),
    ..PAIR
};
const UNNOTICED: Scenario = Scenario {
    name: "a slot given away without a new config epoch",
    silent_leftovers: true,
    writes: 0,
    steps: &[Step::GiveUnnoticed(B)],
    bound: Bound::Ticks(LEASE),
    serves_again: false,
    ..PAIR
};
const CHAIN: Scenario = Scenario {
    name: "two atomic migrations, one after the other",
    nodes: Set::of(&[A, B, C]),
    tracked: Set::of(&[A, B, C]),
    votes: [1, 1, 1, 0],
    writes: 1,
    late: Set::NONE,
    steps: &[Step::HandOver(B), Step::HandOver(C)],
    served_by: C,
    ..ATOMIC
};

/// All scenarios.
pub(crate) const SCENARIOS: [Scenario; 36] = [
    WRITES,
    FLUSH,
    LOSSES,
    DEATH,
    RESTART,
    CUT,
    GONE,
    MINORITY,
    MINORITY_ENDS,
    ISOLATED,
    ISOLATED_LOST,
    TWO_VOTERS,
    HOLE,
    FAILOVER,
    TAKEOVER,
    RESYNC,
    FAILOVER_BACK,
    REPLICA_OF,
    SENTINEL,
    SENTINEL_MINORITY,
    KEY_BY_KEY,
    KEY_BY_KEY_ABSENT,
    KEY_BY_KEY_BACK,
    ATOMIC,
    ATOMIC_SLOTLESS,
    ATOMIC_BACK,
    ATOMIC_FLUSH,
    ATOMIC_LOSSES,
    NEW_KEY_BY_KEY,
    NEW_KEY_BY_KEY_ABSENT,
    NEW_ATOMIC,
    NEW_ATOMIC_BACK,
    NEW_ATOMIC_BACK_ABSENT,
    LEFT_BEHIND,
    UNNOTICED,
    CHAIN,
];

const LONELY_TAKEOVER: Scenario = Scenario {
    name: "TAKEOVER at a replica that is cut off from its peers",
    steps: &[Step::Isolate(Set::of(&[B])), Step::Takeover(B)],
    ..CLUSTER
};

/// Scenarios with few states, for a quick test: some of each kind.
#[cfg(test)]
pub(crate) const QUICK: [Scenario; 11] = [
    WRITES,
    FLUSH,
    LOSSES,
    DEATH,
    RESTART,
    CUT,
    MINORITY,
    TWO_VOTERS,
    HOLE,
    SENTINEL_MINORITY,
    UNNOTICED,
];

/// Scenarios in which no rule helps: the checker must find an answer that is too old.
pub(crate) const LIMITS: [Scenario; 1] = [LONELY_TAKEOVER];

/// A scenario in which the rule is needed.
pub(crate) fn needing(rule: Rule) -> Scenario {
    match rule {
        Rule::HeartbeatBehindPushes | Rule::PushDropsEntry | Rule::PushInvalidatesFetch => WRITES,
        Rule::NilBeginsEpoch => FLUSH,
        Rule::ConnectionBeginsEpoch | Rule::ResultOfItsEpoch => LOSSES,
        Rule::OwnerLease => CUT,
        Rule::MajorityLease | Rule::LeaseWithinTimeout => MINORITY,
        Rule::LeaseFromSending
        | Rule::MergePerSlot
        | Rule::ViewWithHeartbeat
        | Rule::ViewOfEveryNode => ISOLATED,
        Rule::HoleEndsNothing | Rule::HoleVouchesForNothing => HOLE,
        Rule::SlotEpoch => FAILOVER_BACK,
        Rule::RoleOfOwner => REPLICA_OF,
        Rule::PushFromEveryNode | Rule::StrangePushDoubts | Rule::DoubtEndsByPusher => ATOMIC,
        Rule::TrackEveryPrimary => ATOMIC_SLOTLESS,
        Rule::MovedKeepsOwnersAnswer => CHAIN,
        Rule::OwnerBeginsEpoch => NEW_ATOMIC,
        Rule::ConfigEpochBeginsEpoch => NEW_ATOMIC_BACK_ABSENT,
        Rule::AskIsNotKept => NEW_KEY_BY_KEY,
        Rule::NoAbsenceWhileMigrating => NEW_KEY_BY_KEY_ABSENT,
        Rule::OwnerAffirms => UNNOTICED,
    }
}
