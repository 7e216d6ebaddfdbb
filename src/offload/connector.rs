//! Connections to the object store: those of `object_store`, with the trace of the request that they serve.

use std::pin::Pin;

use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
};

use crate::trace;

/// Connects as `object_store` does by itself.
#[derive(Debug, Default)]
pub(super) struct TracingConnector(ReqwestConnector);

impl HttpConnector for TracingConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(TracingClient(self.0.connect(options)?)))
    }
}

/// Adds `traceparent` and `tracestate`. The signature of a request covers neither.
#[derive(Debug)]
struct TracingClient(HttpClient);

impl HttpService for TracingClient {
    fn call<'life0, 'async_trait>(
        &'life0 self,
        mut request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'async_trait>>
    where
        'life0: 'async_trait,
        Self: 'async_trait,
    {
        if let Some(trace) = trace::current() {
            request.headers_mut().extend(trace.fields());
        }
        Box::pin(self.0.execute(request))
    }
}
