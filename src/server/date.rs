//! The `Date` field (RFC 9110 §6.6.1), formatted once a second.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A cached `Date` field with the empty line behind it.
#[derive(Debug, Default)]
pub(super) struct DateField(Mutex<Option<(Instant, Vec<u8>)>>);

impl DateField {
    /// Ends a head with the date and the empty line.
    pub(super) fn append(&self, head: &mut Vec<u8>, now: Instant) {
        let mut cached = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (_, text) = match &mut *cached {
            Some(current) if now < current.0 => current,
            outdated => {
                let today = SystemTime::now();
                let since = today.duration_since(UNIX_EPOCH).unwrap_or_default();
                let left = 1_000_000_000 - since.subsec_nanos();
                let next = Instant::now() + Duration::from_nanos(left.into());
                let text = format!("date: {}\r\n\r\n", httpdate::fmt_http_date(today));
                outdated.insert((next, text.into_bytes()))
            }
        };
        head.extend_from_slice(text);
    }
}
