//! Sockets that connections come from.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use listenfd::ListenFd;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::tls::Tls;
use crate::cli::client::reachable;
use crate::http::router::Peer;
use crate::settings::{ListenOn, Settings};

/// The sockets of one server.
#[derive(Debug)]
pub struct Listeners {
    /// Where images are served.
    pub main: Listener,
    /// Where operators ask, if not there.
    pub admin: Option<Listener>,
}

/// A socket that connections are accepted from.
#[derive(Debug)]
pub struct Listener {
    socket: ListenerSocket,
    pub(super) tls: Option<Tls>,
}

#[derive(Debug)]
enum ListenerSocket {
    Tcp(TcpListener),
    Unix {
        /// None where somebody else made it. Removed before the listener is closed: afterwards another process may
        /// have put its own there.
        _file: Option<SocketFile>,
        listener: UnixListener,
    },
}

/// The file of a Unix socket, removed with it.
#[derive(Debug)]
struct SocketFile(PathBuf);

/// A connection's bytes, whatever carries them.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

impl Listeners {
    /// Those that the settings name; or, in place of the main one, what systemd hands over.
    pub fn bind(settings: &Settings) -> anyhow::Result<Listeners> {
        let http = &settings.http;
        let tls = Tls::load(http)?;
        let socket = match inherited().context("the socket that was handed over (LISTEN_FDS)")? {
            Some(socket) => socket,
            None => bind(&http.listen)
                .with_context(|| format!("{} can't be listened on ([http] listen)", http.listen))?,
        };
        let admin = settings.admin.listen.as_ref().map(|listen| {
            let socket = bind(listen)
                .with_context(|| format!("{listen} can't be listened on ([admin] listen)"))?;
            anyhow::Ok(Listener { socket, tls: None })
        });
        Ok(Listeners { main: Listener { socket, tls }, admin: admin.transpose()? })
    }
}

impl From<TcpListener> for Listeners {
    fn from(listener: TcpListener) -> Listeners {
        Listeners {
            main: Listener { socket: ListenerSocket::Tcp(listener), tls: None },
            admin: None,
        }
    }
}

fn bind(listen: &ListenOn) -> io::Result<ListenerSocket> {
    match listen {
        ListenOn::Tcp(address) => {
            let listener = std::net::TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener).map(ListenerSocket::Tcp)
        }
        ListenOn::Unix(path) => {
            remove_if_left_behind(path)?;
            let listener = UnixListener::bind(path)?;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
            Ok(ListenerSocket::Unix { listener, _file: Some(SocketFile(path.clone())) })
        }
    }
}

/// A socket that nobody listens on was left by a process that was killed; any other file isn't ours.
fn remove_if_left_behind(path: &Path) -> io::Result<()> {
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            use std::os::unix::fs::FileTypeExt;
            if std::fs::symlink_metadata(path)?.file_type().is_socket() {
                std::fs::remove_file(path)?;
            }
            Ok(())
        }
        // Nothing there, or somebody who listens: binding says which.
        _ => Ok(()),
    }
}

/// The first socket of those that systemd, or who speaks like it, hands over.
fn inherited() -> io::Result<Option<ListenerSocket>> {
    let mut handed = ListenFd::from_env();
    if handed.len() == 0 {
        return Ok(None);
    }
    if let Ok(Some(listener)) = handed.take_tcp_listener(0) {
        listener.set_nonblocking(true)?;
        return TcpListener::from_std(listener).map(|it| Some(ListenerSocket::Tcp(it)));
    }
    let listener = handed.take_unix_listener(0)?;
    listener
        .map(|listener| {
            listener.set_nonblocking(true)?;
            UnixListener::from_std(listener)
                .map(|listener| ListenerSocket::Unix { listener, _file: None })
        })
        .transpose()
}

impl Listener {
    /// The next connection.
    pub(crate) async fn accept(&self) -> io::Result<(Box<dyn Io>, Peer)> {
        match &self.socket {
            ListenerSocket::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                // An answer's last bytes shouldn't wait for the acknowledgement of those before.
                let _ = stream.set_nodelay(true);
                Ok((Box::new(stream), Peer::Tcp(peer)))
            }
            ListenerSocket::Unix { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                Ok((Box::new(stream), Peer::Unix))
            }
        }
    }

    /// The connections that are there already: the kernel has told their clients that they are accepted.
    ///
    /// Transform of the kernel itself, since the runtime may not have heard of them yet.
    pub(crate) fn accept_waiting(&self) -> io::Result<Vec<(Box<dyn Io>, Peer)>> {
        let mut waiting: Vec<(Box<dyn Io>, Peer)> = Vec::new();
        match &self.socket {
            ListenerSocket::Tcp(listener) => {
                let listener = std::net::TcpListener::from(listener.as_fd().try_clone_to_owned()?);
                while let Ok((stream, peer)) = listener.accept() {
                    stream.set_nonblocking(true)?;
                    waiting.push((Box::new(TcpStream::from_std(stream)?), Peer::Tcp(peer)));
                }
            }
            ListenerSocket::Unix { listener, .. } => {
                let listener =
                    std::os::unix::net::UnixListener::from(listener.as_fd().try_clone_to_owned()?);
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true)?;
                    waiting.push((Box::new(UnixStream::from_std(stream)?), Peer::Unix));
                }
            }
        }
        Ok(waiting)
    }

    /// Its address and port, where it has some; port 0 has become the one that was taken.
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match &self.socket {
            ListenerSocket::Tcp(listener) => listener.local_addr().ok(),
            ListenerSocket::Unix { .. } => None,
        }
    }

    /// The address to open in a browser, or what tells a person where it is.
    #[must_use]
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        match (&self.socket, self.local_addr()) {
            (ListenerSocket::Tcp(_), address) => {
                let address = address.map(|it| reachable(it).to_string());
                format!("{scheme}://{}", address.unwrap_or_default())
            }
            (ListenerSocket::Unix { listener, .. }, _) => {
                let address = listener.local_addr().ok();
                let path = address.as_ref().and_then(|it| it.as_pathname());
                format!("{scheme}://unix:{}:", path.unwrap_or(Path::new("")).display())
            }
        }
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Connects to where a server listens.
pub(crate) async fn connect(listen: &ListenOn) -> io::Result<Box<dyn Io>> {
    match listen {
        ListenOn::Tcp(address) => {
            let address = reachable(*address);
            Ok(Box::new(TcpStream::connect(address).await?))
        }
        ListenOn::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?)),
    }
}
