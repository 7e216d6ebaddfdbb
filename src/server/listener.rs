//! Listening sockets, and the connections that they accept.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use listenfd::ListenFd;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::tls::Tls;
use crate::peer::Peer;
use crate::settings::{ListenOn, Settings};

/// The listening sockets of one server.
#[derive(Debug)]
pub struct Listeners {
    /// The one for images.
    pub main: Listener,
    /// The one for operators, if they have one of their own.
    pub admin: Option<Listener>,
}

/// Connections that the kernel keeps until they are accepted; the same as nginx.
const BACKLOG: i32 = 511;

/// Bytes of answers that the kernel keeps for a client, beyond those that are on their way to it. It would take megabytes, which
/// nobody counts, from each of thousands of connections whose clients ask for more than they take.
const MOST_UNSENT: u32 = 256 * 1024;

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    socket: ListenerSocket,
    pub(super) tls: Option<Tls>,
}

#[derive(Debug)]
enum ListenerSocket {
    Tcp(TcpListener),
    Unix {
        /// `None` where another process made the file. Removed before the listener is closed: afterwards another
        /// process may have put its own there.
        _file: Option<SocketFile>,
        listener: UnixListener,
    },
}

/// The file of a Unix socket, removed with it.
#[derive(Debug)]
struct SocketFile(PathBuf);

/// A byte stream that carries a connection.
pub(crate) trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

impl Listeners {
    /// Binds the addresses of the settings. A socket that systemd hands over takes the place of the main one.
    pub fn bind(settings: &Settings) -> anyhow::Result<Listeners> {
        let http = &settings.http;
        anyhow::ensure!(
            !http.proxy_protocol || !http.trusted_proxies.is_empty(),
            "[http] proxy_protocol needs [http] trusted_proxies: those that send the header"
        );
        let tls = Tls::load(http)?;
        let socket = match inherited().context("the inherited socket (LISTEN_FDS) can't be used")? {
            Some(socket) => socket,
            None => {
                bind(&http.listen).map_err(|error| refused(error, &http.listen, "[http] listen"))?
            }
        };
        let admin = settings.admin.listen.as_ref().map(|listen| {
            let socket = bind(listen).map_err(|error| refused(error, listen, "[admin] listen"))?;
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

fn refused(error: io::Error, listen: &ListenOn, setting: &str) -> anyhow::Error {
    let try_this = match (error.kind(), listen) {
        (io::ErrorKind::AddrInUse, ListenOn::Tcp(_)) => {
            "; stop the program that has this port, or take another one, as in --port 8010"
        }
        _ => "",
    };
    anyhow::Error::new(error)
        .context(format!("{listen} can't be listened on ({setting}){try_this}"))
}

fn bind(listen: &ListenOn) -> io::Result<ListenerSocket> {
    match listen {
        ListenOn::Tcp(address) => {
            let listener = std::net::TcpListener::bind(address)?;
            // The standard library's queue is short for a burst of connections.
            SockRef::from(&listener).listen(BACKLOG)?;
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

/// Removes a socket that nobody listens on: a process that was killed left it. Any other file isn't ours.
fn remove_if_left_behind(path: &Path) -> io::Result<()> {
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            use std::os::unix::fs::FileTypeExt;
            if std::fs::symlink_metadata(path)?.file_type().is_socket() {
                std::fs::remove_file(path)?;
            }
            Ok(())
        }
        // No file, or a process that listens: binding tells which.
        _ => Ok(()),
    }
}

/// Returns the first socket that systemd, or a program that follows its protocol, hands over.
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

/// Sets the options of a connection. One that can't be set is no reason to refuse it.
fn prepare(stream: &TcpStream) {
    // An answer's last bytes shouldn't wait for the acknowledgement of those before.
    let _ = stream.set_nodelay(true);
    let _ = SockRef::from(stream).set_tcp_notsent_lowat(MOST_UNSENT);
}

impl Listener {
    /// Waits for the next connection.
    pub(crate) async fn accept(&self) -> io::Result<(Box<dyn Io>, Peer)> {
        match &self.socket {
            ListenerSocket::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                prepare(&stream);
                Ok((Box::new(stream), Peer::Tcp(peer)))
            }
            ListenerSocket::Unix { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                Ok((Box::new(stream), Peer::Unix))
            }
        }
    }

    /// Accepts the connections that are waiting: the kernel has told their clients that they are connected.
    ///
    /// Asks the kernel itself, since the runtime may not have heard of them yet.
    pub(crate) fn accept_waiting(&self) -> io::Result<Vec<(Box<dyn Io>, Peer)>> {
        let mut waiting: Vec<(Box<dyn Io>, Peer)> = Vec::new();
        match &self.socket {
            ListenerSocket::Tcp(listener) => {
                let listener = std::net::TcpListener::from(listener.as_fd().try_clone_to_owned()?);
                while let Ok((stream, peer)) = listener.accept() {
                    stream.set_nonblocking(true)?;
                    let stream = TcpStream::from_std(stream)?;
                    prepare(&stream);
                    waiting.push((Box::new(stream), Peer::Tcp(peer)));
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

    /// Returns the address and port of a TCP socket; port 0 has become the one that was taken.
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        match &self.socket {
            ListenerSocket::Tcp(listener) => listener.local_addr().ok(),
            ListenerSocket::Unix { .. } => None,
        }
    }

    /// Returns the address that is listened on, unless the socket has none.
    pub(crate) fn listens_on(&self) -> Option<ListenOn> {
        match &self.socket {
            ListenerSocket::Tcp(_) => self.local_addr().map(ListenOn::Tcp),
            ListenerSocket::Unix { listener, .. } => {
                let address = listener.local_addr().ok()?;
                address.as_pathname().map(|path| ListenOn::Unix(path.to_owned()))
            }
        }
    }

    /// Returns the address to open in a browser, or for a Unix socket one that a person understands.
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

/// Connects to the address that a server listens on.
pub(crate) async fn connect(listen: &ListenOn) -> io::Result<Box<dyn Io>> {
    match listen {
        ListenOn::Tcp(address) => {
            let address = reachable(*address);
            Ok(Box::new(TcpStream::connect(address).await?))
        }
        ListenOn::Unix(path) => Ok(Box::new(UnixStream::connect(path).await?)),
    }
}

/// Returns an address to connect to: a server that listens on every address is found on the loopback one.
pub(crate) fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}
