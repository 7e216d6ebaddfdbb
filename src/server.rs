//! The server: connections in, requests to the router, and a graceful end.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use tokio::net::{TcpListener, TcpStream};

use crate::app::App;
use crate::http::router::{Peer, router};

/// Serves until `shutdown` is ready, then lets requests in progress finish, up to the deadline.
///
/// Not `axum::serve`, which installs no timer: its header time-out would never fire.
pub async fn serve(app: Arc<App>, listener: TcpListener, shutdown: impl Future<Output = ()>) {
    let deadline = app.settings.http.shutdown_timeout;
    let builder = builder(&app.settings.http);
    let router = router(app);
    let open = GracefulShutdown::new();
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, peer)) => {
                    tokio::spawn(connection(builder.clone(), open.watcher(), router.clone(), stream, peer));
                }
                Err(error) => pause_after(&error).await,
            },
            () = &mut shutdown => break,
        }
    }
    drop(listener);
    tracing::info!("stopping");
    if tokio::time::timeout(deadline, open.shutdown()).await.is_err() {
        tracing::warn!("connections were cut: their requests didn't end in time");
    }
}

fn builder(settings: &crate::settings::Http) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(settings.header_timeout);
    builder.http2().timer(TokioTimer::new());
    builder
}

/// One connection, to its end. What goes wrong on it is the client's affair.
async fn connection(
    builder: Builder<TokioExecutor>,
    watcher: Watcher,
    router: Router,
    stream: TcpStream,
    peer: SocketAddr,
) {
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request| respond(router.clone(), peer, request));
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%peer, error, "connection ended");
    }
}

async fn respond(
    mut router: Router,
    peer: SocketAddr,
    mut request: Request<Incoming>,
) -> Result<Response<Body>, Infallible> {
    request.extensions_mut().insert(Peer(peer));
    tower_service::Service::call(&mut router, request.map(Body::new)).await
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
