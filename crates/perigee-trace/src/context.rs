//! A place in a trace, as the header `traceparent` says it: <https://www.w3.org/TR/trace-context/#traceparent-header>.

use std::fmt;
use std::str::FromStr;

use opentelemetry::Context;
use opentelemetry::trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState};
use serde::{Deserialize, Serialize};
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

/// Length of a version 00 header.
const LENGTH: usize = 55;
/// The flag of a trace that is recorded.
const SAMPLED: u8 = 1;

/// Which trace, which span of it, and whether it is recorded. Neither id is zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceContext {
    trace_id: u128,
    span_id: u64,
    is_sampled: bool,
}

/// A header that says nothing: whoever reads it begins a trace of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InvalidTraceParent;

impl fmt::Display for InvalidTraceParent {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("expected VERSION-TRACE-SPAN-FLAGS in lower-case hexadecimal, as W3C Trace Context has it")
    }
}

impl std::error::Error for InvalidTraceParent {}

impl TraceContext {
    /// A trace that nobody records, where none came with a request: its id still joins the log lines of all processes.
    pub(crate) fn unrecorded() -> Self {
        // Ids need not be secret, and a request must not fail for want of one.
        let word = || getrandom::u64().unwrap_or(1).max(1);
        Self { trace_id: u128::from(word()) << 64 | u128::from(word()), span_id: word(), is_sampled: false }
    }

    /// The place of a span that an exporter knows; none where there is no exporter.
    pub(crate) fn of(span: &Span) -> Option<Self> {
        let context = span.context();
        let (span, is_valid) = (context.span(), context.has_active_span());
        let place = span.span_context();
        (is_valid && place.is_valid()).then(|| Self {
            trace_id: u128::from_be_bytes(place.trace_id().to_bytes()),
            span_id: u64::from_be_bytes(place.span_id().to_bytes()),
            is_sampled: place.is_sampled(),
        })
    }

    /// The same for OpenTelemetry, as of another process.
    pub(crate) fn remote(&self) -> Context {
        let flags = if self.is_sampled { TraceFlags::SAMPLED } else { TraceFlags::NOT_SAMPLED };
        let (trace, span) = (TraceId::from(self.trace_id), SpanId::from(self.span_id));
        Context::new().with_remote_span_context(SpanContext::new(trace, span, flags, true, TraceState::NONE))
    }

    /// The trace's id as headers and logs have it: 32 hexadecimal digits.
    pub fn trace_id(&self) -> String {
        format!("{:032x}", self.trace_id)
    }

    /// Whether the trace is recorded.
    pub fn is_sampled(&self) -> bool {
        self.is_sampled
    }
}

impl fmt::Display for TraceContext {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "00-{:032x}-{:016x}-{:02x}", self.trace_id, self.span_id, u8::from(self.is_sampled))
    }
}

impl FromStr for TraceContext {
    type Err = InvalidTraceParent;

    /// Reads version 00, and of later versions what they have in common with it.
    fn from_str(text: &str) -> Result<Self, InvalidTraceParent> {
        let mut parts = text.splitn(5, '-');
        let mut part = |digits| parts.next().and_then(|part| hexadecimal(part, digits)).ok_or(InvalidTraceParent);
        let (version, trace_id, span_id, flags) = (part(2)?, part(32)?, part(16)?, part(2)?);
        let is_too_long = version == 0 && text.len() != LENGTH;
        if version == 0xff || is_too_long || trace_id == 0 || span_id == 0 {
            return Err(InvalidTraceParent);
        }
        Ok(Self { trace_id, span_id: span_id as u64, is_sampled: flags as u8 & SAMPLED != 0 })
    }
}

fn hexadecimal(text: &str, digits: usize) -> Option<u128> {
    let is_lower = text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    if text.len() == digits && is_lower { u128::from_str_radix(text, 16).ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn a_header_comes_back_as_it_was() {
        let context: TraceContext = EXAMPLE.parse().expect("the specification's own");
        assert_eq!(context.to_string(), EXAMPLE);
        assert_eq!(context.trace_id(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert!(context.is_sampled());
        // Other flags than the one that is known are not passed on.
        let unsampled: TraceContext = EXAMPLE.replace("-01", "-02").parse().expect("flags");
        assert!(!unsampled.is_sampled());
        assert_eq!(unsampled.to_string(), EXAMPLE.replace("-01", "-00"));
    }

    #[test]
    fn later_versions_are_read_and_what_is_no_header_is_not() {
        let later = EXAMPLE.replacen("00", "cc", 1) + "-what-the-future-will-be";
        assert_eq!(later.parse::<TraceContext>(), EXAMPLE.parse());
        for bad in [
            String::new(),
            EXAMPLE[..54].to_owned(),
            format!("{EXAMPLE}-00"),
            format!("{EXAMPLE}0"),
            EXAMPLE.replacen("00", "ff", 1),
            EXAMPLE.to_uppercase(),
            EXAMPLE.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            EXAMPLE.replace("00f067aa0ba902b7", &"0".repeat(16)),
            EXAMPLE.replace("00f067aa0ba902b7", "+0f067aa0ba902b7"),
            EXAMPLE.replace('-', "_"),
        ] {
            assert_eq!(bad.parse::<TraceContext>(), Err(InvalidTraceParent), "{bad:?}");
        }
    }

    #[test]
    fn made_contexts_are_valid_and_differ() {
        let (one, other) = (TraceContext::unrecorded(), TraceContext::unrecorded());
        assert_ne!(one, other);
        assert_eq!(one.to_string().parse(), Ok(one));
        assert!(!one.is_sampled());
    }
}
