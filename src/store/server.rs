//! The server behind the address: which one it is, and whether it may be read from.

use redis::aio::MultiplexedConnection;
use redis::{ErrorKind, RedisError, RedisResult, ServerErrorKind, Value};
use tokio::sync::watch;

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
        ServerInfo::from_replies(commands.query_async(connection).await?)
    }

    /// Parses the replies to [`ServerInfo::ask`].
    pub(super) fn from_replies(replies: Vec<RedisResult<Value>>) -> RedisResult<ServerInfo> {
        let mut replies = replies.into_iter();
        let mut next = || answered(replies.next());
        let (server, client) = (next()?, next()?);
        let mut info = ServerInfo::from_text(&text_of(server.as_ref()));
        let client = text_of(client.as_ref());
        info.local_address = field(&client, ' ', "laddr=");
        for command in RoleCommand::ALL {
            let Some(reply) = next()? else { continue };
            // Some servers tell the role with the first INFO already, which is no command to ask again.
            if info.role_command.is_none()
                && let Some(role) = command.role_in(&reply)
            {
                info.role = Some(role);
                info.role_command = Some(command);
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

    /// The reason for which records must not be read from this server, if there is one.
    pub(super) fn check_readable(&self) -> Result<(), Unusable> {
        match (self.mode, self.role) {
            (Some(Mode::Cluster), _) => Err(Unusable(CLUSTER)),
            (Some(Mode::Sentinel), _) => Err(Unusable(SENTINEL)),
            (_, Some(Role::Replica)) => Err(Unusable(REPLICA)),
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

/// A server that must not be read from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Unusable(pub(super) &'static str);

impl From<Unusable> for RedisError {
    fn from(Unusable(reason): Unusable) -> RedisError {
        (ErrorKind::Client, reason).into()
    }
}

impl RoleCommand {
    pub(super) const ALL: [RoleCommand; 3] =
        [RoleCommand::Hello, RoleCommand::Role, RoleCommand::Info];

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
        // Each server has its own words for a command that it doesn't know.
        ErrorKind::Server(ServerErrorKind::ResponseError) => !is_full(error),
        _ => false,
    }
}

/// True if the server takes no more clients.
pub(super) fn is_full(error: &RedisError) -> bool {
    error.to_string().contains("max number of clients")
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

/// The one server that everything comes from, pushes and data. After a failover the address may lead to another one, while
/// connections to the old one live on.
///
/// All connections of a generation lead to the same server. A new connection to another one ends the generation, as does a
/// write that is refused by a replica: every connection is opened anew, and replies that are still to come over the old ones
/// aren't read.
#[derive(Debug, Default)]
pub(super) struct CurrentServer(watch::Sender<Generation>);

#[derive(Debug, Default)]
struct Generation {
    number: u64,
    /// The server that its connections lead to, as far as one has been opened.
    server: Option<ServerInfo>,
    /// A connection leads to a server that can't be told from others.
    has_unidentified: bool,
    /// Set while this server pushes changes that are relied upon.
    is_tracked: bool,
    /// The reason for which the tracked server was given up.
    doubt: Option<&'static str>,
}

impl Generation {
    fn next(&mut self) {
        self.number += 1;
        self.server = None;
        self.has_unidentified = false;
        self.is_tracked = false;
    }

    /// Gives the server up.
    fn doubt(&mut self, reason: &'static str) {
        if self.is_tracked {
            self.doubt = Some(reason);
        }
        self.next();
    }
}

impl CurrentServer {
    /// Notes that a server is tracked. Its generation goes on if it is the one that data comes from already.
    pub(super) fn track(&self, server: ServerInfo) {
        self.0.send_modify(|generation| {
            let present = generation.server.as_ref().map(|present| present.compare(&server));
            let is_other = present.is_some_and(|present| present != Comparison::Same);
            // A connection that is being opened meanwhile is compared when it is open.
            if is_other || generation.has_unidentified {
                generation.next();
            }
            generation.server = Some(server);
            generation.is_tracked = true;
            generation.doubt = None;
        });
    }

    /// Ends the generation of a server that isn't tracked any more. It may hang, wake up and answer what it was asked before,
    /// although another one has taken writes since.
    pub(super) fn end_tracking(&self) {
        self.0.send_if_modified(|generation| {
            let was_tracked = generation.is_tracked;
            if was_tracked {
                generation.next();
            }
            was_tracked
        });
    }

    /// Ends the generation.
    pub(super) fn reopen(&self) {
        self.0.send_modify(Generation::next);
    }

    /// The number of the present generation, to which a connection that is opened now belongs.
    pub(super) fn generation(&self) -> u64 {
        self.0.borrow().number
    }

    /// Waits until a generation has ended.
    pub(super) async fn left(&self, number: u64) {
        // The sender lives as long as this.
        let _ = self.0.subscribe().wait_for(|generation| generation.number != number).await;
    }

    /// Checks a server that a connection of a generation leads to: it must be a primary, and the same one for all.
    pub(super) fn check(&self, number: u64, server: &ServerInfo) -> Result<(), Unusable> {
        server.check_readable()?;
        let mut checked = Ok(());
        self.0.send_if_modified(|generation| {
            if generation.number != number {
                checked = Err(Unusable(OTHER));
                return false;
            }
            let reason = match generation.server.as_ref().map(|present| present.compare(server)) {
                Some(Comparison::Other) => OTHER,
                Some(Comparison::Unknown) if generation.is_tracked => UNKNOWN,
                None if server.is_identified() => {
                    generation.server = Some(server.clone());
                    return false;
                }
                None | Some(Comparison::Unknown) => {
                    generation.has_unidentified = true;
                    return false;
                }
                Some(Comparison::Same) => return false,
            };
            generation.doubt(reason);
            checked = Err(Unusable(reason));
            true
        });
        checked
    }

    /// Classifies the failure of commands that were sent in a generation. A refused write tells that the server is a replica.
    pub(super) fn failed(&self, number: u64, error: RedisError) -> CommandFailure {
        if is_read_only(&error) {
            self.0.send_if_modified(|generation| {
                let is_present = generation.number == number;
                if is_present {
                    generation.doubt(REPLICA);
                }
                is_present
            });
        }
        CommandFailure::after_sending(error)
    }

    /// Gives the tracked server of a generation up.
    pub(super) fn doubt(&self, number: u64, reason: &'static str) {
        self.0.send_if_modified(|generation| {
            let is_present = generation.number == number;
            if is_present {
                generation.doubt(reason);
            }
            is_present
        });
    }

    /// Waits until the tracked server is given up.
    pub(super) async fn doubted(&self) -> &'static str {
        let mut state = self.0.subscribe();
        loop {
            if let Some(reason) = state.borrow_and_update().doubt {
                return reason;
            }
            // The sender lives as long as this.
            let _ = state.changed().await;
        }
    }
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
    fn a_role_that_the_first_info_tells_has_a_command_that_tells_it_again() {
        let bulk = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let refused = || {
            let denied = redis::parse_redis_value(b"-NOPERM no\r\n").unwrap();
            denied.extract_error()
        };
        let replies = vec![
            Ok(bulk("run_id:a\r\nrole:master\r\n")),
            refused(),
            refused(),
            Ok(Value::Array(vec![bulk("slave")])),
            Ok(bulk("role:slave\r\n")),
        ];
        let info = ServerInfo::from_replies(replies).unwrap();
        assert_eq!(info.role_command, Some(RoleCommand::Role));
        // The later answer counts: the server may have been demoted between the two.
        assert_eq!(info.role, Some(Role::Replica));
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
        let current = CurrentServer::default();
        current.track(server(Some("a"), None));
        let generation = current.generation();
        assert!(current.check(generation, &server(Some("a"), None)).is_ok());
        current.end_tracking();
        current.left(generation).await;
        // Nobody is tracked, so any primary may be read from.
        assert!(current.check(current.generation(), &server(Some("b"), None)).is_ok());
    }

    #[tokio::test]
    async fn another_server_ends_the_generation_and_the_trust_in_its_pushes() {
        let current = CurrentServer::default();
        current.track(server(Some("a"), None));
        let generation = current.generation();
        assert!(current.check(generation, &server(Some("b"), None)).is_err());
        assert_eq!(current.doubted().await, OTHER);
        current.left(generation).await;
        // A connection of that generation that is opened late doubts nobody.
        current.track(server(Some("b"), None));
        let tracked = current.generation();
        assert!(current.check(generation, &server(Some("a"), None)).is_err());
        assert!(current.0.borrow().doubt.is_none());
        assert_eq!(current.generation(), tracked);
    }

    #[test]
    fn without_tracking_all_connections_still_lead_to_one_server() {
        let current = CurrentServer::default();
        let generation = current.generation();
        assert!(current.check(generation, &server(Some("a"), None)).is_ok());
        assert!(current.check(generation, &server(Some("b"), None)).is_err());
        let next = current.generation();
        assert_ne!(next, generation);
        assert!(current.check(next, &server(Some("b"), None)).is_ok());
        // Tracking the server that data comes from already needs no new connections.
        current.track(server(Some("b"), None));
        assert_eq!(current.generation(), next);
        current.track(server(Some("c"), None));
        assert_ne!(current.generation(), next);
    }

    #[test]
    fn any_words_for_an_unknown_command_are_no_answer() {
        let error = |text: &str| {
            let reply = redis::parse_redis_value(format!("-{text}\r\n").as_bytes()).unwrap();
            reply.extract_error().unwrap_err()
        };
        for text in [
            "ERR unknown command 'INFO'",
            "ERR Unknown subcommand or wrong number of arguments for 'INFO'. Try CLIENT HELP.",
            "ERR Syntax error, try CLIENT (LIST | KILL)",
            "NOPERM this user has no permissions to run the 'info' command",
        ] {
            assert!(is_refusal(&error(text)), "{text}");
        }
        assert!(!is_refusal(&error("ERR max number of clients reached")));
        assert!(!is_refusal(&error("LOADING Redis is loading the dataset in memory")));
    }
}
