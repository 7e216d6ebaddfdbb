//! The server: accepts connections, hands their requests to the router, and ends gracefully.

mod date;
pub(crate) mod h1;
pub(crate) mod listener;
pub(crate) mod proxy_protocol;
pub(crate) mod timeouts;
mod tls;
mod write_buffer;

use std::any::Any;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::Request;
use bytes::Bytes;
use futures_util::FutureExt;
use hyper::body::Incoming;
use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use self::date::DateField;
use self::h1::FastLoop;
use self::listener::Io;
pub use self::listener::{Listener, Listeners};
use self::timeouts::{ConnectionState, HTTP_2_PREFACE, Overdue, TimedIo, Timeouts};
use self::tls::Tls;
use self::write_buffer::WriteBuffer;
use crate::app::App;
use crate::holders::Holders;
use crate::http::in_flight::{HTTP_2_PIECE, RequestLimits};
use crate::http::router::Routes;
use crate::http::service::HttpService;
use crate::http::state::HttpState;
use crate::limit::{GaugeGuard, HeadLimits, Shares};
use crate::metrics::{Dropped, Metrics, Shed};
use crate::peer::{Peer, PeerKey};
use crate::settings::TrustedProxies;
use crate::shutdown::{Phase, Shutdown};

/// Most clients that are told at the same time that there are too many: each is an open file for a moment.
const FAREWELLS: usize = 64;

/// Ways to stop a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Go on for `shutdown_delay`, so that load balancers go elsewhere first.
    Announced,
    /// Take no more requests.
    AtOnce,
}

/// Serves until `shutdown` is ready, then lets requests in progress finish, up to the deadline. Dropped, it cuts its
/// connections.
///
/// Not `axum::serve`, which installs no timer: it has no time-outs.
pub async fn serve(
    app: Arc<App>,
    listeners: impl Into<Listeners>,
    shutdown: impl Future<Output = Stop>,
) {
    let Listeners { main, admin } = listeners.into();
    let settings = &app.settings.http;
    let (delay, deadline) = (settings.shutdown_delay, settings.shutdown_timeout);
    let routes = if admin.is_some() { Routes::Public } else { Routes::All };
    let _end = EndOnDrop(app.shutdown.clone());
    // Each connection holds a sender for as long as it lives.
    let (alive, mut last_has_ended) = mpsc::channel(1);
    let limits = RequestLimits::new(&app);
    let state = Arc::new(HttpState::new(Arc::clone(&app)));
    let accept = |listener: Listener, routes| {
        let server = Server::new(&state, &limits, routes, listener.tls.clone(), alive.clone());
        Arc::new(server).accept(listener)
    };
    let mut tasks = JoinSet::new();
    tasks.spawn(Arc::clone(&app.holders).drop_too_slow());
    if let Some(tls) = main.tls.clone() {
        tasks.spawn(tls.keep_current(Arc::clone(&app.reloaded)));
    }
    if let Some(admin) = admin {
        tasks.spawn(accept(admin, Routes::Admin));
    }
    let mut accepting = JoinSet::new();
    accepting.spawn(accept(main, routes));
    drop(alive);

    let stop = shutdown.await;
    app.shutdown.advance(Phase::Stopping);
    if stop == Stop::Announced && !delay.is_zero() {
        tracing::info!(delay_ms = delay.as_millis(), "not ready any more, stopping soon");
        tokio::time::sleep(delay).await;
    }
    tracing::info!("stopping");
    let ended = async {
        app.shutdown.advance(Phase::Draining);
        // The listener goes first, after the connections that wait there were accepted. Connections end when they have
        // sent their answers. Operators may look until the end.
        accepting.join_next().await;
        // A connection that doesn't end leaves the operators' listener open until the deadline.
        tasks.shutdown().await;
        last_has_ended.recv().await;
    };
    if tokio::time::timeout(deadline, ended).await.is_err() {
        tracing::warn!("connections were cut: their requests didn't end in time");
    }
}

/// Ends the connections of a server that is gone.
struct EndOnDrop(Shutdown);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.advance(Phase::Over);
    }
}

/// Waits until a connection is to take no further request: when the server drains; or a moment later, where the
/// client has only just been told that it is connected, so that its request is on its way.
async fn last_request(shutdown: &Shutdown, connection: &ConnectionState) {
    const MOMENT: Duration = Duration::from_secs(1);
    shutdown.reached(Phase::Draining).await;
    if !connection.has_had_request() {
        let _ = tokio::time::timeout(MOMENT, shutdown.reached(Phase::Over)).await;
    }
}

