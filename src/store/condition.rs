//! Conditions, expiry and results of writes.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Expiry of a written value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// After this time.
    In(Duration),
    /// Never.
    Never,
    /// With the value that it replaces.
    Kept,
    /// After this time or with the value that it replaces, whichever is later.
    AtLeast(Duration),
}

/// Precondition of a write.
///
/// A value that may not be read, since it is too large or not a string, is present all the same: [`Condition::Is`] sees
/// it as empty.
#[derive(Clone)]
pub enum Condition {
    /// None: the write is made.
    Always,
    /// There is no value.
    Absent,
    /// There is a value.
    Present,
    /// The predicate holds for the value, or for `None`. It may take milliseconds.
    Is(Arc<ValuePredicate>),
}

/// Predicate on the present value, if there is one.
pub type ValuePredicate = dyn Fn(Option<&[u8]>) -> bool + Send + Sync;

impl Condition {
    /// A condition on the present value.
    pub fn is(predicate: impl Fn(Option<&[u8]>) -> bool + Send + Sync + 'static) -> Condition {
        Condition::Is(Arc::new(predicate))
    }

    /// Evaluates the condition for the present value.
    pub(crate) fn holds(&self, value: Option<&[u8]>) -> bool {
        match self {
            Condition::Always => true,
            Condition::Absent => value.is_none(),
            Condition::Present => value.is_some(),
            Condition::Is(predicate) => predicate(value),
        }
    }
}

impl fmt::Debug for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Condition::Always => "Always",
            Condition::Absent => "Absent",
            Condition::Present => "Present",
            Condition::Is(_) => "Is(..)",
        })
    }
}

/// Result of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    /// It was made.
    Done(Replaced),
    /// Its condition doesn't hold, and nothing was changed.
    ConditionFailed,
}

/// Content of a key before a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replaced {
    /// No value.
    Nothing,
    /// A value that had not expired.
    Value,
}
