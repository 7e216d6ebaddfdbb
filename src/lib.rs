//! Afterimage serves images that live in Redis: from memory, and never a replaced one.
//!
//! The map of the house, in the order in which a request walks through it:
//!
//! - [`settings`] is read once; [`app`] puts the parts together; [`server`] owns connections.
//! - [`http`] turns a request into values and an answer into a response. Nothing below it knows HTTP.
//! - [`read`] and [`mod@write`] know the order of the steps; the steps don't know each other.
//! - [`image`] has the values: ids, versions, types, records, variants.
//! - [`index`] knows what the store holds while it may rely on it, and keeps the promise that nothing replaced is
//!   served; [`coalesce`] makes one fetch of many.
//! - [`store`] keeps records and tells of changes; [`offload`] has the images that moved out of them; [`cache`] keeps
//!   decoded bytes; [`picture`] knows pixels and signatures; [`render`] schedules renders.
//! - [`events`] tells browsers what changes.
//! - [`log`] and [`metrics`] inform operators; [`cli`] is the command line.
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
