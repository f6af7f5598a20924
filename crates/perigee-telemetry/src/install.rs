//! Sets up what a process logs and which spans it sends, once, before anything else runs.

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::JsonFields;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

use crate::export::{Export, Service};
use crate::json_lines::JsonLines;
use crate::logs::{LogFormat, LogOptions, LogsError};
use crate::options::TelemetryOptions;

/// Logs or traces that cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// Logs.
    #[error(transparent)]
    Logs(#[from] LogsError),
    /// Traces.
    #[error("--otlp-endpoint: {reason}")]
    Export {
        /// What is wrong with it.
        reason: String,
    },
    /// Something was set up before.
    #[error("logs are set up twice: {reason}")]
    Twice {
        /// What the library said.
        reason: String,
    },
}

/// What a process has set up. Keep it to the end: then the last spans still leave.
#[derive(Debug)]
#[must_use = "spans leave as long as it lives"]
pub struct Telemetry {
    _export: Option<Export>,
}

type Lines = Box<dyn Layer<Registry> + Send + Sync>;

impl TelemetryOptions {
    /// Sends this process's logs to standard error and its spans to the collector, if there is one. Once a process.
    ///
    /// # Errors
    /// [`TelemetryError`] for options that cannot be used, and for a second call.
    pub fn install(&self, service: Service) -> Result<Telemetry, TelemetryError> {
        let begin = |endpoint: &String| Export::begin(endpoint, self.otlp_sample, service);
        let export = self.otlp_endpoint.as_ref().map(begin).transpose()?;
        let spans = export.as_ref().map(|export| {
            let layer = tracing_opentelemetry::layer()
                .with_tracer(export.tracer())
                .with_location(false)
                .with_threads(false)
                .with_tracked_inactivity(false)
                .with_level(false)
                .with_target(false);
            // What the program says of itself, not what its libraries do while they send it.
            layer.with_filter(Targets::new().with_target("perigee", LevelFilter::INFO))
        });
        let registry = tracing_subscriber::registry().with(lines(&self.logs())?).with(spans);
        registry.try_init().map_err(|error| TelemetryError::Twice { reason: error.to_string() })?;
        Ok(Telemetry { _export: export })
    }
}

fn lines(options: &LogOptions) -> Result<Lines, LogsError> {
    let filter = options.targets()?;
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    Ok(match options.format {
        LogFormat::Text => lines.with_filter(filter).boxed(),
        LogFormat::Json => lines.fmt_fields(JsonFields::new()).event_format(JsonLines).with_filter(filter).boxed(),
    })
}
