//! The service's promises, tested from outside: over HTTP, against real stores.
//!
//! Tests run in three tiers:
//!
//! - `tests/run.sh quick`: under a minute after the build. Leaves out the modules that need a browser, a front, Prometheus
//!   or Python, the checker, the servers `redis_8` and `valkey_9`, and every module `long`.
//! - `tests/run.sh`: everything.
//! - `tests/run.sh soak`: races, outages and kills again and again, for `AFTERIMAGE_TEST_SOAK_MINUTES`, and the event
//!   streams for `AFTERIMAGE_TEST_EVENTS_SECONDS`.
//!
//! Elsewhere, a test that takes seconds, or needs a program besides redis-server, openssl and python3, is registered by
//! `long_tests!`. A test whose program is missing fails, and its message says how to install it.

#![expect(
    clippy::unwrap_used,
    reason = "a test that finds nothing where something must be has failed"
)]

/// Registers tests in a module `long`, which `tests/run.sh quick` leaves out.
macro_rules! long_tests {
    ($($(#[$attribute:meta])+ $test:ident)+) => {
        mod long {
            $(
                $(#[$attribute])+
                async fn $test() {
                    super::$test().await;
                }
            )+
        }
    };
}

mod harness;

mod access;
mod answers;
mod browser;
mod cases;
mod checker;
mod coherence;
mod command_line;
mod concepts;
mod conditional;
mod connections;
mod dashboards;
mod decoder;
mod description;
mod embedded;
mod events;
mod fault_checker;
mod faults;
mod freshness;
mod frontend;
mod fronts;
mod gallery;
mod judge;
mod memory;
mod offload;
mod operation;
#[cfg(feature = "otlp")]
mod otlp;
mod outage;
mod pixels;
mod plain;
mod python;
mod records;
mod resident;
mod service;
mod soak;
mod stores;
mod strangers;
mod strangers_events;
mod tracing;
mod variants;
mod writes;
