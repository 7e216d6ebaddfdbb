//! Stores the demo images at the first start of an embedded store.

use std::time::SystemTime;

use bytes::Bytes;

use crate::image::{ImageId, record};
use crate::picture::demo;
use crate::store::{Condition, Expiry, Store};

/// Stores the demo images at the first start of an embedded store, if wanted, and returns their ids. They never expire, so
/// that the printed addresses go on working.
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
        let id = ImageId::parse(id).expect("a test parses each id");
        let value = record::encode(&bytes, media_type, Some(SystemTime::now()));
        store.put(&id, Bytes::from(value), Expiry::Never, &Condition::Always).await?;
        ids.push(id);
    }
    Ok(ids)
}