/// The parts that the connections of a listener share. Not the listener itself: it is closed before the last of them
/// ends.
struct Server {
    service: HttpService,
    date: DateField,
    tls: Option<Tls>,
    trusted_proxies: TrustedProxies,
    /// Set if the connections of these proxies begin with a PROXY header.
    reads_proxy_header: bool,
    /// The places for connections; `None` where they are neither counted nor limited.
    places: Option<Shares<PeerKey>>,
    /// The answers that are being sent.
    holders: Arc<Holders>,
    /// One permit for each client that is being told that there are too many.
    farewells: Arc<Semaphore>,
    head_limits: Arc<HeadLimits>,
    timeouts: Timeouts,
    metrics: Arc<Metrics>,
    shutdown: Shutdown,
    /// Tells [`serve`] that this server or one of its connections is left.
    _alive: mpsc::Sender<()>,
}

pub(crate) fn builder(limits: &HeadLimits) -> Builder<Reporting> {
    let header_bytes = limits.header_bytes();
    let mut builder = Builder::new(Reporting);
    builder
        .http1()
        .timer(TokioTimer::new())
        // `ConnectionState` tells a slow head from an idle connection; the library doesn't.
        .header_read_timeout(None)
        .max_buf_size(header_bytes);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.h2_streams())
        // Bytes that wait in the library for a client to take them are memory that nobody counts.
        .max_send_buf_size(4 * HTTP_2_PIECE)
        .max_header_list_size(u32::try_from(header_bytes).unwrap_or(u32::MAX));
    builder
}

impl Server {
    fn new(
        state: &Arc<HttpState>,
        limits: &RequestLimits,
        routes: Routes,
        tls: Option<Tls>,
        alive: mpsc::Sender<()>,
    ) -> Server {
        let app = &state.app;
        Server {
            service: HttpService::new(state, routes, limits.clone()),
            date: DateField::default(),
            tls,
            trusted_proxies: app.settings.http.trusted_proxies.clone(),
            reads_proxy_header: app.settings.http.proxy_protocol && routes != Routes::Admin,
            // Operators get in when nobody else does.
            places: match routes {
                Routes::All | Routes::Public => Some(app.connections.clone()),
                Routes::Admin => None,
            },
            holders: Arc::clone(&app.holders),
            farewells: Arc::new(Semaphore::new(FAREWELLS)),
            head_limits: Arc::clone(&app.head_limits),
            timeouts: Timeouts::new(&app.settings.http),
            metrics: Arc::clone(&app.metrics),
            shutdown: app.shutdown.clone(),
            _alive: alive,
        }
    }

