//! The images that a command works on: in the store itself, or through the running server that has it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::header::IF_NONE_MATCH;
use hyper::{Method, StatusCode};
use serde::Deserialize;
use tokio::io::{AsyncWrite, AsyncWriteExt};

use super::client::{self, Call, ServerAddress};
use crate::backup;
use crate::image::record::{self, Content, Record};
use crate::image::{ImageId, Version};
use crate::running::RunningServer;
use crate::settings::{Settings, Token};
use crate::store::embedded::{self, InUse};
use crate::store::{Condition, Cursor, Expiry, LISTED_KEYS, Replaced, Store, Written};
use crate::token_file::{self, TokenFile};
use crate::tokens;

/// Longest silence of a server that sends a backup.
const SILENCE: Duration = Duration::from_mins(1);

/// The way in which a command works on images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// It needs a store that is there.
    Read,
    /// It may make a new one.
    Write,
}

/// The life of a record that is to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    /// As somebody wants it, or else as the settings of the store's server say.
    Asked(Option<Duration>),
    /// As in a backup, within the limits of the server.
    Restored(Expiry),
}

/// The images that a command works on.
pub(super) enum Images {
    /// In the store itself, as a backend would.
    Store {
        store: Arc<Store>,
        /// Its name for people.
        place: String,
    },
    /// Of a running server.
    Server { server: ServerAddress, token: Option<Token> },
}

/// The result of storing an image.
pub(super) enum Put {
    /// It was stored.
    Stored {
        /// The address of the new version, without a host where no server is known.
        url: String,
    },
    /// There is an image already, which was to be kept.
    Kept,
}

/// An image in a listing. What isn't known without reading the image is left out.
#[derive(Debug, Deserialize)]
pub(super) struct Listed {
    pub(super) id: String,
    #[serde(rename = "record_bytes")]
    pub(super) bytes: Option<u64>,
    /// In seconds.
    pub(super) expires_in: Option<u64>,
    #[serde(rename = "type")]
    pub(super) media_type: Option<String>,
    pub(super) width: Option<u32>,
    pub(super) height: Option<u32>,
    /// The reason, if the record is no image.
    pub(super) reason: Option<String>,
}

/// A page of a listing, as the server answers it.
#[derive(Debug, Deserialize)]
pub(super) struct ListedPage {
    pub(super) images: Vec<Listed>,
    pub(super) next: Option<String>,
}

/// The part of an answer that tells of a stored image.
#[derive(Deserialize)]
struct StoredImage {
    url: String,
}

/// The part of an answer that says why a request was refused (RFC 9457).
#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    title: String,
    #[serde(default)]
    detail: String,
}

impl Images {
    /// Opens the images that the settings name, or those of a given server.
    ///
    /// An embedded store belongs to the server that runs on it, which is asked then. Where the settings name no store, the running
    /// servers of this user come first: what is there is what people see. Only a command that writes makes a new store.
    pub(super) async fn open(
        settings: &Settings,
        server: Option<ServerAddress>,
        access: Access,
    ) -> anyhow::Result<Images> {
        if let Some(server) = server {
            let running = running_servers(settings);
            let running = running.iter().find(|it| it.is_at(server.listen()));
            return Images::of_server(settings, server, running);
        }
        let is_redis = settings.redis.url.get().is_some();
        let is_named = is_redis || !settings.embedded.dir.as_os_str().is_empty();
        let path = embedded::data_file(&settings.embedded.dir);
        let is_there = is_redis || path.as_ref().is_ok_and(|path| path.exists());
        if !is_named && let Some(running) = only_server(settings)? {
            return Images::of_running(settings, &running);
        }
        if !is_there && access == Access::Read {
            let path = path.unwrap_or_default();
            anyhow::bail!(
                "no server of this user runs, and there is no store {}: name the store with --redis or --dir, or a server with --server",
                path.display()
            );
        }
        match Store::open(settings).await {
            Ok(store) => {
                let place = match &store {
                    Store::Redis(_) => settings.redis.url.public().unwrap_or_default(),
                    Store::Embedded(store) => store.path().display().to_string(),
                };
                Ok(Images::Store { store: Arc::new(store), place })
            }
            Err(error) if error.is::<InUse>() => {
                if let Some(running) = RunningServer::of_embedded_store(settings) {
                    return Images::of_running(settings, &running);
                }
                // A server that couldn't leave its address.
                let server = client::plain_listener(settings);
                Images::of_server(settings, server.with_context(|| error.to_string())?, None)
            }
            Err(error) => Err(error),
        }
    }

    fn of_running(settings: &Settings, running: &RunningServer) -> anyhow::Result<Images> {
        let address = running.plain_address().context(
            "the running server speaks only TLS: set [admin] listen, which commands can ask",
        )?;
        Images::of_server(settings, ServerAddress::of(address), Some(running))
    }

