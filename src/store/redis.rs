//! The store in Redis or Valkey.

use std::sync::Arc;
use std::time::Duration;

use ::redis::io::tcp::{TcpSettings, socket2::TcpKeepalive};
use ::redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo,
    IntoConnectionInfo, ProtocolVersion, RedisResult, TlsCertificates, Value,
};
use anyhow::Context;
use bytes::Bytes;

use super::bulk::{self, BulkConnections, BulkWritten};
use super::connection::{CommandFailure, DataConnections, ExclusiveConnection, Retry};
use super::connector::Connector;
use super::server::{CLUSTER, Mode};
use super::tracking::Tracking;
use super::{
    ChangeListener, Condition, Cursor, Expiry, Page, Replaced, StoreError, Stored, StoredSize,
    Written,
};
use crate::clock::Clock;
use crate::image::ImageId;
use crate::settings::{self, Settings};
use crate::task::Task;

/// Silence on a connection after which TCP probes the other end.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Longest time for which a start waits for Redis to say what it is.
const FIRST_LOOK: Duration = Duration::from_secs(1);

/// Records in Redis, read and written over a few connections that reconnect by themselves.
///
/// These connections carry only data: changes are announced over another one, which `Tracking` owns.
#[derive(Debug)]
pub struct RedisStore {
    data: Arc<DataConnections>,
    /// Connections for large values, unless Redis is reached over TLS.
    bulk: Option<BulkConnections>,
    tracking_connector: Connector,
    /// Without the password.
    address: String,
    connect_timeout: Duration,
    response_timeout: Duration,
    track: bool,
    canary: bool,
    tracking: Option<Task>,
    key_prefix: String,
    max_value: usize,
}

impl RedisStore {
    /// Prepares the connections; each connects when it is first needed.
    pub fn open(url: &str, settings: &Settings) -> anyhow::Result<RedisStore> {
        let data = client(url, &settings.redis, ProtocolVersion::RESP2)?;
        let tracking = client(url, &settings.redis, ProtocolVersion::RESP3)?;
        let info = data.get_connection_info().clone();
        let connectors = [data, tracking].map(Connector::Redis);
        let mut store = RedisStore::over(connectors, settings);
        let current = Arc::clone(&store.data.current);
        store.bulk = BulkConnections::new(&info, &settings.redis, current);
        Ok(store)
    }

