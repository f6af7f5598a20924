//! Logs, traces, metric names and probes: what an operator sees of every process, named once. It measures nothing itself.

mod export;
mod install;
mod json_lines;
pub mod logs;
pub mod metrics;
mod options;
pub mod probes;

pub use export::Service;
pub use install::{Telemetry, TelemetryError};
pub use logs::{LogFormat, LogOptions, LogsError};
pub use metrics::{Metrics, MetricsError};
pub use options::TelemetryOptions;
pub use probes::Readiness;
