//! The account of one move: its two sides, what they said, how long each phase took and what it cost; and from that the
//! answer to whoever asked for it, the log's one line, and the metrics. It decides nothing.

use std::sync::Arc;
use std::time::Duration;

use perigee_migration::Mode;
use perigee_migration::epochs::{Outcome, Phase, Side};
use perigee_proto::internal::MoveReport;
use perigee_proto::status::WireError;
use perigee_proto::v1;
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::attachment::Attachment;
use crate::error;
use crate::metrics::RouterMetrics;
use crate::wire;

/// What whoever asked for a move is told.
pub(crate) type MoveAnswer = Result<v1::MigrateResponse, WireError>;

/// One move.
#[derive(Debug)]
pub(crate) struct Transit {
    pub(crate) source: Arc<Attachment>,
    pub(crate) target: Arc<Attachment>,
    /// Address of the target's Replica service.
    pub(crate) endpoint: String,
    /// What moves: as asked for, then as the source did it.
    pub(crate) mode: Mode,
    /// The epoch that the session has at the target.
    pub(crate) next: u64,
    /// What became of it, once both sides have answered.
    pub(crate) outcome: Option<Outcome>,
    /// Time between the client's last token from before the commit and its first one after it.
    pub(crate) stall: Option<Duration>,
    /// What went wrong first.
    pub(crate) trouble: Option<Trouble>,
    times: Times,
    cost: Cost,
    answer: Option<oneshot::Sender<MoveAnswer>>,
}

/// Something that went wrong with a move.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Trouble {
    /// In a word, for programs.
    pub(crate) cause: &'static str,
    /// For people.
    pub(crate) message: String,
}

/// When what was heard.
#[derive(Debug)]
struct Times {
    begun: Instant,
    ready: Option<Instant>,
    committed: Option<Instant>,
    started: Option<Instant>,
    released: Option<Instant>,
    /// Of the last token before the commit.
    last_token: Option<Instant>,
}

/// What the source said with ready.
#[derive(Debug, Default)]
struct Cost {
    state_bytes: u64,
    page_bytes: u64,
    token_bytes: u64,
    frozen: Duration,
    export: Duration,
}

/// Who moves where, at the beginning.
#[derive(Debug)]
pub(crate) struct Sides {
    pub(crate) source: Arc<Attachment>,
    pub(crate) target: Arc<Attachment>,
    pub(crate) endpoint: String,
    pub(crate) mode: Mode,
}

impl Transit {
    /// A move that begins now; `answer` gets what became of it.
    pub(crate) fn new(sides: Sides, next: u64, now: Instant, answer: oneshot::Sender<MoveAnswer>) -> Self {
        let Sides { source, target, endpoint, mode } = sides;
        let times = Times { begun: now, ready: None, committed: None, started: None, released: None, last_token: None };
        Self {
            source,
            target,
            endpoint,
            mode,
            next,
            outcome: None,
            stall: None,
            trouble: None,
            times,
            cost: Cost::default(),
            answer: Some(answer),
        }
    }

    pub(crate) fn side(&self, side: Side) -> &Arc<Attachment> {
        match side {
            Side::Source => &self.source,
            Side::Target => &self.target,
        }
    }

    pub(crate) fn side_of(&self, attachment: &Attachment) -> Option<Side> {
        [Side::Source, Side::Target].into_iter().find(|side| self.side(*side).id == attachment.id)
    }

    /// Notes what went wrong, unless something did before.
    pub(crate) fn troubled(&mut self, cause: &'static str, message: impl Into<String>) {
        self.trouble.get_or_insert_with(|| Trouble { cause, message: message.into() });
    }

    /// Notes a report of one side.
    pub(crate) fn heard(&mut self, side: Side, phase: Phase, report: &MoveReport, now: Instant) {
        match (side, phase) {
            (Side::Source, Phase::Ready) => {
                self.times.ready.get_or_insert(now);
                self.mode = wire::mode(report.mode()).unwrap_or(self.mode);
                self.cost = Cost {
                    state_bytes: report.state_bytes,
                    page_bytes: report.page_bytes,
                    token_bytes: report.token_bytes,
                    frozen: Duration::from_micros(report.frozen_us),
                    export: Duration::from_micros(report.export_us),
                };
            }
            (Side::Target, Phase::Started) => drop(self.times.started.get_or_insert(now)),
            (Side::Source, Phase::Released) => drop(self.times.released.get_or_insert(now)),
            _ => {}
        }
    }

    /// The session is the target's; `last_token` is when the client had its last one from the source.
    pub(crate) fn committed(&mut self, last_token: Option<Instant>, now: Instant) {
        self.times.committed = Some(now);
        self.times.last_token = last_token;
    }

    pub(crate) fn is_committed(&self) -> bool {
        self.times.committed.is_some()
    }

    /// A token of the target was accepted, if it is the first.
    pub(crate) fn first_token(&mut self, now: Instant) {
        if self.is_committed() && self.stall.is_none() {
            self.times.started.get_or_insert(now);
            self.stall = Some(self.standing_since().map_or(Duration::ZERO, |since| now - since));
        }
    }

