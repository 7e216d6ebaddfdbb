//! The servers: writes, replication, failovers, both kinds of migration, and the bus between them.

use crate::scenario::{Scenario, Step};
use crate::state::{
    ABSENT, Answer, CURRENT, Cause, Claim, Fetch, Id, Kind, LEASE, Message, Node, Set, State,
    TIMEOUT,
};

impl State {
    /// Tells if two servers hear each other.
    pub(crate) fn same_side(&self, one: Id, other: Id) -> bool {
        self.isolated.has(one) == self.isolated.has(other)
    }

    /// Tells if the server executes a write to the key.
    pub(crate) fn takes_write(&self, scenario: &Scenario, id: Id) -> bool {
        let node = &self[id];
        if !node.up || !node.primary || node.paused {
            return false;
        }
        if scenario.plain {
            return scenario.votes[id as usize] == 0;
        }
        if node.claim.owner == id {
            return node.migrating.is_none() || node.value != ABSENT;
        }
        // ASKING.
        node.importing
            && Id::ALL.into_iter().any(|source| {
                let source = &self[source];
                source.up && source.migrating == Some(id) && source.value == ABSENT
            })
    }

    /// Executes a write of `value`.
    pub(crate) fn write(&mut self, id: Id, value: u8) {
        self[id].value = value;
        if value != ABSENT {
            // Until it counts, a value is as old as the last change of the owner.
            self.ages[value as usize] = self.moved;
        }
        self.send(id, Message::Push);
    }

    /// Sends a message over the tracking connection of a server, if there is one.
    pub(crate) fn send(&mut self, id: Id, message: Message) {
        let node = &mut self[id];
        if node.tracked && !node.dead && node.up {
            node.wire.push(message);
        }
    }

    /// Tells if a server has not heard yet who owns the slot, and can.
    pub(crate) fn can_learn(&self, scenario: &Scenario, id: Id) -> bool {
        let (node, owner) = (&self[id], self.truth.owner);
        if !node.up || id == owner || !self[owner].up || !self.same_side(id, owner) {
            return false;
        }
        if scenario.plain && scenario.votes[id as usize] == 0 {
            return node.primary;
        }
        node.claim != self.truth
    }

    /// A server hears who owns the slot.
    pub(crate) fn learn(&mut self, scenario: &Scenario, id: Id) {
        let (truth, cause) = (self.truth, self.cause);
        let node = &mut self[id];
        if scenario.plain && scenario.votes[id as usize] == 0 {
            node.primary = false;
            return;
        }
        let was_owner = node.claim.owner == id;
        node.claim = truth;
        node.paused = false;
        node.migrating = None;
        node.importing = false;
        if was_owner {
            match cause {
                Cause::Failover => node.primary = false,
                Cause::Migration if node.value != ABSENT => {
                    node.value = ABSENT;
                    if !scenario.silent_leftovers {
                        self.send(id, Message::Push);
                    }
                }
                // An atomic migration trims later.
                Cause::Migration | Cause::Handover => {}
            }
        }
    }

    /// Tells if a replica has a change to apply, and can.
    pub(crate) fn can_replicate(&self, scenario: &Scenario, id: Id) -> bool {
        let (node, owner) = (&self[id], self.truth.owner);
        node.up
            && !node.primary
            && id != owner
            && self[owner].up
            && self.same_side(id, owner)
            && (scenario.plain || node.claim == self.truth)
            && node.value != self[owner].value
    }

    /// A replica takes over its primary's value.
    pub(crate) fn replicate(&mut self, scenario: &Scenario, id: Id) {
        self[id].value = self[self.truth.owner].value;
        self.send(id, if scenario.full_resync { Message::Nil } else { Message::Push });
    }

    /// Tells if the key can be moved in a migration key by key.
    pub(crate) fn can_move_key(&self, id: Id) -> bool {
        let node = &self[id];
        node.up
            && node.value != ABSENT
            && node.migrating.is_some_and(|to| self[to].importing && self[to].up)
    }

    /// Moves the key: `RESTORE` at the target, `DEL` at the source.
    pub(crate) fn move_key(&mut self, id: Id) {
        if let Some(to) = self[id].migrating {
            self[to].value = self[id].value;
            self.send(to, Message::Push);
            self[id].value = ABSENT;
            self.send(id, Message::Push);
        }
    }

    /// Tells if a former owner still has the key after an atomic migration.
    pub(crate) fn can_trim(&self, id: Id) -> bool {
        let node = &self[id];
        self.cause == Cause::Handover
            && node.up
            && node.primary
            && id != self.truth.owner
            && node.claim == self.truth
            && node.value != ABSENT
    }

    /// Deletes the key at a former owner.
    pub(crate) fn trim(&mut self, id: Id) {
        self[id].value = ABSENT;
        self.send(id, Message::Push);
    }

    /// Answer of a server to a GET.
    pub(crate) fn answer(&self, scenario: &Scenario, fetch: Fetch) -> Answer {
        let (id, node) = (fetch.node, &self[fetch.node]);
        if scenario.plain {
            return Answer::Value(node.value);
        }
        if node.importing && fetch.kind == Kind::Asking {
            return Answer::Value(node.value);
        }
        if node.claim.owner != id || !node.primary {
            return Answer::Moved(node.claim.owner);
        }
        match node.migrating {
            Some(to) if node.value == ABSENT => Answer::Ask(to),
            _ => Answer::Value(node.value),
        }
    }

