//! The client: what Afterimage does with pushes, heartbeats and replies, and when it serves from memory.

use crate::rules::{Rule, Rules};
use crate::scenario::{Scenario, Step};
use crate::state::{
    ABSENT, Answer, Entry, Fetch, Id, Kind, LEASE, Message, Set, State, TIMEOUT, View,
};

/// The longest lease under these rules.
pub(crate) fn lease(rules: Rules) -> u8 {
    if rules.hold(Rule::LeaseWithinTimeout) { LEASE } else { TIMEOUT + 2 }
}

/// Tells if the answer of the GET can still be kept.
fn may_be_kept(rules: Rules, fetch: Fetch) -> bool {
    (fetch.fresh || !rules.hold(Rule::ResultOfItsEpoch))
        && fetch.clean
        && match fetch.kind {
            Kind::First => true,
            Kind::Moved => fetch.to_owner || !rules.hold(Rule::MovedKeepsOwnersAnswer),
            Kind::Asking => !rules.hold(Rule::AskIsNotKept),
        }
}

impl State {
    /// The value that a request gets from memory, marked as current.
    pub(crate) fn served(&self, rules: Rules, votes: [u8; 4]) -> Option<u8> {
        let entry = self.entry?;
        let owner = self.view.owner;
        let of_its_epoch = rules.hold(Rule::SlotEpoch) || entry.node == owner;
        (of_its_epoch
            && self.view.epoch > 0
            && self.doubt.is_empty()
            && !self.denied
            && (self[owner].lease > 0 || !rules.hold(Rule::OwnerLease))
            && (self.majority(votes) || !rules.hold(Rule::MajorityLease)))
        .then_some(entry.value)
    }

    /// Tells if a majority of the slot-owning primaries vouch.
    fn majority(&self, votes: [u8; 4]) -> bool {
        let (mut all, mut vouch) = (0, 0);
        for id in Id::ALL {
            let count = votes[id as usize] + u8::from(id == self.view.owner);
            all += count;
            if self[id].lease > 0 {
                vouch += count;
            }
        }
        2 * vouch > all
    }

    /// Begins a slot epoch.
    fn begin_epoch(&mut self) {
        self.entry = None;
        for fetch in self.fetches.iter_mut().flatten() {
            fetch.fresh = false;
        }
    }

    /// Opens a tracking connection.
    pub(crate) fn connect(&mut self, rules: Rules, id: Id) {
        let node = &mut self[id];
        node.tracked = true;
        node.dead = false;
        if self.view.owner == id && rules.hold(Rule::ConnectionBeginsEpoch) {
            self.begin_epoch();
        }
    }

    /// Loses a tracking connection.
    pub(crate) fn lose(&mut self, id: Id) {
        let node = &mut self[id];
        node.tracked = false;
        node.dead = false;
        node.lease = 0;
        node.wire.clear();
        self.doubt.remove(id);
    }

    /// Handles the next message of a tracking connection.
    pub(crate) fn deliver(&mut self, rules: Rules, id: Id) {
        match self[id].wire.remove(0) {
            Message::Push => self.handle_push(rules, id),
            Message::Nil => {
                if self.view.owner == id && rules.hold(Rule::NilBeginsEpoch) {
                    self.begin_epoch();
                }
            }
            Message::Heartbeat(view) => self.handle_heartbeat(rules, id, view),
        }
    }

    fn handle_push(&mut self, rules: Rules, from: Id) {
        let is_owner = self.view.owner == from;
        if !is_owner && !rules.hold(Rule::PushFromEveryNode) {
            return;
        }
        if rules.hold(Rule::PushDropsEntry) {
            self.entry = None;
        }
        if rules.hold(Rule::PushInvalidatesFetch) {
            for fetch in self.fetches.iter_mut().flatten() {
                fetch.clean = false;
            }
        }
        if !is_owner && rules.hold(Rule::StrangePushDoubts) {
            self.doubt.insert(from);
        }
    }