    /// Accepts connections until the server drains, and then those that are waiting already.
    async fn accept(self: Arc<Self>, listener: Listener) {
        let mut draining = pin!(self.shutdown.reached(Phase::Draining));
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((io, peer)) => self.take(io, peer),
                    Err(error) => pause_after(&error).await,
                },
                () = &mut draining => break,
            }
        }
        for (io, peer) in listener.accept_waiting().unwrap_or_default() {
            self.take(io, peer);
        }
    }

    /// Serves a connection in a task of its own, which ends with the server. It holds its place until it ends.
    fn take(self: &Arc<Self>, io: Box<dyn Io>, peer: Peer) {
        // The connections of a proxy are those of many clients, who have their shares of requests.
        let share = (!self.trusted_proxies.contain(peer.ip())).then(|| peer.share());
        let place = self.places.as_ref().map(|places| {
            let place = places.try_take(share);
            place.map(|place| (place, GaugeGuard::raise(&self.metrics.connections)))
        });
        let Ok(place) = place.transpose() else { return self.turn_away(io) };
        let server = Arc::clone(self);
        tokio::spawn(reporting("connection", async move {
            let _place = place;
            server.secure(io, peer).await;
        }));
    }

    /// Tells a client that there are too many connections. Over TLS there is nobody to tell it to, and where too many
    /// are being told the others are only closed.
    fn turn_away(&self, io: Box<dyn Io>) {
        self.metrics.count_shed(Shed::Connections);
        if self.tls.is_none()
            && let Ok(permit) = Arc::clone(&self.farewells).try_acquire_owned()
        {
            tokio::spawn(reporting("farewell", refuse(io, permit)));
        }
    }

    /// Reads the PROXY header where there must be one. Returns `None` where there is none, or nobody may send one: the client
    /// would otherwise be unknown, or of somebody's own choice.
    async fn announced(&self, io: &mut Box<dyn Io>, peer: Peer) -> Option<Peer> {
        if !self.reads_proxy_header {
            return Some(peer);
        }
        if !self.trusted_proxies.contain(peer.ip()) {
            tracing::debug!(%peer, "closed: not one of [http] trusted_proxies");
            return None;
        }
        match tokio::time::timeout(self.timeouts.header(), proxy_protocol::read(io)).await {
            Ok(Ok(client)) => Some(client.map_or(peer, Peer::Proxied)),
            Ok(Err(error)) => {
                tracing::debug!(%peer, %error, "closed: the PROXY header is malformed");
                None
            }
            Err(_elapsed) => {
                tracing::debug!(%peer, "closed: the PROXY header took too long");
                None
            }
        }
    }

    /// Speaks TLS where the listener does.
    async fn secure(self: &Arc<Self>, mut io: Box<dyn Io>, peer: Peer) {
        let Some(peer) = self.announced(&mut io, peer).await else { return };
        let Some(tls) = &self.tls else {
            return self.converse(io, peer).await;
        };
        let handshake = tls.acceptor.accept(io);
        match tokio::time::timeout(self.timeouts.header(), handshake).await {
            Ok(Ok(io)) => self.converse(Box::new(io), peer).await,
            Ok(Err(error)) => tracing::debug!(%peer, %error, "the TLS handshake failed"),
            Err(_elapsed) => tracing::debug!(%peer, "the TLS handshake took too long"),
        }
    }

    /// Serves one connection to its end. Its errors are the client's affair.
    async fn converse(self: &Arc<Self>, io: Box<dyn Io>, peer: Peer) {
        let connection = Arc::new(ConnectionState::new());
        let fast_loop = FastLoop::new(self, peer, &connection, io);
        let draining = self.shutdown.reached(Phase::Draining);
        let over = async {
            tokio::select! {
                () = self.shutdown.reached(Phase::Over) => {}
                () = connection.end().ended() => {}
            }
        };
        let Some((io, before)) = fast_loop.run(draining, over).await else { return };
        Box::pin(self.converse_by_library(io, before, peer, connection)).await;
    }

    /// Serves the rest of a connection by the HTTP library.
    async fn converse_by_library(
        self: &Arc<Self>,
        io: Box<dyn Io>,
        before: Bytes,
        peer: Peer,
        connection: Arc<ConnectionState>,
    ) {
        let gathers = before.starts_with(HTTP_2_PREFACE);
        let timed = TimedIo { before, io, connection: Arc::clone(&connection) };
        let buffer = WriteBuffer::new(timed, gathers);
        let io = TokioIo::new(buffer.clone());
        let service = service_fn(|request: Request<Incoming>| {
            let (server, connection) = (Arc::clone(self), Arc::clone(&connection));
            let request = request.map(|incoming| server.service.body(incoming));
            async move { Ok::<_, Infallible>(server.service.answer(peer, &connection, request).await) }
        });
        let builder = builder(&self.head_limits);
        let mut library = pin!(builder.serve_connection(io, service));
        let mut last_request = pin!(last_request(&self.shutdown, &connection));
        let mut over = pin!(self.shutdown.reached(Phase::Over));
        let mut winding_down = false;
        loop {
            tokio::select! {
                ended = poll_fn(|context| buffer.poll_with(library.as_mut(), context)) => {
                    if let Err(error) = ended {
                        tracing::debug!(%peer, error, "connection ended");
                    }
                    return;
                }
                () = &mut last_request, if !winding_down => {
                    library.as_mut().graceful_shutdown();
                    winding_down = true;
                }
                () = &mut over, if winding_down => return,
                () = connection.end().ended() => {
                    tracing::debug!(%peer, "connection ended for the sake of other clients");
                    return;
                }
                () = connection.flooded() => {
                    tracing::debug!(%peer, "connection ended: too many streams were reset");
                    self.metrics.count_dropped(Dropped::Resets);
                    library.as_mut().graceful_shutdown();
                    let last = poll_fn(|context| buffer.poll_with(library.as_mut(), context));
                    // Its outcome is the client's affair.
                    let _ = tokio::time::timeout(Duration::from_secs(1), last).await;
                    return;
                }
                () = tokio::time::sleep(self.timeouts.tick()) => {
                    let overdue = connection.overdue(&self.timeouts, Instant::now());
                    if overdue == Overdue::Request && !winding_down {
                        // Over HTTP/2 this tells a client whose request is on its way that it wasn't taken.
                        library.as_mut().graceful_shutdown();
                        winding_down = true;
                    } else if overdue != Overdue::Nothing {
                        tracing::debug!(%peer, ?overdue, "connection timed out");
                        return;
                    }
                }
            }
        }
    }
}

