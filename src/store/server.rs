//! The server behind the address: which one it is, and whether it may be read from.

use std::sync::{Mutex, MutexGuard, PoisonError};

use redis::aio::MultiplexedConnection;
use redis::{ErrorKind, RedisError, RedisResult, ServerErrorKind, Value};
use tokio::sync::{Notify, watch};

use super::connection::{CommandFailure, is_read_only};

/// Answers of a server to questions about itself. A user may be denied some of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct ServerInfo {
    /// New with each start of a server (`INFO`).
    run_id: Option<String>,
    /// The server's own address of the connection (`CLIENT INFO`): of two servers behind one address it differs, unless
    /// both are in containers that call themselves alike.
    local_address: Option<String>,
    pub(super) role: Option<Role>,
    pub(super) mode: Option<Mode>,
    /// The command that told the role, for the heartbeat.
    pub(super) role_command: Option<RoleCommand>,
}

/// Role of a server in replication.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Primary,
    Replica,
}

/// Kind of deployment that a server belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Standalone,
    Cluster,
    Sentinel,
}

/// Commands that tell a server's role, the least privileged first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RoleCommand {
    Hello,
    Role,
    Info,
}

/// Result of comparing two servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Same,
    Other,
    /// The two have no answer to the same question.
    Unknown,
}

impl ServerInfo {
    /// Asks a server, in one round trip.
    pub(super) async fn ask(connection: &mut MultiplexedConnection) -> RedisResult<ServerInfo> {
        let mut commands = redis::pipe();
        commands.cmd("INFO").arg("server").cmd("CLIENT").arg("INFO");
        for command in RoleCommand::ALL {
            commands.add_command(command.command());
        }
        commands.ignore_errors();
        let replies: Vec<RedisResult<Value>> = commands.query_async(connection).await?;
        let mut replies = replies.into_iter();
        let mut next = || answered(replies.next());
        let (server, client) = (next()?, next()?);
        let mut info = ServerInfo::from_text(&text_of(server.as_ref()));
        let client = text_of(client.as_ref());
        info.local_address = field(&client, ' ', "laddr=");
        for command in RoleCommand::ALL {
            let Some(reply) = next()? else { continue };
            if info.role.is_none() {
                info.role = command.role_in(&reply);
                info.role_command = info.role.map(|_| command);
            }
            if command == RoleCommand::Hello {
                info.mode = info.mode.or_else(|| mode_in(hello_field(&reply, "mode")?));
            }
        }
        Ok(info)
    }

    /// Parses the text of `INFO`.
    pub(super) fn from_text(text: &str) -> ServerInfo {
        ServerInfo {
            run_id: field(text, '\n', "run_id:"),
            role: field(text, '\n', "role:").and_then(|role| role_in(&role)),
            mode: field(text, '\n', "redis_mode:").and_then(|mode| mode_in(&mode)),
            ..ServerInfo::default()
        }
    }

    /// True if this server can be told from another one.
    pub(super) fn is_identified(&self) -> bool {
        self.run_id.is_some() || self.local_address.is_some()
    }

    fn compare(&self, other: &ServerInfo) -> Comparison {
        let compared = |one: &Option<String>, other: &Option<String>| {
            Some(if one.as_ref()? == other.as_ref()? {
                Comparison::Same
            } else {
                Comparison::Other
            })
        };
        compared(&self.run_id, &other.run_id)
            .or_else(|| compared(&self.local_address, &other.local_address))
            .unwrap_or(Comparison::Unknown)
    }

    /// An error if records must not be read from this server.
    pub(super) fn check_readable(&self) -> RedisResult<()> {
        match (self.mode, self.role) {
            (Some(Mode::Cluster), _) => Err(refusal(CLUSTER)),
            (Some(Mode::Sentinel), _) => Err(refusal(SENTINEL)),
            (_, Some(Role::Replica)) => Err(refusal(REPLICA)),
            _ => Ok(()),
        }
    }
}

/// Reasons for not reading from a server.
pub(super) const REPLICA: &str = "the server is a replica: the address must lead to the primary";
pub(super) const CLUSTER: &str = "the server is a node of a Redis Cluster, which is not supported: \
                                  the address must lead to a single server";
const SENTINEL: &str = "the server is a Sentinel: the address must lead to the primary";
const OTHER: &str = "the address leads to another server now";
const UNKNOWN: &str = "the server can't be compared with the one that pushes changes: \
                       the user must be allowed to run INFO or CLIENT INFO";

fn refusal(reason: &'static str) -> RedisError {
    (ErrorKind::Io, reason).into()
}

