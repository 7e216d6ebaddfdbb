//! Backups: the records of a store as lines of JSON, which can be read back.
//!
//! Each line is a record, or a key that couldn't be read. The last one says how many there were, so that a backup that was cut off
//! is noticed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures_util::stream::{self, Stream};
use serde::{Deserialize, Serialize};

use crate::image::{ImageId, MAX_HTTP_DATE};
use crate::store::{Cursor, Expiry, LISTED_KEYS, Store, StoreError, Stored};

/// Attempts to read a value that doesn't come in time.
const ATTEMPTS: u32 = 3;

/// A line of a backup.
#[derive(Debug, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Line {
    /// A record.
    Record(BackupRecord),
    /// A key that couldn't be read.
    LeftOut {
        /// Its id.
        id: String,
        /// The reason.
        left_out: String,
    },
    /// The last line.
    End {
        /// The number of records before it.
        records: u64,
    },
}

/// A record with its id and expiry.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct BackupRecord {
    /// The id.
    pub(crate) id: String,
    /// The time at which it expires, in seconds since 1970; null if it never does.
    #[serde(deserialize_with = "Option::deserialize")]
    expires_at: Option<f64>,
    /// The value, byte for byte: its version is the MD5 of these bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    record: Option<String>,
    /// A value that is no text, and so no record.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    record_base64: Option<String>,
}

/// A record that can't be stored again.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadBackup {
    /// There must be one value.
    #[error("there must be either `record` or `record_base64`, in base64")]
    Value,
    /// No store keeps such a time.
    #[error("`expires_at` must be seconds since 1970, before the year 10000")]
    Expiry,
}

impl BackupRecord {
    fn of(id: &ImageId, stored: Stored, now: SystemTime) -> BackupRecord {
        let expires_at = stored
            .time_to_live
            .map(|left| (now + left).duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
        let (record, record_base64) = match String::from_utf8(stored.value.into()) {
            Ok(text) => (Some(text), None),
            Err(error) => (None, Some(STANDARD.encode(error.as_bytes()))),
        };
        BackupRecord { id: id.as_str().to_owned(), expires_at, record, record_base64 }
    }

    /// Returns the expiry that is left; `None` if it has passed.
    pub(crate) fn expiry(&self, now: SystemTime) -> Result<Option<Expiry>, BadBackup> {
        let Some(at) = self.expires_at else { return Ok(Some(Expiry::Never)) };
        let since_epoch = Duration::try_from_secs_f64(at.max(0.0)).unwrap_or(Duration::MAX);
        if since_epoch > MAX_HTTP_DATE || !at.is_finite() {
            return Err(BadBackup::Expiry);
        }
        let left = (UNIX_EPOCH + since_epoch).duration_since(now).unwrap_or_default();
        // The stores count milliseconds.
        Ok((left >= Duration::from_millis(1)).then_some(Expiry::In(left)))
    }

    /// Returns the value, byte for byte.
    pub(crate) fn into_value(self) -> Result<Bytes, BadBackup> {
        match (self.record, self.record_base64) {
            (Some(text), None) => Ok(text.into()),
            (None, Some(text)) => {
                STANDARD.decode(text).map(Bytes::from).map_err(|_error| BadBackup::Value)
            }
            _ => Err(BadBackup::Value),
        }
    }
}

/// State of a backup that is being made.
struct Backup {
    store: Arc<Store>,
    beginning: String,
    ids: VecDeque<ImageId>,
    next: Next,
    records: u64,
}

/// Part of the listing that is read next.
enum Next {
    From(Option<Cursor>),
    End,
    Over,
}

/// Returns the lines of a backup of all records whose ids begin with a text, each with its line break. One record is in memory at a
/// time. A record that is replaced meanwhile is there once, old or new; one may be there twice.
pub(crate) fn lines(
    store: Arc<Store>,
    beginning: String,
) -> impl Stream<Item = Result<Bytes, StoreError>> {
    let (ids, next) = (VecDeque::new(), Next::From(None));
    let backup = Backup { store, beginning, ids, next, records: 0 };
    stream::try_unfold(backup, |mut backup| async move {
        let line = backup.next_line().await?;
        Ok(line.map(|line| {
            let mut text = serde_json::to_vec(&line).expect("a line is JSON");
            text.push(b'\n');
            (Bytes::from(text), backup)
        }))
    })
}

impl Backup {
    async fn next_line(&mut self) -> Result<Option<Line>, StoreError> {
        loop {
            while let Some(id) = self.ids.pop_front() {
                if let Some(line) = self.line(&id).await? {
                    return Ok(Some(line));
                }
            }
            match std::mem::replace(&mut self.next, Next::Over) {
                Next::From(cursor) => {
                    let page = self.store.list(&self.beginning, cursor, LISTED_KEYS).await?;
                    self.ids = page.ids.into();
                    self.next = page.next.map_or(Next::End, |cursor| Next::From(Some(cursor)));
                }
                Next::End => return Ok(Some(Line::End { records: self.records })),
                Next::Over => return Ok(None),
            }
        }
    }

