//! Events in words.

use stateright::Model;

use crate::model::{Checked, Event};
use crate::scenario::Step;
use crate::state::{Answer, CURRENT, Claim, Id, Message, Set, State};

/// A value in words.
fn value(value: u8) -> String {
    if value == 0 { String::from("absent") } else { format!("v{value}") }
}

fn set(set: Set) -> String {
    let names: Vec<_> =
        Id::ALL.into_iter().filter(|id| set.has(*id)).map(|id| format!("{id:?}")).collect();
    names.join(" and ")
}

fn step(step: Step) -> String {
    match step {
        Step::Isolate(it) => format!("{}: cut off from its peers, not from us", set(it)),
        Step::IsolateWithUs(it) => format!("{} and we: cut off from all others", set(it)),
        Step::Rejoin => String::from("all cuts end"),
        Step::Cut(it) => format!("{}: cut off from us", set(it)),
        Step::Die(id) => format!("{id:?} dies"),
        Step::RestartEmpty(id) => format!("{id:?} starts again, empty"),
        Step::Promote(id) => format!("{id:?} is elected and owns the slot"),
        Step::Failover(id) => format!("CLUSTER FAILOVER: {id:?} owns the slot"),
        Step::Takeover(id) => format!("CLUSTER FAILOVER TAKEOVER: {id:?} owns the slot"),
        Step::ReplicaOf(id) => format!("REPLICAOF: {id:?} is the primary"),
        Step::Migrate(id) => format!("the slot begins to migrate to {id:?}"),
        Step::Finish(id) => format!("SETSLOT NODE: {id:?} owns the slot"),
        Step::Give(id) => format!("SETSLOT NODE with keys left behind: {id:?} owns the slot"),
        Step::GiveUnnoticed(id) => {
            format!("SETSLOT NODE without a new config epoch: {id:?} owns the slot")
        }
        Step::HandOver(id) => format!("atomic migration: {id:?} has the key and owns the slot"),
        Step::Hole(id) => format!("{id:?}'s view loses the slot"),
        Step::Flush(id) => format!("FLUSHALL at {id:?}"),
    }
}

/// The owner in a view, in words.
fn owner(claim: Claim) -> String {
    match claim.epoch {
        0 => String::from(": no owner named"),
        epoch => format!(": {:?} owns the slot (config epoch {epoch})", claim.owner),
    }
}

/// One event in words. `before` is the state in which it happens.
fn event(model: &Checked, before: &State, event: Event) -> String {
    match event {
        Event::Step(it) => step(it),
        Event::Tick => String::from("a tick passes"),
        Event::Write(id) => format!("{id:?} takes a write: {}", value(before.written + 1)),
        Event::Delete(id) => format!("{id:?} takes a DEL"),
        Event::Replicate(id) => {
            format!("{id:?} replicates {}", value(before[before.truth.owner].value))
        }
        Event::Learn(id) => format!(
            "{id:?} hears that {:?} owns the slot (config epoch {})",
            before.truth.owner, before.truth.epoch
        ),
        Event::MoveKey(id) => format!("MIGRATE moves the key from {id:?}"),
        Event::Trim(id) => format!("{id:?} trims the key"),
        Event::Connect(id) => format!("we track {id:?}"),
        Event::Lose(id) => format!("our connection to {id:?} breaks"),
        Event::Heartbeat(id) => {
            let sent = format!("heartbeat to {id:?}");
            let after = model.next_state(before, event);
            match after {
                Some(after) if after[id].wire.len() > before[id].wire.len() => sent,
                _ => format!("{sent}, answered at once{}", owner(before[id].claim)),
            }
        }
        Event::Deliver(id) => match before[id].wire[0] {
            Message::Push => format!("we get a push from {id:?}"),
            Message::Nil => format!("we get a nil push from {id:?}"),
            Message::Heartbeat(view) => {
                let after = match view.age {
                    0 => String::new(),
                    age => format!(" after {age} ticks"),
                };
                format!("heartbeat answered by {id:?}{after}{}", owner(view.claim))
            }
        },
        Event::Get(_) => format!("GET to {:?}", before.view.owner),
        Event::Execute(at) => match before.fetches[at] {
            Some(fetch) => format!("{:?} executes the GET", fetch.node),
            None => String::new(),
        },
        Event::Reply(at) => match before.fetches[at] {
            Some(fetch) => match fetch.answer {
                Some(Answer::Value(it)) => format!("reply of {:?}: {}", fetch.node, value(it)),
                Some(Answer::Moved(to)) => {
                    format!("reply of {:?}: MOVED to {to:?}; GET to {to:?}", fetch.node)
                }
                Some(Answer::Ask(to)) => {
                    format!("reply of {:?}: ASK {to:?}; ASKING and GET to {to:?}", fetch.node)
                }
                None => String::new(),
            },
            None => String::new(),
        },
    }
}

/// The steps to a violation, and what is served then.
pub(crate) fn timeline(model: &Checked, path: &[(State, Option<Event>)]) -> String {
    let mut lines = Vec::new();
    for (state, next) in path {
        if let Some(next) = next {
            lines.push(format!("  {}. {}", lines.len() + 1, event(model, state, *next)));
        }
    }
    if let Some((state, _)) = path.last()
        && let Some(served) = state.served(model.rules, model.scenario.votes)
    {
        let age = state.ages[served as usize];
        let since = match age {
            CURRENT => String::from("which is right"),
            0 => String::from("replaced within this tick"),
            1 => String::from("replaced a tick ago"),
            age => format!("replaced {age} ticks ago or more"),
        };
        lines.push(format!(
            "  => served as current: {}, {since}; right is {}",
            value(served),
            value(state.value)
        ));
    }
    lines.join("\n")
}