/// Runs a task, and logs its panic. The guards that it holds give back what they hold, and the others go on.
///
/// No `async fn`, whose future would have room for the task twice.
fn reporting(task: &'static str, work: impl Future<Output = ()>) -> impl Future<Output = ()> {
    AssertUnwindSafe(work).catch_unwind().map(move |ended| {
        if let Err(panic) = ended {
            let panic = panic_text(&*panic);
            tracing::error!(task, panic, "a task of the server panicked");
        }
    })
}

/// Spawns the HTTP library's tasks, one for each HTTP/2 stream, so that their panics are logged.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reporting;

impl<F> Executor<F> for Reporting
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, work: F) {
        tokio::spawn(reporting("stream", work));
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("unknown")
}

/// Says that there are too many connections, and waits a moment for the client to read it: closed with its
/// request unread, the connection would be reset and the answer lost.
async fn refuse(mut io: Box<dyn Io>, _permit: OwnedSemaphorePermit) {
    const ANSWER: &[u8] =
        b"HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nRetry-After: 1\r\n\
        Cache-Control: no-store\r\nContent-Length: 0\r\n\r\n";
    let farewell = async {
        io.write_all(ANSWER).await?;
        io.shutdown().await?;
        while io.read(&mut [0; 1024]).await? > 0 {}
        io::Result::Ok(())
    };
    // Its outcome is the client's affair.
    let _ = tokio::time::timeout(Duration::from_secs(1), farewell).await;
}

/// Waits a moment after too many open files. A client that hung up before it was accepted is no error.
async fn pause_after(error: &io::Error) {
    let gone = [
        io::ErrorKind::ConnectionAborted,
        io::ErrorKind::ConnectionRefused,
        io::ErrorKind::ConnectionReset,
    ];
    if !gone.contains(&error.kind()) {
        tracing::error!(%error, "connections can't be accepted");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

    use super::*;
    use crate::settings::{self, Settings};

    /// A connection whose first read panics.
    struct Panicking;

    impl AsyncRead for Panicking {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            panic!("on purpose");
        }
    }

    impl AsyncWrite for Panicking {
        fn poll_write(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &[u8],
        ) -> Poll<io::Result<usize>> {
            Poll::Pending
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !is_so() {
            assert!(Instant::now() < deadline, "{what}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// An app on an embedded store in a folder of its own.
    pub(crate) async fn app(given: &[(&str, &str)]) -> (Arc<App>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let described = settings::described();
        let embedded = [("embedded.dir", dir.path().to_str().unwrap()), ("embedded.demo", "false")];
        let overrides: Vec<_> = embedded
            .iter()
            .chain(given)
            .map(|(key, text)| {
                let setting = described.iter().find(|it| it.key == *key).unwrap();
                setting.overridden(text, "test".into())
            })
            .collect();
        let app = App::build(Settings::load(&overrides).unwrap()).await.unwrap();
        (app, dir)
    }

    #[tokio::test]
    async fn a_connection_task_that_panics_gives_its_place_back_and_the_others_go_on() {
        let (app, _dir) = app(&[("limits.connections", "1")]).await;
        let (alive, mut last_has_ended) = mpsc::channel(1);
        let limits = RequestLimits::new(&app);
        let state = Arc::new(HttpState::new(Arc::clone(&app)));
        let server = Arc::new(Server::new(&state, &limits, Routes::All, None, alive));
        let peer = Peer::Unix;
        let (connections, shed) = (&app.metrics.connections, || {
            let limit = server.places.as_ref().unwrap();
            limit.try_take(None).is_err()
        });
        for _ in 0..3 {
            server.take(Box::new(Panicking), peer);
            assert_eq!(connections.get(), 1);
            until("the place is free again", || connections.get() == 0).await;
            assert!(!shed());
        }
        // The place is good for a connection that works, and for one only.
        let (mut client, other_end) = tokio::io::duplex(4096);
        server.take(Box::new(other_end), peer);
        assert!(shed());
        client.write_all(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let mut start = [0; 15];
        client.read_exact(&mut start).await.unwrap();
        assert_eq!(&start, b"HTTP/1.1 200 OK");
        drop(client);
        until("the last one has left", || connections.get() == 0).await;
        drop(server);
        assert!(last_has_ended.recv().await.is_none());
    }
}
