//! A rank's part in traces: a span for the time that a session steps here, with the number of steps meanwhile.

use std::collections::HashMap;

use perigee_trace::Traced;
use tracing::field::Empty;

use crate::traces::TraceNotes;

/// Spans of the sessions that step here and are traced.
#[derive(Debug, Default)]
pub(super) struct RankTraces {
    spans: HashMap<u64, (Traced, u64)>,
    /// Steps since the start.
    steps: u64,
}

impl RankTraces {
    pub(super) fn stepped(&mut self) {
        self.steps += 1;
    }

    pub(super) fn take(&mut self, notes: &TraceNotes) {
        for key in &notes.ended {
            if let Some((traced, since)) = self.spans.remove(key) {
                traced.span().record("steps", (self.steps - since) as i64);
            }
        }
        for (key, context) in &notes.begun {
            let span = tracing::info_span!(parent: None, "rank", steps = Empty, trace_id = Empty);
            self.spans.insert(*key, (Traced::open(span, Some(context)), self.steps));
        }
    }
}
