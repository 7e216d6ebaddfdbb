//! The form of a scenario.

use crate::state::{ABSENT, Id, Set};

/// A small world. Its steps take place in order, each at any time; everything else that it allows, in any order between them.
#[derive(Debug, Clone, Copy)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    /// Servers that exist.
    pub(crate) nodes: Set,
    /// Servers that are tracked at the beginning.
    pub(crate) tracked: Set,
    /// Replicas of A, which owns the slot at the beginning.
    pub(crate) replicas: Set,
    /// Number of primaries, by their other slots, that each server stands for. The owner of the slot counts one more.
    pub(crate) votes: [u8; 4],
    /// Servers that hear late who owns the slot. The others hear it within a tick, unless they are cut off.
    pub(crate) slow: Set,
    /// Servers whose answers to heartbeats may be late. Those of the others come at once, or right behind pushes.
    pub(crate) late: Set,
    /// No cluster: a server answers every GET, and knows only its own role.
    pub(crate) plain: bool,
    /// Keys left behind are deleted without a push (7.0 and earlier).
    pub(crate) silent_leftovers: bool,
    /// Keys that an atomic migration imports are not pushed.
    pub(crate) silent_import: bool,
    /// A replica synchronises as a whole: a nil push.
    pub(crate) full_resync: bool,
    /// The value at the beginning.
    pub(crate) value: u8,
    /// The client has it in memory.
    pub(crate) cached: bool,
    /// Writes that may take place.
    pub(crate) writes: u8,
    /// Writes may be deletions.
    pub(crate) deletes: bool,
    /// GETs that may be on their way at a time.
    pub(crate) fetches: usize,
    /// Tracking connections that may break.
    pub(crate) losses: u8,
    pub(crate) steps: &'static [Step],
    pub(crate) bound: Bound,
    /// The client serves again after the last step.
    pub(crate) serves_again: bool,
    /// The server from whose answer the client serves in the end.
    pub(crate) served_by: Id,
}

impl Scenario {
    /// A cluster in which A owns the slot, B is its replica, and C stands for two more primaries.
    pub(crate) const CLUSTER: Scenario = Scenario {
        name: "",
        nodes: Set::of(&[Id::A, Id::B, Id::C]),
        tracked: Set::of(&[Id::A, Id::C]),
        replicas: Set::of(&[Id::B]),
        votes: [0, 0, 2, 0],
        slow: Set::NONE,
        late: Set::NONE,
        plain: false,
        silent_leftovers: false,
        silent_import: false,
        full_resync: false,
        value: 1,
        cached: true,
        writes: 1,
        deletes: false,
        fetches: 1,
        losses: 0,
        steps: &[],
        bound: Bound::Ticks(crate::state::LEASE),
        serves_again: true,
        served_by: Id::B,
    };

    /// Two primaries: A owns the slot, B is tracked.
    pub(crate) const PAIR: Scenario = Scenario {
        nodes: Set::of(&[Id::A, Id::B]),
        tracked: Set::of(&[Id::A, Id::B]),
        replicas: Set::NONE,
        votes: [1, 1, 0, 0],
        bound: Bound::OnePush,
        ..Scenario::CLUSTER
    };

    /// A primary, and one that has joined and that the client doesn't know yet.
    pub(crate) const NEWCOMER: Scenario = Scenario {
        tracked: Set::of(&[Id::A]),
        votes: [2, 0, 0, 0],
        bound: Bound::Ticks(crate::state::LEASE),
        ..Scenario::PAIR
    };

    /// One server.
    pub(crate) const SINGLE: Scenario = Scenario {
        nodes: Set::of(&[Id::A]),
        tracked: Set::of(&[Id::A]),
        replicas: Set::NONE,
        votes: [0; 4],
        bound: Bound::OnePush,
        served_by: Id::A,
        ..Scenario::CLUSTER
    };

    /// The same scenario, in which the key doesn't exist at the beginning.
    pub(crate) const fn absent(self) -> Scenario {
        Scenario { value: ABSENT, ..self }
    }
}

/// An event of the topology.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// Cuts servers off from their peers, but not from the client.
    Isolate(Set),
    /// Cuts servers and the client off from all others.
    IsolateWithUs(Set),
    /// Ends every cut.
    Rejoin,
    /// Cuts servers off from the client.
    Cut(Set),
    /// The process ends.
    Die(Id),
    /// The process starts again, without its data.
    RestartEmpty(Id),
    /// A replica is elected, after the owner has been silent for the node timeout.
    Promote(Id),
    /// `CLUSTER FAILOVER`: the owner pauses writes, the replica catches up and takes over.
    Failover(Id),
    /// `CLUSTER FAILOVER TAKEOVER`: a replica takes over as it is.
    Takeover(Id),
    /// `REPLICAOF`: the owner becomes a replica of another server at once.
    ReplicaOf(Id),
    /// A migration key by key begins.
    Migrate(Id),
    /// It ends: `CLUSTER SETSLOT NODE` at the target, after all keys have been moved.
    Finish(Id),
    /// `CLUSTER SETSLOT NODE` at the target, with keys left behind.
    Give(Id),
    /// The same without a new config epoch: the target was not importing.
    GiveUnnoticed(Id),
    /// An atomic migration hands the slot over.
    HandOver(Id),
    /// A server's view loses the slot.
    Hole(Id),
    /// `FLUSHALL`.
    Flush(Id),
}

/// The most that an answer from memory may be late.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bound {
    /// It is never late.
    Nothing,
    /// It is late only while a push is on its way that ends it, and no longer than the lease.
    OnePush,
    /// It was replaced less than this number of ticks ago.
    Ticks(u8),
    /// It was replaced less than this number of ticks ago, or a push is on its way that ends it.
    OnePushOrTicks(u8),
}

impl Bound {
    /// A tighter bound, which must not hold. A late push alone doesn't exceed it if it is one tick less.
    pub(crate) fn tighter(self) -> Bound {
        match self {
            Bound::Nothing | Bound::OnePush => Bound::Nothing,
            Bound::Ticks(ticks) | Bound::OnePushOrTicks(ticks) => {
                Bound::OnePushOrTicks(ticks.saturating_sub(1))
            }
        }
    }
}
