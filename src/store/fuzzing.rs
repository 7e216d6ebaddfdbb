//! Fuzz targets for what Redis sends.

use redis::{Parser, PushInfo, PushKind, Value};

use super::Change;
use super::server::{Role, RoleCommand, ServerInfo};
use super::tracking::{announced, is_tracking};
use crate::image::ImageId;

/// The prefix of keys.
const PREFIX: &str = "image:";

/// Parses replies as they come over a connection, up to the first that is malformed.
fn values(mut data: &[u8]) -> Vec<Value> {
    let mut parser = Parser::new();
    let mut values = Vec::new();
    while values.len() < 64 {
        let Ok(value) = parser.parse_value(&mut data) else { break };
        values.push(value);
    }
    values
}

/// A server's answers about itself: a replica is never read from, and a role has a command that tells it again.
pub fn redis_replies(data: &[u8]) {
    let values = values(data);
    for value in &values {
        let (on, all) = (is_tracking(value, PREFIX), is_tracking(value, ""));
        assert!(!(on || all) || matches!(value, Value::Map(_)));
        for command in RoleCommand::ALL {
            // It must not panic; its answer is judged below.
            let _role = command.role_in(value);
        }
    }
    // As the client does: an error anywhere in a reply is the reply.
    let replies: Vec<_> = values.into_iter().map(Value::extract_error).collect();
    let mut told = RoleCommand::ALL.into_iter().zip(replies.iter().skip(2));
    let told =
        told.find_map(|(command, reply)| Some((command, command.role_in(reply.as_ref().ok()?)?)));
    let Ok(info) = ServerInfo::from_replies(replies) else { return };
    if info.role == Some(Role::Replica) {
        assert!(info.check_readable().is_err(), "a replica is read from");
    }
    assert_eq!(info.role_command, told.map(|(command, _)| command), "{info:?}");
    if let Some((_, role)) = told {
        assert_eq!(info.role, Some(role));
    }
}

/// A push invalidates each image that it names, or all of them.
pub fn redis_pushes(data: &[u8]) {
    let pushes: Vec<PushInfo> = values(data)
        .into_iter()
        .filter_map(|value| match value {
            Value::Push { kind, data } => Some(PushInfo { kind, data }),
            _ => None,
        })
        .collect();
    for push in &pushes {
        let changes = announced(std::slice::from_ref(push), PREFIX).expect("an address");
        let flushed = changes.iter().any(|it| matches!(it, Change::Flushed));
        let lost = changes.iter().any(|it| matches!(it, Change::TrackingLost { .. }));
        assert_eq!(lost, push.kind == PushKind::Disconnection);
        if push.kind != PushKind::Invalidate {
            assert_eq!(changes.len(), usize::from(lost));
            continue;
        }
        let mut named = Vec::new();
        let mut is_known = push.data.len() == 1;
        for value in &push.data {
            match value {
                Value::Array(keys) => keys.iter().for_each(|key| match key {
                    Value::BulkString(key) => named.extend(id(key)),
                    _ => is_known = false,
                }),
                _ => is_known = false,
            }
        }
        let invalidated = |id: &ImageId| {
            changes.iter().any(|it| matches!(it, Change::Invalidated(other) if other == id))
        };
        assert!(flushed || named.iter().all(invalidated), "{push:?}: {changes:?}");
        assert_eq!(flushed, !is_known, "{push:?}");
        assert!(flushed || changes.len() == named.len(), "{push:?}: {changes:?}");
    }
    let all = announced(&pushes, PREFIX).expect("an address");
    assert!(all.iter().filter(|it| matches!(it, Change::TrackingLost { .. })).count() <= 1);
}

/// Returns the image under a key.
fn id(key: &[u8]) -> Option<ImageId> {
    ImageId::parse(str::from_utf8(key).ok()?.strip_prefix(PREFIX)?).ok()
}
