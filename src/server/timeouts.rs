//! What happens on a connection, and for how long nothing did.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::listener::Io;
use crate::settings;

/// What a connection is doing. Its time-outs are told from it:
///
/// | state | the client may take |
/// |---|---|
/// | no request, no byte of one | `idle_timeout` |
/// | a part of a head | `header_timeout`, from its first byte |
/// | a request is being handled | as long as that takes: the store and the body have time-outs of their own |
/// | an answer is being sent | `send_timeout` without taking anything of it |
///
/// Over HTTP/2 bytes on the io tell little, since a client that takes nothing may still ping. There each answer has a
/// mark of its own: when a piece of it was last taken; and one that has none for too long ends the connection, whatever
/// its other streams do. A socket that was full and has room again is progress too. A part of a head counts as idle.
#[derive(Debug)]
pub(crate) struct ConnectionState {
    began: Instant,
    /// When something was last sent, taken or finished, in milliseconds since it began.
    progress: AtomicU64,
    /// When the head that is being read began; 0 where there is none.
    head_began: AtomicU64,
    handling: AtomicUsize,
    sending: AtomicUsize,
    /// Something was to be written for which the socket had no room.
    blocked: AtomicBool,
    multiplexed: AtomicBool,
    asked: AtomicBool,
    /// When something was last taken of each answer that is being sent over HTTP/2.
    streams: Mutex<Vec<Mark>>,
}

/// What opens an HTTP/2 connection (RFC 9113 §3.4).
pub(crate) const HTTP_2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// When something was last taken of an answer, in milliseconds since its connection began.
pub(crate) type Mark = Arc<AtomicU64>;

/// The time-outs of a connection.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeouts {
    header: Duration,
    idle: Duration,
    send: Duration,
}

/// What a connection is late with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Overdue {
    /// Nothing.
    Nothing,
    /// A request.
    Request,
    /// The end of a head.
    Head,
    /// Taking an answer.
    Taking,
}

impl Timeouts {
    pub(crate) fn new(settings: &settings::HttpSettings) -> Timeouts {
        let settings::HttpSettings { header_timeout, idle_timeout, send_timeout, .. } = settings;
        Timeouts { header: *header_timeout, idle: *idle_timeout, send: *send_timeout }
    }

    pub(crate) fn header(&self) -> Duration {
        self.header
    }

    pub(crate) fn idle(&self) -> Duration {
        self.idle
    }

    pub(crate) fn send(&self) -> Duration {
        self.send
    }

    /// How often to look: what is late is found late by no more than half of the shortest one.
    pub(crate) fn tick(&self) -> Duration {
        (self.header.min(self.idle).min(self.send) / 2).max(Duration::from_millis(1))
    }
}

impl ConnectionState {
    pub(crate) fn new() -> ConnectionState {
        ConnectionState {
            began: Instant::now(),
            progress: AtomicU64::new(0),
            head_began: AtomicU64::new(0),
            handling: AtomicUsize::new(0),
            sending: AtomicUsize::new(0),
            blocked: AtomicBool::new(false),
            multiplexed: AtomicBool::new(false),
            asked: AtomicBool::new(false),
            streams: Mutex::default(),
        }
    }

    /// A request is whole but for its body.
    pub(crate) fn begin_handling(&self, multiplexed: bool) {
        if multiplexed {
            self.multiplexed.store(true, Ordering::Relaxed);
        }
        self.asked.store(true, Ordering::Relaxed);
        self.handling.fetch_add(1, Ordering::Relaxed);
        self.head_began.store(0, Ordering::Relaxed);
        self.make_progress();
    }

    /// Its answer is known and will be sent. Gives where to note what is taken of it.
    pub(crate) fn begin_sending(&self) -> Mark {
        self.sending.fetch_add(1, Ordering::Relaxed);
        self.end_handling();
        let mark = Mark::new(AtomicU64::new(self.now()));
        if self.multiplexed.load(Ordering::Relaxed) {
            self.streams().push(Arc::clone(&mark));
        }
        mark
    }

