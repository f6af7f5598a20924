//! Logs, metric names, request spans and probes: what an operator sees of every process, named once. It measures nothing
//! itself.

pub mod logs;
pub mod metrics;
pub mod probes;

pub use logs::{LogFormat, LogOptions, LogsError, request_span};
pub use metrics::{Metrics, MetricsError};
pub use probes::Readiness;
