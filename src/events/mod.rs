//! Server-sent events: who follows what, and what each stream has been told.

pub mod hub;
