//! The store in Redis or Valkey.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ::redis::io::tcp::{TcpSettings, socket2::TcpKeepalive};
use ::redis::{
    AsyncConnectionConfig, Client, ClientTlsConfig, ConnectionAddr, ConnectionInfo,
    IntoConnectionInfo, ProtocolVersion, TlsCertificates, Value,
};
use anyhow::Context;
use bytes::Bytes;

use super::bulk::{self, ValuePath};
use super::connection::{Alone, CommandFailure, DataPath, Repeat};
use super::tracking::Tracking;
use super::{
    Change, ChangeListener, Coherence, Condition, Cursor, Expiry, Page, Replaced, StoreError,
    Stored, Written,
};
use crate::image::ImageId;
use crate::settings::{self, Settings};
use crate::task::Task;

/// How long a connection is silent before it is asked whether the other end is still there.
const KEEPALIVE: Duration = Duration::from_secs(15);

/// Reads and writes records over a few connections that reconnect by themselves.
///
/// The connections carry data only: that a value changed is told over another, which `Tracking` owns.
#[derive(Debug)]
pub struct RedisStore {
    data: Arc<DataPath>,
    /// Where values come in the clear.
    values: Option<ValuePath>,
    tracking_client: Client,
    connect_timeout: Duration,
    response_timeout: Duration,
    track: bool,
    tracking: Option<Task>,
    key_prefix: String,
    max_value: usize,
}

