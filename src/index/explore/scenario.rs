//! The events of a world.

/// The events that may happen in a world, and how often.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(clippy::struct_excessive_bools, reason = "each is a kind of event of its own")]
pub(super) struct Scenario {
    pub(super) keys: usize,
    pub(super) writes: u8,
    /// Some writes have a time to live.
    pub(super) expires: bool,
    /// Some writes are deletions.
    pub(super) deletes: bool,
    pub(super) flushes: u8,
    pub(super) fetches: u8,
    /// Requests that join a fetch.
    pub(super) joins: u8,
    pub(super) cancels: u8,
    pub(super) losses: u8,
    pub(super) beats: u8,
    pub(super) ticks: u8,
    /// Most entries of the index.
    pub(super) entries: usize,
    /// The store is out of reach, rather than not tracked, after a loss.
    pub(super) unreachable: bool,
    /// The tracking connection is there at the beginning.
    pub(super) tracked: bool,
    /// A GET takes a while to Redis, and what the tracking connection answered to its task.
    pub(super) slow: bool,
    /// Requests for bytes that have left memory: they ask whatever is known.
    pub(super) asks: bool,
}

impl Scenario {
    /// One key, and a connection that tracks.
    pub(super) const NOTHING: Scenario = Scenario {
        keys: 1,
        writes: 0,
        expires: false,
        deletes: false,
        flushes: 0,
        fetches: 0,
        joins: 0,
        cancels: 0,
        losses: 0,
        beats: 0,
        ticks: 0,
        entries: 2,
        unreachable: false,
        tracked: true,
        slow: false,
        asks: false,
    };
}
