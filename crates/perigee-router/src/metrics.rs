//! What a router measures: the times and counts that its clients see. Names and help are telemetry's.

use perigee_telemetry::metrics::{self as table, Histogram, IntCounter, IntGauge, Metrics, MetricsError};

/// Metrics of one router.
#[derive(Debug, Clone)]
pub(crate) struct RouterMetrics {
    pub(crate) ttft: Histogram,
    pub(crate) tpot: Histogram,
    pub(crate) running: IntGauge,
    pub(crate) waiting: IntGauge,
    pub(crate) prompt_tokens: IntCounter,
    pub(crate) completion_tokens: IntCounter,
}

impl RouterMetrics {
    /// Registers them. Those of moves are registered too, at zero until sessions move.
    pub(crate) fn register(metrics: &Metrics) -> Result<Self, MetricsError> {
        let tokens = metrics.counters(&table::TOKENS_TOTAL)?;
        metrics.counters(&table::MIGRATIONS_TOTAL)?;
        metrics.histogram(&table::MIGRATION_STALL_SECONDS)?;
        metrics.counters(&table::MIGRATION_BYTES_TOTAL)?;
        Ok(Self {
            ttft: metrics.histogram(&table::TTFT_SECONDS)?,
            tpot: metrics.histogram(&table::TPOT_SECONDS)?,
            running: metrics.gauge(&table::REQUESTS_RUNNING)?,
            waiting: metrics.gauge(&table::REQUESTS_WAITING)?,
            prompt_tokens: tokens.with_label_values(&["prompt"]),
            completion_tokens: tokens.with_label_values(&["completion"]),
        })
    }
}
