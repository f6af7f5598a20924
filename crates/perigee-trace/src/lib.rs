//! One trace of a request from its client to the ranks: the context that goes from process to process (W3C Trace Context),
//! and spans that go on from one. Where spans are sent, and whether at all, is telemetry's affair; without that, contexts go
//! on all the same, and log lines carry the trace's id.

mod context;
mod traced;

pub use context::{InvalidTraceParent, TraceContext};
pub use traced::Traced;

/// Name of the header, and of the gRPC metadata key, that a context travels in.
pub const TRACEPARENT: &str = "traceparent";
