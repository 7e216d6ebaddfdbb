//! Time-outs of a connection, and the connection state that they are told from.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

use super::listener::Io;
use crate::holders::ConnectionEnd;
use crate::settings;

/// The state of a connection. Its time-outs follow from it:
///
/// | state | time-out |
/// |---|---|
/// | [`Activity::Idle`] | `idle_timeout` |
/// | [`Activity::Head`] | `header_timeout`, from its first byte |
/// | [`Activity::Busy`] with a request that is handled | none: the store and the body have time-outs of their own |
/// | [`Activity::Busy`] with answers only | `send_timeout` in which the client takes nothing |
///
/// Over HTTP/2 bytes on the socket tell little, since a client that takes nothing may still ping. There each answer
/// has a time of its own: when a piece of it was last taken. One that is too old ends the connection, whatever its
/// other streams do. A socket that was full and has room again is progress too. A part of a head counts as idle.
#[derive(Debug)]
pub(crate) struct ConnectionState {
    activity: Mutex<ConnectionActivity>,
    end: ConnectionEnd,
    /// Notified when too many streams were reset.
    flooded: Notify,
}

#[derive(Debug)]
struct ConnectionActivity {
    activity: Activity,
    /// Time of the last sending, taking or finishing.
    progress: Instant,
    /// Set while the socket has no room for what is to be written.
    blocked: bool,
    multiplexed: bool,
    has_had_request: bool,
    next_stream: u64,
    /// Requests that are over.
    requests: u64,
    /// Of these, those whose stream was reset soon after it was opened.
    resets: u64,
}

/// The activity on a connection.
#[derive(Debug)]
enum Activity {
    /// No request, and no byte of one.
    Idle,
    /// A part of a head was read.
    Head { began: Instant },
    /// Requests are handled, or answers are sent.
    Busy { handling: usize, sending: Vec<Sending> },
}

/// An answer that is being sent.
#[derive(Debug)]
struct Sending {
    stream: u64,
    /// Time at which a piece of it was last taken.
    taken: Instant,
}

/// The bytes that open an HTTP/2 connection (RFC 9113 §3.4).
pub(crate) const HTTP_2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// A request on a connection, until its answer has been handed over or given up.
#[derive(Debug)]
pub(crate) struct ActiveRequest {
    connection: Arc<ConnectionState>,
    /// The number of its answer, once that is being sent.
    stream: Option<u64>,
    began: Instant,
    is_answered: bool,
}

/// Requests after which a connection with too many resets is ended.
const MIN_REQUESTS: u64 = 500;

/// Life of a stream whose reset is a matter of course: a page was left, or scrolled.
const EARLY: Duration = Duration::from_secs(1);

/// The time-outs of the settings.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Timeouts {
    header: Duration,
    idle: Duration,
    send: Duration,
}

/// The thing that a client is late with.
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

    /// Interval of the checks: a client that is late is found late by no more than half of the shortest time-out.
    pub(crate) fn tick(&self) -> Duration {
        (self.header.min(self.idle).min(self.send) / 2).max(Duration::from_millis(1))
    }
}

impl ConnectionState {
    pub(crate) fn new() -> ConnectionState {
        let activity = ConnectionActivity {
            activity: Activity::Idle,
            progress: Instant::now(),
            blocked: false,
            multiplexed: false,
            has_had_request: false,
            next_stream: 0,
            requests: 0,
            resets: 0,
        };
        let (end, flooded) = (ConnectionEnd::default(), Notify::new());
        ConnectionState { activity: Mutex::new(activity), end, flooded }
    }

    /// Returns the switch that ends the connection.
    pub(crate) fn end(&self) -> &ConnectionEnd {
        &self.end
    }

    /// Waits until more than half of many streams were reset before they were answered. A client that does that makes work
    /// without an end, within every limit on what is open at the same time.
    pub(crate) async fn flooded(&self) {
        self.flooded.notified().await;
    }

    /// Begins a request, whose head has been read.
    pub(crate) fn begin_request(self: &Arc<Self>, multiplexed: bool) -> ActiveRequest {
        let mut state = self.lock();
        state.multiplexed |= multiplexed;
        state.has_had_request = true;
        match &mut state.activity {
            Activity::Busy { handling, .. } => *handling += 1,
            idle => *idle = Activity::Busy { handling: 1, sending: Vec::new() },
        }
        let began = Instant::now();
        state.progress = began;
        drop(state);
        ActiveRequest { connection: Arc::clone(self), stream: None, began, is_answered: false }
    }

    /// Notes a request that was answered without [`ConnectionState::begin_request`].
    pub(crate) fn note_request(&self) {
        self.lock().has_had_request = true;
    }

    /// Begins to count the time from now, where the connection comes from the fast loop.
    pub(crate) fn restart(&self) {
        self.lock().progress = Instant::now();
    }

