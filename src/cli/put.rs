//! `put`: stores an image as a backend would.

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use bytes::Bytes;
use hyper::Method;

use super::client;
use crate::image::{ImageId, record};
use crate::picture::sniff;
use crate::settings::{ListenOn, Settings, Token};
use crate::store::embedded::InUse;
use crate::store::{Condition, Expiry, Store};
use crate::token_file::{self, TokenFile};
use crate::tokens;

/// Returns a token that the running server takes: one of the settings, or the one that it made.
fn token(settings: &Settings, listen: &ListenOn) -> anyhow::Result<Option<Token>> {
    let configured = tokens::read(&settings.writes)?.into_iter().next();
    if configured.is_some() || !token_file::is_needed(settings) {
        return Ok(configured);
    }
    Ok(TokenFile::of(settings, listen)?.read()?)
}

/// Writes straight to Redis or to the embedded store. A running server has that store to itself, so it is asked to write.
pub(super) async fn run(
    settings: &Settings,
    id: &ImageId,
    file: &Path,
    ttl: Option<Duration>,
) -> anyhow::Result<()> {
    let bytes = std::fs::read(file).with_context(|| format!("can't read {}", file.display()))?;
    let media_type = sniff::sniff(&bytes)
        .with_context(|| format!("{} is not an image of a type that is served", file.display()))?;
    let value = Bytes::from(record::encode(&bytes, media_type, Some(SystemTime::now())));
    let limit = settings.records.max_value;
    anyhow::ensure!(
        value.len() <= limit,
        "{} makes a record of {} bytes; the limit is {limit} ([records] max_value)",
        file.display(),
        value.len()
    );
    let ttl = ttl.unwrap_or(settings.records.ttl);
    let place = match Store::open(settings).await {
        Ok(store) => {
            store.put(id, value, Expiry::In(ttl), &Condition::Always).await?;
            match &store {
                Store::Redis(_) => settings.redis.url.public().unwrap_or_default(),
                Store::Embedded(store) => store.path().display().to_string(),
            }
        }
        Err(error) if error.is::<InUse>() => {
            let path = format!("/images/{id}?ttl={}ms", ttl.as_millis());
            let listen = client::plain_listener(settings).with_context(|| error.to_string())?;
            let token = token(settings, listen)?;
            let (status, body) = client::send(listen, Method::PUT, &path, value, token.as_ref())
                .await
                .with_context(|| format!("{error}, and the server can't be asked to write"))?;
            let body = String::from_utf8_lossy(&body);
            anyhow::ensure!(status.is_success(), "the server refused the image: {status} {body}");
            "the running server".to_owned()
        }
        Err(error) => return Err(error),
    };
    println!(
        "{id}: {} of {} bytes, for {}, in {place}",
        media_type.as_str(),
        bytes.len(),
        humantime::format_duration(ttl)
    );
    Ok(())
}
