//! Spans of sessions where they run, and what the ranks are told so that they have spans too. All of them go on from the
//! router's place in the request's trace and not from each other's: whichever process is lost, the trace of the others stays
//! connected. No span belongs to a step or a token.

use std::time::Instant;

use perigee_trace::{TraceContext, Traced};
use serde::{Deserialize, Serialize};
use tracing::field::Empty;

use crate::executor::ExecutorError;
use crate::scheduler::{PlannedRow, TaskId};
use crate::sequence::Sequence;
use crate::step::{EngineCore, Fatal, Session};

/// What ranks are told of traces, with the next step.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceNotes {
    /// Sessions that step here from now on, by a key of the leader's, each with its request's place in its trace.
    pub begun: Vec<(u64, TraceContext)>,
    /// Keys of those that do not any more.
    pub ended: Vec<u64>,
}

impl TraceNotes {
    /// Whether there is nothing to tell.
    pub fn is_empty(&self) -> bool {
        self.begun.is_empty() && self.ended.is_empty()
    }
}

/// The span of a session's time on this replica; it ends with it.
#[derive(Debug)]
pub(crate) struct SessionSpan {
    /// None where the session is in no trace.
    traced: Option<Traced>,
    begun: Instant,
    is_on_ranks: bool,
}

impl SessionSpan {
    pub(crate) fn open(sequence: &Sequence, now: Instant) -> Self {
        let traced = sequence.trace.as_ref().map(|parent| {
            // Of the level of errors, so that every line about a session has its ids, whatever else is logged.
            let span = tracing::error_span!(
                parent: None,
                "session",
                session = sequence.session.0,
                request_id = sequence.request_id,
                // Exporters know signed numbers only.
                epoch = sequence.epoch as i64,
                choice = i64::from(sequence.choice),
                trace_id = Empty,
                queue_ms = Empty,
                first_token_ms = Empty,
                completion_tokens = Empty,
            );
            Traced::open(span, Some(parent))
        });
        Self { traced, begun: now, is_on_ranks: false }
    }

    /// The parent of log lines about the session.
    pub(crate) fn id(&self) -> Option<tracing::Id> {
        self.traced.as_ref().and_then(|traced| traced.span().id())
    }

    /// It has a slot.
    pub(crate) fn note_slot(&self, now: Instant) {
        self.note("queue_ms", now);
    }

    /// It has its first token from here.
    pub(crate) fn note_first_token(&self, now: Instant) {
        self.note("first_token_ms", now);
    }

    fn note(&self, field: &'static str, now: Instant) {
        if let Some(traced) = &self.traced {
            traced.span().record(field, now.saturating_duration_since(self.begun).as_secs_f64() * 1e3);
        }
    }
}

/// The span of a session's handover to another replica.
pub(crate) fn handoff_span(sequence: &Sequence, target: &str) -> Option<Traced> {
    let span = |_| {
        tracing::error_span!(
            parent: None,
            "handoff",
            session = sequence.session.0,
            request_id = sequence.request_id,
            target,
            trace_id = Empty,
            otel.kind = "client",
            otel.status_code = Empty,
            otel.status_description = Empty,
        )
    };
    sequence.trace.as_ref().map(|parent| Traced::open(span(parent), Some(parent)))
}

impl EngineCore {
    /// What ranks are to be told with a step of these rows.
    pub(crate) fn rank_notes(&mut self, rows: &[&PlannedRow]) -> TraceNotes {
        for row in rows {
            let id = self.scheduler.session_of(row.task);
            let Some(session) = self.sessions.get_mut(&id).filter(|session| !session.span.is_on_ranks) else {
                continue;
            };
            if let Some(context) = session.sequence.trace.filter(TraceContext::is_sampled) {
                session.span.is_on_ranks = true;
                self.notes.begun.push((id.0, context));
            }
        }
        std::mem::take(&mut self.notes)
    }

    /// A session does not step here any more.
    pub(crate) fn note_left(&mut self, id: TaskId, session: &Session) {
        if let Some(traced) = &session.span.traced {
            traced.span().record("completion_tokens", session.sequence.completion() as i64);
        }
        if session.span.is_on_ranks {
            self.notes.ended.push(id.0);
        }
    }

    /// Tells the ranks what no step took along, because there is none.
    pub(crate) fn tell_notes(&mut self) -> Result<(), Fatal> {
        if self.notes.is_empty() {
            return Ok(());
        }
        match self.executor.note(std::mem::take(&mut self.notes)) {
            Err(error @ ExecutorError { fatal: true, .. }) => Err(Fatal::Executor(error)),
            // A span less.
            _ => Ok(()),
        }
    }
}
