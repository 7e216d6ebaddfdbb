//! What happens on a connection, and for how long nothing did.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::listen::Wire;
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
/// Over HTTP/2 the bytes on the wire tell nothing, since a client that takes nothing may still ping: there only what
/// is taken of answers counts, and a part of a head counts as idle.
#[derive(Debug)]
pub(super) struct Activity {
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
}

/// The time-outs of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timeouts {
    header: Duration,
    idle: Duration,
    send: Duration,
}

/// What a connection is late with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Overdue {
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
    pub(super) fn new(settings: &settings::Http) -> Timeouts {
        let settings::Http { header_timeout, idle_timeout, send_timeout, .. } = settings;
        Timeouts { header: *header_timeout, idle: *idle_timeout, send: *send_timeout }
    }

    pub(super) fn header(&self) -> Duration {
        self.header
    }

    /// How often to look: what is late is found late by no more than half of the shortest one.
    pub(super) fn tick(&self) -> Duration {
        (self.header.min(self.idle).min(self.send) / 2).max(Duration::from_millis(1))
    }
}

impl Activity {
    pub(super) fn new() -> Activity {
        Activity {
            began: Instant::now(),
            progress: AtomicU64::new(0),
            head_began: AtomicU64::new(0),
            handling: AtomicUsize::new(0),
            sending: AtomicUsize::new(0),
            blocked: AtomicBool::new(false),
            multiplexed: AtomicBool::new(false),
            asked: AtomicBool::new(false),
        }
    }

    /// A request is whole but for its body.
    pub(super) fn begin_handling(&self, multiplexed: bool) {
        if multiplexed {
            self.multiplexed.store(true, Ordering::Relaxed);
        }
        self.asked.store(true, Ordering::Relaxed);
        self.handling.fetch_add(1, Ordering::Relaxed);
        self.head_began.store(0, Ordering::Relaxed);
        self.make_progress();
    }

    /// Its answer is known and will be sent.
    pub(super) fn begin_sending(&self) {
        self.sending.fetch_add(1, Ordering::Relaxed);
        self.end_handling();
    }

    /// There will be no answer.
    pub(super) fn end_handling(&self) {
        self.handling.fetch_sub(1, Ordering::Relaxed);
        self.make_progress();
    }

    /// The answer has been handed over, or given up.
    pub(super) fn end_sending(&self) {
        self.sending.fetch_sub(1, Ordering::Relaxed);
        self.make_progress();
    }

    /// Something of an answer was taken.
    pub(super) fn make_progress(&self) {
        self.progress.store(self.now(), Ordering::Relaxed);
    }

    /// Whether there has been a request.
    pub(super) fn has_asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }

    /// What the client is late with.
    pub(super) fn overdue(&self, timeouts: &Timeouts) -> Overdue {
        let since = |then: u64| Duration::from_millis(self.now().saturating_sub(then));
        let quiet = since(self.progress.load(Ordering::Relaxed));
        let head_began = self.head_began.load(Ordering::Relaxed);
        if self.handling.load(Ordering::Relaxed) > 0 {
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

    fn read(&self) {
        let multiplexed = self.multiplexed.load(Ordering::Relaxed);
        let busy = self.handling.load(Ordering::Relaxed) + self.sending.load(Ordering::Relaxed) > 0;
        if !multiplexed && !busy && self.head_began.load(Ordering::Relaxed) == 0 {
            self.head_began.store(self.now().max(1), Ordering::Relaxed);
        }
    }

    fn wrote<T>(&self, written: &Poll<T>) {
        self.blocked.store(written.is_pending(), Ordering::Relaxed);
        if written.is_ready() && !self.multiplexed.load(Ordering::Relaxed) {
            self.make_progress();
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// A connection's bytes, observed.
pub(super) struct Observed {
    pub(super) wire: Box<dyn Wire>,
    pub(super) activity: std::sync::Arc<Activity>,
}

impl AsyncRead for Observed {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.wire).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.activity.read();
        }
        read
    }
}

impl AsyncWrite for Observed {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.wire).poll_write(context, bytes);
        self.activity.wrote(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.wire).poll_write_vectored(context, slices);
        self.activity.wrote(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.wire.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_shutdown(context)
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
    fn old(seconds: u64) -> Activity {
        let began = Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
        Activity { began, ..Activity::new() }
    }

    #[test]
    fn a_connection_without_a_request_may_be_idle() {
        assert_eq!(old(74).overdue(&TIMEOUTS), Overdue::Nothing);
        assert_eq!(old(76).overdue(&TIMEOUTS), Overdue::Request);
        let used = old(1000);
        used.begin_handling(false);
        used.begin_sending();
        used.end_sending();
        assert_eq!(used.overdue(&TIMEOUTS), Overdue::Nothing);
    }

    #[test]
    fn a_head_has_its_own_time_from_its_first_byte() {
        let slow = old(30);
        slow.head_began.store(19_000, Ordering::Relaxed);
        // A byte now and then doesn't help.
        slow.read();
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
        stalled.begin_sending();
        stalled.wrote(&Poll::<()>::Pending);
        stalled.end_sending();
        stalled.progress.store(935_000, Ordering::Relaxed);
        assert_eq!(stalled.overdue(&TIMEOUTS), Overdue::Taking);
        stalled.wrote(&Poll::Ready(()));
        assert_eq!(stalled.overdue(&TIMEOUTS), Overdue::Nothing);
    }

    #[test]
    fn over_http_2_a_ping_is_no_progress() {
        let stalled = old(1000);
        stalled.begin_handling(true);
        stalled.begin_sending();
        stalled.progress.store(900_000, Ordering::Relaxed);
        stalled.read();
        stalled.wrote(&Poll::Ready(()));
        assert_eq!(stalled.overdue(&TIMEOUTS), Overdue::Taking);
    }
}
