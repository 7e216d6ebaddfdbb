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

use crate::image::ImageId;
use crate::store::{Cursor, Expiry, LISTED_KEYS, Store, StoreError, Stored};

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
    /// The time at which it expires, in seconds since 1970; `None` if it never does.
    pub(crate) expires_at: Option<f64>,
    #[serde(flatten)]
    value: BackupValue,
}

/// A value, byte for byte: its version is the MD5 of these bytes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum BackupValue {
    Record(String),
    /// A value that is no text, and so no record.
    RecordBase64(String),
}

/// A record that can't be stored again.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("record_base64 must be base64")]
pub(crate) struct NotBase64;

impl BackupRecord {
    fn of(id: &ImageId, stored: Stored, now: SystemTime) -> BackupRecord {
        let expires_at = stored
            .time_to_live
            .map(|left| (now + left).duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64());
        let value = match String::from_utf8(stored.value.into()) {
            Ok(text) => BackupValue::Record(text),
            Err(error) => BackupValue::RecordBase64(STANDARD.encode(error.as_bytes())),
        };
        BackupRecord { id: id.as_str().to_owned(), expires_at, value }
    }

    /// Returns the expiry that is left; `None` if it has passed.
    pub(crate) fn expiry(&self, now: SystemTime) -> Option<Expiry> {
        let Some(at) = self.expires_at else { return Some(Expiry::Never) };
        let since_epoch = Duration::try_from_secs_f64(at).ok()?;
        let left = UNIX_EPOCH.checked_add(since_epoch)?.duration_since(now).ok()?;
        // The stores count milliseconds.
        (left >= Duration::from_millis(1)).then_some(Expiry::In(left))
    }

    /// Returns the value, byte for byte.
    pub(crate) fn into_value(self) -> Result<Bytes, NotBase64> {
        match self.value {
            BackupValue::Record(text) => Ok(text.into()),
            BackupValue::RecordBase64(text) => {
                STANDARD.decode(text).map(Bytes::from).map_err(|_error| NotBase64)
            }
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
        let read = async {
            let size = self.store.size(id).await?;
            self.store.get(id, size).await
        };
        match read.await {
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
            assert_eq!(record.expiry(now), Some(Expiry::In(Duration::from_millis(1500))));
            assert_eq!(record.expiry(now + Duration::from_secs(2)), None);
            assert_eq!(record.into_value().unwrap(), value);
        }
        assert_eq!(round_trip(b"", None).expiry(now), Some(Expiry::Never));
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
        assert!(serde_json::from_str::<Line>(r#"{"id":"a","expires_at":null}"#).is_err());
    }
}