impl RoleCommand {
    const ALL: [RoleCommand; 3] = [RoleCommand::Hello, RoleCommand::Role, RoleCommand::Info];

    /// Builds the command.
    pub(super) fn command(self) -> redis::Cmd {
        match self {
            RoleCommand::Hello => redis::cmd("HELLO"),
            RoleCommand::Role => redis::cmd("ROLE"),
            RoleCommand::Info => redis::cmd("INFO").arg("replication").to_owned(),
        }
    }

    /// Parses the role in the reply.
    pub(super) fn role_in(self, reply: &Value) -> Option<Role> {
        match self {
            RoleCommand::Hello => role_in(hello_field(reply, "role")?),
            RoleCommand::Role => match reply {
                Value::Array(parts) => role_in(text(parts.first()?)?),
                _ => None,
            },
            RoleCommand::Info => ServerInfo::from_text(&text_of(Some(reply))).role,
        }
    }
}

/// Takes a reply. A refused question is no answer; any other error ends the asking.
fn answered(reply: Option<RedisResult<Value>>) -> RedisResult<Option<Value>> {
    match reply {
        Some(Ok(value)) => Ok(Some(value)),
        Some(Err(error)) if is_refusal(&error) => Ok(None),
        Some(Err(error)) => Err(error),
        None => Ok(None),
    }
}

/// True if the user may not run a command, or the server doesn't have it.
pub(super) fn is_refusal(error: &RedisError) -> bool {
    match error.kind() {
        ErrorKind::Server(ServerErrorKind::NoPerm) => true,
        // Not "max number of clients reached", say.
        ErrorKind::Server(ServerErrorKind::ResponseError) => error.to_string().contains("unknown"),
        _ => false,
    }
}

fn role_in(text: &str) -> Option<Role> {
    match text {
        "master" => Some(Role::Primary),
        "slave" | "replica" => Some(Role::Replica),
        _ => None,
    }
}

fn mode_in(text: &str) -> Option<Mode> {
    match text {
        "standalone" => Some(Mode::Standalone),
        "cluster" => Some(Mode::Cluster),
        "sentinel" => Some(Mode::Sentinel),
        _ => None,
    }
}

/// Returns a field of the answer to `HELLO`: a map, or over RESP2 an array of names and values.
fn hello_field<'a>(reply: &'a Value, name: &str) -> Option<&'a str> {
    match reply {
        Value::Map(fields) => {
            let (_, value) = fields.iter().find(|(it, _)| text(it) == Some(name))?;
            text(value)
        }
        Value::Array(parts) => {
            let mut pairs = parts.chunks_exact(2);
            text(&pairs.find(|pair| text(&pair[0]) == Some(name))?[1])
        }
        _ => None,
    }
}

/// Returns what follows `name` in a text of fields.
fn field(text: &str, separator: char, name: &str) -> Option<String> {
    text.split(separator).find_map(|field| field.trim().strip_prefix(name)).map(str::to_owned)
}

pub(super) fn text(value: &Value) -> Option<&str> {
    match value {
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok(),
        Value::SimpleString(text) | Value::VerbatimString { text, .. } => Some(text),
        _ => None,
    }
}

fn text_of(value: Option<&Value>) -> String {
    value.and_then(text).unwrap_or_default().to_owned()
}

/// The server that pushes changes. Data must come from that very server: after a failover the address may lead to
/// another one, while connections to the old one live on.
#[derive(Debug, Default)]
pub(super) struct TrackedServer {
    /// Grows when tracking begins and when it ends. Whatever a connection of an earlier generation still says isn't read.
    generation: watch::Sender<u64>,
    /// The server, while it is tracked.
    server: Mutex<Option<ServerInfo>>,
    doubt: Mutex<Option<String>>,
    doubted: Notify,
}

impl TrackedServer {
    /// Begins a generation: a new tracking connection is about to be relied upon.
    pub(super) fn begin(&self, server: ServerInfo) {
        *lock(&self.doubt) = None;
        *lock(&self.server) = Some(server);
        self.generation.send_modify(|generation| *generation += 1);
    }

    /// Ends the generation: no changes are announced for now. A server that hung may wake up and answer what it was asked
    /// before, although another one has taken writes since; so those answers aren't awaited.
    pub(super) fn end(&self) {
        if lock(&self.server).take().is_some() {
            self.generation.send_modify(|generation| *generation += 1);
        }
    }

