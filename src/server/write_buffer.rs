//! A write buffer for a connection.
//!
//! The HTTP library writes each frame of HTTP/2 by itself, and none is larger than its client allows: 16 KiB, as a rule.
//! But a system call costs more than the copy of 16 KiB. So frames are kept until the library has nothing more to write
//! for now, or until there are many. `benches/README.md` has the figures.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Bytes that are written at once.
const FULL: usize = 64 * 1024;

/// A connection whose writes are gathered. The HTTP library has one clone, the task that polls the library another.
#[derive(Debug)]
pub(crate) struct WriteBuffer<W>(Arc<Mutex<Outgoing<W>>>);

#[derive(Debug)]
struct Outgoing<W> {
    io: W,
    /// Off for HTTP/1.1, whose heads and bodies the library writes at once. There it also leaves connections that asked
    /// for an upgrade without shutting them down, and would leave the waiting bytes unsent.
    gathers: bool,
    waiting: Vec<u8>,
    /// Number of those that have been written.
    written: usize,
}

impl<W> Clone for WriteBuffer<W> {
    fn clone(&self) -> WriteBuffer<W> {
        WriteBuffer(Arc::clone(&self.0))
    }
}

impl<W: AsyncRead + AsyncWrite + Unpin> WriteBuffer<W> {
    pub(crate) fn new(io: W, gathers: bool) -> WriteBuffer<W> {
        let (waiting, written) = (Vec::new(), 0);
        WriteBuffer(Arc::new(Mutex::new(Outgoing { io, gathers, waiting, written })))
    }

    /// Polls the library's side of the connection, and sends the bytes that it has written.
    pub(crate) fn poll_with<E: From<io::Error>>(
        &self,
        library: Pin<&mut impl Future<Output = Result<(), E>>>,
        context: &mut Context<'_>,
    ) -> Poll<Result<(), E>> {
        let polled = library.poll(context);
        let sent = self.lock().poll_send(context);
        // If it has ended with an error, its last bytes are sent as far as they can be.
        if polled.is_pending() {
            ready!(sent)?;
        }
        polled
    }

    fn lock(&self) -> MutexGuard<'_, Outgoing<W>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<W: AsyncWrite + Unpin> Outgoing<W> {
    fn poll_send(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.waiting.len() {
            let bytes = &self.waiting[self.written..];
            match ready!(Pin::new(&mut self.io).poll_write(context, bytes))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => self.written += written,
            }
        }
        // An idle connection has no buffer.
        (self.waiting, self.written) = (Vec::new(), 0);
        // Some bytes may wait in the TLS layer.
        Pin::new(&mut self.io).poll_flush(context)
    }
}

impl<W: AsyncRead + Unpin> AsyncRead for WriteBuffer<W> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut outgoing = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        Pin::new(&mut outgoing.io).poll_read(context, buffer)
    }
}

impl<W: AsyncRead + AsyncWrite + Unpin> AsyncWrite for WriteBuffer<W> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[io::IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut outgoing = self.lock();
        let length = slices.iter().map(|it| it.len()).sum();
        if outgoing.waiting.len() + length > FULL {
            ready!(outgoing.poll_send(context))?;
        }
        if length > FULL || !outgoing.gathers {
            return Pin::new(&mut outgoing.io).poll_write_vectored(context, slices);
        }
        for slice in slices {
            outgoing.waiting.extend_from_slice(slice);
        }
        Poll::Ready(Ok(length))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Does nothing where writes are gathered: the library asks for it after each frame.
    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut outgoing = self.lock();
        if outgoing.gathers {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut outgoing.io).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut outgoing = self.lock();
        ready!(outgoing.poll_send(context))?;
        Pin::new(&mut outgoing.io).poll_shutdown(context)
    }
}
