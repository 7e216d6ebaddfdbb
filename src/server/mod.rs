//! The server: connections in, requests to the router, and a graceful end.

pub(crate) mod h1;
pub(crate) mod listener;
pub(crate) mod timeouts;
mod tls;
mod write_buffer;

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::http::Request;
use bytes::Bytes;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

use self::h1::Plain;
use self::listener::Io;
pub use self::listener::{Listener, Listeners};
use self::timeouts::{ConnectionState, HTTP_2_PREFACE, Overdue, TimedIo, Timeouts};
use self::tls::Tls;
use self::write_buffer::WriteBuffer;
use crate::app::App;
use crate::http::router::{Peer, Routes};
use crate::http::service::{HTTP_2_PIECE, HttpService};
use crate::metrics::Shed;

/// How many clients are told at the same time that there are too many: each is an open file for a moment.
const FAREWELLS: usize = 64;

/// How a server is told to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// Go on for `shutdown_delay`, so that load balancers go elsewhere first.
    Announced,
    /// Take no more requests.
    AtOnce,
}

/// Serves until `shutdown` is ready, then lets requests in progress finish, up to the deadline.
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
    let (open, draining) = watch::channel(Phase::Open);
    let accept = |listener: Listener, routes| {
        let server = Server {
            builder: builder(&app),
            timeouts: Timeouts::new(&app.settings.http),
            service: HttpService::new(Arc::clone(&app), routes),
            farewells: Arc::new(Semaphore::new(FAREWELLS)),
            tls: listener.tls.clone(),
            // Operators get in when nobody else does.
            most: match routes {
                Routes::All | Routes::Public => Some(app.settings.limits.connections.get()),
                Routes::Admin => None,
            },
            phase: draining.clone(),
        };
        Arc::new(server).accept(listener)
    };
    let mut tasks = JoinSet::new();
    if let Some(tls) = main.tls.clone() {
        tasks.spawn(tls.keep_current());
    }
    if let Some(admin) = admin {
        tasks.spawn(accept(admin, Routes::Admin));
    }
    let mut accepting = JoinSet::new();
    accepting.spawn(accept(main, routes));
    drop(draining);

    let stop = shutdown.await;
    app.begin_to_stop();
    if stop == Stop::Announced && !delay.is_zero() {
        tracing::info!(delay_ms = delay.as_millis(), "not ready any more, stopping soon");
        tokio::time::sleep(delay).await;
    }
    tracing::info!("stopping");
    let ended = async {
        open.send_replace(Phase::Draining);
        app.begin_to_drain();
        // The listener goes first, with whoever waits there answered; the connections end when they have sent what
        // they were asked for. Operators may look until the end.
        accepting.join_next().await;
        // A connection that doesn't end leaves the operators' listener until the deadline.
        tasks.shutdown().await;
        open.closed().await;
    };
    if tokio::time::timeout(deadline, ended).await.is_err() {
        tracing::warn!("connections were cut: their requests didn't end in time");
        open.send_replace(Phase::Over);
    }
}

/// What a listener and its connections are to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// Take what comes.
    Open,
    /// Finish what is in progress.
    Draining,
    /// End.
    Over,
}

/// Waits until there is nothing left to do but what a phase says. A server that is gone has ended.
async fn reached(phase: &mut watch::Receiver<Phase>, wanted: Phase) {
    let _ = phase.wait_for(|phase| *phase >= wanted).await;
}

/// Waits until a connection is to take no further request: when the server drains; or a moment later, where the
/// client has only just been told that it is connected, so that its request is on its way.
async fn last_request(phase: &mut watch::Receiver<Phase>, activity: &ConnectionState) {
    const MOMENT: Duration = Duration::from_secs(1);
    reached(phase, Phase::Draining).await;
    if !activity.has_asked() {
        let _ = tokio::time::timeout(MOMENT, reached(phase, Phase::Over)).await;
    }
}

/// What the connections of a listener need. Not the listener itself: it is closed before the last of them ends.
struct Server {
    service: HttpService,
    tls: Option<Tls>,
    /// How many connections there may be; `None` where they are neither counted nor limited.
    most: Option<usize>,
    /// One permit for each client that is being told that there are too many.
    farewells: Arc<Semaphore>,
    builder: Builder<TokioExecutor>,
    timeouts: Timeouts,
    phase: watch::Receiver<Phase>,
}

fn builder(app: &App) -> Builder<TokioExecutor> {
    let limits = &app.settings.limits;
    let header_bytes = u32::try_from(limits.header_bytes).unwrap_or(u32::MAX);
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        // `ConnectionState` tells a slow head from an idle connection; the library doesn't.
        .header_read_timeout(None)
        .max_buf_size(limits.header_bytes);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.h2_streams.get())
        // What waits in the library for a client to take it is memory that nobody counts.
        .max_send_buf_size(4 * HTTP_2_PIECE)
        .max_header_list_size(header_bytes);
    builder
}