    fn of_server(
        settings: &Settings,
        server: ServerAddress,
        running: Option<&RunningServer>,
    ) -> anyhow::Result<Images> {
        let configured = tokens::read(&settings.writes)?.into_iter().next();
        let token = match (configured, running.and_then(|it| it.token_file.clone())) {
            (Some(token), _) => Some(token),
            (None, Some(file)) => TokenFile::at(file).read()?,
            // The file is named by the port, which may be another server's on another machine.
            (None, None) if token_file::is_needed(settings) && server.is_on_this_machine() => {
                TokenFile::of(settings, server.listen())?.read()?
            }
            (None, None) => None,
        };
        Ok(Images::Server { server, token })
    }

    /// The place of the images, for people.
    pub(super) fn place(&self) -> String {
        match self {
            Images::Store { place, .. } => place.clone(),
            Images::Server { server, .. } => format!("the server at {}", server.url()),
        }
    }

    /// Stores a record. Unless it `replaces`, an image that is there is kept.
    pub(super) async fn put(
        &self,
        settings: &Settings,
        id: &ImageId,
        value: Bytes,
        life: Life,
        replaces: bool,
    ) -> anyhow::Result<Put> {
        match self {
            Images::Store { store, .. } => {
                let expiry = match life {
                    Life::Asked(ttl) => Expiry::In(ttl.unwrap_or(settings.records.ttl)),
                    Life::Restored(expiry) => expiry,
                };
                let version = Version::of(&value);
                let condition = if replaces { Condition::Always } else { Condition::Absent };
                Ok(match store.put(id, value, expiry, &condition).await? {
                    Written::Done(_) => Put::Stored { url: format!("/images/{id}?v={version}") },
                    Written::ConditionFailed => Put::Kept,
                })
            }
            Images::Server { server, token } => {
                let ttl = match life {
                    Life::Asked(None) => String::new(),
                    Life::Asked(Some(ttl)) | Life::Restored(Expiry::In(ttl)) => {
                        format!("?ttl={}ms", ttl.as_millis())
                    }
                    // A write over HTTP always has an expiry.
                    Life::Restored(_) => "?ttl=max".to_owned(),
                };
                let put = async |ttl: &str| {
                    let path = format!("/images/{id}{ttl}");
                    let fields = [(IF_NONE_MATCH, "*")];
                    let fields = if replaces { &fields[..0] } else { &fields };
                    let json = value.clone();
                    let call = Call { method: Method::PUT, path: &path, fields, json };
                    server.ask(call, token.as_ref()).await
                };
                let mut answer = put(&ttl).await?;
                if answer.0 == StatusCode::BAD_REQUEST && matches!(life, Life::Restored(_)) {
                    // It may be longer than that server allows.
                    answer = put("?ttl=max").await?;
                }
                let (status, body) = answer;
                if status == StatusCode::PRECONDITION_FAILED && !replaces {
                    return Ok(Put::Kept);
                }
                let body = accepted(server, status, &body)?;
                let stored: StoredImage = serde_json::from_slice(body)
                    .with_context(|| format!("{} isn't an Afterimage", server.url()))?;
                Ok(Put::Stored { url: format!("{}{}", server.url(), stored.url) })
            }
        }
    }

    /// Removes an image. Returns false if there was none.
    pub(super) async fn remove(&self, id: &ImageId) -> anyhow::Result<bool> {
        match self {
            Images::Store { store, .. } => {
                let written = store.remove(id, &Condition::Always).await?;
                Ok(written == Written::Done(Replaced::Value))
            }
            Images::Server { server, token } => {
                let path = format!("/images/{id}");
                let call = Call::new(Method::DELETE, &path);
                let (status, body) = server.ask(call, token.as_ref()).await?;
                if status == StatusCode::NOT_FOUND {
                    return Ok(false);
                }
                accepted(server, status, &body).map(|_| true)
            }
        }
    }

    /// Returns the bytes of an image; `None` if there is none.
    pub(super) async fn get(&self, id: &ImageId) -> anyhow::Result<Option<Bytes>> {
        match self {
            Images::Store { store, .. } => {
                let size = store.size(id).await?;
                let Some(stored) = store.get(id, size).await? else { return Ok(None) };
                match Record::parse(&stored.value)?.content {
                    Content::Inline(text) => {
                        Ok(Some(Bytes::copy_from_slice(&record::decode(&text)?.bytes)))
                    }
                    Content::Offloaded(_) => anyhow::bail!(
                        "{id} is in the object store: name a running server with --server, which has it"
                    ),
                }
            }
            Images::Server { server, token } => {
                let path = format!("/images/{id}");
                let (status, body) =
                    server.ask(Call::new(Method::GET, &path), token.as_ref()).await?;
                if status == StatusCode::NOT_FOUND {
                    return Ok(None);
                }
                accepted(server, status, &body)?;
                Ok(Some(body))
            }
        }
    }

