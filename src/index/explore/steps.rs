//! The steps of a world, and which of them can come next.

use super::world::{Message, Stage, World};

/// A key, by its number.
pub(super) type Key = usize;

/// A step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Step {
    /// Redis executes `SET`.
    Write(Key),
    /// Redis executes `SET … PX`, with a time to live of one tick.
    WriteExpiring(Key),
    /// Redis executes `DEL`.
    Delete(Key),
    /// Redis executes `FLUSHALL`.
    Flush,
    /// Redis begins to track a new connection, and answers the first heartbeat.
    Track,
    /// Redis answers a heartbeat that is sent now.
    Beat,
    /// The next message of the tracking connection arrives.
    Arrive,
    /// The task that waits for replies on the tracking connection announces the next one.
    Announce,
    /// The tracking connection breaks. What was under way may still arrive.
    Break,
    /// The client notices that it is broken.
    Notice,
    /// A request asks for a key that isn't known to be current.
    Request(Key),
    /// A request asks for a key whose bytes have left memory.
    Ask(Key),
    /// The leader of a fetch sends its GET.
    Send(usize),
    /// Redis executes that GET.
    Serve(usize),
    /// The reply arrives: the result is kept or not, and those who wait are told.
    Reply(usize),
    /// All requests that wait for a fetch leave, and it is given up.
    Leave(usize),
    /// The leader of a fetch panics.
    Panic(usize),
    /// Time passes.
    Tick,
}

impl World {
    /// All steps that can come next.
    pub(super) fn next_steps(&self) -> Vec<Step> {
        let mut steps = Vec::new();
        let left = &self.left;
        for key in 0..left.keys {
            if left.writes > 0 {
                steps.push(Step::Write(key));
                steps.extend(left.expires.then_some(Step::WriteExpiring(key)));
                let exists = self.values[key].is_some();
                steps.extend((left.deletes && exists).then_some(Step::Delete(key)));
            }
            if self.can_request(key) {
                steps.push(Step::Request(key));
            }
            if left.asks && self.can_ask(key) {
                steps.push(Step::Ask(key));
            }
        }
        if left.flushes > 0 {
            steps.push(Step::Flush);
        }
        let idle = self.wire.is_empty() && self.announcements.is_empty();
        if self.is_noticed && idle {
            steps.push(Step::Track);
        }
        if !self.is_noticed && !self.is_broken {
            if left.losses > 0 {
                steps.push(Step::Break);
            }
            let waits = |it: &Message| matches!(it, Message::Tracked { .. } | Message::Beat { .. });
            let is_asked = self.wire.iter().any(waits) || !self.announcements.is_empty();
            if left.beats > 0 && !is_asked && self.is_announced {
                steps.push(Step::Beat);
            }
        }
        if !self.wire.is_empty() {
            steps.push(Step::Arrive);
        }
        if !self.announcements.is_empty() {
            steps.push(Step::Announce);
        }
        if self.is_broken && !self.is_noticed {
            steps.push(Step::Notice);
        }
        for (number, fetch) in self.fetches.iter().enumerate() {
            match fetch.stage {
                Stage::Registered if fetch.may_send() => steps.push(Step::Send(number)),
                Stage::Registered | Stage::Over => {}
                Stage::Sent => steps.push(Step::Serve(number)),
                Stage::Served(_) => steps.push(Step::Reply(number)),
            }
            if fetch.stage != Stage::Over && left.cancels > 0 {
                steps.push(Step::Panic(number));
                // Otherwise it isn't given up: its successor waits for it.
                if !self.fetches.iter().any(|it| it.waits_for(fetch)) {
                    steps.push(Step::Leave(number));
                }
            }
        }
        if left.ticks > 0 {
            steps.push(Step::Tick);
        }
        steps
    }
}
