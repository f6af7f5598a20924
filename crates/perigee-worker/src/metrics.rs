//! What a leader measures: its engine's steps, queues and caches. Names and help are telemetry's; the engine calls the
//! observer from its step loop, so nothing here blocks.

use std::time::Duration;

use perigee_engine::observer::{EngineObserver, Preemption, StepPhase, TokenKind};
use perigee_engine::request::Load;
use perigee_telemetry::metrics::{
    self as table, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Metrics, MetricsError,
};

/// Metrics of one replica.
#[derive(Debug, Clone)]
pub struct WorkerMetrics {
    queue: Histogram,
    steps: HistogramVec,
    running: IntGauge,
    waiting: IntGauge,
    tokens: IntCounterVec,
    slots: IntGaugeVec,
    pages: IntGaugeVec,
    preemptions: IntCounter,
}

impl WorkerMetrics {
    /// Registers them. Those of other replicas' queries and of cached prefixes are registered too, at zero until there
    /// are such.
    ///
    /// # Errors
    /// [`MetricsError`] where they are registered already.
    pub fn register(metrics: &Metrics) -> Result<Self, MetricsError> {
        metrics.histogram(&table::REMOTE_ATTENTION_SECONDS)?;
        metrics.counters(&table::PREFIX_TOKENS_TOTAL)?;
        metrics.counters(&table::MIGRATION_BYTES_TOTAL)?;
        Ok(Self {
            queue: metrics.histogram(&table::QUEUE_SECONDS)?,
            steps: metrics.histograms(&table::STEP_SECONDS_BY_PHASE)?,
            running: metrics.gauge(&table::REQUESTS_RUNNING)?,
            waiting: metrics.gauge(&table::REQUESTS_WAITING)?,
            tokens: metrics.counters(&table::TOKENS_TOTAL)?,
            slots: metrics.gauges(&table::STATE_SLOTS)?,
            pages: metrics.gauges(&table::LATENT_PAGES)?,
            preemptions: metrics.counter(&table::PREEMPTIONS_TOTAL)?,
        })
    }

    /// Takes over a load.
    pub fn show(&self, load: &Load) {
        self.running.set(load.running.into());
        self.waiting.set((load.waiting + load.parked).into());
        for (gauge, free, total) in
            [(&self.slots, load.slots_free, load.slots_total), (&self.pages, load.pages_free, load.pages_total)]
        {
            gauge.with_label_values(&["free"]).set(free.into());
            gauge.with_label_values(&["total"]).set(total.into());
        }
    }
}

impl EngineObserver for WorkerMetrics {
    fn queued(&self, wait: Duration) {
        self.queue.observe(wait.as_secs_f64());
    }

    fn stepped(&self, phase: StepPhase, time: Duration) {
        let phase = match phase {
            StepPhase::Prefill => "prefill",
            StepPhase::Decode => "decode",
            StepPhase::Mixed => "mixed",
        };
        self.steps.with_label_values(&[phase]).observe(time.as_secs_f64());
    }

    fn preempted(&self, _how: Preemption) {
        self.preemptions.inc();
    }

    fn tokens(&self, kind: TokenKind, count: u64) {
        let kind = match kind {
            TokenKind::Prompt => "prompt",
            TokenKind::Completion => "completion",
        };
        self.tokens.with_label_values(&[kind]).inc_by(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_engines_measurements_arrive_under_their_names() {
        let metrics = Metrics::default();
        let worker = WorkerMetrics::register(&metrics).expect("registered");
        worker.queued(Duration::from_millis(3));
        worker.stepped(StepPhase::Mixed, Duration::from_millis(20));
        worker.preempted(Preemption::Parked);
        worker.tokens(TokenKind::Completion, 7);
        worker.show(&Load { slots_free: 3, slots_total: 8, running: 5, waiting: 1, parked: 1, ..Load::default() });
        let text = metrics.text().expect("written");
        for line in [
            "perigee_queue_seconds_count 1",
            "perigee_step_seconds_count{phase=\"mixed\"} 1",
            "perigee_preemptions_total 1",
            "perigee_tokens_total{kind=\"completion\"} 7",
            "perigee_state_slots{kind=\"free\"} 3",
            "perigee_state_slots{kind=\"total\"} 8",
            "perigee_requests_running 5",
            "perigee_requests_waiting 2",
            "perigee_prefix_tokens_total{result=\"hit\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in {text}");
        }
    }
}
