//! Afterimage serves images that live in Redis: from memory, and never a replaced one.
//!
//! The map of the house, in the order of a request's way through it:
//!
//! - [`cli`] parses the command line, [`settings`] are read once, `app` puts the parts together.
//! - `server` owns connections: sockets, bytes and time. `http` knows what HTTP means; nothing below it does.
//! - `read` and `write` know the order of the steps; the steps don't know each other.
//! - [`image`] has the values: ids, versions, records, representations, variants.
//! - `index` knows which versions are current, and keeps the promise that nothing replaced is served; `coalesce` makes
//!   one fetch of many.
//! - [`store`] keeps records and reports changes, `changes` passes them on; `offload` has the images that moved out of
//!   their records.
//! - `cache` keeps decoded bytes, and `originals` bring them there; `render` schedules what [`picture`] draws,
//!   and `decoder` runs the decoders of AVIF and JPEG XL in processes of their own.
//! - `events` tells browsers of changes.
//! - `clock` counts suspended time; `budget`, `cpu` and `limit` are permits for bytes, cores and places; `shutdown` has the
//!   phases of a stop.
//! - `token_file` and `running` are what a server leaves for the commands of its user; `backup` has the form of an export.
//! - `sync` has the locks and channels of the modules whose orders of threads are explored.
//! - `log`, `metrics`, `trace`, `spans` and `recent` inform operators, and `audit` compares what is claimed to be current with the
//!   store.
//!
//! `ARCHITECTURE.md` says why it is so.

#![cfg_attr(
    all(test, feature = "shuttle"),
    allow(dead_code, reason = "`events/threads.rs` stands in for the maker of events")
)]

mod app;
mod audit;
mod backup;
mod budget;
mod cache;
mod cache_status;
mod changes;
pub mod cli;
mod clock;
mod coalesce;
mod cpu;
mod decoder;
mod events;
mod exposition;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod histogram;
mod holders;
mod http;
pub mod image;
mod index;
mod limit;
mod log;
mod metrics;
mod offload;
mod originals;
mod peer;
pub mod picture;
mod read;
mod recent;
mod render;
mod running;
mod server;
pub mod settings;
mod shutdown;
#[cfg_attr(not(feature = "otlp"), path = "spans_off.rs")]
mod spans;
pub mod store;
mod sync;
mod task;
#[cfg(all(test, feature = "shuttle"))]
#[allow(clippy::unwrap_used, reason = "tests")]
mod threads;
mod token_file;
mod tokens;
mod trace;
mod write;

// The parts that tests and benches start or measure. Nothing else is public.
pub use app::App;
pub use cache::{Cache, CacheKey, CacheLimits};
pub use cache_status::CacheStatus;
pub use clock::{Clock, Suspended};
pub use decoder::run_if_asked as run_decoder_if_asked;
pub use http::ProblemKind;
pub use http::router::Route;
pub use index::{Rule, Rules};
pub use peer::PeerKey;
pub use read::{Answer, ImageRequest, Want};
pub use server::{Listener, Listeners, Stop, serve};
