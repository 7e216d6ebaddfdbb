//! Servers that answer as Redis does, late and out of step as seeds will have it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::BytesMut;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, ProtocolVersion, RedisConnectionInfo, RedisResult};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, split};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::resp::{array, bulk, map, push, take_command};
use crate::settings::Settings;
use crate::store::connector::Connector;
use crate::store::redis::RedisStore;

/// Time-out of a simulated connect.
const CONNECT: Duration = Duration::from_secs(1);

/// An address, behind which is one of two servers.
#[derive(Debug, Clone)]
pub(in crate::store) struct Network(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    random: fastrand::Rng,
    servers: [Server; 2],
    /// The server that the address leads to, and the one that takes writes.
    leads_to: usize,
    primary: usize,
    connections: BTreeMap<u64, Connection>,
    next_connection: u64,
    /// No new connection is answered.
    refuses: bool,
    /// Messages take this much longer at most.
    slowness: Duration,
}

#[derive(Debug, Default)]
struct Server {
    run_id: u64,
    values: BTreeMap<String, u64>,
    is_loading: bool,
    denies_tracking: bool,
    denies_info: bool,
    /// Keys of pushes that go out together.
    unsent: Vec<String>,
}

#[derive(Debug)]
struct Connection {
    server: usize,
    is_resp3: bool,
    is_tracking: bool,
    /// Nothing passes any more, and neither end is told.
    is_dead: bool,
    /// Its own, so that what others do has no influence on how late its messages are.
    random: fastrand::Rng,
    out: UnboundedSender<(Instant, String)>,
    /// Set to close it.
    closed: watch::Sender<bool>,
}

impl Network {
    pub(super) fn new(seed: u64) -> Network {
        Network(Arc::new(Mutex::new(State {
            random: fastrand::Rng::with_seed(seed),
            servers: [
                Server { run_id: 1, ..Server::default() },
                Server { run_id: 2, ..Server::default() },
            ],
            leads_to: 0,
            primary: 0,
            connections: BTreeMap::new(),
            next_connection: 0,
            refuses: false,
            slowness: Duration::ZERO,
        })))
    }

