//! A TCP proxy between Afterimage and a store that can stop forwarding without closing a connection, as a cut cable does.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Connections that are held: nothing is forwarded on them, and they stay open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Held {
    None,
    All,
    /// Connections without tracking.
    Data,
    /// Connections without tracking that are open already.
    OldData,
    /// Connections with tracking.
    Tracking,
    /// No connection; but pushes are dropped.
    Pushes,
}

pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    held: watch::Sender<Held>,
    target: Arc<AtomicU16>,
    /// In milliseconds.
    delay: Arc<AtomicU64>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    pub(crate) async fn to(port: u16) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (held, heard) = watch::channel(Held::None);
        let target = Arc::new(AtomicU16::new(port));
        let delay = Arc::new(AtomicU64::new(0));
        let (to, data_delay) = (Arc::clone(&target), Arc::clone(&delay));
        let accepting = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect(("127.0.0.1", to.load(Ordering::SeqCst))).await
                else {
                    continue;
                };
                // Otherwise a push would wait until the data before it is acknowledged.
                near.set_nodelay(true).unwrap();
                far.set_nodelay(true).unwrap();
                let ((near_in, near_out), (far_in, far_out)) =
                    (near.into_split(), far.into_split());
                let new = Arc::new(Wire {
                    held: heard.clone(),
                    tracks: AtomicBool::new(false),
                    made_under: *heard.borrow(),
                    delay: Arc::clone(&data_delay),
                });
                tokio::spawn(Arc::clone(&new).carry(near_in, far_out, false));
                tokio::spawn(new.carry(far_in, near_out, true));
            }
        });
        Proxy { address, held, target, delay, accepting }
    }

    /// Holds these connections from now on, and forwards what the others had waiting.
    pub(crate) fn hold(&self, held: Held) {
        self.held.send_replace(held);
    }

    /// Delays what the server sends on connections without tracking.
    pub(crate) fn delay_data(&self, delay: Duration) {
        self.delay.store(delay.as_millis().try_into().unwrap(), Ordering::SeqCst);
    }

    /// Connects new connections to another server; existing ones stay.
    pub(crate) fn lead_to(&self, port: u16) {
        self.target.store(port, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// One proxied connection, in both directions.
struct Wire {
    held: watch::Receiver<Held>,
    tracks: AtomicBool,
    made_under: Held,
    delay: Arc<AtomicU64>,
}

impl Wire {
    async fn carry(
        self: Arc<Self>,
        mut from: OwnedReadHalf,
        mut to: OwnedWriteHalf,
        from_server: bool,
    ) {
        let (mut held, mut buffer) = (self.held.clone(), vec![0; 64 * 1024]);
        loop {
            let Ok(length) = from.read(&mut buffer).await else { return };
            if buffer[..length].windows(8).any(|it| it == b"TRACKING") {
                self.tracks.store(true, Ordering::SeqCst);
            }
            let passes = |held: &Held| match held {
                Held::None | Held::Pushes => true,
                Held::All => false,
                Held::Data => self.tracks.load(Ordering::SeqCst),
                Held::OldData => {
                    self.tracks.load(Ordering::SeqCst) || self.made_under == Held::OldData
                }
                Held::Tracking => !self.tracks.load(Ordering::SeqCst),
            };
            if held.wait_for(passes).await.is_err() || length == 0 {
                return;
            }
            if from_server && buffer[0] == b'>' && *held.borrow() == Held::Pushes {
                continue;
            }
            let delay = self.delay.load(Ordering::SeqCst);
            if from_server && delay > 0 && !self.tracks.load(Ordering::SeqCst) {
                tokio::time::sleep(Duration::from_millis(delay)).await;
            }
            if to.write_all(&buffer[..length]).await.is_err() {
                return;
            }
        }
    }
}
