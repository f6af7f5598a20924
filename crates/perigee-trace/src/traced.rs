//! A span that goes on from a place in a trace, which may be another process's.

use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt;

use crate::TraceContext;

/// A span, and the place in its trace that others go on from. Clones are the same span, which ends with the last of them.
#[derive(Debug, Clone)]
pub struct Traced {
    span: Span,
    context: TraceContext,
    parent: Option<TraceContext>,
}

impl Traced {
    /// Places a new span: below `parent`, or as the first of a trace where there is none. A span with a field `trace_id`
    /// gets it, so that log lines have it too.
    ///
    /// `span` must be new and made without a parent (`parent: None`): one that has begun already cannot be placed.
    pub fn open(span: Span, parent: Option<&TraceContext>) -> Self {
        if let Some(parent) = parent {
            // An error says that nobody exports spans; the context goes on all the same.
            let _ = span.set_parent(parent.remote());
        }
        let known = TraceContext::of(&span).or(parent.copied());
        let context = known.unwrap_or_else(TraceContext::unrecorded);
        span.record("trace_id", context.trace_id());
        Self { span, context, parent: parent.copied() }
    }

    /// The span: the parent of spans and of log lines.
    pub fn span(&self) -> &Span {
        &self.span
    }

    /// Its place, for another process.
    pub fn context(&self) -> &TraceContext {
        &self.context
    }

    /// The place that it goes on from; none for the first span of a trace.
    pub fn parent(&self) -> Option<&TraceContext> {
        self.parent.as_ref()
    }

    /// Notes on the span that what it stands for failed.
    pub fn fail(&self, why: &str) {
        self.span.record("otel.status_code", "error");
        self.span.record("otel.status_description", why);
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::TracerProvider;
    use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    fn span() -> Span {
        tracing::error_span!(parent: None, "request", trace_id = tracing::field::Empty)
    }

    fn parent() -> TraceContext {
        "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".parse().expect("a context")
    }

    /// Spans as an exporter would know them, recorded as `sampler` says.
    fn exporting<T>(sampler: Sampler, body: impl FnOnce() -> T) -> T {
        let provider = SdkTracerProvider::builder().with_sampler(sampler).build();
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("test"));
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), body)
    }

    #[test]
    fn without_an_exporter_the_callers_place_goes_on() {
        assert_eq!(*Traced::open(span(), Some(&parent())).context(), parent());
        assert!(!Traced::open(span(), None).context().is_sampled());
    }

    #[test]
    fn a_span_goes_on_from_its_parent_in_the_same_trace() {
        exporting(Sampler::ParentBased(Box::new(Sampler::AlwaysOff)), || {
            let traced = Traced::open(span(), Some(&parent()));
            assert_eq!(traced.context().trace_id(), parent().trace_id());
            assert_ne!(*traced.context(), parent(), "it is a span of its own");
            assert!(traced.context().is_sampled(), "as its parent");
            let child = tracing::info_span!(parent: traced.span(), "phase");
            let place = TraceContext::of(&child).expect("a place");
            assert_eq!(place.trace_id(), parent().trace_id());
            // The sampler decides over traces that begin here.
            assert!(!Traced::open(span(), None).context().is_sampled());
        });
        exporting(Sampler::AlwaysOn, || assert!(Traced::open(span(), None).context().is_sampled()));
    }
}