    /// A store without connections for large values, over connectors for data and for tracking.
    pub(super) fn over([data, tracking]: [Connector; 2], settings: &Settings) -> RedisStore {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(settings.redis.connect_timeout))
            .set_response_timeout(Some(settings.redis.response_timeout));
        RedisStore {
            data: Arc::new(DataConnections::new(settings.redis.connections, &data, &config)),
            bulk: None,
            tracking_connector: tracking,
            address: settings.redis.url.public().unwrap_or_default(),
            connect_timeout: settings.redis.connect_timeout,
            response_timeout: settings.redis.response_timeout,
            track: settings.redis.tracking,
            canary: settings.redis.canary,
            tracking: None,
            key_prefix: settings.records.key_prefix.clone(),
            max_value: settings.records.max_value,
        }
    }

    /// True unless Redis is reached over TLS.
    pub(super) fn sends_in_place(&self) -> bool {
        self.bulk.is_some()
    }

    /// Refuses a server that would answer for some of the keys only. One that can't be reached in time is no error: it may
    /// come back, and is looked at again by every new connection.
    pub(super) async fn refuse_cluster(&self) -> anyhow::Result<()> {
        let looked = tokio::time::timeout(FIRST_LOOK, self.data.look()).await;
        if let Ok(Ok((_, server))) = looked {
            anyhow::ensure!(server.mode != Some(Mode::Cluster), "{CLUSTER} ([redis] url)");
        }
        Ok(())
    }

    /// Starts the tracking connection.
    pub(super) fn watch(&mut self, clock: Clock, listener: ChangeListener) {
        let tracking = Tracking {
            address: self.address.clone(),
            connector: self.tracking_connector.clone(),
            is_on: self.track,
            key_prefix: self.key_prefix.clone(),
            connect_timeout: self.connect_timeout,
            canary: self.canary,
            clock,
            listener,
            data: Arc::clone(&self.data),
        };
        self.tracking = Some(tracking.start());
    }

    /// Asked before every `GET`, so that a value over the limit isn't transferred. One that is written between the two is
    /// transferred and refused.
    pub(super) async fn size(&self, id: &ImageId) -> Result<u64, StoreError> {
        let (size,): (u64,) =
            self.data.query(::redis::pipe().cmd("STRLEN").arg(self.key(id)), Retry::Once).await?;
        self.check_size(size)?;
        Ok(size)
    }

    /// Gets value and remaining time in one round trip, and not in a transaction: a Redis that is full refuses to queue
    /// even a GET. A write between the two is announced, and then this result is not kept.
    pub(super) async fn get(&self, id: &ImageId, size: u64) -> Result<Option<Stored>, StoreError> {
        let (key, mut commands) = (self.key(id), ::redis::pipe());
        if let Some(bulk) = self.bulk.as_ref().filter(|_| size >= bulk::LARGE) {
            match bulk.get(&key, self.max_value).await {
                Err(CommandFailure::NotOpened(_)) => {}
                read => return Ok(read?),
            }
        }
        commands.cmd("GET").arg(&key).cmd("PTTL").arg(&key);
        let (value, milliseconds): (Option<Bytes>, i64) =
            self.data.query(&commands, Retry::Once).await?;
        let Some(value) = value else {
            return Ok(None);
        };
        self.check_size(value.len() as u64)?;
        Ok(Some(Stored::with_pttl(value, milliseconds)))
    }

    pub(super) async fn put(
        &self,
        id: &ImageId,
        value: Bytes,
        expiry: Expiry,
        condition: &Condition,
    ) -> Result<Written, StoreError> {
        let arguments = |left: Remaining| {
            let in_time = |time| vec!["PX".to_owned(), milliseconds(time).to_string()];
            let mut arguments = match (expiry, left) {
                (Expiry::In(time_to_live), _)
                | (Expiry::AtLeast(time_to_live), Remaining::NoValue) => in_time(time_to_live),
                (Expiry::AtLeast(time_to_live), Remaining::Time(left)) => {
                    in_time(time_to_live.max(left))
                }
                (Expiry::Never, _) | (Expiry::AtLeast(_), Remaining::Forever) => Vec::new(),
                (Expiry::Kept, _) => vec!["KEEPTTL".to_owned()],
            };
            match condition {
                Condition::Always | Condition::Is(_) => {}
                Condition::Absent => arguments.push("NX".to_owned()),
                Condition::Present => arguments.push("XX".to_owned()),
            }
            arguments
        };
        let key = self.key(id);
        let is_judged_by_redis =
            !matches!(condition, Condition::Is(_)) && !matches!(expiry, Expiry::AtLeast(_));
        if let Some(bulk) = self.bulk.as_ref()
            && is_judged_by_redis
            && value.len() as u64 >= bulk::LARGE
        {
            match bulk.put(&key, &value, &arguments(Remaining::NoValue)).await {
                Err(CommandFailure::NotOpened(_)) => {}
                written => {
                    let BulkWritten { existed, done } = written?;
                    return Ok(if done {
                        Written::Done(replaced(existed))
                    } else {
                        Written::ConditionFailed
                    });
                }
            }
        }
        // SET … GET would tell no more than EXISTS, and would send the old value back.
        let transaction = |left: Remaining| {
            let mut transaction = ::redis::pipe();
            transaction.atomic().cmd("EXISTS").arg(&key);
            transaction.cmd("SET").arg(&key).arg(value.as_ref()).arg(arguments(left));
            transaction
        };
        if !is_judged_by_redis {
            return self.change(id, condition, transaction).await;
        }
        let transaction = transaction(Remaining::NoValue);
        let (existed, done): (bool, Value) = self.data.query(&transaction, Retry::Never).await?;
        Ok(if done == Value::Nil {
            Written::ConditionFailed
        } else {
            Written::Done(replaced(existed))
        })
    }

    pub(super) async fn remove(
        &self,
        id: &ImageId,
        condition: &Condition,
    ) -> Result<Written, StoreError> {
        let mut transaction = ::redis::pipe();
        // UNLINK frees memory in a thread of Redis: the value may be large.
        transaction.atomic().cmd("UNLINK").arg(self.key(id));
        let existed = match condition {
            Condition::Always | Condition::Present => {
                let (existed,): (bool,) = self.data.query(&transaction, Retry::Never).await?;
                existed
            }
            Condition::Absent | Condition::Is(_) => {
                return self.change(id, condition, |_left| transaction.clone()).await;
            }
        };
        Ok(match condition {
            Condition::Present if !existed => Written::ConditionFailed,
            _ => Written::Done(replaced(existed)),
        })
    }

    /// Runs a transaction if the condition holds. The transaction is built from the remaining time of the present value.
    /// It ends within Redis's response timeout, however often other writers interfere.
    async fn change(
        &self,
        id: &ImageId,
        condition: &Condition,
        transaction: impl Fn(Remaining) -> ::redis::Pipeline,
    ) -> Result<Written, StoreError> {
        let changed = self.change_until_undisturbed(id, condition, transaction);
        tokio::time::timeout(self.response_timeout, changed)
            .await
            .unwrap_or(Err(StoreError::TimedOut))
    }

    /// Redis watches the key from `WATCH` on and discards a transaction whose key has changed since. So the value is read and
    /// judged here, and is judged again after another write.
    async fn change_until_undisturbed(
        &self,
        id: &ImageId,
        condition: &Condition,
        transaction: impl Fn(Remaining) -> ::redis::Pipeline,
    ) -> Result<Written, StoreError> {
        let key = self.key(id);
        let mut watching = self.data.exclusive().await?;
        loop {
            let mut watch = ::redis::pipe();
            watch.cmd("WATCH").arg(&key).ignore().cmd("EXISTS").arg(&key).cmd("PTTL").arg(&key);
            let (existed, left): (bool, i64) = watching.query(&watch).await?;
            let value = match condition {
                Condition::Is(_) => self.readable(&mut watching, &key).await?,
                Condition::Always | Condition::Absent | Condition::Present => {
                    existed.then(Bytes::new)
                }
            };
            let judged = condition.clone();
            let judge = move || judged.holds(value.as_deref());
            if !tokio::task::spawn_blocking(judge).await.unwrap_or(false) {
                watching.query::<()>(::redis::pipe().cmd("UNWATCH").ignore()).await?;
                watching.give_back();
                return Ok(Written::ConditionFailed);
            }
            let left = match u64::try_from(left) {
                Ok(left) => Remaining::Time(Duration::from_millis(left)),
                Err(_negative) if existed => Remaining::Forever,
                Err(_negative) => Remaining::NoValue,
            };
            let done: Value = watching.query(&transaction(left)).await?;
            if done != Value::Nil {
                watching.give_back();
                return Ok(match done {
                    // NX or XX refused it.
                    Value::Array(replies) if replies.contains(&Value::Nil) => {
                        Written::ConditionFailed
                    }
                    _ => Written::Done(replaced(existed)),
                });
            }
        }
    }

    /// Reads the value for a condition, an empty one if it may not be read.
    async fn readable(
        &self,
        watching: &mut ExclusiveConnection<'_>,
        key: &str,
    ) -> Result<Option<Bytes>, StoreError> {
        let size = watching.query(::redis::pipe().cmd("STRLEN").arg(key)).await;
        match size.and_then(|(size,): (u64,)| self.check_size(size)) {
            Ok(()) => {
                let (value,) = watching.query(::redis::pipe().cmd("GET").arg(key)).await?;
                Ok(value)
            }
            Err(StoreError::WrongType | StoreError::TooLarge { .. }) => Ok(Some(Bytes::new())),
            Err(error) => Err(error),
        }
    }

    /// `SCAN` visits every key of the database: not for requests that anyone may send often.
    pub(super) async fn list(
        &self,
        beginning: &str,
        from: Option<Cursor>,
        count: usize,
    ) -> Result<Page, StoreError> {
        // Redis refuses the whole command for a cursor that isn't a number.
        let cursor = from.map_or(Some(0), |cursor| cursor.0.parse::<u64>().ok());
        let Some(cursor) = cursor else { return Ok(Page { ids: Vec::new(), next: None }) };
        let mut scan = ::redis::pipe();
        scan.cmd("SCAN")
            .arg(cursor)
            .arg("MATCH")
            .arg(format!("{}*", escape_glob(&self.key_prefix, beginning)))
            .arg("COUNT")
            .arg(count);
        let ((next, keys),): ((String, Vec<Bytes>),) = self.data.query(&scan, Retry::Once).await?;
        let id = |key: &Bytes| {
            let id = std::str::from_utf8(key).ok()?.strip_prefix(&self.key_prefix)?;
            ImageId::parse(id).ok()
        };
        let next = Some(next).filter(|next| next != "0").map(Cursor);
        Ok(Page { ids: keys.iter().filter_map(id).collect(), next })
    }

    pub(super) async fn sizes(
        &self,
        ids: &[ImageId],
    ) -> Result<Vec<Option<StoredSize>>, StoreError> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let mut commands = ::redis::pipe();
        for id in ids {
            let key = self.key(id);
            commands.cmd("PTTL").arg(&key).cmd("STRLEN").arg(&key);
        }
        // A key of another type must not spoil the answer for all others.
        commands.ignore_errors();
        let replies: Vec<RedisResult<i64>> = self.data.query(&commands, Retry::Once).await?;
        let size = |of_key: &[RedisResult<i64>]| {
            let [Ok(pttl), strlen] = of_key else { return None };
            (*pttl >= -1).then(|| StoredSize {
                bytes: strlen.as_ref().ok().map(|length| length.unsigned_abs()),
                time_to_live: super::time_to_live(*pttl),
            })
        };
        Ok(replies.chunks(2).map(size).collect())
    }

    pub(super) async fn ping(&self) -> Result<(), StoreError> {
        let (_pong,): (String,) = self.data.query(::redis::pipe().cmd("PING"), Retry::Once).await?;
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
}

