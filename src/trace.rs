//! W3C Trace Context: the trace that a request is a part of, from its client to the object store.

use std::fmt;

use axum::http::{HeaderName, HeaderValue};

use crate::image::digits;
use crate::spans::RequestSpan;

/// The field that names the trace and the caller's span.
pub(crate) const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// The field of the tracing systems on the way, which is passed on as it is.
pub(crate) const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// The flags that are passed on: sampled, and (level 2) random trace id. The others have no meaning yet and must be zero.
const KNOWN_FLAGS: u8 = 0b11;

/// The longest state that is passed on (§3.3.1.5 asks for at least 512 characters).
const LONGEST_STATE: usize = 1024;

/// A span in a trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TraceContext {
    pub(crate) trace_id: [u8; 16],
    pub(crate) span_id: [u8; 8],
    pub(crate) flags: u8,
}

impl TraceContext {
    /// Parses `traceparent` (§3.2). A later version is read like version 0, whose parts it begins with.
    pub(crate) fn parse(text: &[u8]) -> Option<TraceContext> {
        let (known, rest) = text.split_at_checked(55)?;
        let [version, trace_id, span_id, flags] =
            [0..2, 3..35, 36..52, 53..55].map(|it| &known[it]);
        if [2, 35, 52].iter().any(|&at| known[at] != b'-') {
            return None;
        }
        let [version] = bytes(version)?;
        let is_whole = match version {
            0 => rest.is_empty(),
            0xff => false,
            _ => rest.first().is_none_or(|&byte| byte == b'-'),
        };
        let [flags] = bytes(flags)?;
        let context = TraceContext {
            trace_id: bytes(trace_id)?,
            span_id: bytes(span_id)?,
            flags: flags & KNOWN_FLAGS,
        };
        let is_named = context.trace_id != [0; 16] && context.span_id != [0; 8];
        (is_whole && is_named).then_some(context)
    }

    /// Begins a span of this server's below this one.
    pub(crate) fn next_span(self) -> TraceContext {
        TraceContext { span_id: fastrand::u64(1..).to_be_bytes(), ..self }
    }

    /// Formats the field for a request that is sent on.
    fn traceparent(self) -> HeaderValue {
        let (trace_id, span_id) = (Hex(&self.trace_id), Hex(&self.span_id));
        let text = format!("00-{trace_id}-{span_id}-{:02x}", self.flags);
        HeaderValue::try_from(text).expect("hex digits are ASCII")
    }
}

/// Parses lower-case hexadecimal digits; others are malformed here.
fn bytes<const LENGTH: usize>(text: &[u8]) -> Option<[u8; LENGTH]> {
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Some(byte - b'0'),
        b'a'..=b'f' => Some(byte - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; LENGTH];
    for (byte, two) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(two[0])? << 4 | digit(two[1])?;
    }
    Some(bytes)
}

/// An id as hexadecimal digits.
pub(crate) struct Hex<'a>(pub(crate) &'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .flat_map(|byte| digits(*byte))
            .try_for_each(|it| fmt::Write::write_char(f, it.into()))
    }
}

/// The span of the request that is being answered, for what is sent on in its name.
#[derive(Debug, Clone)]
pub(crate) struct Trace {
    pub(crate) context: TraceContext,
    /// `tracestate` of the request.
    state: Option<HeaderValue>,
}

impl Trace {
    /// Returns the trace of a request: that of its exported span, or one below its client's, or none. `tracestate` counts only
    /// with a valid `traceparent`.
    pub(crate) fn of(
        parent: Option<TraceContext>,
        span: Option<&RequestSpan>,
        state: Option<HeaderValue>,
    ) -> Option<Trace> {
        let state = state.filter(|it| parent.is_some() && it.len() <= LONGEST_STATE);
        let context = span.map(RequestSpan::context).or(parent.map(TraceContext::next_span))?;
        Some(Trace { context, state })
    }

    /// Returns the fields for a request that is sent on.
    pub(crate) fn fields(&self) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
        let state = self.state.clone().map(|state| (TRACESTATE, state));
        [(TRACEPARENT, self.context.traceparent())].into_iter().chain(state)
    }
}

tokio::task_local! {
    static CURRENT: Trace;
}

/// Does the work of a request, within which its trace is the [`current`] one.
pub(crate) async fn within<T>(trace: Option<Trace>, work: impl Future<Output = T>) -> T {
    match trace {
        Some(trace) => CURRENT.scope(trace, work).await,
        None => work.await,
    }
}

/// Returns the trace of the request that is being answered in this task. A task that is spawned for it has none of its own.
pub(crate) fn current() -> Option<Trace> {
    CURRENT.try_with(Trace::clone).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const VALID: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_traceparent_is_read_as_the_specification_says() {
        let context = TraceContext::parse(VALID.as_bytes()).unwrap();
        assert_eq!(Hex(&context.trace_id).to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert_eq!(Hex(&context.span_id).to_string(), "00f067aa0ba902b7");
        assert_eq!(context.traceparent(), VALID);
        for (text, flags) in [
            (VALID.replace("-01", "-00"), Some(0)),
            (VALID.replace("-01", "-ff"), Some(3)),
            // Later versions may have more.
            (VALID.replace("00-4", "cc-4"), Some(1)),
            (VALID.replace("00-4", "cc-4") + "-what-comes", Some(1)),
            (VALID.replace("00-4", "cc-4") + "x", None),
            (VALID.replace("00-4", "ff-4"), None),
            (VALID.to_owned() + "-", None),
            (VALID.to_owned() + "-what", None),
            (VALID.replace("4bf", "4BF"), None),
            (VALID.replace("4bf", "4bg"), None),
            (VALID.replace('-', "_"), None),
            (VALID.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)), None),
            (VALID.replace("00f067aa0ba902b7", &"0".repeat(16)), None),
            (VALID.replace("-01", "-1"), None),
            (VALID.replace("-01", "-0x"), None),
            (VALID.replace("00-4", "0-4"), None),
            (String::new(), None),
        ] {
            let context = TraceContext::parse(text.as_bytes());
            assert_eq!(context.map(|it| it.flags), flags, "{text}");
        }
    }

    #[tokio::test]
    async fn what_is_sent_on_has_the_trace_with_a_span_of_this_server() {
        let (state, long) = ("a=1,b=2", "x".repeat(LONGEST_STATE + 1));
        for (given, kept) in [(state, Some(state)), (&long, None)] {
            let state = HeaderValue::from_str(given).unwrap();
            let trace =
                Trace::of(TraceContext::parse(VALID.as_bytes()), None, Some(state)).unwrap();
            let fields: Vec<_> =
                within(Some(trace), async { current().unwrap().fields().collect() }).await;
            let text = fields[0].1.to_str().unwrap();
            assert!(
                text.starts_with(&VALID[..36]) && text.ends_with("-01") && text != VALID,
                "{text}"
            );
            assert_eq!(fields.get(1).map(|(_, it)| it.to_str().unwrap()), kept);
        }
        assert!(Trace::of(None, None, Some(HeaderValue::from_static(state))).is_none());
        assert!(current().is_none());
        assert!(within(None, async { current() }).await.is_none());
    }
}