    /// There will be no answer.
    pub(crate) fn end_handling(&self) {
        self.handling.fetch_sub(1, Ordering::Relaxed);
        self.make_progress();
    }

    /// The answer has been handed over, or given up.
    pub(crate) fn end_sending(&self, mark: &Mark) {
        self.sending.fetch_sub(1, Ordering::Relaxed);
        if self.multiplexed.load(Ordering::Relaxed) {
            self.streams().retain(|it| !Arc::ptr_eq(it, mark));
        }
        self.make_progress();
    }

    /// A piece of an answer was taken.
    pub(crate) fn take(&self, mark: &Mark) {
        mark.store(self.now(), Ordering::Relaxed);
        self.make_progress();
    }

    /// There was a request that was answered at once.
    pub(crate) fn note_request(&self) {
        if !self.has_asked() {
            self.asked.store(true, Ordering::Relaxed);
        }
    }

    /// From now on it is looked after here.
    pub(crate) fn go_on(&self) {
        self.make_progress();
    }

    fn make_progress(&self) {
        self.progress.store(self.now(), Ordering::Relaxed);
    }

    /// Whether there has been a request.
    pub(crate) fn has_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// What the client is late with.
    pub(crate) fn overdue(&self, timeouts: &Timeouts) -> Overdue {
        let since = |then: u64| Duration::from_millis(self.now().saturating_sub(then));
        let quiet = since(self.progress.load(Ordering::Relaxed));
        let head_began = self.head_began.load(Ordering::Relaxed);
        let oldest = self.streams().iter().map(|mark| mark.load(Ordering::Relaxed)).min();
        if oldest.is_some_and(|mark| since(mark) > timeouts.send) {
            Overdue::Taking
        } else if self.handling.load(Ordering::Relaxed) > 0 {
            Overdue::Nothing
        } else if self.sending.load(Ordering::Relaxed) > 0 || self.blocked.load(Ordering::Relaxed) {
            // An answer that was handed over whole may still be waiting in the library.
            if quiet > timeouts.send { Overdue::Taking } else { Overdue::Nothing }
        } else if head_began > 0 && since(head_began) > timeouts.header {
            Overdue::Head
        } else if quiet > timeouts.idle {
            Overdue::Request
        } else {
            Overdue::Nothing
        }
    }

    fn read(&self, bytes: &[u8]) {
        // It comes in one piece from whoever means it.
        if self.is_beginning() && bytes.starts_with(HTTP_2_PREFACE) {
            self.multiplexed.store(true, Ordering::Relaxed);
        }
        let multiplexed = self.multiplexed.load(Ordering::Relaxed);
        let busy = self.handling.load(Ordering::Relaxed) + self.sending.load(Ordering::Relaxed) > 0;
        if !multiplexed && !busy && self.head_began.load(Ordering::Relaxed) == 0 {
            self.head_began.store(self.now().max(1), Ordering::Relaxed);
        }
    }

    /// Whether nothing has been read yet.
    fn is_beginning(&self) -> bool {
        !self.asked.load(Ordering::Relaxed) && self.head_began.load(Ordering::Relaxed) == 0
    }

    fn wrote<T>(&self, written: &Poll<T>) {
        let was_blocked = self.blocked.swap(written.is_pending(), Ordering::Relaxed);
        let multiplexed = self.multiplexed.load(Ordering::Relaxed);
        if written.is_ready() && (was_blocked || !multiplexed) {
            self.make_progress();
        }
    }

    fn streams(&self) -> MutexGuard<'_, Vec<Mark>> {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// A connection's bytes, observed.
pub(crate) struct TimedIo {
    /// What was read before.
    pub(crate) before: Bytes,
    pub(crate) io: Box<dyn Io>,
    pub(crate) activity: Arc<ConnectionState>,
}

impl AsyncRead for TimedIo {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        if !self.before.is_empty() {
            let length = self.before.len().min(buffer.remaining());
            buffer.put_slice(&self.before.split_to(length));
            self.activity.read(&buffer.filled()[before..]);
            return Poll::Ready(Ok(()));
        }
        let read = Pin::new(&mut self.io).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.activity.read(&buffer.filled()[before..]);
        }
        read
    }
}