/// Remaining time to live of the present value.
#[derive(Debug, Clone, Copy)]
enum Remaining {
    NoValue,
    Time(Duration),
    Forever,
}

/// Builds a client whose sockets notice a dead peer, with the certificates of the settings.
fn client(
    url: &str,
    settings: &settings::RedisSettings,
    protocol: ProtocolVersion,
) -> anyhow::Result<Client> {
    let file = |path: &std::path::Path| {
        std::fs::read(path).with_context(|| format!("can't read {}", path.display()))
    };
    let given = |path: &std::path::Path| !path.as_os_str().is_empty();

    // The client's defaults are Nagle's delay on requests, and waiting for ever on a connection whose other end vanished
    // silently.
    let tcp = TcpSettings::default()
        .set_nodelay(true)
        .set_keepalive(TcpKeepalive::new().with_time(KEEPALIVE))
        .set_user_timeout(settings.response_timeout * 2);
    let info: ConnectionInfo = url.into_connection_info()?.set_tcp_settings(tcp);
    let redis_settings = info.redis_settings().clone().set_protocol(protocol);
    let info = info.set_redis_settings(redis_settings);

    let root_cert =
        given(&settings.tls_ca_file).then(|| file(&settings.tls_ca_file)).transpose()?;
    let client_tls = match (given(&settings.tls_cert_file), given(&settings.tls_key_file)) {
        (false, false) => None,
        (true, true) => Some(ClientTlsConfig {
            client_cert: file(&settings.tls_cert_file)?,
            client_key: file(&settings.tls_key_file)?,
        }),
        _ => anyhow::bail!("[redis] tls_cert_file and tls_key_file must be set together"),
    };
    let over_tls = matches!(info.addr(), ConnectionAddr::TcpTls { .. });
    anyhow::ensure!(
        over_tls || (root_cert.is_none() && client_tls.is_none()),
        "[redis] tls_…_file needs a [redis] url that begins with rediss://"
    );
    if over_tls {
        super::install_tls_provider();
        Ok(Client::build_with_tls(info, TlsCertificates { client_tls, root_cert })?)
    } else {
        Ok(Client::open(info)?)
    }
}

fn replaced(existed: bool) -> Replaced {
    if existed { Replaced::Value } else { Replaced::Nothing }
}

/// Escapes two texts for a glob pattern of Redis.
fn escape_glob(prefix: &str, beginning: &str) -> String {
    let mut pattern = String::new();
    for character in prefix.chars().chain(beginning.chars()) {
        if matches!(character, '*' | '?' | '[' | ']' | '\\' | '^' | '-') {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern
}

/// Redis counts in milliseconds and refuses an expiry of 0.
fn milliseconds(time_to_live: Duration) -> u64 {
    u64::try_from(time_to_live.as_millis()).unwrap_or(u64::MAX).max(1)
}
