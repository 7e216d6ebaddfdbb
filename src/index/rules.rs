//! The rules that the promise rests on, so that a test can leave one out and show that it is needed.

/// A rule of the index.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// A push ends what is known of its key, in an outage too.
    PushReplacesEntry,
    /// A push invalidates and detaches the fetch of its key that is under way.
    PushInvalidatesFetch,
    /// A loss, a flush and a new connection each begin an epoch.
    EpochBegins,
    /// No request joins a fetch of an earlier epoch.
    EpochDetachesFetches,
    /// A result belongs to the epoch in which its fetch was registered, not to that in which it arrives.
    ResultOfItsEpoch,
    /// A fetch is invalidated when another takes its place, since pushes no longer find it.
    SuccessorInvalidates,
    /// While changes aren't pushed, a request joins only a fetch that hasn't been sent.
    JoinsUnsentOnly,
    /// Nothing is current past its expiry.
    ExpiryEnds,
    /// Nothing is current past the lease.
    LeaseEnds,
    /// A connection that was lost before it was announced makes nothing coherent.
    LostBeforeAnnounced,
    /// A flush leaves nothing to serve in an outage.
    FlushForgets,
    /// A result that isn't kept ends what is known, if that is something else.
    ResultContradictsEntry,
    /// A result that isn't kept invalidates a fetch that was sent before it arrived.
    ResultInvalidatesFetch,
    /// The age of a version counts from before its GET was sent.
    AgeFromQuestion,
}

impl Rule {
    /// All rules.
    pub const ALL: [Rule; 14] = [
        Rule::PushReplacesEntry,
        Rule::PushInvalidatesFetch,
        Rule::EpochBegins,
        Rule::EpochDetachesFetches,
        Rule::ResultOfItsEpoch,
        Rule::SuccessorInvalidates,
        Rule::JoinsUnsentOnly,
        Rule::ExpiryEnds,
        Rule::LeaseEnds,
        Rule::LostBeforeAnnounced,
        Rule::FlushForgets,
        Rule::ResultContradictsEntry,
        Rule::ResultInvalidatesFetch,
        Rule::AgeFromQuestion,
    ];
}

/// The rules that an index keeps. In a release build it keeps all of them.
#[doc(hidden)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rules {
    #[cfg(debug_assertions)]
    without: Option<Rule>,
}

impl Rules {
    /// All but one.
    #[cfg(debug_assertions)]
    #[must_use]
    pub fn without(rule: Rule) -> Rules {
        Rules { without: Some(rule) }
    }

    #[cfg(debug_assertions)]
    pub(super) fn hold(self, rule: Rule) -> bool {
        self.without != Some(rule)
    }

    #[cfg(not(debug_assertions))]
    pub(super) const fn hold(self, _: Rule) -> bool {
        true
    }
}
