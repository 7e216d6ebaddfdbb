//! The log of the process, on standard error.

use std::io::IsTerminal;

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::settings::{self, LogFormat};

/// Sends the log of this process to standard error. Only the program calls it, since it is process-wide.
///
/// A thread of its own writes the lines, so that a log reader that stalls holds up no request; lines that don't fit into
/// the queue are dropped. The rest of the queue is written when the guard is dropped.
pub(crate) fn start(settings: &settings::LogSettings) -> anyhow::Result<WorkerGuard> {
    let filter: Targets = settings.filter.parse()?;
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(QUEUED_LINES)
        .thread_name("log")
        .finish(std::io::stderr());
    let colours = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(colours);
    let lines = match settings.format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    tracing_subscriber::registry().with(lines.with_filter(filter)).try_init()?;
    Ok(guard)
}

/// Longest queue of lines that wait for a stalled log reader.
const QUEUED_LINES: usize = 32 * 1024;