    /// Begins a generation without a tracked server: every connection is opened anew, and looked at.
    pub(super) fn reopen(&self) {
        *lock(&self.server) = None;
        self.generation.send_modify(|generation| *generation += 1);
    }

    /// The present generation, to which a connection that is opened now belongs.
    pub(super) fn generation(&self) -> u64 {
        *self.generation.borrow()
    }

    /// Waits until a generation has ended.
    pub(super) async fn left(&self, generation: u64) {
        // The sender lives as long as this.
        let _ = self.generation.subscribe().wait_for(|now| *now != generation).await;
    }

    /// Checks that a new connection leads to a primary, and to the tracked server if there is one.
    pub(super) fn check(&self, server: &ServerInfo) -> RedisResult<()> {
        let tracked = lock(&self.server);
        let reason = match tracked.as_ref().map(|tracked| tracked.compare(server)) {
            Some(Comparison::Other) => OTHER,
            Some(Comparison::Unknown) => UNKNOWN,
            None | Some(Comparison::Same) => return server.check_readable(),
        };
        drop(tracked);
        self.doubt(reason);
        Err(refusal(reason))
    }

    /// Classifies the failure of commands that were sent. A refused write tells that the server is a replica.
    pub(super) fn failed(&self, error: RedisError) -> CommandFailure {
        if is_read_only(&error) {
            self.doubt(REPLICA);
            self.reopen();
        }
        CommandFailure::after_sending(error)
    }

    /// Reports a sign that the tracked server isn't the one to rely on.
    pub(super) fn doubt(&self, reason: &str) {
        if lock(&self.server).is_some() {
            *lock(&self.doubt) = Some(reason.to_owned());
            self.doubted.notify_one();
        }
    }

    /// Waits for a doubt about the tracked server.
    pub(super) async fn doubted(&self) -> String {
        loop {
            if let Some(reason) = lock(&self.doubt).take() {
                return reason;
            }
            self.doubted.notified().await;
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(run_id: Option<&str>, local_address: Option<&str>) -> ServerInfo {
        ServerInfo {
            run_id: run_id.map(str::to_owned),
            local_address: local_address.map(str::to_owned),
            ..ServerInfo::default()
        }
    }

    #[test]
    fn servers_are_compared_by_what_both_have_told() {
        let full = server(Some("a"), Some("10.0.0.1:6379"));
        assert_eq!(full.compare(&full), Comparison::Same);
        assert_eq!(full.compare(&server(Some("b"), Some("10.0.0.1:6379"))), Comparison::Other);
        assert_eq!(full.compare(&server(None, Some("10.0.0.1:6379"))), Comparison::Same);
        assert_eq!(full.compare(&server(None, Some("10.0.0.2:6379"))), Comparison::Other);
        assert_eq!(full.compare(&server(None, None)), Comparison::Unknown);
        assert_eq!(server(Some("a"), None).compare(&server(None, Some("x"))), Comparison::Unknown);
    }

    #[test]
    fn info_tells_run_id_role_and_mode() {
        let text =
            "# Server\r\nredis_mode:cluster\r\nrun_id:0a1b\r\n# Replication\r\nrole:slave\r\n";
        let info = ServerInfo::from_text(text);
        assert_eq!(info.run_id.as_deref(), Some("0a1b"));
        assert_eq!((info.role, info.mode), (Some(Role::Replica), Some(Mode::Cluster)));
        assert!(info.check_readable().is_err());
    }

    #[test]
    fn hello_tells_the_role_over_both_protocols() {
        let bulk = |text: &str| Value::BulkString(text.into());
        let map =
            Value::Map(vec![(bulk("mode"), bulk("standalone")), (bulk("role"), bulk("replica"))]);
        let array =
            Value::Array(vec![bulk("mode"), bulk("standalone"), bulk("role"), bulk("master")]);
        assert_eq!(RoleCommand::Hello.role_in(&map), Some(Role::Replica));
        assert_eq!(RoleCommand::Hello.role_in(&array), Some(Role::Primary));
    }

    #[tokio::test]
    async fn a_generation_ends_with_its_tracking() {
        let tracked = TrackedServer::default();
        tracked.begin(server(Some("a"), None));
        let generation = tracked.generation();
        assert!(tracked.check(&server(Some("a"), None)).is_ok());
        assert!(tracked.check(&server(Some("b"), None)).is_err());
        assert_eq!(tracked.doubted().await, OTHER);
        tracked.end();
        tracked.left(generation).await;
        // Nobody is tracked, so any primary may be read from.
        assert!(tracked.check(&server(Some("b"), None)).is_ok());
    }
}
