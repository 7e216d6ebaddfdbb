//! Spans, exported by OTLP over HTTP: one for each request, and below it those of the fetches and renders that it waited for.
//!
//! The settings are the standard variables of OpenTelemetry (`OTEL_EXPORTER_OTLP_ENDPOINT` and others), so they belong to the
//! process, as the log does. A thread of the SDK's exports spans in batches. Its queue is bounded: where the collector is slow or
//! away, spans are dropped and no request waits.

use std::pin::Pin;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use axum::http::{HeaderValue, Method, Request, Response, StatusCode, Version};
use bytes::Bytes;
use opentelemetry::trace::{
    Span as _, SpanBuilder, SpanContext, SpanId, SpanKind, Status, TraceContextExt as _,
    TraceFlags, TraceId, TraceState, Tracer as _, TracerProvider as _,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_http::{HttpClient, HttpError};
use opentelemetry_otlp::{SpanExporter, WithHttpConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider, Span};
use tokio::runtime::Handle;

use crate::http::in_flight::method_name;
use crate::peer::Client;
use crate::trace::{self, TraceContext};

/// Longest time that a stop waits for the last spans to be exported.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);

/// Time-out of an export, unless `OTEL_EXPORTER_OTLP_TIMEOUT` is another.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest text of a client's in a span, in characters.
const LONGEST_TEXT: usize = 1024;

/// The process-wide tracer, once it was started.
static TRACER: OnceLock<SdkTracer> = OnceLock::new();

/// Starts exporting, if the environment names a collector. Only the program calls it, since it is process-wide.
pub(crate) fn start() -> anyhow::Result<Option<Exporting>> {
    let is = |name: &str, value: &str| given(name).is_some_and(|it| it.eq_ignore_ascii_case(value));
    let has_collector = ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"]
        .into_iter()
        .any(|name| given(name).is_some());
    if !has_collector || is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
        return Ok(None);
    }
    crate::store::install_tls_provider();
    let exporter = SpanExporter::builder()
        .with_http()
        .with_http_client(ExportClient::new()?)
        .build()
        .context(
            "spans can't be exported by OTLP: the variables OTEL_EXPORTER_OTLP_… must be right",
        )?;
    let mut resource = Resource::builder()
        .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
    let names_service =
        given("OTEL_RESOURCE_ATTRIBUTES").is_some_and(|it| it.contains("service.name="));
    if given("OTEL_SERVICE_NAME").is_none() && !names_service {
        resource = resource.with_service_name("afterimage");
    }
    let provider = SdkTracerProvider::builder()
        .with_resource(resource.build())
        .with_batch_exporter(exporter)
        .build();
    let _ = TRACER.set(provider.tracer("afterimage"));
    tracing::info!("spans are exported by OTLP");
    Ok(Some(Exporting(provider)))
}

/// Exports the spans that are left, when it is dropped.
#[must_use]
pub(crate) struct Exporting(SdkTracerProvider);

impl Drop for Exporting {
    fn drop(&mut self) {
        if let Err(error) = self.0.shutdown_with_timeout(FLUSH_TIMEOUT) {
            tracing::warn!(%error, "the last spans can't be exported");
        }
    }
}

/// Returns a variable of the environment, if it isn't empty.
fn given(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|it| !it.is_empty())
}

/// The span of a request. It ends when it is dropped.
#[derive(Debug)]
pub(crate) struct RequestSpan(Box<Span>);

/// The parts of a request that are known when its span begins.
#[derive(Debug)]
pub(crate) struct Begun<'a> {
    /// The span of its client.
    pub(crate) parent: Option<TraceContext>,
    pub(crate) began: Instant,
    pub(crate) method: &'a Method,
    pub(crate) route: &'static str,
    pub(crate) target: &'a str,
    pub(crate) version: Version,
    pub(crate) client: Client,
}

