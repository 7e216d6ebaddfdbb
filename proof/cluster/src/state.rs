//! A state of the cluster, of the network, and of the client that caches one key.

use std::ops::{Index, IndexMut};

/// Ticks that a heartbeat vouches for.
pub(crate) const LEASE: u8 = 2;
/// Ticks of silence after which a primary is replaced (`cluster-node-timeout`).
pub(crate) const TIMEOUT: u8 = 3;
/// The value of a key that doesn't exist.
pub(crate) const ABSENT: u8 = 0;
/// The age of a value that has not been replaced.
pub(crate) const CURRENT: u8 = u8::MAX;
/// Values that a key can have: none, the first, and up to three written later.
pub(crate) const VALUES: usize = 5;

/// A server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Id {
    A,
    B,
    C,
    D,
}

impl Id {
    /// All servers.
    pub(crate) const ALL: [Id; 4] = [Id::A, Id::B, Id::C, Id::D];
}

/// A set of servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub(crate) struct Set(u8);

impl Set {
    /// No server.
    pub(crate) const NONE: Set = Set(0);

    /// The servers of a list.
    pub(crate) const fn of(ids: &[Id]) -> Set {
        let (mut bits, mut at) = (0, 0);
        while at < ids.len() {
            bits |= 1 << ids[at] as u8;
            at += 1;
        }
        Set(bits)
    }

    /// Tells if the server is in the set.
    pub(crate) fn has(self, id: Id) -> bool {
        self.0 & (1 << id as u8) != 0
    }

    /// Adds a server.
    pub(crate) fn insert(&mut self, id: Id) {
        self.0 |= 1 << id as u8;
    }

    /// Removes a server.
    pub(crate) fn remove(&mut self, id: Id) {
        self.0 &= !(1 << id as u8);
    }

    /// All servers but those of the set.
    pub(crate) fn complement(self) -> Set {
        Set(!self.0 & Set::of(&Id::ALL).0)
    }

    /// Tells if no server is in the set.
    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// A claim to the slot: its owner and the config epoch. Epoch 0 is a hole: nobody claims the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Claim {
    pub(crate) owner: Id,
    pub(crate) epoch: u8,
}

/// A message of a tracking connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Message {
    /// The key has changed.
    Push,
    /// Every key may have changed.
    Nil,
    /// The answer to a heartbeat.
    Heartbeat(View),
}

/// Content of the answer to a heartbeat: topology and role as the server knows them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct View {
    /// The server tells the topology. A single server doesn't, nor one under Sentinel.
    pub(crate) of_cluster: bool,
    pub(crate) claim: Claim,
    pub(crate) primary: bool,
    pub(crate) migrating: bool,
    /// Ticks since the heartbeat was sent.
    pub(crate) age: u8,
}

/// A server, and the client's connection to it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Node {
    pub(crate) up: bool,
    pub(crate) primary: bool,
    pub(crate) value: u8,
    /// Its own view of the slot.
    pub(crate) claim: Claim,
    /// The target to which it migrates the slot key by key.
    pub(crate) migrating: Option<Id>,
    /// It imports the slot key by key.
    pub(crate) importing: bool,
    /// It takes no writes while it hands the slot over.
    pub(crate) paused: bool,
    /// Nothing passes between it and the client.
    pub(crate) cut: bool,
    /// The client has a tracking connection to it.
    pub(crate) tracked: bool,
    /// The connection leads to a process that has died.
    pub(crate) dead: bool,
    /// Ticks for which its last heartbeat still vouches.
    pub(crate) lease: u8,
    /// Messages on their way to the client, in order.
    pub(crate) wire: Vec<Message>,
}

/// The cached value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Entry {
    pub(crate) value: u8,
    /// The node that answered.
    pub(crate) node: Id,
}

/// A GET on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Fetch {
    pub(crate) node: Id,
    pub(crate) answer: Option<Answer>,
    pub(crate) kind: Kind,
    /// The slot's epoch has not changed since it was sent.
    pub(crate) fresh: bool,
    /// No push has named the key since it was sent.
    pub(crate) clean: bool,
    /// The node owned the slot in the client's view when it was sent.
    pub(crate) to_owner: bool,
}

/// The reason for which a GET went to its node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    /// The node owns the slot.
    First,
    /// Another node answered MOVED.
    Moved,
    /// Another node answered ASK.
    Asking,
}

/// A reply to a GET.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Answer {
    Value(u8),
    Moved(Id),
    Ask(Id),
}

/// The way in which the slot came to its present owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Cause {
    Failover,
    Migration,
    Handover,
}

/// Cluster, network and client at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct State {
    pub(crate) nodes: [Node; 4],
    /// Steps of the scenario that have taken place.
    pub(crate) step: u8,
    /// Servers that are cut off from their peers.
    pub(crate) isolated: Set,
    /// Ticks for which the owner has been silent to its peers.
    pub(crate) silent: u8,

    /// The claim that counts, known to nobody but the checker.
    pub(crate) truth: Claim,
    pub(crate) cause: Cause,
    /// The value that counts.
    pub(crate) value: u8,
    /// Ticks since each value was replaced, or [`CURRENT`].
    pub(crate) ages: [u8; VALUES],
    /// Ticks since the slot changed its owner.
    pub(crate) moved: u8,
    /// The latest value that was written.
    pub(crate) written: u8,

    /// The client's merged view.
    pub(crate) view: Claim,
    /// Nodes whose view the client awaits before it serves from the slot.
    pub(crate) doubt: Set,
    /// The owner itself says that it isn't one.
    pub(crate) denied: bool,
    /// The slot migrates, its owner says.
    pub(crate) migrating: bool,
    pub(crate) entry: Option<Entry>,
    pub(crate) fetches: [Option<Fetch>; 2],
    /// Connections that may still break.
    pub(crate) losses: u8,
}

impl Index<Id> for State {
    type Output = Node;

    fn index(&self, id: Id) -> &Node {
        &self.nodes[id as usize]
    }
}

impl IndexMut<Id> for State {
    fn index_mut(&mut self, id: Id) -> &mut Node {
        &mut self.nodes[id as usize]
    }
}