    /// Tells if the scenario's next step can take place.
    pub(crate) fn can_step(&self, scenario: &Scenario, step: Step) -> bool {
        let owner = self.truth.owner;
        match step {
            Step::Promote(id) => {
                self[id].up
                    && !self[id].primary
                    && self.silent >= TIMEOUT
                    && !(self[owner].up && self.same_side(id, owner))
            }
            Step::Takeover(id) => self[id].up && !self[id].primary,
            Step::Failover(id) => {
                self[id].up
                    && !self[id].primary
                    && self[id].value == self[owner].value
                    && self.same_side(id, owner)
            }
            Step::Finish(_) => self[owner].value == ABSENT,
            Step::HandOver(id) => {
                self[id].claim == self.truth && self[id].value == ABSENT && id != owner
            }
            Step::Migrate(id) | Step::Give(id) => self[id].claim == self.truth && id != owner,
            // Not before those who hear it in time have heard of the last change.
            Step::Isolate(_) | Step::IsolateWithUs(_) => {
                Id::ALL.into_iter().all(|id| scenario.slow.has(id) || !self.can_learn(scenario, id))
            }
            Step::Flush(id) => self[id].up,
            Step::GiveUnnoticed(_)
            | Step::Rejoin
            | Step::Die(_)
            | Step::RestartEmpty(_)
            | Step::Cut(_)
            | Step::ReplicaOf(_)
            | Step::Hole(_) => true,
        }
    }

    /// Takes the scenario's next step.
    pub(crate) fn take_step(&mut self, scenario: &Scenario, step: Step) {
        let owner = self.truth.owner;
        self.step += 1;
        match step {
            Step::Isolate(set) => self.isolated = set,
            Step::IsolateWithUs(set) => {
                self.isolated = set;
                self.each(set.complement(), |node| node.cut = true);
            }
            Step::Rejoin => {
                self.isolated = Set::NONE;
                self.silent = 0;
                self.each(Set::of(&Id::ALL), |node| node.cut = false);
            }
            Step::Die(id) => {
                self[id].up = false;
                self[id].dead = self[id].tracked;
            }
            Step::RestartEmpty(id) => {
                self[id].up = true;
                self[id].value = ABSENT;
                self.silent = 0;
            }
            Step::Cut(set) => self.each(set, |node| node.cut = true),
            Step::Promote(id) | Step::Takeover(id) => self.own(id, Cause::Failover),
            Step::Failover(id) => {
                self[owner].paused = true;
                self.own(id, Cause::Failover);
            }
            Step::ReplicaOf(id) => {
                self[owner].primary = false;
                self.own(id, Cause::Failover);
            }
            Step::Migrate(id) => {
                self[owner].migrating = Some(id);
                self[id].importing = true;
            }
            Step::Finish(id) | Step::Give(id) => self.own(id, Cause::Migration),
            Step::GiveUnnoticed(id) => {
                self.own(id, Cause::Migration);
                // The config epoch that the target has had all along is lower than the source's.
                self.truth.epoch = 1;
                self[id].claim = self.truth;
            }
            Step::HandOver(id) => {
                self[owner].paused = true;
                self[id].value = self[owner].value;
                self.own(id, Cause::Handover);
                if !scenario.silent_import {
                    self.send(id, Message::Push);
                }
            }
            Step::Hole(id) => self[id].claim.epoch = 0,
            Step::Flush(id) => {
                self[id].value = ABSENT;
                self.send(id, Message::Nil);
            }
        }
    }

    fn each(&mut self, set: Set, change: impl Fn(&mut Node)) {
        for id in Id::ALL.into_iter().filter(|id| set.has(*id)) {
            change(&mut self[id]);
        }
    }

    /// Makes a server the owner, with a new config epoch.
    fn own(&mut self, id: Id, cause: Cause) {
        self.truth = Claim { owner: id, epoch: self.truth.epoch + 1 };
        self.cause = cause;
        self.moved = 0;
        self.silent = 0;
        let truth = self.truth;
        let node = &mut self[id];
        node.claim = truth;
        node.primary = true;
        node.paused = false;
        node.importing = false;
        node.migrating = None;
    }

    /// Lets time pass.
    pub(crate) fn tick(&mut self, longest: u8) {
        let owner = self.truth.owner;
        if !self[owner].up || self.isolated.has(owner) {
            self.silent = (self.silent + 1).min(TIMEOUT);
        }
        self.moved = (self.moved + 1).min(LEASE);
        for age in self.ages.iter_mut().filter(|age| **age != CURRENT) {
            *age = (*age + 1).min(LEASE);
        }
        for node in &mut self.nodes {
            node.lease = node.lease.saturating_sub(1);
            for message in &mut node.wire {
                if let Message::Heartbeat(view) = message {
                    view.age = (view.age + 1).min(longest);
                }
            }
        }
    }

    /// Notes which value counts now, and when the others were replaced.
    pub(crate) fn settle(&mut self) {
        let owner = &self[self.truth.owner];
        let value = match owner.migrating {
            Some(to) if owner.value == ABSENT && self[to].importing => self[to].value,
            _ => owner.value,
        };
        if value != self.value {
            self.ages[self.value as usize] = 0;
            self.ages[value as usize] = CURRENT;
            self.value = value;
        }
        // The age of a value that is nowhere left makes no difference.
        for value in 0..self.ages.len() {
            if self.ages[value] != CURRENT && !self.is_somewhere(value) {
                self.ages[value] = LEASE;
            }
        }
    }

    fn is_somewhere(&self, value: usize) -> bool {
        self.nodes.iter().any(|node| usize::from(node.value) == value)
            || self.entry.is_some_and(|entry| usize::from(entry.value) == value)
            || self.fetches.iter().flatten().any(
                |fetch| matches!(fetch.answer, Some(Answer::Value(it)) if usize::from(it) == value),
            )
    }
}