    /// Returns the line of a key; `None` if it is gone since.
    async fn line(&mut self, id: &ImageId) -> Result<Option<Line>, StoreError> {
        let read = async || {
            let size = self.store.size(id).await?;
            self.store.get(id, size).await
        };
        let mut result = read().await;
        // One slow answer among thousands is no reason to give up.
        for _ in 1..ATTEMPTS {
            if matches!(result, Err(StoreError::TimedOut)) {
                result = read().await;
            }
        }
        match result {
            Ok(None) => Ok(None),
            Ok(Some(stored)) => {
                self.records += 1;
                Ok(Some(Line::Record(BackupRecord::of(id, stored, SystemTime::now()))))
            }
            // Of this key alone.
            Err(error @ (StoreError::TooLarge { .. } | StoreError::WrongType)) => {
                let (id, left_out) = (id.as_str().to_owned(), error.to_string());
                Ok(Some(Line::LeftOut { id, left_out }))
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(value: &[u8], time_to_live: Option<Duration>) -> BackupRecord {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let stored = Stored { value: Bytes::copy_from_slice(value), time_to_live };
        let line = Line::Record(BackupRecord::of(&ImageId::parse("a").unwrap(), stored, now));
        match serde_json::from_str(&serde_json::to_string(&line).unwrap()).unwrap() {
            Line::Record(record) => record,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_value_comes_back_byte_for_byte_with_the_time_that_is_left() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        for value in [&b"{\"base64_data\": \"R0\\u00e4\"}\n"[..], b"\xff\x00", b""] {
            let record = round_trip(value, Some(Duration::from_millis(1500)));
            let left = Some(Expiry::In(Duration::from_millis(1500)));
            assert_eq!(record.expiry(now).unwrap(), left);
            assert_eq!(record.expiry(now + Duration::from_secs(2)).unwrap(), None);
            assert_eq!(record.into_value().unwrap(), value);
        }
        assert_eq!(round_trip(b"", None).expiry(now).unwrap(), Some(Expiry::Never));
    }

    #[test]
    fn the_last_line_and_a_key_that_is_left_out_are_told_from_records() {
        for line in [
            Line::End { records: 3 },
            Line::LeftOut { id: "a".to_owned(), left_out: "too large".to_owned() },
        ] {
            let text = serde_json::to_string(&line).unwrap();
            let read: Line = serde_json::from_str(&text).unwrap();
            assert_eq!(format!("{read:?}"), format!("{line:?}"));
        }
        let record = |text: &str| match serde_json::from_str(text) {
            Ok(Line::Record(record)) => Some(record),
            _ => None,
        };
        let now = SystemTime::now();
        for wrong in ["1e300", "9.3e15", "-1e400"] {
            let record = record(&format!(r#"{{"id":"a","expires_at":{wrong},"record":""}}"#));
            assert!(record.is_none_or(|it| it.expiry(now) == Err(BadBackup::Expiry)), "{wrong}");
        }
        assert_eq!(
            record(r#"{"id":"a","expires_at":-5,"record":""}"#).unwrap().expiry(now),
            Ok(None)
        );
        // Without an expiry it would be there for ever, and of two values one would be lost.
        assert!(record(r#"{"id":"a","record":""}"#).is_none());
        let both =
            record(r#"{"id":"a","expires_at":null,"record":"","record_base64":""}"#).unwrap();
        assert_eq!(both.into_value(), Err(BadBackup::Value));
        let none = record(r#"{"id":"a","expires_at":null}"#).unwrap();
        assert_eq!(none.into_value(), Err(BadBackup::Value));
    }
}