    fn handle_heartbeat(&mut self, rules: Rules, from: Id, view: View) {
        let age = if rules.hold(Rule::LeaseFromSending) { view.age } else { 0 };
        let names_slot = view.claim.epoch > 0 || !view.of_cluster;
        if names_slot || !rules.hold(Rule::HoleVouchesForNothing) {
            let node = &mut self[from];
            node.lease = node.lease.max(lease(rules).saturating_sub(age));
        }

        let of_everybody = rules.hold(Rule::ViewOfEveryNode) || from == self.view.owner;
        if of_everybody && rules.hold(Rule::ViewWithHeartbeat) {
            self.merge(rules, view);
        }
        if rules.hold(Rule::DoubtEndsByPusher) {
            self.doubt.remove(from);
        } else {
            self.doubt = Set::NONE;
        }
        if self.view.owner != from {
            return;
        }
        let names_another = view.claim.epoch > 0 && view.claim.owner != from;
        self.denied = (names_another && rules.hold(Rule::OwnerAffirms))
            || (!view.primary && rules.hold(Rule::RoleOfOwner));
        if self.denied {
            self.begin_epoch();
        }
        self.migrating = view.migrating && rules.hold(Rule::NoAbsenceWhileMigrating);
        if self.migrating && self.entry.is_some_and(|entry| entry.value == ABSENT) {
            self.entry = None;
        }
    }

    /// Merges the claim of one node's view.
    fn merge(&mut self, rules: Rules, view: View) {
        let (claim, ours) = (view.claim, self.view);
        if claim.epoch == 0 {
            if view.of_cluster && !rules.hold(Rule::HoleEndsNothing) {
                self.view.epoch = 0;
            }
            return;
        }
        if claim == ours || (claim.epoch <= ours.epoch && rules.hold(Rule::MergePerSlot)) {
            return;
        }
        self.view = claim;
        if claim.owner == ours.owner {
            if rules.hold(Rule::ConfigEpochBeginsEpoch) {
                self.begin_epoch();
            }
        } else {
            self.denied = false;
            self.migrating = false;
            if rules.hold(Rule::OwnerBeginsEpoch) && rules.hold(Rule::SlotEpoch) {
                self.begin_epoch();
            }
        }
    }

    /// Sends a GET.
    pub(crate) fn fetch(&self, node: Id, kind: Kind) -> Fetch {
        let to_owner = self.view.owner == node;
        Fetch { node, answer: None, kind, fresh: true, clean: true, to_owner }
    }

    /// Handles the reply of a GET.
    pub(crate) fn handle_reply(&mut self, rules: Rules, at: usize) {
        let Some(fetch) = self.fetches[at].take() else { return };
        match fetch.answer {
            Some(Answer::Value(value)) if self.keeps(rules, fetch, value) => {
                self.entry = Some(Entry { value, node: fetch.node });
            }
            Some(Answer::Value(_)) | None => {}
            Some(Answer::Moved(to)) => self.fetches[at] = Some(self.fetch(to, Kind::Moved)),
            Some(Answer::Ask(to)) => self.fetches[at] = Some(self.fetch(to, Kind::Asking)),
        }
    }

    fn keeps(&self, rules: Rules, fetch: Fetch, value: u8) -> bool {
        may_be_kept(rules, fetch) && !(value == ABSENT && self.migrating)
    }

    /// Forgets what makes no difference any more, so that fewer states differ.
    pub(crate) fn forget(&mut self, scenario: &Scenario, rules: Rules) {
        // The answer of such a GET is not kept, and a redirection leads where another GET would go too.
        if rules.hold(Rule::MovedKeepsOwnersAnswer) {
            for fetch in &mut self.fetches {
                if fetch.is_some_and(|it| !may_be_kept(rules, it)) {
                    *fetch = None;
                }
            }
        }
        if self.fetches[0].is_none() {
            self.fetches.swap(0, 1);
        }
        let to_come = &scenario.steps[usize::from(self.step)..];
        if !to_come.iter().any(|step| matches!(step, Step::Promote(_))) {
            self.silent = 0;
        }
        // The age of a write that doesn't count.
        if self.written == scenario.value + scenario.writes {
            self.moved = LEASE;
        }
    }
}