    /// A store on the server behind the address.
    pub(super) fn store(&self, settings: &Settings) -> RedisStore {
        let connector = |protocol| Connector::Simulated(self.clone(), protocol);
        RedisStore::over([ProtocolVersion::RESP2, ProtocolVersion::RESP3].map(connector), settings)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects, as the client does over TCP.
    pub(in crate::store) async fn connect(
        &self,
        protocol: ProtocolVersion,
        config: &AsyncConnectionConfig,
    ) -> RedisResult<MultiplexedConnection> {
        let too_late = || std::io::Error::from(std::io::ErrorKind::TimedOut);
        if self.lock().refuses {
            let error = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
            return Err(error.into());
        }
        let (here, there) = tokio::io::duplex(1 << 16);
        self.accept(there);
        let info = RedisConnectionInfo::default().set_protocol(protocol);
        let opening = MultiplexedConnection::new_with_config(&info, here, config.clone());
        let (connection, driver) =
            timeout(CONNECT, opening).await.map_err(|_elapsed| too_late())??;
        tokio::spawn(driver);
        Ok(connection)
    }

    fn accept(&self, stream: DuplexStream) {
        let (read, write) = split(stream);
        let (out, frames) = unbounded_channel();
        let (closed, is_closed) = watch::channel(false);
        let mut state = self.lock();
        let number = state.next_connection;
        state.next_connection += 1;
        let connection = Connection {
            server: state.leads_to,
            is_resp3: false,
            is_tracking: false,
            is_dead: false,
            random: state.random.fork(),
            out,
            closed,
        };
        state.connections.insert(number, connection);
        drop(state);
        tokio::spawn(self.clone().receive(number, read, is_closed.clone()));
        tokio::spawn(self.clone().send(number, write, frames, is_closed));
    }

    /// Executes the commands of a connection in order, each some time after it was sent.
    async fn receive(
        self,
        number: u64,
        mut read: ReadHalf<DuplexStream>,
        mut is_closed: watch::Receiver<bool>,
    ) {
        let mut buffer = BytesMut::new();
        loop {
            tokio::select! {
                biased;
                _ = is_closed.wait_for(|it| *it) => return,
                received = read.read_buf(&mut buffer) => if !matches!(received, Ok(1..)) {
                    self.lock().connections.remove(&number);
                    return;
                },
            }
            let late = self.lock().latency(number);
            sleep(late).await;
            while let Some(command) = take_command(&mut buffer) {
                self.lock().execute(number, &command);
            }
        }
    }

    /// Delivers replies and pushes in order, each when its time has come.
    async fn send(
        self,
        number: u64,
        mut write: WriteHalf<DuplexStream>,
        mut frames: UnboundedReceiver<(Instant, String)>,
        mut is_closed: watch::Receiver<bool>,
    ) {
        loop {
            let frame = tokio::select! {
                biased;
                _ = is_closed.wait_for(|it| *it) => return,
                frame = frames.recv() => frame,
            };
            let Some((at, frame)) = frame else { return };
            sleep_until(at).await;
            let is_dead = self.lock().connections.get(&number).is_none_or(|it| it.is_dead);
            if !is_dead && write.write_all(frame.as_bytes()).await.is_err() {
                return;
            }
        }
    }

    /// Writes to the primary; its pushes go out at once, or with those of the next write.
    pub(super) fn write(&self, key: &str, number: u64) {
        let state = &mut *self.lock();
        let server = &mut state.servers[state.primary];
        server.values.insert(key.to_owned(), number);
        server.unsent.push(key.to_owned());
        if state.random.u8(..4) > 0 {
            state.flush_pushes();
        }
    }

    /// Sends what Redis would have sent at the end of its turn.
    pub(super) fn end_turn(&self) {
        self.lock().flush_pushes();
    }

    /// All servers have what the primary has, as replicas in step do, and the address leads to the next one.
    pub(super) fn fail_over(&self, address_follows: bool) {
        let state = &mut *self.lock();
        state.flush_pushes();
        let next = 1 - state.primary;
        state.servers[next].values = state.servers[state.primary].values.clone();
        state.primary = next;
        if address_follows {
            state.leads_to = next;
        }
    }

    pub(super) fn address_follows(&self) {
        let state = &mut *self.lock();
        state.leads_to = state.primary;
    }

    /// A server starts again, as another process.
    pub(super) fn restart(&self) {
        let state = &mut *self.lock();
        state.servers[state.primary].run_id += 2;
        state.close(|_| true);
    }

    /// Closes connections.
    pub(super) fn close(&self, only_tracking: bool) {
        self.lock().close(|it| it.is_tracking || !only_tracking);
    }

    /// Lets connections die without a word.
    pub(super) fn silence(&self, only_tracking: bool) {
        let mut state = self.lock();
        let connections = state.connections.values_mut();
        for connection in connections.filter(|it| it.is_tracking || !only_tracking) {
            connection.is_dead = true;
        }
    }

    pub(super) fn set_refuses(&self, refuses: bool) {
        self.lock().refuses = refuses;
    }

    pub(super) fn set_slowness(&self, slowness: Duration) {
        self.lock().slowness = slowness;
    }

    pub(super) fn set_loading(&self, is_loading: bool) {
        let state = &mut *self.lock();
        state.servers[state.primary].is_loading = is_loading;
    }

    pub(super) fn set_denied(&self, tracking: bool, info: bool) {
        for server in &mut self.lock().servers {
            (server.denies_tracking, server.denies_info) = (tracking, info);
        }
    }
}

impl State {
    /// A message takes a moment, sometimes longer.
    fn latency(&mut self, connection: u64) -> Duration {
        let Some(Connection { random, .. }) = self.connections.get_mut(&connection) else {
            return Duration::ZERO;
        };
        let most = match random.u8(..) {
            0..=4 => 100_000,
            5..=40 => 10_000,
            _ => 1_000,
        };
        let slowness = u64::try_from(self.slowness.as_micros()).unwrap();
        Duration::from_micros(random.u64(50..most) + random.u64(..=slowness))
    }