    /// Returns whether there has been a request.
    pub(crate) fn has_had_request(&self) -> bool {
        self.lock().has_had_request
    }

    /// Returns the thing that the client is late with.
    pub(crate) fn overdue(&self, timeouts: &Timeouts, now: Instant) -> Overdue {
        let state = self.lock();
        let since = |then: Instant| now.saturating_duration_since(then);
        let must_take = |is_late| if is_late { Overdue::Taking } else { Overdue::Nothing };
        let quiet = since(state.progress);
        match &state.activity {
            Activity::Busy { handling, sending } => {
                let is_late = |it: &Sending| since(it.taken) > timeouts.send;
                let one_is_late = state.multiplexed && sending.iter().any(is_late);
                must_take(one_is_late || (*handling == 0 && quiet > timeouts.send))
            }
            // An answer that was handed over whole may still be waiting in the library.
            Activity::Idle | Activity::Head { .. } if state.blocked => {
                must_take(quiet > timeouts.send)
            }
            Activity::Head { began } if since(*began) > timeouts.header => Overdue::Head,
            Activity::Idle | Activity::Head { .. } if quiet > timeouts.idle => Overdue::Request,
            Activity::Idle | Activity::Head { .. } => Overdue::Nothing,
        }
    }

    fn read(&self, bytes: &[u8]) {
        let mut state = self.lock();
        if !matches!(state.activity, Activity::Idle) {
            return;
        }
        // A client that means the preface sends it in one piece.
        if !state.has_had_request && bytes.starts_with(HTTP_2_PREFACE) {
            state.multiplexed = true;
        }
        if !state.multiplexed {
            state.activity = Activity::Head { began: Instant::now() };
        }
    }

    fn wrote<T>(&self, written: &Poll<T>) {
        let mut state = self.lock();
        let was_blocked = std::mem::replace(&mut state.blocked, written.is_pending());
        if written.is_ready() && (was_blocked || !state.multiplexed) {
            state.progress = Instant::now();
        }
    }

    fn lock(&self) -> MutexGuard<'_, ConnectionActivity> {
        // Nothing under the lock can panic half-way, so a poisoned one is sound.
        self.activity.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConnectionActivity {
    fn end_handling(&mut self) {
        if let Activity::Busy { handling, .. } = &mut self.activity {
            *handling -= 1;
        }
    }

    fn sending(&mut self) -> Option<&mut Vec<Sending>> {
        match &mut self.activity {
            Activity::Busy { sending, .. } => Some(sending),
            Activity::Idle | Activity::Head { .. } => None,
        }
    }
}

impl ActiveRequest {
    /// Marks the answer as known: it will be sent from now on.
    pub(crate) fn begin_sending(&mut self) {
        let mut state = self.connection.lock();
        let (stream, now) = (state.next_stream, Instant::now());
        state.next_stream += 1;
        state.end_handling();
        if let Some(sending) = state.sending() {
            sending.push(Sending { stream, taken: now });
        }
        state.progress = now;
        self.stream = Some(stream);
    }

    /// Returns the switch that ends the connection.
    pub(crate) fn end(&self) -> &ConnectionEnd {
        self.connection.end()
    }

    /// Marks the answer as handed over whole.
    pub(crate) fn mark_answered(&mut self) {
        self.is_answered = true;
    }

    /// Begins another request on the connection, which goes on when this one is over.
    pub(crate) fn another(&self) -> ActiveRequest {
        self.connection.begin_request(false)
    }

    /// Notes that a piece of the answer was taken.
    pub(crate) fn note_progress(&self) {
        let mut state = self.connection.lock();
        let now = Instant::now();
        state.progress = now;
        let sending = state.sending().into_iter().flatten();
        if let Some(answer) = sending.into_iter().find(|it| Some(it.stream) == self.stream) {
            answer.taken = now;
        }
    }
}

impl Drop for ActiveRequest {
    fn drop(&mut self) {
        let mut state = self.connection.lock();
        match self.stream {
            Some(stream) => {
                if let Some(sending) = state.sending() {
                    sending.retain(|it| it.stream != stream);
                }
            }
            None => state.end_handling(),
        }
        if let Activity::Busy { handling: 0, sending } = &state.activity
            && sending.is_empty()
        {
            state.activity = Activity::Idle;
        }
        let now = Instant::now();
        state.progress = now;
        state.requests += 1;
        if state.multiplexed && !self.is_answered && now - self.began < EARLY {
            state.resets += 1;
            if state.requests >= MIN_REQUESTS && state.resets > state.requests / 2 {
                self.connection.flooded.notify_one();
            }
        }
    }
}

/// A connection's bytes, which its [`ConnectionState`] is told of.
pub(crate) struct TimedIo {
    /// Bytes that were read before.
    pub(crate) before: Bytes,
    pub(crate) io: Box<dyn Io>,
    pub(crate) connection: Arc<ConnectionState>,
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
            self.connection.read(&buffer.filled()[before..]);
            return Poll::Ready(Ok(()));
        }
        let read = Pin::new(&mut self.io).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.connection.read(&buffer.filled()[before..]);
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
        self.connection.wrote(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.io).poll_write_vectored(context, slices);
        self.connection.wrote(&written);
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