impl RequestSpan {
    /// Begins the span of a request, if spans are exported. Its attributes are those of the semantic conventions for HTTP.
    pub(crate) fn begin(begun: &Begun<'_>) -> Option<RequestSpan> {
        let tracer = TRACER.get()?;
        let parent = begun.parent.map_or_else(Context::new, |it| below(it, true));
        let method = method_name(begun.method);
        let (path, query) = begun.target.split_once('?').unwrap_or((begun.target, ""));
        let cut = |text: &str| text.chars().take(LONGEST_TEXT).collect::<String>();
        let protocol = match begun.version {
            Version::HTTP_2 => "2",
            Version::HTTP_10 => "1.0",
            _ => "1.1",
        };
        let mut attributes = vec![
            KeyValue::new("http.request.method", method),
            KeyValue::new("http.route", begun.route),
            KeyValue::new("url.path", cut(path)),
            KeyValue::new("network.protocol.version", protocol),
        ];
        if !query.is_empty() {
            attributes.push(KeyValue::new("url.query", cut(query)));
        }
        if let Some(address) = begun.client.forwarded().or(begun.client.peer().ip()) {
            attributes.push(KeyValue::new("client.address", address.to_string()));
        }
        let builder = SpanBuilder::from_name(format!("{method} {}", begun.route))
            .with_kind(SpanKind::Server)
            .with_start_time(SystemTime::now() - begun.began.elapsed())
            .with_attributes(attributes);
        Some(RequestSpan(Box::new(tracer.build_with_context(builder, &parent))))
    }

    /// Returns its place in the trace.
    pub(crate) fn context(&self) -> TraceContext {
        let context = self.0.span_context();
        TraceContext {
            trace_id: context.trace_id().to_bytes(),
            span_id: context.span_id().to_bytes(),
            flags: context.trace_flags().to_u8(),
        }
    }

    /// Adds what is known with the answer. `error` is the cause of a failure of the server.
    pub(crate) fn answered(
        mut self,
        status: StatusCode,
        cache: Option<&HeaderValue>,
        error: Option<&str>,
    ) -> RequestSpan {
        let span = &mut self.0;
        span.set_attribute(KeyValue::new("http.response.status_code", i64::from(status.as_u16())));
        if let Some(cache) = cache.and_then(|it| it.to_str().ok()) {
            span.set_attribute(KeyValue::new(
                "http.response.header.cache-status",
                cache.to_owned(),
            ));
        }
        // A client's mistake is no error of this span.
        if status.is_server_error() {
            span.set_attribute(KeyValue::new("error.type", status.as_str().to_owned()));
            span.set_status(Status::error(error.unwrap_or_default().to_owned()));
        }
        self
    }

    /// Ends it, after so many bytes of the body.
    pub(crate) fn end(mut self, bytes: u64) {
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.0.set_attribute(KeyValue::new("http.response.body.size", bytes));
    }
}

/// A step of the request that is being answered. Its span ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Step {
    #[expect(dead_code, reason = "ends when it is dropped")]
    span: Option<Box<Span>>,
}

impl Step {
    /// Begins a step.
    pub(crate) fn begin(name: &'static str) -> Step {
        let span = TRACER.get().zip(trace::current()).map(|(tracer, trace)| {
            let builder = SpanBuilder::from_name(name).with_kind(SpanKind::Internal);
            Box::new(tracer.build_with_context(builder, &below(trace.context, false)))
        });
        Step { span }
    }
}

/// Returns the context of spans below another one.
fn below(parent: TraceContext, is_remote: bool) -> Context {
    Context::new().with_remote_span_context(SpanContext::new(
        TraceId::from_bytes(parent.trace_id),
        SpanId::from_bytes(parent.span_id),
        TraceFlags::new(parent.flags),
        is_remote,
        TraceState::NONE,
    ))
}

/// Sends exports with the HTTP client that is here already. It works in the runtime, which the SDK's thread isn't in.
#[derive(Debug)]
struct ExportClient {
    client: reqwest::Client,
    runtime: Handle,
}

impl ExportClient {
    fn new() -> anyhow::Result<ExportClient> {
        let timeout = ["OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"]
            .into_iter()
            .find_map(|name| given(name)?.parse().ok().map(Duration::from_millis));
        let client = reqwest::Client::builder()
            .timeout(timeout.unwrap_or(EXPORT_TIMEOUT))
            // The headers may have a secret.
            .redirect(reqwest::redirect::Policy::none())
            .build()?;
        Ok(ExportClient { client, runtime: Handle::current() })
    }
}

impl HttpClient for ExportClient {
    fn send_bytes<'life0, 'async_trait>(
        &'life0 self,
        request: Request<Bytes>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Bytes>, HttpError>> + Send + 'async_trait>>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        let client = self.client.clone();
        let sent = self.runtime.spawn(async move {
            let mut response = client.execute(request.try_into()?).await?;
            let mut answer = Response::new(Bytes::new());
            *answer.status_mut() = response.status();
            *answer.headers_mut() = std::mem::take(response.headers_mut());
            *answer.body_mut() = response.bytes().await?;
            Ok::<_, reqwest::Error>(answer)
        });
        Box::pin(async move { Ok(sent.await??) })
    }
}
