//! Sends spans to a collector by OTLP over gRPC. Ended spans wait in a bounded queue that a thread of its own empties: who
//! ends a span never waits, and what a slow or missing collector does not take is dropped.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry::trace::TracerProvider;
use opentelemetry_otlp::{SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{
    BatchConfigBuilder, BatchSpanProcessor, Sampler, SdkTracer, SdkTracerProvider, SpanData,
};
use tokio::runtime::Runtime;

use crate::install::TelemetryError;

/// How long ended spans wait for others to go with.
const DELAY: Duration = Duration::from_millis(500);
/// Ended spans that may wait, some seconds of a busy router.
const QUEUE: usize = 8192;
/// How long a collector may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the end of a process waits for its last spans to leave.
const FAREWELL: Duration = Duration::from_secs(1);

/// Who sends: what a collector shows beside every span.
#[derive(Debug, Clone)]
pub struct Service {
    /// Name of the role.
    pub name: &'static str,
    /// Further facts, such as replica and rank.
    pub facts: Vec<(&'static str, String)>,
}

/// A process's way to a collector. Dropped, it sends what is left, for a moment.
#[derive(Debug)]
pub(crate) struct Export {
    provider: SdkTracerProvider,
    /// Carries the connection; the queue's thread waits for it.
    _runtime: Runtime,
}

impl Export {
    /// Begins to send; the collector need not be there yet.
    ///
    /// # Errors
    /// [`TelemetryError`] for an endpoint that is no address, or without a thread.
    pub(crate) fn begin(endpoint: &str, sample: f64, service: Service) -> Result<Self, TelemetryError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("perigee-traces")
            .enable_all()
            .build()
            .map_err(|error| TelemetryError::Export { reason: error.to_string() })?;
        let exporter = {
            let _inside = runtime.enter();
            let builder = SpanExporter::builder().with_tonic().with_endpoint(endpoint).with_timeout(PATIENCE);
            builder.build().map_err(|error| TelemetryError::Export { reason: error.to_string() })?
        };
        let batches = BatchConfigBuilder::default().with_max_queue_size(QUEUE).with_scheduled_delay(DELAY).build();
        let processor = BatchSpanProcessor::builder(Telling::new(exporter)).with_batch_config(batches).build();
        let facts = service.facts.into_iter().map(|(name, value)| KeyValue::new(name, value));
        let resource = Resource::builder_empty()
            .with_attribute(KeyValue::new("service.name", service.name))
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")))
            .with_attribute(KeyValue::new("process.pid", i64::from(std::process::id())))
            .with_attributes(facts)
            .build();
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(sample))))
            .with_resource(resource)
            .build();
        Ok(Self { provider, _runtime: runtime })
    }

    pub(crate) fn tracer(&self) -> SdkTracer {
        self.provider.tracer("perigee")
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        // Whoever ends does not wait longer for a collector; the log has its failures already.
        let _ = self.provider.shutdown_with_timeout(FAREWELL);
    }
}

/// An exporter whose failures are told, once until it works again.
#[derive(Debug)]
struct Telling {
    inner: SpanExporter,
    is_failing: AtomicBool,
}

impl Telling {
    fn new(inner: SpanExporter) -> Self {
        Self { inner, is_failing: AtomicBool::new(false) }
    }
}

impl opentelemetry_sdk::trace::SpanExporter for Telling {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let result = self.inner.export(batch).await;
        let was_failing = self.is_failing.swap(result.is_err(), Ordering::Relaxed);
        match &result {
            Err(error) if !was_failing => tracing::warn!(%error, "traces do not reach their collector and are dropped"),
            Ok(()) if was_failing => tracing::info!("traces reach their collector again"),
            _ => {}
        }
        result
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}
