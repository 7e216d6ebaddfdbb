//! `serve`: starts the server and stops it on a signal.

use std::borrow::Cow;
use std::io::{IsTerminal as _, Write as _};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::reload::Reloader;
use super::{LoadedSettings, SettingsSource, demo};
use crate::app::App;
use crate::image::ImageId;
use crate::log;
use crate::running::{RunningFile, RunningServer};
use crate::server::{self, Listener, Listeners};
use crate::settings::{ListenOn, Settings, Token};
use crate::store::{Coherence, Store};
use crate::task::Task;
use crate::token_file::{self, TokenFile, TokenFileError};

/// `SIGXFSZ` of Linux, macOS and the BSDs: a write went past the limit on the size of files (`ulimit -f`, `LimitFSIZE`).
const FILE_SIZE_EXCEEDED: i32 = 25;

/// Files that are open beside the connections of clients and those of the store: listeners, certificates, connections that are
/// told that there are too many, and those to an object store.
const OTHER_FILES: u64 = 192;

/// Connections to Redis for each of `[redis] connections`: one for small values, one for large ones, and one for a conditional
/// write.
const CONNECTIONS_EACH: u64 = 3;

/// Fewest connections that the limit on open files should leave.
const TOO_FEW_CONNECTIONS: usize = 1000;

pub(super) async fn run(loaded: LoadedSettings, source: SettingsSource) -> anyhow::Result<()> {
    let LoadedSettings { mut settings, table } = loaded;
    // A file that may not grow fails a write, as a full disk does. Without a handler the signal ends the process. First, since
    // the log may be such a file.
    let _ = signal(SignalKind::from_raw(FILE_SIZE_EXCEEDED))?;
    let hangup = signal(SignalKind::hangup())?;
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let log = log::start(&settings.log)?;
    #[cfg(feature = "otlp")]
    let _spans = crate::spans::start()?;
    settings.limits.connections = raise_open_file_limit(&settings);
    let listeners = Listeners::bind(&settings)?;

    let listen = listeners.main.listens_on().unwrap_or_else(|| settings.http.listen.clone());
    let (token, token_file) = make_token(&settings, &listen)?.unzip();
    // Nobody finds the file again under a port that was taken at random.
    let is_for_once = matches!(settings.http.listen, ListenOn::Tcp(address) if address.port() == 0);
    let _removed = token_file.clone().filter(|_| is_for_once).map(RemovedAtEnd);
    // On a terminal the address has the token in it. Anything else may be kept, and read by others.
    let shown_token = token.clone().filter(|_| std::io::stdout().is_terminal());
    let app = App::build_with(settings, token).await?;
    let demo = demo::fill(&app.store, app.settings.embedded.demo).await?;
    let _announced = announce(&app, &listeners, &listen, token_file.clone());
    let welcome = Welcome {
        app: Arc::clone(&app),
        waits_since: None,
        url: listeners.main.url(),
        admin_url: listeners.admin.as_ref().map(Listener::url),
        demo,
        token: shown_token,
        token_file,
        listen,
    };
    let (stop, stopped) = oneshot::channel();
    let signals = async {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => server::Stop::Announced,
                _ = interrupt.recv() => server::Stop::AtOnce,
            }
        };
        let first = next().await;
        let _ = sd_notify::notify(&[NotifyState::Stopping]);
        let _ = stop.send(first);
        next().await
    };
    let stopped = async { stopped.await.unwrap_or(server::Stop::AtOnce) };
    // Tasks of their own: a store that isn't reached, or a file that can't be read at once, holds up no request.
    let _greeting = Task::start("greeting", welcome.say());
    let reloader =
        Reloader { source, app: Arc::clone(&app), log, table, fit: raise_open_file_limit };
    let _reloading = Task::start("reload", reloader.run(hangup));
    let _watchdog = sd_notify::watchdog_enabled()
        .map(|interval| Task::start("watchdog", notify_watchdog(interval / 2)));
    tokio::select! {
        () = server::serve(app, listeners, stopped) => Ok(()),
        // A second signal means that the user doesn't want to wait.
        _ = signals => anyhow::bail!("stopped by a second signal: requests in progress were cut off"),
    }
}

/// Tells systemd again and again that this process is alive.
async fn notify_watchdog(interval: Duration) {
    loop {
        let _ = sd_notify::notify(&[NotifyState::Watchdog]);
        tokio::time::sleep(interval).await;
    }
}

