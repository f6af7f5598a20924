//! A request's span at the front door: it goes on from where the client is in its trace, and replicas go on from it. What
//! happens to the request on its way (moves, replays, its end) is told as log lines within it.

use std::convert::Infallible;

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use perigee_proto::status::{ErrorKind, WireError};
use perigee_trace::{TRACEPARENT, TraceContext, Traced};
use tonic::metadata::MetadataMap;
use tracing::field::Empty;

/// Begins the span of a call by the client's word on where it belongs; without a good one it begins a trace.
fn begin(call: &str, traceparent: Option<&str>) -> Traced {
    let parent: Option<TraceContext> = traceparent.and_then(|text| text.parse().ok());
    // Of the level of errors, so that every line about a request has its ids, whatever else is logged.
    let span = tracing::error_span!(
        parent: None,
        "request",
        otel.name = call,
        otel.kind = "server",
        otel.status_code = Empty,
        otel.status_description = Empty,
        trace_id = Empty,
        request_id = Empty,
    );
    Traced::open(span, parent.as_ref())
}

/// The span of a gRPC call.
pub(crate) fn of_call(call: &'static str, metadata: &MetadataMap) -> Traced {
    begin(call, metadata.get(TRACEPARENT).and_then(|value| value.to_str().ok()))
}

/// The span of an HTTP call.
#[derive(Debug)]
pub(crate) struct HttpTrace(pub(crate) Traced);

impl<S: Sync> FromRequestParts<S> for HttpTrace {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, Infallible> {
        let call = format!("{} {}", parts.method, parts.uri.path());
        Ok(Self(begin(&call, parts.headers.get(TRACEPARENT).and_then(|value| value.to_str().ok()))))
    }
}

/// Notes how a call failed, where that is the cluster's fault and not the client's.
pub(crate) fn note_failure(traced: &Traced, error: &WireError) {
    match error.kind {
        ErrorKind::Internal | ErrorKind::Unavailable | ErrorKind::DeadlineExceeded => traced.fail(&error.message),
        _ => {}
    }
}
