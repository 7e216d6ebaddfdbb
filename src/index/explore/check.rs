//! The promise, checked after every step, and what tells one state of a world from another.

use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use xxhash_rust::xxh3::Xxh3;

use super::steps::Key;
use super::world::{LEASE, Message, Number, Past, Stage, World, moment, number_of};
use crate::clock::BootInstant;
use crate::index::{Entry, Known};
use crate::store::Lease;

impl World {
    /// Checks the promise for each key:
    ///
    /// 1. Nothing is current that a push which has arrived has ended, or that a request has seen replaced.
    /// 2. Nothing is current that was replaced, unless its push is on its way, or the connection broke and the lease of the
    ///    last heartbeat goes on.
    /// 3. Nothing is current past its expiry, or past the lease.
    /// 4. What is served in an outage was current no longer ago than is said, and nothing newer has been told or seen.
    /// 5. Every fetch that can be joined has a leader.
    pub(super) fn check(&self) -> Result<(), String> {
        let now = self.now();
        for key in 0..self.left.keys {
            let id = &self.ids[key];
            if let Some(known) = self.index.peek(std::slice::from_ref(id)).remove(0) {
                self.check_current(key, &known, now)?;
            }
            if let Some(last) = self.index.last_known(id) {
                self.check_last_known(key, &last.known, last.age, now)?;
            }
        }
        let state = self.index.lock();
        for flight in state.flights.values() {
            if !self.fetches.iter().any(|it| it.leads(flight)) {
                return Err("a fetch that is over can be joined".to_owned());
            }
        }
        Ok(())
    }

    fn check_current(&self, key: Key, known: &Known, now: u64) -> Result<(), String> {
        let number = number_of(known);
        let name = ["a", "b"][key];
        if now >= self.heard + LEASE {
            return Err(format!("{name} = {number} is current, and the lease is over"));
        }
        if self.is_noticed || !self.is_announced {
            return Err(format!("{name} = {number} is current, and nobody pushes changes"));
        }
        let value = self.values[key].map_or(0, |it| it.number);
        if number == value {
            return Ok(());
        }
        let expired = number != 0 && self.written[key] == number;
        if expired {
            return Err(format!("{name} = {number} is current, and has expired"));
        }
        if self.is_gone(key, number) {
            return Err(format!("{name} = {number} is current, and a push has ended it"));
        }
        if !self.is_as_new_as_seen(key, number) {
            return Err(format!(
                "{name} = {number} is current, and a request has seen what replaced it"
            ));
        }
        let names = |it: &Message| match it {
            Message::Push(of, _) => *of == key,
            Message::Nil(_) => true,
            Message::Tracked { .. } | Message::Beat { .. } => false,
        };
        if self.is_broken || self.wire.iter().any(names) {
            return Ok(());
        }
        Err(format!("{name} = {number} is current for ever, and was replaced by {value}"))
    }

    /// True if a push that has arrived has ended this value.
    fn is_gone(&self, key: Key, number: Number) -> bool {
        !self.was_there_since(key, number, self.told[key])
    }

    /// True unless a request was answered with what replaced this value.
    fn is_as_new_as_seen(&self, key: Key, number: Number) -> bool {
        self.was_there_since(key, number, self.seen[key])
    }

    fn was_there_since(&self, key: Key, number: Number, write: Number) -> bool {
        let since = |it: &&Past| it.written >= write;
        self.past[key].iter().filter(since).any(|it| it.value == number)
    }

    fn check_last_known(
        &self,
        key: Key,
        known: &Known,
        age: Duration,
        now: u64,
    ) -> Result<(), String> {
        let number = number_of(known);
        let name = ["a", "b"][key];
        if self.is_gone(key, number) {
            return Err(format!(
                "{name} = {number} would be served in an outage, and is known to be gone"
            ));
        }
        if !self.is_as_new_as_seen(key, number) {
            return Err(format!(
                "{name} = {number} would be served in an outage, and a request has seen what replaced it"
            ));
        }
        let said = now - age.as_secs();
        let was = self.past[key].iter().rev().find(|it| it.value == number);
        match was.and_then(|it| it.until) {
            Some(until) if until < said => Err(format!(
                "{name} = {number} would be served as {} ticks old, and was replaced in tick {until}",
                age.as_secs()
            )),
            _ => Ok(()),
        }
    }

    /// A hash of everything on which later steps depend.
    pub(super) fn fingerprint(&self) -> u64 {
        let mut hash = Xxh3::new();
        let it = &mut hash;
        (&self.left, self.now(), &self.values, self.written, self.told, self.seen).hash(it);
        for (past, (told, seen)) in self.past.iter().zip(self.told.iter().zip(&self.seen)) {
            // Earlier states are gone, whatever happens.
            past.iter().filter(|it| it.written >= *told.min(seen)).for_each(|past| past.hash(it));
        }
        (self.connection, self.is_broken, self.is_noticed, self.is_announced, self.heard).hash(it);
        (&self.wire, &self.announcements).hash(it);
        let state = self.index.lock();
        let since = |it: BootInstant| it.since(moment(0)).as_secs();
        for fetch in self.fetches.iter().filter(|it| it.stage != Stage::Over) {
            (fetch.key, fetch.stage, fetch.must_see).hash(it);
            let Some(lease) = &fetch.lease else { continue };
            let listed = state.flights.get(&lease.id);
            let is_listed = listed.is_some_and(|it| Arc::ptr_eq(it, &lease.flight));
            (is_listed, lease.flight.is_sent(), lease.flight.is_invalidated()).hash(it);
            (lease.epoch, since(lease.began), fetch.may_send()).hash(it);
            let entry = state.peek(&lease.id);
            entry.is_some_and(|it| it.fetched < lease.began).hash(it);
        }
        for (id, entry) in state.entries.iter().chain(&state.absent) {
            let Entry { known, expires, epoch, fetched, replaced, .. } = entry;
            (id.as_str(), number_of(known), epoch, replaced).hash(it);
            (expires.map(since), since(*fetched)).hash(it);
        }
        (state.coherence.name(), state.epoch, state.lost, state.tracked, state.has_kept).hash(it);
        let lease = match state.lease {
            Lease::Endless => None,
            Lease::Until(end) => Some(since(end)),
        };
        lease.hash(it);
        for (epoch, end) in &state.ended {
            (epoch, since(*end)).hash(it);
        }
        hash.finish()
    }
}
