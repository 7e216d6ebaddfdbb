//! Afterimage serves images that live in Redis: from memory, and never a replaced one.
//!
//! The map of the house, in the order in which a request walks through it:
//!
//! - [`settings`] is read once; [`app`] puts the parts together; [`server`] takes connections.
//! - [`http`] turns a request into values and an answer into a response. Nothing below it knows of HTTP.
//! - [`read`] and [`mod@write`] know the order of the steps; the steps don't know each other.
//! - [`image`] has the values: ids, versions, types. [`record`] has the stored JSON. [`preconditions`] say when a
//!   representation isn't to be sent; [`coding`] compresses those that gain by it.
//! - [`index`] knows what the store holds, as long as it may rely on it, and is where the promise is kept that
//!   nothing replaced is served; [`collapse`] makes one fetch of many.
//! - [`store`] keeps records and tells of changes; [`offload`] has the images that moved out of them; [`cache`] keeps decoded bytes; [`picture`] knows pixels and signatures;
//!   [`variant`] says what of them is asked for, and [`render`] who makes it.
//! - [`writers`] says who may write; [`events`] tells browsers what changes.
//! - [`telemetry`] is the log and the metrics; [`cli`] is the command line.
//!
//! `ARCHITECTURE.md` says why it is so.

pub mod app;
pub mod body;
pub mod cache;
pub mod cli;
pub mod coding;
pub mod collapse;
pub mod events;
pub mod http;
pub mod image;
pub mod index;
pub mod offload;
pub mod picture;
pub mod preconditions;
pub mod read;
pub mod record;
pub mod render;
pub mod server;
pub mod settings;
pub mod store;
mod task;
pub mod telemetry;
pub mod variant;
pub mod write;
pub mod writers;
