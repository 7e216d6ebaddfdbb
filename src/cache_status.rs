//! The source of an answer, in the terms of RFC 9211.

use std::time::Duration;

/// The source of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheStatus {
    /// From memory.
    Hit,
    /// From memory, by rendering a picture that was there.
    Rendered,
    /// By a fetch.
    Fetched {
        /// Another request led the fetch.
        collapsed: bool,
        /// The bytes are in memory now.
        stored: bool,
    },
    /// By a fetch that found the version in memory to be the one in the store.
    Revalidated {
        /// Another request led the fetch.
        collapsed: bool,
    },
    /// With the last known version, because the store can't be reached.
    Stale {
        /// Time since the version was last known to be current.
        age: Duration,
    },
}
