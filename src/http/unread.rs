//! The rest of a body that nobody read, since its request was refused: read and thrown away for a while.
//!
//! Many clients send their whole body before they read the answer. Were the connection closed with unread bytes, the kernel
//! would reset it, and such a client would get an error in place of the answer (RFC 9112 §9.6). Over HTTP/2 the stream would be
//! reset, which some take for a failure, too.

use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::http::Request;
use axum::http::header::CONTENT_LENGTH;
use bytes::{Buf, Bytes};
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::BodyExt;

use crate::server::timeouts::ActiveRequest;

/// Longest wait for the next bytes, and longest time in all. They are nginx's.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST: Duration = Duration::from_secs(30);

/// The place to which a body comes back that wasn't read to its end.
#[derive(Debug)]
pub(crate) struct UnreadBody {
    place: Place,
    /// The length of the whole body, if it was announced.
    pub(crate) announced: Option<u64>,
}

type Place = Arc<Mutex<Option<Body>>>;

/// A body that comes back when it is dropped before its end.
#[derive(Debug)]
pub(crate) struct ReturningBody {
    body: Option<Body>,
    place: Place,
}

impl UnreadBody {
    /// Puts a body that will come back into the place of a request's own.
    pub(crate) fn lend(request: &mut Request<Body>) -> UnreadBody {
        let announced = request.headers().get(CONTENT_LENGTH);
        let announced = announced.and_then(|length| length.to_str().ok()?.parse().ok());
        let unread = UnreadBody { place: Place::default(), announced };
        let body = Some(std::mem::take(request.body_mut()));
        let place = Arc::clone(&unread.place);
        *request.body_mut() = Body::new(ReturningBody { body, place });
        unread
    }

    /// Takes the rest of the body, if there is any.
    pub(crate) fn take(&self) -> Option<Body> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Drop for ReturningBody {
    fn drop(&mut self) {
        let rest = self.body.take().filter(|body| !body.is_end_stream());
        if rest.is_some() {
            *self.place.lock().unwrap_or_else(PoisonError::into_inner) = rest;
        }
    }
}

impl HttpBody for ReturningBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_frame(context);
        // After its end or an error there is no rest.
        if matches!(polled, Poll::Ready(None | Some(Err(_)))) {
            self.body = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or_else(|| SizeHint::with_exact(0), HttpBody::size_hint)
    }
}

/// Reads up to `most` bytes of the rest of a body, and throws them away. Then the HTTP library ends the connection or resets the
/// stream, unless that was all.
///
/// The connection counts as busy meanwhile: these bytes are no head of another request.
pub(crate) async fn throw_away(mut rest: Body, most: u64, _busy: ActiveRequest) {
    let throwing = async {
        let mut left = most;
        while let Ok(Some(Ok(frame))) = tokio::time::timeout(LONGEST_PAUSE, rest.frame()).await {
            let bytes = frame.data_ref().map_or(0, |data| data.remaining() as u64);
            let Some(fewer) = left.checked_sub(bytes) else { return };
            left = fewer;
        }
    };
    // Its outcome is the client's affair.
    let _ = tokio::time::timeout(LONGEST, throwing).await;
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::atomic::{AtomicU64, Ordering};

    use futures_util::{StreamExt, stream};

    use super::*;
    use crate::server::timeouts::ConnectionState;

    #[tokio::test]
    async fn an_endless_body_is_thrown_away_up_to_its_bound() {
        let given = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&given);
        let endless = stream::repeat(Bytes::from_static(&[0; 1000])).map(move |piece| {
            count.fetch_add(piece.len() as u64, Ordering::Relaxed);
            Ok::<_, Infallible>(piece)
        });
        let busy = Arc::new(ConnectionState::new()).begin_request(false);
        throw_away(Body::from_stream(endless), 10_500, busy).await;
        assert_eq!(given.load(Ordering::Relaxed), 11_000);
    }

    #[tokio::test]
    async fn only_a_body_that_was_not_read_to_its_end_comes_back() {
        let lend = || {
            let mut request = Request::new(Body::from("abc"));
            (UnreadBody::lend(&mut request), request.into_body())
        };
        let (unread, body) = lend();
        assert!(unread.take().is_none());
        drop(body);
        assert_eq!(unread.take().unwrap().collect().await.unwrap().to_bytes(), "abc");
        let (unread, body) = lend();
        assert_eq!(body.collect().await.unwrap().to_bytes(), "abc");
        assert!(unread.take().is_none());
    }
}