/// Leaves the address of this server for commands of its user. They can be told it otherwise, so a failure is no reason to stop.
fn announce(
    app: &App,
    listeners: &Listeners,
    listen: &ListenOn,
    token_file: Option<PathBuf>,
) -> Option<RunningFile> {
    let admin = listeners.admin.as_ref().and_then(Listener::listens_on);
    let tls = !app.settings.http.tls_cert_file.as_os_str().is_empty();
    let server = RunningServer::this(listen, tls, admin.as_ref(), token_file);
    match server.announce(&app.settings) {
        Ok(file) => Some(file),
        Err(error) => {
            let error = super::describe(&error);
            tracing::info!(error, "commands of this user won't find the server by themselves");
            None
        }
    }
}

/// Waits a moment for the store to be reached for the first time. Returns the reason, if it wasn't.
async fn first_failure(app: &App) -> Option<String> {
    const MOMENT: Duration = Duration::from_secs(2);
    const STEP: Duration = Duration::from_millis(10);
    let began = Instant::now();
    while !app.index.has_heard_of_store() && began.elapsed() < MOMENT {
        tokio::time::sleep(STEP).await;
    }
    match app.index.coherence() {
        Coherence::Unreachable(reason) => Some(reason.to_string()),
        _ if app.index.has_heard_of_store() => None,
        _ => Some("no answer yet".to_owned()),
    }
}

/// Reads the token that an earlier start made, or makes one, if somebody needs one. Returns it with its file.
///
/// If no file can be written, nobody may write or list, and images are served all the same. A file that others can read stops
/// the start.
fn make_token(settings: &Settings, listen: &ListenOn) -> anyhow::Result<Option<(Token, PathBuf)>> {
    if !token_file::is_needed(settings) {
        return Ok(None);
    }
    let error = match TokenFile::of(settings, listen) {
        Ok(file) => match file.read_or_make() {
            Ok(token) => return Ok(Some((token, file.path().to_owned()))),
            Err(error @ TokenFileError::Io { .. }) => error.to_string(),
            Err(error) => return Err(error.into()),
        },
        Err(error) => super::describe(&error),
    };
    tracing::warn!(
        error,
        "no token can be made, so nobody may write or list: set [writes] tokens, or [writes] enabled = false and [events] prefix = \"off\""
    );
    Ok(None)
}

/// A file that is removed with the server.
struct RemovedAtEnd(PathBuf);

impl Drop for RemovedAtEnd {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Raises the limit on open files, since each connection is one and the usual soft limit is 1,024. Returns the number of
/// connections that it leaves room for, beside other files: one more gets 503, where a failing `accept` would leave it without an
/// answer, and the store without a connection.
fn raise_open_file_limit(settings: &Settings) -> NonZeroUsize {
    let connections = settings.limits.connections;
    let others = OTHER_FILES + CONNECTIONS_EACH * u64::from(settings.redis.connections.get());
    let wanted = (connections.get() as u64).saturating_add(others);
    let allowed = match rlimit::increase_nofile_limit(wanted) {
        Ok(allowed) => allowed,
        Err(error) => {
            tracing::warn!(%error, "can't read the limit on open files");
            return connections;
        }
    };
    let fit = connections_within(allowed, others, connections);
    if fit.get() < TOO_FEW_CONNECTIONS.min(connections.get()) {
        tracing::warn!(
            connections = fit,
            open_files = allowed,
            wanted,
            "the limit on open files leaves few connections: raise LimitNOFILE or ulimit -Hn"
        );
    } else if fit < connections {
        tracing::debug!(
            connections = fit,
            open_files = allowed,
            wanted,
            "[limits] connections is lowered to fit the limit on open files"
        );
    }
    fit
}

fn connections_within(open_files: u64, others: u64, connections: NonZeroUsize) -> NonZeroUsize {
    // However low the limit is, half of it serves.
    let room = open_files.saturating_sub(others).max(open_files / 2);
    let room = usize::try_from(room).unwrap_or(usize::MAX);
    NonZeroUsize::new(room).unwrap_or(NonZeroUsize::MIN).min(connections)
}

/// The text on standard output after the start: the address, and the next things to try.
struct Welcome {
    app: Arc<App>,
    /// The reason for which the store can't be used yet, if so.
    waits_since: Option<String>,
    /// The address of the listener for images.
    url: String,
    /// That of the operators' listener, if there is one.
    admin_url: Option<String>,
    demo: Vec<ImageId>,
    /// The token, if it may be shown.
    token: Option<Token>,
    token_file: Option<PathBuf>,
    listen: ListenOn,
}

impl Welcome {
    /// Tells the user and systemd, once it is known whether the store can be used.
    async fn say(mut self) {
        self.waits_since = first_failure(&self.app).await;
        // A closed standard output is no reason to stop.
        let _ = std::io::stdout().write_all(self.text().as_bytes());
        let _ = sd_notify::notify(&[NotifyState::Ready, NotifyState::Status(&self.first_line())]);
    }