impl AsyncWrite for TimedIo {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write(context, bytes);
        self.activity.wrote(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(context, slices);
        self.activity.wrote(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUTS: Timeouts = Timeouts {
        header: Duration::from_secs(10),
        idle: Duration::from_secs(75),
        send: Duration::from_mins(1),
    };

    /// An activity that began some seconds ago.
    fn old(seconds: u64) -> ConnectionState {
        let began = Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        ConnectionState { began, ..ConnectionState::new() }
    }

    #[test]
    fn a_connection_without_a_request_may_be_idle() {
        assert_eq!(old(74).overdue(&TIMEOUTS), Overdue::Nothing);
        assert_eq!(old(76).overdue(&TIMEOUTS), Overdue::Request);
        let used = old(1000);
        used.begin_handling(false);
        let mark = used.begin_sending();
        used.end_sending(&mark);
        assert_eq!(used.overdue(&TIMEOUTS), Overdue::Nothing);
    }

    #[test]
    fn a_head_has_its_own_time_from_its_first_byte() {
        let slow = old(30);
        slow.head_began.store(19_000, Ordering::Relaxed);
        // A byte now and then doesn't help.
        slow.read(b"x");
        assert_eq!(slow.overdue(&TIMEOUTS), Overdue::Head);
        slow.begin_handling(false);
        slow.end_handling();
        assert_eq!(slow.overdue(&TIMEOUTS), Overdue::Nothing);
    }

    #[test]
    fn a_request_that_is_handled_is_never_late() {
        let busy = old(1000);
        busy.begin_handling(false);
        busy.progress.store(0, Ordering::Relaxed);
        assert_eq!(busy.overdue(&TIMEOUTS), Overdue::Nothing);
    }

    #[test]
    fn an_answer_has_to_be_taken() {
        let stalled = old(1000);
        stalled.begin_handling(false);
        stalled.begin_sending();
        stalled.progress.store(900_000, Ordering::Relaxed);
        assert_eq!(stalled.overdue(&TIMEOUTS), Overdue::Taking);
        stalled.wrote(&Poll::Ready(()));
        assert_eq!(stalled.overdue(&TIMEOUTS), Overdue::Nothing);
    }

    #[test]
    fn what_was_handed_over_and_has_no_way_out_has_to_be_taken_as_well() {
        let stalled = old(1000);
        stalled.begin_handling(false);
        let mark = stalled.begin_sending();
        stalled.wrote(&Poll::<()>::Pending);
        stalled.end_sending(&mark);
        stalled.progress.store(935_000, Ordering::Relaxed);
        assert_eq!(stalled.overdue(&TIMEOUTS), Overdue::Taking);
        stalled.wrote(&Poll::Ready(()));
        assert_eq!(stalled.overdue(&TIMEOUTS), Overdue::Nothing);
    }

    #[test]
    fn over_http_2_each_answer_has_to_be_taken_whatever_else_goes_on() {
        let busy = old(1000);
        busy.read(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        busy.begin_handling(true);
        let stalled = busy.begin_sending();
        stalled.store(935_000, Ordering::Relaxed);
        // Pings, another request, another answer that is taken.
        busy.read(b"x");
        busy.wrote(&Poll::Ready(()));
        busy.begin_handling(true);
        let taken = busy.begin_sending();
        busy.take(&taken);
        busy.begin_handling(true);
        assert_eq!(busy.overdue(&TIMEOUTS), Overdue::Taking);
        busy.take(&stalled);
        assert_eq!(busy.overdue(&TIMEOUTS), Overdue::Nothing);
        stalled.store(0, Ordering::Relaxed);
        busy.end_sending(&stalled);
        assert_eq!(busy.overdue(&TIMEOUTS), Overdue::Nothing);
    }

    #[test]
    fn an_http_2_connection_that_was_opened_ahead_is_idle_and_not_late_with_a_head() {
        let ahead = old(30);
        ahead.read(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
        assert_eq!(ahead.overdue(&TIMEOUTS), Overdue::Nothing);
        assert_eq!(old(76).overdue(&TIMEOUTS), Overdue::Request);
    }
}
