//! Stores the demo images at the first start of an embedded store.

use std::time::SystemTime;

use bytes::Bytes;

use crate::image::{ImageId, record};
use crate::picture::demo;
use crate::store::{Condition, Expiry, Store};

/// Puts the demo images into an embedded store at its first start, where they are wanted. They never expire: the
/// addresses that were printed go on working. Gives the ids of those that are there.
pub(super) async fn fill(store: &Store, wanted: bool) -> anyhow::Result<Vec<ImageId>> {
    let Store::Embedded(embedded) = store else {
        return Ok(Vec::new());
    };
    if !(wanted && embedded.is_first_start().await?) {
        return Ok(Vec::new());
    }
    let images = tokio::task::spawn_blocking(demo::draw).await??;
    let mut ids = Vec::new();
    for (id, media_type, bytes) in images {
        let id = ImageId::parse(id).expect("a test parses each");
        let value = record::encode(&bytes, media_type, Some(SystemTime::now()));
        store.put(&id, Bytes::from(value), Expiry::Never, &Condition::Always).await?;
        ids.push(id);
    }
    Ok(ids)
}
