//! What a leader measures: its engine's steps, queues and caches. Names and help are telemetry's; the engine calls the
//! observer from its step loop, so nothing here blocks.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use perigee_engine::moves::Way;
use perigee_engine::observer::{EngineObserver, MoveRecord, MoveResult, Preemption, StepPhase, TokenKind};
use perigee_engine::remote::RemoteCounts;
use perigee_engine::request::{Load, SessionId};
use perigee_migration::Mode;
use perigee_telemetry::metrics::{
    self as table, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Metrics, MetricsError,
};

use crate::pace::Pace;

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
    moves: IntCounterVec,
    stalls: Histogram,
    moved_bytes: IntCounterVec,
    state_bytes: IntCounterVec,
    asking: Histogram,
    pace: Arc<Mutex<Pace>>,
}

impl WorkerMetrics {
    /// Registers them. That of cached prefixes is registered too, at zero until there are such.
    ///
    /// # Errors
    /// [`MetricsError`] where they are registered already.
    pub fn register(metrics: &Metrics) -> Result<Self, MetricsError> {
        metrics.counters(&table::PREFIX_TOKENS_TOTAL)?;
        Ok(Self {
            queue: metrics.histogram(&table::QUEUE_SECONDS)?,
            steps: metrics.histograms(&table::STEP_SECONDS_BY_PHASE)?,
            running: metrics.gauge(&table::REQUESTS_RUNNING)?,
            waiting: metrics.gauge(&table::REQUESTS_WAITING)?,
            tokens: metrics.counters(&table::TOKENS_TOTAL)?,
            slots: metrics.gauges(&table::STATE_SLOTS)?,
            pages: metrics.gauges(&table::LATENT_PAGES)?,
            preemptions: metrics.counter(&table::PREEMPTIONS_TOTAL)?,
            moves: metrics.counters(&table::MIGRATIONS_TOTAL)?,
            stalls: metrics.histogram(&table::MIGRATION_STALL_SECONDS)?,
            moved_bytes: metrics.counters(&table::MIGRATION_BYTES_TOTAL)?,
            state_bytes: metrics.counters(&table::MIGRATION_STATE_BYTES_TOTAL)?,
            asking: metrics.histogram(&table::REMOTE_ATTENTION_SECONDS)?,
            pace: Arc::default(),
        })
    }

    /// How long steps take.
    pub(crate) fn pace(&self) -> Pace {
        *self.pace.lock()
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
        self.pace.lock().stepped(phase, time);
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
        if kind == TokenKind::Prompt {
            self.pace.lock().prefilled(count);
        }
        let kind = match kind {
            TokenKind::Prompt => "prompt",
            TokenKind::Completion => "completion",
        };
        self.tokens.with_label_values(&[kind]).inc_by(count);
    }

    /// Counts a move where it began, and tells it as the one event that has everything which is known here. The stall is
    /// the source's share of it: from the freeze until the target had verified everything.
    fn moved(&self, session: &SessionId, record: &MoveRecord) {
        let mode = match record.mode {
            Mode::Split => "split",
            Mode::Whole => "whole",
        };
        let result = match record.result {
            MoveResult::Moved => "done",
            MoveResult::Failed => "failed",
            MoveResult::Aborted => "aborted",
        };
        self.moves.with_label_values(&[mode, result]).inc();
        let Some(facts) = &record.facts else {
            tracing::info!(session = session.0, mode, result, "session not moved");
            return;
        };
        let bytes = &facts.bytes;
        for (kind, count) in [("state", bytes.state()), ("page", bytes.pages), ("token", bytes.tokens)] {
            self.moved_bytes.with_label_values(&[kind]).inc_by(count);
        }
        let way = match facts.way {
            Way::Stream => "grpc",
            Way::Slots => "ipc",
            Way::Pair => "pair",
        };
        self.state_bytes.with_label_values(&[way]).inc_by(bytes.recurrent + bytes.tails);
        self.stalls.observe(facts.frozen.as_secs_f64());
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        tracing::info!(
            session = session.0,
            mode,
            result,
            way,
            state_bytes = bytes.state(),
            page_bytes = bytes.pages,
            token_bytes = bytes.tokens,
            record_bytes = bytes.record,
            frozen_ms = millis(facts.frozen),
            export_ms = millis(facts.export),
            transfer_ms = millis(facts.frozen.saturating_sub(facts.export)),
            "session moved"
        );
    }

    fn followed(&self, bytes: u64) {
        self.moved_bytes.with_label_values(&["followed"]).inc_by(bytes);
    }

    fn asked(&self, counts: &RemoteCounts) {
        self.asking.observe(counts.wait.as_secs_f64());
        let bytes = counts.query_bytes + counts.answer_bytes;
        self.moved_bytes.with_label_values(&["attention"]).inc_by(bytes);
    }
}

#[cfg(test)]
mod tests {
    use perigee_engine::moves::MoveFacts;
    use perigee_migration::handoff::Totals;

    use super::*;

    #[test]
    fn the_engines_measurements_arrive_under_their_names() {
        let metrics = Metrics::default();
        let worker = WorkerMetrics::register(&metrics).expect("registered");
        worker.queued(Duration::from_millis(3));
        worker.stepped(StepPhase::Mixed, Duration::from_millis(20));
        worker.preempted(Preemption::Parked);
        worker.tokens(TokenKind::Completion, 7);
        let bytes = Totals { recurrent: 40, tails: 5, partial_pages: 3, pages: 600, tokens: 28, record: 90 };
        let (frozen, export) = (Duration::from_millis(30), Duration::from_millis(10));
        let facts = Some(MoveFacts { bytes, frozen, export, mode: Mode::Split, way: Way::Slots });
        let session = SessionId("s".to_owned());
        worker.moved(&session, &MoveRecord { mode: Mode::Split, result: MoveResult::Moved, facts });
        worker.moved(&session, &MoveRecord { mode: Mode::Whole, result: MoveResult::Failed, facts: None });
        let wait = Duration::from_millis(2);
        worker.asked(&RemoteCounts { query_bytes: 70, answer_bytes: 30, tokens: 1, wait });
        worker.followed(900);
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
            "perigee_migrations_total{mode=\"split\",result=\"done\"} 1",
            "perigee_migrations_total{mode=\"whole\",result=\"failed\"} 1",
            "perigee_migration_bytes_total{kind=\"state\"} 48",
            "perigee_migration_bytes_total{kind=\"page\"} 600",
            "perigee_migration_bytes_total{kind=\"token\"} 28",
            "perigee_migration_bytes_total{kind=\"attention\"} 100",
            "perigee_migration_bytes_total{kind=\"followed\"} 900",
            "perigee_migration_state_bytes_total{way=\"ipc\"} 45",
            "perigee_migration_stall_seconds_count 1",
            "perigee_migration_stall_seconds_sum 0.03",
            "perigee_remote_attention_seconds_count 1",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing in {text}");
        }
    }
}
