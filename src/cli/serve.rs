//! `serve`: starts the server and stops it on a signal.

use std::borrow::Cow;
use std::io::{IsTerminal as _, Write as _};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use super::demo;
use crate::app::App;
use crate::image::ImageId;
use crate::log;
use crate::server::{self, Listeners};
use crate::settings::{ListenOn, Settings, Token};
use crate::store::Store;
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

pub(super) async fn run(mut settings: Settings) -> anyhow::Result<()> {
    // A file that may not grow fails a write, as a full disk does. Without a handler the signal ends the process. First, since
    // the log may be such a file.
    let _ = signal(SignalKind::from_raw(FILE_SIZE_EXCEEDED))?;
    let _log = log::start(&settings.log)?;
    let others = OTHER_FILES + CONNECTIONS_EACH * u64::from(settings.redis.connections.get());
    settings.limits.connections = raise_open_file_limit(settings.limits.connections, others);
    let listeners = Listeners::bind(&settings)?;
    let url = listeners.main.url();
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);

    let listen = listeners.main.listens_on().unwrap_or_else(|| settings.http.listen.clone());
    let (token, token_file) = make_token(&settings, &listen)?.unzip();
    // Nobody finds the file again under a port that was taken at random.
    let is_for_once = matches!(settings.http.listen, ListenOn::Tcp(address) if address.port() == 0);
    let _removed = token_file.clone().filter(|_| is_for_once).map(RemovedAtEnd);
    // On a terminal the address has the token in it. Anything else may be kept, and read by others.
    let shown_token = token.clone().filter(|_| std::io::stdout().is_terminal());
    let app = App::build_with(settings, token).await?;
    let demo = demo::fill(&app.store, app.settings.embedded.demo).await?;
    // A closed standard output is no reason to stop.
    let gallery_url = listeners.admin.as_ref().unwrap_or(&listeners.main).url();
    let mut text = welcome(&app, &url, &demo, token_file.as_deref().map(|file| (file, &listen)));
    text += &gallery(&app, &gallery_url, shown_token.as_ref());
    let _ = std::io::stdout().write_all(text.as_bytes());
    let (stop, stopped) = oneshot::channel();
    let signals = async {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => server::Stop::Announced,
                _ = interrupt.recv() => server::Stop::AtOnce,
            }
        };
        let _ = stop.send(next().await);
        next().await
    };
    let stopped = async { stopped.await.unwrap_or(server::Stop::AtOnce) };
    tokio::select! {
        () = server::serve(app, listeners, stopped) => Ok(()),
        // A second signal means that the user doesn't want to wait.
        _ = signals => anyhow::bail!("stopped by a second signal: requests in progress were cut off"),
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
/// connections that it leaves room for, beside `others`: one more gets 503, where a failing `accept` would leave it without an
/// answer, and the store without a connection.
fn raise_open_file_limit(connections: NonZeroUsize, others: u64) -> NonZeroUsize {
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
        tracing::info!(
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
fn welcome(
    app: &App,
    url: &str,
    demo: &[ImageId],
    token_file: Option<(&Path, &ListenOn)>,
) -> String {
    use std::fmt::Write;
    let mut text = String::new();
    let store = match &*app.store {
        Store::Redis(_) => "Redis".to_owned(),
        Store::Embedded(store) => format!("the embedded store {}", store.path().display()),
    };
    let _ = writeln!(text, "afterimage serves {url}/images/{{id}} from {store}");
    if let Some(first) = demo.first() {
        let _ = writeln!(text, "\nDemo images to look at:");
        for id in demo {
            let _ = writeln!(text, "  {url}/images/{id}");
        }
        let _ = writeln!(text, "\nTime one, twice, to see it come from memory:");
        let curl = "curl -o /dev/null -sw @config/curl-format.txt";
        let _ = writeln!(text, "  {curl} {url}/images/{first}");
    }
    let is_embedded = matches!(&*app.store, Store::Embedded(_));
    if !demo.is_empty() || token_file.is_some() {
        let _ = writeln!(text, "\nAdd your own:");
    }
    // With Redis the command would need its address.
    if !demo.is_empty() || (token_file.is_some() && is_embedded) {
        // The program's name as the user typed it: `cargo run` doesn't install it.
        let program = std::env::args().next().unwrap_or_else(|| "afterimage".to_owned());
        let _ = writeln!(text, "  {program} put my_image picture.png");
    }
    if let Some((file, listen)) = token_file {
        let bearer = format!("Authorization: Bearer $(cat {})", quoted(file));
        let (socket, url) = match listen {
            ListenOn::Tcp(_) => (String::new(), url),
            ListenOn::Unix(path) => {
                (format!("--unix-socket {} ", quoted(path)), "http://localhost")
            }
        };
        let _ =
            writeln!(text, "  curl -T picture.png {socket}-H \"{bearer}\" {url}/images/my_image");
    }
    text
}

/// The address of the gallery, for the text after the start. The token is in its fragment, which browsers send to nobody.
fn gallery(app: &App, url: &str, token: Option<&Token>) -> String {
    if !app.settings.gallery.enabled || url.contains("://unix:") {
        return String::new();
    }
    let token = token.map(|token| format!("#token={}", token.reveal())).unwrap_or_default();
    format!("\nGallery of all images:\n  {url}/{token}\n")
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