    fn text(&self) -> String {
        use std::fmt::Write;
        let mut text = format!("{}\n", self.first_line());
        let _ = writeln!(text, "  {}", self.first_try());
        let url = &self.url;
        let _ = writeln!(text, "\nImages are at {url}/images/{{id}}, from {}", self.store());
        for id in &self.demo {
            let _ = writeln!(text, "  {url}/images/{id}");
        }
        text += &self.writes();
        if let Some(gallery) = self.gallery() {
            let _ = writeln!(text, "\nGallery of all images:\n  {gallery}");
        }
        text
    }

    /// Names the address to open: a page where there is one. Everybody may read it, so it has no token.
    fn first_line(&self) -> String {
        let has_page = self.admin_url.is_none() && self.gallery().is_some();
        let page = match self.demo.first() {
            _ if has_page => format!("{}/", self.url),
            Some(id) => format!("{}/images/{id}", self.url),
            None => format!("{}/images/{{id}}", self.url),
        };
        match &self.waits_since {
            Some(reason) => {
                let redis = self.app.settings.redis.url.public().unwrap_or_default();
                format!("afterimage listens on {page} and waits for Redis at {redis} ({reason})")
            }
            None => format!("afterimage serves {page}"),
        }
    }

    /// A command to try, which needs no file.
    fn first_try(&self) -> String {
        let (socket, url) = self.curl_address();
        if let Some(id) = self.demo.first() {
            let told = "%{http_code}, %{size_download} bytes in %{time_total} s\\n";
            return format!("curl -so /dev/null -w '{told}' {socket}{url}/images/{id}");
        }
        let health = self.admin_url.as_deref().unwrap_or(url);
        format!("curl -i {socket}{health}/readyz")
    }

    fn store(&self) -> String {
        match &*self.app.store {
            Store::Redis(_) => self.app.settings.redis.url.public().unwrap_or_default(),
            Store::Embedded(store) => format!("the embedded store {}", store.path().display()),
        }
    }

    /// Tells how to store an image.
    fn writes(&self) -> String {
        use std::fmt::Write;
        let is_embedded = matches!(&*self.app.store, Store::Embedded(_));
        if !is_embedded && self.token_file.is_none() {
            return String::new();
        }
        // The program's name as the user typed it: `cargo run` doesn't install it.
        let program = std::env::args().next().unwrap_or_else(|| "afterimage".to_owned());
        let mut text = format!("\nAdd your own:\n  {program} put my_image picture.png\n");
        if let Some(file) = &self.token_file {
            let bearer = format!("Authorization: Bearer $(cat {})", quoted(file));
            let (socket, url) = self.curl_address();
            let _ = writeln!(
                text,
                "  curl -T picture.png {socket}-H \"{bearer}\" {url}/images/my_image"
            );
        }
        text
    }

    /// The option for curl, and the address that follows.
    fn curl_address(&self) -> (String, &str) {
        match &self.listen {
            ListenOn::Tcp(_) => (String::new(), &self.url),
            ListenOn::Unix(path) => {
                (format!("--unix-socket {} ", quoted(path)), "http://localhost")
            }
        }
    }

    /// The address of the gallery, if there is one. The token is in its fragment, which browsers send to nobody.
    fn gallery(&self) -> Option<String> {
        let url = self.admin_url.as_ref().unwrap_or(&self.url);
        if !self.app.settings.gallery.enabled || url.contains("://unix:") {
            return None;
        }
        let token = self.token.as_ref().map(|token| format!("#token={}", token.reveal()));
        Some(format!("{url}/{}", token.unwrap_or_default()))
    }
}

/// Quotes a path for a shell, if it has to be.
fn quoted(path: &Path) -> Cow<'_, str> {
    let text = path.to_string_lossy();
    let plain = |it: char| it.is_ascii_alphanumeric() || "/._-+:@%,=".contains(it);
    if text.chars().all(plain) {
        return text;
    }
    Cow::Owned(format!("'{}'", text.replace('\'', "'\\''")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_fit_into_the_limit_on_open_files() {
        let fit = |open_files, connections| {
            connections_within(open_files, 256, NonZeroUsize::new(connections).unwrap()).get()
        };
        assert_eq!(fit(20_256, 20_000), 20_000);
        assert_eq!(fit(20_000, 20_000), 19_744);
        assert_eq!(fit(300, 20_000), 150);
        assert_eq!(fit(0, 20_000), 1);
        assert_eq!(fit(u64::MAX, 10), 10);
    }
}
