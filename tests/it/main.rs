//! What the service promises, tested from outside: over HTTP, against real stores.

mod harness;

mod answers;
mod command_line;
mod embedded;
mod memory;
mod python;
mod records;
mod redis_outage;
mod stores;