    /// Lists some of the images whose ids begin with a text, from the position at which an earlier page ended.
    pub(super) async fn list(
        &self,
        beginning: &str,
        from: Option<&str>,
    ) -> anyhow::Result<ListedPage> {
        match self {
            Images::Store { store, .. } => {
                let page = store.list(beginning, from.map(Cursor::parse), LISTED_KEYS).await?;
                let sizes = store.sizes(&page.ids).await?;
                let images = page.ids.iter().zip(sizes).filter_map(|(id, size)| {
                    let size = size?;
                    let reason =
                        size.bytes.is_none().then(|| "the key doesn't hold a string".to_owned());
                    Some(Listed {
                        id: id.as_str().to_owned(),
                        bytes: size.bytes,
                        expires_in: size.time_to_live.map(|left| left.as_secs()),
                        media_type: None,
                        width: None,
                        height: None,
                        reason,
                    })
                });
                let images = images.collect();
                Ok(ListedPage { images, next: page.next.map(|it| it.as_str().to_owned()) })
            }
            Images::Server { server, token } => {
                let mut query = url::form_urlencoded::Serializer::new(String::new());
                query
                    .append_pair("prefix", beginning)
                    .append_pair("limit", &LISTED_KEYS.to_string());
                query.extend_pairs(from.map(|from| ("cursor", from)));
                let path = format!("/images?{}", query.finish());
                let (status, body) =
                    server.ask(Call::new(Method::GET, &path), token.as_ref()).await?;
                Ok(serde_json::from_slice(accepted(server, status, &body)?)?)
            }
        }
    }

    /// Writes a backup of the images whose ids begin with a text.
    pub(super) async fn export(
        &self,
        beginning: &str,
        mut to: impl AsyncWrite + Unpin,
    ) -> anyhow::Result<()> {
        match self {
            Images::Store { store, .. } => {
                let lines = backup::lines(Arc::clone(store), beginning.to_owned());
                let mut lines = std::pin::pin!(lines);
                while let Some(line) = futures_util::StreamExt::next(&mut lines).await {
                    to.write_all(&line?).await?;
                }
            }
            Images::Server { server, token } => {
                let mut query = url::form_urlencoded::Serializer::new(String::new());
                let path = format!("/export?{}", query.append_pair("prefix", beginning).finish());
                let mut response =
                    server.send(Call::new(Method::GET, &path), token.as_ref()).await?;
                let status = response.status();
                if !status.is_success() {
                    let body = response.into_body().collect().await?.to_bytes();
                    accepted(server, status, &body)?;
                    return Ok(());
                }
                loop {
                    let frame = tokio::time::timeout(SILENCE, response.frame()).await;
                    let frame = frame.context("the server stopped sending")?;
                    let Some(frame) = frame else { break };
                    let frame = frame.context("the answer was cut off")?;
                    if let Some(data) = frame.data_ref() {
                        to.write_all(data).await?;
                    }
                }
            }
        }
        to.flush().await?;
        Ok(())
    }
}

/// The running servers that a command may mean: the one on the embedded store of the settings, and those on a Redis.
fn running_servers(settings: &Settings) -> Vec<RunningServer> {
    let mut running = RunningServer::of_this_user().unwrap_or_default();
    running.extend(RunningServer::of_embedded_store(settings));
    running
}

/// Returns the only one of them, if one runs.
fn only_server(settings: &Settings) -> anyhow::Result<Option<RunningServer>> {
    let mut servers = running_servers(settings);
    if servers.len() > 1 {
        let names: Vec<_> = servers
            .iter()
            .filter_map(RunningServer::plain_address)
            .map(|it| format!("--server {it}"))
            .collect();
        anyhow::bail!("several servers run: name one of them, with {}", names.join(" or "));
    }
    Ok(servers.pop())
}

/// Returns the body of an answer, unless the server refused.
fn accepted<'a>(
    server: &ServerAddress,
    status: StatusCode,
    body: &'a Bytes,
) -> anyhow::Result<&'a Bytes> {
    if status.is_success() {
        return Ok(body);
    }
    let Ok(Refusal { title, detail }) = serde_json::from_slice(body) else {
        anyhow::bail!("{} isn't an Afterimage: it answers {status}", server.url());
    };
    let why = if detail.is_empty() { title } else { detail };
    anyhow::bail!("{} refused: {} {why}", server.url(), status.as_u16());
}