impl Server {
    /// Accepts connections until the server drains, and then those that are waiting already.
    async fn accept(self: Arc<Self>, listener: Listener) {
        let mut phase = self.phase.clone();
        let mut draining = pin!(reached(&mut phase, Phase::Draining));
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

    /// Serves a connection in a task of its own, which ends with the server.
    fn take(self: &Arc<Self>, io: Box<dyn Io>, peer: Peer) {
        let server = Arc::clone(self);
        let Some(most) = self.most else {
            tokio::spawn(async move { server.secure(io, peer).await });
            return;
        };
        let metrics = &self.service.app.metrics;
        let others = metrics.connections.inc();
        if usize::try_from(others).unwrap_or_default() < most {
            tokio::spawn(async move {
                server.secure(io, peer).await;
                server.service.app.metrics.connections.dec();
            });
            return;
        }
        metrics.connections.dec();
        metrics.count_shed(Shed::Connections);
        // Over TLS there is nobody to tell it to, and where too many are being told the others are only closed.
        if self.tls.is_none()
            && let Ok(permit) = Arc::clone(&self.farewells).try_acquire_owned()
        {
            tokio::spawn(refuse(io, permit));
        }
    }

    /// Speaks TLS where the listener does.
    async fn secure(self: &Arc<Self>, io: Box<dyn Io>, peer: Peer) {
        let Some(tls) = &self.tls else {
            return self.converse(io, peer).await;
        };
        let handshake = tls.acceptor.accept(io);
        match tokio::time::timeout(self.timeouts.header(), handshake).await {
            Ok(Ok(io)) => self.converse(Box::new(io), peer).await,
            Ok(Err(error)) => tracing::debug!(%peer, %error, "no TLS"),
            Err(_elapsed) => tracing::debug!(%peer, "the TLS handshake took too long"),
        }
    }

    /// One connection, to its end. What goes wrong on it is the client's affair.
    async fn converse(self: &Arc<Self>, io: Box<dyn Io>, peer: Peer) {
        let activity = Arc::new(ConnectionState::new());
        let plain = Plain::new(&self.service, peer, &activity, self.timeouts, io);
        let (mut draining, mut over) = (self.phase.clone(), self.phase.clone());
        let (draining, over) =
            (reached(&mut draining, Phase::Draining), reached(&mut over, Phase::Over));
        let Some((io, before)) = plain.converse(draining, over).await else { return };
        Box::pin(self.converse_by_library(io, before, peer, activity)).await;
    }

    /// The rest of a connection, by the HTTP library.
    async fn converse_by_library(
        self: &Arc<Self>,
        io: Box<dyn Io>,
        before: Bytes,
        peer: Peer,
        activity: Arc<ConnectionState>,
    ) {
        let gathers = before.starts_with(HTTP_2_PREFACE);
        let observed = TimedIo { before, io, activity: Arc::clone(&activity) };
        let buffer = WriteBuffer::new(observed, gathers);
        let io = TokioIo::new(buffer.clone());
        let service = service_fn(|request: Request<Incoming>| {
            let (server, activity) = (Arc::clone(self), Arc::clone(&activity));
            let request = request.map(|incoming| server.service.body(incoming));
            async move { Ok::<_, Infallible>(server.service.answer(peer, &activity, request).await) }
        });
        let mut connection = pin!(self.builder.serve_connection(io, service));
        let (mut draining, mut over) = (self.phase.clone(), self.phase.clone());
        let mut last_request = pin!(last_request(&mut draining, &activity));
        let mut winding_down = false;
        loop {
            tokio::select! {
                ended = poll_fn(|context| buffer.poll_with(connection.as_mut(), context)) => {
                    if let Err(error) = ended {
                        tracing::debug!(%peer, error, "connection ended");
                    }
                    return;
                }
                () = &mut last_request, if !winding_down => {
                    connection.as_mut().graceful_shutdown();
                    winding_down = true;
                }
                () = reached(&mut over, Phase::Over), if winding_down => return,
                () = tokio::time::sleep(self.timeouts.tick()) => {
                    let overdue = activity.overdue(&self.timeouts);
                    if overdue == Overdue::Request && !winding_down {
                        // Over HTTP/2 this tells a client whose request is on its way that it wasn't taken.
                        connection.as_mut().graceful_shutdown();
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
    // Whatever becomes of it.
    let _ = tokio::time::timeout(Duration::from_secs(1), farewell).await;
}

/// A client that hung up before it was accepted is nothing; too many open files need a moment.
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
