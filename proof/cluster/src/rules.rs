//! The rules of a cluster, so that a run can leave one out and show that it is needed.

/// A rule of the client. `README.md` states each in full.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    /// An epoch belongs to a slot, not to a node.
    SlotEpoch,
    /// Nothing is current past the lease of the slot's owner.
    OwnerLease,
    /// Nothing is current without leases of a majority of the slot-owning primaries.
    MajorityLease,
    /// A lease is no longer than `cluster-node-timeout`.
    LeaseWithinTimeout,
    /// A lease counts from when the heartbeat was sent.
    LeaseFromSending,
    /// The answer to a heartbeat lies behind the pushes before it.
    HeartbeatBehindPushes,
    /// A push drops the entry of its key.
    PushDropsEntry,
    /// A push invalidates the fetches of its key.
    PushInvalidatesFetch,
    /// A push counts from every tracked node.
    PushFromEveryNode,
    /// A push from a node that isn't the owner makes the slot doubtful.
    StrangePushDoubts,
    /// Only a later view of the node that pushed ends the doubt.
    DoubtEndsByPusher,
    /// A nil push begins an epoch for the slots of its node.
    NilBeginsEpoch,
    /// A new tracking connection begins an epoch for the slots of its node.
    ConnectionBeginsEpoch,
    /// A new owner begins a slot epoch.
    OwnerBeginsEpoch,
    /// A new config epoch of the same owner begins a slot epoch.
    ConfigEpochBeginsEpoch,
    /// A result belongs to the slot epoch that was noted before its GET was sent.
    ResultOfItsEpoch,
    /// After MOVED only an answer of the slot's owner is kept.
    MovedKeepsOwnersAnswer,
    /// An answer after ASK is never kept.
    AskIsNotKept,
    /// An absence isn't kept while its slot migrates.
    NoAbsenceWhileMigrating,
    /// Views are merged per slot: the highest config epoch claims it.
    MergePerSlot,
    /// A view without the slot ends no claim.
    HoleEndsNothing,
    /// A view without the slot doesn't vouch for it.
    HoleVouchesForNothing,
    /// Each heartbeat brings the topology.
    ViewWithHeartbeat,
    /// The views of all nodes count.
    ViewOfEveryNode,
    /// An owner that names another owner is not believed to be one.
    OwnerAffirms,
    /// A node that calls itself a replica owns nothing.
    RoleOfOwner,
    /// Every primary is tracked, also those without slots.
    TrackEveryPrimary,
}

impl Rule {
    /// All rules.
    pub(crate) const ALL: [Rule; 27] = [
        Rule::SlotEpoch,
        Rule::OwnerLease,
        Rule::MajorityLease,
        Rule::LeaseWithinTimeout,
        Rule::LeaseFromSending,
        Rule::HeartbeatBehindPushes,
        Rule::PushDropsEntry,
        Rule::PushInvalidatesFetch,
        Rule::PushFromEveryNode,
        Rule::StrangePushDoubts,
        Rule::DoubtEndsByPusher,
        Rule::NilBeginsEpoch,
        Rule::ConnectionBeginsEpoch,
        Rule::OwnerBeginsEpoch,
        Rule::ConfigEpochBeginsEpoch,
        Rule::ResultOfItsEpoch,
        Rule::MovedKeepsOwnersAnswer,
        Rule::AskIsNotKept,
        Rule::NoAbsenceWhileMigrating,
        Rule::MergePerSlot,
        Rule::HoleEndsNothing,
        Rule::HoleVouchesForNothing,
        Rule::ViewWithHeartbeat,
        Rule::ViewOfEveryNode,
        Rule::OwnerAffirms,
        Rule::RoleOfOwner,
        Rule::TrackEveryPrimary,
    ];
}

/// The rules that a model keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Rules {
    without: Option<Rule>,
}

impl Rules {
    /// All rules.
    pub(crate) const ALL: Rules = Rules { without: None };

    /// All but one.
    pub(crate) fn without(rule: Rule) -> Rules {
        Rules { without: Some(rule) }
    }

    /// Tells if the rule is kept.
    pub(crate) fn hold(self, rule: Rule) -> bool {
        self.without != Some(rule)
    }
}
