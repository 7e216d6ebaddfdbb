//! What the service promises, tested from outside: over HTTP, against real stores.

#![expect(
    clippy::unwrap_used,
    reason = "a test that finds nothing where something must be has failed"
)]

mod harness;

mod answers;
mod browser;
mod checker;
mod coherence;
mod command_line;
mod concepts;
mod conditional;
mod connections;
mod dashboards;
mod description;
mod embedded;
mod events;
mod freshness;
mod fronts;
mod memory;
mod offload;
mod operation;
mod outage;
mod pixels;
mod plain;
mod python;
mod records;
mod stores;
mod variants;
mod writes;
