//! Running servers, which name themselves in files, so that commands of the same user find them whatever their port.

use std::io;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, test_kill_process};
use serde::{Deserialize, Serialize};

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
pub(crate) struct RunningFile(PathBuf);

impl Drop for RunningFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
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
            let listen = self.listen.parse().map_err(anyhow::Error::msg)?;
            let (beginning, end) = NAME;
            let name = format!("{beginning}{}{end}", token_file::name_of(&listen));
            token_file::runtime_dir()?.join(name)
        };
        if let Some(dir) = file.parent() {
            std::fs::create_dir_all(dir)?;
        }
        // Written whole under another name, so that nobody reads a part of it.
        let new = file.with_extension(format!("{}.new", self.pid));
        std::fs::write(&new, serde_json::to_vec(self)?)?;
        std::fs::rename(&new, &file)?;
        Ok(RunningFile(file))
    }

    /// Returns the address that speaks plain HTTP, if one does.
    pub(crate) fn plain_address(&self) -> Option<ListenOn> {
        let address = if self.tls { self.admin.as_deref()? } else { &self.listen };
        address.parse().ok()
    }

    /// Reads the file that a server left. `None` without one, or if its process has ended without removing it.
    fn read(file: &Path) -> Option<RunningServer> {
        let server: RunningServer = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
        let runs = match test_kill_process(Pid::from_raw(server.pid)?) {
            Ok(()) => true,
            // Another user's.
            Err(error) => error == rustix::io::Errno::PERM,
        };
        runs.then_some(server)
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
        let listen = "127.0.0.1:8000".parse().unwrap();
        let this = RunningServer::this(&listen, false, None, None);
        std::fs::write(&file, serde_json::to_vec(&this).unwrap()).unwrap();
        assert_eq!(RunningServer::read(&file), Some(this.clone()));
        assert_eq!(this.plain_address(), Some(listen.clone()));

        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        child.wait().unwrap();
        std::fs::write(&file, serde_json::to_vec(&RunningServer { pid, ..this }).unwrap()).unwrap();
        assert_eq!(RunningServer::read(&file), None);
        assert_eq!(RunningServer::read(&dir.path().join("none")), None);
    }

    #[test]
    fn a_server_that_speaks_tls_is_asked_at_the_operators_address() {
        let [listen, admin] = ["127.0.0.1:443", "127.0.0.1:8001"].map(|it| it.parse().unwrap());
        let with_admin = RunningServer::this(&listen, true, Some(&admin), None);
        assert_eq!(with_admin.plain_address(), Some(admin));
        assert_eq!(RunningServer::this(&listen, true, None, None).plain_address(), None);
    }
}