    fn flush_pushes(&mut self) {
        for server in 0..self.servers.len() {
            let keys = std::mem::take(&mut self.servers[server].unsent);
            let keys: BTreeSet<String> = keys.into_iter().collect();
            if keys.is_empty() {
                continue;
            }
            let frame = push(&Vec::from_iter(keys));
            for number in self.tracking_on(server) {
                self.answer(number, frame.clone());
            }
        }
    }

    fn tracking_on(&self, server: usize) -> Vec<u64> {
        let tracks = |it: &&Connection| it.is_tracking && it.server == server;
        let connections = self.connections.iter().filter(|(_, it)| tracks(it));
        connections.map(|(number, _)| *number).collect()
    }

    /// Sends something over a connection, behind what was sent before.
    fn answer(&mut self, connection: u64, frame: String) {
        let at = Instant::now() + self.latency(connection);
        if let Some(connection) = self.connections.get(&connection) {
            // A connection that is closed takes nothing.
            let _ = connection.out.send((at, frame));
        }
    }

    fn close(&mut self, which: impl Fn(&Connection) -> bool) {
        self.connections.retain(|_, connection| {
            let closes = which(connection);
            if closes {
                connection.closed.send_replace(true);
            }
            !closes
        });
    }

    fn execute(&mut self, connection: u64, command: &[String]) {
        // Pushes of what was written before go out before the reply.
        self.flush_pushes();
        let Some(it) = self.connections.get_mut(&connection).filter(|it| !it.is_dead) else {
            return;
        };
        let server = &self.servers[it.server];
        let is_primary = it.server == self.primary;
        let [name, arguments @ ..] = command else { return };
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let role = if is_primary { "master" } else { "replica" };
        let denied = || "-NOPERM this user has no permissions\r\n".to_owned();
        let reply = match (name.to_uppercase().as_str(), arguments.as_slice()) {
            ("HELLO", version) => {
                it.is_resp3 |= version.first() == Some(&"3");
                let fields =
                    [("server", bulk("redis")), ("mode", bulk("standalone")), ("role", bulk(role))];
                map(it.is_resp3, &fields)
            }
            ("CLIENT", ["SETINFO", ..]) => "+OK\r\n".to_owned(),
            ("CLIENT", ["TRACKING", "ON", ..]) if server.denies_tracking => denied(),
            ("CLIENT", ["TRACKING", "ON", ..]) => {
                it.is_tracking = true;
                "+OK\r\n".to_owned()
            }
            ("CLIENT", ["TRACKINGINFO"]) => {
                let flags = if it.is_tracking {
                    vec![bulk("on"), bulk("bcast")]
                } else {
                    vec![bulk("off")]
                };
                let fields = [
                    ("flags", array(&flags)),
                    ("redirect", ":-1\r\n".to_owned()),
                    ("prefixes", array(&[bulk("image:")])),
                ];
                map(it.is_resp3, &fields)
            }
            ("CLIENT", ["INFO"]) => bulk(&format!("id=1 laddr=10.0.0.{}:6379", it.server)),
            ("INFO", _) if server.denies_info => denied(),
            ("INFO", ["server"]) => {
                bulk(&format!("redis_mode:standalone\r\nrun_id:{:040}\r\n", server.run_id))
            }
            ("INFO", _) => bulk(&format!("role:{role}\r\n")),
            ("ROLE", _) => array(&[bulk(role)]),
            ("PING", _) => "+PONG\r\n".to_owned(),
            _ if server.is_loading => {
                "-LOADING Redis is loading the dataset in memory\r\n".to_owned()
            }
            ("STRLEN", [key]) => {
                format!(":{}\r\n", server.values.get(*key).map_or(0, |it| it.to_string().len()))
            }
            ("GET", [key]) => server.values.get(*key).map_or_else(
                || if it.is_resp3 { "_\r\n".to_owned() } else { "$-1\r\n".to_owned() },
                |it| bulk(&it.to_string()),
            ),
            ("PTTL", _) => ":-1\r\n".to_owned(),
            _ => format!("-ERR unknown command '{name}'\r\n"),
        };
        self.answer(connection, reply);
    }
}
