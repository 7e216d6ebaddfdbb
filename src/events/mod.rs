//! Events: browsers are told the newest state of the images that they follow.
//!
//! ```text
//!   store ─ a changed ─▶ Hub::apply ─▶ dispatch ── a is pending ─▶ stream 1, 2, …
//!                                                                     │ when its client has room
//!                             which version of a is current now? ◀────┘ not the one that was sent: its event,
//!                                                                       made once for all streams of the same kind
//! ```
//!
//! A stream holds no events, only the ids whose state it may have to send, and the version of each image that it sent
//! last. So a slow client gets fewer events but always the newest state, no client gets an older state after a newer one,
//! and a new connection begins with the state of every image.
//!
//! With a prefix, a stream has not even the ids, but a position in one log of changes that all streams read. A stream that
//! falls behind the end of the log begins again, as after a change of everything. Work for many streams is done in slices,
//! and few streams make events at the same time, so that requests have their turn in between.
//!
//! A stream with a prefix is also told when the states of all images that a listing of the store found have been sent. The
//! list of those that are there tells a page which of the images that it shows were removed while it was cut off.

mod change_log;
mod content;
mod hub;
mod listings;
mod stream;
mod subscription;
#[cfg(all(test, feature = "shuttle"))]
#[allow(clippy::unwrap_used, reason = "tests")]
mod threads;

pub(crate) use self::content::{EventContent, Inline};
pub(crate) use self::hub::Hub;
pub(crate) use self::stream::Followed;
pub(crate) use self::subscription::{Events, Subscription, TooMany};
