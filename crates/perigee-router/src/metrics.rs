//! What a router measures: the times and counts that its clients see. Names and help are telemetry's.

use perigee_telemetry::metrics::{
    self as table, Histogram, IntCounter, IntCounterVec, IntGauge, Metrics, MetricsError,
};

/// Metrics of one router.
#[derive(Debug, Clone)]
pub(crate) struct RouterMetrics {
    pub(crate) placement: Histogram,
    pub(crate) ttft: Histogram,
    pub(crate) tpot: Histogram,
    pub(crate) running: IntGauge,
    pub(crate) waiting: IntGauge,
    pub(crate) prompt_tokens: IntCounter,
    pub(crate) completion_tokens: IntCounter,
    /// By mode and result; a replay counts as a mode.
    pub(crate) migrations: IntCounterVec,
    pub(crate) migration_stall: Histogram,
    /// By kind.
    pub(crate) migration_bytes: IntCounterVec,
}

impl RouterMetrics {
    /// Registers them.
    pub(crate) fn register(metrics: &Metrics) -> Result<Self, MetricsError> {
        let tokens = metrics.counters(&table::TOKENS_TOTAL)?;
        Ok(Self {
            placement: metrics.histogram(&table::PLACEMENT_SECONDS)?,
            ttft: metrics.histogram(&table::TTFT_SECONDS)?,
            tpot: metrics.histogram(&table::TPOT_SECONDS)?,
            running: metrics.gauge(&table::REQUESTS_RUNNING)?,
            waiting: metrics.gauge(&table::REQUESTS_WAITING)?,
            prompt_tokens: tokens.with_label_values(&["prompt"]),
            completion_tokens: tokens.with_label_values(&["completion"]),
            migrations: metrics.counters(&table::MIGRATIONS_TOTAL)?,
            migration_stall: metrics.histogram(&table::MIGRATION_STALL_SECONDS)?,
            migration_bytes: metrics.counters(&table::MIGRATION_BYTES_TOTAL)?,
        })
    }
}
