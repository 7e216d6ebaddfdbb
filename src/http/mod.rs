//! HTTP: the only part that knows of methods, headers and status codes.

pub mod client;
mod conditional;
mod images;
mod ops;
mod problem;
pub mod router;
mod writes;