    /// Whether all is known that there is to know: the outcome and, where the client misses a token, its wait.
    pub(crate) fn is_complete(&self) -> bool {
        match self.outcome {
            None => false,
            Some(Outcome::Moved) => self.stall.is_some() || self.times.last_token.is_none(),
            Some(_) => true,
        }
    }

    /// Since when the client got nothing: its last token or, before the first one, the freeze.
    fn standing_since(&self) -> Option<Instant> {
        self.times.last_token.or_else(|| self.times.ready.and_then(|ready| ready.checked_sub(self.cost.frozen)))
    }

    /// Whether the session was moved: the target owned it, and stepped it as far as anybody knows.
    fn is_done(&self) -> bool {
        self.is_committed() && (self.outcome == Some(Outcome::Moved) || self.stall.is_some())
    }

    /// Closes the account: answers, counts, and writes the line. `epoch` and `owner` are the session's now.
    pub(crate) fn conclude(mut self, told: &Told<'_>, metrics: &RouterMetrics, now: Instant) {
        let is_done = self.is_done();
        if is_done && self.stall.is_none() {
            let until = if self.times.last_token.is_some() { now } else { self.times.started.unwrap_or(now) };
            self.stall = self.standing_since().map(|since| until.saturating_duration_since(since));
        }
        let stall = self.stall.unwrap_or_default();
        let mode = wire::mode_word(self.mode);
        let result = match self.outcome {
            _ if is_done => "done",
            Some(Outcome::Replayed) => "failed",
            _ => "aborted",
        };
        metrics.migrations.with_label_values(&[mode, result]).inc();
        if is_done {
            metrics.migration_stall.observe(stall.as_secs_f64());
            let Cost { state_bytes, page_bytes, token_bytes, .. } = self.cost;
            for (kind, bytes) in [("state", state_bytes), ("page", page_bytes), ("token", token_bytes)] {
                metrics.migration_bytes.with_label_values(&[kind]).inc_by(bytes);
            }
        }
        let phases = self.phases();
        tracing::info!(
            parent: told.span,
            session = told.session,
            request_id = told.request_id,
            from = &*self.source.identity.replica,
            to = &*self.target.identity.replica,
            mode,
            result,
            epoch = told.epoch,
            state_bytes = self.cost.state_bytes,
            page_bytes = self.cost.page_bytes,
            token_bytes = self.cost.token_bytes,
            stall_ms = milliseconds(stall),
            prepare_ms = phases.prepare_ms,
            frozen_ms = phases.frozen_ms,
            export_ms = phases.export_ms,
            start_ms = phases.start_ms,
            release_ms = phases.release_ms,
            cause = self.trouble.as_ref().map_or("", |trouble| trouble.cause),
            why = self.trouble.as_ref().map_or("", |trouble| trouble.message.as_str()),
            "session migration"
        );
        let answer = if is_done { Ok(self.response(stall, phases)) } else { Err(self.refusal(told)) };
        // Whoever asked may be gone.
        let _ = self.answer.take().map(|asker| asker.send(answer));
    }

    fn phases(&self) -> v1::MigratePhases {
        let Times { begun, ready, committed, started, released, .. } = self.times;
        let between = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => milliseconds(to.saturating_duration_since(from)),
            _ => 0.0,
        };
        v1::MigratePhases {
            prepare_ms: between(Some(begun), ready),
            frozen_ms: milliseconds(self.cost.frozen),
            export_ms: milliseconds(self.cost.export),
            start_ms: between(committed, started),
            release_ms: between(committed, released),
        }
    }

    fn response(&self, stall: Duration, phases: v1::MigratePhases) -> v1::MigrateResponse {
        v1::MigrateResponse {
            mode: wire::public_mode(self.mode).into(),
            epoch: self.next,
            state_bytes: self.cost.state_bytes,
            page_bytes: self.cost.page_bytes,
            token_bytes: self.cost.token_bytes,
            stall_ms: milliseconds(stall),
            phases: Some(phases),
        }
    }

    fn refusal(&self, told: &Told<'_>) -> WireError {
        let trouble = self.trouble.clone().unwrap_or_else(|| Trouble {
            cause: "ENDED",
            message: "the session ended, or its client went away".to_owned(),
        });
        let what = match self.outcome {
            Some(Outcome::Replayed) => "is replayed",
            Some(Outcome::Aborted) => "stays where it was",
            Some(Outcome::Ended | Outcome::Moved) | None => "ended on the way",
        };
        error::move_failed(what, &trouble, told.session, told.owner, told.epoch)
    }
}

/// What is told of a session beside its move.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Told<'a> {
    pub(crate) session: &'a str,
    pub(crate) request_id: &'a str,
    /// Its request's span.
    pub(crate) span: &'a tracing::Span,
    /// Who has it now; empty where nobody does.
    pub(crate) owner: &'a str,
    pub(crate) epoch: u64,
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
