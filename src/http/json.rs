//! Helpers for the JSON of answers.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

/// Adds the members of an object to another.
pub(super) fn merge(object: &mut Value, further: Value) {
    if let (Value::Object(object), Value::Object(further)) = (object, further) {
        object.extend(further);
    }
}

/// A time in whole seconds since 1970.
pub(super) fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