impl RedisStore {
    /// Prepares the connections; each connects when it is first needed.
    pub fn open(url: &str, settings: &Settings) -> anyhow::Result<RedisStore> {
        let data_client = client(url, &settings.redis, ProtocolVersion::RESP2)?;
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(settings.redis.connect_timeout))
            .set_response_timeout(Some(settings.redis.response_timeout));
        let data = DataPath::new(settings.redis.connections, &data_client, &config);
        let tracked = Arc::clone(&data.tracked);
        let values = ValuePath::new(data_client.get_connection_info(), &settings.redis, tracked);
        Ok(RedisStore {
            data: Arc::new(data),
            values,
            tracking_client: client(url, &settings.redis, ProtocolVersion::RESP3)?,
            connect_timeout: settings.redis.connect_timeout,
            response_timeout: settings.redis.response_timeout,
            track: settings.redis.tracking,
            tracking: None,
            key_prefix: settings.records.key_prefix.clone(),
            max_value: settings.records.max_value,
        })
    }

    /// Starts the connection that says when a value changes.
    pub(super) fn watch(&mut self, listener: ChangeListener) {
        if self.track {
            let tracking = Tracking {
                client: self.tracking_client.clone(),
                key_prefix: self.key_prefix.clone(),
                connect_timeout: self.connect_timeout,
                listener,
                data: Arc::clone(&self.data),
            };
            self.tracking = Some(tracking.start());
        } else {
            listener.notify(Change::TrackingLost {
                connection: 1,
                last_heard: Instant::now(),
                coherence: Coherence::Unverified("switched off ([redis] tracking)".into()),
            });
        }
    }

    /// Transform before every `GET`, so that a value over the limit is not transferred, unless it was written between the
    /// two; and then it is refused.
    pub(super) async fn size(&self, id: &ImageId) -> Result<u64, StoreError> {
        let (size,): (u64,) =
            self.data.query(::redis::pipe().cmd("STRLEN").arg(self.key(id)), Repeat::Once).await?;
        self.check_size(size)?;
        Ok(size)
    }

    /// Value and remaining time in one round trip, and in no transaction: a Redis that is full refuses to queue
    /// even a GET. A write that comes between the two is told of, and what was read here is not kept.
    pub(super) async fn get(&self, id: &ImageId, size: u64) -> Result<Option<Stored>, StoreError> {
        let (key, mut commands) = (self.key(id), ::redis::pipe());
        if let Some(values) = self.values.as_ref().filter(|_| size >= bulk::LARGE) {
            match values.get(&key, self.max_value).await {
                Err(CommandFailure::NotOpened(_)) => {}
                read => return Ok(read?),
            }
        }
        commands.cmd("GET").arg(&key).cmd("PTTL").arg(&key);
        let (value, milliseconds): (Option<Bytes>, i64) =
            self.data.query(&commands, Repeat::Once).await?;
        let Some(value) = value else {
            return Ok(None);
        };
        self.check_size(value.len() as u64)?;
        Ok(Some(Stored::of(value, milliseconds)))
    }

    pub(super) async fn put(
        &self,
        id: &ImageId,
        value: Bytes,
        expiry: Expiry,
        condition: &Condition,
    ) -> Result<Written, StoreError> {
        // SET … GET would tell as much as EXISTS, and send the old value back.
        let transaction = |left: Left| {
            let mut transaction = ::redis::pipe();
            let set = transaction
                .atomic()
                .cmd("EXISTS")
                .arg(self.key(id))
                .cmd("SET")
                .arg(self.key(id))
                .arg(value.as_ref());
            match (expiry, left) {
                (Expiry::In(time_to_live), _) => set.arg("PX").arg(milliseconds(time_to_live)),
                (Expiry::AtLeast(time_to_live), Left::Nothing) => {
                    set.arg("PX").arg(milliseconds(time_to_live))
                }
                (Expiry::AtLeast(time_to_live), Left::Time(left)) => {
                    set.arg("PX").arg(milliseconds(time_to_live.max(left)))
                }
                (Expiry::Never, _) | (Expiry::AtLeast(_), Left::ForEver) => set,
                (Expiry::Kept, _) => set.arg("KEEPTTL"),
            };
            match condition {
                Condition::Always | Condition::Is(_) => {}
                Condition::Absent => drop(set.arg("NX")),
                Condition::Present => drop(set.arg("XX")),
            }
            transaction
        };
        if matches!(condition, Condition::Is(_)) || matches!(expiry, Expiry::AtLeast(_)) {
            return self.change(id, condition, transaction).await;
        }
        let transaction = transaction(Left::Nothing);
        let (existed, done): (bool, Value) = self.data.query(&transaction, Repeat::Never).await?;
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
        // Freed by a thread of its own, since it may be large.
        transaction.atomic().cmd("UNLINK").arg(self.key(id));
        let existed = match condition {
            Condition::Always | Condition::Present => {
                let (existed,): (bool,) = self.data.query(&transaction, Repeat::Never).await?;
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

    /// A transaction on the condition that what is there is as it says, made when it is known how long that would have
    /// lived. Takes no longer than Redis may take to answer, however often it is overtaken.
    async fn change(
        &self,
        id: &ImageId,
        condition: &Condition,
        transaction: impl Fn(Left) -> ::redis::Pipeline,
    ) -> Result<Written, StoreError> {
        let changed = self.change_in_turns(id, condition, transaction);
        tokio::time::timeout(self.response_timeout, changed)
            .await
            .unwrap_or(Err(StoreError::TimedOut))
    }

    /// Redis looks after the key from `WATCH` on and makes nothing of a transaction whose key was changed since. So the
    /// value is read and judged here, and whoever was overtaken judges anew.
    async fn change_in_turns(
        &self,
        id: &ImageId,
        condition: &Condition,
        transaction: impl Fn(Left) -> ::redis::Pipeline,
    ) -> Result<Written, StoreError> {
        let key = self.key(id);
        let mut watching = self.data.alone().await?;
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
                Ok(left) => Left::Time(Duration::from_millis(left)),
                Err(_negative) if existed => Left::ForEver,
                Err(_negative) => Left::Nothing,
            };
            let done: Value = watching.query(&transaction(left)).await?;
            if done != Value::Nil {
                watching.give_back();
                return Ok(match done {
                    // NX or XX had another opinion.
                    Value::Array(replies) if replies.contains(&Value::Nil) => {
                        Written::ConditionFailed
                    }
                    _ => Written::Done(replaced(existed)),
                });
            }
        }
    }

    /// A value for a condition to look at: an empty one in place of one that may not be read.
    async fn readable(
        &self,
        watching: &mut Alone<'_>,
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

    /// `SCAN` looks at every key of the database: it isn't for requests that anyone may send often.
    pub(super) async fn list(
        &self,
        beginning: &str,
        from: Option<Cursor>,
    ) -> Result<Page, StoreError> {
        /// How many keys are looked at before others get their turn: about a millisecond.
        const LOOKED_AT: usize = 1000;
        let mut scan = ::redis::pipe();
        scan.cmd("SCAN")
            .arg(from.map_or_else(|| "0".to_owned(), |cursor| cursor.0))
            .arg("MATCH")
            .arg(format!("{}*", literally(&self.key_prefix, beginning)))
            .arg("COUNT")
            .arg(LOOKED_AT);
        let ((next, keys),): ((String, Vec<Bytes>),) = self.data.query(&scan, Repeat::Once).await?;
        let id = |key: &Bytes| {
            let id = std::str::from_utf8(key).ok()?.strip_prefix(&self.key_prefix)?;
            ImageId::parse(id).ok()
        };
        let next = Some(next).filter(|next| next != "0").map(Cursor);
        Ok(Page { ids: keys.iter().filter_map(id).collect(), next })
    }

    pub(super) async fn ping(&self) -> Result<(), StoreError> {
        self.data.ping().await
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

/// How long a value would have lived on.
#[derive(Debug, Clone, Copy)]
enum Left {
    /// There is none.
    Nothing,
    Time(Duration),
    ForEver,
}

/// A client whose sockets notice a dead peer, with the certificates of the settings.
fn client(
    url: &str,
    settings: &settings::RedisSettings,
    protocol: ProtocolVersion,
) -> anyhow::Result<Client> {
    let file = |path: &std::path::Path| {
        std::fs::read(path).with_context(|| format!("{} can't be read", path.display()))
    };
    let given = |path: &std::path::Path| !path.as_os_str().is_empty();

    // Off by default in the client, all three: Nagle's delay on a request, and for ever waiting on a
    // connection whose other end vanished without a word.
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
        _ => anyhow::bail!("redis.tls_cert_file and redis.tls_key_file go together"),
    };
    let over_tls = matches!(info.addr(), ConnectionAddr::TcpTls { .. });
    anyhow::ensure!(
        over_tls || (root_cert.is_none() && client_tls.is_none()),
        "redis.tls_…_file is given, but redis.url doesn't begin with rediss://"
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

/// A pattern of Redis that means two texts as they are.
fn literally(prefix: &str, beginning: &str) -> String {
    let mut pattern = String::new();
    for character in prefix.chars().chain(beginning.chars()) {
        if matches!(character, '*' | '?' | '[' | ']' | '\\' | '^' | '-') {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern
}

/// Redis counts in milliseconds and refuses an expiry of none.
fn milliseconds(time_to_live: Duration) -> u64 {
    u64::try_from(time_to_live.as_millis()).unwrap_or(u64::MAX).max(1)
}
