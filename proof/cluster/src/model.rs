//! The model that the checker explores: one scenario under some rules.

use stateright::{Model, Property};

use crate::client::lease;
use crate::rules::{Rule, Rules};
use crate::scenario::{Bound, Scenario, Step};
use crate::state::{
    ABSENT, CURRENT, Cause, Claim, Entry, Id, Kind, LEASE, Message, Node, Set, State, VALUES, View,
};

/// Something that happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The scenario's next step.
    Step(Step),
    /// A tick passes.
    Tick,
    /// A server executes a write.
    Write(Id),
    /// A server executes a DEL.
    Delete(Id),
    /// A replica applies its primary's value.
    Replicate(Id),
    /// A server hears who owns the slot.
    Learn(Id),
    /// The key is moved, in a migration key by key.
    MoveKey(Id),
    /// A former owner deletes the key, after an atomic migration.
    Trim(Id),
    /// The client opens a tracking connection.
    Connect(Id),
    /// The client's tracking connection breaks.
    Lose(Id),
    /// The client sends a heartbeat, and the server executes it.
    Heartbeat(Id),
    /// The client handles the next message of a tracking connection.
    Deliver(Id),
    /// The client sends a GET to the owner.
    Get(usize),
    /// The server executes the GET.
    Execute(usize),
    /// The client handles the reply.
    Reply(usize),
}

/// A scenario, the rules that the client keeps, and the bound to check.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Checked {
    pub(crate) scenario: Scenario,
    pub(crate) rules: Rules,
    pub(crate) bound: Bound,
    /// Also look for a state in which the client serves the new value.
    pub(crate) goal: bool,
}

/// Name of the property that nothing older than the bound is served.
pub(crate) const BOUND: &str = "nothing older than the bound is served";
/// Name of the property that the client serves from memory after all steps.
pub(crate) const GOAL: &str = "the present value is served after the last step";

impl Checked {
    fn tracked(&self) -> Set {
        let mut tracked = self.scenario.tracked;
        if !self.rules.hold(Rule::TrackEveryPrimary) {
            for id in Id::ALL {
                if id != Id::A && self.scenario.votes[id as usize] == 0 {
                    tracked.remove(id);
                }
            }
        }
        tracked
    }

    /// Tells if the client opens a tracking connection to this node.
    fn may_connect(&self, state: &State, id: Id) -> bool {
        let is_primary = !self.scenario.replicas.has(id) && id != Id::A;
        state.view.owner == id
            || self.scenario.votes[id as usize] > 0
            || (is_primary && self.rules.hold(Rule::TrackEveryPrimary))
    }

    fn is_within_bound(&self, state: &State) -> bool {
        let Some(value) = state.served(self.rules, self.scenario.votes) else { return true };
        let age = state.ages[value as usize];
        if age == CURRENT {
            return true;
        }
        let pushed = || {
            state.nodes.iter().any(|node| {
                node.tracked
                    && !node.cut
                    && node.wire.iter().any(|it| matches!(it, Message::Push | Message::Nil))
            })
        };
        match self.bound {
            Bound::Nothing => false,
            Bound::OnePush => age < LEASE && pushed(),
            Bound::Ticks(ticks) => age < ticks,
            Bound::OnePushOrTicks(ticks) => age < ticks || pushed(),
        }
    }

    fn is_goal(&self, state: &State) -> bool {
        let scenario = &self.scenario;
        usize::from(state.step) == scenario.steps.len()
            && (scenario.writes == 0 || state.written > scenario.value)
            && state.served(self.rules, scenario.votes) == Some(state.value)
            && state.entry.is_some_and(|entry| entry.node == scenario.served_by)
    }
}

impl Model for Checked {
    type State = State;
    type Action = Event;

    fn init_states(&self) -> Vec<State> {
        let scenario = &self.scenario;
        let claim = Claim { owner: Id::A, epoch: 2 };
        let nodes = Id::ALL.map(|id| {
            let replica = scenario.replicas.has(id);
            let tracked = self.tracked().has(id);
            let of_plain = scenario.plain && scenario.votes[id as usize] == 0;
            Node {
                up: scenario.nodes.has(id),
                primary: !replica,
                value: if id == Id::A || replica { scenario.value } else { ABSENT },
                claim: if of_plain { Claim { owner: id, epoch: 0 } } else { claim },
                migrating: None,
                importing: false,
                paused: false,
                cut: false,
                tracked,
                dead: false,
                lease: if tracked { LEASE } else { 0 },
                wire: Vec::new(),
            }
        });
        let mut ages = [LEASE; VALUES];
        ages[scenario.value as usize] = CURRENT;
        vec![State {
            nodes,
            step: 0,
            isolated: Set::NONE,
            silent: 0,
            truth: claim,
            cause: Cause::Failover,
            value: scenario.value,
            ages,
            moved: LEASE,
            written: scenario.value,
            view: claim,
            doubt: Set::NONE,
            denied: false,
            migrating: false,
            entry: scenario.cached.then_some(Entry { value: scenario.value, node: Id::A }),
            fetches: [None; 2],
            losses: scenario.losses,
        }]
    }

