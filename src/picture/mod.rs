//! Pixels: sync, pure, without I/O. Nothing here knows of HTTP, the store or the cache.

pub mod demo;
pub mod sniff;
