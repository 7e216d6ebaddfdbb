//! Errors of a store.

use std::error::Error;
use std::io;
use std::sync::Arc;

/// Failure of a store to answer. It can be cloned for each request that shares a fetch.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// There is no connection, or it broke.
    #[error("the store can't be reached: {0}")]
    Unreachable(#[source] Arc<dyn Error + Send + Sync>),
    /// The store is connected and didn't answer in time.
    #[error("the store didn't answer in time")]
    TimedOut,
    /// The user may not do this.
    #[error("the store doesn't permit it: {0}")]
    Forbidden(#[source] Arc<dyn Error + Send + Sync>),
    /// The store answered with an error of its own, such as out of memory.
    #[error("the store refused: {0}")]
    Refused(#[source] Arc<dyn Error + Send + Sync>),
    /// The disk has no room for a write, or the file may not grow. Reads go on.
    #[error("the disk of the store is full: {0}")]
    DiskFull(#[source] Arc<io::Error>),
    /// The key holds a type other than a string.
    #[error("the key doesn't hold a string")]
    WrongType,
    /// The value is larger than the limit and was not read.
    #[error("the value has {size} bytes, the limit is {limit}")]
    TooLarge {
        /// In bytes.
        size: u64,
        /// In bytes.
        limit: usize,
    },
}

impl StoreError {
    /// The kinds that are counted. Errors of a single record are not among them: they don't concern the store.
    pub const KINDS: [&'static str; 3] = ["unreachable", "timeout", "refused"];

    /// [`StoreError::Unreachable`] with its cause, an error or a text.
    pub fn unreachable(cause: impl Into<Box<dyn Error + Send + Sync>>) -> StoreError {
        StoreError::Unreachable(Arc::from(cause.into()))
    }

    /// [`StoreError::Forbidden`] with its cause, an error or a text.
    pub fn forbidden(cause: impl Into<Box<dyn Error + Send + Sync>>) -> StoreError {
        StoreError::Forbidden(Arc::from(cause.into()))
    }

    /// [`StoreError::Refused`] with its cause, an error or a text.
    pub fn refused(cause: impl Into<Box<dyn Error + Send + Sync>>) -> StoreError {
        StoreError::Refused(Arc::from(cause.into()))
    }

    /// The counted kind of this error, if it has one.
    #[must_use]
    pub fn kind(&self) -> Option<&'static str> {
        let [unreachable, timeout, refused] = StoreError::KINDS;
        match self {
            StoreError::Unreachable(_) => Some(unreachable),
            StoreError::TimedOut => Some(timeout),
            StoreError::Forbidden(_) | StoreError::Refused(_) | StoreError::DiskFull(_) => {
                Some(refused)
            }
            StoreError::WrongType | StoreError::TooLarge { .. } => None,
        }
    }

    /// True if nothing can be had from the store for now, so that what is in memory is the best answer to a read.
    #[must_use]
    pub fn is_outage(&self) -> bool {
        matches!(self, StoreError::Unreachable(_) | StoreError::TimedOut | StoreError::Forbidden(_))
    }
}
