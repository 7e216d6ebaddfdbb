//! Running servers, which name themselves in files, so that commands of the same user find them whatever their port.

use std::io;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, test_kill_process};
use serde::{Deserialize, Serialize};

use crate::server::listener::reachable;
use crate::settings::{ListenOn, Settings};
use crate::store::embedded;
use crate::token_file;

/// A running server, as it names itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RunningServer {
    pid: i32,
    /// The address of the listener for images.
    listen: String,
    /// True if that speaks TLS.
    tls: bool,
    /// The address of the operators' listener, if there is one.
    admin: Option<String>,
    /// The file with the token that the server made, if it made one.
    pub(crate) token_file: Option<PathBuf>,
}

/// The file in which a server names itself. Removed with it.
#[derive(Debug)]
pub(crate) struct RunningFile {
    path: PathBuf,
    server: RunningServer,
}

impl Drop for RunningFile {
    fn drop(&mut self) {
        // Another server may have taken its place.
        if RunningServer::parse(&self.path).as_ref() == Some(&self.server) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// The beginning and the end of the name of such a file.
const NAME: (&str, &str) = ("server-", ".json");

impl RunningServer {
    /// Describes this process.
    pub(crate) fn this(
        listen: &ListenOn,
        tls: bool,
        admin: Option<&ListenOn>,
        token_file: Option<PathBuf>,
    ) -> RunningServer {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let admin = admin.map(ToString::to_string);
        RunningServer { pid, listen: listen.to_string(), tls, admin, token_file }
    }

    /// Names this server in a file: in the folder of the embedded store, which one server has to itself, or in that of what
    /// belongs to running servers of this user.
    pub(crate) fn announce(&self, settings: &Settings) -> anyhow::Result<RunningFile> {
        let file = if settings.redis.url.get().is_none() {
            embedded::data_dir(&settings.embedded.dir)?.join("server.json")
        } else {
            // Servers may share a port on several addresses.
            let known = |it: char| it.is_ascii_alphanumeric() || it == '.';
            let listen = self.listen.replace(|it| !known(it), "-");
            let (beginning, end) = NAME;
            token_file::runtime_dir()?.join(format!("{beginning}{listen}{end}"))
        };
        if let Some(dir) = file.parent() {
            std::fs::create_dir_all(dir)?;
        }
        // Written whole under another name, so that nobody reads a part of it.
        let new = file.with_extension(format!("{}.new", self.pid));
        std::fs::write(&new, serde_json::to_vec(self)?)?;
        std::fs::rename(&new, &file)?;
        Ok(RunningFile { path: file, server: self.clone() })
    }

    /// Returns the address that speaks plain HTTP, if one does.
    pub(crate) fn plain_address(&self) -> Option<ListenOn> {
        let address = if self.tls { self.admin.as_deref()? } else { &self.listen };
        address.parse().ok()
    }

    fn parse(file: &Path) -> Option<RunningServer> {
        serde_json::from_slice(&std::fs::read(file).ok()?).ok()
    }

    /// Reads the file that a server left. `None` without one, or if nobody listens there any more: its process may have ended
    /// without removing it, and another one may have its number.
    fn read(file: &Path) -> Option<RunningServer> {
        let server = RunningServer::parse(file)?;
        let runs = match test_kill_process(Pid::from_raw(server.pid)?) {
            Ok(()) => true,
            // Another user's.
            Err(error) => error == rustix::io::Errno::PERM,
        };
        (runs && server.listens()).then_some(server)
    }

    fn listens(&self) -> bool {
        const MOMENT: Duration = Duration::from_secs(1);
        match self.listen.parse() {
            Ok(ListenOn::Tcp(address)) => {
                TcpStream::connect_timeout(&reachable(address), MOMENT).is_ok()
            }
            Ok(ListenOn::Unix(path)) => UnixStream::connect(path).is_ok(),
            Err(_) => false,
        }
    }

    /// Returns whether a person who names an address means this server.
    pub(crate) fn is_at(&self, address: &ListenOn) -> bool {
        match (self.plain_address(), address) {
            (Some(ListenOn::Tcp(own)), ListenOn::Tcp(given)) => {
                let (own, given) = (reachable(own), reachable(*given));
                own == given
                    || (own.port() == given.port()
                        && own.ip().is_loopback()
                        && given.ip().is_loopback())
            }
            (own, given) => own.as_ref() == Some(given),
        }
    }

    /// Returns the server that has an embedded store.
    pub(crate) fn of_embedded_store(settings: &Settings) -> Option<RunningServer> {
        let dir = embedded::data_dir(&settings.embedded.dir).ok()?;
        RunningServer::read(&dir.join("server.json"))
    }

    /// Returns the servers of this user that serve from a Redis.
    pub(crate) fn of_this_user() -> io::Result<Vec<RunningServer>> {
        let Ok(dir) = token_file::runtime_dir() else { return Ok(Vec::new()) };
        let entries = match dir.read_dir() {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut servers = Vec::new();
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            let (beginning, end) = NAME;
            if name.to_str().is_some_and(|it| it.starts_with(beginning) && it.ends_with(end)) {
                servers.extend(RunningServer::read(&entry.path()));
            }
        }
        Ok(servers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_found_while_its_process_runs() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("server.json");
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let listen = ListenOn::Tcp(listener.local_addr().unwrap());
        let this = RunningServer::this(&listen, false, None, None);
        std::fs::write(&file, serde_json::to_vec(&this).unwrap()).unwrap();
        assert_eq!(RunningServer::read(&file), Some(this.clone()));
        assert_eq!(this.plain_address(), Some(listen.clone()));
        assert!(this.is_at(
            &format!("localhost:{}", listener.local_addr().unwrap().port()).parse().unwrap()
        ));
        assert!(!this.is_at(&"127.0.0.1:1".parse().unwrap()));

        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        child.wait().unwrap();
        std::fs::write(&file, serde_json::to_vec(&RunningServer { pid, ..this }).unwrap()).unwrap();
        assert_eq!(RunningServer::read(&file), None);
        assert_eq!(RunningServer::read(&dir.path().join("none")), None);

        // Its process number is somebody else's now.
        std::fs::write(
            &file,
            serde_json::to_vec(&RunningServer::this(&listen, false, None, None)).unwrap(),
        )
        .unwrap();
        drop(listener);
        assert_eq!(RunningServer::read(&file), None);
    }

    #[test]
    fn a_server_that_speaks_tls_is_asked_at_the_operators_address() {
        let [listen, admin] = ["127.0.0.1:443", "127.0.0.1:8001"].map(|it| it.parse().unwrap());
        let with_admin = RunningServer::this(&listen, true, Some(&admin), None);
        assert_eq!(with_admin.plain_address(), Some(admin));
        assert_eq!(RunningServer::this(&listen, true, None, None).plain_address(), None);
    }
}