    fn actions(&self, state: &State, events: &mut Vec<Event>) {
        let scenario = &self.scenario;
        if let Some(step) = scenario.steps.get(usize::from(state.step))
            && state.can_step(scenario, *step)
        {
            events.push(Event::Step(*step));
        }
        let mut prompt = true;
        for id in Id::ALL.into_iter().filter(|id| scenario.nodes.has(*id)) {
            let node = &state[id];
            if state.can_learn(scenario, id) {
                events.push(Event::Learn(id));
                prompt &= scenario.slow.has(id);
            }
            if state.written < scenario.value + scenario.writes && state.takes_write(scenario, id) {
                events.push(Event::Write(id));
                if scenario.deletes && node.value != ABSENT {
                    events.push(Event::Delete(id));
                }
            }
            if state.can_replicate(scenario, id) {
                events.push(Event::Replicate(id));
            }
            if state.can_move_key(id) {
                events.push(Event::MoveKey(id));
            }
            if state.can_trim(id) {
                events.push(Event::Trim(id));
            }
            if node.tracked {
                if !node.wire.is_empty() && !node.cut {
                    events.push(Event::Deliver(id));
                }
                let beats = node.wire.iter().any(|it| matches!(it, Message::Heartbeat(_)));
                if node.up && !node.dead && !node.cut && !beats {
                    events.push(Event::Heartbeat(id));
                }
                if state.losses > 0 {
                    events.push(Event::Lose(id));
                }
            } else if node.up && !node.cut && self.may_connect(state, id) {
                events.push(Event::Connect(id));
            }
        }
        if prompt {
            events.push(Event::Tick);
        }
        for (at, fetch) in state.fetches.iter().enumerate().take(scenario.fetches) {
            match fetch {
                None => {
                    let owner = &state[state.view.owner];
                    if owner.up
                        && !owner.cut
                        && state.served(self.rules, scenario.votes).is_none()
                        && state.fetches[..at].iter().all(Option::is_some)
                    {
                        events.push(Event::Get(at));
                    }
                }
                Some(fetch) if fetch.answer.is_none() => {
                    if state[fetch.node].up && !state[fetch.node].cut {
                        events.push(Event::Execute(at));
                    }
                }
                Some(fetch) if !state[fetch.node].cut => events.push(Event::Reply(at)),
                Some(_) => {}
            }
        }
    }

    fn next_state(&self, last: &State, event: Event) -> Option<State> {
        let (scenario, rules) = (&self.scenario, self.rules);
        let mut state = last.clone();
        match event {
            Event::Step(step) => state.take_step(scenario, step),
            Event::Tick => state.tick(lease(rules)),
            Event::Write(id) => {
                state.written += 1;
                let value = state.written;
                state.write(id, value);
            }
            Event::Delete(id) => {
                state.written += 1;
                state.write(id, ABSENT);
            }
            Event::Replicate(id) => state.replicate(scenario, id),
            Event::Learn(id) => state.learn(scenario, id),
            Event::MoveKey(id) => state.move_key(id),
            Event::Trim(id) => state.trim(id),
            Event::Connect(id) => state.connect(rules, id),
            Event::Lose(id) => {
                state.losses -= 1;
                state.lose(id);
            }
            Event::Heartbeat(id) => {
                let node = &mut state[id];
                let overtakes = !rules.hold(Rule::HeartbeatBehindPushes);
                let at = if overtakes { 0 } else { node.wire.len() };
                let answer = Message::Heartbeat(View {
                    of_cluster: !scenario.plain || scenario.votes[id as usize] > 0,
                    claim: node.claim,
                    primary: node.primary,
                    migrating: node.migrating.is_some(),
                    age: 0,
                });
                node.wire.insert(at, answer);
                if at == 0 && !scenario.late.has(id) {
                    state.deliver(rules, id);
                }
            }
            Event::Deliver(id) => state.deliver(rules, id),
            Event::Get(at) => state.fetches[at] = Some(state.fetch(state.view.owner, Kind::First)),
            Event::Execute(at) => {
                if let Some(fetch) = state.fetches[at] {
                    let answer = Some(state.answer(scenario, fetch));
                    state.fetches[at] = Some(crate::state::Fetch { answer, ..fetch });
                }
            }
            Event::Reply(at) => state.handle_reply(rules, at),
        }
        state.settle();
        state.forget(scenario, rules);
        Some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        let mut properties =
            vec![Property::always(BOUND, |model: &Self, state| model.is_within_bound(state))];
        if self.goal {
            properties.push(Property::sometimes(GOAL, |model: &Self, state| model.is_goal(state)));
        }
        properties
    }
}
