//! The log of the process, on standard error.

use std::fmt;
use std::io::IsTerminal;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{Format, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::http::in_flight::ACCESS;
use crate::settings::{self, LogFormat};

/// The log of this process. The rest of its queue is written when this is dropped.
pub(crate) struct Log {
    filter: reload::Handle<Targets, Registry>,
    _guard: WorkerGuard,
}

impl Log {
    /// Changes which lines are written.
    pub(crate) fn set_filter(&self, filter: &str) -> anyhow::Result<()> {
        Ok(self.filter.reload(filter.parse::<Targets>()?)?)
    }
}

/// Sends the log of this process to standard error. Only the program calls it, since it is process-wide.
///
/// A thread of its own writes the lines, so that a log reader that stalls holds up no request; lines that don't fit into
/// the queue are dropped.
pub(crate) fn start(settings: &settings::LogSettings) -> anyhow::Result<Log> {
    let (filter, handle) = reload::Layer::new(settings.filter.parse()?);
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(QUEUED_LINES)
        .thread_name("log")
        .finish(std::io::stderr());
    let colours = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(colours);
    let lines = match settings.format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
        LogFormat::Combined => lines.event_format(CombinedFormat(Format::default())).boxed(),
    };
    tracing_subscriber::registry().with(lines.with_filter(filter)).try_init()?;
    Ok(Log { filter: handle, _guard: guard })
}

/// Writes the lines about requests, which come in their format already, as they are, and all others as text.
struct CombinedFormat(Format);

impl<S, N> FormatEvent<S, N> for CombinedFormat
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        // A failed request is a warning, with its cause.
        if metadata.target() != ACCESS || *metadata.level() != Level::INFO {
            return self.0.format_event(context, writer, event);
        }
        let mut message = Message { writer: writer.by_ref(), result: Ok(()) };
        event.record(&mut message);
        message.result?;
        writeln!(writer)
    }
}

/// Writes the message of an event, and no field.
struct Message<'a> {
    writer: Writer<'a>,
    result: fmt::Result,
}

impl Visit for Message<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.result = write!(self.writer, "{value:?}");
        }
    }
}

/// Longest queue of lines that wait for a stalled log reader.
const QUEUED_LINES: usize = 32 * 1024;
