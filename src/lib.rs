//! Afterimage serves images that live in Redis: from memory, and never a replaced one.
//!
//! The map of the house, in the order of a request's way through it:
//!
//! - [`cli`] parses the command line, [`settings`] are read once, [`app`] puts the parts together.
//! - [`server`] owns connections: sockets, bytes and time. [`http`] knows what HTTP means; nothing below it does.
//! - [`read`] and [`mod@write`] know the order of the steps; the steps don't know each other.
//! - [`image`] has the values: ids, versions, records, representations, variants.
//! - [`index`] knows which versions are current, and keeps the promise that nothing replaced is served; [`coalesce`] makes
//!   one fetch of many.
//! - [`store`] keeps records and reports changes, [`changes`] passes them on; [`offload`] has the images that moved out of
//!   their records.
//! - [`cache`] keeps decoded bytes, and [`originals`] bring them there; [`render`] schedules what [`picture`] draws.
//! - [`events`] tells browsers of changes.
//! - [`budget`], [`cpu`] and `limit` are permits for bytes, cores and places; [`shutdown`] has the phases of a stop.
//! - [`log`] and [`metrics`] inform operators.
//!
//! `ARCHITECTURE.md` says why it is so.

pub mod app;
pub mod budget;
pub mod cache;
pub mod cache_status;
pub mod changes;
pub mod cli;
pub mod coalesce;
pub mod cpu;
pub mod events;
pub mod http;
pub mod image;
pub mod index;
mod limit;
pub mod log;
pub mod metrics;
pub mod offload;
pub mod originals;
pub mod picture;
pub mod read;
pub mod render;
pub mod server;
pub mod settings;
pub mod shutdown;
pub mod store;
mod task;
pub mod tokens;
pub mod write;