    fn connection() -> Arc<ConnectionState> {
        Arc::new(ConnectionState::new())
    }

    /// Returns the thing that the client is late with, if nothing else happens for some seconds.
    fn overdue_in(seconds: u64, connection: &ConnectionState) -> Overdue {
        connection.overdue(&TIMEOUTS, Instant::now() + Duration::from_secs(seconds))
    }

    #[test]
    fn a_connection_without_a_request_may_be_idle() {
        let idle = connection();
        assert_eq!(overdue_in(74, &idle), Overdue::Nothing);
        assert_eq!(overdue_in(76, &idle), Overdue::Request);
        let mut request = idle.begin_request(false);
        request.begin_sending();
        drop(request);
        assert_eq!(overdue_in(74, &idle), Overdue::Nothing);
        assert_eq!(overdue_in(76, &idle), Overdue::Request);
    }

    #[test]
    fn a_head_has_its_own_time_from_its_first_byte() {
        let slow = connection();
        slow.read(b"G");
        let first = Instant::now();
        // A byte now and then doesn't help.
        slow.read(b"E");
        assert_eq!(slow.overdue(&TIMEOUTS, first + Duration::from_secs(9)), Overdue::Nothing);
        assert_eq!(slow.overdue(&TIMEOUTS, first + Duration::from_secs(11)), Overdue::Head);
        drop(slow.begin_request(false));
        assert_eq!(overdue_in(11, &slow), Overdue::Nothing);
    }

    #[test]
    fn a_request_that_is_handled_is_never_late() {
        let busy = connection();
        let _request = busy.begin_request(false);
        assert_eq!(overdue_in(1000, &busy), Overdue::Nothing);
    }

    #[test]
    fn an_answer_has_to_be_taken() {
        let stalled = connection();
        let mut request = stalled.begin_request(false);
        request.begin_sending();
        assert_eq!(overdue_in(59, &stalled), Overdue::Nothing);
        assert_eq!(overdue_in(61, &stalled), Overdue::Taking);
        // Progress is what was written, over HTTP/1.1.
        stalled.lock().progress -= Duration::from_secs(100);
        assert_eq!(overdue_in(0, &stalled), Overdue::Taking);
        stalled.wrote(&Poll::Ready(()));
        assert_eq!(overdue_in(0, &stalled), Overdue::Nothing);
    }

    #[test]
    fn an_answer_that_was_handed_over_and_has_no_way_out_has_to_be_taken_as_well() {
        let stalled = connection();
        let mut request = stalled.begin_request(false);
        request.begin_sending();
        stalled.wrote(&Poll::<()>::Pending);
        drop(request);
        assert_eq!(overdue_in(61, &stalled), Overdue::Taking);
        stalled.wrote(&Poll::Ready(()));
        assert_eq!(overdue_in(61, &stalled), Overdue::Nothing);
    }

    #[test]
    fn over_http_2_each_answer_has_to_be_taken_whatever_else_goes_on() {
        let busy = connection();
        busy.read(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        let mut stalled = busy.begin_request(true);
        stalled.begin_sending();
        let age = |by: u64| {
            for answer in busy.lock().sending().unwrap() {
                answer.taken -= Duration::from_secs(by);
            }
        };
        age(61);
        // Pings, another request, another answer that is taken.
        busy.read(b"x");
        busy.wrote(&Poll::Ready(()));
        let mut taken = busy.begin_request(true);
        taken.begin_sending();
        taken.note_progress();
        let _handled = busy.begin_request(true);
        assert_eq!(overdue_in(0, &busy), Overdue::Taking);
        stalled.note_progress();
        assert_eq!(overdue_in(0, &busy), Overdue::Nothing);
        age(61);
        drop(stalled);
        taken.note_progress();
        assert_eq!(overdue_in(0, &busy), Overdue::Nothing);
    }

    #[test]
    fn an_http_2_connection_that_was_opened_ahead_is_idle_and_not_late_with_a_head() {
        let ahead = connection();
        ahead.read(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0");
        assert_eq!(overdue_in(30, &ahead), Overdue::Nothing);
        assert_eq!(overdue_in(76, &ahead), Overdue::Request);
    }

    #[test]
    fn a_request_whose_task_panics_is_over() {
        let connection = connection();
        let panicking = Arc::clone(&connection);
        let panic = std::thread::spawn(move || {
            let _request = panicking.begin_request(true);
            panic!("on purpose");
        });
        panic.join().unwrap_err();
        assert_eq!(overdue_in(76, &connection), Overdue::Request);
    }
}
