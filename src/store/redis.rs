//! The store in Redis or Valkey.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ::redis::aio::{ConnectionManager, ConnectionManagerConfig};
use ::redis::io::tcp::{TcpSettings, socket2::TcpKeepalive};
use ::redis::{
    Client, ClientTlsConfig, ConnectionInfo, ErrorKind, IntoConnectionInfo, Pipeline, RedisError,
    ServerErrorKind, TlsCertificates, Value,
};
use anyhow::Context;
use bytes::Bytes;

use super::{Replaced, StoreError, Stored};
use crate::image::ImageId;
use crate::settings::{self, Settings};

/// Reads and writes records over a few connections that reconnect by themselves.
///
/// The connections carry data only: nothing that arrives on them says when a value changes.
#[derive(Debug)]
pub struct RedisStore {
    connections: Vec<DataConnection>,
    key_prefix: String,
    max_value: usize,
}

/// One connection and how many commands wait on it. A reply of a megabyte holds up what is behind it,
/// so the next command goes to the connection with the fewest.
#[derive(Debug)]
struct DataConnection {
    manager: ConnectionManager,
    waiting: AtomicUsize,
}

impl RedisStore {
    /// Prepares the connections; each connects when it is first needed.
    pub fn open(url: &str, settings: &Settings) -> anyhow::Result<RedisStore> {
        let client = client(url, &settings.redis)?;
        // A command that finds its connection broken fails at once and starts the reconnecting; one
        // attempt for each, so that no request waits longer than a connect takes.
        let config = ConnectionManagerConfig::new()
            .set_connection_timeout(Some(settings.redis.connect_timeout))
            .set_response_timeout(Some(settings.redis.response_timeout))
            .set_number_of_retries(0);
        let connections = (0..settings.redis.connections.get())
            .map(|_| {
                let manager =
                    ConnectionManager::new_lazy_with_config(client.clone(), config.clone())?;
                Ok(DataConnection { manager, waiting: AtomicUsize::new(0) })
            })
            .collect::<Result<_, RedisError>>()
            .context("the Redis client can't be set up")?;
        Ok(RedisStore {
            connections,
            key_prefix: settings.records.key_prefix.clone(),
            max_value: settings.records.max_value,
        })
    }

    /// `STRLEN` first, so that no value over the limit is ever transferred; then value and remaining
    /// time in one transaction, so that both are of the same version.
    pub(super) async fn get(&self, id: &ImageId) -> Result<Option<Stored>, StoreError> {
        let key = self.key(id);
        let (size,): (u64,) = self.query(::redis::pipe().cmd("STRLEN").arg(&key)).await?;
        self.check_size(size)?;
        let (value, milliseconds): (Option<Bytes>, i64) =
            self.query(::redis::pipe().atomic().cmd("GET").arg(&key).cmd("PTTL").arg(&key)).await?;
        let Some(value) = value else {
            return Ok(None);
        };
        self.check_size(value.len() as u64)?;
        // PTTL answers -1 for a key without expiry.
        let time_to_live = u64::try_from(milliseconds).ok().map(Duration::from_millis);
        Ok(Some(Stored { value, time_to_live }))
    }

    pub(super) async fn put(
        &self,
        id: &ImageId,
        value: Bytes,
        time_to_live: Option<Duration>,
    ) -> Result<Replaced, StoreError> {
        // SET … GET would tell as much, and send the old value back.
        let mut transaction = ::redis::pipe();
        let set = transaction
            .atomic()
            .cmd("EXISTS")
            .arg(self.key(id))
            .cmd("SET")
            .arg(self.key(id))
            .arg(value.as_ref());
        if let Some(time_to_live) = time_to_live {
            set.arg("PX").arg(milliseconds(time_to_live));
        }
        let (existed, _ok): (bool, Value) = self.query(&transaction).await?;
        Ok(if existed { Replaced::Value } else { Replaced::Nothing })
    }

    pub(super) async fn ping(&self) -> Result<(), StoreError> {
        let (_pong,): (String,) = self.query(::redis::pipe().cmd("PING")).await?;
        Ok(())
    }

    fn key(&self, id: &ImageId) -> String {
        format!("{}{id}", self.key_prefix)
    }

    fn check_size(&self, size: u64) -> Result<(), StoreError> {
        if size > self.max_value as u64 {
            return Err(StoreError::TooLarge { size, limit: self.max_value });
        }
        Ok(())
    }

    async fn query<T: ::redis::FromRedisValue>(
        &self,
        pipeline: &Pipeline,
    ) -> Result<T, StoreError> {
        let connection = self
            .connections
            .iter()
            .min_by_key(|connection| connection.waiting.load(Ordering::Relaxed))
            .expect("settings ask for at least one connection");
        let _waiting = Waiting::on(&connection.waiting);
        let mut manager = connection.manager.clone();
        pipeline.query_async(&mut manager).await.map_err(StoreError::from)
    }
}

/// Counts a command as waiting for as long as it lives, cancelled or not.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn on(count: &'a AtomicUsize) -> Waiting<'a> {
        count.fetch_add(1, Ordering::Relaxed);
        Waiting(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl From<RedisError> for StoreError {
    fn from(error: RedisError) -> StoreError {
        let text = error.to_string();
        match error.kind() {
            ErrorKind::Server(ServerErrorKind::ResponseError) | ErrorKind::Extension
                if error.code() == Some("WRONGTYPE") || text.contains("WRONGTYPE") =>
            {
                StoreError::WrongType
            }
            ErrorKind::Io if error.is_timeout() => StoreError::TimedOut,
            ErrorKind::Io => StoreError::Unreachable(text),
            _ => StoreError::Refused(text),
        }
    }
}

/// A client whose sockets notice a dead peer, with the certificates of the settings.
fn client(url: &str, settings: &settings::Redis) -> anyhow::Result<Client> {
    let file = |path: &std::path::Path| {
        std::fs::read(path).with_context(|| format!("{} can't be read", path.display()))
    };
    let given = |path: &std::path::Path| !path.as_os_str().is_empty();

    // Off by default in the client, all three: Nagle's delay on a request, and for ever waiting on a
    // connection whose other end vanished without a word.
    let tcp = TcpSettings::default()
        .set_nodelay(true)
        .set_keepalive(TcpKeepalive::new().with_time(Duration::from_secs(15)))
        .set_user_timeout(settings.response_timeout * 2);
    let info: ConnectionInfo = url.into_connection_info()?.set_tcp_settings(tcp);

    let root_cert =
        given(&settings.tls_ca_file).then(|| file(&settings.tls_ca_file)).transpose()?;
    let client_tls = match (given(&settings.tls_cert_file), given(&settings.tls_key_file)) {
        (false, false) => None,
        (true, true) => Some(ClientTlsConfig {
            client_cert: file(&settings.tls_cert_file)?,
            client_key: file(&settings.tls_key_file)?,
        }),
        _ => anyhow::bail!("redis.tls_cert_file and redis.tls_key_file go together"),
    };
    if url.starts_with("rediss:") || url.starts_with("valkeys:") {
        // The client asks rustls for the process-wide provider and panics where there is none. An
        // error means that one is installed, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Ok(Client::build_with_tls(info, TlsCertificates { client_tls, root_cert })?)
    } else {
        Ok(Client::open(info)?)
    }
}

/// Redis counts in milliseconds and refuses an expiry of none.
fn milliseconds(time_to_live: Duration) -> u64 {
    u64::try_from(time_to_live.as_millis()).unwrap_or(u64::MAX).max(1)
}
